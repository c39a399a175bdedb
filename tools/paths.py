"""The learning-rate paths of a plan: its segments as a table, every update as CSV, or a picture.

    python -m tools.paths --config 1.2b --paradigm ours --plan.alpha 0.4 --plot paths.png

Neither a GPU nor torch is needed; matplotlib for the picture alone.
"""

import math
import os
from pathlib import Path
from typing import Any

import config
from runtime.command_line import Parser, aligned
from runtime.errors import UserError, optional, user_errors
from schedule import PARADIGMS, TITLES, Segment

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe and Ito: for the colour-blind
LEGEND = {"fontsize": 8, "frameon": False}


def canvas(titles: list[str], width: float = 3.4, height: float = 3.4, rows: int = 1, **kw: Any) -> tuple[Any, Any]:
    """A figure with axes of these titles side by side, in the one style; several rows have the titles at the top."""
    optional("matplotlib", "matplotlib", "drawing")
    from matplotlib.figure import Figure

    fig = Figure(figsize=(max(width * len(titles), 4.6), height))
    axes = fig.subplots(rows, len(titles), squeeze=False, **kw)
    for ax, title in zip(axes.flat, titles + [""] * len(titles) * (rows - 1), strict=True):
        ax.set_title(title, fontsize=9)
        ax.grid(alpha=0.25)
        ax.tick_params(labelsize=8)
    return fig, axes if rows > 1 else axes[0]


def check_picture(file: str) -> None:
    """UserError, before the work that it is to show, if a picture cannot be written to a file."""
    optional("matplotlib", "matplotlib", "drawing")
    path = Path(file)
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UserError(f"{file!r}: got the ending {path.suffix!r}, expected .png, .pdf or .svg")
    there = path if path.exists() else next(p for p in path.absolute().parents if p.exists())
    if path.is_dir() or (there != path and not there.is_dir()) or not os.access(there, os.W_OK):
        raise UserError(f"{file}: cannot be written; choose another file")


def finish(fig: Any, file: str, axes: Any = (), columns: int = 6) -> None:
    """Save a figure, with one legend of these axes below all."""
    key = {label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if names := sorted(key):
        fig.legend([key[n] for n in names], names, loc="lower center", ncols=min(len(names), columns), **LEGEND)
    fig.tight_layout(rect=(0, 0.07 * math.ceil(len(names) / columns), 1, 1))
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(file, dpi=150)


def draw(plans: dict[str, list[Segment]], file: str) -> None:
    """Figure 1 for any plans: axes for each paradigm, a colour for each version, the main path dark."""
    steps = {name: sum(g.end - g.start for g in segments) for name, segments in plans.items()}
    fig, axes = canvas([f"{TITLES.get(name, name)}: {n:,} steps" for name, n in steps.items()], 5, sharey=True)
    for ax, segments in zip(axes, plans.values(), strict=True):
        # the longest first, so that the shorter runs of PTFS, equal to it in the warm-up, stay visible
        for g in sorted(segments, key=lambda g: g.start - g.end):
            label, colour, width = f"V{g.version}", COLOURS[(g.version - 1) % len(COLOURS)], 1.8
            if g.paradigm == "main":
                label, colour, width = "main path", "#333333", 2.6
            if g.end > g.start:
                x = [*range(g.start, g.end, max(1, (g.end - g.start) // 2000)), g.end - 1]
                ax.plot(x, [g.lr(s) for s in x], color=colour, linewidth=width, label=label)
            elif g.points:  # a band over the weights that are averaged
                ax.axvspan(g.points[0], g.end, color=colour, alpha=0.4, label=label)
        ax.set(xlabel="step", ylim=(0, None))
        ax.locator_params(axis="x", nbins=5)
    axes[0].set_ylabel("learning rate")
    finish(fig, file, axes)


def main() -> None:
    a = Parser(prog="tools.paths", description=__doc__, usage="python -m tools.paths [--config NAME] ..")
    a.add_argument("--paradigm", choices=PARADIGMS, help="[ours; with plan.alpha 0 average]")
    a.add_argument("--csv", action="store_true", help="segment,step,lr of every update")
    a.add_argument("--plot", metavar="FILE", help="draw the paths")
    a.add_config()
    o, c = a.parse_config()
    paradigm = o.paradigm or ("ours" if c.plan.branches else "average")
    segments = config.segments(paradigm, c.plan)
    if o.plot is not None:
        check_picture(o.plot)
        draw({paradigm: segments}, o.plot)
    if o.csv:
        print("segment,step,lr")
        for g in segments:
            print("\n".join(f"{g.name},{s},{g.lr(s)!r}" for s in range(g.start, g.end)))
        return
    rows = [["segment", "parent", "start", "end", "steps", "LR of first .. last update"]]
    for g in segments:
        parent = f"{g.parent[0]}@{g.parent[1]}" if g.parent else "-"
        lr = f"{g.lr(g.start):.6g} .. {g.lr(g.end - 1):.6g}" if g.end > g.start else "no updates"
        rows.append([g.name, parent, f"{g.start:,}", f"{g.end:,}", f"{g.end - g.start:,}", lr])
    print(aligned([*rows, ["total", "", "", "", f"{sum(g.end - g.start for g in segments):,}", ""]]))


if __name__ == "__main__":
    with user_errors("tools.paths"):
        main()
