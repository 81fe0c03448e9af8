"""The actor of a generation pass: one engine and the episodes in flight on it.

Comes in: blocks of prompts. Goes out: blocks of episodes, one row a prompt whatever happens to it. An engine that dies
or stalls takes the whole process with it, so that Ray replaces both and runs the unfinished blocks again; what it was
doing stands in the pass's ledger. Never: a wait without an end.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from spa_ray.config.models import Config
from spa_ray.data.episodes import EpisodeFolder
from spa_ray.data.schemas import episodes_schema
from spa_ray.engine import Completion, EngineDeadError, EngineStats, create_engine
from spa_ray.engine.checked import CheckedEngine
from spa_ray.engine.openai import BudgetSpentError, EndpointDeadError
from spa_ray.errors import InputError
from spa_ray.generation.endpoint_actor import EndpointLine
from spa_ray.generation.episode import RENDER, Row, error_row
from spa_ray.generation.follow import Line
from spa_ray.generation.gate import Gate
from spa_ray.generation.ledger import FRUITLESS_STARTS, SUSPECT_TRIES, crowd
from spa_ray.generation.metrics import EngineMetrics
from spa_ray.generation.setup import Task, make_episodes
from spa_ray.generation.upstream import REFUSED, Upstream
from spa_ray.logs import WorkerLog
from spa_ray.storage.files import AnyPath, as_path
from spa_ray.storage.node_cache import FETCH_SECONDS, local_folder
from spa_ray.storage.token import Token

LOGGER = logging.getLogger(__name__)
REPORT_SECONDS = 1.0
Observe = Callable[[Sequence[Row]], Sequence[str | None]]


@dataclass(frozen=True)
class Pass:
    """What every actor of a pass knows.

    `part` counts the tries; `observe` says what a live funnel shows of rows; `log` names run and stage in logs and
    metrics; `token` shows whether this node sees the run's folder as the driver does; `all_cores`: the engine computes
    with every core of its machine.
    """

    config: Config
    task: Task
    model: AnyPath
    earlier: AnyPath | None = None
    part: int = 0
    observe: Observe | None = None
    verbose: bool = False
    log: WorkerLog = field(default_factory=lambda: WorkerLog("INFO", {"run": "", "stage": ""}))
    token: Token | None = None
    all_cores: bool = False
    endpoint: EndpointLine | None = None
    upstream: Upstream | None = None
    steered: bool = False  # whether episodes have the columns STEERED

    @property
    def rows(self) -> pa.Schema:
        """Of the episodes."""
        return episodes_schema(steered=self.steered)


class EpisodeActor:
    """See the module. `ledger` is the line to the pass's `Ledger`."""

    def __init__(self, work: Pass, ledger: Line) -> None:
        self._work, self._ledger = work, ledger
        (self._me, node), self._log = who_am_i(), own_log()
        self._inside: set[str] = set()  # prompts whose episodes run now
        self._ahead: set[str] = set()  # prompts whose episodes are finished, of blocks that are not
        self._folders: dict[str, asyncio.Future[Path]] = {}
        self._requests = 0  # that the ledger knows of
        work.log.start(engine=self._me)
        self._metrics = EngineMetrics(run=work.log.fields["run"], stage=work.log.fields["stage"], engine=self._me)
        self._refused: Exception | None = None
        self._stopped = False  # the budget is used up
        self._telling, self._told = threading.Lock(), False
        self._tick: float | None = None  # when the event loop last came round
        self._loop: asyncio.AbstractEventLoop | None = None
        starts = ledger.ask("born", self._me, node, self._log)
        try:
            if starts > FRUITLESS_STARTS:
                raise EngineDeadError(self._gave_up(starts))
            self._start()
        except InputError as e:  # raised by the first block: here Ray would try and report it several times over
            self._refused = e
        except EngineDeadError as e:
            self._refused = e
        except Exception as e:  # noqa: BLE001 whatever a start can die of: the next one may live
            self._die(f"the engine did not start: {type(e).__name__}: {first_line(e)}")

    def _start(self) -> None:
        work, config = self._work, self._work.config
        if work.token is not None:
            work.token.check()
        if work.all_cores:  # before the first library that computes is loaded
            os.environ["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
        with self._at_most(FETCH_SECONDS, f"{work.model} was not fetched to this node"):
            folder = local_folder(work.model)
        with self._at_most(config.generation.start_timeout_s, "the engine did not start"):
            self._engine = CheckedEngine(create_engine(config.model, folder, config.generation, verbose=work.verbose))
            self._episodes = make_episodes(
                config, work.task, self._engine, folder, work.endpoint.ask if work.endpoint else None
            )
            self._earlier = RefinedAnswers(work.earlier) if work.earlier else None
        self._base = folder
        LOGGER.info("engine started", extra={"model": str(folder), "part": work.part})
        self._gate = Gate(self._engine, folder, config.resources.concurrency)
        threading.Thread(target=self._watch, name="engine-watch", daemon=True).start()

    @contextmanager
    def _at_most(self, seconds: float, what: str) -> Iterator[None]:
        """End the process when the block takes longer."""
        late = threading.Timer(seconds, lambda: self._die(f"{what} in {seconds:g} s"))
        late.daemon = True
        late.start()
        try:
            yield
        finally:
            late.cancel()

    async def __call__(self, batch: pa.Table) -> pa.Table:
        if self._refused:
            kind = "input" if isinstance(self._refused, InputError) else "death"
            await self._ledger.asked("word", kind, str(self._refused))
            raise self._refused
        if self._tick is None:
            self._tick, self._loop = time.monotonic(), asyncio.get_running_loop()
            self._reporter = asyncio.ensure_future(self._report())
        rows = batch.to_pylist()
        ids = [row["prompt_id"] for row in rows]
        deaths = await self._ledger.asked("begin", self._me, ids)
        if deaths is None:  # the budget is used up: rows that are left out here are asked by the next call
            return self._work.rows.empty_table()
        try:
            ran = await asyncio.gather(*(self._run(row, deaths.get(row["prompt_id"], 0)) for row in rows))
            episodes = [episode for episode in ran if episode is not None]
        except EngineDeadError as e:  # while it changed weights
            self._die(str(e))
        except EndpointDeadError as e:
            self._refused = e
            await self._ledger.asked("word", "death", str(e))
            raise
        reasons = Counter(reason or "passed" for reason in self._work.observe(episodes)) if self._work.observe else {}
        requests = self._tell_work().requests
        news = totals(episodes) | {"requests": requests - self._requests}
        self._requests = requests
        self._ahead.difference_update(ids)
        await self._ledger.asked("finished", self._me, ids, news, dict(reasons), any(map(is_fruit, episodes)))
        return pa.Table.from_pylist(episodes, schema=self._work.rows)

    async def _run(self, row: Row, deaths: int) -> Row | None:
        """Its episode; None where the budget did not suffice for it."""
        part, limit = self._work.part, self._work.config.generation.prompt_timeout_s
        if deaths >= SUSPECT_TRIES + part:
            return error_row(row, f"engine_died: {deaths} engines died with this prompt in them", part)
        if row.get(REFUSED) is not None:
            return error_row(row, f"refused: {row[REFUSED]}", part)
        model = await self._folder(row["model"]) if row.get("model") else None
        if self._work.upstream is not None:
            row = {**row, RENDER: self._work.upstream.read_by(model or self._base, row)}
        async with self._gate.using(model, crowd(deaths, self._work.config.resources.concurrency)):
            if self._stopped:
                return None
            self._inside.add(row["prompt_id"])
            self._metrics.started()
            started = time.monotonic()
            try:
                episode = await asyncio.wait_for(self._episode(row), limit)
            except EngineDeadError as e:  # at once, while exactly those are inside that were when it died
                self._die(str(e))
            except BudgetSpentError as e:
                self._inside.discard(row["prompt_id"])
                self._stopped = True
                self._ledger.tell("stop", str(e))
                return None
            except TimeoutError:
                episode = error_row(row, f"timeout: no episode within generation.prompt_timeout_s {limit:g}", part)
            self._inside.discard(row["prompt_id"])
            self._ahead.add(row["prompt_id"])
            self._metrics.finished(episode, time.monotonic() - started)
            if episode["error"] is not None:
                LOGGER.warning(episode["error"], extra={"prompt_id": row["prompt_id"], "attempt": part})
            return episode

    async def _episode(self, row: Row) -> Row:
        if self._work.task.kind == "score":
            return await self._episodes.score(row, part=self._work.part)
        earlier = self._earlier.get(row["prompt_id"]) if self._earlier else None
        return await self._episodes.run(row, attempt=self._work.part, earlier=earlier)

    async def _folder(self, model: str) -> Path:
        """This node's copy of the folder that a row names."""
        if model not in self._folders:
            self._folders[model] = asyncio.ensure_future(asyncio.to_thread(local_folder, as_path(model)))
        return await self._folders[model]

    async def _report(self) -> None:
        """How busy the engine is, for display and metrics, and the sign that the event loop comes round."""
        last = self._engine.stats()
        while True:
            self._tick = time.monotonic()
            await asyncio.sleep(REPORT_SECONDS)
            stats = self._tell_work()
            share = (stats.busy - last.busy) / (time.monotonic() - self._tick)
            self._metrics.engine(share, len(self._inside), stats.requests)
            last = stats

    def _tell_work(self) -> EngineStats:
        stats = self._engine.stats()
        here = (len(self._inside), len(self._ahead), stats.tokens, self._engine.prompted)
        self._ledger.tell("work", self._me, stats.busy, stats.alive, *here)
        return stats

    def _watch(self) -> None:
        """On a thread of its own: an engine that hangs may hold the event loop."""
        limit = self._work.config.generation.stall_timeout_s
        while True:
            time.sleep(min(1.0, limit / 4))
            if self._loop is not None and self._loop.is_closed():
                return  # the actor's time is over
            stalled = self._engine.stats().stalled
            if stalled > limit:
                self._die(f"the engine finished no step for {stalled:.0f} s (generation.stall_timeout_s)")
            held = time.monotonic() - self._tick if self._tick is not None else 0.0
            if held > limit + REPORT_SECONDS:
                self._die(f"something held the event loop for {held:.0f} s (generation.stall_timeout_s)")

    def _die(self, why: str) -> Any:
        """Tell the ledger, once, and end the process: Ray replaces it. Never returns."""
        LOGGER.error(why)
        try:
            with self._telling:  # the event loop and the watching thread may both come here
                if not self._told:
                    self._told = True
                    self._ledger.ask("died", self._me, sorted(self._inside), f"{why} ({self._place()})")
        finally:
            os._exit(1)

    def _gave_up(self, starts: int) -> str:
        last = self._ledger.ask("last_word")
        why = last[1] if last else f"its process was killed, out of memory perhaps ({self._place()})"
        return f"an engine started {starts} times without answering one prompt; the last time: {why}"

    def _place(self) -> str:
        return f"engine actor {self._me} on node {os.uname().nodename}, its log {self._log}"


def who_am_i() -> tuple[str, str]:
    """Ray's ids of this actor, the same over its restarts, and of its node."""
    here = ray.get_runtime_context()
    return here.get_actor_id(), here.get_node_id()


def own_log() -> str:
    """Where Ray sends this process's output."""
    output = Path("/proc/self/fd/1")
    return str(output.resolve()) if output.exists() else "in Ray's log folder"


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def is_fruit(episode: Mapping[str, Any]) -> bool:
    """Whether an engine answered: a row that it never saw, or died of, says nothing for it."""
    return episode["error"] is None or not episode["error"].startswith("engine_died")


def totals(episodes: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {
        "rows": len(episodes),
        "errors": sum(row["error"] is not None for row in episodes),
        "prompt_tokens": sum(row["prompt_tokens"] for row in episodes),
        "generated_tokens": sum(row["generated_tokens"] for row in episodes),
    }


class RefinedAnswers:
    """The refined answers of an earlier iteration by prompt_id, read once, held as Arrow columns (a few KB each)."""

    def __init__(self, episodes: AnyPath) -> None:
        kept = []
        for batch in EpisodeFolder(episodes).batches(["prompt_id", "responses"]):
            responses = pc.list_flatten(batch["responses"])
            owners = batch["prompt_id"].take(pc.list_parent_indices(batch["responses"]))
            fields = [pc.struct_field(responses, name) for name in ("text", "token_ids", "finish_reason")]
            columns = pa.table([owners, *fields], names=["prompt_id", "text", "token_ids", "finish_reason"])
            kept.append(columns.filter(pc.equal(pc.struct_field(responses, "kind"), "refined")))
        table = pa.concat_tables(kept)
        self._rows = {name: row for row, name in enumerate(table["prompt_id"].to_pylist())}
        self._answers = table.drop_columns(["prompt_id"]).combine_chunks()

    def get(self, prompt_id: str) -> Completion | None:
        row = self._rows.get(prompt_id)
        return None if row is None else Completion(**self._answers.slice(row, 1).to_pylist()[0])
