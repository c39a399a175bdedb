"""Scales: the same tables for a laptop, a GPU or the paper's cluster; and runs, what a row of a table names under one.

A *run* is a paradigm under a setting, a *point* one of its checkpoints. A scale is a file of configs/scales/; the command line may
change any key on top of it, and a run does on top of both.
"""

import json
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import config
import cost
import schedule
from runtime import resume
from runtime.errors import UserError


@dataclass(frozen=True)
class Run:
    """A paradigm under a setting. Runs of one setting share a folder: there the segments' names tell apart what they differ in."""

    paradigm: str
    setting: str = "base"
    keys: tuple[tuple[str, str], ...] = ()  # of the config, on top of the scale's
    config: str = ""  # another config than the scale's
    parent: "Run | None" = None  # CPT: the run of another folder whose version 1 it starts from


@dataclass(frozen=True)
class Point:
    """A checkpoint of a run: where a version ends, or the main path at step `at`."""

    run: Run
    version: int
    at: int | None = None


@dataclass(frozen=True)
class Scale:
    """configs/scales/NAME.toml."""

    name: str
    config: str
    train: bool
    ranks: int
    per_gpu: int
    sizes: dict[str, dict[str, str]]
    long: dict[str, str]
    sft: dict[str, str]


def load_scale(name: str) -> Scale:
    """A scale by its name in configs/scales/ or as a .toml file. UserError names what is wrong with it."""
    folder = Path(__file__).parent.parent / "configs" / "scales"
    file = Path(name) if name.endswith(".toml") else folder / f"{name}.toml"
    if not file.is_file():
        raise UserError(
            f"--scale {name}: there is no {file}; expected a .toml file or one of {', '.join(sorted(f.stem for f in folder.glob('*.toml')))}"
        )
    try:
        tree = tomllib.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: not TOML: {e}") from None
    tree = {"sft": {}, **tree}
    wanted = {"config": str, "train": bool, "ranks": int, "per_gpu": int, "sizes": dict, "long": dict, "sft": dict}
    for key in [*wanted, *tree]:
        if key not in wanted or type(tree.get(key)) is not wanted[key]:
            raise UserError(
                f"{file}: {key}: got {tree.get(key, 'nothing')!r:.60}, expected {', '.join(f'{k} ({t.__name__})' for k, t in wanted.items())}"
            )
    for key in ("ranks", "per_gpu"):
        if tree[key] < 1:
            raise UserError(f"{file}: {key}: got {tree[key]}, expected 1 or more")
    if not tree["sizes"] or not all(isinstance(keys, dict) for keys in tree["sizes"].values()):
        raise UserError(f"{file}: sizes: got {tree['sizes']!r:.60}, expected at least one NAME = {{ keys }}")
    free = ("config", "data.path", "data.repeat", "data.epochs", "plan.max_lr", "plan.min_lr", "plan.warmup")

    def checked(where: str, keys: dict[str, Any]) -> dict[str, str]:
        """{"model": {"hidden": 32}} as on a command line."""
        flat = {
            f"{k}.{k2}".rstrip("."): v2
            for k, v in keys.items()
            for k2, v2 in (v.items() if isinstance(v, dict) else [("", v)])
        }
        for k, v in flat.items():
            if not (k in free or k.startswith(("model.", "train."))) or k in ("train.seed", "train.save_at"):
                raise UserError(
                    f"{file}: {where}: {k} is not for a scale to change; expected keys of model and train, {', '.join(free)}"
                )
            if not isinstance(v, (str, int, float, bool)):
                raise UserError(f"{file}: {where}: {k}: got {v!r:.60}, expected a number, a text or true or false")
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in flat.items()}
        try:
            config.load(texts.get("config", tree["config"]), {k: v for k, v in texts.items() if k != "config"})
        except UserError as e:
            raise UserError(
                "\n".join(
                    f"{file}: {where}: {line.removeprefix('command line: ').removeprefix('--')}"
                    for line in str(e).splitlines()
                )
            ) from None
        return texts

    checked("config", {})
    sizes = {n: checked(f"sizes.{n}", k) for n, k in tree["sizes"].items()}
    return Scale(
        file.stem,
        tree["config"],
        tree["train"],
        tree["ranks"],
        tree["per_gpu"],
        sizes,
        checked("long", tree["long"]),
        checked("sft", tree["sft"]),
    )


class Setup:
    """A scale and what the command line changes in it: the ground on which tables are built."""

    def __init__(self, scale: Scale, overrides: dict[str, str], schedules: list[str]) -> None:
        self.scale, self.overrides, self.schedules = scale, overrides, schedules
        self.base = config.load(scale.config, overrides)
        c = self.base
        if c.plan.increments or c.data.increments:
            raise UserError(
                "plan.increments, data.increments: the paper's tables take increments of plan.steps each; leave them out"
            )
        if c.train.save_at:
            raise UserError("train.save_at: is set by the tables, to the fork points that they need; leave it out")
        if c.data.sft or c.data.decay_mix:
            raise UserError(
                "data.sft, data.decay_mix: the paper's tables take branches of text alone; leave them out, or train with train.py"
            )
        if not 2 <= c.plan.versions <= 100:
            raise UserError(f"plan.versions: got {c.plan.versions}, expected 2 to 100: the tables start at version 2")
        self.T, self.N = c.plan.steps, c.plan.versions
        self.columns = [f"V{v}" for v in range(2, self.N + 1)]
        self._configs: dict[Run, config.Config] = {}
        for name in {*schedules, c.plan.schedule}:
            for paradigm in schedule.PARADIGMS:
                resume.make_segments(
                    paradigm, replace(resume.make_plan(c), schedule=name)
                )  # its complaints come before anything is done

    def keys(self, run: Run, seed: int) -> dict[str, str]:
        """All keys of a run, as flags of train.py."""
        return {**self.overrides, **dict(run.keys), "train.seed": str(seed)}

    def config(self, run: Run, seed: int) -> config.Config:
        if run not in self._configs:
            self._configs[run] = config.load(run.config or self.scale.config, self.keys(run, self.base.train.seed))
        c = self._configs[run]
        return replace(c, train=replace(c.train, seed=seed))

    def cost(self, run: Run, convention: str = "section3.2") -> float:
        """Steps of a run relative to PTFS under the same setting."""
        p = resume.make_plan(self.config(run, self.base.train.seed))
        return cost.steps(run.paradigm, p, convention) / cost.steps("ptfs", p, convention)

    def versions(self, run: Run) -> dict[str, Point]:
        return {f"V{v}": Point(run, v) for v in range(2, self.N + 1)}
