"""Ten thousand hostile engine answers through the three scoring modes and the whole episode: an answer that is none
becomes its prompt's error, a judgement that is none is null, every row fits the schema. Seeds are fixed and printed."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from spa_ray.config.models import Model
from spa_ray.data.schemas import EPISODES
from spa_ray.engine.protocol import Completion, Request
from spa_ray.engine.scripted import ScriptedEngine
from spa_ray.generation.setup import Task, make_episodes
from tests.scripted import WEIGHTS, prompt, scripted_config

SEED = 20_261_121
EPISODES_A_MODE = 420  # of about 8 judgements each: over 10,000 in all
TEXTS = [
    "",
    " ",
    "7",
    "07",
    "+7",
    "-7",
    "7.5",
    "7/10",
    "47/5",
    "11",
    "0",
    "1e1",
    "ten",
    "NaN",
    "inf",
    "٧",
    "７",
    "VII",
    "7\n",
]
TEXTS += [
    "[[7]]",
    "[[7]] [[7]]",
    "[[7]] [[8]]",
    "[[",
    "[[]]",
    "[[7",
    "[[ 7 ]]",
    "[[11]]",
    "[[٧]]",
    "Rating: [[3]]",
    "7 8",
]
TEXTS += [
    "x" * 5000,
    "9" * 5000,
    "\x00",
    "\x1b[2J[[5]]",
    "\u2028[[5]]",
    "\u202e[[5]]",
    "{{ 7 * 7 }}",
    "<end>",
    "null",
    "True",
]
NUMBERS = (-0.0, -0.5, -30.0, -math.inf, math.inf, math.nan, 0.0, 0.5, 800.0, 1e308, -1e308, 5e-324)


class HostileEngine(ScriptedEngine):
    """Answers as the scripted engine does, and now and then with anything else; counts what it said."""

    def __init__(self, rng: random.Random, *, share: float) -> None:
        super().__init__(Model(path="m"), WEIGHTS)
        self.rng, self.share = rng, share
        self.unsound = 0  # in the present episode
        self.judged = 0

    async def generate(self, request: Request) -> Completion:
        sound = await super().generate(request)
        judging = request.choices is not None or request.label_ids is not None or request.max_tokens < 60
        self.judged += judging
        if self.rng.random() >= self.share:
            return sound
        if self.rng.random() < 0.05:
            self.unsound += 1
            return self.no_answer(sound)
        if request.label_ids is not None:
            few = len(request.label_ids)
            labels = tuple(self.rng.choice(NUMBERS) for _ in range(few))
            return Completion("7", [7], "length", labels if self.rng.random() < 0.8 else (-2.0,) * few)
        text = self.rng.choice(TEXTS)
        return Completion(text, list(text.encode())[: request.max_tokens], self.rng.choice(["stop", "length"]))

    def no_answer(self, sound: Completion) -> Completion:
        """What no engine may answer."""
        labels, ids = sound.label_logprobs, sound.token_ids
        kinds: list[Completion] = [
            Completion(None, ids, "stop", labels),  # type: ignore[arg-type]
            Completion(b"7", ids, "stop", labels),  # type: ignore[arg-type]
            Completion("\ud83d", ids, "stop", labels),
            Completion("7", [-1], "stop", labels),
            Completion("7", [2**31], "stop", labels),
            Completion("7", [2**70], "stop", labels),
            Completion("7", [1.5], "stop", labels),  # type: ignore[list-item]
            Completion("7", [True], "stop", labels),
            Completion("7", None, "stop", labels),  # type: ignore[arg-type]
            Completion("7", ids, "abort", labels),  # type: ignore[arg-type]
            Completion("7", ids, None, labels),  # type: ignore[arg-type]
        ]
        if labels is not None:
            kinds += [
                Completion("7", ids, "stop", None),
                Completion("7", ids, "stop", labels[:-1]),
                Completion("7", ids, "stop", (*labels, -1.0)),
                Completion("7", ids, "stop", (None,) * len(labels)),  # type: ignore[arg-type]
                Completion("7", ids, "stop", ("-1",) * len(labels)),  # type: ignore[arg-type]
            ]
        return self.rng.choice(kinds)


@pytest.mark.parametrize(
    "scoring",
    [
        {"mode": "choice"},
        {"mode": "regex", "max_tokens": 40, "draws": 2},
        {"mode": "expected", "scale": [1, 9]},
    ],
    ids=lambda scoring: scoring["mode"],
)
def test_whatever_an_engine_answers_each_prompt_ends_in_a_row_that_means_what_it_says(scoring: dict[str, Any]) -> None:
    print("seed", SEED)
    rng = random.Random(SEED)
    config = scripted_config(scoring=scoring)
    engine = HostileEngine(rng, share=0.3)
    episodes = make_episodes(config, Task(), engine, WEIGHTS)

    async def play() -> list[tuple[dict[str, Any], int]]:
        out = []
        for number in range(EPISODES_A_MODE):
            engine.unsound = 0
            out.append((await episodes.run(prompt(f"question {number}")), engine.unsound))
        return out

    told = asyncio.run(play())
    for number, (row, unsound) in enumerate(told):
        where = f"seed {SEED}, mode {scoring['mode']}, prompt {number}"
        assert (row["error"] is None) == (unsound == 0), where
        assert row["error"] is None or row["error"].startswith("internal: RuntimeError: the engine's answer "), where
        check_row(row, scale=scoring.get("scale", [1, 10]), where=where)
    table = pa.Table.from_pylist([row for row, _ in told], schema=EPISODES)  # as the actor does
    table.validate(full=True)
    assert table.num_rows == EPISODES_A_MODE
    assert engine.judged > 10_000 / 3
    ends = Counter(row["error"] is None for row, _ in told)
    assert min(ends[True], ends[False]) > 20


def check_row(row: dict[str, Any], *, scale: list[int], where: str) -> None:
    assert row["scores"] == [response["scores"] for response in row["responses"]], where
    if row["error"] is not None:
        assert row["responses"] == [], where
    for response in row["responses"]:
        told = zip(
            response["scores"], response["score_status"], response["score_draws"], response["off_scale"], strict=True
        )
        for score, status, draws, off_scale in told:
            assert (score is None) == (status != "ok") == (None in draws), where
            assert status == "ok" or status.split(":")[0] in {"parse_failure", "truncated"}, where
            assert score is None or scale[0] <= score <= scale[1], where
            assert off_scale is None or 0 <= off_scale <= 1, where


@pytest.mark.parametrize("number", [n for n in NUMBERS if not n <= 1e-3])
def test_a_log_probability_that_is_none_is_no_score(number: float) -> None:
    from spa_ray.generation.judging import ParseFailure, expected_score

    for at in range(9):
        reading = expected_score([*[-3.0] * at, number, *[-3.0] * (8 - at)], (1, 9))
        assert isinstance(reading, ParseFailure)
        assert "log-probability is" in reading.why


def oddly(value: Any) -> Callable[..., Any]:
    return lambda messages, meta, answer, objective: value


@pytest.mark.parametrize(
    "value",
    [None, "7", b"7", True, math.nan, math.inf, -1, 11, 10**400, [7], {}, complex(7), object(), "\ud83d"],
    ids=lambda value: type(value).__name__,
)
def test_a_judge_function_that_returns_anything_else_gives_no_score(
    value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tests.scripted as place

    monkeypatch.setattr(place, "word_count", oddly(value))
    config = scripted_config(scoring={"judge": "tests.scripted:word_count"})
    engine = ScriptedEngine(config.model, WEIGHTS)
    episodes = make_episodes(config, Task(), engine, WEIGHTS)
    row = asyncio.run(episodes.run(prompt()))
    pa.Table.from_pylist([row], schema=EPISODES).validate(full=True)
    assert row["error"] is None
    assert {score for scores in row["scores"] for score in scores} == {None}
    check_row(row, scale=[1, 10], where=repr(value))
