"""The paper's tables, and ours beside them, in the paper's order. table.py says what a table is.

graph.py trains the points that the rows name, measure.py scores them, report.py prints them. To add a table, write a
function like those below and name it in ALL.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import schedule
from paper.beyond import beyond, decays, drift
from paper.scales import Point, Run, Setting, Setup
from paper.table import (
    BASE,
    COSINE,
    MEAN,
    MIXED,
    NAMES,
    PAIRS,
    Claim,
    Row,
    Table,
    averaging,
    below,
    count,
    decay,
    gap_widens,
    groups,
    minus,
    ours_is_best,
    paradigm_rows,
    printed,
    schedule_rows,
)

VARIANTS = {"rewarm_max": "RewarmMax", "reset_max": "ResetMax", "keep_min": "KeepMin"}
MAIN = ("cosine", "knee", "multistep")  # the paper's schedules
ALPHAS = (0.2, 0.4, 0.6, 0.8)
CYCLES = (1, 2, 3, 4, math.inf)  # Figures 4 and 5: length of the cosine cycle in T
REWARM = "CPT is RewarmMax here, as the paper's numbers of its base setting say."


# ---- The tables, in the paper's order --------------------------------------------------------------------------------


def table1(s: Setup) -> Table:
    rows = [r for r in schedule_rows(s, "table1_3") if r.name != "Ours"]
    return Table("table1", "Table 1: PTFS against CPT", s.columns, rows, gap_widens(rows, s.columns), [("CPT", "PTFS")])


def fig4(s: Setup) -> Table:
    title = "Figure 4: the learning rate of the first stage, and what becomes of it"
    rows = cycle_rows(s, first_stage)
    pairs = list(itertools.pairwise(r.name for r in rows))
    worse = {f"{a} to {b}": minus("", a, b, "initialization") for a, b in pairs}
    better = {f"{a} to {b}": minus("", b, a, "updated") for a, b in pairs}
    text = "a longer cycle, so a larger learning rate at the end, makes the first stage worse"
    claims = [Claim(text, worse), Claim("a longer cycle makes the updated model better", better)]
    return Table("fig4", title, ["initialization", "updated"], rows, claims)


def fig5(s: Setup) -> Table:
    rows = cycle_rows(s, second_stage)
    best = {r.name: minus("", rows[0].name, r.name, "updated") for r in rows[1:]}
    claim = Claim("a complete decay in the second stage is best", best)
    return Table("fig5", "Figure 5: the learning rate of the second stage", ["updated"], rows, [claim])


def cycle_rows(s: Setup, points: Callable[[Setup, float], dict[str, Point]]) -> list[Row]:
    """A row for each length of the cosine cycle: k*T, of which only T steps are trained."""
    label = {k: "inf" if k == math.inf else f"{round(k * s.T):,}" for k in CYCLES}
    return [Row("", label[k], {"cosine cycle (steps)": label[k]}, points(s, k)) for k in CYCLES]


def first_stage(s: Setup, k: float) -> dict[str, Point]:
    """Version 1 under a cosine cycle of k*T cut at T, and the model after T more steps with a complete decay."""
    if k == math.inf:  # constant after the warm-up: the main path
        updated = second_stage(s, 1)["updated"]
        return {"initialization": Point(updated.run, 0, at=s.T), "updated": updated}
    cycle = COSINE | ({"plan.cycle": str(round(k * s.T))} if k > 1 else {})
    # one version: PTFS would cut the cycles of its later versions as well
    first = Run("ptfs", Setting(keys={**cycle, "plan.versions": "1"}))
    return {"initialization": Point(first, 1), "updated": Point(Run("cpt", Setting(keys=cycle)), 2)}


def second_stage(s: Setup, k: float) -> dict[str, Point]:
    """T steps of the main path, then a cosine cycle of k*T cut after T steps."""
    increments = {"plan.increments": str(2 * s.T), "data.increments": ",".join([str(s.T)] * s.N)}
    cycle = {} if k == 1 else {"plan.cycle": "inf" if k == math.inf else str(round(k * s.T))}
    return {"updated": Point(Run("ours", Setting(keys=COSINE | increments | decay(s.T) | cycle)), 1)}


def table2(s: Setup) -> Table:
    rows = []
    for name, alpha in itertools.product(s.schedules, ALPHAS):
        run = Run("ours", Setting(keys={"plan.schedule": name, **decay(schedule.round_half_up(alpha, s.T))}))
        labels = {"schedule": name, "alpha": str(alpha)}
        paper = printed(s.columns, "table2_alpha", schedule=name, alpha=alpha)
        costs = {"cost as in Table 2": s.cost(run, "table2"), "as in section 3.2": s.cost(run)}
        rows.append(Row(name, f"alpha {alpha}", labels, s.versions(run), paper, costs))
    claims = [
        below("alpha 0.6 is at most 1% above alpha 0.8", s.schedules, s.columns, "alpha 0.6", "alpha 0.8", 1.01),
        below("alpha 0.6 is below alpha 0.2", s.schedules, s.columns, "alpha 0.6", "alpha 0.2"),
    ]
    pairs = [(f"alpha {a}", "alpha 0.6") for a in (0.2, 0.4, 0.8)]
    return Table("table2", "Table 2: alpha, the length of a branch", s.columns, rows, claims, pairs)


def table3(s: Setup) -> Table:
    rows = schedule_rows(s, "table1_3")
    claims = ours_is_best(rows, s.columns) + gap_widens(rows, s.columns)
    rows = [r for n in s.schedules for r in (*(r for r in rows if r.group == n), averaging(s, n, {"schedule": n}))]
    return Table("table3", "Table 3: the three paradigms", s.columns, rows, claims, [*PAIRS, (MEAN, "Ours")])


def table4(s: Setup) -> Table:
    rows = [*paradigm_rows(s, {}, Setting(keys=COSINE)), averaging(s, "", {})]
    return Table("table4", "Table 4: downstream tasks", s.columns, rows)


def table5(s: Setup) -> Table:
    title = "Table 5: another architecture, Qwen (biases on q, k and v)"
    rows = schedule_rows(s, "table5_qwen_1.2b", Setting("qwen", {"model.qkv_bias": "true"}))
    return Table("table5", title, s.columns, rows, ours_is_best(rows, s.columns), PAIRS)


def table6(s: Setup) -> Table:
    rows = []
    for size, of in s.scale.sizes.items():
        setting = replace(of, keys={**of.keys, **COSINE})
        rows += paradigm_rows(s, {"size": size}, setting, "rewarm_max", table="table6_model_size_cosine", size=size)
    return Table("table6", "Table 6: model sizes", s.columns, rows, ours_is_best(rows, s.columns), PAIRS, [REWARM])


def table7(s: Setup) -> Table:
    rows = []
    for part, total in ((0.5, "21B"), (1.0, "42B"), (4.0, "168B")):
        T = schedule.round_half_up(part, s.T)
        keys = COSINE if part == 1 else {**COSINE, "plan.steps": str(T), **(s.scale.long if part > 1 else {})}
        setting = Setting("base" if part == 1 else f"steps-{T}", keys)
        labels = {"data": f"{count(T * s.N * s.base.train.batch_tokens)} tokens"}
        rows += paradigm_rows(s, labels, setting, table="table7_data_size_cosine", tokens_total=total)
    return Table("table7", "Table 7: data sizes", s.columns, rows, ours_is_best(rows, s.columns), PAIRS)


def table8(s: Setup) -> Table:
    rows = []
    for max_lr in ("5e-5", "1e-4", "3e-4", "5e-4", "8e-4"):
        lr = f"{s.base.plan.max_lr * float(max_lr) / 3e-4:.3g}"
        other = Setting(f"lr-{lr}", {**COSINE, "plan.max_lr": lr}, derived=("plan.max_lr",))
        setting = Setting(keys=COSINE) if max_lr == "3e-4" else other
        rows += paradigm_rows(s, {"max_lr": lr}, setting, "rewarm_max", table="table8_max_lr_cosine", max_lr=max_lr)
    claims = ours_is_best(rows, s.columns)
    return Table("table8", "Table 8: maximal learning rates", s.columns, rows, claims, PAIRS, [REWARM])


def table9(s: Setup) -> dict[str, Any]:
    """The record of Table 9, the sizes of a scale: from their configs, since nothing is trained for it."""
    rows = []
    for size, run in from_plans(s, "table9").items():
        c = s.config(run, s.base.train.seed)
        shape = (c.model.hidden, c.model.n_head, c.model.n_layer, c.model.parameters)
        rows.append([size, f"{c.plan.max_lr:g}", *(f"{n:,}" for n in shape)])
    header = "size max_lr hidden heads layers parameters".split()
    return {"name": "table9", "title": "Table 9: model sizes", "header": header, "rows": rows}


def table10(s: Setup) -> Table:
    rows = []
    for name, (variant, title) in itertools.product(s.schedules, VARIANTS.items()):
        run = Run("cpt", Setting(keys={"plan.schedule": name, "plan.cpt_variant": variant}))
        paper = printed(s.columns, "table10_cpt_variants", schedule=name, variant=variant)
        rows.append(Row(name, title, {"schedule": name, "variant": title}, s.versions(run), paper))
    others = ("RewarmMax", "KeepMin")
    claims = [below(f"ResetMax is below {n}", s.schedules, s.columns, "ResetMax", n) for n in others]
    pairs = [(n, "ResetMax") for n in others]
    return Table("table10", "Table 10: variants of CPT", s.columns, rows, claims, pairs)


def table11(s: Setup) -> Table:
    total = s.T * s.N * s.base.train.batch_tokens
    own = next((size for size, setting in s.scale.sizes.items() if setting == BASE), "base")
    large, of = list(s.scale.sizes.items())[-1]
    long = {"plan.steps": str(4 * s.T), **s.scale.long, **COSINE}
    rows = [
        *paradigm_rows(s, {"scale": f"{own}-{count(total)}"}, Setting(keys=COSINE)),
        *paradigm_rows(s, {"scale": f"{own}-{count(4 * total)}"}, Setting(f"steps-{4 * s.T}", long)),
        *paradigm_rows(s, {"scale": f"{large}-{count(total)}"}, replace(of, keys={**of.keys, **COSINE}), "rewarm_max"),
    ]
    title = "Table 11: downstream tasks, with more data and a larger model"
    return Table("table11", title, s.columns, rows, notes=[f"CPT of {large} is RewarmMax, Table 6's."])


def table12(s: Setup) -> Table:
    rows = []
    unique = max(1, s.T // 2)  # one set of T/2 steps for all versions
    for alpha in ALPHAS[:3]:
        d = schedule.round_half_up(alpha, s.T)
        for paradigm, later, folder in (("cpt", s.T + d, f"small-set-{s.T + d}"), ("ours", s.T, "small-set")):
            T = [s.T] + [later] * (s.N - 1)  # so that both take N T + (N - 1) d steps
            lengths = {"data.unique": unique, "plan.increments": ",".join(map(str, T)), "data.increments": sum(T)}
            keys = COSINE | {k: str(v) for k, v in lengths.items()} | (decay(d) if paradigm == "ours" else {})
            run, name = Run(paradigm, Setting(folder, keys)), NAMES[paradigm]
            labels = {"alpha": str(alpha), "paradigm": name, "steps of an update": f"{later:,}"}
            paper = printed(s.columns, "table12_equal_cost_5.25B", alpha=alpha, paradigm=paradigm)
            rows.append(Row(f"alpha {alpha}", name, labels, s.versions(run), paper))
    claim = below("at equal cost, ours is below CPT", groups(rows), s.columns, "Ours", "CPT")
    note = f"One set of {count(unique * s.base.train.batch_tokens)} tokens, read again and again."
    return Table("table12", "Table 12: CPT and ours at equal cost", s.columns, rows, [claim], [("Ours", "CPT")], [note])


def table13(s: Setup) -> Table:
    """Two versions. PTFS's and ours are Table 3's, since a branch keeps its length; only CPT's is another run."""
    title = "Table 13: a second increment as long as the first, twice and three times as long"
    columns = {f"1:{k}": k + 1 for k in range(1, s.N)}  # the version of Table 3
    sizes = {"1:1": "10.5B", "1:2": "21.0B", "1:3": "31.5B"}  # of the second increment in the paper
    rows = []
    for paradigm, name in NAMES.items():
        base = Run(paradigm, Setting(keys=COSINE))
        points = {c: Point(base, v) for c, v in columns.items()}
        for c, v in list(columns.items())[1:] if paradigm == "cpt" else []:
            increments = {"plan.increments": f"{s.T},{(v - 1) * s.T}", "data.increments": ",".join([str(s.T)] * v)}
            run = Run("cpt", Setting(f"increments-1-{v - 1}", {**COSINE, **increments}), parent=base)
            points[c] = Point(run, 2)
        paper = printed(list(sizes.values()), "table13_unequal_increments", paradigm=paradigm)
        here = {c: paper[size] for c, size in sizes.items() if c in columns and size in paper}
        rows.append(Row("", name, {"paradigm": name}, points, here))
    return Table("table13", title, list(columns), rows, ours_is_best(rows, list(columns), 1.0), PAIRS)


