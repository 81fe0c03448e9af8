"""Waits of the driver for other libraries have limits, whatever those libraries do."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from spa_ray.config.models import Model
from spa_ray.errors import InputError, RunError
from spa_ray.generation.preview import preview
from spa_ray.pipeline import models
from spa_ray.storage.deadline import within
from tests.scripted import WEIGHTS, prompt, scripted_config


def hang(*_: Any, **__: Any) -> Any:
    """Also an engine's factory."""
    threading.Event().wait(60)


def test_work_has_its_result_or_its_own_error_within_its_time() -> None:
    def refuse(error: Exception) -> None:
        raise error

    assert within(5, lambda: 3, "never") == 3
    with pytest.raises(InputError, match="mine"):
        within(5, lambda: refuse(InputError("mine")), "never")
    with pytest.raises(TimeoutError, match="its own"):
        within(5, lambda: refuse(TimeoutError("its own")), "never")
    with pytest.raises(RunError, match=r"^it did not come in 0\.1 s$"):
        within(0.1, hang, "it did not come")


def test_a_previews_engine_has_the_time_of_a_start() -> None:
    config = scripted_config(generation={"start_timeout_s": 0.2}, model={"engine": f"{__name__}:hang"})
    with pytest.raises(RunError, match=r"engine did not start \(generation.start_timeout_s\) in 0.2 s"):
        asyncio.run(preview(config, WEIGHTS, [prompt()]))


@pytest.mark.parametrize(("path", "fetcher"), [("owner/name", "hub_folder"), ("s3://bucket/model", "local_folder")])
def test_the_drivers_fetch_of_a_model_has_a_limit(path: str, fetcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, fetcher, hang)
    monkeypatch.setattr(models, "FETCH_SECONDS", 0.2)
    with pytest.raises(RunError, match=rf"^model.path: {path} was not fetched in 0\.2 s$"):
        models.fetch_model(Model(path=path))


LATE = """
import threading
from concurrent.futures import ThreadPoolExecutor
from spa_ray.cli.guard import guarded
from spa_ray.storage.deadline import within

def fetch():  # as huggingface_hub does: Python waits for such threads when it ends
    with ThreadPoolExecutor(1) as pool:
        pool.submit(threading.Event().wait, 60).result()

guarded(lambda: within(0.2, fetch, "it was not fetched"))
"""


def test_a_command_that_waited_too_long_ends_although_the_work_goes_on() -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", LATE], cwd=root, capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "spa: it was not fetched in 0.2 s\n")
