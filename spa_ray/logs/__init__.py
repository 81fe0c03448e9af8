"""What the system says of itself: structured logs, metrics, and text that holds no secret and no control character.

Comes in: log records, numbers, command lines, error messages, model text. Goes out: JSON lines, Ray's metrics, harmless
strings. Never: models, what a message is about. Every room may import it.
"""

from spa_ray.logs.noise import hush, without_rays_level
from spa_ray.logs.redact import redact, redact_command, redact_tree
from spa_ray.logs.structured import WorkerLog, context, driver_log, level_of
from spa_ray.logs.terminal import printable, printable_json

__all__ = [
    "WorkerLog",
    "context",
    "driver_log",
    "hush",
    "level_of",
    "printable",
    "printable_json",
    "redact",
    "redact_command",
    "redact_tree",
    "without_rays_level",
]
