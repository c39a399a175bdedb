"""Statements of the paper as data: weighted sums of perplexities that it says are below zero."""

import itertools
from dataclasses import dataclass

Cell = tuple[str, str, str]  # of a table: group, name of the row, column
Factors = dict[Cell, float]  # a sum of perplexities, each times its factor


@dataclass(frozen=True)
class Claim:
    text: str
    below_zero: dict[str, Factors]  # by the place in the table


def minus(group: str, a: str, b: str, column: str, times: float = 1.0) -> Factors:
    """The PPL of row `a` minus `times` that of row `b`."""
    return {(group, a, column): 1.0, (group, b, column): -times}


def below(text: str, groups: list[str], columns: list[str], a: str, b: str, times: float = 1.0) -> Claim:
    """In each group and column, the PPL of row `a` is below `times` that of row `b`."""
    return Claim(text, {f"{g} {c}".strip(): minus(g, a, b, c, times) for g in groups for c in columns})


def ours_is_best(groups: list[str], columns: list[str], beside_ptfs: float = 1.02) -> list[Claim]:
    near = f"ours is below PTFS or within {beside_ptfs - 1:.0%} of it" if beside_ptfs > 1 else "ours is below PTFS"
    against_cpt = below("ours is below CPT", groups, columns, "Ours", "CPT")
    return [against_cpt, below(near, groups, columns, "Ours", "PTFS", beside_ptfs)]


def gap_widens(groups: list[str], columns: list[str]) -> list[Claim]:
    """PTFS is below CPT, the more so the later the version."""
    gaps = {
        f"{g} {a} to {b}": {**minus(g, "CPT", "PTFS", a), (g, "CPT", b): -1.0, (g, "PTFS", b): 1.0}
        for a, b in itertools.pairwise(columns)
        for g in groups
    }
    worse = below("PTFS is below CPT", groups, columns, "PTFS", "CPT")
    return [worse, Claim("the gap between CPT and PTFS widens with the version", gaps)]
