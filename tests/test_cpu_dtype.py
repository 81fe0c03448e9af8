"""`model.dtype: auto` on processors."""

from __future__ import annotations

from pathlib import Path

import pytest

from spa_ray.config import Config, arm_configs
from spa_ray.engine.cpu_dtype import processor_flags, with_dtype


def config(**model: str) -> Config:
    return arm_configs({"model": {"path": "m", **model}}, [], where="c.yaml", stem="c")["main"]


@pytest.mark.parametrize(
    ("model", "on_cpu", "flags", "dtype"),
    [
        ({}, True, {"avx2", "fma"}, "float32"),
        ({}, True, {"avx512f", "avx512_bf16"}, "auto"),
        ({}, True, {"amx_bf16"}, "auto"),
        ({}, False, {"avx2"}, "auto"),
        ({"dtype": "bfloat16"}, True, {"avx2"}, "bfloat16"),
        ({"engine": "spa_ray.engine.scripted:ScriptedEngine"}, True, {"avx2"}, "auto"),
    ],
)
def test_auto_is_float32_where_the_processor_has_no_bfloat16(
    model: dict[str, str], on_cpu: bool, flags: set[str], dtype: str
) -> None:
    assert with_dtype(config(**model), on_cpu=on_cpu, flags=frozenset(flags)).model.dtype == dtype


def test_the_flags_are_the_processors(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nflags\t\t: fpu avx2 amx_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert processor_flags(file) == {"fpu", "avx2", "amx_bf16"}
    assert processor_flags(tmp_path / "none") == frozenset()
