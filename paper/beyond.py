"""Tables beyond the paper: averaging and its rivals, how long to decay, increments that differ in kind.

Their statements are ours. Each was written down before the runs that judge it.
"""

import math

import schedule
from paper.scales import Point, Run, Setting, Setup
from paper.table import (
    AVERAGING,
    COSINE,
    MEAN,
    MIXED,
    NAMES,
    NO_BRANCHES,
    Claim,
    Factors,
    Row,
    Table,
    below,
    decay,
    minus,
)


def beyond(s: Setup) -> Table:
    """Averaging and its rivals, all of which have read the same text when a version is released."""

    def from_mean(part: float, lr: float) -> Run:
        keys = {"plan.from_mean": "true", "plan.mean_lr": str(lr)}
        return Run("ours", Setting(keys={**COSINE, **decay(schedule.round_half_up(part, s.T)), **keys}))

    starts = {
        "Mean, branch of 0.1 T": from_mean(0.1, 1),
        "Mean, branch of 0.2 T": from_mean(0.2, 1),
        "Mean, branch of 0.2 T from 0.3 max LR": from_mean(0.2, 0.3),
        "Mean, branch of 0.2 T from 0.1 max LR": from_mean(0.2, 0.1),
        "Mean, main path from it": Run("average", Setting(keys={**NO_BRANCHES, "plan.from_mean": "true"})),
    }
    runs = {NAMES[x]: Run(x, Setting(keys=COSINE)) for x in NAMES} | {
        "WSD-S": Run("cpt", Setting(keys={**COSINE, "plan.cpt_variant": "wsd_s"})),
        "Ours, 1-sqrt": Run("ours", Setting(keys={"plan.schedule": "1-sqrt"})),
        MEAN: Run("average", AVERAGING),
        **starts,
        "Running mean": Run("average", Setting(keys={**NO_BRANCHES, "plan.average_points": "0"})),
    }
    rows = [Row("", n, {"paradigm": n}, s.versions(run), costs={"cost": s.cost(run)}) for n, run in runs.items()]
    claims = [
        *(below(f"averaging is below {n}", [""], s.columns, MEAN, n) for n in ("CPT", "PTFS", "WSD-S")),
        *(below(f"averaging is at most 1% above {n}", [""], s.columns, MEAN, n, 1.01) for n in ("Ours", *starts)),
        below("the running mean is at most 1% above averaging", [""], s.columns, "Running mean", MEAN, 1.01),
    ]
    pairs = [(n, MEAN) for n in runs if n != MEAN]
    title = "Beyond the paper: averaging and its rivals (no table of the paper, and the statements are ours)"
    return Table("beyond", title, s.columns, rows, claims, pairs)


def decays(s: Setup) -> Table:
    """Branches of each length, and branches that grow with the version: a part of all steps so far."""
    lengths = {f"alpha {tenths / 10}": [schedule.round_half_up(tenths / 10, s.T)] for tenths in range(1, 9)}
    for part in (0.25, 0.3):  # at 30 % four versions cost what they do at alpha 0.6
        lengths[f"{part:.0%}"] = [schedule.round_half_up(part * i, s.T) for i in range(1, s.N + 1)]
    rows = []
    for name, steps in lengths.items():
        keys = {**COSINE, "plan.alpha": "none", "plan.decay_steps": ",".join(map(str, steps))}
        run = Run("ours", Setting(keys=keys))
        labels = {"branches": f"{name} of all steps" if len(steps) > 1 else name, "steps": ", ".join(map(str, steps))}
        rows.append(Row("", name, labels, {"V1": Point(run, 1), **s.versions(run)}, costs={"cost": s.cost(run)}))
    columns, usual = ["V1", *s.columns], "alpha 0.6"
    claims = [
        below(f"{part} of all steps is below {usual}", [""], s.columns[1:], part, usual) for part in ("25%", "30%")
    ]
    means = {f"mean of {columns[0]}..{columns[-1]}": mean_minus(columns, "30%", usual)}
    claims.append(Claim(f"30% of all steps is below {usual} in the mean, at equal cost", means))
    title = "Decays: how long a branch should be (no table of the paper, and the statements are ours)"
    return Table("decays", title, columns, rows, claims, [(n, usual) for n in lengths if n != usual])


