"""The report's pictures: what of a run is drawn, and how. Numbers in, SVG out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from spa_ray.report.run_data import Asked
from spa_ray.report.svg import (
    SERIES,
    W,
    bar,
    frame,
    line,
    marker,
    path,
    picture,
    points,
    scale,
    spread,
    text,
    tick,
    ticks,
)  # fmt: skip

Point = tuple[float, float]
Measures = Mapping[str, Mapping[str, Any]]  # arm -> its metrics
STEPS = 240  # points of a curve


def legend(series: Mapping[str, int]) -> list[tuple[str, Markup]]:
    """Each series' name and its marker. series: name -> its number."""
    drawn = [Markup(f'<svg viewBox="0 0 14 14" class="key" aria-hidden="true">{marker(k, 7, 7, name)}</svg>')
             for name, k in series.items()]  # fmt: skip
    return list(zip(series, drawn, strict=True))


def forest(arms: Measures, objectives: Sequence[str], baseline: str) -> Markup:
    """The arms' paired differences with their intervals, objective by objective, and the line of no change."""
    shown = [(k, arm, found["differences"]) for k, (arm, found) in enumerate(arms.items()) if found["differences"]]
    groups = [(name, [(k, arm, d[name]) for k, arm, d in shown if name in d]) for name in objectives]
    values = [0.0, *(v[end] for _, rows in groups for _, _, v in rows for end in ("low", "high"))]
    left, right, y = 104.0, W - 10.0, 6.0
    x, body = scale(*spread(values), left, right), ""
    for name, rows in groups:
        y += 18
        body += text(0, y, name, "strong")
        for k, arm, value in rows:
            y += 20
            told = f"{arm}, {name}: {value['mean']:+.2f} [{value['low']:+.2f}, {value['high']:+.2f}]"
            body += text(8, y + 4, arm[:14], "label") + line(
                x(value["low"]), y, x(value["high"]), y, f"s{k % SERIES}-line"
            )
            body += marker(k, x(value["mean"]), y, told)
        y += 6
    marks = ticks(*spread(values))
    under = "".join(line(x(v), 10, x(v), y + 4, "zero" if abs(v) < 1e-12 else "faint") for v in marks)
    under += "".join(text(x(v), y + 18, f"{v:+.4g}" if v else "0", "tick", "middle") for v in marks)
    return picture(under + body + text(right, y + 34, f"change against {baseline}", "axis", "end"), y + 40,
                   "Change of each objective's score, with 95 % intervals")  # fmt: skip


def front(means: Sequence[Point]) -> list[Point]:
    """Those of the points that no other beats on both numbers, by the first, highest first."""
    best: list[Point] = []
    for point in sorted(set(means), reverse=True):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best


def plane(arms: Measures, objectives: Sequence[str]) -> Markup:
    """The arms' means in the plane of the first two objectives, with intervals, the Pareto front among them, and the
    lexicographic direction: to the right first."""
    first, second = objectives[:2]
    means = {arm: (found["means"][first], found["means"][second]) for arm, found in arms.items()
             if first in found["means"] and second in found["means"]}  # fmt: skip
    xs = spread([a[end] for a, _ in means.values() for end in ("low", "high")], 0.1)
    ys = spread([b[end] for _, b in means.values() for end in ("low", "high")], 0.1)
    height = 260.0
    body, x, y = frame(xs, ys, f"{first} →", f"{second} ↑", height)
    best = front([(a["mean"], b["mean"]) for a, b in means.values()])
    corners: list[Point] = []
    for k, (a, b) in enumerate(best):
        corners += [(x(a), y(best[k - 1][1]))] if k else []
        corners.append((x(a), y(b)))
    body += path([(x(best[0][0]), height - 34), *corners, (40, y(best[-1][1]))], "front")
    for k, arm in enumerate(arms):
        if arm not in means:
            continue
        a, b = means[arm]
        body += line(x(a["low"]), y(b["mean"]), x(a["high"]), y(b["mean"]), f"s{k % SERIES}-line thin")
        body += line(x(a["mean"]), y(b["low"]), x(a["mean"]), y(b["high"]), f"s{k % SERIES}-line thin")
        body += marker(k, x(a["mean"]), y(b["mean"]), f"{arm}: {first} {a['mean']:.2f}, {second} {b['mean']:.2f}", 5.5)
    body += '<path d="M46 30 h34 m-5 -4 l5 4 l-5 4" class="arrow"/>' + text(86, 34, f"better: {first} first", "axis")
    return picture(body, height, f"Mean {first} and {second} of every arm, and the Pareto front")


