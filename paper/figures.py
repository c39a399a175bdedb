"""The paper's figures, and a picture beside each table, in one style of matplotlib's.

Each function draws one file: from plans (learning rates), from a table's record (perplexities) or from logs (losses).
"""

import math
from typing import Any

import schedule
from paper import graph, tables
from paper.scales import Run, Setting, Setup

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe and Ito: safe for the colour-blind
DARK = "#333333"
OF = {"PTFS": COLOURS[0], "CPT": COLOURS[1], "Ours": COLOURS[2]}
MARKERS = "os^DvP"


def canvas(panels: int, width: float = 3.4, height: float = 3.4, **kw: Any) -> tuple[Any, Any]:
    """A figure with a row of axes, in the one style."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, panels, figsize=(max(width * panels, 4.6), height), squeeze=False, **kw)
    for ax in axes[0]:
        ax.grid(alpha=0.25)
        ax.tick_params(labelsize=8)
    return fig, axes[0]


def finish(fig: Any, file: str, bottom: float = 0.0) -> None:
    import matplotlib.pyplot as plt

    fig.tight_layout(rect=(0, bottom, 1, 1))
    fig.savefig(file, dpi=150)
    plt.close(fig)


def legend(fig: Any, axes: Any, columns: int = 6) -> float:
    """One legend below all axes. Returns the room to leave for it."""
    key = {label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    lines, names = [key[k] for k in sorted(key)], sorted(key)
    fig.legend(lines, names, loc="lower center", ncols=min(len(key), columns), fontsize=8, frameon=False)
    return 0.07 * math.ceil(len(key) / columns)


def paradigms(s: Setup, file: str) -> None:
    """Figure 1: the paths of the three paradigms."""
    schedule.draw({x: s.segments(Run(x), 1) for x in schedule.PARADIGMS}, file)


def schedules(s: Setup, file: str) -> None:
    """Figure 3: the schedules, each over a whole run of T steps."""
    fig, (ax,) = canvas(1, 5)
    for i, name in enumerate(s.schedules):
        first = s.segments(Run("ptfs", Setting(keys={"plan.schedule": name})), 1)[0]
        steps, style = range(first.end), ("-", "--", "-.", ":")[i % 4]
        ax.plot(steps, [first.lr(t) for t in steps], color=COLOURS[i % 6], linestyle=style, label=name)
    ax.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    ax.legend(fontsize=8, frameon=False)
    finish(fig, file)


def variants(s: Setup, file: str) -> None:
    """Figure 6: the learning rates of CPT's variants."""
    runs = {title: Run("cpt", Setting(keys={"plan.cpt_variant": v})) for v, title in tables.VARIANTS.items()}
    schedule.draw({title: s.segments(run, 1) for title, run in runs.items()}, file)


def paths(request: graph.Request, name: str) -> dict[str, list[float]]:
    """The learning rate of every update that led to each row of Figure 4 or 5."""
    out = {}
    for row in request.tables[name].rows:
        rates: list[float] = []
        at: tuple[str, int] | None = graph.add(request.nodes, request.setup, row.points["updated"], request.seeds[0])
        while at:
            node, step = request.nodes[at[0]], at[1]
            rates = [node.segment.lr(t) for t in range(node.segment.start, step)] + rates
            at = node.parent
        out[row.name] = rates
    return out


def stages(record: dict[str, Any], rates: dict[str, list[float]], file: str) -> None:
    """Figures 4 and 5: learning rates of two stages under several cycles, and the PPL that they lead to."""
    fig, (left, right) = canvas(2, 4.6)
    for i, (label, lr) in enumerate(rates.items()):
        left.plot(range(len(lr)), lr, color=COLOURS[i % 6], label=f"cycle {label}", linewidth=1.6)
    left.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    left.legend(fontsize=8, frameon=False, title="steps", title_fontsize=8)
    colours = {"initialization": COLOURS[1], "updated": COLOURS[0]}
    for i, column in enumerate(record["columns"]):
        y = [r["ppl"][column] for r in record["rows"]]
        spread = [r["sd"][column] for r in record["rows"]] if len(record["seeds"]) > 1 else None
        right.errorbar(range(len(y)), y, spread, capsize=3, color=colours[column], marker=MARKERS[i], label=column)
    right.set_xticks(range(len(record["rows"])), [r["name"] for r in record["rows"]])
    right.set(xlabel="cosine cycle (steps)", ylabel="PPL")
    right.legend(fontsize=8, frameon=False)
    finish(fig, file)


