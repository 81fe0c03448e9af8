"""An engine in a file of one's own, docs/examples/transformers_engine.py, on the embedded model."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from spa_ray.config.models import Config, Model
from spa_ray.engine import Request, create_engine
from spa_ray.engine.checked import defect
from spa_ray.errors import InputError
from spa_ray.pipeline.preflight import check_settings
from spa_ray.rollout.chat import Chat
from tests.plug_files import EXAMPLES
from tests.scripted import scripted_config

MODEL = Path(__file__).parents[1] / "spa_ray" / "microworld" / "model"
NAME = "transformers_engine:TransformersEngine"
QUESTION = [{"role": "user", "content": "How do I bake bread?"}]


@pytest.fixture(scope="module")
def engine() -> Any:
    sys.path.append(str(EXAMPLES))
    yield create_engine(Model(path=str(MODEL), engine=NAME, max_model_len=256), MODEL)
    sys.path.remove(str(EXAMPLES))
    sys.modules.pop("transformers_engine")


def request(engine: Any, **changes: Any) -> Request:
    ids = Chat(engine.tokenizer, model="m").prompt_ids(QUESTION)
    return Request(ids, **{"max_tokens": 40, "temperature": 1.0, "seed": 0, **changes})


def answers(engine: Any, *requests: Request) -> list[Any]:
    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*map(engine.generate, requests))

    found = asyncio.run(all_of_them())
    assert [defect(c, r) for c, r in zip(found, requests, strict=True)] == [None] * len(found)
    return found


def test_an_answer_is_a_function_of_the_request_and_its_seed(engine: Any) -> None:
    first, again, other = answers(engine, request(engine), request(engine), request(engine, seed=1))
    assert first == again != other
    assert (first.token_ids[-1] == engine.tokenizer.eos_token_id) == (first.finish_reason == "stop")
    (cut,) = answers(engine, request(engine, max_tokens=3, temperature=0.0))
    assert (len(cut.token_ids), cut.finish_reason) == (3, "length")


def test_labels_have_the_probabilities_of_the_whole_vocabulary_and_a_choice_is_one_of_them(engine: Any) -> None:
    labels = tuple(range(len(engine.tokenizer)))
    everything, choice = answers(
        engine, request(engine, label_ids=labels), request(engine, choices=("a", "b"), choice_ids=(5, 6))
    )
    assert math.fsum(map(math.exp, everything.label_logprobs)) == pytest.approx(1, abs=1e-4)
    assert choice.text in ("a", "b")


def test_a_continuation_is_as_probable_as_its_tokens_one_after_the_other(engine: Any) -> None:
    asked, behind = request(engine, max_tokens=1), (5, 6, 7, 8)
    steps = [
        Request([*asked.prompt_ids, *behind[:at]], 1, 0.0, 0, label_ids=(token,)) for at, token in enumerate(behind)
    ]
    together, *alone = answers(engine, Request(asked.prompt_ids, 1, 0.0, 0, continuation_ids=behind), *steps)
    assert together.continuation_logprobs == pytest.approx([step.label_logprobs[0] for step in alone], abs=1e-4)


def test_the_event_loop_stays_free_and_each_token_is_a_sign_of_life(engine: Any) -> None:
    ticks: list[float] = []

    async def meanwhile() -> None:
        asking = asyncio.gather(*(engine.generate(request(engine, seed=s, max_tokens=100)) for s in range(4)))
        while not asking.done():
            ticks.append(engine.stats().stalled)
            await asyncio.sleep(0.01)
        await asking

    started = time.monotonic()
    asyncio.run(meanwhile())
    assert len(ticks) > 0.2 * (time.monotonic() - started) / 0.01
    assert max(ticks) < time.monotonic() - started
    stats = engine.stats()
    assert stats.requests >= 4
    assert 0 < stats.busy <= stats.alive


def test_a_prompt_without_room_is_refused(engine: Any) -> None:
    with pytest.raises(ValueError, match="exceed the context of 256"):
        answers(engine, request(engine, max_tokens=250))


@pytest.mark.parametrize(
    ("able", "asked", "told"),
    [
        (("logprobs",), {"scoring": {"mode": "choice"}}, "do scoring.mode choice (its capabilities: logprobs)"),
        (("choices",), {"scoring": {"mode": "expected"}}, "do scoring.mode expected (its capabilities: choices)"),
        ((), {"scoring": {"mode": "regex"}, "refine": {"stop": "User:"}}, "do a stop string (its capabilities: none)"),
    ],
)
def test_what_an_engine_is_not_able_to_do_is_told_before_anything_starts(
    able: tuple[str, ...], asked: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spa_ray.engine.scripted import ScriptedEngine

    def check(config: Config) -> None:
        check_settings(config.model_copy(update={"model": config.model.model_copy(update={"path": str(MODEL)})}), MODEL)

    check(scripted_config(**asked))  # says nothing of itself: able to do all
    monkeypatch.setattr(ScriptedEngine, "capabilities", able, raising=False)
    with pytest.raises(InputError) as error:
        check(scripted_config(**asked))
    assert told in str(error.value)
