"""The learning-rate paths of a plan: its segments as a table, every update as CSV, or a picture.

    python -m tools.paths --config 1.2b --paradigm ours --plan.alpha 0.4 --plot paths.png

Neither a GPU nor torch is needed; matplotlib for the picture alone.
"""

import signal
from pathlib import Path

import config
from runtime.command_line import Parser, aligned
from runtime.errors import UserError, user_errors
from schedule import PARADIGMS, TITLES, Segment
from text.sources import optional

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe and Ito: for the colour-blind


def draw(plans: dict[str, list[Segment]], file: str) -> None:
    """Figure 1 for any plans: axes for each paradigm, a colour for each version, the main path dark."""
    optional("matplotlib", "matplotlib", "drawing")
    from matplotlib.figure import Figure

    fig = Figure(figsize=(5 * len(plans), 3.4))
    if (kind := Path(file).suffix[1:].lower()) not in (kinds := fig.canvas.get_supported_filetypes()):
        raise UserError(f"--plot {file}: got the ending {kind!r}, expected one of {', '.join(kinds)}")
    axes = fig.subplots(1, len(plans), sharey=True, squeeze=False)[0]
    for ax, (paradigm, segments) in zip(axes, plans.items(), strict=True):
        # the longest first, so that the shorter runs of PTFS, equal to it in the warm-up, stay visible
        for g in sorted((g for g in segments if g.end > g.start), key=lambda g: g.start - g.end):
            steps = [*range(g.start, g.end, max(1, (g.end - g.start) // 2000)), g.end - 1]
            label, colour, width = f"V{g.version}", COLOURS[(g.version - 1) % len(COLOURS)], 1.8
            if g.paradigm == "main":
                label, colour, width = "main path", "#333333", 2.6
            ax.plot(steps, [g.lr(s) for s in steps], color=colour, linewidth=width, label=label)
        ax.set_title(f"{TITLES.get(paradigm, paradigm)}: {sum(g.end - g.start for g in segments):,} steps", fontsize=10)
        ax.set(xlabel="step", ylim=(0, None))
        ax.locator_params(axis="x", nbins=5)
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("learning rate")
    lines = {label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    labels = sorted(lines)
    fig.legend([lines[k] for k in labels], labels, loc="lower center", ncols=len(labels), fontsize=9, frameon=False)
    fig.tight_layout(rect=(0, 0.07, 1, 1))
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(file, dpi=150)


def main() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    a = Parser(prog="tools.paths", description=__doc__, usage="python -m tools.paths [--config NAME] ..")
    a.add_argument("--paradigm", choices=PARADIGMS, default="ours")
    a.add_argument("--csv", action="store_true", help="segment,step,lr of every update")
    a.add_argument("--plot", metavar="FILE", help="draw the paths")
    a.add_config()
    o, c = a.parse_config()
    segments = config.segments(o.paradigm, c.plan)
    if o.plot:
        draw({o.paradigm: segments}, o.plot)
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
