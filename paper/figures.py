"""The paper's figures, and a picture beside each table, in one style of matplotlib's.

python -m paper.figures loss out/tiny/main out/tiny/ours-cosine --x tokens     of any segments, paradigms, runs
"""

import statistics
from pathlib import Path
from typing import Any

import schedule
from paper import graph, tables
from paper.scales import Setup
from runtime.command_line import Parser
from runtime.errors import UserError, user_errors
from runtime.files import read_log
from tools.paths import COLOURS, LEGEND, canvas, check_picture, finish

OF = {"PTFS": COLOURS[0], "CPT": COLOURS[1], "Ours": COLOURS[2], tables.MIXED: COLOURS[3], tables.MEAN: COLOURS[4]}
MARKERS = "os^DvP"


def distinct(rows: list[dict[str, Any]], key: str) -> list[str]:
    """The values of a key, each once, in order."""
    return list(dict.fromkeys(r[key] for r in rows))


def schedules(s: Setup, file: str) -> None:
    """Figure 3: the schedules, each over a whole run of T steps."""
    fig, (ax,) = canvas([""], 5)
    firsts = {name: s.segments(run, 1)[0] for name, run in tables.from_plans(s, "fig3").items()}
    rates(ax, {name: [first.lr(t) for t in range(first.end)] for name, first in firsts.items()})
    ax.legend(**LEGEND)
    finish(fig, file)


def rates(ax: Any, paths: dict[str, list[float]]) -> None:
    for i, (name, lr) in enumerate(paths.items()):
        look = {"color": COLOURS[i % 6], "linestyle": ("-", "--", "-.", ":")[i % 4], "linewidth": 1.6}
        ax.plot(range(len(lr)), lr, label=name, **look)
    ax.set(xlabel="step", ylabel="learning rate", ylim=(0, None))


def stages(record: dict[str, Any], request: graph.Request, file: str) -> None:
    """Figures 4 and 5: learning rates of two stages under several cycles, and the PPL that they lead to."""
    fig, (left, right) = canvas(["", ""], 4.6)
    cycles: dict[str, list[float]] = {}  # the learning rate of every update that led to each row
    for row in request.tables[record["name"]].rows:
        lr: list[float] = []
        at: tuple[str, int] | None = graph.add(request.nodes, request.setup, row.points["updated"], request.seeds[0])
        while at:
            node, step = request.nodes[at[0]], at[1]
            lr = [node.segment.lr(t) for t in range(node.segment.start, step)] + lr
            at = node.parent
        cycles[f"cycle {row.name}"] = lr
    rates(left, cycles)
    left.legend(title="steps", title_fontsize=8, **LEGEND)
    colours = {"initialization": COLOURS[1], "updated": COLOURS[0]}
    for i, column in enumerate(record["columns"]):
        y = [r["ppl"][column] for r in record["rows"]]
        spread = [r["sd"][column] for r in record["rows"]] if len(record["seeds"]) > 1 else None
        right.errorbar(range(len(y)), y, spread, capsize=3, color=colours[column], marker=MARKERS[i], label=column)
    right.set_xticks(range(len(record["rows"])), [r["name"] for r in record["rows"]])
    right.set(xlabel="cosine cycle (steps)", ylabel="PPL")
    right.legend(**LEGEND)
    finish(fig, file)


