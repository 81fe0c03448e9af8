"""`spa chat`: one model or several, in a terminal and by a pipe, on the scripted engine and on vLLM."""

from __future__ import annotations

import io
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from spa_ray.cli.chat import chat_configs
from spa_ray.config.models import Config
from spa_ray.engine.scripted import ScriptedEngine
from spa_ray.errors import InputError
from spa_ray.generation.setup import Task, engine_chat
from spa_ray.pipeline import talk
from spa_ray.pipeline.talk import Reply, Speaker
from tests.terminal import CTRL_C, CTRL_D
from tests.terminal import spa as terminal

MODEL = Path(__file__).parents[1] / "spa_ray" / "microworld" / "model"
SCRIPTED = "model.engine=spa_ray.engine.scripted:ScriptedEngine"
HELLO = [{"role": "user", "content": "hello"}]


def script(**settings: Any) -> str:
    return f"model.engine_kwargs={json.dumps(settings)}"


def config_of(*changes: str) -> Config:
    return chat_configs([str(MODEL), SCRIPTED, *changes])[0][1]


def replies(*changes: str, messages: list[dict[str, str]] = HELLO, **how: Any) -> list[Reply]:
    config = config_of(*changes)
    engine = ScriptedEngine(config.model, MODEL, **config.model.engine_kwargs)
    speaker = Speaker(engine, engine_chat(config, Task(), engine, MODEL), config)
    return list(speaker.replies(messages, **{"turn": 1, **how}))


# --- answers, piece by piece ----------------------------------------------------------------------------------------


def test_an_answer_grows_at_its_end_until_max_tokens_are_there() -> None:
    found = replies("max_tokens=30")
    assert [reply.tokens for reply in found] == [8, 16, 24, 30]
    assert [reply.finish for reply in found] == [None, None, None, "length"]
    for earlier, later in pairwise(found):
        assert later.text.startswith(earlier.text)
        assert len(later.text) > len(earlier.text)


def test_it_ends_at_its_own_end_at_the_contexts_and_where_it_is_told_to() -> None:
    (one,) = replies(script(answer_words=1))
    assert (one.finish, one.text.isalpha(), one.tokens) == ("stop", True, len(one.text) + 1)
    assert replies("model.max_model_len=40")[-1].finish == "context"
    stopped = iter((False, False, True))
    found = replies(stopped=lambda: next(stopped))
    assert [reply.finish for reply in found] == [None, None, "stopped"]
    with pytest.raises(ValueError, match=r"\d+ tokens are more than the context of 8 takes"):
        replies("model.max_model_len=8")


def test_the_same_question_is_answered_anew_at_another_turn_and_alike_at_the_same() -> None:
    assert replies(turn=1) == replies(turn=1)
    assert replies(turn=1)[-1].text != replies(turn=2)[-1].text
    assert replies("seed=5")[-1].text != replies()[-1].text


def test_half_a_character_is_shown_once_it_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spa_ray.engine.scripted.WORDS", ("naïveté",))
    monkeypatch.setattr("spa_ray.pipeline.talk.PIECE", 1)
    assert not any("\ufffd" in reply.text for reply in replies("max_tokens=8"))


# --- what is asked for ----------------------------------------------------------------------------------------------


