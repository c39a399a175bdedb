"""The state of a graph's nodes on the disk: what is done, how far a running segment is, and what the logs record."""

import json
import lzma
import os
import time
from pathlib import Path
from typing import Any

import config
import schedule
from paper.graph import Graph, Request
from runtime import checkpoint, resume
from runtime.files import is_locked
from runtime.logger import read_log


def saved(root: Path, name: str, step: int) -> bool:
    return (checkpoint.path(root / name, step) / "meta.json").exists()


def done(nodes: Graph, root: Path, name: str) -> bool:
    return all(saved(root, name, step) for step in nodes[name].required)


def at_work(root: Path, name: str) -> bool:
    """Does a process train this node now?"""
    return is_locked(root / name / ".lock")


def reached(nodes: Graph, root: Path, name: str) -> int:
    """Steps of a node that need not be trained again."""
    node, folder = nodes[name], root / name
    if done(nodes, root, name):
        return node.steps
    if at_work(root, name):
        return progress(folder, node.segment)
    return (resume.resume_step(folder, sorted(node.required)) or node.segment.start) - node.segment.start


def left(nodes: Graph, root: Path) -> tuple[list[str], float, float]:
    """The nodes that are not done, parents first; their steps and FLOPs that are left."""
    todo = [n for n in nodes if not done(nodes, root, n)]
    parts = {n: 1 - reached(nodes, root, n) / nodes[n].steps for n in todo}
    return todo, sum(nodes[n].steps * parts[n] for n in todo), sum(nodes[n].flops * parts[n] for n in todo)


def check_lineage(nodes: Graph, root: Path) -> None:
    """Every checkpoint there must be one that these settings would make: a table never mixes two. UserError if not."""
    for name, node in nodes.items():
        for step in checkpoint.steps(root / name):
            if step <= node.segment.end:
                where = checkpoint.path(root / name, step)
                resume.check_lineage(where, node.config, node.segment, node.tokens)


def records(folder: Path) -> list[dict[str, Any]]:
    """The log of a segment, empty if there is none yet."""
    return read_log(folder) if (folder / "log.jsonl").is_file() else []


def progress(folder: Path, s: schedule.Segment) -> int:
    """Steps of a segment that its log has recorded, read from its last line alone."""
    try:
        with open(folder / "log.jsonl", "rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - 4096))
            last = json.loads(f.read().splitlines()[-1])
    except (OSError, ValueError, IndexError):  # no log yet, none that is whole
        return 0
    return max(s.start, min(s.end, last.get("step", last.get("start", s.start) - 1) + 1)) - s.start


def trained(log: list[dict[str, Any]]) -> tuple[int, float]:
    """(tokens, seconds) of the training in a log, without starts, validations and saves."""
    tokens, seconds, at = 0, 0.0, 0
    for r in log:
        if "config" in r:
            at = r["start"] * r["config"]["train.batch_tokens"]
        elif "tokens_per_second" in r:
            tokens += r["tokens"] - at
            seconds += (r["tokens"] - at) / r["tokens_per_second"]
            at = r["tokens"]
    return tokens, seconds


def pace(nodes: Graph, root: Path) -> float | None:
    """Seconds a FLOP in the logs of these nodes; None if they have none."""
    spent = {name: trained(records(root / name)) for name in nodes}
    flops = sum(tokens * nodes[n].config.model.flops_per_token() for n, (tokens, _) in spent.items())
    return sum(seconds for _, seconds in spent.values()) / flops if flops else None


def provenance(request: Request, table: str) -> dict[str, Any]:
    """How the segments of a table were made: settings, devices, versions, commits, seconds of training."""
    nodes = request.nodes_of[table]
    logs = [records(request.root / name) for name in nodes]
    starts = [r for log in logs for r in log if "config" in r]
    return {
        "scale": request.setup.scale.name,
        "config": config.values(request.setup.base),
        "segments": len(nodes),
        "steps": sum(node.steps for node in nodes.values()),
        "seconds": sum(trained(log)[1] for log in logs),
        "devices": sorted({f"{r['device']} ({r['ranks']} rank{'s' * (r['ranks'] > 1)}, {r['dtype']})" for r in starts}),
        "versions": sorted({f"torch {r['versions']['torch']}, Python {r['versions']['python']}" for r in starts}),
        "commits": sorted({r["commit"][:12] for r in starts if r["commit"]}),
        "date": time.strftime("%Y-%m-%d"),
    }


def save_logs(request: Request) -> None:
    """All logs of the root in one file, {"cell": name of the node, ..} a line."""
    partial = request.results / ".logs.partial"
    with lzma.open(partial, "wt") as f:
        for log in sorted(request.root.glob("*/**/log.jsonl")):
            name = log.parent.relative_to(request.root).as_posix()
            f.writelines(json.dumps({"cell": name, **r}) + "\n" for r in records(log.parent))
    partial.rename(request.results / "logs.jsonl.xz")