def table(record: dict[str, Any], file: str) -> None:
    """PPL of each row against its group's reference, ours beside the paper's; a panel a group."""
    groups = {g: {r["name"]: r for r in record["rows"] if r["group"] == g} for g in distinct(record["rows"], "group")}
    names = distinct(record["rows"], "name")
    against = list(dict.fromkeys(d["minus"][1] for d in record["differences"]))
    reference = "PTFS" if "PTFS" in names and len(against) > 1 else [*against, *names][0]
    colours = {n: OF.get(n, COLOURS[i % 6]) for i, n in enumerate(names)}
    columns, several = record["columns"], len(record["seeds"]) > 1
    fig, axes = canvas(list(groups), 3.0 if len(names) < 6 else 7.5, sharey=True)
    for ax, rows in zip(axes, groups.values(), strict=True):
        base = rows[reference]
        ax.axhline(0, color=colours[reference], linewidth=1.2, label=reference)
        for i, name in enumerate(n for n in names if n != reference and n in rows):
            row, style = rows[name], {"color": colours[name], "marker": MARKERS[i % 6]}
            above = [percent_above(row["seeds"][c], base["seeds"][c]) for c in columns]  # by column and seed
            spread = list(map(statistics.stdev, above)) if several else None
            ax.errorbar(range(len(columns)), list(map(statistics.fmean, above)), spread, capsize=3, label=name, **style)
            if there := [c for c in columns if c in row["paper"] and c in base["paper"]]:
                y = percent_above([row["paper"][c] for c in there], [base["paper"][c] for c in there])
                x = [columns.index(c) for c in there]
                ax.plot(x, y, markerfacecolor="white", linestyle=":", label=f"{name}, the paper's", **style)
        ax.set_xticks(range(len(columns)), columns)
        ax.set_xlabel("second increment" if record["name"] == "table13" else "version")
        ax.margins(x=0.15)
    axes[0].set_ylabel(f"PPL against {reference} (%)")
    finish(fig, file, axes, 5 if len(groups) > 1 else 2 if len(names) < 6 else 4)


def percent_above(ppl: list[float], base: list[float]) -> list[float]:
    return [100 * (a / b - 1) for a, b in zip(ppl, base, strict=True)]


def downstream(record: dict[str, Any], file: str) -> None:
    """Tables 4 and 11: the mean over tasks, a group of bars a version."""
    groups = distinct(record["means"], "group")
    fig, axes = canvas(groups, sharey=True)
    for ax, group in zip(axes, groups, strict=True):
        of_group = [m for m in record["means"] if m["group"] == group]
        versions = distinct(of_group, "version")
        names = distinct(of_group, "name")
        for i, name in enumerate(names):
            x = [v + 0.8 * (i - (len(names) - 1) / 2) / len(names) for v in range(len(versions))]
            bars = [m["value"] or 0 for m in of_group if m["name"] == name]
            ax.bar(x, bars, 0.75 / len(names), label=name, color=OF[name])
        ax.set_xticks(range(len(versions)), versions)
    axes[0].set_ylabel("mean over tasks (%)")
    finish(fig, file, axes)


def cost_and_quality(record: dict[str, Any], file: str) -> None:
    """Figure 2: APPL against relative cost, here and in the paper; lower left is better."""
    columns = record["columns"]
    fig, axes = canvas(["measured here", "the paper's"], 4.2)
    markers = {g: MARKERS[i % 6] for i, g in enumerate(distinct(record["rows"], "group"))}
    for ax, key in zip(axes, ("ppl", "paper"), strict=True):
        for r in record["rows"]:
            if set(columns) <= set(r[key]):
                appl = sum(r[key][c] for c in columns) / len(columns)
                style = {"color": OF[r["name"]], "marker": markers[r["group"]], "label": f"{r['name']}, {r['group']}"}
                ax.scatter(r["costs"]["cost"], appl, s=60, alpha=0.85, **style)
        ax.set(xlabel="relative cost (steps, PTFS = 1)", xlim=(0, 1.1))
        ax.set_ylabel(f"APPL (mean PPL of {columns[0]}..{columns[-1]})")
        ax.margins(y=0.2)
    finish(fig, file, axes[:1], 3)


def frontier(record: dict[str, Any], file: str) -> None:
    """`drift`: PPL on the new text against that on the old, a line a paradigm, a dot a share of replay."""
    fig, (ax,) = canvas([""], 5.4, 4.2)
    names = list(dict.fromkeys(r["labels"]["paradigm"] for r in record["rows"]))
    for i, name in enumerate(names):
        rows = [r for r in record["rows"] if r["labels"]["paradigm"] == name]
        x, y = ([r["ppl"][c] for r in rows] for c in ("mean of old", record["columns"][3]))
        ax.plot(x, y, marker=MARKERS[i % 6], color=COLOURS[i % 6], linestyle="-" if i < 6 else "--", label=name)
        for r, at in zip(rows, zip(x, y, strict=True), strict=True):
            ax.annotate(r["labels"]["replay"], at, fontsize=7, xytext=(3, 3), textcoords="offset points")
    ax.set(xlabel="PPL on the old text (mean over kinds), replay beside the dots", ylabel="PPL on the new text")
    finish(fig, file, [ax], 4)


