"""The paper's tables as data: rows of runs, the numbers that the paper prints beside them, and its statements.

A *claim* is a statement of the paper as differences of perplexities that it says are below zero. graph.py trains the points that
the rows name, paper measures and prints.
To add a table, write a function like those below and add it to TABLES.
"""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import config
import model
import schedule
from paper.scales import Point, Run, Setup

PAPER = json.loads((Path(__file__).parent.parent / "results" / "paper.json").read_text())
NAMES = {"ptfs": "PTFS", "cpt": "CPT", "ours": "Ours"}
MAIN = ("cosine", "knee", "multistep")  # the paper's schedules
ALPHAS = (0.2, 0.4, 0.6, 0.8)
CYCLES = (1, 2, 3, 4, math.inf)  # Figures 4 and 5: cosine cycles in T


@dataclass(frozen=True)
class Row:
    group: str  # rows that are compared with each other
    name: str  # of the row in its group
    labels: dict[str, str]  # the first columns
    points: dict[str, Point]  # by column
    paper: dict[str, float] = field(default_factory=dict)  # the PPL that the paper prints, by column
    costs: dict[str, float] = field(default_factory=dict)  # steps relative to PTFS, by way of counting
    also: tuple[Point, ...] = ()  # part of what the costs count, but not printed


Differences = dict[
    str, dict[tuple[str, str, str], float]
]  # {label: {(group, name, column): factor}}: sums of PPLs times factors


@dataclass(frozen=True)
class Claim:
    text: str
    below_zero: Differences


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    columns: list[str]
    rows: list[Row]
    claims: list[Claim]
    pairs: list[tuple[str, str]] = field(default_factory=list)  # differences to print in each group
    notes: list[str] = field(default_factory=list)


def printed(table: str, columns: list[str], **which: Any) -> dict[str, float]:
    """What the paper prints in these columns of the row of a table that has these values."""
    row: dict[str, float] = next((r for r in PAPER.get(table, []) if all(r.get(k) == v for k, v in which.items())), {})
    return {c: row[c] for c in columns if c in row}


def three(
    s: Setup,
    group: str,
    labels: dict[str, str],
    paper: str,
    which: dict[str, Any],
    setting: str = "base",
    keys: dict[str, str] | None = None,
    config: str = "",
    paradigms: tuple[str, ...] = schedule.PARADIGMS,
    cpt_variant: str = "",
) -> list[Row]:
    """PTFS, CPT and ours under one setting, as most tables have them."""
    rows = []
    for paradigm in paradigms:
        extra = {"plan.cpt_variant": cpt_variant} if paradigm == "cpt" and cpt_variant else {}
        run = Run(paradigm, setting, tuple({**(keys or {}), **extra}.items()), config)
        rows.append(
            Row(
                group,
                NAMES[paradigm],
                {**labels, "paradigm": NAMES[paradigm]},
                s.versions(run),
                printed(paper, s.columns, **which, paradigm=paradigm),
                {"cost": s.cost(run)},
                (Point(run, 1),),
            )
        )
    return rows


def decay(steps: int) -> dict[str, str]:
    """The keys of branches so many steps long."""
    return {"plan.decay_steps": str(steps), "plan.alpha": "none"}


def below(text: str, groups: list[str], columns: list[str], a: str, b: str, times: float = 1.0) -> Claim:
    """In each group and column, the PPL of row `a` is below `times` that of row `b`."""
    return Claim(text, {f"{g} {c}".strip(): {(g, a, c): 1.0, (g, b, c): -times} for g in groups for c in columns})


def ours_claims(rows: list[Row], columns: list[str], beside_ptfs: float = 1.02) -> list[Claim]:
    groups = list(dict.fromkeys(r.group for r in rows))
    near = f"ours is below PTFS or within {beside_ptfs - 1:.0%} of it" if beside_ptfs > 1 else "ours is below PTFS"
    return [
        below("ours is below CPT", groups, columns, "Ours", "CPT"),
        below(near, groups, columns, "Ours", "PTFS", beside_ptfs),
    ]