def table(record: dict[str, Any], file: str) -> None:
    """PPL of each row against its group's reference, ours beside the paper's; a panel a group."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for r in record["rows"]:
        groups.setdefault(r["group"], {})[r["name"]] = r
    names = list(dict.fromkeys(r["name"] for r in record["rows"]))
    others = [d["minus"][1] for d in record["differences"]] + names
    reference = "PTFS" if "PTFS" in names else others[0]
    colours = OF if reference == "PTFS" else dict(zip(names, COLOURS, strict=False))
    columns, several = record["columns"], len(record["seeds"]) > 1
    fig, axes = canvas(len(groups), 3.0, sharey=True)
    for ax, (group, rows) in zip(axes, groups.items(), strict=True):
        ax.axhline(0, color=colours[reference], linewidth=1.2, label=reference)
        for i, name in enumerate(n for n in names if n != reference and n in rows):
            style = {"color": colours[name], "marker": MARKERS[i]}
            y, spread = relative(rows[name], rows[reference], columns)
            ax.errorbar(range(len(y)), y, spread if several else None, capsize=3, label=name, **style)
            paper, base = rows[name]["paper"], rows[reference]["paper"]
            if paper and base:
                there = [i for i, c in enumerate(columns) if c in paper and c in base]
                y = [100 * (paper[columns[i]] / base[columns[i]] - 1) for i in there]
                ax.plot(there, y, markerfacecolor="white", linestyle=":", label=f"{name}, the paper's", **style)
        ax.set_xticks(range(len(columns)), columns)
        ax.set_title(group, fontsize=9)
        ax.set_xlabel("second increment" if record["name"] == "table13" else "version")
        ax.margins(x=0.15)
    axes[0].set_ylabel(f"PPL against {reference} (%)")
    finish(fig, file, legend(fig, axes, 5 if len(groups) > 1 else 2))


def relative(row: dict[str, Any], base: dict[str, Any], columns: list[str]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation over seeds of how far a row's PPL is above another's, in percent, by column."""
    means, spreads = [], []
    for c in columns:
        parts = [100 * (a / b - 1) for a, b in zip(row["seeds"][c], base["seeds"][c], strict=True)]
        means.append(mean := sum(parts) / len(parts))
        spreads.append(math.sqrt(sum((p - mean) ** 2 for p in parts) / max(1, len(parts) - 1)))
    return means, spreads


def downstream(record: dict[str, Any], file: str) -> None:
    """Tables 4 and 11: the mean over tasks, a group of bars a version."""
    groups = list(dict.fromkeys(m["group"] for m in record["means"]))
    fig, axes = canvas(len(groups), sharey=True)
    for ax, group in zip(axes, groups, strict=True):
        of_group = [m for m in record["means"] if m["group"] == group]
        versions = list(dict.fromkeys(m["version"] for m in of_group))
        for i, (name, colour) in enumerate(OF.items()):
            x = [v + 0.27 * (i - 1) for v in range(len(versions))]
            ax.bar(x, [m["value"] or 0 for m in of_group if m["name"] == name], 0.25, label=name, color=colour)
        ax.set_xticks(range(len(versions)), versions)
        ax.set_title(group, fontsize=9)
    axes[0].set_ylabel("mean over tasks (%)")
    axes[0].legend(fontsize=8, frameon=False)
    finish(fig, file)


def cost_and_quality(record: dict[str, Any], file: str) -> None:
    """Figure 2: APPL against relative cost, here and in the paper; lower left is better."""
    columns = record["columns"]
    fig, axes = canvas(2, 4.2)
    markers = {g: MARKERS[i % 6] for i, g in enumerate(dict.fromkeys(r["group"] for r in record["rows"]))}
    for ax, key, title in zip(axes, ("ppl", "paper"), ("measured here", "the paper's"), strict=True):
        for r in record["rows"]:
            if set(columns) <= set(r[key]):
                appl = sum(r[key][c] for c in columns) / len(columns)
                style = {"color": OF[r["name"]], "marker": markers[r["group"]], "label": f"{r['name']}, {r['group']}"}
                ax.scatter(r["costs"]["cost"], appl, s=60, alpha=0.85, **style)
        ax.set(xlabel="relative cost (steps, PTFS = 1)", xlim=(0, 1.1))
        ax.set_ylabel(f"APPL (mean PPL of {columns[0]}..{columns[-1]})")
        ax.set_title(title, fontsize=9)
        ax.margins(y=0.2)
    finish(fig, file, legend(fig, axes[:1], 3))


def losses(runs: list[tuple[schedule.Segment, list[dict[str, Any]]]], name: str, file: str) -> None:
    """Training loss (thin) and validation loss (dots) over steps, from the logs of segments under schedule `name`."""
    fig, axes = canvas(3, 4.6, 4.0, sharey=True)
    panels = {"ptfs": axes[:1], "cpt": axes[1:2], "main": axes[2:], "branch": axes[2:]}
    low, high = math.inf, 0.0
    for segment, log in runs:
        main = segment.paradigm == "main"
        first = segment.paradigm == "ptfs" and segment.version == 1  # which is CPT's as well
        label = "main path" if main else f"V{segment.version}"
        colour = DARK if main else COLOURS[(segment.version - 1) % 6]
        # a record names the update; the state is after it
        train = dict(sorted((r["step"] + 1, r["loss"]) for r in log if "loss" in r))
        val = dict(sorted((r["step"], r["val_loss"]) for r in log if "val_loss" in r))
        dots = {"marker": "o", "markersize": 4, "linewidth": 2.2 if main else 1.4, "label": label}
        for ax in axes[:2] if first else panels[segment.paradigm]:
            ax.plot(list(train), list(train.values()), color=colour, linewidth=0.7, alpha=0.45)
            ax.plot(list(val), list(val.values()), color=colour, **dots)
        if val:
            low, high = min(low, *val.values(), *train.values()), max(high, *val.values())
    titles = ("Pre-training from scratch (PTFS)", "Continual pre-training (CPT)", "Path switching (ours)")
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(f"{title}, {name}", fontsize=10)
        ax.set_xlabel("step")
        if low < high:
            ax.set_ylim(low - 0.05, high + 0.1)
    axes[0].set_ylabel("loss (nats a token)")
    finish(fig, file, legend(fig, axes))
