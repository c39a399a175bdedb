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
DRIFT = {**COSINE, "data.path": "data/drift", "plan.steps": "160", "plan.warmup": "32", "plan.versions": "4"}


def drift(s: Setup) -> Table:
    """The last of four increments that differ in kind: its text against those of before, by replay."""
    rows = []
    shuffled = Run("ptfs", Setting("drift-shuffled", {**DRIFT, "data.order": "shuffled"}, derived=tuple(DRIFT)))
    runs = {("PTFS", "0"): Run("ptfs", Setting("drift", DRIFT, derived=tuple(DRIFT))), (MIXED, "-"): shuffled}
    B = s.base.batch_sequences  # a share that is no whole row of a batch is left out
    for replay in ("0", *(part for part in ("0.05", "0.1", "0.25") if 0 < schedule.round_half_up(float(part), B) < B)):
        name, keys = f"drift-{replay}" if replay != "0" else "drift", {**DRIFT, "data.replay": replay}
        of: dict[str, tuple[str, dict[str, str]]] = {"CPT": ("cpt", {}), "Ours": ("ours", {})}
        of |= {f"Average, {w}%": ("average", {**NO_BRANCHES, "plan.average": str(w / 100)}) for w in (10, 20, 30)}
        first = runs["PTFS", "0"]
        for row, (paradigm, more) in of.items():
            setting = Setting(name, {**keys, **more}, derived=(*DRIFT, *NO_BRANCHES))
            runs[row, replay] = Run(paradigm, setting, parent=first if paradigm == "cpt" and name != "drift" else None)
    texts = {k: [text] for k, text in zip(KINDS, ("val", "val-v2", "val-v3", "val-v4"), strict=True)}
    texts |= {"mean of old": ["val", "val-v2", "val-v3"], "mean of all": ["val", "val-v2", "val-v3", "val-v4"]}
    for (n, replay), run in runs.items():
        labels = {"paradigm": n, "replay": replay}
        points = dict.fromkeys(texts, Point(run, 4))
        rows.append(Row("", " ".join(labels.values()), labels, points, costs={"cost": s.cost(run)}))
    best, columns = f"{MIXED} -", list(texts)
    claims = [
        below(
            f"{n} without replay forgets: PTFS shuffled is below it on old text", [""], ["mean of old"], best, f"{n} 0"
        )
        for n in ("PTFS", "CPT", "Ours", "Average, 20%")
    ]
    mean = "Average, 20% 0.25"
    near = "averaging 20 % with replay 25 % is within .05 nats of PTFS shuffled"
    claims += [below(near, [""], ["mean of all"], mean, best, math.exp(0.05))]
    claims += [below("and below it on the new text", [""], ["web"], mean, best)]
    title = "Drift: increments of four kinds of text, version 4 (no table of the paper, and the statements are ours)"
    note = "mean of ..: exp of the mean nats a token over texts of these kinds, held out. Increments: " + ", ".join(
        KINDS
    )
    return Table("drift", title, columns, rows, claims, [], [f"{note}."], texts)