# ---- Choices that the paper does not measure, or prints no numbers of ------------------------------------------------


def order(s: Setup) -> Table:
    shuffled = Setting("shuffled", {**COSINE, "data.order": "shuffled"})
    runs = {NAMES[x]: Run(x, Setting(keys=COSINE)) for x in ("ptfs", "ours")} | {MIXED: Run("ptfs", shuffled)}
    rows = [Row("", n, {"paradigm": n}, s.versions(r), costs={"cost": s.cost(r)}) for n, r in runs.items()]
    claim = below("ours is below PTFS or within 2% of it, shuffled too", [""], s.columns, "Ours", MIXED, 1.02)
    title = "Order of the data: PTFS reads old increments before new ones, or all mixed (no table of the paper)"
    return Table("order", title, s.columns, rows, [claim], [(MIXED, "PTFS"), ("Ours", MIXED)])


def moments(s: Setup) -> Table:
    rows, key = [], "train.reset_moments"
    for paradigm, name in list(NAMES.items())[1:]:
        kept = Run(paradigm, Setting(keys={**COSINE, key: "false"}))
        reset = Run(paradigm, Setting("reset-moments", {**COSINE, key: "true"}), parent=kept)
        for how, run in (("kept", kept), ("reset", reset)):
            rows.append(Row(name, how, {"paradigm": name, "moments": how}, s.versions(run)))
    parts = {c: {("Ours", "reset", c): 1.0, ("CPT", "reset", c): -1.0} for c in s.columns}
    claim = Claim("ours is below CPT, with moments reset too", parts)
    title = "AdamW's moments: kept or reset where branches and CPT's versions begin (no table of the paper)"
    return Table("moments", title, s.columns, rows, [claim], [("reset", "kept")])


