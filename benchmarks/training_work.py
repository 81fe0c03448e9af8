"""The work that `train_vs_trl.py` gives to both sides: a model, pairs, settings; and the record of a run.

Goes out: a folder with a model and a pairs table, the same pairs as texts for TRL. Never: training.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import numpy as np
from matmul import training_flops

# Files of a model folder that say how its text is tokenised; the benchmark has a tokenizer of its own.
TOKENIZER_FILES = ("tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab.", "merges.")


@dataclass(frozen=True)
class Setup:
    """What both sides train on and how. `folder` holds the model and the pairs."""

    folder: Path
    seed: int
    steps: int
    batch_size: int
    lr: float
    beta: float
    gamma: float
    dtype: str
    correlation: float
    zero_stage: int
    trl_weights: str
    trl_attention: str
    trl_liger: bool
    lend: tuple[str, ...]
    ordered_by: str = "pairs"
    pairs_per_prompt: int | None = None  # None: every pair has a prompt of its own

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def pairs(self) -> Path:
        return self.folder / "pairs.parquet"

    @property
    def order(self) -> Path:
        return self.folder / "order.npz"

    def job(self, folder: Path, micro_batch_tokens: int | None) -> Any:
        """Our side's job."""
        from spa_ray.config.training import Tracking
        from spa_ray.training.job import TrainJob

        return TrainJob(
            name="ours",
            pairs=self.pairs,
            model=self.model,
            out=folder / "model",
            train=self.train(micro_batch_tokens),
            seed=self.seed,
            work=folder / "work",
            tracking=Tracking(backends=()),
        )

    def train(self, micro_batch_tokens: int | None = None) -> Any:
        """The `train` section. Nothing is watched or saved on the way, on either side."""
        from spa_ray.config.training import train_section

        settings = {
            "method": "spa_simpo",
            "beta": self.beta,
            "gamma": self.gamma,
            "lr": self.lr,
            "dtype": self.dtype,
            "order": self.ordered_by,
            "batch_size": self.batch_size,
            "micro_batch_tokens": micro_batch_tokens,
            "max_length": harness.MAX_LENGTH,
            "zero_stage": self.zero_stage,
            "collapse_nats": None,
        }
        return train_section(settings)


@dataclass
class Run:
    """One run: when each step ended, its loss, the peak memory up to the last step, the memory before the model."""

    memory_before_mib: float
    ends: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_memory_mib: float = 0.0

    def step_ended(self) -> None:
        harness.finish_queued_work()
        self.ends.append(time.perf_counter())
        self.peak_memory_mib = harness.peak_memory_mib()

    def pairs_per_s(self, batch_size: int, warmup: int) -> float:
        """Over the steps after the first `warmup`, with all that happens between them."""
        return batch_size * (len(self.ends) - warmup) / (self.ends[-1] - self.ends[warmup - 1])


def make_inputs(
    setup: Setup, source: Path | None, run: Path | None, hidden: int, layers: int, vocab: int
) -> dict[str, Any]:
    """Write the model and the pairs; say what they are. `run`: a pairs folder, whose pairs are taken."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if source is None:
        harness.llama(hidden=hidden, layers=layers, vocab=vocab, seed=setup.seed).save_pretrained(setup.model)
    else:
        link_model(source, setup.model)
        vocab = AutoConfig.from_pretrained(source).get_text_config().vocab_size
    harness.number_tokenizer(vocab).save_pretrained(setup.model)
    model = AutoModelForCausalLM.from_pretrained(setup.model, dtype="auto")
    parameters, head = model.num_parameters(), model.get_output_embeddings().weight.numel()
    tied = model.config.get_text_config().tie_word_embeddings
    return {
        "parameters": parameters,
        # A head that is a large share of the arithmetic favours whoever skips the prompt's logits.
        "head_share_of_matmuls": round(head / (parameters - (0 if tied else head)), 3),
        "vocab": vocab,
        **write_pairs(setup, given_pairs(setup, run, source) if run else random_pairs(setup, vocab)),
    }


def link_model(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and not file.name.startswith(TOKENIZER_FILES):
            (folder / file.name).symlink_to(file.absolute())


@dataclass(frozen=True)
class PairIds:
    """A pair's ids. The prompt begins with the tokenizer's first token, each answer ends in its last."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def random_pairs(setup: Setup, vocab: int) -> list[PairIds]:
    """As many pairs as the steps take: random ids, lengths as preference data has them. With `pairs_per_prompt` they
    are drawn among the 15 pairs of a prompt's 6 answers."""
    rng = np.random.default_rng(setup.seed)
    n = setup.steps * setup.batch_size

    def ids(tokens: int) -> list[int]:
        return rng.integers(harness.FIRST_ID, vocab, size=tokens - 1).tolist()

    if setup.pairs_per_prompt is None:
        prompts = harness.log_normal(rng, n, *harness.PROMPTS)
        answers = harness.answer_lengths(rng, n, setup.correlation)
        return [
            PairIds([harness.BOS, *ids(prompts[i])], *([*ids(length), harness.EOS] for length in answers[i]))
            for i in range(n)
        ]
    pairs: list[PairIds] = []
    among = np.stack(np.triu_indices(6, k=1), axis=1)
    while len(pairs) < n:
        prompt = [harness.BOS, *ids(int(harness.log_normal(rng, 1, *harness.PROMPTS)[0]))]
        answers = [[*ids(int(length)), harness.EOS] for length in harness.log_normal(rng, 6, *harness.ANSWERS)]
        chosen = rng.choice(len(among), size=setup.pairs_per_prompt, replace=False)
        pairs += [PairIds(prompt, answers[a], answers[b]) for a, b in rng.permuted(among[chosen], axis=1)]
    return pairs[:n]


