"""A model that is talked to: an engine in a process of its own, which answers a conversation piece by piece.

Every piece is a request of its own whose prompt is all that came before, so that any engine streams; the prefix cache
keeps what it has computed. A process holds one engine, so each model has one.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from spa_ray.config.models import Config
from spa_ray.engine import Engine, EngineDeadError, Request, create_engine
from spa_ray.errors import InputError, RunError
from spa_ray.generation.seeds import seed_for
from spa_ray.generation.setup import Task, engine_chat
from spa_ray.logs import hush
from spa_ray.rollout.chat import Chat
from spa_ray.steering.asking import conditioning_of
from spa_ray.steering.guide import Guide, Told

PIECE = 8  # tokens
STOP = "stop"
END_SECONDS = 30.0
ERRORS: dict[str, type[Exception]] = {"input": InputError, "run": RunError, "refused": ValueError}

Message = Mapping[str, str]
Finish = Literal["stop", "length", "context", "stopped"]


@dataclass(frozen=True)
class Reply:
    """An answer so far, without its thinking; `finish` is null while it goes on, `stopped` where it was told to end."""

    text: str = ""
    tokens: int = 0
    finish: Finish | None = None
    thinking: bool = False
    told: Told | None = None  # which scores the model was asked for, where its prompts say some


class Speaker:
    """An engine and its chat, by a config's `model` and `evaluation.sampling`."""

    def __init__(self, engine: Engine, chat: Chat, config: Config, guide: Guide | None = None) -> None:
        self._engine, self._chat, self._config, self._guide = engine, chat, config, guide

    @classmethod
    def load(cls, config: Config, folder: Path, *, verbose: bool = False) -> Speaker:
        engine = create_engine(config.model, folder, config.generation, verbose=verbose)
        guide = None if conditioning_of(folder) is None else Guide(config, folder)
        return cls(engine, engine_chat(config, Task(), engine, folder), config, guide)

    def replies(
        self, messages: Sequence[Message], *, turn: int, stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[Reply]:
        """The answer as it grows. `turn` draws another answer. Raises: ValueError for a conversation that the template
        or the context refuses; EngineDeadError."""
        read, told = (messages, None) if self._guide is None else self._guide.read(messages)
        prompt, ids, finish = self._chat.prompt_ids(read), list[int](), None
        if len(prompt) >= self._engine.max_model_len:
            raise ValueError(f"{len(prompt)} tokens are more than the context of {self._engine.max_model_len} takes")
        with asyncio.Runner() as runner:
            while finish is None:
                finish = self._next(runner, prompt, ids, turn)
                finish = "stopped" if finish is None and stopped() else finish
                yield replace(self._reply(ids, finish), told=told)

    def close(self) -> None:
        self._engine.shutdown()

    def _next(self, runner: asyncio.Runner, prompt: list[int], ids: list[int], turn: int) -> Finish | None:
        """Add a piece to `ids`."""
        sampling = self._config.evaluation.sampling
        context, wanted = self._engine.max_model_len - len(prompt) - len(ids), sampling.max_tokens - len(ids)
        room = min(PIECE, context, wanted)
        request = Request(
            prompt_ids=[*prompt, *ids],
            max_tokens=room,
            temperature=sampling.temperature,
            seed=seed_for(self._config.seed, turn, "chat", "answer", draw=len(ids)),
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            top_k=sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
        )
        found = runner.run(self._engine.generate(request))
        ids += found.token_ids
        if found.finish_reason == "stop":
            return "stop"
        return None if room < min(context, wanted) else "length" if room == wanted else "context"

    def _reply(self, ids: list[int], finish: Finish | None) -> Reply:
        parts = self._chat.divide(ids)
        # A character whose last bytes are still to come.
        text = parts.text if finish else parts.text.rstrip("\ufffd")
        return Reply(text, len(ids), finish, thinking=not parts.closed)


class Talk:
    """A model's process and its conversation so far. A context manager: its end ends the process."""

    def __init__(self, name: str, config: Config, folder: Path, *, verbose: bool = False) -> None:
        self.name, self.messages = name, list[dict[str, str]]()
        self.reply = Reply()
        self._turns, self._patience, self._ready = 0, config.generation.start_timeout_s, False
        self.stall_timeout_s = config.generation.stall_timeout_s
        self._pipe, theirs = multiprocessing.Pipe()
        spawn = multiprocessing.get_context("spawn")
        self._process = spawn.Process(target=serve, args=(theirs, config, folder, verbose))
        self._process.start()
        theirs.close()

    def __enter__(self) -> Talk:
        """Wait until the model is loaded. Raises: InputError where it is refused; RunError."""
        try:
            if not self._pipe.poll(self._patience):
                raise RunError(f"{self.name}: not loaded in {self._patience:.0f} s (generation.start_timeout_s)")
            self._receive()
            self._ready = True
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        if not self._ready:  # what loads does not look at its pipe
            self._process.terminate()
        self._process.join(END_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    @property
    def pipe(self) -> Connection:
        """Readable when `advance` has something to take."""
        return self._pipe

    def ask(self, question: str) -> None:
        self.messages.append({"role": "user", "content": question})
        self.reply, self._turns = Reply(), self._turns + 1
        self._send((self.messages, self._turns))

    def advance(self) -> bool:
        """Take the next piece of the answer; false at its end, which becomes part of the conversation.

        Raises: ValueError where the question is refused, which leaves the conversation; RunError.
        """
        try:
            self.reply = self._receive()
        except ValueError:
            self.messages.pop()
            raise
        if self.reply.finish is None:
            return True
        self.messages.append({"role": "assistant", "content": self.reply.text})
        return False

    def stop(self) -> None:
        """End the answer; `advance` still has to see it end."""
        self._send(STOP)

    def reset(self, system: str | None) -> None:
        self.messages = [] if not system else [{"role": "system", "content": system}]

    def _send(self, what: Any) -> None:
        try:
            self._pipe.send(what)
        except OSError as e:
            raise self._gone() from e

    def _receive(self) -> Reply:
        try:
            kind, found = self._pipe.recv()
        except (EOFError, OSError) as e:
            raise self._gone() from e
        if kind in ERRORS:
            raise ERRORS[kind](f"{self.name}: {found}" if kind == "run" else found)
        reply: Reply = found
        return reply

    def _gone(self) -> RunError:
        self._process.join(END_SECONDS)
        return RunError(f"{self.name}: its process ended with exit status {self._process.exitcode}")


def serve(pipe: Connection, config: Config, folder: Path, verbose: bool) -> None:
    """The model's process: loads it, then answers what comes through the pipe until that is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the terminal's, which says what shall stop
    if not verbose:
        hush()
    try:
        speaker = Speaker.load(config, folder, verbose=verbose)
    except InputError as e:
        pipe.send(("input", str(e)))
        return
    except Exception as e:  # noqa: BLE001 (whatever an engine's start meets: the terminal says it)
        pipe.send(("run", f"not loaded ({type(e).__name__}: {e})"))
        return
    try:
        with suppress(EOFError, OSError):  # the terminal's end is closed
            pipe.send(("ready", Reply()))
            while True:
                asked = pipe.recv()
                if asked != STOP:  # else it came after the answer's end
                    _answer(pipe, speaker, *asked)
    finally:
        speaker.close()


def _answer(pipe: Connection, speaker: Speaker, messages: Sequence[Message], turn: int) -> None:
    try:
        for reply in speaker.replies(messages, turn=turn, stopped=lambda: pipe.poll() and pipe.recv() == STOP):
            pipe.send(("reply", reply))
    except EngineDeadError as e:
        pipe.send(("run", str(e)))
    except ValueError as e:
        pipe.send(("refused", str(e)))
