"""`spa chat`: one model, or several side by side, in the terminal; one prompt from stdin for scripts."""

from __future__ import annotations

import difflib
import json
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from spa_ray.config import Config, arm_configs
from spa_ray.errors import InputError, RunError
from spa_ray.logs import printable
from spa_ray.pipeline.models import fetch_model
from spa_ray.pipeline.talk import Talk
from spa_ray.steering.asking import conditioning_of
from spa_ray.steering.guide import Told, check_conversation

KEYS = ("temperature", "top_p", "min_p", "top_k", "repetition_penalty", "max_tokens")
SAMPLING = {"temperature": 0.7, "max_tokens": 1024}
COLUMN = 50  # columns of the terminal that a model needs beside another
GPU_MEMORY = 0.9  # of the device, which several models share
HELP = """\
/system TEXT  what the models are told first; without a text: nothing. Starts a new conversation
/reset        forget the conversation
/save FILE    write the conversations as JSON
/quit         leave, as Ctrl-D does. Ctrl-C stops the answer"""
ENDS = {
    "length": "cut by max_tokens; max_tokens=N allows more",
    "context": "the context is full; /reset starts a new conversation",
    "stopped": "stopped",
}
_OVERRIDE = re.compile(r"[a-z_.][\w.-]*=")


def run_chat(arguments: Sequence[str], *, verbose: bool = False) -> dict[str, Any]:
    """Talk to the models that are named. Returns: the conversations, as `--json` prints them."""
    configs = chat_configs(arguments)
    folders = [fetch_model(config.model) for _, config in configs]
    check_steered([config for _, config in configs], folders)
    question = None if sys.stdin.isatty() else sys.stdin.read().strip()
    if question == "":
        raise InputError("spa chat: stdin is empty; pipe a prompt into it, or start it in a terminal")
    with ExitStack() as stack:
        talks = []
        for (name, config), folder in zip(configs, folders, strict=True):  # engines that start together take each
            print(printable(f"loading {name}"), file=sys.stderr)  # other's memory for theirs
            talks.append(stack.enter_context(Talk(name, config, folder, verbose=verbose)))
        room = Room(talks, Console(highlight=False))
        if question is None:
            room.talk()
        elif not room.ask(question):
            raise InputError("spa chat: a model does not take this prompt")
        return room.conversations()


def chat_configs(arguments: Sequence[str]) -> list[tuple[str, Config]]:
    """Models' names and their configs, from paths and `key=value` texts. Raises: InputError."""
    models = [a for a in arguments if not _OVERRIDE.match(a)]
    if not models:
        raise InputError("spa chat: no model; give a folder or a hub id")
    changes = [_override(a) for a in arguments if _OVERRIDE.match(a)]
    found = []
    for path in models:
        raw = {"model": {"path": path}, "evaluation": {"sampling": SAMPLING}}
        config = arm_configs(raw, changes, where="spa chat", stem="chat")["main"]
        kwargs = {"gpu_memory_utilization": round(GPU_MEMORY / len(models), 3), **config.model.engine_kwargs}
        if len(models) > 1 and not config.model.own_engine:
            model = config.model.model_copy(update={"engine_kwargs": kwargs})
            config = config.model_copy(update={"model": model})
        found.append((path, config))
    return found


def _override(text: str) -> str:
    key = text.partition("=")[0]
    if key in KEYS:
        return f"evaluation.sampling.{text}"
    if key in ("seed", "steer") or key.startswith(("model.", "generation.", "steer.")):
        return text
    near = difflib.get_close_matches(key, KEYS, n=1)
    fix = f"did you mean {near[0]}?" if near else f"one of {', '.join((*KEYS, 'seed', 'model.KEY'))}"
    raise InputError(f"spa chat: {key} is no key of a conversation; {fix}")


def check_steered(configs: Sequence[Config], folders: Sequence[Path]) -> None:
    """Raises: InputError where no model can be asked for what `--steer` says. One that knows of no scores may stand
    beside one that does."""
    knowing = [folder for folder in folders if conditioning_of(folder) is not None]
    if not configs[0].steer.is_default:
        for folder in knowing or folders[:1]:
            check_conversation(configs[0], folder)


def told_line(told: Told) -> str:
    """What was sensed and what was asked for."""
    parts = {"sensed": told.sensed, "asked": told.asked}
    said = [
        f"{what} {', '.join(f'{n} {v:.2f}' for n, v in scores.items())}" for what, scores in parts.items() if scores
    ]
    return "; ".join(said) or "asked for no scores"


