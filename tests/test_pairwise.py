"""Two answers compared: prompts and how verdicts are read, both orders, win rates, keys, plans, and whole passes."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from spa_ray.cli.demo import demo_config
from spa_ray.config import arm_configs
from spa_ray.config.models import Config, named_plugs
from spa_ray.data.episodes import EpisodeFolder
from spa_ray.data.schemas import EPISODES, JUDGEMENTS
from spa_ray.engine import check_capabilities
from spa_ray.engine.scripted import ScriptedEngine
from spa_ray.errors import InputError
from spa_ray.evaluation.win_rates import compared, first_wins, judgements, win_rate, win_rates
from spa_ray.generation import pairwise
from spa_ray.generation.pairwise import PairwiseJudge, Verdict, read_verdict
from spa_ray.generation.setup import Task, check_judges, make_episodes
from spa_ray.generation.templates import PairTemplate
from spa_ray.objectives import load_objectives
from spa_ray.pipeline import recipe
from spa_ray.pipeline.judged import references
from spa_ray.pipeline.plan import make_plan
from spa_ray.pipeline.preflight import check_opponent, eval_config
from spa_ray.pipeline.stage_keys import Known
from spa_ray.pipeline.stages import STAGES
from tests.fake_endpoint import FakeEndpoint, running
from tests.scripted import WEIGHTS, scripted_config

HERE = "tests.test_pairwise"
ORACLE = "spa_ray.microworld.oracle:judge"
EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
NAN = math.nan


def pairwise_config(script: dict[str, Any] | None = None, **section: Any) -> Config:
    return scripted_config(script, evaluation={"pairwise": section})


def asked(a: str, b: str, prompt_id: str = "test/1", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "How do I bake bread?"}]
    return {"prompt_id": prompt_id, "messages": messages, "meta": "{}", "responses": [{"text": a}, {"text": b}], **more}


def play(config: Config, a: str, b: str, ask: Any = None, **more: Any) -> dict[str, Any]:
    """One comparison's row."""
    judged = eval_config(config, "pairwise.judge")
    engine = ScriptedEngine(config.model, WEIGHTS, **config.model.engine_kwargs)
    comparisons = make_episodes(judged, Task(kind="compare"), engine, WEIGHTS, ask)
    return asyncio.run(comparisons.run(asked(a, b, **more)))


def verdicts(row: dict[str, Any]) -> list[list[float | None]]:
    return [response["scores"] for response in row["responses"]]


class Longer(PairwiseJudge):
    def compare(self, item: Any, a: str, b: str) -> Any:
        if "fail" in (a, b):
            raise KeyError("no such thing")
        return {"odd": 7, "sick": Verdict(None, "hm", "the service is down")}.get(
            b, "tie" if len(a) == len(b) else "a" if len(a) > len(b) else "b"
        )


# --- what a model is asked, and how it reads ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "finished", "winner", "status"),
    [
        ("B is rude. [[A]]", True, "a", "ok"),
        ("[[C]] indeed [[C]]", True, "tie", "ok"),
        ("[[B]]", False, "b", "ok"),
        ("[[A]] or [[B]]", True, None, "parse_failure: several verdicts: A, B"),
        ("I prefer A.", True, None, "parse_failure: no verdict in 'I prefer A.'"),
        ("[[D]]", True, None, "parse_failure: no verdict"),
        ("I weigh", False, None, "truncated"),
    ],
)
def test_one_verdict_is_read_and_everything_else_is_a_failure(said: str, finished: bool, winner: Any, status: str):
    found = read_verdict(said, text=said, finished=finished)
    assert found.winner == winner
    assert found.status.startswith(status)


