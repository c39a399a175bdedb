"""The segments that tables need, as one graph: a segment that several tables need is trained once.

    out/<scale>/<segment>/                        a folder of train.py's for each node
    out/<scale>/<setting>-s<seed>/<segment>/      of another setting or seed than the config's own

A node can start once the checkpoint that it starts from is there. For a branch that is long before the main path ends.
"""

import itertools
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import config
import data
import schedule
from paper import tables
from paper.scales import Point, Setup
from paper.table import Cell
from runtime import checkpoint, resume
from runtime.errors import UserError
from runtime.files import is_locked, read_log


@dataclass
class Node:
    """One segment to train, and how far it is on the disk."""

    root: Path
    setting: str  # with its seed; empty: the base setting with the config's own seed, at home in `root` itself
    segment: schedule.Segment
    config: config.Config
    arguments: list[str]  # of train.py, except --out, --parent and --train.save_at
    parent: tuple[str, int] | None  # (name of the node, step)
    required: set[int]  # steps of the checkpoints that tables or other nodes need
    points: set[int]  # steps whose weights averages need

    @property
    def name(self) -> str:
        return (Path(self.setting) / self.segment.name).as_posix()

    @property
    def folder(self) -> Path:
        return self.root / self.name

    @property
    def steps(self) -> int:
        return self.segment.end - self.segment.start

    @property
    def step_flops(self) -> float:
        return self.config.train.batch_tokens * self.config.model.flops_per_token()

    @cached_property
    def tokens(self) -> data.Tokens:
        return resume.open_tokens(self.config, self.config.plan, self.segment)

    def saved(self, step: int) -> bool:
        return (checkpoint.path(self.folder, step) / "meta.json").exists()

    def has_weights(self, steps: Iterable[int]) -> bool:
        return all((checkpoint.weights(self.folder, step) / "meta.json").exists() for step in steps)

    def done(self) -> bool:
        return all(map(self.saved, self.required)) and self.has_weights(self.points)

    def at_work(self) -> bool:
        return is_locked(self.folder / ".lock")

    def log(self) -> list[dict[str, Any]]:
        """The records of its log, none if there is no log yet."""
        return read_log(self.folder) if (self.folder / "log.jsonl").is_file() else []

    def logged(self) -> int:
        """Steps that the log has recorded, read from its last line alone: the bar asks several times a second."""
        s = self.segment
        try:
            with open(self.folder / "log.jsonl", "rb") as f:
                f.seek(max(0, f.seek(0, os.SEEK_END) - 4096))
                last = json.loads(f.read().splitlines()[-1])
        except (OSError, ValueError, IndexError):  # no log yet, or no complete line
            return 0
        return max(s.start, min(s.end, last.get("step", last.get("start", s.start) - 1) + 1)) - s.start

    def reached(self) -> int:
        """Steps that need not be trained again; those in the log of a node that is trained now."""
        if self.done():
            return self.steps
        if self.at_work():
            return self.logged()
        start = self.segment.start
        return (resume.resume_step(self.folder, sorted(self.required), self.points) or start) - start


Graph = dict[str, Node]  # by name, parents first


def left(nodes: Graph) -> tuple[list[Node], int, float]:
    """The nodes that are not done, parents first; their steps and FLOPs that are left."""
    todo = [n for n in nodes.values() if not n.done()]
    steps = [n.steps - n.reached() for n in todo]
    return todo, sum(steps), sum(n.step_flops * k for n, k in zip(todo, steps, strict=True))


def trained(log: list[dict[str, Any]]) -> tuple[int, float]:
    """(tokens, seconds) of the training in a log, without starts, validations and saves."""
    tokens, seconds, at = 0, 0.0, 0
    for r in log:
        if "config" in r:
            at = r["start"] * r["config"]["train.batch_tokens"]
        elif "tokens_per_second" in r:
            new, at = r["tokens"] - at, r["tokens"]
            tokens += new
            seconds += new / r["tokens_per_second"]
    return tokens, seconds


def check_lineage(nodes: Graph) -> None:
    """UserError if a checkpoint there is not one that these settings would make: a table never mixes two."""
    for node in nodes.values():
        for step in checkpoint.steps(node.folder):
            if step <= node.segment.end:
                resume.check_lineage(checkpoint.path(node.folder, step), node.config, node.segment, node.tokens)