def widens(rows: list[Row], columns: list[str]) -> list[Claim]:
    groups = list(dict.fromkeys(r.group for r in rows))
    steps = itertools.pairwise(columns)
    gap = {
        f"{g} {a} to {b}": {(g, "CPT", a): 1.0, (g, "PTFS", a): -1.0, (g, "CPT", b): -1.0, (g, "PTFS", b): 1.0}
        for a, b in steps
        for g in groups
    }
    return [
        below("PTFS is below CPT", groups, columns, "PTFS", "CPT"),
        Claim("the gap between CPT and PTFS widens with the version", gap),
    ]


PAIRS = [("Ours", "CPT"), ("Ours", "PTFS"), ("CPT", "PTFS")]


# ----------------------------------------------------------------------------------------------------------
# The tables, in the paper's order


def table1(s: Setup) -> Table:
    rows = [
        r
        for name in s.schedules
        for r in three(
            s,
            name,
            {"schedule": name},
            "table1_3",
            {"schedule": name},
            keys={"plan.schedule": name},
            paradigms=("ptfs", "cpt"),
        )
    ]
    return Table("table1", "Table 1: PTFS against CPT", s.columns, rows, widens(rows, s.columns), [("CPT", "PTFS")])


def table2(s: Setup) -> Table:
    rows = []
    for name in s.schedules:
        for alpha in ALPHAS:
            run = Run("ours", keys=(("plan.schedule", name), *decay(schedule.whole(alpha, s.T)).items()))
            rows.append(
                Row(
                    name,
                    f"alpha {alpha}",
                    {"schedule": name, "alpha": str(alpha)},
                    s.versions(run),
                    printed("table2_alpha", s.columns, schedule=name, alpha=alpha),
                    {"cost as in Table 2": s.cost(run, "table2"), "as in section 3.2": s.cost(run)},
                )
            )
    claims = [
        below("alpha 0.6 is at most 1% above alpha 0.8", s.schedules, s.columns, "alpha 0.6", "alpha 0.8", 1.01),
        below("alpha 0.6 is below alpha 0.2", s.schedules, s.columns, "alpha 0.6", "alpha 0.2"),
    ]
    return Table(
        "table2",
        "Table 2: alpha, the length of a branch",
        s.columns,
        rows,
        claims,
        [(f"alpha {a}", "alpha 0.6") for a in (0.2, 0.4, 0.8)],
    )


def table3(s: Setup) -> Table:
    rows = [
        r
        for name in s.schedules
        for r in three(s, name, {"schedule": name}, "table1_3", {"schedule": name}, keys={"plan.schedule": name})
    ]
    return Table(
        "table3",
        "Table 3: the three paradigms",
        s.columns,
        rows,
        ours_claims(rows, s.columns) + widens(rows, s.columns),
        PAIRS,
    )


def table5(s: Setup) -> Table:
    rows = [
        r
        for name in s.schedules
        for r in three(
            s,
            name,
            {"schedule": name},
            "table5_qwen_1.2b",
            {"schedule": name},
            "qwen",
            {"plan.schedule": name, "model.qkv_bias": "true"},
        )
    ]
    return Table(
        "table5",
        "Table 5: another architecture, Qwen (biases on q, k and v)",
        s.columns,
        rows,
        ours_claims(rows, s.columns),
        PAIRS,
    )


def table6(s: Setup) -> Table:
    rows = []
    for size, given in s.scale.sizes.items():
        keys = {k: v for k, v in given.items() if k != "config"}
        named = given.get("config", s.scale.config)
        base = not keys and named == s.scale.config
        rows += three(
            s,
            size,
            {"size": size},
            "table6_model_size_cosine",
            {"size": size},
            "base" if base else f"size-{size}",
            {**keys, "plan.schedule": "cosine"},
            "" if base else named,
            cpt_variant="rewarm_max",
        )
    return Table("table6", "Table 6: model sizes", s.columns, rows, ours_claims(rows, s.columns), PAIRS, [REWARM])


