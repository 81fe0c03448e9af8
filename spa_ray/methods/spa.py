"""SPA: SimPO weighted by the score gap of a pair (Eq. 3)."""

from __future__ import annotations

import numpy as np

from spa_ray.errors import InputError
from spa_ray.methods.simpo import SimPO
from spa_ray.training.method import Gaps


class SPA(SimPO):
    """-w · log σ(β (chosen - rejected) - γ), w = (Δ / Δ̄)^α; learning rates are SimPO's."""

    weighted = True

    def weights(self, gap: Gaps, *, mean_gap: float | None = None) -> Gaps:
        from spa_ray.training.losses import pair_weights

        weights = pair_weights(gap, alpha=self.config.alpha, mean_gap=mean_gap)
        return weights if self.config.w_max is None else np.minimum(weights, self.config.w_max)

    def check_gaps(self, gap: Gaps) -> None:
        if self.config.alpha > 0 and not (gap > 0).any():
            raise InputError(
                f"every pair's {self.config.gap} gap is 0, weights mean nothing; set train.gap, or train.alpha=0"
            )
