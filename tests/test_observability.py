"""The metrics that are exported are those that the dashboard and the docs speak of."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from spa_ray.generation import metrics as of_engines
from spa_ray.training import metrics as of_training

ROOT = Path(__file__).parents[1]
METRICS = (*of_engines.METRICS, *of_training.METRICS)
EXPORTED = {name for metric in METRICS for name in metric.exported()}
LABELS = {"run", "stage", "engine", "le", *(tag for metric in METRICS for tag in metric.tags)}
ROW = {
    "error": None,
    "prompt_tokens": 30,
    "generated_tokens": 12,
    "responses": [{"score_status": ["ok", "parse_failure: no score in 'ten'"]}, {"score_status": ["ok", "ok"]}],
}


def dashboard() -> dict[str, Any]:
    return json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text())


def queries(board: dict[str, Any]) -> list[str]:
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    return asked + [v["query"]["query"] for v in board["templating"]["list"] if v["type"] == "query"]


def test_every_name_is_one_that_prometheus_takes_and_stands_once() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"spa_[a-z_]+", name) for name in names)
    assert all(m.name.endswith("_total") == (m.kind == "counter") for m in METRICS)
    assert all((m.bounds == tuple(sorted(m.bounds))) and bool(m.bounds) == (m.kind == "histogram") for m in METRICS)


def test_the_dashboard_asks_only_for_what_is_exported_and_for_all_of_it() -> None:
    asked = {name for query in queries(dashboard()) for name in re.findall(r"\bray_\w+", query)}
    assert asked == EXPORTED
    filtered = {label for query in queries(dashboard()) for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", query)}
    grouped = {
        label.strip()
        for query in queries(dashboard())
        for labels in re.findall(r"\b(?:by|ignoring)\s*\(([^)]*)\)", query)
        for label in labels.split(",")
    }
    assert filtered | grouped <= LABELS


def test_the_dashboard_is_one_that_grafana_loads() -> None:
    board = dashboard()
    assert board["schemaVersion"] >= 36
    assert board["title"]
    assert "id" not in board  # a new one, wherever it is imported
    variables = {v["name"] for v in board["templating"]["list"]}
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in panels:
        assert panel["type"] in {"stat", "timeseries"}
        assert panel["title"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        assert [t["refId"] for t in panel["targets"]] == [chr(65 + n) for n in range(len(panel["targets"]))]
        for target in panel["targets"]:
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables | {"__rate_interval"}
            assert target["expr"].count("(") == target["expr"].count(")")
    boxes = [panel["gridPos"] for panel in board["panels"]]
    assert not any(overlap(a, b) for n, a in enumerate(boxes) for b in boxes[:n])


def overlap(a: dict[str, int], b: dict[str, int]) -> bool:
    return (
        a["x"] < b["x"] + b["w"] and b["x"] < a["x"] + a["w"] and a["y"] < b["y"] + b["h"] and b["y"] < a["y"] + a["h"]
    )


def test_the_docs_name_every_metric() -> None:
    text = (ROOT / "docs" / "OBSERVABILITY.md").read_text()
    told = set(re.findall(r"`(spa_\w+)`", text))
    assert {m.name for m in METRICS} == {name for name in told if not name.startswith("spa_ray")}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("refused: by the template", "refused"),
        ("ok", "ok"),
        ("prompt_too_long: 9", "prompt_too_long"),
        ("", "other"),
        ("What a user's judge said", "other"),
        ("x" * 99, "other"),
        ("p\x1b[2J: hm", "other"),
    ],
)
def test_a_tag_is_a_known_kind_and_never_free_text(text: str, kind: str) -> None:
    assert of_engines.kind_of(text) == kind


@pytest.mark.engine
@pytest.mark.alone
def test_an_engines_and_a_jobs_metrics_stand_on_rays_prometheus_endpoint() -> None:
    import ray

    class Engine:
        def __init__(self) -> None:
            self._metrics = of_engines.EngineMetrics(run="mine", stage="generate", engine="e1")
            self._training = of_training.TrainMetrics(run="mine")

        def again(self) -> None:
            self._metrics.engine(busy=0.5, in_flight=5, requests=16)

        def work(self) -> None:
            self._metrics.started()
            self._metrics.finished(ROW, 3.0)
            failed = {**ROW, "error": "refused: no", "responses": [], "prompt_tokens": 0, "generated_tokens": 0}
            self._metrics.finished(failed, 0.2)
            self._metrics.engine(busy=0.75, in_flight=7, requests=10)
            self._metrics.engine(busy=0.5, in_flight=5, requests=16)
            columns = dict.fromkeys(of_training.COLUMNS, 2.5)
            self._training.row({"job": "arm", **columns})

    ray.init(address="local", num_cpus=1, include_dashboard=False, _metrics_export_port=free_port())
    try:
        port = ray.nodes()[0]["MetricsExportPort"]
        engine = ray.remote(Engine).options(num_cpus=0).remote()
        ray.get(engine.work.remote(), timeout=60)
        found = scrape(port, wanted=EXPORTED, again=lambda: ray.get(engine.again.remote(), timeout=60))
    finally:
        ray.shutdown()
    assert found.keys() >= EXPORTED
    assert value(found, "ray_spa_prompts_done_total") == 1
    assert value(found, "ray_spa_prompts_failed_total", error="refused") == 1
    assert value(found, "ray_spa_judgements_total", status="ok") == 3
    assert value(found, "ray_spa_judgements_total", status="parse_failure") == 1
    assert value(found, "ray_spa_generated_tokens_total") == 12
    assert value(found, "ray_spa_requests_total") == 16
    assert value(found, "ray_spa_engine_busy_ratio") == 0.5
    assert value(found, "ray_spa_prompts_in_flight") == 5
    assert value(found, "ray_spa_episode_seconds_count") == 2
    assert value(found, "ray_spa_episode_seconds_sum") == pytest.approx(3.75 + 0.175)  # Ray's: the buckets' middles
    assert value(found, "ray_spa_train_loss", train_job="arm") == 2.5
    assert all(
        {'run="mine"', 'stage="generate"', 'engine="e1"'} <= set(labels.split(","))
        for labels in found["ray_spa_prompts_done_total"]
    )


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def scrape(
    port: int, wanted: set[str], again: Callable[[], None], patience: float = 90.0
) -> dict[str, dict[str, float]]:
    """Series -> labels -> value, once all that is wanted has come (Ray's agent exports every few seconds)."""
    until = time.monotonic() + patience
    while True:
        again()
        found: dict[str, dict[str, float]] = {}
        try:
            with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                text = answer.read().decode()
        except OSError:
            text = ""
        for name, labels, number in re.findall(r"^(ray_spa_\w+)\{(.*)\} (\S+)", text, flags=re.M):
            found.setdefault(name, {})[labels] = float(number)
        if wanted <= found.keys() or time.monotonic() > until:
            return found
        time.sleep(0.5)


def value(found: dict[str, dict[str, float]], name: str, **labels: str) -> float:
    (fits,) = [n for held, n in found[name].items() if all(f'{k}="{v}"' in held for k, v in labels.items())]
    return fits
