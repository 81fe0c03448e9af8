"""What benchmarks/generation.py runs in fresh processes: one and the same generation work on four sides.

Comes in: a `Work` (config, prompts, model, scratch folder) and how many prompts may be in flight. Goes out: a `Run`.
The functions import what they measure, when they are called: a process holds one side and nothing else.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from contextvars import ContextVar
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from spa_ray.config.models import Config, Model
from spa_ray.engine.protocol import Completion, Request

STAGES = ("sample", "score", "refine", "rescore")
PROMPT: ContextVar[str] = ContextVar("prompt")


@dataclasses.dataclass(frozen=True)
class Work:
    """The same for every side. `prompts` is a Parquet file of PROMPTS."""

    config: Config
    model: Path
    prompts: Path
    requests: Path  # what `run_coroutines` recorded, for `run_raw`
    scratch: Path


@dataclasses.dataclass
class Run:
    """`seconds`: from the first request to the last answer; `startup_seconds`: from the side's start to the former.

    `cpu_seconds`: of the one process, all its threads, in those seconds; None where there are several processes, and
    `cores` then says how many cores each kind of them kept busy.
    """

    requests: int
    prompts: int
    seconds: float
    startup_seconds: float
    stage_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    engine_busy: float | None = None
    generated_tokens: int | None = None
    cpu_seconds: float | None = None
    cores: dict[str, float] = dataclasses.field(default_factory=dict)
    began: float = 0.0  # `time.time()` of the first request

    @property
    def requests_per_s(self) -> float:
        return self.requests / self.seconds


def read_prompts(work: Work) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(work.prompts).to_pylist()
    return rows


# --- spa_ray's episodes without Ray ----------------------------------------------------------------------------------


class Recorder:
    """An engine that notes who asked for what."""

    def __init__(self, engine: Any, role: str, log: list[tuple[str, str, Request]]) -> None:
        self._engine, self._role, self._log = engine, role, log
        self.tokenizer, self.max_model_len = engine.tokenizer, engine.max_model_len

    async def generate(self, request: Request) -> Completion:
        self._log.append((PROMPT.get(), self._role, request))
        return await self._engine.generate(request)


def play_episodes(
    work: Work, concurrency: int, log: list[tuple[str, str, Request]], prompts: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], Run]:
    """All episodes on one engine in this process, `concurrency` prompts at a time, in the list's order."""
    from spa_ray.engine import create_engine
    from spa_ray.generation.episode import Episodes
    from spa_ray.generation.setup import Task, make_judge, recipe
    from spa_ray.generation.templates import Templates
    from spa_ray.objectives import load_objectives
    from spa_ray.rollout.chat import Chat

    began = time.perf_counter()
    config, task = work.config, Task()
    engine = create_engine(config.model, work.model)
    chat, templates = Chat(engine.tokenizer, model=str(work.model)), Templates(config, load_objectives(config))
    asks_scores: Any = Recorder(engine, "judge", log)
    asks_answers: Any = Recorder(engine, "answer", log)
    judge = make_judge(config, task, asks_scores, chat, templates)
    episodes = Episodes(asks_answers, chat, templates, judge, recipe(config, task))

    async def everything() -> list[dict[str, Any]]:
        room = asyncio.Semaphore(concurrency)

        async def one(prompt: dict[str, Any]) -> dict[str, Any]:
            async with room:
                PROMPT.set(prompt["prompt_id"])
                return await episodes.run(prompt)

        return await asyncio.gather(*(one(prompt) for prompt in prompts))

    first, cpu = time.perf_counter(), time.process_time()
    rows = asyncio.run(everything())
    last, cpu = time.perf_counter(), time.process_time() - cpu
    stats = engine.stats()
    engine.shutdown()
    if failed := [row["error"] for row in rows if row["error"]]:
        raise RuntimeError(f"{len(failed)} episodes failed, the first: {failed[0]}")
    tokens = sum(row["generated_tokens"] for row in rows)
    busy = stats.busy / stats.alive
    run = Run(len(log), len(rows), last - first, first - began, engine_busy=busy, generated_tokens=tokens)
    run.cpu_seconds = cpu
    return rows, run


