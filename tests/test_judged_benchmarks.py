"""MT-Bench and Arena-Hard: prompts byte for byte, verdicts, measures by hand, and a judge behind a real HTTP server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from spa_ray.config import arm_configs
from spa_ray.config.endpoint import Endpoint
from spa_ray.config.models import Config
from spa_ray.engine.openai import EndpointClient
from spa_ray.engine.scripted import ScriptedTokenizer
from spa_ray.errors import InputError
from spa_ray.evaluation.benchmarks import arena_hard, mt_bench
from spa_ray.generation.benchmark import Plays, benchmark_prompts, make_benchmark
from spa_ray.generation.setup import Task, check_judges
from spa_ray.pipeline.plan import make_plan
from spa_ray.pipeline.stage_keys import Known
from spa_ray.pipeline.stages import STAGES
from spa_ray.rollout.chat import Chat
from tests.fake_endpoint import FakeEndpoint, running
from tests.scripted import scripted_episodes
from tests.test_general_ability import SHARED, config_with, play, prompts_of

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write of a lamp.", "Shorter."]},
    {"question_id": 101, "category": "math", "turns": ["1 + 1?", "And 2 more?"], "reference": ["2", "4"]},
]
PROMPTS = [{"uid": name, "category": "arena-hard-v0.1", "cluster": "c", "prompt": f"Do {name}."} for name in ("x", "y")]
ANSWERS = [{"question_id": n, "choices": [{"turns": [{"content": f"Base {n}", "token_len": 2}]}]} for n in ("x", "y")]


def lines(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def questions(tmp_path: Path) -> str:
    return lines(tmp_path / "question.jsonl", QUESTIONS)


@pytest.fixture
def arena(tmp_path: Path) -> dict[str, str]:
    return {
        "path": lines(tmp_path / "arena.jsonl", PROMPTS),
        "baseline": lines(tmp_path / "gpt-4-0314.jsonl", ANSWERS),
        "judge": "self",
    }


# --- MT-Bench -------------------------------------------------------------------------------------------------------


def test_the_judge_of_a_second_turn_sees_the_conversation_and_the_references() -> None:
    asked = mt_bench.judge_prompt(["1 + 1?", "And 2 more?"], ["two", "four"], ["2", "4"])
    assert asked == (
        "You rate the answer of an assistant to the second question of the conversation below. Judge as a fair expert "
        "would: whether it is correct, relevant, helpful, deep, creative and detailed enough for what was asked. A "
        "reference answer is given: compare with it, and name the mistakes in the assistant's. First explain your view "
        "in a few sentences. Then end with a rating from 1 to 10 in this form: Rating: [[5]]\n\n"
        "## Question 1\n1 + 1?\n\n## Reference answer 1\n2\n\n## The assistant's answer 1\ntwo\n\n"
        "## Question 2\nAnd 2 more?\n\n## Reference answer 2\n4\n\n## The assistant's answer 2\nfour"
    )
    alone = mt_bench.judge_prompt(["Write."], ["A lamp."], [])
    assert "to the question below." in alone
    assert alone.endswith("[[5]]\n\n## Question 1\nWrite.\n\n## The assistant's answer 1\nA lamp.")


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Good. Rating: [[7]]", 7.0), ("[[7.5]]", 7.5), ("[[7]] or rather [[7]]", 7.0), ("[[10]]", 10.0),
        ("[[7]] no, [[8]]", None), ("[[11]]", None), ("[[0]]", None), ("[7]", None), ("ten", None), ("", None),
    ],
)  # fmt: skip
def test_a_rating_is_one_number_from_1_to_10(text: str, rating: float | None) -> None:
    assert mt_bench.rating(text) == rating


def test_two_turns_are_asked_at_the_categorys_temperature_and_judged_each(questions: str) -> None:
    said = {
        "question of the conversation below. Judge": "[[4]]",
        "question below. Judge": "[[8]]",
        "Shorter.": "Lamp.",
        "Write of a lamp.": "A lamp.",
        "And 2 more?": "four",
        "1 + 1?": "two",
    }
    rows, measures = play("mt_bench", said, path=questions, judge="self")
    writing, math = rows
    assert [(t["kind"], t["temperature"], t["text"]) for t in writing["responses"]] == [
        ("turn", 0.7, "A lamp."), ("turn", 0.7, "Lamp."), ("judge", 0.0, "[[8]]"), ("judge", 0.0, "[[4]]"),
    ]  # fmt: skip
    assert [t["temperature"] for t in math["responses"]] == [0.0] * 4
    means = {name: measure["mean"] for name, measure in measures.items() if name != "unjudged"}
    assert means == {"score": 6, "turn 1": 8, "turn 2": 4, "math": 6, "writing": 6}
    assert measures["unjudged"] == 0


def test_a_rating_that_cannot_be_read_is_counted_and_no_number(questions: str) -> None:
    rows, measures = play("mt_bench", {"question below. Judge": "[[8]]"}, path=questions, judge="self", retries=1)
    assert [judgement["verdict"] for judgement in rows[0]["result"]["ratings"]] == [8.0, None]
    assert [t["kind"] for t in rows[0]["responses"]].count("judge") == 3  # the second one twice
    assert (measures["score"]["mean"], measures["turn 2"], measures["unjudged"]) == (8, None, 2)


def test_a_question_of_two_ratings_counts_twice_one_of_one_once() -> None:
    assert mt_bench.mean_rating([[10.0, 10.0], [1.0, None]])["mean"] == 7  # type: ignore[index]
    assert mt_bench.mean_rating([[None, None]]) is None


def test_math_without_reference_answers_is_refused(tmp_path: Path) -> None:
    file = lines(tmp_path / "q.jsonl", [{**QUESTIONS[1], "reference": None}])
    with pytest.raises(InputError, match=r"q.jsonl:1: .* for math two reference answers, are needed; see references"):
        prompts_of("mt_bench", path=file, judge="self")
    answers = [{"question_id": n, "choices": [{"index": 0, "turns": ["two", "four"]}]} for n in (101, 102)]
    given = lines(tmp_path / "r.jsonl", answers)
    (row,) = prompts_of("mt_bench", path=file, references=given, judge="self")
    assert json.loads(row["meta"])["reference"] == ["two", "four"]


# --- Arena-Hard -----------------------------------------------------------------------------------------------------


def test_the_judge_of_arena_hard_sees_both_answers() -> None:
    asked = arena_hard.judge_prompt("Do x.", "one", "two")
    assert asked == f"{arena_hard.TASK}\n\n## Prompt\nDo x.\n\n## Answer of A\none\n\n## Answer of B\ntwo"
    assert [line[:7] for line in arena_hard.TASK.splitlines()[-5:]] == [
        "[[A>>B]",
        "[[A>B]]",
        "[[A=B]]",
        "[[B>A]]",
        "[[B>>A]",
    ]


@pytest.mark.parametrize(
    ("verdicts", "tally"),
    [
        (["B>A", "A>B"], (2, 2)),  # better in both orders
        (["B>>A", "B>A"], (3, 4)),  # clearly better once, slightly worse once
        (["A=B", "A>>B"], (3.5, 4)),
        (["A>>B", "A=B"], (0.5, 4)),
        (["B>A", None], (1, 1)),
        ([None, None], (0, 0)),
    ],
)
def test_a_clear_win_counts_three_times_and_a_tie_half(verdicts: list[str | None], tally: tuple[float, float]) -> None:
    assert arena_hard.wins(verdicts) == tally


def test_a_verdict_is_one_of_five_and_no_other() -> None:
    said = ["[[A>>B]]", "so [[A=B]] yes [[A=B]]", "[[A>B]] [[B>A]]", "[[A]]", "A>B", ""]
    assert [arena_hard.verdict(text) for text in said] == ["A>>B", "A=B", None, None, None, None]


def test_arena_hard_is_judged_in_both_orders(arena: dict[str, str]) -> None:
    """The judge always prefers what stands first: half of the weight is won."""
    said = {"Compare the answers": "[[A>B]]", "Do x.": "mine of x", "Do y.": "mine of y"}
    rows, measures = play("arena_hard", said, **arena)
    assert [t["kind"] for t in rows[0]["responses"]] == ["turn", "judge", "judge"]
    assert (measures["win_rate"]["mean"], measures["unjudged"]) == (0.5, 0)
    _, none = play("arena_hard", {"Do": "mine"}, **arena, retries=0)
    assert none == {"win_rate": None, "unjudged": 4}


def test_both_published_forms_of_baseline_answers_are_read(tmp_path: Path) -> None:
    second = {
        "uid": "x",
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": {"answer": "A"}}],
    }
    assert arena_hard.read_answers(lines(tmp_path / "2.jsonl", [second])) == {"x": "A"}
    assert arena_hard.read_answers(lines(tmp_path / "1.jsonl", ANSWERS)) == {"x": "Base x", "y": "Base y"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"baseline": None}, r"evaluation.benchmarks.arena_hard.baseline: missing|baseline: must be"),
        ({"judge": "base"}, "one of kind base takes the place of the model under test; give one of kind endpoint"),
        ({"judge": {"kind": "model", "path": "m"}}, "one of kind model takes the place of the model under test"),
    ],
)
def test_what_arena_hard_cannot_do_without_is_told(
    arena: dict[str, str], changes: Mapping[str, Any], told: str
) -> None:
    section = {key: value for key, value in {**arena, **changes}.items() if value is not None}
    with pytest.raises(InputError, match=told):
        config_with("arena_hard", **section)


def test_a_baseline_without_an_answer_is_told(arena: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"arena.jsonl:2: .*gpt.jsonl has no answer to y"):
        prompts_of("arena_hard", **{**arena, "baseline": lines(tmp_path / "gpt.jsonl", [ANSWERS[0]] * 2)})


# --- both -----------------------------------------------------------------------------------------------------------


def test_the_judge_is_part_of_the_stage_but_not_its_limits(questions: str) -> None:
    def key(**judge: Any) -> str:
        section = {"kind": "endpoint", "base_url": "http://localhost:1/v1", "model": "m", **judge}
        return STAGES["benchmark"].key(
            config_with("mt_bench", path=questions, judge=section), {}, Known(benchmark="mt_bench")
        )

    assert key() == key(max_concurrency=3, retries=1)
    assert key() != key(model="other")


def test_a_plan_prices_the_judge_and_a_budget_needs_its_price(questions: str) -> None:
    def config(**judge: Any) -> Config:
        section = {"kind": "endpoint", "base_url": "http://localhost:1/v1", "model": "m", **judge}
        raw = {
            "model": {"path": "org/some-8B"},
            "prompts": {"source": "honeset", "limit": 10},
            "evaluation": {"benchmarks": {"mt_bench": {"path": questions, "judge": section}}},
            "budget": {"usd": 5},
        }
        return arm_configs(raw, [], where="test", stem="test")["main"]

    with pytest.raises(InputError, match=r"budget.usd needs evaluation.benchmarks.mt_bench.judge.price"):
        config()
    plan = make_plan({"main": config(price={"input": 1, "output": 10})})
    stages = [stage for stage in plan["stages"] if stage["stage"] == "benchmark:mt_bench"]
    assert [(s["rows"], s["requests"], s["judge"]["requests"]) for s in stages] == [(2, 4, 4)] * 2
    assert all(stage["judge"]["usd"] > 4 * 400 * 10 / 1e6 for stage in stages)


EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def played(name: str, by: Any, **section: Any) -> tuple[list[dict[str, Any]], Any]:
    """Rows and measures by a judge that writes no text, made as a run makes it."""
    config = config_with(name, **{**section, "judge": by})
    check_judges(config)
    chosen = config.evaluation.benchmarks[name]
    plays, _ = scripted_episodes(config, Task(kind="play", scored=False, benchmark=name))

    async def all_rows() -> list[dict[str, Any]]:
        return [await plays.run(prompt) for prompt in benchmark_prompts(chosen, where=name)]

    rows = asyncio.run(all_rows())
    assert [row["error"] for row in rows] == [None] * len(rows)
    metas = [json.loads(row["meta"]) for row in rows]
    rows = [{**row, "result": meta.pop("result"), "meta": meta} for row, meta in zip(rows, metas, strict=True)]
    return rows, make_benchmark(chosen).metrics(rows)


def test_a_function_rates_every_turn_with_the_conversation_before_it(
    questions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "turns_judge.py").write_text(
        "def judge(messages, meta, response, objective):\n"
        "    assert (objective, messages[-1]['role']) == ('quality', 'user') and response\n"
        "    return {1: 4, 3: 11 if 'math' in meta else 7}[len(messages)]\n"
    )
    rows, measures = played("mt_bench", "turns_judge:judge", path=questions)
    assert [[r["verdict"] for r in row["result"]["ratings"]] for row in rows] == [[4, 7], [4, None]]
    assert "parse_failure" in rows[1]["result"]["ratings"][1]["text"]
    assert (measures["score"]["mean"], measures["unjudged"]) == (5, 1)
    assert "judge" not in {turn["kind"] for row in rows for turn in row["responses"]}


def test_a_pairwise_judge_of_ones_own_compares_with_the_baseline_in_both_orders(
    arena: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shorter answer wins: the baseline's two words, against a scripted answer of more."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    rows, measures = played("arena_hard", "shorter:Shorter", **arena)
    assert [[v["verdict"] for v in row["result"]["verdicts"]] for row in rows] == [["A>B", "B>A"]] * 2
    assert rows[0]["result"]["verdicts"][0]["text"].startswith("2 words and ")
    assert (measures["win_rate"]["mean"], measures["unjudged"]) == (0, 0)
    _, tied = played("arena_hard", {"kind": "function", "name": "shorter:Shorter", "config": {"slack": 999}}, **arena)
    assert tied["win_rate"]["mean"] == 0.5


def test_a_reward_model_compares_by_its_outputs_and_rates_where_they_are_made_a_rating(
    arena: dict[str, str], questions: str, reward_model: Path
) -> None:
    section = {"kind": "reward", "path": str(reward_model), "attribute": 0}
    rows, measures = played("arena_hard", section, **arena)
    for row in rows:
        there, back = row["result"]["verdicts"]
        first, second = map(float, there["text"].split())
        assert there["verdict"] == ("A>B" if first > second else "B>A")
        assert back["verdict"] == ("B>A" if first > second else "A>B")
    assert measures["unjudged"] == 0
    _, measures = played("mt_bench", {**section, "transform": "sigmoid"}, path=questions)
    assert 1 < measures["score"]["mean"] < 10
    raw, none = played("mt_bench", {**section, "transform": [0.0, 99.0]}, path=questions)
    assert (none["score"], none["unjudged"]) == (None, 4)
    assert "off the scale 1..10" in raw[0]["result"]["ratings"][0]["text"]


def test_a_judge_that_is_none_is_told_before_anything_starts(questions: str, arena: dict[str, str]) -> None:
    for name, judge, section in (
        ("mt_bench", "no_such_file:judge", {"path": questions}),
        ("arena_hard", {"kind": "reward", "path": "/no/such"}, arena),
    ):
        with pytest.raises(InputError, match=rf"evaluation.benchmarks.{name}.judge: "):
            check_judges(config_with(name, **{**section, "judge": judge}))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public data sets are not beside this checkout")
def test_the_published_files_are_read_completely() -> None:
    folder = SHARED / "mt_bench"
    section = {"path": str(folder / "question.jsonl"), "references": str(folder / "reference_answer_gpt-4.jsonl")}
    assert len(prompts_of("mt_bench", **section, judge="self")) == 80


def test_what_an_endpoint_says_is_a_turn_of_the_play_and_asked_again_as_another_attempt(questions: str) -> None:
    def says(number: int, body: dict[str, Any]) -> tuple[int, dict[str, str], str] | str:
        return "hm" if number == 0 else "Rating: [[9]]"

    async def rated(fake: FakeEndpoint) -> dict[str, Any]:
        section = Endpoint(kind="endpoint", base_url=fake.url, model="judge", max_concurrency=1)
        config = config_with("mt_bench", path=questions, judge=section.model_dump(), limit=1)
        chosen = config.evaluation.benchmarks["mt_bench"]
        client = EndpointClient(section, None)
        plays = Plays(chosen, scripted_episodes(config)[1], Chat(ScriptedTokenizer(), model="m"), 0, client.ask)
        (prompt,) = benchmark_prompts(chosen, where="mt_bench")
        return await plays.run(prompt)

    with running(FakeEndpoint(says)) as fake:
        row = asyncio.run(rated(fake))
    assert row["error"] is None
    assert sorted(t["text"] for t in row["responses"] if t["kind"] == "judge") == ["Rating: [[9]]"] * 2 + ["hm"]
    assert [r["verdict"] for r in json.loads(row["meta"])["result"]["ratings"]] == [9.0, 9.0]
    asked = sum(len(t["token_ids"]) for t in row["responses"])
    assert row["generated_tokens"] == asked + 3 * 2  # as the endpoint counts its own


@pytest.mark.engine
def test_a_judge_behind_an_endpoint_rates_in_spa_eval(
    tmp_path: Path, questions: str, tiny_model: Path, ray_session: None
) -> None:
    from spa_ray import evaluate

    def says(number: int, body: dict[str, Any]) -> str:
        return "no idea" if "conversation below" in body["messages"][-1]["content"] else "Rating: [[9]]"

    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    with running(FakeEndpoint(says)) as fake:
        judge = {"kind": "endpoint", "base_url": fake.url, "model": "judge"}
        raw = {
            "model": {"path": str(tiny_model), "engine": "spa_ray.engine.scripted:ScriptedEngine"},
            "evaluation": {
                "prompts": {"source": str(tmp_path / "p.jsonl")},
                "judge": "self",
                "benchmarks": {"mt_bench": {"path": questions, "judge": judge, "retries": 1}},
            },
        }
        measures = evaluate(tiny_model, config=raw, out=tmp_path / "out")["benchmarks"]["mt_bench"]["measures"]
        assert (measures["score"]["mean"], measures["turn 2"], measures["unjudged"]) == (9, None, 2)
        assert len(fake.bodies) == 2 + 2 * 2  # the ratings that cannot be read twice each
        assert {body["temperature"] for body in fake.bodies} == {0.0}
        assert evaluate(tiny_model, config=raw, out=tmp_path / "out")["benchmarks"]["mt_bench"]["measures"] == measures
        assert len(fake.bodies) == 6
