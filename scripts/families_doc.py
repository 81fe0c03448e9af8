"""Write docs/MODELS.md from docs/MODELS.json, the figures that `make families` measured.

`python scripts/families_doc.py` writes the file; with `--check` it only says (exit status 1) that it is out of date.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.families.checks import LAYOUT, MARGIN, SERVED  # noqa: E402
from tests.families.table import FAMILIES, WINDOW, Family  # noqa: E402

FIGURES = ROOT / "docs" / "MODELS.json"
OUT = ROOT / "docs" / "MODELS.md"
OPEN = "not measured"

HEAD = f"""# Model families

Written by `scripts/families_doc.py` from what `make families` measured; do not edit.

Each row is a small model with random weights and the real architecture of its family: norms, biases, ties, caps,
windows, rope scaling and head sizes as published. Weights are scaled so that these show. Chat templates have the form
of the family's own. Mistral's tokenizers are the real ones; the others are trained in the test with the family's
control tokens. Everything is float32 on a CPU, with sequences of up to several windows of {WINDOW} tokens.

"""

NOTES = f"""
- **shows**: mean change of a response token's log-prob when the feature is switched off. Each must exceed
  {10 * SERVED:g}: a wrong implementation cannot pass unseen.
- **render = train**: conversations (of 6: one turn, several, with a system turn, with an earlier thought) whose ids in
  training's token file are those of the renderer with vLLM's tokenizer.
- **system**: a system turn's text in the prompt, in front of the first or in the last user turn.
- **layouts**: the largest difference of a token's log-prob from transformers' eager attention, one sequence at a time,
  over the default layout (packed where it says so), padded rows, the chunked head, and gradient checkpointing.
  Tolerance {LAYOUT:g}. Gradients are compared as well (relative tolerance 0.01).
- **export**: the exported folder's log-probs against those of the policy in training, after two real steps. Names and
  shapes of its tensors equal the base model's. Tolerance {LAYOUT:g}.
- **vLLM log-probs**: teacher-forced, vLLM against transformers, on the exported folder. Tolerance {SERVED:g}.
- **greedy**: vLLM's tokens that transformers takes too / tokens where transformers' lead is above {MARGIN:g}; tokens
  below that lead are not compared.
- **ends**: end ids of generation_config.json that closed sampled answers / that it lists. An answer that finished has
  one of them, as its last id; an answer cut by length has none.

## Not checked

Real weights; bfloat16; GPU kernels (flash attention, vLLM's own); tensor parallelism; multimodal inputs and
vision-language checkpoints (Gemma-3's text model alone is checked); mixture-of-experts and hybrid (linear attention)
models; the tokenizers of other families than Mistral's; quantised checkpoints.
"""


def render() -> str:
    """The whole document."""
    figures = json.loads(FIGURES.read_text())
    head = ["family", "shows", "render = train", "system", "layouts", "export", "vLLM log-probs", "greedy", "ends"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    lines += ["| " + " | ".join(_row(FAMILIES[name], figures.get(name, {}))) + " |" for name in FAMILIES]
    return HEAD + "\n".join(lines) + "\n" + NOTES


def _row(family: Family, found: dict[str, Any]) -> list[str]:
    bites = "; ".join(f"{name} {value:.2g}" for name, value in found.get("bites", {}).items())
    rendered = f"{found['rendered alike']}/{found['of']}" if "of" in found else OPEN
    exports = [
        f"{kind} {_held(found[f'exported {kind}']['off'], LAYOUT)}"
        for kind in ("full", "lora")
        if f"exported {kind}" in found
    ]
    greedy, ends = found.get("greedy"), found.get("ends")
    return [
        family.title + (" (vLLM: transformers backend)" if family.backend else ""),
        bites or OPEN,
        rendered,
        found.get("system", OPEN),
        _layouts(found),
        ", ".join(exports) or OPEN,
        _held(found["forced"], SERVED) if "forced" in found else OPEN,
        f"{greedy['equal']}/{greedy['equal'] + greedy['different']}" if greedy else OPEN,
        f"{ends['met']}/{ends['of']}" if ends else OPEN,
    ]


def _held(value: float, tolerance: float) -> str:
    return f"{value:.0e}" if value < tolerance else f"FAILS: {value:.0e}"


def _layouts(found: dict[str, Any]) -> str:
    if "layouts" not in found:
        return OPEN
    worst = max(logps for logps, _ in found["layouts"].values())
    return f"{_held(worst, LAYOUT)}, {'packed' if found['packed'] else 'padded'}"


if __name__ == "__main__":
    text = render()
    if "--check" in sys.argv[1:]:
        current = OUT.exists() and OUT.read_text() == text
        sys.exit(0 if current else "docs/MODELS.md is out of date; run python scripts/families_doc.py")
    OUT.write_text(text)