def episode_bytes(work: Work, concurrency: int, order: str, part: int, parts: int) -> dict[str, list[str]]:
    """By prompt: the whole episode as canonical JSON, then its candidates' token ids. Of every `parts`-th prompt."""
    prompts = read_prompts(work)[part::parts]
    rows, _ = play_episodes(work, concurrency, [], prompts[::-1] if order == "reversed" else prompts)
    return {
        row["prompt_id"]: [json.dumps(row, sort_keys=True), json.dumps([r["token_ids"] for r in row["responses"][:-1]])]
        for row in rows
    }


def run_coroutines(work: Work, concurrency: int) -> Run:
    """Side `coroutines`. Writes the requests by stage to `work.requests`."""
    log: list[tuple[str, str, Request]] = []
    rows, run = play_episodes(work, concurrency, log, read_prompts(work))
    refined = {row["prompt_id"] for row in rows if row["responses"][-1]["kind"] == "refined"}
    work.requests.write_text(json.dumps(by_stage(log, refined)))
    return run


def by_stage(log: list[tuple[str, str, Request]], refined: set[str]) -> dict[str, list[dict[str, Any]]]:
    """The recorded requests as JSON, by stage, prompt after prompt. A prompt's last answer is the refined one."""
    stages: dict[str, list[dict[str, Any]]] = {stage: [] for stage in STAGES}
    prompts: dict[str, list[tuple[str, Request]]] = {}
    for prompt, role, request in log:
        prompts.setdefault(prompt, []).append((role, request))
    for prompt, asked in prompts.items():
        answers = [k for k, (role, _) in enumerate(asked) if role == "answer"]
        refine = answers[-1] if prompt in refined else len(asked)
        for k, (role, request) in enumerate(asked):
            early, late = ("sample", "refine") if role == "answer" else ("score", "rescore")
            stages[early if k < refine else late].append(dataclasses.asdict(request))
    return stages


# --- raw vLLM --------------------------------------------------------------------------------------------------------


def run_raw(work: Work, concurrency: int) -> Run:
    """Side `raw`: `LLM.generate`, stage after stage, every prompt and its parameters made beforehand."""
    del concurrency  # all of a stage at once
    return _raw_part(work, part=0, parts=1)


