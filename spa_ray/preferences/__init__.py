"""Denoising and preference pairs: pure, vectorised functions on Arrow tables of episodes.

`resolve_tau` and `resolve_delta`, then `denoise`, then `build_pairs`, and `Funnel.of` to count. No Ray, no model and
no files in them.
"""

from spa_ray.preferences.denoising import DROP_REASONS, denoise, resolve_tau
from spa_ray.preferences.funnel import ALL_REASONS, Funnel
from spa_ray.preferences.live import LIVE_CLASSES, live_reason, live_reasons
from spa_ray.preferences.pairing import build_pairs, resolve_delta
from spa_ray.preferences.ranges import ranged

__all__ = [
    "ALL_REASONS",
    "DROP_REASONS",
    "LIVE_CLASSES",
    "Funnel",
    "build_pairs",
    "denoise",
    "live_reason",
    "live_reasons",
    "ranged",
    "resolve_delta",
    "resolve_tau",
]

# Raise it when the same config and inputs would give another output than before.
STAGE_VERSION = 2
