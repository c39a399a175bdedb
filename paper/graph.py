"""The segments that tables need, as one graph: a segment that several tables need is trained once.

    out/<scale>/<setting>-s<seed>/<segment>/      a folder of train.py's for each node

A node can start once the checkpoint that it starts from is there. For a branch that is long before the main path ends.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import config
import data
import schedule
from paper import tables
from paper.claims import Cell
from paper.scales import Point, Setup
from runtime import checkpoint, resume
from runtime.errors import UserError


@dataclass
class Node:
    """One segment to train, in the folder `setting`/`segment.name` of the root."""

    setting: str  # with its seed
    segment: schedule.Segment
    config: config.Config
    arguments: list[str]  # of train.py, except --out, --parent and --train.save_at
    parent: tuple[str, int] | None  # (name of the node, step)
    required: set[int]  # steps of the checkpoints that tables or other nodes need

    @property
    def steps(self) -> int:
        return self.segment.end - self.segment.start

    @property
    def flops(self) -> float:
        return self.steps * self.config.train.batch_tokens * self.config.model.flops_per_token()

    @property
    def is_main(self) -> bool:
        return self.segment.paradigm == "main"

    @cached_property
    def tokens(self) -> data.Tokens:
        return resume.open_tokens(self.config, self.config.plan)


Graph = dict[str, Node]  # by folder below the root


def add(nodes: Graph, s: Setup, point: Point, seed: int) -> tuple[str, int]:
    """Add a point's segment and all segments that it starts from. Returns (name of its node, step)."""
    run, c = point.run, s.config(point.run, seed)
    setting = f"{run.setting.name}-s{seed}"
    segments = {g.name: g for g in s.segments(run, seed)}

    def parent_of(segment: schedule.Segment) -> tuple[str, int] | None:
        if segment.parent is None:
            return None
        if run.parent and segment.version == 2:
            return add(nodes, s, Point(run.parent, 1), seed)
        name, step = segment.parent
        return need(segments[name], step)

    def need(segment: schedule.Segment, step: int) -> tuple[str, int]:
        name = f"{setting}/{segment.name}"
        known, main = nodes.get(name), segment.paradigm == "main"
        if known and not main and (segment.start, segment.end) != (known.segment.start, known.segment.end):
            raise UserError(f"{name}: two of the tables asked for need different segments here; give each an --out")
        # the main path of several plans is one, as long as the longest of them
        if known is None or segment.end > known.segment.end:
            parent = parent_of(segment)
            arguments = ["--config", run.setting.config or s.scale.config, "--mode", segment.paradigm]
            arguments += [] if main else ["--version", str(segment.version)]
            arguments += [word for k, v in s.keys(run, seed).items() for word in (f"--{k}", v)]
            nodes[name] = Node(setting, segment, c, arguments, parent, known.required if known else set())
        nodes[name].required.add(step)
        return name, step

    if point.at is not None:
        return need(next(g for g in segments.values() if g.paradigm == "main"), point.at)
    segment = next(g for g in segments.values() if g.paradigm != "main" and g.version == point.version)
    return need(segment, segment.end)


def command(nodes: Graph, name: str, root: Path) -> list[str]:
    """train.py's arguments for a node."""
    node = nodes[name]
    words = [*node.arguments, "--out", str(root / node.setting)]
    if node.parent and nodes[node.parent[0]].setting != node.setting:
        words += ["--parent", str(checkpoint.path(root / node.parent[0], node.parent[1]))]
    if node.is_main:
        words += ["--train.save_at", ",".join(map(str, sorted(node.required)))]
    return words


class Request:
    """The tables asked for, the nodes that they need, and the checkpoints that their numbers are measured on."""

    def __init__(self, s: Setup, names: list[str], seeds: list[int], root: Path) -> None:
        self.setup, self.seeds, self.root = s, seeds, root
        self.results = root / "results"
        self.tables = {n: tables.TABLES[n](s) for n in names}
        self.downstream = [n for n in names if n in tables.DOWNSTREAM]
        self.nodes: Graph = {}  # of all tables
        self.nodes_of: dict[str, Graph] = {n: {} for n in names}  # of each
        self.checkpoints: dict[str, dict[Cell, list[Path]]] = {n: {} for n in names}  # of each, one a seed
        self.settings: dict[Path, str] = {}  # of each checkpoint
        for name, t in self.tables.items():
            if len({(r.group, r.name) for r in t.rows}) < len(t.rows):
                raise UserError(f"plan.steps: got {s.T}, too few to tell the rows of {name} apart; give it more")
            for row, seed in itertools.product(t.rows, seeds):
                for column, point in row.points.items():
                    node, step = self._add(name, point, seed)
                    path = checkpoint.path(root / node, step)
                    self.checkpoints[name].setdefault((row.group, row.name, column), []).append(path)
                    self.settings[path] = self.nodes[node].setting
                for point in row.also:
                    self._add(name, point, seed)

    def _add(self, name: str, point: Point, seed: int) -> tuple[str, int]:
        add(self.nodes_of[name], self.setup, point, seed)
        return add(self.nodes, self.setup, point, seed)