def run_raw_two(work: Work, concurrency: int) -> Run:
    """Side `raw_two`: two of `raw` side by side, each with half of the cores and every second request of a stage."""
    del concurrency
    os.environ["OMP_NUM_THREADS"] = str(max(1, int(os.environ["OMP_NUM_THREADS"]) // 2))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        runs = list(pool.map(partial(_raw_part, work, parts=2), range(2)))
    # Both begin when both are ready, and the slower one ends the work.
    first, last = min(run.began for run in runs), max(run.began + run.seconds for run in runs)
    tokens = sum(run.generated_tokens or 0 for run in runs)
    requests = sum(run.requests for run in runs)
    return Run(requests, runs[0].prompts, last - first, runs[0].startup_seconds, generated_tokens=tokens)


def _raw_part(work: Work, part: int, parts: int) -> Run:
    """Every `parts`-th request of each stage."""
    began = time.perf_counter()
    from spa_ray.engine.vllm_requests import sampling_params
    from spa_ray.engine.vllm_start import engine_arguments, prepare_environment

    prepare_environment()
    from vllm import LLM

    llm = LLM(**engine_arguments(work.config.model, work.model))
    todo = {}
    for stage, requests in json.loads(work.requests.read_text()).items():
        made = [request_of(values) for values in requests[part::parts]]
        params = [sampling_params(r) for r in made]
        todo[stage] = [{"prompt_token_ids": r.prompt_ids} for r in made], params
    _meet(work.scratch, part, parts)
    first, cpu, moment = time.perf_counter(), time.process_time(), time.time()
    ends, tokens = [first], 0
    for prompts, params in todo.values():
        outputs = llm.generate(prompts, params, use_tqdm=False)
        tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
        ends.append(time.perf_counter())
    cpu = time.process_time() - cpu
    return Run(
        sum(len(prompts) for prompts, _ in todo.values()),
        len(read_prompts(work)),
        ends[-1] - first,
        first - began,
        {stage: round(b - a, 3) for stage, a, b in zip(todo, ends, ends[1:], strict=False)},
        generated_tokens=tokens,
        cpu_seconds=cpu,
        began=moment,
    )


def _meet(folder: Path, part: int, parts: int) -> None:
    """Wait until all parts are here; their parent is the same process, so its id names this meeting."""
    if parts == 1:
        return
    names = [folder / f"ready-{os.getppid()}-{k}" for k in range(parts)]
    names[part].touch()
    while not all(name.exists() for name in names):
        time.sleep(0.01)


def request_of(values: dict[str, Any]) -> Request:
    for key in ("choices", "choice_ids", "label_ids"):
        values[key] = tuple(values[key]) if values[key] else None
    return Request(**values)


# --- spa_ray's generation pass ---------------------------------------------------------------------------------------


class TimedEngine:
    """The vLLM engine inside spa_ray's actor, which writes down when each request came and was answered."""

    def __init__(self, model: Model, folder: Path, *, log: str, **engine_kwargs: Any) -> None:
        from spa_ray.engine import create_engine

        self._engine: Any = create_engine(
            model.model_copy(update={"engine": "vllm", "engine_kwargs": engine_kwargs}), folder
        )
        self.tokenizer, self.max_model_len = self._engine.tokenizer, self._engine.max_model_len
        self._log = open(f"{log}.{os.getpid()}", "w", buffering=1)  # noqa: SIM115 the process's end closes it

    async def generate(self, request: Request) -> Completion:
        came = time.time()
        completion: Completion = await self._engine.generate(request)
        self._log.write(f"{came} {time.time()}\n")
        return completion

    async def load_weights(self, model: Path) -> None:
        await self._engine.load_weights(model)

    def stats(self) -> Any:
        return self._engine.stats()

    def shutdown(self) -> None:
        self._engine.shutdown()


def run_pass(work: Work, concurrency: int) -> Run:
    """Side `spa_ray`: `spa_ray.generation.stage.generate` on a local Ray of this machine."""
    began = time.time()
    set_up_workers()
    from processes import watched_cores

    from spa_ray.generation.setup import Task
    from spa_ray.generation.stage import generate
    from spa_ray.pipeline.cluster import connected

    folder = work.scratch / f"pass-{time.time_ns()}"
    config = timed(work.config, folder / "times", concurrency)
    folder.mkdir(parents=True)
    with connected(verbose=False), watched_cores() as cores:
        counts = generate(
            config,
            Task(),
            prompts=work.prompts,
            out=folder / "episodes",
            checkpoint=folder / "checkpoint",
            model=work.model,
            config_hash="benchmark",
        )
    if counts.errors or counts.engine_deaths:
        raise RuntimeError(f"{counts.errors} errors, {counts.engine_deaths} dead engines; {counts.first_error}")
    lines = [line.split() for path in folder.glob("times.*") for line in path.read_text().splitlines()]
    first, last = min(float(came) for came, _ in lines), max(float(done) for _, done in lines)
    return Run(
        len(lines),
        counts.rows,
        last - first,
        first - began,
        engine_busy=counts.engine_busy,
        generated_tokens=counts.generated_tokens,
        cores=cores.between(first, last),
    )


def timed(config: Config, log: Path, concurrency: int) -> Config:
    kwargs = {**config.model.engine_kwargs, "log": str(log)}
    model = config.model.model_copy(update={"engine": "generation_work:TimedEngine", "engine_kwargs": kwargs})
    resources = config.resources.model_copy(update={"concurrency": concurrency})
    return config.model_copy(update={"model": model, "resources": resources})


def set_up_workers() -> None:
    """Ray's workers, which inherit this environment, find this module and the package that is measured, and compute
    with as many threads as their actor has CPUs: the number that the sides without Ray need would hold for each."""
    import spa_ray

    os.environ.pop("OMP_NUM_THREADS", None)
    paths = [str(Path(__file__).parent), str(Path(spa_ray.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
