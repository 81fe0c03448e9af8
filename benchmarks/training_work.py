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

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def pairs(self) -> Path:
        return self.folder / "pairs.parquet"

    def train(self, micro_batch_tokens: int | None = None) -> Any:
        """The `train` section. Nothing is watched or saved on the way, on either side."""
        from spa_ray.config.training import Train

        return Train(
            method="spa_simpo",
            beta=self.beta,
            gamma=self.gamma,
            lr=self.lr,
            dtype=self.dtype,
            batch_size=self.batch_size,
            micro_batch_tokens=micro_batch_tokens,
            max_length=harness.MAX_LENGTH,
            zero_stage=self.zero_stage,
            collapse_nats=None,
        )


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


def make_inputs(setup: Setup, source: Path | None, hidden: int, layers: int, vocab: int) -> dict[str, Any]:
    """Write the model and the pairs; say what they are."""
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
        **write_pairs(setup, vocab),
    }


def link_model(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and not file.name.startswith(TOKENIZER_FILES):
            (folder / file.name).symlink_to(file.absolute())


def write_pairs(setup: Setup, vocab: int) -> dict[str, Any]:
    """As many pairs as the steps take: random ids, lengths as preference data has them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from spa_ray.data.schemas import PAIRS

    rng = np.random.default_rng(setup.seed)
    n = setup.steps * setup.batch_size
    prompts = harness.log_normal(rng, n, *harness.PROMPTS)
    answers = harness.answer_lengths(rng, n, setup.correlation)

    def ids(tokens: int) -> list[int]:
        return rng.integers(harness.FIRST_ID, vocab, size=tokens - 1).tolist()

    rows = [
        {
            "pair_id": f"{i:08d}",
            # The template puts the first token, `<s>`, before it.
            "prompt": [{"role": "user", "content": " ".join(map(str, ids(prompts[i])))}],
            "chosen_ids": [*ids(answers[i, 0]), harness.EOS],
            "rejected_ids": [*ids(answers[i, 1]), harness.EOS],
            "gap": 1.0,
        }
        for i in range(n)
    ]
    schema = pa.schema([PAIRS.field(name) for name in rows[0]])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), setup.pairs)
    sequences = prompts[:, None] + answers
    return {
        "pairs": n,
        "tokens_per_pair": round(float(sequences.sum(axis=1).mean()), 1),
        "answer_tokens": {q: int(np.quantile(answers, q)) for q in (0.05, 0.5, 0.95)},
        "log_length_correlation": round(float(np.corrcoef(np.log(answers).T)[0, 1]), 2),
    }


def ordered_rows(setup: Setup) -> tuple[list[dict[str, str]], list[dict[str, list[int]]]]:
    """The pairs in the order of our steps: as texts for TRL, and as the ids that it must find in them."""
    import pyarrow.parquet as pq

    from spa_ray.training.batches import order_pairs

    table = pq.read_table(setup.pairs).to_pylist()
    order = order_pairs(len(table), seed=setup.seed, batch_size=setup.batch_size, epochs=1, max_steps=None)
    pairs = order.pairs
    if "sorting" in setup.lend:
        longest = [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in table]
        pairs = pairs[np.lexsort((-np.array(longest)[pairs], order.step))]
    texts, expected = [], []
    for row in (table[i] for i in pairs):
        prompt = row["prompt"][0]["content"]
        # TRL itself puts <s> before a prompt and </s> behind an answer.
        text = {side: " " + " ".join(map(str, row[f"{side}_ids"][:-1])) for side in ("chosen", "rejected")}
        texts.append({"prompt": prompt, **text})
        head = [harness.BOS, *map(int, prompt.split())]
        expected.append({side: head + row[f"{side}_ids"] for side in ("chosen", "rejected")})
    return texts, expected