def table7(s: Setup) -> Table:
    rows = []
    for part, total in ((0.5, "21B"), (1.0, "42B"), (4.0, "168B")):
        T = schedule.whole(part, s.T)
        label = f"{count(T * s.N * s.base.train.batch_tokens)} tokens"
        keys = (
            {"plan.schedule": "cosine"}
            | ({} if part == 1 else {"plan.steps": str(T)})
            | (s.scale.long if part > 1 else {})
        )
        rows += three(
            s,
            label,
            {"data": label},
            "table7_data_size_cosine",
            {"tokens_total": total},
            "base" if part == 1 else f"steps-{T}",
            keys,
        )
    return Table("table7", "Table 7: data sizes", s.columns, rows, ours_claims(rows, s.columns), PAIRS)


def table8(s: Setup) -> Table:
    rows = []
    for paper in ("5e-5", "1e-4", "3e-4", "5e-4", "8e-4"):
        lr = f"{s.base.plan.max_lr * float(paper) / 3e-4:.3g}"
        base = paper == "3e-4"
        rows += three(
            s,
            lr,
            {"max_lr": lr},
            "table8_max_lr_cosine",
            {"max_lr": paper},
            "base" if base else f"lr-{lr}",
            {"plan.schedule": "cosine"} | ({} if base else {"plan.max_lr": lr}),
            cpt_variant="rewarm_max",
        )
    return Table(
        "table8", "Table 8: maximal learning rates", s.columns, rows, ours_claims(rows, s.columns), PAIRS, [REWARM]
    )


def table10(s: Setup) -> Table:
    rows = []
    names = {"rewarm_max": "RewarmMax", "reset_max": "ResetMax", "keep_min": "KeepMin"}
    for name in s.schedules:
        for variant, title in names.items():
            run = Run("cpt", keys=(("plan.schedule", name), ("plan.cpt_variant", variant)))
            rows.append(
                Row(
                    name,
                    title,
                    {"schedule": name, "variant": title},
                    s.versions(run),
                    printed("table10_cpt_variants", s.columns, schedule=name, variant=variant),
                )
            )
    claims = [
        below(f"ResetMax is below {other}", s.schedules, s.columns, "ResetMax", other)
        for other in ("RewarmMax", "KeepMin")
    ]
    return Table(
        "table10",
        "Table 10: variants of CPT",
        s.columns,
        rows,
        claims,
        [("RewarmMax", "ResetMax"), ("KeepMin", "ResetMax")],
    )