def mean_minus(columns: list[str], a: str, b: str) -> Factors:
    """The mean PPL of row `a` minus that of row `b`."""
    parts = (minus("", a, b, c) for c in columns)
    return {cell: factor / len(columns) for part in parts for cell, factor in part.items()}


KINDS = ("books", "wiki", "code", "web")  # increments of `drift`
REPLAY = ("0.05", "0.1", "0.25", "0.5", "0.75")
DRIFT = {**COSINE, "data.path": "data/drift", "plan.steps": "160", "plan.warmup": "32", "plan.versions": "4"}


def drift(s: Setup) -> Table:
    """The last of four increments that differ in kind: its text against those of before, by replay."""

    def replaying(paradigm: str, part: str, keys: dict[str, str], parent: Run | None = None) -> Run:
        name = "drift" if part == "0" else f"drift-{part}"
        keys = {**DRIFT, "data.replay": part, **keys}
        return Run(paradigm, Setting(name, keys, derived=(*DRIFT, *NO_BRANCHES)), parent)

    first = Run("ptfs", Setting("drift", DRIFT, derived=tuple(DRIFT)))
    shuffled = Setting("drift-shuffled", {**DRIFT, "data.order": "shuffled"}, derived=tuple(DRIFT))
    runs = {("PTFS", "0"): first, (MIXED, "-"): Run("ptfs", shuffled)}
    B = s.base.batch_sequences  # a part that is no whole row of a batch is left out
    for part in ("0", *(part for part in REPLAY if 0 < schedule.round_half_up(float(part), B) < B)):
        runs["CPT", part] = replaying("cpt", part, {}, first if part != "0" else None)
        runs["Ours", part] = replaying("ours", part, {})
        for window in (0.1, 0.2, 0.3):
            keys = {**NO_BRANCHES, "plan.average": str(window)}
            runs[f"Average, {window:.0%}", part] = replaying("average", part, keys)
    if ("Ours", "0.5") in runs and ("Ours", "0.25") in runs:
        keys = {**DRIFT, "data.replay": "0.25", "data.replay_branch": "0.5"}
        more = Setting("drift-0.25-branch-0.5", keys, derived=tuple(DRIFT))
        runs["Ours", "0.25, branch 0.5"] = Run("ours", more, runs["Ours", "0.25"])

    old, new = ["val", "val-v2", "val-v3"], "val-v4"
    texts = {kind: [text] for kind, text in zip(KINDS, (*old, new), strict=True)}
    texts |= {"mean of old": old, "mean of all": [*old, new]}
    rows = []
    for (name, part), run in runs.items():
        labels, points = {"paradigm": name, "replay": part}, dict.fromkeys(texts, Point(run, 4))
        rows.append(Row("", f"{name} {part}", labels, points, costs={"cost": s.cost(run)}))
    best, claims = f"{MIXED} -", []
    for name in ("PTFS", "CPT", "Ours", "Average, 20%"):
        text = f"{name} without replay forgets: PTFS shuffled is below it on old text"
        claims.append(below(text, [""], ["mean of old"], best, f"{name} 0"))
    for part in ("0.25", "0.5"):
        if (mean := f"Average, 20% {part}") in (row.name for row in rows):
            near = f"averaging 20% with replay {part} is within .05 nats of PTFS shuffled"
            claims.append(below(near, [""], ["mean of all"], mean, best, math.exp(0.05)))
            claims.append(below("and below it on the new text", [""], [KINDS[-1]], mean, best))
    title = "Drift: increments of four kinds of text, version 4 (no table of the paper, and the statements are ours)"
    note = (
        f"mean of ..: exp of the mean nats a token over texts of these kinds, held out. Increments: {', '.join(KINDS)}."
    )
    return Table("drift", title, list(texts), rows, claims, [], [note], texts)