Log = list[dict[str, Any]]


def curve(log: Log, key: str, x: str = "steps") -> tuple[list[int], list[float]]:
    """(steps or tokens, values) of a key of a log; of a step trained twice, the last time."""
    after = 0 if "val_loss" in key else 1  # the record of an update names it; the state is after it
    found = {r["step"] + after if x == "steps" else r["tokens"]: r[key] for r in log if key in r}
    return sorted(found), [found[at] for at in sorted(found)]


def losses(panels: dict[str, dict[str, Log]], file: str, x: str = "steps") -> None:
    """Logs, {title: {label: log}}: training loss (thin, some 200 means) and validation loss, rates below."""
    width, columns = (4.6, 6) if len(panels) > 1 else (8.0, 3)
    fig, (above, below) = canvas(list(panels), width, 6.0, rows=2, sharex="col", sharey="row")
    labels = list(dict.fromkeys(label for logs in panels.values() for label in logs))
    for top, bottom, logs in zip(above, below, panels.values(), strict=True):
        for label, log in logs.items():
            i = labels.index(label)
            look: Any = {"color": COLOURS[i % 6], "linestyle": ("-", "--", ":")[i // 6 % 3], "label": label}
            steps, loss = curve(log, "loss", x)
            few, first = len(loss) // 200 + 1, len(loss) // 10  # the first losses would flatten the rest
            means = [statistics.fmean(loss[k : k + few]) for k in range(first, len(loss), few)]
            top.plot(steps[first::few], means, color=look["color"], linewidth=0.7, alpha=0.45)
            top.plot(*curve(log, "val_loss", x), marker="o", markersize=4, **look)
            top.plot(*curve(log, "average_val_loss", x), marker="x", markersize=4, color=look["color"], linewidth=0.7)
            bottom.plot(*curve(log, "lr", x), **look)
        bottom.set_xlabel(x)
    above[0].set_ylabel("loss (nats a token)")
    below[0].set_ylabel("learning rate")
    finish(fig, file, below, columns)


def by_paradigm(request: graph.Request) -> dict[str, dict[str, Log]]:
    """Panels of `losses`: Table 3's segments of the first seed and schedule."""
    name, panels = request.setup.schedules[0], {paradigm: dict[str, Log]() for paradigm in tables.NAMES}
    for node in request.nodes_of["table3"].values():
        g, plan = node.segment, node.config.plan
        of_schedule = g.paradigm == "main" or (plan.schedule == name and g.paradigm != "average")
        if node.config.train.seed == request.seeds[0] and of_schedule:
            label = "main path" if g.paradigm == "main" else f"V{g.version}"
            panels[g.paradigm if g.paradigm in panels else "ours"][label] = node.log()
    panels["cpt"] = {"V1": panels["ptfs"].get("V1", []), **panels["cpt"]}  # the same segment
    return {f"{schedule.TITLES[paradigm]}, {name}": logs for paradigm, logs in panels.items()}


def segments(folder: Path) -> list[Path]:
    """The segments in a folder that have a log: itself, or those of a paradigm or run."""
    below = (".", "main", "v*", "*/v*", "sft/*", "sft/*/v*")
    if found := [log.parent for where in below for log in sorted(folder.glob(f"{where}/log.jsonl"))]:
        return found
    raise UserError(f"{folder}: has no log.jsonl; expected a segment, a paradigm or a run, as out/tiny/ours-cosine")


def main() -> None:
    a = Parser(prog="python -m paper.figures", description=__doc__)
    a.add_argument("what", choices=["loss"])
    a.add_argument("folder", nargs="+", type=Path, help="of a segment, a paradigm or a run")
    a.add_argument("--x", default="steps", choices=["steps", "tokens"])
    a.add_argument("--out", default="out/loss.png", metavar="FILE", help="a .png, .pdf or .svg [out/loss.png]")
    o = a.parse_args()
    check_picture(o.out)
    logs = {str(f): read_log(f) for folder in o.folder for f in segments(folder)}
    losses({"training loss (thin), validation loss (dots; crosses: of the running mean)": logs}, o.out, o.x)
    print(o.out)


if __name__ == "__main__":
    with user_errors("python -m paper.figures"):
        main()
