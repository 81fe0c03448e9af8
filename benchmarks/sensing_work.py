"""The two ways of sensing, for `sensing.py` and the tests: the sensor that passes use, and vLLM's pooling engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Pooled:
    """Hidden states by vLLM: the last token's, after the final norm, not normalised."""

    def __init__(self, folder: Path, dtype: str, *, context: int | None = None) -> None:
        from spa_ray.engine.vllm_start import prepare_environment

        prepare_environment()
        from vllm import LLM
        from vllm.config import PoolerConfig

        self._llm = LLM(
            model=str(folder),
            dtype=dtype,
            runner="pooling",
            convert="embed",
            pooler_config=PoolerConfig(seq_pooling_type="LAST", use_activation=False),
            max_model_len=context,
            enforce_eager=True,
            enable_prefix_caching=False,
        )

    def hidden(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        asked: Any = [{"prompt_token_ids": list(ids)} for ids in prompts]
        return [output.outputs.embedding for output in self._llm.embed(asked, use_tqdm=False)]


def pooled_scores(folder: Path, dtype: str, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
    """Of prompts as ids, by vLLM and the folder's own head."""
    import torch

    from spa_ray.steering.asking import conditioning

    method = conditioning(folder)
    assert method is not None
    hidden = torch.tensor(Pooled(folder, dtype).hidden(prompts))
    with torch.inference_mode():
        scores: list[list[float]] = method.sense(method.load(folder), hidden).tolist()
    return scores
