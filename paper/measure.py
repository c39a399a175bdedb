"""From checkpoints to a table's numbers: PPL, means and spreads over seeds, paired differences, verdicts."""

import itertools
import json
import lzma
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import config
import eval as evaluation
from paper import beyond, tables
from paper.graph import Request, trained
from paper.table import Cell, Claim, Factors, minus
from text import prepare, token_files

# Student's t, 97.5 %, for 1, 2, .. degrees of freedom
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
Scores = dict[Cell, list[evaluation.Score]]  # one a seed


def combine(found: Scores, factors: Factors) -> tuple[float, float | None]:
    """A sum of PPLs times factors, and its standard error: over seeds, paired; with one seed, over documents."""
    seeds = range(len(next(iter(found.values()))))
    values = [sum(f * found[k][i].ppl for k, f in factors.items()) for i in seeds]
    if len(values) > 1:
        return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    return values[0], evaluation.standard_error(np.sum([f * found[k][0].influence for k, f in factors.items()], axis=0))


def on_texts(where: dict[Cell, list[Path]], texts: dict[str, list[str]], device: Any, jobs: int) -> Scores:
    """Scores of cells whose columns are texts, or means over some: of these each has the same weight."""
    paths = sorted({p for of_seeds in where.values() for p in of_seeds})
    names = dict.fromkeys(name for of in texts.values() for name in of)
    known = {name: evaluation.scores(paths, device, evaluation.Text(name=name), jobs) for name in names}

    def mean(path: Path, of: list[str]) -> evaluation.Score:
        parts = [known[name][path] for name in of]
        total = sum(s.tokens.sum() for s in parts)
        weights = [total / (len(of) * s.tokens.sum()) for s in parts]
        nats, tokens = ([getattr(s, k) * w for s, w in zip(parts, weights, strict=True)] for k in ("nats", "tokens"))
        return evaluation.Score(np.concatenate(nats), np.concatenate(tokens))

    return {cell: [mean(p, texts[cell[2]]) for p in of_seeds] for cell, of_seeds in where.items()}


def prepare_drift(folder: Path) -> None:
    """The text that ships, English, an increment a kind; a part of each is held out."""
    there = len(token_files.read_meta(folder)["increments"]) if folder.exists() else 0
    with tempfile.TemporaryDirectory() as scratch:
        of = {kind: Path(scratch) / f"{kind}.jsonl" for kind in beyond.KINDS}
        with lzma.open(prepare.TEXT, "rt", encoding="utf-8") as f:
            for line in f if there < len(of) else ():
                if (record := json.loads(line))["lang"] == "en":
                    with open(of[record["domain"]], "a", encoding="utf-8") as g:
                        g.write(line)
        for i, file in list(enumerate(of.values()))[there:]:
            if i == 0:
                prepare.prepare(str(folder), [str(file)], increments=(1.0,))
            else:
                prepare.add(str(folder), [str(file)], val=0.05)


def judge(found: Scores, claim: Claim, seeds: int, paper: dict[Cell, float]) -> dict[str, Any]:
    """Does a claim hold? A difference is clear if it is further from zero than 95 % of chance would take it."""
    times = 1.96 if seeds == 1 else T975[min(seeds - 2, len(T975) - 1)]
    parts = []
    for where, factors in claim.below_zero.items():
        value, se = combine(found, factors)
        printed = sum(f * paper[k] for k, f in factors.items()) if factors.keys() <= paper.keys() else None
        verdict = {"holds": value < 0, "clear": se is not None and abs(value) > times * se}
        parts.append({"where": where, "value": value, "se": se, **verdict, "paper": printed})
    contradicted = any(p["clear"] and not p["holds"] for p in parts)
    holds = all(p["clear"] and p["holds"] for p in parts)
    return {"text": claim.text, "verdict": "FAILS" if contradicted else "HOLDS" if holds else "OPEN", "parts": parts}


def measure(t: tables.Table, found: Scores, seeds: list[int], columns: list[str]) -> dict[str, Any]:
    """The record of a table. `columns`: those of all versions, whose mean is APPL."""
    rows = []
    for r in t.rows:
        ppl = {c: [s.ppl for s in found[r.group, r.name, c]] for c in t.columns}
        mean = {c: statistics.fmean(v) for c, v in ppl.items()}
        sd = {c: statistics.stdev(v) for c, v in ppl.items() if len(v) > 1}
        row = {"group": r.group, "name": r.name, "labels": r.labels, "costs": r.costs, "paper": r.paper}
        appl = {"appl": statistics.fmean(mean.values())} if t.columns == columns else {}
        rows.append({**row, "ppl": mean, "seeds": ppl, "sd": sd, **appl})
    differences = []
    for group, (a, b) in itertools.product(tables.groups(t.rows), t.pairs):
        d: dict[str, Any] = {"group": group, "minus": [a, b], "value": {}, "se": {}, "relative": {}}
        for c in t.columns:
            d["value"][c], d["se"][c] = combine(found, minus(group, a, b, c))
            d["relative"][c] = d["value"][c] / statistics.fmean(s.ppl for s in found[group, b, c])
        differences.append(d)
    paper = {(r.group, r.name, c): v for r in t.rows for c, v in r.paper.items()}
    some = max((of_seeds[0] for of_seeds in found.values()), key=lambda s: len(s.nats))
    claims = [judge(found, c, len(seeds), paper) for c in t.claims if c.below_zero]
    table = {"name": t.name, "title": t.title, "columns": t.columns, "rows": rows, "differences": differences}
    measured = {"seeds": seeds, "documents": len(some.nats), "tokens": round(some.tokens.sum())}
    return {**table, "notes": t.notes, "claims": claims, **measured}


def provenance(request: Request, table: str) -> dict[str, Any]:
    """How the segments of a table were made: settings, devices, versions, commits, seconds of training."""
    nodes = request.nodes_of[table].values()
    logs = [node.log() for node in nodes]
    starts = [r for log in logs for r in log if "config" in r]
    made = {"scale": request.setup.scale.name, "config": config.values(request.setup.base), "segments": len(nodes)}
    return {
        **made,
        "steps": sum(node.steps for node in nodes),
        "seconds": sum(trained(log)[1] for log in logs),
        "devices": sorted({f"{r['device']} ({r['ranks']} rank{'s' * (r['ranks'] > 1)}, {r['dtype']})" for r in starts}),
        "versions": sorted({f"torch {r['versions']['torch']}, Python {r['versions']['python']}" for r in starts}),
        "commits": sorted({r["commit"][:12] + "+" * r["commit"].endswith("+") for r in starts if r["commit"]}),
        "date": time.strftime("%Y-%m-%d"),
    }
