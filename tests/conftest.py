"""Fixtures that several rooms share. Heavy ones are built once a session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.browser import CHROMIUM, FLAGS
from tests.tiny_model import build_tiny_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a hub that is not there
# A busy machine is no failure: no example is timed.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "one_process" in getattr(item, "fixturenames", ()):
            item.add_marker("alone")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a randomly initialised 2-layer Llama with a chat template (tests/tiny_model.py)."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny", seed=0)


@pytest.fixture(scope="session")
def other_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture as `tiny_model` with other weights."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A classifier with two outputs and random weights on the tiny model's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(3)
    shape = AutoConfig.from_pretrained(tiny_model, id2label={0: "useful", 1: "safe"}, label2id={"useful": 0, "safe": 1})
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    shape.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    model = AutoModelForSequenceClassification.from_config(shape)
    model.score.weight.data.mul_(3)  # outputs that differ
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Of one module: while it is open an event loop runs in this thread, and `asyncio.run` refuses."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Open a page; at the end nothing may stand in its console, and nothing may have been asked of a network."""
    said: list[str] = []
    contexts = []

    def page_of(path: Path, width: int = 1440, scheme: str = "light", ready: str = "body[data-ready]") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("file:", "blob:")) or said.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector(ready)
        return page

    yield page_of
    for context in contexts:
        context.close()
    assert said == []


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for every test that needs one."""
    from spa_ray.pipeline.cluster import connected

    with connected(verbose=False):
        yield


@pytest.fixture(scope="session")
def process_group() -> Iterator[dict[str, str]]:
    """One process group of this process alone, kept to the end: DeepSpeed remembers the first that it sees for good.
    Yields the variables that it goes by, which are taken back so that no child process takes them for its own."""
    from spa_ray.training import comm

    with comm.process_group():
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        variables = {name: os.environ.pop(name) for name in names}
        yield variables
        os.environ.update(variables)


@pytest.fixture(scope="module")
def one_process(process_group: dict[str, str]) -> Iterator[None]:
    """That process group, for the tests of one module that train in this process."""
    os.environ.update(process_group)
    yield
    for name in process_group:
        del os.environ[name]


@pytest.fixture
def spa(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `spa ARGS`; returns (exit status, stdout, stderr)."""
    from spa_ray.cli.main import main

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["spa", *map(str, arguments)])
        try:
            main()
            status = 0
        except SystemExit as e:
            status = int(e.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return call