@pytest.mark.parametrize("mode", ["regex", "choice"])
def test_the_prompt_shows_the_conversation_both_answers_and_one_objective(mode: str) -> None:
    config = pairwise_config(mode=mode)
    objectives = load_objectives(config)
    turns = [("user", "first"), ("assistant", "second"), ("user", "third")]
    messages = [{"role": role, "content": content} for role, content in turns]
    template = PairTemplate(config.evaluation.pairwise, objectives)
    text = template.render(messages, "ONE {{ x }}", "TWO", objectives[0])
    assert "[Conversation]\nUser: first\nAssistant: second\nUser: third\n" in text
    assert text.index("[Answer A]\nONE {{ x }}") < text.index("[Answer B]\nTWO")
    assert "harmless" in text
    assert "helpful" not in text
    assert ("[[A]]" in text) == (mode == "regex")
    assert "[Question]\nfirst\n\n[Answer A]" in template.render(messages[:1], "ONE", "TWO", objectives[0])


def test_a_template_with_an_unknown_variable_is_told_before_a_run() -> None:
    with pytest.raises(InputError, match=r"evaluation\.pairwise\.prompt: there is no variable 'answer' here"):
        check_judges(pairwise_config(prompt="{{ answer }}"))


def test_a_model_is_constrained_to_one_letter_and_asked_in_both_orders() -> None:
    config = pairwise_config(mode="choice", judge="self")
    row = play(config, "salt", "river")
    assert row["error"] is None
    assert [response["kind"] for response in row["responses"]] == ["ab", "ba"]
    assert {score for scores in verdicts(row) for score in scores} <= {-1.0, 0.0, 1.0}
    assert row["generated_tokens"] > 0
    assert play(config, "salt", "river") == row
    assert len(play(pairwise_config(mode="choice", both_orders=False), "a", "b")["responses"]) == 1


def test_a_model_that_answers_nonsense_fails_and_is_never_a_number() -> None:
    row = play(pairwise_config({"unreadable": 1.0}, mode="choice"), "salt", "river")
    assert verdicts(row) == [[None, None], [None, None]]
    assert row["responses"][0]["score_status"][0] == "parse_failure: no verdict in 'ten'"
    long = play(pairwise_config(max_tokens=8190), "salt", "river")
    assert long["responses"][1]["score_status"][1].startswith("too_long: ")


def test_an_endpoint_is_asked_again_until_its_verdict_reads() -> None:
    """It always prefers the answer shown first, and says so only when asked again."""
    fake = FakeEndpoint(act=lambda number, body: "Hm." if number < 4 else "Well. [[A]]")
    with running(fake):
        judge = {"kind": "endpoint", "base_url": fake.url, "model": "judge"}
        row = play(pairwise_config(judge=judge, retries=2, max_tokens=50), "salt", "river")
    assert verdicts(row) == [[1.0, 1.0], [-1.0, -1.0]]  # each order's own first: a tie by the rule
    assert len(fake.bodies) == 8
    assert {body["max_tokens"] for body in fake.bodies} == {50}
    assert [len(body["messages"]) for body in fake.bodies] == [1] * 8
    assert row["prompt_tokens"] > 0


def test_an_endpoint_may_be_held_to_one_letter() -> None:
    said = iter("ABX C")
    fake = FakeEndpoint(act=lambda number, body: next(said, "C"))
    with running(fake):
        judge = {"kind": "endpoint", "base_url": fake.url, "model": "judge", "choices": True, "max_concurrency": 1}
        row = play(pairwise_config(judge=judge, mode="choice", retries=0), "salt", "river")
        assert {tuple(body["structured_outputs"]["choice"]) for body in fake.bodies} == {("A", "B", "C")}
        with pytest.raises(InputError, match="asked in mode choice, not regex"):
            pairwise_config(judge=judge)
    assert verdicts(row) == [[1.0, -1.0], [None, None]]
    assert row["responses"][1]["score_status"] == [
        "parse_failure: no verdict in 'X'",
        "parse_failure: no verdict in ' '",
    ]


# --- judges of one's own, and ratings --------------------------------------------------------------------------------


def test_a_class_of_ones_own_is_asked_in_both_orders_and_its_verdicts_are_turned_round() -> None:
    config = pairwise_config(judge=f"{HERE}:Longer")
    assert verdicts(play(config, "longer one", "short")) == [[1.0, 1.0], [1.0, 1.0]]
    assert verdicts(play(config, "same", "size")) == [[0.0, 0.0], [0.0, 0.0]]
    assert f"{HERE}:Longer" in named_plugs(config)


