"""Small SVG pictures from numbers: pure functions, no state, every text escaped.

Each picture is W units wide, the width of a phone's column, and takes its colours from the page's style sheet: class
`sK` is series K, `sK-line` its line. Series differ in the marker's shape as well as in colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from markupsafe import Markup

W = 340
SHAPES = ("circle", "square", "triangle", "diamond")
SERIES = 8  # colours in the style sheet; further series begin again


def picture(body: str, height: float, label: str) -> Markup:
    """The finished picture. `label` is what a screen reader says."""
    return Markup(f'<svg viewBox="0 0 {W} {height:g}" role="img" aria-label="{escape(label)}">{body}</svg>')


# The page's colours on light and dark, for a picture that is a file of its own.
COLOURS = ("#6f7277", "#0072b2", "#b66d00", "#00805c", "#b0588a", "#d55e00", "#2a8fc7", "#7a6a00")


def alone(drawn: Markup) -> str:
    """A picture as a file of its own, with what it needs of the page's style sheet."""
    series = "".join(f".s{k}{{fill:{c}}}.s{k}-line{{stroke:{c}}}" for k, c in enumerate(COLOURS))
    style = (
        f"svg{{background:#fff}}text{{font:11px system-ui,sans-serif;fill:#1c1d20}}{series}"
        ".curve{fill:none;stroke-width:1.8}.ring{fill:none}.faint,.rule{stroke:#bbb;stroke-width:.8}"
    )
    opened, _, rest = str(drawn).partition(">")
    return f'{opened} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{rest}\n'


def text(x: float, y: float, said: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(said)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def bar(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> str:
    told = f"<title>{escape(title)}</title>" if title else ""
    size = f'width="{max(width, 0):.1f}" height="{max(height, 0):.1f}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" {size} class="{kind}">{told}</rect>'


def marker(series: int, x: float, y: float, title: str, r: float = 4.5) -> str:
    """The series' own shape in its colour."""
    shape, kind = SHAPES[(series + series // SERIES) % len(SHAPES)], f"s{series % SERIES}"
    if shape == "circle":
        body = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:g}" class="{kind}">'
    elif shape == "square":
        body = f'<rect x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r:g}" height="{2 * r:g}" class="{kind}">'
    else:
        turns = (0, 120, 240) if shape == "triangle" else (0, 90, 180, 270)
        corners = [(x + 1.25 * r * math.sin(math.radians(t)), y - 1.25 * r * math.cos(math.radians(t))) for t in turns]
        body = f'<polygon points="{points(corners)}" class="{kind}">'
    tag = body[1:].partition(" ")[0]
    return f"{body}<title>{escape(title)}</title></{tag}>"


def points(found: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in found)


def path(found: Sequence[tuple[float, float]], kind: str) -> str:
    return f'<polyline points="{points(found)}" class="{kind}"/>'


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers within the range, about `count` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """The linear map of [low, high] to [start, end]; a range of one value is its middle."""
    if high == low:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def spread(values: Sequence[float], margin: float = 0.06) -> tuple[float, float]:
    """The range of the values with some air around it."""
    low, high = min(values), max(values)
    air = margin * (high - low) or abs(high) * 0.1 or 1.0
    return low - air, high + air


def frame(
    xs: tuple[float, float], ys: tuple[float, float], x_name: str, y_name: str, height: float
) -> tuple[str, Callable[[float], float], Callable[[float], float]]:
    """Axes with ticks, and the maps of both: (drawn, x, y)."""
    left, right, top, bottom = 40.0, W - 8.0, 22.0, height - 34.0
    x, y = scale(*xs, left, right), scale(*ys, bottom, top)
    parts = [text(left - 32, 12, y_name, "axis")]
    parts += [text(right, height - 4, x_name, "axis", "end")]
    for value in ticks(*ys):
        parts += [
            line(left, y(value), right, y(value), "faint"),
            text(left - 5, y(value) + 4, tick(value), "tick", "end"),
        ]
    for value in ticks(*xs, 5):
        parts += [
            line(x(value), bottom, x(value), bottom + 4, "rule"),
            text(x(value), bottom + 17, tick(value), "tick", "middle"),
        ]
    return "".join([*parts, line(left, bottom, right, bottom, "rule")]), x, y


def tick(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}"