def table12(s: Setup) -> Table:
    rows = []
    for alpha in ALPHAS[:3]:
        d = schedule.whole(alpha, s.T)
        small = {
            "plan.schedule": "cosine",
            "data.unique": str(max(1, s.T // 2)),
        }  # one set of T/2 steps for all versions
        for paradigm, steps, setting in (("cpt", s.T + d, f"small-set-{s.T + d}"), ("ours", s.T, "small-set")):
            keys = {**small, "plan.steps": str(steps), "data.increments": str(s.N * steps)} | (
                decay(d) if paradigm == "ours" else {}
            )
            run = Run(paradigm, setting, tuple(keys.items()))
            rows.append(
                Row(
                    f"alpha {alpha}",
                    NAMES[paradigm],
                    {"alpha": str(alpha), "paradigm": NAMES[paradigm], "steps of a version": f"{steps:,}"},
                    s.versions(run),
                    printed("table12_equal_cost_5.25B", s.columns, alpha=alpha, paradigm=paradigm),
                )
            )
    claim = below(
        "at equal cost, ours is below CPT", list(dict.fromkeys(r.group for r in rows)), s.columns, "Ours", "CPT"
    )
    note = f"One set of {count(max(1, s.T // 2) * s.base.train.batch_tokens)} tokens, read again and again."
    return Table("table12", "Table 12: CPT and ours at equal cost", s.columns, rows, [claim], [("Ours", "CPT")], [note])


def table13(s: Setup) -> Table:
    # Two versions whose second increment is 1, 2 or 3 T long: those of PTFS and ours are Table 3's V2, V3 and V4, learning
    # rates and data alike, since a branch stays as long as it is. CPT alone is another run, from the same version 1.
    base = {p: Run(p, keys=(("plan.schedule", "cosine"),)) for p in schedule.PARADIGMS}
    columns = {f"1:{k}": k + 1 for k in range(1, s.N)}
    points = {p: {c: Point(base[p], v) for c, v in columns.items()} for p in schedule.PARADIGMS}
    for c, v in list(columns.items())[1:]:
        T = s.T
        keys = {
            "plan.schedule": "cosine",
            "plan.increments": f"{T},{(v - 1) * T}",
            "data.increments": ",".join([str(T)] * v),
        }
        points["cpt"][c] = Point(Run("cpt", f"increments-1-{v - 1}", tuple(keys.items()), parent=base["cpt"]), 2)
    sizes = {"1:1": "10.5B", "1:2": "21.0B", "1:3": "31.5B"}
    rows = [
        Row(
            "",
            NAMES[p],
            {"paradigm": NAMES[p]},
            points[p],
            {
                c: printed("table13_unequal_increments", [sizes[c]], paradigm=p).get(sizes[c], math.nan)
                for c in columns
                if c in sizes
            },
        )
        for p in schedule.PARADIGMS
    ]
    claims = ours_claims(rows, list(columns), 1.0)
    return Table(
        "table13",
        "Table 13: a second increment as long as the first, twice and three times as long",
        list(columns),
        rows,
        claims,
        PAIRS,
    )


def fig4(s: Setup) -> Table:
    return _cycles(
        s, "fig4", "Figure 4: the learning rate of the first stage, and what becomes of it", lambda k: _first(s, k)
    )


def fig5(s: Setup) -> Table:
    return _cycles(s, "fig5", "Figure 5: the learning rate of the second stage", lambda k: {"updated": _second(s, k)})


def _first(s: Setup, k: float) -> dict[str, Point]:
    """Version 1 under a cosine cycle of k*T cut at T, and what T steps of a complete decay make of it."""
    if k == math.inf:  # constant after the warm-up: the main path
        return {"initialization": Point(_second(s, 1).run, 0, at=s.T), "updated": _second(s, 1)}
    cycle = (("plan.schedule", "cosine"),) + ((("plan.cycle", str(round(k * s.T))),) if k > 1 else ())
    one = (("plan.versions", "1"),)  # PTFS would cut its later versions' cycles as well
    return {"initialization": Point(Run("ptfs", keys=cycle + one), 1), "updated": Point(Run("cpt", keys=cycle), 2)}


def _second(s: Setup, k: float) -> Point:
    """T steps of the main path, then a cosine cycle of k*T cut after T steps."""
    cycle = {} if k == 1 else {"plan.cycle": "inf" if k == math.inf else str(round(k * s.T))}
    keys = {
        "plan.schedule": "cosine",
        "plan.increments": str(2 * s.T),
        "data.increments": ",".join([str(s.T)] * s.N),
        **decay(s.T),
        **cycle,
    }
    return Point(Run("ours", keys=tuple(keys.items())), 1)


def _cycles(s: Setup, name: str, title: str, points: Callable[[float], dict[str, Point]]) -> Table:
    label = {k: "inf" if k == math.inf else f"{round(k * s.T):,}" for k in CYCLES}
    rows = [Row("", label[k], {"cosine cycle (steps)": label[k]}, points(k)) for k in CYCLES]
    if name == "fig4":
        pairs = list(itertools.pairwise(CYCLES))
        claims = [
            Claim(
                "a longer cycle, so a larger learning rate at the end, makes the first stage worse",
                {
                    f"{label[a]} to {label[b]}": {
                        ("", label[a], "initialization"): 1.0,
                        ("", label[b], "initialization"): -1.0,
                    }
                    for a, b in pairs
                },
            ),
            Claim(
                "and its update better",
                {
                    f"{label[a]} to {label[b]}": {("", label[b], "updated"): 1.0, ("", label[a], "updated"): -1.0}
                    for a, b in pairs
                },
            ),
        ]
    else:
        claims = [
            Claim(
                "a complete decay in the second stage is best",
                {label[k]: {("", label[1], "updated"): 1.0, ("", label[k], "updated"): -1.0} for k in CYCLES[1:]},
            )
        ]
    return Table(name, title, list(rows[0].points), rows, claims)


def table4(s: Setup) -> Table:
    rows = three(s, "", {}, "table1_3", {"schedule": "cosine"}, keys={"plan.schedule": "cosine"})
    return Table("table4", "Table 4: downstream tasks", s.columns, rows, [])


def table11(s: Setup) -> Table:
    total = s.T * s.N * s.base.train.batch_tokens
    of = {
        size: {k: v for k, v in keys.items() if k != "config"} | {"config": keys.get("config", s.scale.config)}
        for size, keys in s.scale.sizes.items()
    }
    own = next((size for size, keys in of.items() if keys == {"config": s.scale.config}), "base")
    large = list(of)[-1]
    rows = []
    for label, setting, keys, named in (
        (f"{own}-{count(total)}", "base", {}, ""),
        (f"{own}-{count(4 * total)}", f"steps-{4 * s.T}", {"plan.steps": str(4 * s.T), **s.scale.long}, ""),
        (
            f"{large}-{count(total)}",
            f"size-{large}",
            {k: v for k, v in of[large].items() if k != "config"},
            of[large]["config"],
        ),
    ):
        rows += three(
            s, label, {}, "table1_3", {"schedule": "cosine"}, setting, {**keys, "plan.schedule": "cosine"}, named
        )
    return Table("table11", "Table 11: downstream tasks, with more data and a larger model", s.columns, rows, [])


TABLES: dict[str, Callable[[Setup], Table]] = {
    "table1": table1,
    "fig4": fig4,
    "fig5": fig5,
    "table2": table2,
    "table3": table3,
    "table4": table4,
    "table5": table5,
    "table6": table6,
    "table7": table7,
    "table8": table8,
    "table10": table10,
    "table11": table11,
    "table12": table12,
    "table13": table13,
}
# Everything that paper makes, in the paper's order
ORDER = [
    "fig1",
    "fig2",
    "fig3",
    "table1",
    "fig4",
    "fig5",
    "table2",
    "table3",
    "table4",
    "table5",
    "table6",
    "table7",
    "table8",
    "table9",
    "fig6",
    "table10",
    "table11",
    "table12",
    "table13",
    "loss",
]
ORDER += [name for name in TABLES if name not in ORDER]
DOWNSTREAM = ("table4", "table11")  # whose numbers are not perplexities: downstream.py makes them
REWARM = "CPT is RewarmMax here, as the paper's numbers of its base setting say."


def table9(s: Setup) -> dict[str, Any]:
    """Table 9: the sizes of a scale, from their configs."""
    rows = []
    for size, given in s.scale.sizes.items():
        c = config.load(
            given.get("config", s.scale.config), {**s.overrides, **{k: v for k, v in given.items() if k != "config"}}
        )
        m = c.model
        rows.append(
            [size, f"{c.plan.max_lr:g}", f"{m.hidden:,}", str(m.n_head), str(m.n_layer), f"{model.parameters(m):,}"]
        )
    return {
        "name": "table9",
        "title": "Table 9: model sizes",
        "header": ["size", "max_lr", "hidden", "heads", "layers", "parameters"],
        "rows": rows,
    }


def count(n: float) -> str:
    """3,276,800 as 3.28M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:g}"