def test_what_a_class_gives_besides_a_verdict_is_a_failure_and_what_it_raises_fails_the_prompt() -> None:
    config = pairwise_config(judge=f"{HERE}:Longer", both_orders=False)
    odd, sick = (play(config, "x", b)["responses"][0] for b in ("odd", "sick"))
    assert odd["score_status"][0].startswith(f"parse_failure: {HERE}:Longer returned 7; 'a', 'b', 'tie' or a Verdict")
    assert (sick["scores"], sick["score_status"][0], sick["judge_texts"][0]) == (
        [None] * 2,
        "the service is down",
        "hm",
    )
    assert play(config, "x", "fail")["error"] == "internal: KeyError: 'no such thing'"


def test_the_example_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(EXAMPLES / "shorter.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    judge = {"kind": "function", "name": "shorter:Shorter", "config": {"slack": 1}}
    row = play(pairwise_config(judge=judge), "one two three", "one")
    assert verdicts(row) == [[-1.0, -1.0], [-1.0, -1.0]]
    assert row["responses"][1]["judge_texts"][0] == "1 words and 3"
    assert verdicts(play(pairwise_config(judge=judge), "one two", "one"))[0] == [0.0, 0.0]
    assert (EXAMPLES / "shorter.py").read_text() in (EXAMPLES.parent / "JUDGES.md").read_text()
    with pytest.raises(InputError, match=r"evaluation\.pairwise\.judge\.config: slak: unknown key"):
        check_judges(pairwise_config(judge={**judge, "config": {"slak": 1}}))


def test_a_judge_of_single_answers_gives_two_ratings_and_equal_ones_tie() -> None:
    config = pairwise_config(judge="tests.scripted:word_count")
    assert verdicts(play(config, "one two three", "one")) == [[1.0, 1.0], [1.0, 1.0]]
    assert verdicts(play(config, "one two", "three four")) == [[0.0, 0.0], [0.0, 0.0]]
    failed = play(config, "one", "moss")
    assert verdicts(failed) == [[None, None], [None, None]]
    assert "returned nan" in failed["responses"][0]["score_status"][0]


def test_a_pairwise_class_scores_no_single_answer() -> None:
    config = scripted_config(evaluation={"judge": f"{HERE}:Longer"})
    with pytest.raises(InputError, match="judge: "):
        check_judges(config)


def test_every_kind_of_judge_is_shown_all_turns_of_a_conversation() -> None:
    turns = [{"role": r, "content": c} for r, c in (("user", "first"), ("assistant", "second"), ("user", "third"))]
    shown = "[Conversation]\nUser: first\nAssistant: second\nUser: third\n"
    with running(FakeEndpoint(act=lambda number, body: "[[A]]")) as fake:
        judge = {"kind": "endpoint", "base_url": fake.url, "model": "judge"}
        play(pairwise_config(judge=judge), "salt", "river", messages=turns)
        assert len(fake.bodies) == 4
        assert all(shown in body["messages"][-1]["content"] for body in fake.bodies)
    for judge in (f"{HERE}:LastOfThree", f"{HERE}:rates_three"):
        assert verdicts(play(pairwise_config(judge=judge), "x", "y", messages=turns)) == [[0.0, 0.0]] * 2


class LastOfThree(PairwiseJudge):
    def compare(self, item: Any, a: str, b: str) -> Any:
        return "tie" if [turn["content"] for turn in item.messages] == ["first", "second", "third"] else "a"


def rates_three(messages: Any, meta: Any, answer: str, objective: str) -> float:
    return float(len(messages)) if answer in ("x", "y") else 1.0


# --- win rates --------------------------------------------------------------------------------------------------------

BOTH = np.array([[1, 1], [1, -1], [1, 0], [0, 0], [-1, -1], [1, NAN], [NAN, NAN], [1, 1]], dtype=float)


def test_the_same_winner_twice_wins_all_else_ties_and_one_failed_order_fails() -> None:
    """Win, tie, tie, tie, loss, failed, failed, win: (2 + 3 / 2) / 6."""
    np.testing.assert_array_equal(compared(BOTH), [1, 0, 0, 0, -1, NAN, NAN, 1])
    found = win_rate(BOTH, resamples=200, seed=0)
    assert [found[key] for key in ("wins", "ties", "losses", "failed", "n")] == [2, 3, 1, 2, 6]
    assert found["win_rate"]["mean"] == pytest.approx(3.5 / 6)
    assert 0 <= found["win_rate"]["low"] < 3.5 / 6 < found["win_rate"]["high"] <= 1
    assert found["consistency"]["mean"] == pytest.approx(4 / 6)


def test_one_order_alone_is_the_outcome() -> None:
    found = win_rate(BOTH[:, :1], resamples=50, seed=0)
    assert [found[key] for key in ("wins", "ties", "losses", "failed")] == [5, 1, 1, 1]
    assert found["consistency"] is None


def test_nothing_compared_is_no_rate() -> None:
    found = win_rate(np.full((3, 2), NAN), resamples=50, seed=0)
    assert (found["failed"], found["n"], found["win_rate"], found["first_wins"]) == (3, 0, None, None)


def test_a_bias_of_position_is_seen() -> None:
    """In the order "ba" the other answer is shown first."""
    assert first_wins(np.array([[1.0, -1.0], [1.0, -1.0]])) == 1
    assert first_wins(np.array([[1.0, 1.0], [-1.0, -1.0], [0.0, NAN]])) == 0.5


def test_judgements_name_who_was_compared_and_failures_stay_in() -> None:
    config = pairwise_config(judge=f"{HERE}:Longer")
    rows = [play(config, "longer one", b, prompt_id=f"test/{b}") for b in ("short", "sick", "fail")]
    table = judgements(pa.Table.from_pylist(rows, EPISODES), config.objectives, pairwise.ORDERS, a="spa", b="vanilla")
    assert table.schema.equals(JUDGEMENTS)
    assert table.num_rows == 3 * 2 * 2
    assert set(table["a"].to_pylist()) == {"spa"}
    failed = [row for row in table.to_pylist() if row["verdict"] == "failed"]
    assert {(row["prompt_id"], row["order"]) for row in failed} == {
        ("test/sick", "ab"), ("test/fail", "ab"), ("test/fail", "ba")
    }  # fmt: skip
    rates = win_rates(table, ["test", "other"], resamples=20, seed=0)
    assert list(rates) == ["test"]
    assert [rates["test"]["helpful"][key] for key in ("wins", "failed", "n")] == [1, 2, 1]


# --- keys, recipes and plans ------------------------------------------------------------------------------------------


def key(config: Config, stage: str = "pairwise", names: tuple[str, ...] = ("pairwise.judge", "spa", "vanilla")) -> str:
    return STAGES[stage].key(config, {}, Known(names=names))


def test_what_changes_verdicts_starts_the_comparison_again_and_nothing_else_does() -> None:
    base = key(pairwise_config())
    for section in ({"mode": "choice"}, {"temperature": 0.5}, {"max_tokens": 9}, {"prompt": "{{ answer_a }}"},
                    {"both_orders": False}, {"judge": ORACLE}):  # fmt: skip
        assert key(pairwise_config(**section)) != base
    rated = {"judge": ORACLE}
    assert key(pairwise_config(**rated, max_tokens=9)) == key(pairwise_config(**rated))
    assert key(pairwise_config(), names=("pairwise.judge", "sft", "vanilla")) != base
    other = scripted_config(evaluation={"pairwise": {}, "judges": {"x": ORACLE}, "bootstrap": 7})
    assert key(other) == base


def test_a_further_judges_name_is_no_part_of_its_stage_and_the_judge_is() -> None:
    config = scripted_config(evaluation={"judges": {"x": ORACLE, "y": ORACLE, "z": "base"}})
    x, y, z = (key(config, "score", (f"judges.{name}",)) for name in "xyz")
    assert x == y != z


def run_of(**evaluation: Any) -> dict[str, Config]:
    raw = {
        "model": {"path": "org/some-8B"},
        "prompts": {"source": "honeset", "limit": 10},
        "arms": {"spa": {}, "sft": {"train.method": "sft"}},
        "evaluation": {"prompts": {"source": "spa_ray.microworld.prompts:street", "limit": 4}, **evaluation},
    }
    return arm_configs(raw, [], where="test", stem="test")


@pytest.mark.parametrize(
    ("against", "compared_arms"),
    [("vanilla", ["spa", "sft"]), ("sft", ["vanilla", "spa"]), ("reference", ["vanilla", "spa", "sft"])],
)
def test_every_model_but_the_opponent_is_compared(against: str, compared_arms: list[str]) -> None:
    nodes = [node for level in recipe.levels(run_of(pairwise={"against": against})) for node in level]
    found = [node for node in nodes if node.stage == "pairwise"]
    assert [node.arm for node in found] == compared_arms
    assert ["against" in node.inputs for node in found] == [against != "reference"] * len(found)


def test_an_opponent_that_is_no_model_of_the_run_is_told() -> None:
    arms = run_of(pairwise={"against": "spy"})
    with pytest.raises(InputError, match="'spy' is not one of vanilla, spa, sft, reference"):
        check_opponent(arms, arms["spa"])


def test_a_reference_is_read_from_the_column_that_is_named() -> None:
    meta = json.dumps({"reference": "by hand", "response": "of the data", "n": 3})
    answers = pa.table({"prompt_id": ["test/1"], "meta": [meta]})
    assert references(answers)["test/1"]["text"] == "by hand"
    assert references(answers, "response")["test/1"]["text"] == "of the data"
    assert references(answers, "n") == {}


@pytest.mark.parametrize("judge", [ORACLE, "base"])
def test_another_column_is_another_comparison(judge: str) -> None:
    def key(**section: Any) -> str:
        config = pairwise_config(against="reference", judge=judge, **section)
        return STAGES["pairwise"].key(config, {}, Known(names=("pairwise.judge", "spa", "reference")))

    assert key() == key(reference="reference") != key(reference="response")


def test_judges_without_held_out_prompts_are_told() -> None:
    for evaluation, place in (({"pairwise": {}}, "pairwise"), ({"judges": {"x": ORACLE}}, "judges")):
        with pytest.raises(InputError, match=rf"evaluation\.{place}: there are no held-out prompts"):
            check_opponent(["spa"], scripted_config(evaluation=evaluation))


@pytest.mark.parametrize("name", ["main", "pairwise", "a.b", "../x"])
def test_a_judges_name_is_its_own_and_plain(name: str) -> None:
    with pytest.raises(InputError, match=r"evaluation\.judges: "):
        scripted_config(evaluation={"judges": {name: ORACLE}})


def test_an_engine_that_cannot_constrain_is_asked_for_no_letter() -> None:
    config = scripted_config(model={"engine": f"{HERE}:Plain"}, scoring={"mode": "regex"},
                             evaluation={"pairwise": {"mode": "choice"}})  # fmt: skip
    with pytest.raises(InputError, match=r"is not able to do evaluation\.pairwise\.mode choice"):
        check_capabilities(config)


class Plain(ScriptedEngine):
    capabilities = frozenset({"load_weights"})


def test_a_plan_counts_further_judges_and_comparisons() -> None:
    endpoint = {"kind": "endpoint", "base_url": "http://h/v1", "model": "m", "price": {"input": 1, "output": 2}}
    priced = {"judges": {"oracle": ORACLE, "small": "base"}, "pairwise": {"judge": endpoint}}
    plan = make_plan(run_of(**priced))
    stages = {(stage["stage"], stage["arms"][0]): stage for stage in plan["stages"]}
    assert stages["score:oracle", "spa"]["requests"] == 0
    assert stages["score:small", "vanilla"]["requests"] == 4 * 2
    compared_ = stages["pairwise", "sft"]
    assert (compared_["rows"], compared_["requests"]) == (4, 0)
    assert compared_["judge"]["requests"] == 4 * 2 * 2
    assert compared_["judge"]["usd"] > 0
    assert ("pairwise", "vanilla") not in stages


# --- whole passes -----------------------------------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.long
def test_a_run_with_further_judges_and_comparisons(tmp_path: Path, ray_session: None) -> None:
    """The embedded model, compared by the oracle's ratings and by its own letters; run again, nothing is asked."""
    from spa_ray.pipeline.commands import clean_run, run_config

    raw = demo_config(full=False)
    raw["arms"] = {"spa": {}}
    raw["evaluation"] |= {"judges": {"small": "base"}, "pairwise": {"judge": ORACLE}}
    small = ["prompts.limit=32", "generation.rows_per_block=16", "evaluation.prompts.limit=12",
             "resources.train_workers=1", "train.batch_size=16", "train.max_steps=1",
             f"run_dir={tmp_path}"]  # fmt: skip

    def run(*more: str) -> dict[str, Any]:
        return run_config(arm_configs(raw, [*small, *more], where="t", stem="t"), until="evaluate", verbose=False)

    result = run()
    metrics = json.loads((tmp_path / "metrics.json").read_text())["test"]
    assert metrics["spa"]["judges"]["small"]["means"]["harmless"]["n"] > 6
    agreement = json.loads((tmp_path / "agreement.json").read_text())["test"]
    assert agreement["judges"]["small"]["main"]["harmless"]["n"] > 12
    assert set(agreement["length"]) == {"main", "small"}

    rates = result["arms"]["spa"]["pairwise"]["families"]["test"]
    stage = next(tmp_path.glob("stages/pairwise-*"))
    assert json.loads((stage / "win_rates.json").read_text()) == result["arms"]["spa"]["pairwise"]
    record = json.loads((tmp_path / "evaluation.json").read_text())
    scores = {arm: EpisodeFolder(Path(path)).table().sort_by("prompt_id") for arm, path in record["answers"].items()}
    differences = [
        tuple(x - y for x, y in zip(spa[0], vanilla[0], strict=True))
        for spa, vanilla in zip(*(scores[arm]["scores"].to_pylist() for arm in ("spa", "vanilla")), strict=True)
    ]
    for k, name in enumerate(("harmless", "helpful")):  # the main judge is the oracle as well
        wins, losses = (sum(sign * d[k] > 0 for d in differences) for sign in (1, -1))
        assert (rates[name]["wins"], rates[name]["losses"], rates[name]["failed"]) == (wins, losses, 0)
        assert rates[name]["n"] == 12
        assert rates[name]["consistency"]["mean"] == 1

    assert clean_run(tmp_path) == {"deleted": []}
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("stages/*/stage.json")}
    assert run() == result
    own = run("evaluation.pairwise.judge=self", "evaluation.pairwise.mode=choice")
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    found = own["arms"]["spa"]["pairwise"]["families"]["test"]["harmless"]
    assert found["n"] + found["failed"] == 12
    assert [Path(path).name.partition("-")[0] for path in clean_run(tmp_path)["deleted"]] == ["pairwise"]


