"""The scaling model against cases that can be worked out by hand."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st


def load() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "scaling_model.py"
    spec = importlib.util.spec_from_file_location("scaling_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


model = load()
COSTS = model.Costs(
    engine_cpu=0.002,
    block_cpu=0.05,
    driver_cpu=0.01,
    ledger_message=0.0002,
    driver_bytes_per_block=4096.0,
    pass_start=10.0,
    file_load=0.001,
)
CLUSTER = model.Cluster(engines=10, cores=100.0, concurrency=8, rows_per_block=32)


def test_without_a_batch_cost_an_engine_does_its_concurrency_an_episode() -> None:
    law = model.Law(latency=0.5, token=0.01)
    phases = model.episode(5, 2, answer=100, judgement=2)
    seconds = 2 * (0.5 + 1.0) + 2 * (0.5 + 0.02)
    rate = model.engine_rate(law, phases, 8, cpu=0.0)
    assert rate.episode_seconds == pytest.approx(seconds)
    assert rate.prompts_per_s == pytest.approx(8 / seconds)
    assert rate.inside == pytest.approx(8 / seconds * (6 * 1.5 + 12 * 0.52))


def test_a_batch_cost_gives_the_fixed_point_of_its_own_load() -> None:
    # One request a prompt, one token: all 4 are always inside, so each takes 1 + 0.5 · 3 seconds.
    rate = model.engine_rate(model.Law(token=1.0, batch=0.5), [model.Phase(1, 1)], 4, cpu=0.0)
    assert rate.inside == pytest.approx(4)
    assert rate.episode_seconds == pytest.approx(2.5)
    assert rate.prompts_per_s == pytest.approx(1.6)


def test_the_actors_own_time_is_a_ceiling() -> None:
    assert model.engine_rate(model.Law(), [model.Phase(1, 10)], 64, cpu=0.01).prompts_per_s == pytest.approx(100)


@given(
    engines=st.integers(1, 2000),
    rows=st.integers(1, 1024),
    prompts=st.integers(1, 10**9),
    latency=st.floats(0.001, 10),
)
def test_the_narrowest_place_is_named_and_nothing_goes_beyond_it(
    engines: int, rows: int, prompts: int, latency: float
) -> None:
    cluster = replace(CLUSTER, engines=engines, rows_per_block=rows)
    found = model.forecast(prompts, model.Law(latency), [model.Phase(1, 1)], cluster, COSTS)
    assert found.prompts_per_s == min(found.limits.values()) == found.limits[found.limit]
    assert found.shards == -(-prompts // 1_000_000)
    assert found.checkpoint_ids <= 1_000_000
    assert found.seconds == pytest.approx(prompts / found.prompts_per_s + found.overhead_seconds)
    assert found.driver_share <= 1 + 1e-9


def test_more_engines_move_the_limit_from_the_engines_to_the_driver_and_larger_blocks_move_it_back() -> None:
    law, phases = model.Law(1.0), [model.Phase(1, 1)]
    roomy = replace(CLUSTER, cores=1e6)
    assert model.forecast(10**6, law, phases, roomy, COSTS).limit == "engines"
    many = replace(roomy, engines=1000)
    assert model.forecast(10**6, law, phases, many, COSTS).limit == "driver"  # 32 rows / 10 ms < 1000 · 8 / s
    assert model.forecast(10**6, law, phases, replace(many, rows_per_block=256), COSTS).limit == "engines"


def test_a_ledger_that_engines_keep_busy_by_their_news_alone_carries_nothing() -> None:
    found = model.forecast(10**6, model.Law(1.0), [model.Phase(1, 1)], replace(CLUSTER, engines=5000), COSTS)
    assert (found.limit, found.prompts_per_s, found.seconds) == ("ledger", 0, float("inf"))