def bubbles(asked: Sequence[Asked], pair: tuple[str, str], objectives: Sequence[str]) -> Markup | None:
    """Every prompt's two scores before (rings) and after (discs): the area counts prompts."""
    counts = [Counter(_points(asked, arm)) for arm in pair]
    if not all(counts):
        return None
    both = [*counts[0], *counts[1]]
    height, most = 260.0, max(max(c.values()) for c in counts)
    xs, ys = spread([p[0] for p in both], 0.08), spread([p[1] for p in both], 0.08)
    body, x, y = frame(xs, ys, f"{objectives[0]} →", f"{objectives[1]} ↑", height)
    for kind, count, name in (("disc", counts[1], pair[1]), ("ring", counts[0], pair[0])):
        for (a, b), n in sorted(count.items()):
            r = 1.5 + 11 * (n / most) ** 0.5
            told = f"<title>{Markup.escape(f'{name}: {n} prompts at {a:g}/{b:g}')}</title>"
            body += f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="{r:.1f}" class="{kind}">{told}</circle>'
    return picture(body, height, f"Scores of every prompt, {pair[0]} and {pair[1]}")


def _points(asked: Sequence[Asked], arm: str) -> list[Point]:
    scores = [a.answers[arm].scores for a in asked if arm in a.answers]
    return [(round(s[0]), round(s[1])) for s in scores if len(s) > 1 and s[0] is not None and s[1] is not None]


def distribution(asked: Sequence[Asked], pair: tuple[str, str], objective: int, name: str) -> Markup | None:
    """How often each (rounded) score was given before and after."""
    found = [[a.answers[arm].scores[objective] for a in asked if arm in a.answers] for arm in pair]
    counts = [Counter(round(s) for s in scores if s is not None) for scores in found]
    return histogram(counts, pair, name) if all(counts) else None


