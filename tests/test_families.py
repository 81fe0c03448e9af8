"""Small random models of real architectures through rendering, training, export and vLLM: a row per family.

`make families` plays all of them and writes docs/MODELS.json, from which docs/MODELS.md is made; `make test` plays
`QUICK`. What is measured stands in tests/families/checks.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import checks, served
from tests.families.cases import CONVERSATIONS, SYSTEM, Case
from tests.families.table import FAMILIES, WINDOW

QUICK = ("qwen3", "gemma-2")
SERVED = ("gemma-2",)  # of these, by vLLM
OUT = "SPA_FAMILIES_OUT"  # the JSON file that rows are written to
LAYOUTS: dict[str, dict[str, Any]] = {
    "default": {},
    "padded": {"packing": False, "logits_mib": None},
    "chunked head": {"logits_mib": 0.01},
    "checkpointing": {"gradient_checkpointing": True},
}

pytestmark = [pytest.mark.engine, pytest.mark.alone, pytest.mark.usefixtures("one_process")]


def _names() -> list[Any]:
    return [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.families]) for n in FAMILIES]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Products of this size are no faster on two threads, and wait for each other where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=_names())
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """Its row is written when its last check is done, if anybody wants it."""
    case = Case(request.param, tmp_path_factory.mktemp(request.param))
    yield case
    if out := os.environ.get(OUT):
        path = Path(out)
        rows = json.loads(path.read_text()) if path.exists() else {}
        rows[case.name] = case.found
        path.write_text(json.dumps({n: rows[n] for n in FAMILIES if n in rows}, indent=1) + "\n")


def test_what_the_architecture_does_can_be_seen(case: Case) -> None:
    bites = checks.bites(case.family, case.folder, case.rows, torch.cat(case.truth))
    lengths = [len(prompt) + len(response) for prompt, response in case.rows]
    case.found["bites"] = bites
    case.found["margins"] = checks.margins(case.folder, case.rows)
    case.found["longest"] = max(lengths)
    assert max(lengths) > 2 * WINDOW
    assert min(bites.values()) > 10 * checks.SERVED, bites
    assert case.found["margins"] > 0.8


def test_prompts_are_rendered_as_the_template_has_them(case: Case) -> None:
    first = case.tokenizer.decode(case.rendered[0])
    bos = case.tokenizer.bos_token
    if bos is not None and "bos_token" in case.tokenizer.chat_template:
        assert first.count(bos) == 1
    with_system = case.tokenizer.decode(case.rendered[4])
    assert with_system.count(SYSTEM) == 1, with_system
    talk = case.tokenizer.decode(case.rendered[5])
    where = talk.index(SYSTEM), talk.index("Which river"), talk.index("And the second")
    case.found["system"] = "last" if where[0] > where[1] else "first"
    assert where[1] < where[2]
    assert case.found["system"] == ("last" if case.family.system == "last" else "first")
    if case.family.thinking:
        assert first.rstrip().endswith("</think>"), first
        assert "Nile or Amazon" not in talk
    assert ("01 Mar 2026" in first) == case.family.dated


def test_every_layout_of_training_gives_the_models_log_probs_and_gradients(case: Case) -> None:
    gradients = checks.true_gradients(checks.plain_model(case.folder), case.rows)
    found = {}
    for name, settings in LAYOUTS.items():
        with case.policy(**settings) as policy:
            found[name] = checks.layout(policy, case.rows, torch.cat(case.truth), gradients)
            if name == "default":
                case.found["packed"] = policy.packed
    case.found["layouts"] = found
    assert max(logps for logps, _ in found.values()) < checks.LAYOUT, found
    assert max(gradient for _, gradient in found.values()) < 1e-2, found


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_exported_folder_is_the_trained_policy(case: Case, kind: str) -> None:
    if kind == "lora" and not case.family.lora:
        pytest.skip("LoRA is tried with two families")
    job, policy = case.trained if kind == "full" else case.adapted
    exported = torch.cat(checks.true_logps(checks.plain_model(job.out), case.rows))
    off = float((exported - policy).abs().max())
    moved = float((exported - torch.cat(case.truth)).abs().mean())
    case.found[f"exported {kind}"] = {"off": off, "moved": moved}
    assert off < checks.LAYOUT
    assert moved > 10 * checks.LAYOUT
    assert checks.tensors(job.out) == checks.tensors(case.folder)


def test_vllm_serves_the_trained_policy(case: Case) -> None:
    if case.name in QUICK and case.name not in SERVED and OUT not in os.environ:
        pytest.skip("vLLM is asked by `make families`")
    job, _ = case.trained
    prompts = case.rendered
    sequences = [[*prompt.tolist(), *response.tolist()] for prompt, response in case.rows]
    play = served.play_apart if case.family.backend else served.play
    played = play(job.out, case.settings, CONVERSATIONS, sequences, prompts)
    same = [found == ids for found, ids in zip(played.rendered, prompts, strict=True)]
    truth = torch.cat(checks.true_logps(checks.plain_model(job.out), case.rows))
    got = torch.tensor(
        [x for logps, (_, response) in zip(played.forced, case.rows, strict=True) for x in logps[-len(response) :]]
    )
    off = float((got - truth).abs().max())
    tokens = checks.greedy_agreement(job.out, prompts, [ids for ids, _ in played.greedy])
    ends = checks.ends_met(played.drawn, case.ends)
    case.found |= {"rendered alike": sum(same), "of": len(same), "forced": off, "greedy": tokens, "ends": ends}
    assert all(same)
    assert off < checks.SERVED
    assert tokens["different"] == 0, tokens
    assert tokens["equal"] > 0.8 * sum(tokens.values()), tokens
    assert ends["met"] == len(case.ends), ends
    assert ends["wrong"] == 0, ends
