"""SPA's denoising and pairs once more, slowly: one prompt, one pair, one number at a time, as the paper writes them.

Scores are exact fractions here, so that the vectorised code is compared with the formulas and not with other roundings.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import permutations
from typing import Any

from spa_ray.config.models import Config

Row = dict[str, Any]


def is_scored(response: Row) -> bool:
    return response["scores"] is not None and all(s is not None for s in response["scores"])


def scored_candidates(row: Row) -> list[Row]:
    return [r for r in row["responses"] if r["kind"] == "candidate" and is_scored(r)]


def scored_refined(row: Row) -> Row | None:
    return next((r for r in row["responses"] if r["kind"] == "refined" and is_scored(r)), None)


def determinant(matrix: list[list[Fraction]]) -> Fraction:
    """Leibniz's formula."""
    k, total = len(matrix), Fraction(0)
    for order in permutations(range(k)):
        inversions = sum(order[i] > order[j] for i in range(k) for j in range(i + 1, k))
        term = Fraction((-1) ** inversions)
        for i in range(k):
            term *= matrix[i][order[i]]
        total += term
    return total


def det_of(row: Row, config: Config) -> Fraction | None:
    """Eq. 1: det of the covariance of the sampled responses' scores."""
    k = len(config.objectives)
    points = [[Fraction(s) for s in r["scores"]] for r in scored_candidates(row)]
    n = len(points)
    if n < k + 1:
        return None
    mean = [sum(p[o] for p in points) / n for o in range(k)]
    cov = [
        [sum((x[o] - mean[o]) * (x[q] - mean[q]) for x in points) / (n - config.denoise.ddof) for q in range(k)]
        for o in range(k)
    ]
    det = determinant(cov)
    if any(s.denominator > 1 for p in points for s in p):
        variances = Fraction(1)
        for o in range(k):
            variances *= cov[o][o]
        if det <= Fraction(1, 10**6) * variances:
            return Fraction(0)
    return det


def is_consistent(row: Row, config: Config) -> bool:
    """Y_perf: the refined answer strictly surpasses all candidates on all axes."""
    rule, refined = config.denoise.consistency, scored_refined(row)
    if rule == "off":
        return True
    assert refined is not None
    for o, score in enumerate(refined["scores"]):
        best = max(c["scores"][o] for c in scored_candidates(row))
        ties_allowed = rule == "primary_ge" and o == 0
        if not (score > best or (ties_allowed and score == best)):
            return False
    return True


def tau(rows: list[Row], config: Config) -> float | None:
    """The quantile over all scored prompts before the consistency rule."""
    rule = config.denoise
    if not rule.informativeness:
        return None
    if rule.tau is not None or rule.tau_quantile is None:
        return rule.tau
    dets = [float(det_of(r, config)) for r in rows if det_of(r, config) is not None and scored_refined(r) is not None]
    dets = sorted(d for d in dets if d > 0 or rule.tau_over == "all")
    if not dets:
        return None
    place = rule.tau_quantile * (len(dets) - 1)
    below = int(place)
    above = min(below + 1, len(dets) - 1)
    return dets[below] + (dets[above] - dets[below]) * (place - below)


def drop_reason(rows: list[Row], at: int, config: Config, bound: float | None) -> str | None:
    row, k = rows[at], len(config.objectives)
    twins = [i for i, r in enumerate(rows) if r["prompt_id"] == row["prompt_id"]]
    stays = min(twins, key=lambda i: (rows[i]["error"] is not None, -rows[i]["attempt"], i))
    if at != stays:
        return "duplicate"
    if row["error"] is not None:
        return "error"
    if len(scored_candidates(row)) < k + 1 or scored_refined(row) is None:
        return "too_few_scores"
    if config.denoise.on_inconsistent == "drop_prompt" and not is_consistent(row, config):
        return "inconsistent"
    if config.denoise.informativeness:
        det = det_of(row, config)
        assert det is not None
        if det == 0:
            return "zero_det"
        if bound is not None and float(det) > bound:
            return "high_det"
    return None


def on_grid(score: float, grid: float | None) -> float:
    return score if grid is None else float(round(Fraction(score) / Fraction(grid)) * Fraction(grid))


def comes_before(a: list[float], b: list[float], order: str) -> bool:
    if order == "pareto":
        return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a[1:], b[1:], strict=True))
    return tuple(a) > tuple(b)


def prompt_of(row: Row, chosen: Row, config: Config) -> list[Row]:
    system = chosen["system"]
    if not config.pairs.keep_system or system is None:
        return row["messages"]
    return [{"role": "system", "content": system}, *(m for m in row["messages"] if m["role"] != "system")]


def pairs_of(row: Row, config: Config) -> list[Row]:
    """Eq. 2 for one kept prompt."""
    rule, names = config.pairs, config.objectives
    answers = [r for r in row["responses"] if is_scored(r) and r["text"] and r["token_ids"]]
    if config.denoise.on_inconsistent == "drop_refined" and not is_consistent(row, config):
        answers = [r for r in answers if r["kind"] != "refined"]
    out = []
    for y in answers:
        for z in answers:
            s, t = ([on_grid(x, rule.score_grid) for x in r["scores"]] for r in (y, z))
            a, b = ([min(x, rule.thresholds.get(o, x)) for o, x in zip(names, v, strict=True)] for v in (s, t))
            margin = sum(abs(x - w) for x, w in zip(s, t, strict=True))
            if rule.include == "refined_only" and y["kind"] != "refined":
                continue
            if rule.include == "candidates_only" and "refined" in (y["kind"], z["kind"]):
                continue
            if rule.truncated == "reject" and y.get("finish_reason") == "length":
                continue
            if y["text"] == z["text"] or y["token_ids"] == z["token_ids"]:
                continue
            if not comes_before(a, b, rule.order) or margin < rule.delta:
                continue
            out.append(
                {
                    "pair_id": f"{row['prompt_id']}:{y['index']}:{z['index']}",
                    "prompt_id": row["prompt_id"],
                    "prompt": prompt_of(row, y, config),
                    "chosen": [{"role": "assistant", "content": y["text"]}],
                    "rejected": [{"role": "assistant", "content": z["text"]}],
                    "chosen_index": y["index"],
                    "rejected_index": z["index"],
                    "chosen_ids": y["token_ids"],
                    "rejected_ids": z["token_ids"],
                    "chosen_scores": s,
                    "rejected_scores": t,
                    "margin": margin,
                    "gap": abs(sum(s) - sum(t)),
                    "decided_by": next(o for o, x, w in zip(names, a, b, strict=True) if x != w),
                    "kind": y["kind"],
                }
            )
    return out
