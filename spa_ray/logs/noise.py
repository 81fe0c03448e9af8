"""Third-party noise: warnings, log lines and bars of the libraries below, which stay off the terminal.

`hush` has to run before those libraries are imported: most read their settings once. It hides nothing of ours and no
library's error, and a variable that the user has set keeps its value.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import MutableMapping

# Processes that are started later inherit these: tensor-parallel workers of an engine, a local Ray and its workers.
ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' bars obey it as well
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # the C++ side's warnings, among them vLLM's about NUMA nodes
    "PYTHONWARNINGS": "ignore::FutureWarning",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # the C++ core's warnings, which it writes to the terminal of every process
    "RAY_LOG_TO_DRIVER_EVENT_LEVEL": "FATAL",
}
LOGGERS = ("accelerate", "bitsandbytes", "datasets", "huggingface_hub", "peft", "torch", "transformers", "vllm")
LIBRARIES = (*LOGGERS, "deepspeed", "ray", "triton")  # whose warnings are not shown; DeepSpeed and Ray log otherwise


def hush(environment: MutableMapping[str, str] | None = None) -> None:
    """Quieten the libraries in this process and, through `environment` (this process's own), in those that follow."""
    environment = os.environ if environment is None else environment
    for name, value in ENVIRONMENT.items():
        environment.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)  # for who writes the code, not for who runs it
    warnings.filterwarnings("ignore", module=rf"({'|'.join(LIBRARIES)})(\.|$)")
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    deepspeed = logging.getLogger("DeepSpeed")  # sets its own level when it is imported, and takes no variable for it
    if _is_error not in deepspeed.filters:
        deepspeed.addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