def histogram(counts: Sequence[Mapping[int, int]], names: Sequence[str], label: str) -> Markup:
    """Bars side by side, one per series and value."""
    keys = [key for count in counts for key in count]
    values = range(min(keys), max(keys) + 1)
    most, height = max(max(c.values()) for c in counts), 170.0
    slot, base = (W - 16) / max(len(values), 1), height - 24
    wide, y = min(slot * 0.8, 40) / len(counts), scale(0, most, base, 22)
    body = text(0, 12, label, "strong") + line(8, base, W - 8, base, "rule")
    for column, value in enumerate(values):
        middle = 8 + slot * (column + 0.5)
        if len(values) <= 12 or column % (len(values) // 6) == 0:
            body += text(middle, height - 8, str(value), "tick", "middle")
        for k, count in enumerate(counts):
            n = count.get(value, 0)
            left = middle + (k - len(counts) / 2) * wide
            body += bar(
                left, y(n), wide - 1, base - y(n), f"s{k if len(counts) > 1 else 1}", f"{names[k]}: {n} at {value}"
            )
    return picture(body, height, f"Distribution of {label}")


def funnel(found: Mapping[str, Any]) -> Markup:
    """Prompts in, what was dropped and why, what was kept, and the pairs that it gave, as one stream."""
    full, x0 = 170.0, 4.0
    width = scale(0, max(found["prompts"], 1), 0, full)
    body, y, left = "", 18.0, found["prompts"]
    body += bar(x0, y, width(left), 14, "flow") + text(x0 + full + 12, y + 12, f"{left:,} prompts", "strong")
    y += 14
    for reason, n in found["dropped"].items():
        if not n:
            continue
        after = left - n
        body += _ribbon(x0, y, width(left), width(after), 34, "flow")
        body += _lost(x0, y, width(left), width(after), 34)
        share = f"{100 * n / found['prompts']:.0f} %"
        body += text(x0 + full + 12, y + 22, f"− {n:,} {reason.replace('_', ' ')} ({share})", "label")
        y, left = y + 34, after
    body += bar(x0, y, max(width(left), 1.5 if left else 0), 14, "flow")
    body += text(x0 + full + 12, y + 12, f"{found['kept']:,} kept", "strong")
    y += 14
    if found["pairs"]:
        body += _ribbon(x0, y, max(width(left), 1.5), full, 30, "flow pale")
        y, at = y + 30, x0
        decided = {name: n for name, n in found["pairs_by_decided_by"].items() if n}
        for k, (name, n) in enumerate(decided.items(), 1):
            size = full * n / sum(decided.values())
            body += bar(at, y, size - 1, 14, f"s{k % SERIES}", f"{n:,} pairs decided by {name}")
            at += size
        body += text(x0 + full + 12, y + 12, f"{found['pairs']:,} pairs", "strong")
        y += 16
        for k, (name, n) in enumerate(decided.items(), 1):
            body += marker(k, x0 + 6, y + 13, name) + text(x0 + 18, y + 17, f"{n:,} decided by {name}", "label")
            y += 19
        if found["dead_pairs"]:
            body += text(x0 + 18, y + 17, f"{found['dead_pairs']:,} with a gap of 0: weight 0", "label")
            y += 19
    return picture(body, y + 10, f"{found['prompts']} prompts, {found['kept']} kept, {found['pairs']} pairs")


def _ribbon(x: float, y: float, top: float, bottom: float, height: float, kind: str) -> str:
    middle, end = y + height / 2, y + height
    return (f'<path d="M{x:.1f} {y:.1f} H{x + top:.1f} C{x + top:.1f} {middle:.1f} {x + bottom:.1f} {middle:.1f} '
            f'{x + bottom:.1f} {end:.1f} H{x:.1f} Z" class="{kind}"/>')  # fmt: skip


def _lost(x: float, y: float, top: float, bottom: float, height: float) -> str:
    """What leaves the stream: the part beside the ribbon that goes on."""
    middle, end = y + height / 2, y + height
    return (f'<path d="M{x + top:.1f} {y:.1f} C{x + top:.1f} {middle:.1f} {x + bottom:.1f} {middle:.1f} '
            f'{x + bottom:.1f} {end:.1f} H{x + top:.1f} Z" class="lost"/>')  # fmt: skip


def curve(series: Mapping[str, Sequence[Point]], label: str, colours: Mapping[str, int]) -> Markup | None:
    """Lines over training steps, thinned to the mean of neighbours where there are many points."""
    thin = {name: thinned(found) for name, found in series.items() if found}
    if not thin:
        return None
    both = [point for found in thin.values() for point in found]
    height = 190.0
    xs = (min(p[0] for p in both), max(p[0] for p in both))
    body, x, y = frame(xs, spread([p[1] for p in both]), "step", label, height)
    for name, found in thin.items():
        k = colours[name]
        drawn = [(x(a), y(b)) for a, b in found]
        body += path(drawn, f"s{k % SERIES}-line curve") + marker(k, *drawn[-1], f"{name}: {found[-1][1]:.4g}", 3.5)
    return picture(body, height, f"{label} by training step")


def rv(found: Mapping[str, Any]) -> Markup | None:
    """RV of a weak and a strong judge as prompts are added by det Σ, with its bootstrap band, and in random order."""
    bands = []
    for kind, k in (("random", 0), ("by_det", 1)):
        known = [(100 * share, value) for share, value in zip(found["shares"], found[kind], strict=True) if value]
        bands.append((k, known))
    values = [value[end] for _, known in bands for _, value in known for end in ("mean", "low", "high")]
    if not values:
        return None
    body, x, y = frame((0.0, 100.0), spread(values), "% of the prompts, by det Σ", "RV", 230.0)
    for k, known in bands:
        edge = [(x(a), y(v["high"])) for a, v in known] + [(x(a), y(v["low"])) for a, v in reversed(known)]
        body += f'<polygon points="{points(edge)}" class="s{k} band"/>'
        body += path([(x(a), y(v["mean"])) for a, v in known], f"s{k}-line curve")
    return picture(body, 230.0, "RV coefficient of both judges by share of prompts")


def radar(series: Mapping[str, Sequence[float]], axes: Sequence[str]) -> Markup:
    """Means of several arms on as many axes as there are objectives, from the lowest mean of all to the highest."""
    values = [value for found in series.values() for value in found]
    middle, radius = (W / 2, 130.0), 100.0
    low, high = spread(values)
    at = scale(low, high, 0, radius)
    turns = [2 * math.pi * k / len(axes) for k in range(len(axes))]

    def place(k: int, value: float) -> Point:
        return middle[0] + at(value) * math.sin(turns[k]), middle[1] - at(value) * math.cos(turns[k])

    marks, body = [*ticks(low, high, 3), high], ""
    for value in marks:
        body += f'<polygon points="{points([place(k, value) for k in range(len(axes))])}" class="ring faint"/>'
    for k, name in enumerate(axes):
        x, y = place(k, high)
        body += line(*middle, x, y, "faint")
        body += text(x + 10 * math.sin(turns[k]), y + 4 - 12 * math.cos(turns[k]), name, "tick", "middle")
    body += "".join(text(middle[0] + 3, middle[1] - at(v) + 4, tick(v), "tick") for v in marks[:-1])
    for s, (arm, found) in enumerate(series.items()):
        corners = [place(k, value) for k, value in enumerate(found)]
        body += path([*corners, corners[0]], f"s{s % SERIES}-line curve")
        body += "".join(marker(s, *corner, f"{arm}, {axes[k]}: {found[k]:.3f}", 3) for k, corner in enumerate(corners))
        x, y = 12 + 110 * (s % 3), 268.0 + 18 * (s // 3)
        body += marker(s, x, y, arm) + text(x + 10, y + 4, arm, "label")
    return picture(body, 268.0 + 18 * -(-len(series) // 3), f"Mean scores: {', '.join(axes)}")


def thinned(found: Sequence[Point]) -> list[Point]:
    size = -(-len(found) // STEPS)
    groups = [found[k : k + size] for k in range(0, len(found), size)]
    return [(group[-1][0], sum(b for _, b in group) / len(group)) for group in groups]


__all__ = ["bubbles", "curve", "distribution", "forest", "funnel", "histogram", "legend", "plane", "radar", "tick"]
