"""One engine, several models in turn: no row is ever answered by another model's weights."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_ray.engine import EngineDeadError
from spa_ray.generation.gate import Gate

BASE = Path("base")


class Weights:
    """Records what is loaded, and refuses to change while a row is inside."""

    def __init__(self) -> None:
        self.loaded, self.swaps, self.inside = BASE, 0, 0

    async def load_weights(self, model: Path) -> None:
        assert self.inside == 0
        await asyncio.sleep(0)
        self.loaded, self.swaps = model, self.swaps + 1


async def row(gate: Gate, weights: Weights, model: Path | None, steps: int) -> Path:
    async with gate.using(model):
        weights.inside += 1
        for _ in range(steps):
            await asyncio.sleep(0)
            assert model is None or weights.loaded == model
        weights.inside -= 1
        return weights.loaded


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4)), max_size=12))
def test_every_row_runs_on_its_own_model_and_weights_change_only_when_nothing_is_inside(
    rows: list[tuple[str, int]],
) -> None:
    async def all_of_them() -> None:
        weights = Weights()
        gate = Gate(weights, BASE, 128)
        works = [row(gate, weights, Path(model), steps) for model, steps in rows]
        served = await asyncio.wait_for(asyncio.gather(*works), timeout=10)
        assert [path.name for path in served] == [model for model, _ in rows]

    asyncio.run(all_of_them())


def test_a_models_rows_run_together_and_the_weights_change_once_a_model() -> None:
    async def all_of_them() -> int:
        weights = Weights()
        gate = Gate(weights, BASE, 128)
        models = [*["a"] * 20, *["b"] * 20]
        await asyncio.gather(*(row(gate, weights, Path(model), 3) for model in models))
        return weights.swaps

    assert asyncio.run(all_of_them()) == 2


def test_rows_that_name_no_model_take_what_is_loaded() -> None:
    weights = Weights()
    assert asyncio.run(row(Gate(weights, BASE, 128), weights, None, 1)) == BASE
    assert weights.swaps == 0


def test_a_row_that_fails_leaves_the_gate_open() -> None:
    async def fail_then_change() -> Path:
        weights = Weights()
        gate = Gate(weights, BASE, 128)
        with pytest.raises(ValueError, match="row"):
            async with gate.using(Path("a")):
                raise ValueError("row")
        return await asyncio.wait_for(row(gate, weights, Path("b"), 1), timeout=5)

    assert asyncio.run(fail_then_change()) == Path("b")


def test_an_engine_that_dies_while_loading_is_told_to_every_row_that_waits() -> None:
    class Dead(Weights):
        async def load_weights(self, model: Path) -> None:
            raise EngineDeadError("dead")

    async def ask() -> list[object]:
        weights = Dead()
        gate = Gate(weights, BASE, 128)
        works = [row(gate, weights, Path(model), 1) for model in "ab"]
        return await asyncio.wait_for(asyncio.gather(*works, return_exceptions=True), timeout=5)

    assert [type(outcome) for outcome in asyncio.run(ask())] == [EngineDeadError] * 2


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 4)), max_size=16))
def test_no_row_is_inside_with_more_than_its_own_crowd_and_every_row_gets_its_turn(rows: list[tuple[int, int]]) -> None:
    async def all_of_them() -> None:
        gate, inside = Gate(Weights(), BASE, 4), []

        async def one(crowd: int, steps: int) -> None:
            async with gate.using(crowd=crowd):
                inside.append(crowd)
                for _ in range(steps):
                    assert len(inside) <= min(4, *inside)
                    await asyncio.sleep(0)
                inside.remove(crowd)

        await asyncio.wait_for(asyncio.gather(*(one(*row) for row in rows)), timeout=10)

    asyncio.run(all_of_them())


def test_a_row_that_is_cancelled_while_it_waits_takes_no_place() -> None:
    async def cancel_one() -> None:
        gate = Gate(Weights(), BASE, 1)
        async with gate.using():
            waits = asyncio.ensure_future(row(gate, Weights(), None, 0))
            await asyncio.sleep(0)
            waits.cancel()
            await asyncio.gather(waits, return_exceptions=True)
        async with asyncio.timeout(5), gate.using():
            pass

    asyncio.run(cancel_one())