def footnote2(s: Setup) -> Table:
    others = ("constant", "inverse_sqrt")
    runs = {n: Run("ptfs", Setting(keys={"plan.schedule": n})) for n in (*s.schedules, *others)}
    rows = [Row("", n, {"schedule": n}, s.versions(run)) for n, run in runs.items()]
    pairs = [(b, a) for b in others for a in s.schedules if a not in others]
    claims = [below(f"{a} is below {b}", [""], s.columns, a, b) for b, a in pairs]
    title = "Footnote 2: PTFS under constant and inverse square root rates (the paper prints no numbers)"
    return Table("footnote2", title, s.columns, rows, claims, pairs)


ALL = (table1, fig4, fig5, table2, table3, table4, table5, table6, table7, table8, table10, table11, table12, table13)
TABLES: dict[str, Callable[[Setup], Table]] = {
    f.__name__: f for f in (*ALL, order, moments, footnote2, beyond, decays, drift)
}
DOWNSTREAM = ("table4", "table11")  # their numbers are scores of tasks, not perplexities: downstream.py makes them
DRAWN_FROM = {"fig2": "table3", "loss": "table3"}
# All tables and figures, in the paper's order
ORDER = "fig1 fig2 fig3 table1 fig4 fig5 table2 table3 table4 table5".split()
ORDER += "table6 table7 table8 table9 fig6 table10 table11 table12 table13 loss".split()
ORDER += [name for name in TABLES if name not in ORDER]


