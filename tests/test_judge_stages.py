"""Further judges and pairwise ones behind an endpoint that misbehaves, in passes on Ray: what they fail at is asked
again and counted, is never a number, ends the command while it goes on, and a later call asks the rest alone."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from spa_ray.config.models import Config
from spa_ray.data.episodes import EpisodeFolder
from spa_ray.data.schemas import EPISODES
from spa_ray.errors import RunError
from spa_ray.generation.budget import Meter
from spa_ray.pipeline.evaluate import write_table
from spa_ray.pipeline.judged import pairwise_rates
from spa_ray.pipeline.progress import Progress
from spa_ray.pipeline.stage_keys import Known
from spa_ray.pipeline.stages import STAGES
from spa_ray.pipeline.work import Context, Work
from spa_ray.rollout.settings import ChatSettings
from spa_ray.storage.files import parquet_dataset, read_json
from spa_ray.storage.folder import StageFolder
from tests.fake_endpoint import FakeEndpoint, running
from tests.scripted import WEIGHTS, scripted_config

pytestmark = [pytest.mark.engine, pytest.mark.long, pytest.mark.usefixtures("ray_session")]

PROMPTS = 12
KINDS = ("score", "pairwise")
FAILED = "question 3?"  # what a judge fails at that fails at one prompt of twelve
Act = Callable[[int, dict[str, Any]], Any]


def well(number: int, body: dict[str, Any]) -> str:
    """Rates an answer by its length, and prefers the longer of two."""
    said = body["messages"][-1]["content"]
    if "[Answer B]" not in said:
        return f"[[{said.count('ha') % 9 + 1}]]"
    a, b = said.split("[Answer A]")[1].split("[Answer B]")
    return "[[A]]" if a.count("ha") > b.count("ha") else "[[B]]"


def fails_at_one(reply: Any) -> Act:
    return lambda number, body: reply if FAILED in body["messages"][-1]["content"] else well(number, body)


def config_of(fake: FakeEndpoint, **judge: Any) -> Config:
    section = {"kind": "endpoint", "base_url": fake.url, "model": "judge", "timeout_s": 1, **judge}
    return scripted_config(
        scoring={"retries": 1},
        evaluation={"judges": {"gpt": section}, "pairwise": {"judge": section, "retries": 1}},
        generation={"rows_per_block": 4, "max_attempts": 2},
    )


def answers(folder: Path, long: int) -> Path:
    rows = [
        {"prompt_id": f"test/{k:02d}", "messages": [{"role": "user", "content": f"question {k}?"}], "meta": "{}",
         "attempt": 0,
         "responses": [{"index": 0, "kind": "candidate", "text": "ha " * (long + k), "token_ids": [1] * (long + k)}]}
        for k in range(PROMPTS)
    ]  # fmt: skip
    write_table(pa.Table.from_pylist(rows, schema=EPISODES), folder / "part.parquet")
    return folder


class Run:
    """One stage of a run folder, as the pipeline works on it."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.stage = StageFolder(kind, "x", folder / "stages" / f"{kind}-x")
        self._inputs = {"answers": answers(folder / "ours", 2), "against": answers(folder / "theirs", 1)}

    def work(self, config: Config) -> None:
        names = ("judges.gpt",) if self.kind == "score" else ("pairwise.judge", "spa", "vanilla")
        inputs = {**self._inputs, "model": WEIGHTS, "base": WEIGHTS}
        work = Work(self.stage, config, inputs, Known(names=names))
        meter, chat = Meter(self.folder / "spent", None), ChatSettings.of(config.model)
        root = self.folder
        context = Context(Progress(), False, dt.date(2026, 1, 1), chat, root, meter, passes=root / "passes")
        STAGES[self.kind].work([work], context)

    def judged(self) -> dict[str, list[str]]:
        """Prompt -> what each of its judgements came to: a number or a verdict, or `failed`."""
        if self.kind == "score":
            rows = EpisodeFolder(self.stage.folder / "episodes").table().to_pylist()
            found = {r["prompt_id"]: r["responses"][0]["scores"] if r["responses"] else [None] * 2 for r in rows}
            return {i: ["failed" if s is None else f"{s:g}" for s in scores] for i, scores in found.items()}
        table = parquet_dataset(self.stage.folder / "judgements").to_table().to_pylist()
        by_prompt: dict[str, list[str]] = {}
        for row in table:
            by_prompt.setdefault(row["prompt_id"], []).append(row["verdict"])
        return by_prompt