def given_pairs(setup: Setup, folder: Path, model: Path | None) -> list[PairIds]:
    """The first pairs of a table that `spa build` wrote, prompts tokenised as training does it."""
    import pyarrow.dataset as pds

    from spa_ray.rollout.chat import chat_of
    from spa_ray.rollout.settings import ChatSettings, today
    from spa_ray.rollout.tokenizer import load_tokenizer

    if model is None:
        raise SystemExit("--pairs needs --model: the folder of the model that wrote them")
    chat = chat_of(load_tokenizer(model, trust_remote_code=False), model, ChatSettings(date=today()))
    columns = ["prompt", "chosen_ids", "rejected_ids"]
    rows = pds.dataset(folder, format="parquet").to_table(columns=columns).to_pylist()
    # The benchmark's tokenizer puts its own first and last token: they take the place of the model's.
    return [
        PairIds(
            [harness.BOS, *map(_shifted, chat.prompt_ids(row["prompt"])[1:])],
            *([*map(_shifted, row[f"{side}_ids"][:-1]), harness.EOS] for side in ("chosen", "rejected")),
        )
        for row in rows[: setup.steps * setup.batch_size]
    ]


def _shifted(token: int) -> int:
    """An id that the number tokenizer can write: its special tokens are none."""
    return max(token, harness.FIRST_ID)


def write_pairs(setup: Setup, pairs: list[PairIds]) -> dict[str, Any]:
    """Write the table, and say what is in it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from spa_ray.data.schemas import PAIRS

    rows = [
        {
            "pair_id": f"{i:08d}",
            # The template puts the first token, `<s>`, before it.
            "prompt": [{"role": "user", "content": " ".join(map(str, pair.prompt[1:]))}],
            "chosen_ids": pair.chosen,
            "rejected_ids": pair.rejected,
            "gap": 1.0,
        }
        for i, pair in enumerate(pairs)
    ]
    schema = pa.schema([PAIRS.field(name) for name in rows[0]])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), setup.pairs)
    answers = np.array([[len(pair.chosen), len(pair.rejected)] for pair in pairs])
    sequences = np.array([len(pair.prompt) for pair in pairs])[:, None] + answers
    spread = answers.std(axis=0).min() > 0
    return {
        "pairs": len(pairs),
        "prompts": len({tuple(pair.prompt) for pair in pairs}),
        "tokens_per_pair": round(float(sequences.sum(axis=1).mean()), 1),
        "answer_tokens": {q: int(np.quantile(answers, q)) for q in (0.05, 0.5, 0.95)},
        "log_length_correlation": round(float(np.corrcoef(np.log(answers).T)[0, 1]), 2) if spread else None,
        **plan_steps(setup),
    }


def plan_steps(setup: Setup) -> dict[str, float]:
    """Save the order of our steps for TRL. Tokens of the steps' distinct sequences, how many times as many their pairs
    have, and the least FLOPs of a step for either."""
    from spa_ray.training import comm
    from spa_ray.training.prepare import prepare

    job = setup.job(setup.folder / "planned", micro_batch_tokens=None)
    with comm.process_group():
        prepared = prepare(job)
        plan = prepared.plan(job, packed=True)
    rows = prepared.selection.rows[plan.order.pairs]
    np.savez(setup.order, rows=rows, step=plan.order.step)
    sequences = prepared.selection.sequences

    def flops(which: np.ndarray, laid_out: int) -> float:
        tokens, responses = sequences.tokens[which], sequences.responses[which]
        return training_flops(str(setup.model), tokens, responses, laid_out) / plan.steps / 1e9

    steps = [plan.step(s).sequences for s in range(plan.steps)]
    distinct, of_pairs = np.concatenate(steps), sequences.of_pair[plan.order.pairs].ravel()
    laid_out = sum(sequences.tokens_together(which) for which in steps)
    tokens, tokens_of_pairs = (int(sequences.tokens[which].sum()) for which in (distinct, of_pairs))
    return {
        "tokens_of_pairs": tokens_of_pairs,
        "tokens_of_distinct_sequences": tokens,
        "tokens_laid_out": laid_out,
        "tokens_of_pairs_over_distinct": round(tokens_of_pairs / tokens, 2),
        "tokens_of_pairs_over_laid_out": round(tokens_of_pairs / laid_out, 2),
        "gflops_a_step": {"ours": flops(distinct, laid_out), "trl": flops(of_pairs, tokens_of_pairs)},
    }


def ordered_rows(setup: Setup) -> tuple[list[dict[str, str]], list[dict[str, list[int]]]]:
    """The pairs in the order of our steps: as texts for TRL, and as the ids that it must find in them."""
    import pyarrow.parquet as pq

    table = pq.read_table(setup.pairs).to_pylist()
    with np.load(setup.order) as saved:
        pairs, step = saved["rows"], saved["step"]
    if "sorting" in setup.lend:
        longest = np.array([max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in table])
        pairs = pairs[np.lexsort((-longest[pairs], step))]
    texts, expected = [], []
    for row in (table[i] for i in pairs):
        prompt = row["prompt"][0]["content"]
        # TRL itself puts <s> before a prompt and </s> behind an answer.
        text = {side: " " + " ".join(map(str, row[f"{side}_ids"][:-1])) for side in ("chosen", "rejected")}
        texts.append({"prompt": prompt, **text})
        head = [harness.BOS, *map(int, prompt.split())]
        expected.append({side: head + row[f"{side}_ids"] for side in ("chosen", "rejected")})
    return texts, expected