def add(nodes: Graph, s: Setup, point: Point, seed: int) -> tuple[str, int]:
    """Add a point's segment and all segments that it starts from. Returns (name of its node, step)."""
    run, c = point.run, s.config(point.run, seed)
    setting = f"{run.setting.name}-s{seed}"
    if setting == s.own and not (s.root / setting / "config.toml").is_file():  # a run of an earlier version is used
        setting = ""
    segments = {g.name: g for g in s.segments(run, seed)}

    def need(segment: schedule.Segment, step: int) -> tuple[str, int]:
        name = (Path(setting) / segment.name).as_posix()
        known, main = nodes.get(name), segment.paradigm == "main"
        if known and not main and (segment.start, segment.end) != (known.segment.start, known.segment.end):
            raise UserError(f"{name}: two of the tables asked for need different segments here; give each an --out")
        # the main path of several plans is one, as long as the longest of them
        if known is None or segment.end > known.segment.end:
            parent = None
            if segment.parent:
                origin, at = segments[segment.parent[0]], segment.parent[1]
                if run.parent and origin.paradigm != segment.paradigm:
                    parent = add(nodes, s, Point(run.parent, 1, at if origin.paradigm == "main" else None), seed)
                else:
                    parent = need(origin, at)
            version = [] if main and not segment.parent else ["--version", str(segment.version)]
            keys = [word for k, v in s.keys(run, seed).items() for word in (f"--{k}", v)]
            words = ["--config", run.setting.config or s.scale.config, "--mode", segment.paradigm, *version, *keys]
            kept = (known.required, known.points) if known else (set[int](), set[int]())
            nodes[name] = Node(s.root, setting, segment, c, words, parent, *kept)
        nodes[name].required.add(step)
        if segment.paradigm == "average" and (parent := nodes[name].parent):
            nodes[parent[0]].points.update(segment.points)
        return name, step

    if point.at is not None:
        return need(next(g for g in segments.values() if g.paradigm == "main"), point.at)
    # the last of a version is its release
    *_, segment = (g for g in segments.values() if g.paradigm != "main" and g.version == point.version)
    return need(segment, segment.end)


def command(nodes: Graph, node: Node) -> list[str]:
    """train.py's arguments for a node."""
    words = [*node.arguments, "--out", str(node.root / node.setting)]
    if node.parent and (parent := nodes[node.parent[0]]).setting != node.setting:
        words += ["--parent", str(checkpoint.path(parent.folder, node.parent[1]))]
    if node.segment.paradigm == "main":
        # its own plan names the points of one way of averaging; those of others are saved whole
        steps = node.required | (node.points - set(node.segment.points))
        words += ["--train.save_at", ",".join(map(str, sorted(steps)))]
    return words


class Request:
    """The tables asked for, the nodes that they need, and the checkpoints that their numbers are measured on."""

    def __init__(self, s: Setup, names: list[str], seeds: list[int]) -> None:
        self.setup, self.seeds, self.results = s, seeds, s.root / "results"
        self.tables = {n: tables.TABLES[n](s) for n in names}
        self.downstream = [n for n in names if n in tables.DOWNSTREAM]
        self.nodes: Graph = {}  # of all tables
        self.nodes_of: dict[str, Graph] = {n: {} for n in names}  # of each
        self.checkpoints: dict[str, dict[Cell, list[Path]]] = {n: {} for n in names}  # of each, one a seed
        for name, t in self.tables.items():
            if len({(r.group, r.name) for r in t.rows}) < len(t.rows):
                raise UserError(f"plan.steps: got {s.T}, too few to tell the rows of {name} apart; give it more")
            for row, seed in itertools.product(t.rows, seeds):
                for point in (*row.points.values(), *row.also):
                    add(self.nodes_of[name], s, point, seed)
                    add(self.nodes, s, point, seed)
                for column, point in row.points.items():
                    node, step = add(self.nodes, s, point, seed)
                    path = checkpoint.path(s.root / node, step)
                    self.checkpoints[name].setdefault((row.group, row.name, column), []).append(path)