@pytest.fixture(params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    return Run(request.param, tmp_path)


def requests_of(fake: FakeEndpoint, prompt: str) -> list[str]:
    said = [body["messages"][-1]["content"] for body in fake.bodies]
    return [text for text in said if f"{prompt}\n" in text]


@pytest.mark.parametrize("judge", ["reward", "self", "docs.examples.plain_words:judge"])
def test_each_kind_of_judge_scores_and_compares(run: Run, judge: str, reward_model: Path) -> None:
    section = {"kind": "reward", "path": str(reward_model)} if judge == "reward" else judge
    evaluation = {"judges": {"gpt": section}, "pairwise": {"judge": section, "mode": "choice"}}
    config = scripted_config(evaluation=evaluation, generation={"rows_per_block": 4})
    run.work(config)
    found = run.judged()
    assert len(found) == PROMPTS
    every = {verdict for verdicts in found.values() for verdict in verdicts}
    assert "failed" not in every
    if run.kind == "pairwise":
        assert every <= {"a", "b", "tie"}
    else:
        assert len(every) > 1


@pytest.mark.parametrize("said", ["[[11]]", "I cannot judge that.", "[[D]] [[0]]", ""])
def test_nonsense_is_asked_again_and_then_a_failure_that_is_counted(run: Run, said: str) -> None:
    with running(FakeEndpoint(fails_at_one(said))) as fake:
        run.work(config_of(fake))
        each = 2 if run.kind == "score" else 4  # objectives, and both orders
        assert len(requests_of(fake, FAILED)) == 2 * each  # once more each
        assert len(requests_of(fake, "question 4?")) == each
        found = run.judged()
        assert found.pop("test/03") == ["failed"] * each
        assert len(found) == PROMPTS - 1
        assert not any("failed" in verdicts for verdicts in found.values())
        facts = run.stage.facts()
        assert (facts["failed_judgements"], facts["errors"], facts["rows"]) == (each, 0, PROMPTS)
        if run.kind == "pairwise":
            rates = pairwise_rates(config_of(fake), run.stage)["families"]["test"]["harmless"]
            assert (rates["wins"], rates["failed"], rates["n"]) == (PROMPTS - 1, 1, PROMPTS - 1)
            assert facts["failed_verdicts"] == each


def test_a_timeout_and_a_busy_server_are_asked_again(run: Run) -> None:
    troubles = iter(["hang", (429, {"Retry-After": "0.1"}, "{}"), (503, {}, "{}"), (200, {}, "<html>")])
    with running(FakeEndpoint(lambda number, body: next(troubles, None) or well(number, body))) as fake:
        run.work(config_of(fake, max_concurrency=2))
        assert not any("failed" in verdicts for verdicts in run.judged().values())
        judge = run.stage.facts()["judge"]
        assert (judge["retries"], judge["requests"]) == (4, len(fake.bodies))


def test_a_request_that_it_refuses_is_that_prompts_failure(run: Run) -> None:
    refusal = (400, {}, json.dumps({"error": {"message": "content policy"}}))
    with running(FakeEndpoint(fails_at_one(refusal))) as fake:
        run.work(config_of(fake))
        found = run.judged()
        assert set(found.pop("test/03")) == {"failed"}
        assert not any("failed" in verdicts for verdicts in found.values())
        assert run.stage.facts()["errors"] == 1
        assert "content policy" in run.stage.facts()["error_kinds"]["refused"]["first"]


def test_while_it_is_down_the_stage_fails_and_later_only_the_rest_is_asked(run: Run) -> None:
    answered = 8

    def dies(number: int, body: dict[str, Any]) -> Any:
        return well(number, body) if number < answered else (500, {}, "{}")

    with running(FakeEndpoint(dies)) as fake:
        settings = {"retries": 0, "max_concurrency": 2}
        with pytest.raises(RunError, match=r"endpoint http\S+, model judge: \d+ requests failed"):
            run.work(config_of(fake, **settings))
        with pytest.raises(RunError, match="requests failed"):
            run.work(config_of(fake, **settings))
        assert not run.stage.done
        kept = {json.dumps(body["messages"]) for body in fake.bodies[:answered]}
        before, fake.act = len(fake.bodies), well
        run.work(config_of(fake, **settings))
        again = [json.dumps(body["messages"]) for body in fake.bodies[before:]]
        assert not kept & set(again)
        assert len(again) == len(set(again))
    found = run.judged()
    assert len(found) == PROMPTS
    assert not any("failed" in verdicts for verdicts in found.values())


def test_one_that_reads_nothing_right_ends_the_stage(run: Run) -> None:
    with running(FakeEndpoint(lambda number, body: "[[11]]")) as fake:
        with pytest.raises(RunError, match="no judgement could be read, of 12 prompts; the first: parse_failure"):
            run.work(config_of(fake))
        assert not run.stage.done


def test_spa_eval_ends_with_status_1_while_a_further_judge_is_down_and_goes_on_after(
    tmp_path: Path, tiny_model: Path, spa: Any
) -> None:
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "question {k}?"}}\n' for k in range(4)))
    fake = FakeEndpoint(lambda number, body: (500, {}, "{}"))
    with running(fake):
        judge = {"kind": "endpoint", "base_url": fake.url, "model": "judge", "retries": 0}
        config = {
            "model": {"path": str(tiny_model), "engine": "spa_ray.engine.scripted:ScriptedEngine"},
            "evaluation": {"prompts": {"source": str(tmp_path / "p.jsonl")}, "judge": "self", "judges": {"gpt": judge}},
        }
        (tmp_path / "c.yaml").write_text(json.dumps(config))
        command = ("eval", tiny_model, "--config", tmp_path / "c.yaml", "--out", tmp_path / "out")
        for _ in range(2):
            status, _, err = spa(*command)
            assert status == 1
            assert "requests failed" in err.strip().splitlines()[-1]
        stamp = (tmp_path / "out" / "stage.json").stat().st_mtime_ns  # the answers are there
        fake.act = well
        assert spa(*command)[0] == 0
        assert (tmp_path / "out" / "stage.json").stat().st_mtime_ns == stamp
    with_judge = read_json(tmp_path / "out" / "metrics.json")["test"]["model"]["judges"]["gpt"]
    assert with_judge["means"]["helpful"]["n"] == 4
    status, _, err = spa(*command[:-1], tmp_path / "other")  # nobody there any more
    assert (status, "gives no answer" in err) == (1, True)
