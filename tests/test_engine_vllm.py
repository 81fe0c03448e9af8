"""The vLLM engine against transformers, on a tiny model: legal choices, true probabilities, swapped weights, its death.

One engine serves the module; the tests that kill it stand last.
"""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spa_ray.config.models import Generation, Model
from spa_ray.engine import Completion, EngineDeadError, Request, create_engine
from spa_ray.errors import InputError
from spa_ray.generation.judging import Score, expected_score
from spa_ray.rollout.chat import Chat
from spa_ray.rollout.labels import labels_of

pytestmark = [pytest.mark.engine, pytest.mark.alone]

LABELS = tuple(str(k) for k in range(1, 11))
ENDS = ("<|end|>", "<|unused|>", "<|unused2|>", "<|pad|>")  # several ends, as Llama 3 has
QUESTIONS = [f"What is {k} and {k * 7}?" for k in range(12)]


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model` with several end tokens in its generation config, and a method's own modules beside the weights."""
    import torch

    from spa_ray.config.training import train_section
    from spa_ray.training.own_modules import Beside

    folder = tmp_path_factory.mktemp("engine") / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "generation_config.json").read_text())
    config["eos_token_id"] = sorted(end_ids(tokenizer_of(folder)))
    (folder / "generation_config.json").write_text(json.dumps(config))
    senses = Beside({"objectives": ["helpful"], "ranges": [[0, 1]]}, {"0.weight": torch.ones(2, 64)})
    senses.write(folder, train_section({"method": "sga_sft"}))
    return folder


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Any]:
    engine = create_engine(Model(path=str(model), dtype="float32", max_model_len=512), model)
    yield engine
    engine.shutdown()


def tokenizer_of(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def end_ids(tokenizer: Any) -> set[int]:
    return set(tokenizer.convert_tokens_to_ids(list(ENDS)))


def prompt(engine: Any, text: str) -> list[int]:
    return Chat(engine.tokenizer, model="tiny").prompt_ids([{"role": "user", "content": text}])


def request(engine: Any, text: str = "?", **changes: Any) -> Request:
    settings = {"max_tokens": 24, "temperature": 1.0, "seed": 0, **changes}
    return Request(prompt(engine, text), **settings)


def answers(engine: Any, requests: list[Request]) -> list[Completion]:
    async def all_of_them() -> list[Completion]:
        return await asyncio.gather(*(engine.generate(r) for r in requests))

    return asyncio.run(all_of_them())


def greedy_by_transformers(folder: Path, prompts: list[list[int]], ends: set[int], count: int) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    with torch.no_grad():
        for ids in prompts:
            out = list(ids)
            while len(out) < len(ids) + count and (len(out) == len(ids) or out[-1] not in ends):
                out.append(int(model(torch.tensor([out])).logits[0, -1].argmax()))
            found.append(out[len(ids) :])
    return found


def test_greedy_tokens_are_those_of_transformers(engine: Any, model: Path) -> None:
    got = answers(engine, [request(engine, q, temperature=0.0) for q in QUESTIONS])
    prompts = [prompt(engine, q) for q in QUESTIONS]
    assert [c.token_ids for c in got] == greedy_by_transformers(model, prompts, end_ids(engine.tokenizer), 24)


@pytest.mark.parametrize("one_step", [True, False], ids=["one token each", "by grammar"])
def test_a_constrained_answer_is_always_a_legal_label(engine: Any, one_step: bool) -> None:
    ids = labels_of(Chat(engine.tokenizer, model="m"), LABELS).single if one_step else None
    how = {"choices": LABELS, "choice_ids": ids}
    got = answers(engine, [request(engine, q, seed=s, **how) for q in QUESTIONS for s in range(8)])
    assert {c.text for c in got} <= set(LABELS)
    assert len({c.text for c in got}) > 3  # drawn, not fixed
    assert {c.finish_reason for c in got} == {"stop"}


def test_the_text_is_the_decoded_ids_and_one_end_token_stands_last_unless_the_answer_was_cut(engine: Any) -> None:
    got = answers(engine, [request(engine, q, seed=s, max_tokens=96) for q in QUESTIONS for s in range(6)])
    ends = end_ids(engine.tokenizer)
    assert {c.finish_reason for c in got} == {"stop", "length"}
    for completion in got:
        assert completion.text == engine.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        finished = completion.finish_reason == "stop"
        assert sum(token in ends for token in completion.token_ids) == finished
        assert (completion.token_ids[-1] in ends) == finished
        assert len(completion.token_ids) == 96 or finished


def test_a_seed_fixes_the_answer_whatever_else_is_in_flight(engine: Any) -> None:
    alone = answers(engine, [request(engine, "alone", seed=7)])[0]
    crowd = answers(engine, [request(engine, q, seed=s) for q in [*QUESTIONS, "alone"] for s in (6, 7)])
    assert crowd[-1] == alone
    assert crowd[-2] != alone


def test_label_probabilities_are_the_models_own_with_the_mass_off_the_scale(engine: Any, model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    labels = labels_of(Chat(engine.tokenizer, model="m"), LABELS).require_single()
    got = answers(engine, [request(engine, q, max_tokens=1, label_ids=labels) for q in QUESTIONS])
    truth = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for question, completion in zip(QUESTIONS, got, strict=True):
        with torch.no_grad():
            logits = truth(torch.tensor([prompt(engine, question)])).logits[0, -1]
        expected = torch.log_softmax(logits.float(), -1)[list(labels)].tolist()
        assert completion.label_logprobs == pytest.approx(expected, abs=1e-3)
        reading = expected_score(completion.label_logprobs, (1, 10))
        on_scale = math.fsum(map(math.exp, expected))
        assert isinstance(reading, Score)
        assert reading.off_scale == pytest.approx(1 - on_scale, abs=1e-4)
        mean = math.fsum(k * math.exp(p) for k, p in enumerate(expected, 1)) / on_scale
        assert reading.value == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize("asked_before", [False, True])  # then the prompt is in the cache
def test_a_continuation_has_the_log_probabilities_that_transformers_gives_it(
    engine: Any, model: Path, asked_before: bool
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    chat = Chat(engine.tokenizer, model="m")
    asked = "A question that is longer than a block of the cache is. " * 4
    pairs = [chat.continuation_ids([{"role": "user", "content": asked + q}], f" As {q} said") for q in QUESTIONS]
    if asked_before:
        answers(engine, [Request(before, 1, 0.0, 0) for before, _ in pairs])
    got = answers(engine, [Request(before, 1, 0.0, 0, continuation_ids=tuple(behind)) for before, behind in pairs])
    truth = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for (before, behind), completion in zip(pairs, got, strict=True):
        with torch.no_grad():
            logits = truth(torch.tensor([before + behind])).logits[0, len(before) - 1 : -1]
        expected = torch.log_softmax(logits.float(), -1)[range(len(behind)), behind].tolist()
        assert completion.continuation_logprobs == pytest.approx(expected, abs=1e-3)
        assert (completion.text, completion.token_ids, completion.finish_reason) == ("", [], "stop")


def test_swapped_weights_answer_as_the_other_model_and_back(engine: Any, model: Path, other_tiny_model: Path) -> None:
    prompts = [prompt(engine, q) for q in QUESTIONS]
    ends = end_ids(engine.tokenizer)
    ours = greedy_by_transformers(model, prompts, ends, 24)
    others = greedy_by_transformers(other_tiny_model, prompts, ends, 24)
    assert ours != others
    for folder, expected in ((other_tiny_model, others), (model, ours)):
        asyncio.run(engine.load_weights(folder))
        got = answers(engine, [request(engine, q, temperature=0.0) for q in QUESTIONS])
        assert [c.token_ids for c in got] == expected


def test_event_loops_of_several_threads_are_served_at_once(engine: Any) -> None:
    found: dict[int, list[Completion]] = {}

    def ask(number: int) -> None:
        found[number] = answers(engine, [request(engine, q, seed=number) for q in QUESTIONS])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(found) == [0, 1, 2]
    assert all(len(got) == len(QUESTIONS) for got in found.values())


def test_a_request_beyond_the_context_is_refused_and_the_next_one_answered(engine: Any) -> None:
    too_long = Request([5] * 500, max_tokens=20, temperature=1.0, seed=0)
    with pytest.raises(ValueError, match="exceed the context of 512"):
        answers(engine, [too_long])
    assert answers(engine, [request(engine)])


def test_a_request_that_vllm_refuses_fails_alone(engine: Any) -> None:
    async def both() -> list[Any]:
        bad = Request([10**6], max_tokens=4, temperature=1.0, seed=0)
        return await asyncio.gather(engine.generate(bad), engine.generate(request(engine)), return_exceptions=True)

    refused, answered = asyncio.run(both())
    assert isinstance(refused, ValueError)
    assert isinstance(answered, Completion)


def test_a_folder_that_vllm_refuses_is_a_mistake_of_the_user(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "config.json").write_text('{"model_type": "no such architecture"}')
    with pytest.raises(InputError, match="vLLM refuses it") as caught:
        create_engine(Model(path=str(folder)), folder)
    assert "\n" not in str(caught.value)


def test_the_deadlines_are_the_configs(engine: Any) -> None:
    limits = Generation()
    assert (engine._stall_s, engine._swap_s) == (limits.stall_timeout_s, limits.start_timeout_s)


def test_other_weights_may_take_as_long_as_a_start_to_load(
    engine: Any, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk so slow that the weights take longer than an engine may go without a step."""
    real = engine._engine.collective_rpc
    worst: list[float] = []

    def slow(*what: Any, **more: Any) -> Any:
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            time.sleep(0.1)
            worst.append(engine.stats().stalled)  # what the actor's watch looks at
        return real(*what, **more)

    async def swap_and_ask() -> Completion:
        swap = asyncio.ensure_future(engine.load_weights(model))
        await asyncio.sleep(0.2)
        answer = asyncio.ensure_future(engine.generate(request(engine)))
        await swap
        return await answer

    monkeypatch.setattr(engine, "_stall_s", 0.5)
    monkeypatch.setattr(engine._engine, "collective_rpc", slow)
    assert asyncio.run(swap_and_ask()).token_ids
    assert max(worst) == 0.0


def test_an_answer_ends_before_a_stop_string(engine: Any) -> None:
    """The free answers are looked at first: what stops the second one is two characters from the middle of it."""
    free = answers(engine, [request(engine, q, temperature=0.0, max_tokens=40) for q in QUESTIONS])
    question, whole, stop = next(
        (q, c, c.text[k : k + 2])
        for q, c in zip(QUESTIONS, free, strict=True)
        for k in range(2, len(c.text) - 2)
        if c.text[k - 1 : k + 2].isascii() and c.text[k : k + 2].isprintable() and c.text.find(c.text[k : k + 2]) == k
    )
    (cut,) = answers(engine, [request(engine, question, temperature=0.0, max_tokens=40, stop=(stop, "never"))])
    assert cut.finish_reason == "stop"
    assert (
        cut.text
        == whole.text[: whole.text.find(stop)]
        == engine.tokenizer.decode(cut.token_ids, skip_special_tokens=True)
    )
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert not set(cut.token_ids) & end_ids(engine.tokenizer)  # none was generated, none is invented


def test_a_special_token_can_be_named_as_a_stop_string(engine: Any) -> None:
    got = answers(
        engine, [request(engine, q, seed=s, max_tokens=96, stop=("<|user|>",)) for q in QUESTIONS for s in (0, 1, 2)]
    )
    mark = engine.tokenizer.convert_tokens_to_ids("<|user|>")
    stopped = [c for c in got if mark in c.token_ids]
    assert stopped  # among 36 answers of a model that says every token
    assert all(c.token_ids[-1] == mark and c.token_ids.count(mark) == 1 and c.finish_reason == "stop" for c in stopped)


def test_top_k_min_p_and_the_repetition_penalty_change_what_is_drawn(engine: Any) -> None:
    greedy = answers(engine, [request(engine, q, temperature=0.0) for q in QUESTIONS])
    for narrow in ({"top_k": 1}, {"min_p": 1.0}):
        got = answers(engine, [request(engine, q, temperature=2.0, **narrow) for q in QUESTIONS])
        assert [c.token_ids for c in got] == [c.token_ids for c in greedy]
    fresh = answers(engine, [request(engine, q, temperature=0.0, repetition_penalty=10.0) for q in QUESTIONS])
    assert sum(len(set(c.token_ids)) / len(c.token_ids) for c in fresh) > sum(
        len(set(c.token_ids)) / len(c.token_ids) for c in greedy
    )


def test_weights_that_do_not_load_in_the_time_of_a_start_end_the_engine(
    engine: Any, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung = threading.Event()
    real = engine._engine.collective_rpc
    monkeypatch.setattr(engine, "_dead", None)  # restored afterwards, so that the engine serves the next test
    monkeypatch.setattr(engine, "_swap_s", 0.5)
    monkeypatch.setattr(engine._engine, "collective_rpc", lambda *a, **k: (hung.wait(20), real(*a, **k))[1])
    try:
        with pytest.raises(EngineDeadError, match="start_timeout_s"):
            asyncio.run(engine.load_weights(model))
    finally:
        hung.set()
    engine._dead = None
    threading.Thread(target=engine._watch, daemon=True).start()  # the first one ended with its engine
    time.sleep(0.5)


def test_an_engine_that_stalls_counts_as_dead(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real_step, stalled = engine._engine.step, threading.Event()
    monkeypatch.setattr(engine, "_dead", None)  # restored afterwards, so that the engine serves the next test
    monkeypatch.setattr(engine, "_stall_s", 0.5)
    monkeypatch.setattr(engine._engine, "step", lambda: (stalled.wait(20), real_step())[1])
    started = time.monotonic()
    try:
        with pytest.raises(EngineDeadError, match="no step finished"):
            answers(engine, [request(engine)])
        assert time.monotonic() - started < 5
        with pytest.raises(EngineDeadError):
            answers(engine, [request(engine)])
    finally:
        stalled.set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_dies_fails_every_waiting_and_every_later_request_at_once(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("boom")

    async def ask(count: int) -> list[Any]:
        return await asyncio.gather(*(engine.generate(request(engine)) for _ in range(count)), return_exceptions=True)

    monkeypatch.setattr(engine._engine, "step", broken)
    started = time.monotonic()
    waiting, later = asyncio.run(ask(40)), asyncio.run(ask(3))
    assert time.monotonic() - started < 5
    assert {type(outcome) for outcome in [*waiting, *later]} == {EngineDeadError}
    assert "boom" in str(waiting[0])
