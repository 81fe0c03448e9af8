"""vLLM's own OpenAI server as a judge's endpoint: the embedded model judges what the embedded model answers."""

from __future__ import annotations

import asyncio
import re
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from served_model import served_model

from spa_ray.cli.demo import demo_config
from spa_ray.config.endpoint import Endpoint
from spa_ray.data.episodes import EpisodeFolder
from spa_ray.engine.openai import EndpointClient, EndpointDeadError
from spa_ray.storage.files import read_json

pytestmark = [pytest.mark.engine, pytest.mark.long]

MODEL = Path(__file__).parents[1] / "spa_ray" / "microworld" / "model"
STREET = "spa_ray.microworld.prompts:street"
PROMPTS, ANSWERS, OBJECTIVES = 6, 6, 2
COUNTED = {"prompt_tokens": "prompt_tokens", "generated_tokens": "generation_tokens", "requests": "request_success"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    with served_model(MODEL, port=port, name="judge", context=512, log=log) as url:
        yield url


def counted(server: str) -> dict[str, float]:
    """What the server says that it was asked and answered."""
    text = urllib.request.urlopen(f"{server}/metrics", timeout=10).read().decode()
    found = {key: re.findall(rf"^vllm:{name}_total{{.*}} (\S+)$", text, re.M) for key, name in COUNTED.items()}
    return {key: sum(map(float, values)) for key, values in found.items()}


@pytest.fixture
def config(server: str, tmp_path: Path) -> Path:
    raw = {**demo_config(full=False), "arms": {"main": {}}}
    raw["prompts"] = {**raw["prompts"], "limit": PROMPTS}
    raw["sampling"] = {**raw["sampling"], "n": ANSWERS - 1}
    judge = {"kind": "endpoint", "base_url": f"{server}/v1", "model": "judge", "price": {"input": 1, "output": 10}}
    # The model was trained to write the bare number.
    raw["scoring"] = {**raw["scoring"], "mode": "regex", "pattern": r"^\s*(\d+)\s*$", "judge": judge}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path / "config.yaml"


def test_it_judges_a_generation_and_the_accounts_of_both_sides_are_the_same(
    server: str, config: Path, spa: Any, ray_session: None
) -> None:
    before, out = counted(server), config.parent / "out"
    status, _, err = spa("generate", config, "--prompts", STREET, "--out", out)
    assert status == 0, err
    rows = EpisodeFolder(out / "episodes").table().to_pylist()
    assert len(rows) == PROMPTS
    responses = [response for row in rows for response in row["responses"]]
    assert len(responses) == PROMPTS * ANSWERS
    judged = [pair for r in responses for pair in zip(r["scores"], r["score_status"], strict=True)]
    assert len(judged) == PROMPTS * ANSWERS * OBJECTIVES
    for score, reason in judged:
        assert 1 <= score <= 10 if reason == "ok" else score is None and reason.startswith(("parse", "truncated"))
    assert len({score for score, reason in judged if reason == "ok"}) > 2  # a judge that tells answers apart
    asked = {key: value - before[key] for key, value in counted(server).items()}
    account = read_json(out / "stage.json")["judge"]
    assert {key: account[key] for key in asked} == asked
    assert account["requests"] >= len(judged) - account["cached"]
    assert account["usd"] == pytest.approx((asked["prompt_tokens"] + 10 * asked["generated_tokens"]) / 1e6)


def test_a_server_that_cannot_hold_answers_to_the_ratings_is_found_before_anything_is_generated(
    server: str, config: Path, spa: Any, ray_session: None
) -> None:
    """xgrammar knows no tokenizer of whole words, as the embedded model's is, and the server answers 500. What a server
    does that can is seen in `make real ARGS=--judge-endpoint`."""
    out = config.parent / "out"
    changes = ["scoring.mode=choice", "scoring.judge.choices=true", "scoring.retries=0"]
    status, _, err = spa("generate", config, "--prompts", STREET, "--out", out, *changes)
    assert (status, err.strip().count("\n")) == (1, 0)
    assert "gives no answer (status 500)" in err
    assert not (out / "episodes").exists()


def test_a_model_that_it_does_not_serve_is_told_in_one_line_before_anything_is_asked(
    server: str, config: Path, spa: Any, ray_session: None
) -> None:
    before = counted(server)
    status, _, err = spa(
        "generate", config, "--prompts", STREET, "--out", config.parent / "out", "scoring.judge.model=gpt-5"
    )
    assert (status, err.strip().count("\n")) == (2, 0)
    assert "serves no model 'gpt-5'; it serves judge" in err
    assert counted(server) == before


def test_without_that_look_its_refusal_ends_everything_at_the_first_request(server: str) -> None:
    endpoint = Endpoint(kind="endpoint", base_url=f"{server}/v1", model="gpt-5")

    async def ask() -> None:
        await EndpointClient(endpoint, None).ask(
            [{"role": "user", "content": "?"}], max_tokens=8, temperature=1, seed=0
        )

    with pytest.raises(EndpointDeadError, match=r"model gpt-5: status 404: .*The model `gpt-5` does not exist"):
        asyncio.run(ask())
