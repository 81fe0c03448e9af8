"""vLLM's own OpenAI-compatible server on loopback, for as long as it is needed: a judge's endpoint on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spa_ray.engine.vllm_start import ENVIRONMENT

START_SECONDS = 300


@contextmanager
def served_model(model: Path, *, port: int, name: str, context: int, log: Path) -> Iterator[str]:
    """Yields the server's address. Raises: RuntimeError with the end of its log where it does not start."""
    # A seeded request whose prefill is chunked kills vLLM's engine on a CPU (spa_ray/engine/vllm_start.py).
    arguments = ["--host", "127.0.0.1", "--port", port, "--model", model, "--served-model-name", name,
                 "--dtype", "float32", "--max-model-len", context, "--generation-config", "vllm", "--enforce-eager",
                 "--no-enable-chunked-prefill", "--max-num-batched-tokens", 16384, "--block-size", 32]  # fmt: skip
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, arguments)]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, stdout=out, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + START_SECONDS
        while not _answers(f"{url}/health"):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"vLLM's server does not start; {log} ends: {log.read_text()[-2000:]}")
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def _answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False
