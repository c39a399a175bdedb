"""Scales: the same tables for a laptop, a GPU or the paper's cluster. Runs: the models that the rows of a table name.

A scale is a file of configs/scales/. The command line may change any key of its config, and a setting changes keys on
top of both. A *run* is a paradigm under a setting; a *point* is one of its checkpoints.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import config
import cost
import schedule
from runtime.errors import UserError
from runtime.files import read_toml


@dataclass(frozen=True)
class Setting:
    """Keys on top of the scale's, or another config. Runs of one setting share a folder."""

    name: str = "base"
    keys: Mapping[str, str] = field(default_factory=dict)
    config: str = ""  # empty: the scale's
    derived: tuple[str, ...] = ("plan.steps", "plan.versions")  # keys made from the command line's, or without effect


@dataclass(frozen=True)
class Run:
    """A paradigm under a setting."""

    paradigm: str
    setting: Setting = Setting()
    parent: "Run | None" = None  # the run in another folder whose main path it leaves; CPT: whose version 1 it updates


@dataclass(frozen=True)
class Point:
    """A checkpoint of a run: the end of a version, or the main path at step `at`."""

    run: Run
    version: int
    at: int | None = None


@dataclass(frozen=True)
class Scale:
    """configs/scales/NAME.toml."""

    name: str
    config: str
    train: bool  # a table trains what is missing; otherwise only with --run yes
    ranks: int  # processes of a segment
    per_gpu: int  # segments side by side on a GPU
    sizes: dict[str, Setting]  # Tables 6 and 9
    long: dict[str, str]  # keys of the runs with increments of 4T
    sft: dict[str, str]  # keys on top of configs/sft.toml


TYPES = {"config": str, "train": bool, "ranks": int, "per_gpu": int, "sizes": dict, "long": dict, "sft": dict}
# Keys that a scale may change beside those of model and train
FREE = ("data.path", "data.repeat", "data.epochs", "plan.max_lr", "plan.min_lr", "plan.warmup")
# Keys that only tables set
OWN = "plan.increments train.save_at data.increments data.order data.sft data.epochs data.decay_mix".split()


def load_scale(name: str) -> Scale:
    """A scale by its name in configs/scales/ or as a .toml file. UserError names what is wrong with it."""
    file, tree = read_toml("--scale", name, Path(__file__).parent.parent / "configs" / "scales")
    tree = {"sft": {}, **tree}
    for key in [*TYPES, *tree]:
        value, needed = tree.get(key), key in ("ranks", "per_gpu", "sizes")
        if type(value) is not TYPES.get(key) or (needed and not value):
            expected = ", ".join(f"{k} ({t.__name__})" for k, t in TYPES.items())
            raise UserError(f"{file}: {key}: got {value!r:.60}, expected {expected}")

    base = tree["config"]
    flag_keys(f"{file}: config", base, {})
    sizes = {}
    for size, keys in tree["sizes"].items():
        named = str(keys.pop("config", base))
        flags = flag_keys(f"{file}: sizes.{size}", named, keys)
        sizes[size] = Setting(f"size-{size}", flags, named) if flags or named != base else Setting()
    long, sft = (flag_keys(f"{file}: {k}", base, tree[k]) for k in ("long", "sft"))
    return Scale(**tree | {"name": file.stem, "sizes": sizes, "long": long, "sft": sft})


def flag_keys(where: str, base: str, keys: dict[str, Any]) -> dict[str, str]:
    """{"model": {"hidden": 32}} as {"model.hidden": "32"}, checked against the config `base`."""
    flat: dict[str, Any] = {}
    for k, v in keys.items():
        flat |= {f"{k}.{leaf}": value for leaf, value in v.items()} if isinstance(v, dict) else {k: v}
    for k in flat:
        if not (k in FREE or k.startswith(("model.", "train."))) or k in ("train.seed", "train.save_at"):
            raise UserError(f"{where}: {k} is not for a scale to change; expected model.*, train.*, {', '.join(FREE)}")
    flags = {k: v if isinstance(v, str) else json.dumps(v, default=str) for k, v in flat.items()}
    try:
        config.load(base, flags)
    except UserError as e:
        raise UserError(f"{where}: {str(e).replace('command line: ', '')}") from None
    return flags


class Setup:
    """Tables are built from it: a scale, keys on top of it, the schedules to compare, and the folder of all runs."""

    def __init__(self, scale: Scale, overrides: dict[str, str], schedules: list[str], out: str | None = None) -> None:
        self.scale, self.overrides, self.schedules = scale, overrides, schedules
        self.root = Path(out or f"out/{scale.name}")
        self.own = f"base-s{config.load(scale.config).train.seed}"  # the setting and seed of train.py without keys
        self.base = c = config.load(scale.config, overrides)
        values, default = config.values(c), config.values(config.Config())
        for key in OWN:
            if values[key] != default[key]:
                raise UserError(f"{key}: got {values[key]}, but the tables choose their own; leave it out")
        for key, low, high in (("plan.versions", 2, 100), ("plan.steps", 1, 10**9)):
            if not low <= values[key] <= high:
                raise UserError(f"{key}: got {values[key]}, expected {low} to {high}")
        for name in {*schedules, c.plan.schedule}:  # refuse an impossible plan before anything is trained
            for paradigm in schedule.PARADIGMS:
                config.segments(paradigm, replace(c.plan, schedule=name))
        self.T, self.N = c.plan.steps, c.plan.versions
        self.columns = [f"V{v}" for v in range(2, self.N + 1)]
        self._config = functools.cache(lambda name, keys: config.load(name, dict(keys)))

    def keys(self, run: Run, seed: int) -> dict[str, str]:
        """All keys of a run on top of its config, as flags of train.py."""
        return {**self.overrides, **run.setting.keys, "train.seed": str(seed)}

    def config(self, run: Run, seed: int) -> config.Config:
        return self._config(run.setting.config or self.scale.config, tuple(self.keys(run, seed).items()))

    def overruled(self, run: Run) -> dict[str, str]:
        """The keys of the command line that a run's setting sets to another value: {key: that value}."""
        setting, given = run.setting, config.values(self.base)
        made = config.values(self.config(run, self.base.train.seed))
        if setting.config:  # a size: its rows are named after the model of its config
            size, base = (config.values(self._config(name, ())) for name in (setting.config, self.scale.config))
            made |= {k: v for k, v in size.items() if k.startswith("model.") and v != base[k]}
        keys = [k for k in self.overrides if made[k] != given[k] and k not in setting.derived]
        return {k: setting.keys.get(k, str(made[k])) for k in keys}

    def segments(self, run: Run, seed: int) -> list[schedule.Segment]:
        return config.segments(run.paradigm, self.config(run, seed).plan)

    def cost(self, run: Run, convention: str = "section3.2") -> float:
        """Steps of a run relative to PTFS under the same setting."""
        p = self.config(run, self.base.train.seed).plan
        return cost.steps(run.paradigm, p, convention) / cost.steps("ptfs", p, convention)

    def versions(self, run: Run) -> dict[str, Point]:
        return {f"V{v}": Point(run, v) for v in range(2, self.N + 1)}
