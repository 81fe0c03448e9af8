"""No model: the engine of a pass whose judge is a function, a reward model or an endpoint and who answers nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spa_ray.config.models import Model
from spa_ray.engine.protocol import Completion, EngineStats, Request
from spa_ray.engine.scripted import MAX_MODEL_LEN, ScriptedTokenizer


class IdleEngine:
    """Answers no request. Its tokenizer renders no prompt that anybody reads."""

    def __init__(self, model: Model, folder: Path, **arguments: Any) -> None:
        self.tokenizer, self.max_model_len = ScriptedTokenizer(), MAX_MODEL_LEN

    def stats(self) -> EngineStats:
        return EngineStats(requests=0, busy=0.0, alive=0.0, stalled=0.0)

    async def generate(self, request: Request) -> Completion:
        raise RuntimeError("this pass has no engine; its judge asks none")

    async def load_weights(self, model: Path) -> None:
        """There are none."""

    def shutdown(self) -> None: ...