def from_plans(s: Setup, name: str) -> dict[str, Run]:
    """The runs whose plans alone make Figures 1, 3 and 6 and Table 9, by paradigm, schedule, variant or size."""
    of: dict[str, dict[str, Run]] = {
        "fig1": {x: Run(x) for x in schedule.PARADIGMS},
        "fig3": {x: Run("ptfs", Setting(keys={"plan.schedule": x})) for x in s.schedules},
        "fig6": {title: Run("cpt", Setting(keys={"plan.cpt_variant": v})) for v, title in VARIANTS.items()},
        "table9": {size: Run("ptfs", setting) for size, setting in s.scale.sizes.items()},
    }
    return of.get(name, {})


def overruled(s: Setup, name: str) -> list[str]:
    """Keys of the command line that a table or figure sets itself, a line each: it would ignore what was given."""
    name = DRAWN_FROM.get(name, name)
    points = [p for r in TABLES[name](s).rows for p in (*r.points.values(), *r.also)] if name in TABLES else []
    runs = [p.run for p in points] or from_plans(s, name).values()
    lines = []
    for k, v in {k: v for run in runs for k, v in s.overruled(run).items()}.items():
        choose = "choose those to compare with --schedules, " * (k == "plan.schedule")
        lines.append(f"{k}: got {s.overrides[k]}, but {name} sets {v}; {choose}leave it out, or ask for other tables")
    return lines
