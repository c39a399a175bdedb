"""The paper's figures, and a picture beside each table: matplotlib, one style, colours that the colour-blind tell apart.

Each function draws one file from plans (learning rates), from a table's record (perplexities) or from logs (losses).
"""

import math
from typing import Any

import schedule
from paper import graph, tables
from paper.scales import Run, Setup
from runtime import resume

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe and Ito
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
    """One legend below all axes; the room to leave for it."""
    key = {label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(
        [key[k] for k in sorted(key)],
        sorted(key),
        loc="lower center",
        ncols=min(len(key), columns),
        fontsize=8,
        frameon=False,
    )
    return 0.07 * math.ceil(len(key) / columns)


# ----------------------------------------------------------------------------------------------------------
# Learning rates


def paradigms(s: Setup, file: str) -> None:
    """Figure 1: the paths of the three paradigms."""
    p = resume.make_plan(s.base)
    schedule.draw({x: resume.make_segments(x, p) for x in schedule.PARADIGMS}, file)


def schedules(s: Setup, file: str) -> None:
    """Figure 3: the schedules, each over a whole run of T steps."""
    fig, (ax,) = canvas(1, 5)
    for i, name in enumerate(s.schedules):
        run = Run("ptfs", keys=(("plan.schedule", name),))
        first = resume.make_segments("ptfs", resume.make_plan(s.config(run, 1)))[0]
        ax.plot(
            range(first.end),
            [first.lr(i) for i in range(first.end)],
            color=COLOURS[i % 6],
            linestyle=("-", "--", "-.", ":")[i % 4],
            label=name,
        )
    ax.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    ax.legend(fontsize=8, frameon=False)
    finish(fig, file)


def variants(s: Setup, file: str) -> None:
    """Figure 6: the learning rates of CPT's variants."""
    names = {"rewarm_max": "RewarmMax", "reset_max": "ResetMax", "keep_min": "KeepMin"}
    runs = {title: Run("cpt", keys=(("plan.cpt_variant", v),)) for v, title in names.items()}
    schedule.draw(
        {title: resume.make_segments("cpt", resume.make_plan(s.config(r, 1))) for title, r in runs.items()}, file
    )


def paths(s: Setup, name: str, cells: graph.Graph, seed: int) -> dict[str, list[float]]:
    """The learning rate of every update that led to each row of Figure 4 or 5."""
    out = {}
    for row in tables.TABLES[name](s).rows:
        cell, step = graph.add(cells, s, row.points["updated"], seed)
        rates: list[float] = []
        while True:
            segment = cells[cell].segment
            rates = [segment.lr(i) for i in range(segment.start, step)] + rates
            if not cells[cell].parent:
                break
            cell, step = cells[cell].parent  # type: ignore[misc]
        out[row.name] = rates
    return out


def stages(record: dict[str, Any], rates: dict[str, list[float]], file: str) -> None:
    """Figures 4 and 5: learning rates of two stages under several cycles, and the PPL that they lead to."""
    fig, (left, right) = canvas(2, 4.6)
    for i, (label, lr) in enumerate(rates.items()):
        left.plot(range(len(lr)), lr, color=COLOURS[i % 6], label=f"cycle {label}", linewidth=1.6)
    left.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    left.legend(fontsize=8, frameon=False, title="steps", title_fontsize=8)
    x = range(len(record["rows"]))
    for i, column in enumerate(record["columns"]):
        y, e = [r["ppl"][column] for r in record["rows"]], [r["sd"].get(column, 0) for r in record["rows"]]
        right.errorbar(
            x,
            y,
            e if len(record["seeds"]) > 1 else None,
            color=(COLOURS[1], COLOURS[0])[(i + len(record["columns"])) % 2],
            marker=MARKERS[i],
            capsize=3,
            label=column,
        )
    right.set_xticks(list(x), [r["name"] for r in record["rows"]])
    right.set(xlabel="cosine cycle (steps)", ylabel="PPL")
    right.legend(fontsize=8, frameon=False)
    finish(fig, file)


# ----------------------------------------------------------------------------------------------------------
# Perplexities


def table(record: dict[str, Any], file: str) -> None:
    """PPL of each row against its group's reference, ours beside the paper's; a panel a group."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for r in record["rows"]:
        groups.setdefault(r["group"], {})[r["name"]] = r
    names = list(dict.fromkeys(r["name"] for r in record["rows"]))
    reference = (
        "PTFS" if "PTFS" in names else record["differences"][0]["minus"][1] if record["differences"] else names[0]
    )
    colours = OF if reference == "PTFS" else dict(zip(names, COLOURS, strict=False))
    fig, axes = canvas(len(groups), 3.0, sharey=True)
    x = range(len(record["columns"]))
    for ax, (group, rows) in zip(axes, groups.items(), strict=True):
        ax.axhline(0, color=colours[reference], linewidth=1.2, label=reference)
        base = rows[reference]
        for i, name in enumerate(n for n in names if n != reference and n in rows):
            r, y, e = rows[name], [], []
            for c in record["columns"]:
                parts = [100 * (a / b - 1) for a, b in zip(r["seeds"][c], base["seeds"][c], strict=True)]
                y.append(sum(parts) / len(parts))
                e.append(math.sqrt(sum((p - y[-1]) ** 2 for p in parts) / max(1, len(parts) - 1)))
            ax.errorbar(
                x,
                y,
                e if len(record["seeds"]) > 1 else None,
                color=colours[name],
                marker=MARKERS[i],
                capsize=3,
                label=name,
            )
            if r["paper"] and base["paper"]:
                there = [c for c in record["columns"] if c in r["paper"] and c in base["paper"]]
                ax.plot(
                    [record["columns"].index(c) for c in there],
                    [100 * (r["paper"][c] / base["paper"][c] - 1) for c in there],
                    color=colours[name],
                    marker=MARKERS[i],
                    markerfacecolor="white",
                    linestyle=":",
                    label=f"{name}, the paper's",
                )
        ax.set_xticks(list(x), record["columns"])
        ax.set_title(group, fontsize=9)
        ax.set_xlabel("second increment" if ":" in record["columns"][0] else "version")
        ax.margins(x=0.15)
    axes[0].set_ylabel(f"PPL against {reference} (%)")
    finish(fig, file, legend(fig, axes, 5 if len(groups) > 1 else 2))


def downstream(record: dict[str, Any], file: str) -> None:
    """Tables 4 and 11: the mean over tasks, a group of bars a version."""
    groups = list(dict.fromkeys(m["group"] for m in record["means"]))
    fig, axes = canvas(len(groups), sharey=True)
    for ax, group in zip(axes, groups, strict=True):
        mine = [m for m in record["means"] if m["group"] == group]
        versions = list(dict.fromkeys(m["version"] for m in mine))
        for i, (name, colour) in enumerate(OF.items()):
            ax.bar(
                [v + 0.27 * (i - 1) for v in range(len(versions))],
                [m["value"] or 0 for m in mine if m["name"] == name],
                0.25,
                label=name,
                color=colour,
            )
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
    for ax, title in zip(axes, ("measured here", "the paper's"), strict=True):
        for r in record["rows"]:
            values = r["ppl"] if ax is axes[0] else r["paper"]
            if set(columns) <= set(values):
                ax.scatter(
                    r["costs"]["cost"],
                    sum(values[c] for c in columns) / len(columns),
                    s=60,
                    color=OF[r["name"]],
                    marker=markers[r["group"]],
                    alpha=0.85,
                    label=f"{r['name']}, {r['group']}",
                )
        ax.set(
            xlabel="relative cost (steps, PTFS = 1)",
            ylabel=f"APPL (mean PPL of {columns[0]}..{columns[-1]})",
            xlim=(0, 1.1),
        )
        ax.set_title(title, fontsize=9)
        ax.margins(y=0.2)
    finish(fig, file, legend(fig, axes[:1], 3))


# ----------------------------------------------------------------------------------------------------------
# Losses


def losses(runs: dict[str, tuple[schedule.Segment, list[dict[str, Any]]]], name: str, file: str) -> None:
    """Training loss (thin) and validation loss (dots) of all segments under a schedule; branches leave the main path."""
    fig, axes = canvas(3, 4.6, 4.0, sharey=True)
    low, high = math.inf, 0.0
    for segment, log in runs.values():
        kind = segment.name.partition("/")[0]
        panels = [i for i, of in enumerate(({f"ptfs-{name}"}, {f"cpt-{name}"}, {f"ours-{name}", "main"})) if kind in of]
        panels += [1] * (segment.name == f"ptfs-{name}/v1")  # CPT's version 1
        main = segment.name == "main"
        colour = DARK if main else COLOURS[(segment.version - 1) % 6]
        train = {
            r["step"] + 1: r["loss"] for r in log if "loss" in r
        }  # a record says the update; the state is after it
        val = {r["step"]: r["val_loss"] for r in log if "val_loss" in r}
        for i in panels:
            axes[i].plot(sorted(train), [train[k] for k in sorted(train)], color=colour, linewidth=0.7, alpha=0.45)
            axes[i].plot(
                sorted(val),
                [val[k] for k in sorted(val)],
                color=colour,
                marker="o",
                markersize=4,
                linewidth=2.2 if main else 1.4,
                label="main path" if main else f"V{segment.version}",
            )
        if panels and val:
            low, high = min(low, *val.values(), *train.values()), max(high, *val.values())
    for ax, title in zip(
        axes, ("Pre-training from scratch (PTFS)", "Continual pre-training (CPT)", "Path switching (ours)"), strict=True
    ):
        ax.set_title(f"{title}, {name}", fontsize=10)
        ax.set_xlabel("step")
        if low < high:
            ax.set_ylim(low - 0.05, high + 0.1)
    axes[0].set_ylabel("loss (nats a token)")
    finish(fig, file, legend(fig, axes))
