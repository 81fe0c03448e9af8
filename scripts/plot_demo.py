"""Draw a demo run for the README: harmless against helpful by arm, and the funnel of its prompts.

`python scripts/plot_demo.py RUN_DIR --out docs/demo.svg`; any format that matplotlib writes, by the file's suffix. The
same run gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

COLOURS = {"vanilla": "#6e7781", "sft": "#bf8700", "spa": "#0969da", "spa_robust": "#1a7f37"}
FUNNEL_ARM = "spa"
INK, FAINT, LOST = "#1f2328", "#d0d7de", "#e5a29a"
STYLE = {
    "svg.hashsalt": "spa_ray",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def plot_scores(axes: Axes, metrics: dict[str, Any]) -> None:
    """One point an arm with 95% whiskers, and an arrow from vanilla to SPA."""
    arms = {name: metrics[name]["means"] for name in COLOURS if name in metrics}
    first, second = list(metrics["vanilla"]["means"])[:2]
    middle = (min(m[first]["mean"] for m in arms.values()) + max(m[first]["mean"] for m in arms.values())) / 2
    for name, means in arms.items():
        x, y = means[first], means[second]
        axes.errorbar(
            x["mean"], y["mean"], color=COLOURS[name], marker="o", markersize=7, elinewidth=1.5,
            xerr=[[x["mean"] - x["low"]], [x["high"] - x["mean"]]],
            yerr=[[y["mean"] - y["low"]], [y["high"] - y["mean"]]],
        )  # fmt: skip
        inward = x["mean"] > middle  # towards the middle, so that no label leaves the picture
        axes.annotate(
            name,
            (x["mean"], y["mean"]),
            xytext=(-9, 8 if name == FUNNEL_ARM else -18) if inward else (9, -15),  # neighbours: one above, one below
            textcoords="offset points",
            ha="right" if inward else "left",
            color=COLOURS[name],
            weight="bold",
        )
    if FUNNEL_ARM in arms:
        start, end = ((arms[name][first]["mean"], arms[name][second]["mean"]) for name in ("vanilla", FUNNEL_ARM))
        arrow = {
            "arrowstyle": "-|>",
            "color": COLOURS[FUNNEL_ARM],
            "alpha": 0.45,
            "lw": 1.5,
            "shrinkA": 8,
            "shrinkB": 8,
        }
        axes.annotate("", end, xytext=start, arrowprops=arrow, zorder=0)
    axes.margins(0.12)
    axes.locator_params(nbins=6)
    axes.set_xlabel(f"{first} (1-10) →")
    axes.set_ylabel(f"{second} (1-10) →")
    axes.set_title(f"{metrics['vanilla']['n']} held-out prompts: means, 95% intervals", fontsize=11, loc="left")
    axes.grid(color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)


def plot_funnel(axes: Axes, funnel: dict[str, Any]) -> None:
    """Prompts in, dropped by reason, kept: each bar begins where the last one left off."""
    rows = [("prompts in", funnel["prompts"], 0, FAINT)]
    left = funnel["prompts"]
    for reason, count in funnel["dropped"].items():
        if count:
            left -= count
            rows.append((f"− {reason.replace('_', ' ')}", count, left, LOST))
    rows.append(("kept", funnel["kept"], 0, COLOURS[FUNNEL_ARM]))
    for place, (_, count, start, colour) in enumerate(rows):
        axes.barh(place, count, left=start, color=colour, height=0.62)
        inside = start + count > 0.8 * funnel["prompts"]
        at = start + count + (-1 if inside else 1) * 0.02 * funnel["prompts"]
        axes.text(at, place, f"{count:,}", va="center", ha="right" if inside else "left")
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, funnel["prompts"])
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines["bottom"].set_visible(False)
    axes.set_title(f"{FUNNEL_ARM}: from prompts to {funnel['pairs']:,} pairs", fontsize=11, loc="left")


def draw(run_dir: Path, out: Path) -> None:
    """Write the picture. Raises: OSError or KeyError for a folder that is no finished demo run."""
    metrics = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))["test"]
    record = json.loads((run_dir / "arms" / FUNNEL_ARM / "iter_1.json").read_text(encoding="utf-8"))
    with mpl.rc_context(STYLE):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(9.6, 4.0), width_ratios=(1.5, 1), layout="constrained", facecolor="white"
        )
        plot_scores(left, metrics)
        plot_funnel(right, record["funnel"])
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=120, metadata={"Date": None} if out.suffix == ".svg" else None)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a finished run of `spa demo`")
    parser.add_argument("--out", type=Path, default=Path("docs/demo.svg"), help="file to write (docs/demo.svg)")
    given = parser.parse_args()
    draw(given.run_dir, given.out)


if __name__ == "__main__":
    main()