@pytest.mark.engine
def test_spa_eval_asks_further_judges_too(tmp_path: Path, tiny_model: Path, ray_session: None) -> None:
    from spa_ray import evaluate

    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    raw = {
        "model": {"path": str(tiny_model), "engine": "spa_ray.engine.scripted:ScriptedEngine"},
        "evaluation": {
            "prompts": {"source": str(tmp_path / "p.jsonl")},
            "judge": "self",
            "judges": {"words": f"{HERE}:words"},
        },
    }
    first = evaluate(tiny_model, config=raw, out=tmp_path / "out")
    assert first["metrics"]["test"]["judges"]["words"]["means"]["helpful"]["mean"] == 4.0
    assert first["metrics"]["test"]["means"] != first["metrics"]["test"]["judges"]["words"]["means"]
    assert json.loads((tmp_path / "out" / "agreement.json").read_text())["test"]["judges"]["words"]["main"]
    stamp = (tmp_path / "out" / "judges" / "words" / "stage.json").stat().st_mtime_ns
    assert evaluate(tiny_model, config=raw, out=tmp_path / "out") == first
    assert (tmp_path / "out" / "judges" / "words" / "stage.json").stat().st_mtime_ns == stamp


def words(messages: Any, meta: Any, answer: str, objective: str) -> float:
    return float(min(10, len(answer.split())))
