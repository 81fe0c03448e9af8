"""The same work as four chained `ray.data.llm` processors: sample, score, refine, score the refined.

Comes in: a `Work`. Goes out: a `Run`. The chain is given what helps it: prompts come as token ids (no chat-template and
no tokenizer stage), texts are decoded by the next step (no detokenizer stage), all engines and steps stand before the
first row moves, and a prompt's rows stay side by side in their block, so that no shuffle is needed to refine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import pyarrow as pa
from generation_work import Run, Work, set_up_workers

Row = dict[str, Any]
CARRIED = ("prompt_id", "messages", "index", "objective", "text", "first")


class Step:
    """Rows of one processor's answers to rows of the next one's requests. Lives in an actor of its own."""

    def __init__(self, work: Work) -> None:
        from spa_ray.generation.setup import Task, recipe
        from spa_ray.generation.templates import Templates
        from spa_ray.objectives import load_objectives
        from spa_ray.rollout.chat import Chat
        from spa_ray.rollout.labels import labels_of
        from spa_ray.rollout.tokenizer import load_tokenizer

        self.config, self.objectives = work.config, load_objectives(work.config)
        self.tokenizer = load_tokenizer(work.model)
        self.chat, self.templates = Chat(self.tokenizer, model=str(work.model)), Templates(work.config, self.objectives)
        self.recipe = recipe(work.config, Task())
        low, high = work.config.scoring.scale
        self.labels = labels_of(self.chat, [str(k) for k in range(low, high + 1)]).single
        if work.config.scoring.mode != "choice" or self.labels is None:
            raise ValueError("the chain of processors is written for scoring.mode choice with one-token labels")

    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist(list(self.rows(table.to_pylist())))

    def rows(self, rows: list[Row]) -> Iterable[Row]:
        raise NotImplementedError

    def request(self, row: Row, ids: list[int], seed: int, **params: Any) -> Row:
        kept = {key: row.get(key) for key in CARRIED} | {"first": row.get("first") or time.time()}
        return {**kept, "tokenized_prompt": ids, "sampling_params": {"seed": seed, "detokenize": False, **params}}

    def seed(self, prompt_id: str, role: str, **where: Any) -> int:
        from spa_ray.generation.seeds import seed_for

        return seed_for(self.recipe.seed, self.recipe.iteration, prompt_id, role, **where)

    def text(self, row: Row) -> str:
        return str(self.tokenizer.decode(row["generated_tokens"], skip_special_tokens=True))

    def scores(self, row: Row, text: str) -> Iterable[Row]:
        for objective in self.objectives:
            content = self.templates.score(row["messages"], text, objective)
            ids = self.chat.prompt_ids(
                [{"role": "user", "content": content}], self.templates.score_system(row["messages"], text, objective)
            )
            seed = self.seed(row["prompt_id"], "score", response=row["index"], objective=objective.name)
            carried = {**row, "text": text, "objective": objective.name}
            how = {"temperature": self.config.scoring.temperature, "allowed_token_ids": self.labels, "max_tokens": 1}
            yield self.request(carried, ids, seed, **how)


class Samples(Step):
    def rows(self, rows: list[Row]) -> Iterable[Row]:
        draw, systems = self.recipe.sample, self.recipe.systems
        for row in rows:
            for k in range(self.recipe.n):
                ids = self.chat.prompt_ids(row["messages"], systems[k % len(systems)])
                how = {"temperature": draw.temperature, "top_p": draw.top_p, "max_tokens": draw.max_tokens}
                yield self.request({**row, "index": k}, ids, self.seed(row["prompt_id"], "sample", response=k), **how)


class Scores(Step):
    def rows(self, rows: list[Row]) -> Iterable[Row]:
        for row in rows:
            yield from self.scores(row, self.text(row))


class Refine(Step):
    def rows(self, rows: list[Row]) -> Iterable[Row]:
        draw = self.recipe.refine
        assert draw is not None
        for prompt_id, group in groupby(rows, key=lambda row: row["prompt_id"]):
            answers: dict[int, Row] = {}
            for row in (scored := list(group)):
                answer = answers.setdefault(row["index"], {"text": row["text"], "scores": {}})
                answer["scores"][row["objective"]] = int(self.text(row))
            if len(scored) != self.recipe.n * len(self.objectives):
                raise RuntimeError(f"{prompt_id}: {len(scored)} scores side by side; its rows have been torn apart")
            messages, candidates = scored[0]["messages"], list(answers.values())
            ids = self.chat.prompt_ids(
                [{"role": "user", "content": self.templates.refine(messages, candidates)}],
                self.templates.refine_system(messages, candidates),
            )
            how = {"temperature": draw.temperature, "top_p": draw.top_p, "max_tokens": draw.max_tokens}
            carried = {**scored[0], "index": self.recipe.n}
            yield self.request(carried, ids, self.seed(prompt_id, "refine", response=self.recipe.n), **how)


def run_processors(work: Work, concurrency: int) -> Run:
    """Side `processors`. `concurrency` is the chain's own: 8 batches of 32 rows in each engine, its default."""
    del concurrency
    began = time.time()
    set_up_workers()
    os.environ |= {"RAY_DATA_DISABLE_PROGRESS_BARS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import ray

    ray.init(address="local", num_cpus=16, include_dashboard=False, log_to_driver=False)
    try:
        done = chain(work)
    finally:
        ray.shutdown()
    first, last = min(done["first"]), max(done["last"])
    # A row here is one score of a refined answer; the requests before it are the same for every prompt.
    prompts, scores = len(set(done["prompt_id"])), len(work.config.objectives)
    requests = prompts * (work.config.sampling.n * (1 + scores) + 1 + scores)
    return Run(requests, prompts, last - first, first - began)


def chain(work: Work) -> dict[str, list[Any]]:
    """Run it, written to Parquet as ours is. Returns: the columns prompt_id, first and last (seconds) of all rows."""
    import pyarrow.parquet as pq
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    context.wait_for_min_actors_s = 600
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    data = ray.data.read_parquet(str(work.prompts))
    data = data.repartition(target_num_rows_per_block=work.config.generation.rows_per_block)
    for step in (Samples, Scores, Refine, Scores):
        data = data.map_batches(
            step,
            fn_constructor_args=(work,),
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=1),
            num_cpus=0.5,
        )
        data = processor(work)(data)
    out = work.scratch / f"chain-{time.time_ns()}"
    data.write_parquet(str(out))
    return pq.read_table(out, columns=["prompt_id", "first", "last"]).to_pydict()


def processor(work: Work) -> Any:
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    from spa_ray.engine.vllm_start import ENVIRONMENT, engine_arguments, own_environment, prepare_environment

    with own_environment():
        prepare_environment()
        arguments = engine_arguments(work.config.model, work.model)
    arguments = {key: value for key, value in arguments.items() if key != "model" and value is not None}
    gpus = work.config.resources.gpus_per_engine
    config = vLLMEngineProcessorConfig(
        model_source=arguments.pop("tokenizer", None) or str(work.model),
        engine_kwargs=arguments,
        concurrency=1,
        placement_group_config=None if gpus else {"bundles": [{"CPU": 1}]},
        log_engine_metrics=False,
        runtime_env={"env_vars": {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}},
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )
    return build_processor(config, preprocess=dict, postprocess=answered)


def answered(row: Row) -> Row:
    kept = {key: row[key] for key in CARRIED}
    return {**kept, "generated_tokens": row["generated_tokens"], "last": time.time()}
