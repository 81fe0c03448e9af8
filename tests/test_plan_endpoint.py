"""`spa plan` with a judge behind an endpoint: its requests, tokens, dollars and time beside the engine's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spa_ray.config import arm_configs
from spa_ray.pipeline.plan import make_plan
from spa_ray.pipeline.plan_print import print_plan

PROMPTS, ANSWERS, OBJECTIVES = 10, 5, 2
JUDGED = PROMPTS * (ANSWERS + 1) * OBJECTIVES
ENDPOINT = {"kind": "endpoint", "base_url": "http://x/v1", "model": "judge"}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "Is kettle number {k} on the stove?"}}\n' for k in range(PROMPTS)))
    return path


def plan(model: Path, prompts: Path, judge: dict[str, Any] | None, **sections: Any) -> dict[str, Any]:
    raw = {
        "model": {"path": str(model)},
        "prompts": {"source": str(prompts)},
        "scoring": {"mode": "regex", "max_tokens": 50, **({"judge": judge} if judge else {})},
        "sampling": {"max_tokens": 64, "n": ANSWERS},
        "refine": {"max_tokens": 64},
        "resources": {"gpus_per_engine": 0, "gpus_per_worker": 0},
        **sections,
    }
    return make_plan(arm_configs(raw, (), where="test", stem="test"))


def stage(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(stage for stage in found["stages"] if stage["stage"] == name)


def test_what_an_endpoint_judges_is_no_work_of_the_engine(tiny_model: Path, prompts: Path) -> None:
    alone, beside = (stage(plan(tiny_model, prompts, judge), "generate") for judge in (None, ENDPOINT))
    judge = beside["judge"]
    assert beside["requests"] == PROMPTS * (ANSWERS + 1)
    assert (judge["requests"], judge["generated_tokens"]) == (JUDGED, 50 * JUDGED)
    for key in ("requests", "prompt_tokens", "generated_tokens"):
        assert alone[key] == beside[key] + judge[key]
    assert "judge" not in alone


def test_dollars_and_the_time_of_each_limit(
    tiny_model: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def judged(**settings: Any) -> dict[str, Any]:
        found = plan(tiny_model, prompts, {**ENDPOINT, **settings})
        assert found["total"]["judge"] == stage(found, "generate")["judge"]
        return stage(found, "generate")["judge"]

    assert judged()["usd"] is None
    priced = judged(price={"input": 1, "output": 10})
    assert priced["usd"] == pytest.approx((priced["prompt_tokens"] + 10 * priced["generated_tokens"]) / 1e6, abs=1e-4)
    tokens = priced["prompt_tokens"] + priced["generated_tokens"]
    assert judged(max_concurrency=3)["seconds"] == JUDGED / 3 * 2.0
    assert judged(max_concurrency=1000, requests_per_minute=30)["seconds"] == JUDGED * 2
    assert judged(max_concurrency=1000, tokens_per_minute=2000)["seconds"] == pytest.approx(tokens / 2000 * 60, abs=0.1)
    slow = plan(tiny_model, prompts, {**ENDPOINT, "requests_per_minute": 1, "price": {"input": 1, "output": 1}})
    assert stage(slow, "generate")["seconds"] == JUDGED * 60
    print_plan(slow)
    said = " ".join(capsys.readouterr().out.split())
    assert f"{JUDGED} requests, {priced['prompt_tokens']:,} prompt and {50 * JUDGED:,} generated tokens, $0.0" in said
    assert "a judge's endpoint answers in 2 s" in said


def test_an_evaluation_has_its_own(tiny_model: Path, prompts: Path) -> None:
    held_out = {"prompts": {"source": str(prompts)}, "judge": ENDPOINT, "sampling": {"max_tokens": 64}}
    found = plan(tiny_model, prompts, None, evaluation=held_out)
    evaluated = [stage for stage in found["stages"] if stage["stage"] == "evaluate"]
    assert [stage["judge"]["requests"] for stage in evaluated] == [PROMPTS * OBJECTIVES] * 2
    assert [stage["requests"] for stage in evaluated] == [PROMPTS] * 2
    assert found["total"]["judge"]["requests"] == 2 * PROMPTS * OBJECTIVES
    assert "judge" not in stage(found, "generate")