class Room:
    """The terminal and the models in it."""

    def __init__(self, talks: Sequence[Talk], console: Console) -> None:
        self._talks, self._console = talks, console
        self._system: str | None = None

    def conversations(self) -> dict[str, Any]:
        return {
            "conversations": [
                {"model": talk.name, "messages": talk.messages, "finish_reason": talk.reply.finish,
                 "tokens": talk.reply.tokens, **(asdict(talk.reply.told) if talk.reply.told else {})}
                for talk in self._talks
            ]
        }  # fmt: skip

    def talk(self) -> None:
        """Read and answer until the person leaves."""
        import readline  # noqa: F401 (arrows and a history for `input`)

        self._say(f"{', '.join(talk.name for talk in self._talks)}: /help shows the commands, Ctrl-D leaves")
        while True:
            self._say("")
            try:
                line = input("> ").strip()
            except KeyboardInterrupt:
                self._say("\n/quit or Ctrl-D leaves")
                continue
            except EOFError:
                self._say("")
                return
            if line == "/quit":
                return
            if line.startswith("/"):
                self._command(*line.partition(" ")[::2])
            elif line:
                with self._stoppable():
                    self.ask(line)

    def ask(self, question: str) -> bool:
        """Show all models' answers as they come; false where one of them refuses the question."""
        for talk in self._talks:
            talk.ask(question)
        if len(self._talks) == 1:
            return self._one(self._talks[0])
        wide = self._console.is_terminal and self._console.width >= COLUMN * len(self._talks)
        return self._beside() if wide else self._below()

    def _one(self, talk: Talk) -> bool:
        shown, well = 0, True
        for _, error in self._pieces([talk]):
            text = printable(talk.reply.text)
            self._console.file.write(text[shown:])
            self._console.file.flush()
            shown, well = len(text), error is None
        self._console.file.write("\n" if shown else "")
        self._end(talk)
        return well

    def _below(self) -> bool:
        refused = {id(talk) for talk, error in self._pieces(self._talks) if error is not None}
        for talk in self._talks:
            self._say(f"\n--- {talk.name}")
            if id(talk) not in refused:
                self._say(talk.reply.text)
                self._end(talk)
        return not refused

    def _beside(self) -> bool:
        well = True
        with Live(self._columns(), console=self._console, transient=True, vertical_overflow="ellipsis") as live:
            for _, error in self._pieces(self._talks):
                live.update(self._columns())
                well = well and error is None
        self._console.print(self._columns())
        for talk in self._talks:
            self._end(talk)
        return well

    def _columns(self) -> Table:
        table = Table(expand=True)
        for talk in self._talks:
            table.add_column(Text(printable(talk.name)), ratio=1, overflow="fold")
        table.add_row(*(Text(printable(_shown(talk))) for talk in self._talks))
        return table

    def _pieces(self, talks: Sequence[Talk]) -> Iterator[tuple[Talk, ValueError | None]]:
        """Each model as its answer grows, until all have ended; and why it does not take the question."""
        answering = {talk.pipe: talk for talk in talks}
        while answering:
            patience = max(talk.stall_timeout_s for talk in answering.values())
            ready = wait(list(answering), timeout=patience)
            if not ready:
                silent = ", ".join(talk.name for talk in answering.values())
                raise RunError(f"{silent}: nothing in {patience:.0f} s (generation.stall_timeout_s)")
            for talk in [answering[pipe] for pipe in ready if isinstance(pipe, Connection)]:
                goes_on, error = False, None
                try:
                    goes_on = talk.advance()
                except ValueError as e:
                    error = e
                    self._say(f"{talk.name}: {e}")
                if not goes_on:
                    del answering[talk.pipe]
                yield talk, error

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Ctrl-C ends the answers in this block; once more, the block."""

        def stop(*_: object) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for talk in self._talks:
                talk.stop()

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _end(self, talk: Talk) -> None:
        """Say why an answer ended, where that is not its own end, and which scores were asked for."""
        where = f"{talk.name}: " if len(self._talks) > 1 else ""
        scores = talk.reply.told and told_line(talk.reply.told)
        for told in filter(None, (ENDS.get(talk.reply.finish or ""), scores)):
            print(printable(f"[{where}{told}]"), file=sys.stderr, flush=True)

    def _command(self, name: str, rest: str) -> None:
        if name == "/reset":
            self._reset()
        elif name == "/system":
            self._system = rest.strip() or None
            self._reset()
        elif name == "/save" and rest.strip():
            self._save(Path(rest.strip()).expanduser())
        else:
            self._say(HELP)

    def _reset(self) -> None:
        for talk in self._talks:
            talk.reset(self._system)
        self._say("a new conversation" + (f", told first: {self._system}" if self._system else ""))

    def _save(self, path: Path) -> None:
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(json.dumps(self.conversations(), ensure_ascii=False, indent=2) + "\n")
        except OSError as e:
            self._say(f"{path}: {e.strerror}; not saved")
        else:
            self._say(f"saved: {path}")

    def _say(self, text: str) -> None:
        print(printable(text), flush=True)


def _shown(talk: Talk) -> str:
    return talk.reply.text or ("(thinking)" if talk.reply.thinking else "")
