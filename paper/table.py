"""A table as data: rows of runs, the numbers that the paper prints for them, and claims about them."""

import itertools
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from paper.scales import Point, Run, Setting, Setup

PAPER = json.loads((Path(__file__).parent.parent / "results" / "paper.json").read_text(encoding="utf-8"))
NAMES = {"ptfs": "PTFS", "cpt": "CPT", "ours": "Ours"}
MIXED, MEAN = "PTFS, shuffled", "Average"
PAIRS = [("Ours", "CPT"), ("Ours", "PTFS"), ("CPT", "PTFS")]
COSINE = {"plan.schedule": "cosine"}
BASE = Setting()
NO_BRANCHES = {"plan.decay_steps": "none", "plan.alpha": "0"}  # so the main path goes on to the last version's end
AVERAGING = Setting(keys=NO_BRANCHES, derived=tuple(NO_BRANCHES))

Cell = tuple[str, str, str]  # of a table: group, name of the row, column
Factors = dict[Cell, float]  # a sum of perplexities, each times its factor


@dataclass(frozen=True)
class Row:
    group: str  # rows that are compared with each other
    name: str  # of the row in its group
    labels: dict[str, str]  # the first columns
    points: dict[str, Point]  # by column
    paper: dict[str, float] = field(default_factory=dict)  # the PPL that the paper prints, by column
    costs: dict[str, float] = field(default_factory=dict)  # steps relative to PTFS, by way of counting
    also: tuple[Point, ...] = ()  # counted in the costs, but not printed


@dataclass(frozen=True)
class Claim:
    """A statement of the paper: weighted sums of perplexities that it says are below zero."""

    text: str
    below_zero: dict[str, Factors]  # by the place in the table


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    columns: list[str]
    rows: list[Row]
    claims: list[Claim] = field(default_factory=list)
    pairs: list[tuple[str, str]] = field(default_factory=list)  # differences to print in each group
    notes: list[str] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)  # by column: texts whose mean it is; none: validation


def printed(columns: list[str], table: str, **row: Any) -> dict[str, float]:
    """The numbers that the paper prints in these columns of a table, in the row that has these values."""
    found: dict[str, Any] = next((r for r in PAPER[table] if r.items() >= row.items()), {})
    return {c: found[c] for c in columns if c in found}


def groups(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(r.group for r in rows))


def paradigm_rows(s: Setup, labels: dict[str, str], setting: Setting, cpt_variant: str = "", **paper: Any) -> list[Row]:
    """A group of PTFS, CPT and ours under one setting. `paper`: where the paper prints them, as in `printed`."""
    rows = []
    for paradigm, name in NAMES.items():
        variant = {"plan.cpt_variant": cpt_variant} if paradigm == "cpt" and cpt_variant else {}
        run = Run(paradigm, replace(setting, keys={**setting.keys, **variant}))
        group, labelled = " ".join(labels.values()), {**labels, "paradigm": name}
        theirs = printed(s.columns, **paper, paradigm=paradigm) if paper else {}
        rows.append(Row(group, name, labelled, s.versions(run), theirs, {"cost": s.cost(run)}, (Point(run, 1),)))
    return rows


def schedule_rows(s: Setup, table: str, setting: Setting = BASE) -> list[Row]:
    """`paradigm_rows` of each schedule."""
    rows = []
    for name in s.schedules:
        keys = {"plan.schedule": name, **setting.keys}
        rows += paradigm_rows(s, {"schedule": name}, replace(setting, keys=keys), table=table, schedule=name)
    return rows


def decay(steps: int) -> dict[str, str]:
    """The keys of branches so many steps long."""
    return {"plan.decay_steps": str(steps), "plan.alpha": "none"}


# ---- Claims ----------------------------------------------------------------------------------------------------------


def minus(group: str, a: str, b: str, column: str, times: float = 1.0) -> Factors:
    """The PPL of row `a` minus `times` that of row `b`."""
    return {(group, a, column): 1.0, (group, b, column): -times}


def below(text: str, groups: list[str], columns: list[str], a: str, b: str, times: float = 1.0) -> Claim:
    """In each group and column, the PPL of row `a` is below `times` that of row `b`."""
    return Claim(text, {f"{g} {c}".strip(): minus(g, a, b, c, times) for g in groups for c in columns})


def ours_is_best(rows: list[Row], columns: list[str], beside_ptfs: float = 1.02) -> list[Claim]:
    near = "ours is below PTFS" + (f" or within {beside_ptfs - 1:.0%} of it" if beside_ptfs > 1 else "")
    against_cpt = below("ours is below CPT", groups(rows), columns, "Ours", "CPT")
    return [against_cpt, below(near, groups(rows), columns, "Ours", "PTFS", beside_ptfs)]


def gap_widens(rows: list[Row], columns: list[str]) -> list[Claim]:
    """PTFS is below CPT, the more so the later the version."""
    gaps: dict[str, Factors] = {}
    for (a, b), g in itertools.product(itertools.pairwise(columns), groups(rows)):
        gaps[f"{g} {a} to {b}"] = minus(g, "CPT", "PTFS", a) | {(g, "CPT", b): -1.0, (g, "PTFS", b): 1.0}
    worse = below("PTFS is below CPT", groups(rows), columns, "PTFS", "CPT")
    return [worse, Claim("the gap between CPT and PTFS widens with the version", gaps)]


def averaging(s: Setup, group: str, labels: dict[str, str]) -> Row:
    """The row of averaging, which is not the paper's: of the main path, so it is the same under all schedules."""
    run = Run("average", AVERAGING)
    return Row(
        group, MEAN, {**labels, "paradigm": "Average (not the paper's)"}, s.versions(run), {}, {"cost": s.cost(run)}
    )


def count(n: float) -> str:
    """3,276,800 as 3.28M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:g}"