def test_settings_follow_the_models_and_several_share_a_gpus_memory() -> None:
    (one,) = chat_configs(["a", "max_tokens=7", "top_k=3", "model.max_model_len=64", "seed=4"])
    sampling = one[1].evaluation.sampling
    assert (sampling.max_tokens, sampling.top_k, sampling.temperature, one[1].seed) == (7, 3, 0.7, 4)
    assert one[1].model.max_model_len == 64
    assert one[1].model.engine_kwargs == {}
    two = chat_configs(["a", "runs/x=1/b"])
    assert [name for name, _ in two] == ["a", "runs/x=1/b"]
    assert [config.model.engine_kwargs for _, config in two] == [{"gpu_memory_utilization": 0.45}] * 2
    given = chat_configs(["a", "b", "model.engine_kwargs.gpu_memory_utilization=0.2"])
    assert given[0][1].model.engine_kwargs == {"gpu_memory_utilization": 0.2}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["a", "tempratur=1"], "tempratur is no key of a conversation; did you mean temperature"),
        (["a", "train.lr=1"], r"train\.lr is no key of a conversation; one of temperature"),
        (["a", "temperature=-1"], r"evaluation\.sampling\.temperature"),
        (["top_p=1"], "no model; give a folder or a hub id"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(arguments: list[str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        chat_configs(arguments)


# --- by a pipe ------------------------------------------------------------------------------------------------------


def piped(spa: Any, monkeypatch: pytest.MonkeyPatch, text: str, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    found: tuple[int, str, str] = spa("chat", *arguments)
    return found


def test_a_piped_prompt_is_answered_by_every_model(spa: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of stdin is one prompt."""
    options = [SCRIPTED, script(answer_words=1), "--json"]
    status, out, err = piped(spa, monkeypatch, "hello\nthere\n", str(MODEL), f"{MODEL}/../model", *options)
    assert status == 0, err
    *shown, last = out.strip().split("\n")
    one, two = json.loads(last)["conversations"]
    assert [m["role"] for m in one["messages"]] == ["user", "assistant"]
    assert one["messages"][0]["content"] == "hello\nthere"
    assert (one["finish_reason"], two["model"]) == ("stop", f"{MODEL}/../model")
    first, second = (found["messages"][1]["content"] for found in (one, two))
    assert shown == [f"--- {MODEL}", first, "", f"--- {two['model']}", second]


@pytest.mark.parametrize(
    ("text", "change", "status", "told"),
    [
        ("", "seed=1", 2, "stdin is empty"),
        ("hello", script(refuse="hello"), 2, "a model does not take this prompt"),
        ("hello", script(die="hello"), 1, "scripted: the engine is dead"),
        ("hello", script(nonsense=1), 1, "not loaded .*nonsense"),
        ("hello", "model.engine=spa_ray.engine.scripted:Missing", 2, "Missing"),
    ],
)
def test_what_cannot_be_answered_is_one_line(
    spa: Any, monkeypatch: pytest.MonkeyPatch, text: str, change: str, status: int, told: str
) -> None:
    found, out, err = piped(spa, monkeypatch, text, str(MODEL), SCRIPTED, change, "--json")
    assert found == status, err
    assert "conversations" not in out
    (line,) = [line for line in err.splitlines() if line.startswith("spa: ")]
    assert re.search(told, line), line


def test_an_engine_that_hangs_ends_it_in_one_line(spa: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(talk, "END_SECONDS", 1.0)
    hung = (str(MODEL), SCRIPTED, script(hang="hello"), "generation.stall_timeout_s=1")
    status, _, err = piped(spa, monkeypatch, "hello", *hung)
    assert status == 1
    assert f"{MODEL}: nothing in 1 s (generation.stall_timeout_s)" in err


# --- in a terminal --------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_the_answer_and_the_conversation_goes_on(tmp_path: Path) -> None:
    """The scripted engine answers slowly and without end. What is typed before a prompt is there is echoed at once, by
    the terminal itself, and says nothing of the program: so every line waits for its prompt."""
    with terminal("chat", str(MODEL), SCRIPTED, script(token_latency=0.01)) as chat:
        chat.until("> ")
        chat.type("/frobnicate\n")
        chat.until("/save FILE")
        chat.until("> ")
        chat.type("hello\n")
        chat.until("hello\n")
        chat.until(" ")
        chat.type(CTRL_C)
        chat.until("[stopped]", 10)
        chat.until("> ")
        chat.type(CTRL_C)
        chat.until("/quit or Ctrl-D leaves")
        chat.until("> ")
        chat.type("/system be brief\n")
        chat.until("told first: be brief")
        chat.until("> ")
        chat.type("again\n")
        chat.until("again\n")
        chat.until(" ")
        chat.type(CTRL_C)
        chat.until("[stopped]", 10)
        for told in ("saved: ", "File exists; not saved"):
            chat.until("> ")
            chat.type(f"/save {tmp_path}/chat.json\n")
            chat.until(told)
        chat.until("> ")
        chat.type(CTRL_D)
        assert chat.status() == 0
    (saved,) = json.loads((tmp_path / "chat.json").read_text())["conversations"]
    assert [m["role"] for m in saved["messages"]] == ["system", "user", "assistant"]
    assert saved["messages"][1]["content"] == "again"
    assert saved["finish_reason"] == "stopped"


@pytest.mark.engine
def test_a_person_talks_to_a_real_model_twice_and_it_knows_what_was_said(tmp_path: Path) -> None:
    """vLLM on the embedded model; Ctrl-C at the prompt reaches its process too, and it lives on."""
    with terminal("chat", str(MODEL), "temperature=0", "max_tokens=48") as chat:
        chat.until("/help shows the commands", 300)
        chat.until("> ")
        chat.type(CTRL_C)
        chat.until("leaves")
        chat.until("> ")
        chat.type("how do i find the market ?\n")
        chat.until("\n")
        first = chat.until("\n\n> ").strip()
        chat.type("how do i find the market ?\n")
        chat.until("\n\n> ")
        chat.type(f"/save {tmp_path}/chat.json\n")
        chat.until("saved")
        chat.until("> ")
        chat.type("/reset\n")
        chat.until("> ")
        chat.type("how do i find the market ?\n")
        chat.until("\n")
        assert chat.until("\n\n> ").strip() == first
        chat.type("/quit\n")
        assert chat.status() == 0
    (saved,) = json.loads((tmp_path / "chat.json").read_text())["conversations"]
    assert [m["role"] for m in saved["messages"]] == ["user", "assistant"] * 2
    assert saved["messages"][1]["content"] == first.replace("\n", "") or first.startswith(
        saved["messages"][1]["content"]
    )


VLLM = pytest.param(120, ("temperature=0", "max_tokens=24"), marks=[pytest.mark.engine, pytest.mark.long])
SHORT = (SCRIPTED, script(answer_words=1))


@pytest.mark.parametrize(("columns", "options"), [(120, SHORT), (60, SHORT), VLLM])
def test_several_models_stand_side_by_side_where_the_terminal_is_wide(columns: int, options: tuple[str, ...]) -> None:
    with terminal("chat", str(MODEL), f"{MODEL.parent}/../microworld/model", *options, columns=columns) as chat:
        chat.until("/help shows the commands", 300)
        chat.until("> ")
        chat.type("how do i find the market ?\n")
        shown = chat.until("\n> ")
        chat.type(CTRL_D)
        assert chat.status() == 0
    assert ("┃" in shown) == (columns == 120)
    assert (f"--- {MODEL}" in shown) == (columns == 60)


@pytest.mark.engine
@pytest.mark.long
def test_a_script_asks_a_real_model(spa: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, err = piped(
        spa, monkeypatch, "how do i find the market ?", str(MODEL), "temperature=0", "max_tokens=48", "--json"
    )
    assert status == 0, err
    (found,) = json.loads(out.strip().split("\n")[-1])["conversations"]
    assert found["finish_reason"] in ("stop", "length")
    assert len(found["messages"][1]["content"].split()) > 3
