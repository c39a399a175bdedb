"""Speed and memory beside peers: every ratio is of numbers measured in the same run.

    python -m bench step --size 203m     a training step: ours, Hugging Face's Llama, with Liger, nanoGPT's shape
    python -m bench kernels              each kernel beside PyTorch, torch.compile, Liger and its bar
    python -m bench data                 the reader, and the shard writer beside tiktoken alone
    python -m bench checkpoint           save, its stall and load beside a plain write, copy and read of the same bytes
    python -m bench eval                 log-likelihoods and answers of downstream tasks beside transformers

A step is bf16 over fp32 weights on a GPU, and fp32 on one thread on a CPU. Each of its rows runs in a fresh process, in
turn with the others. `--json FILE` keeps everything. A bar is the goal that we set for a number.
"""

import argparse
import json
import math
import os
import platform
import shlex
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import config
import kernels
from bench import disk, evaluation, peers, step
from bench import kernels as kernel_rows
from bench.kernels import CASES
from bench.measure import Row, show, table, text
from runtime import logger
from runtime.command_line import Parser
from runtime.device import device_name, pick_device
from runtime.errors import UserError, user_errors
from runtime.files import write_text
from text.sources import optional

VERBS: Any = {"step": step.run, "kernels": kernel_rows.run, "eval": evaluation.run}
VERBS |= {"data": disk.run_data, "checkpoint": disk.run_checkpoint}
# (commands, option, its argparse arguments, help)
OPTIONS: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("step data checkpoint eval", "--size", {"dest": "config"}, "a name in configs/ or a .toml file, as --config"),
    ("kernels", "--size", {"dest": "sizes", "nargs": "+"}, "names in configs/ [203m to 3.1b; on a CPU tiny]"),
    ("kernels", "--only", {"nargs": "+", "choices": CASES, "default": CASES}, "some of the kernels"),
    ("step", "--peers", {"nargs": "*", "choices": peers.PEERS}, "which peers, if any [all; on a CPU hf nanogpt]"),
    ("step", "--micro", {"nargs": "+", "type": int}, "micro-batches to try [16 32 8 4; on a CPU 8 16 4]"),
    ("step", "--minutes", {"type": float, "default": 10.0}, "no round begins later; a third is for --micro [10]"),
    ("step", "--steps", {"type": int, "default": 20}, "timed updates of a round [20]"),
    ("step", "--warmup", {"type": int, "default": 10}, "updates before them [10]"),
    ("step", "--updates", {"type": int, "default": 20}, "updates whose last loss is compared; 0: none [20]"),
    ("step", "--row", {}, argparse.SUPPRESS),  # measure this row alone, in this process
    ("step data checkpoint eval", "--rounds", {"type": int}, "rounds, all rows in turn [3; eval 5]"),
    ("data", "--megabytes", {"type": float, "default": 64.0}, "of text to tokenize [64]"),
    ("data", "--jobs", {"type": int, "default": os.cpu_count() or 1}, "processes, threads of tiktoken [one a core]"),
    ("data checkpoint", "--dir", {}, "where to write [the system's temporary folder]"),
    ("step kernels data checkpoint eval", "--json", {}, "write everything to this file"),
    ("step kernels", "--plot", {}, "draw it into this file"),
)
LOWEST = {"micro": 1, "steps": 1, "rounds": 1, "jobs": 1, "megabytes": 0.1, "minutes": 0, "warmup": 0, "updates": 0}


def parse(argv: list[str]) -> tuple[argparse.Namespace, config.Config]:
    """The options and the config. UserError for an option that cannot work, before anything is touched."""
    top = Parser(prog="bench", description=__doc__)
    top.set_defaults(row=None, plot=None, dir=None)
    commands = top.add_subparsers(dest="verb", required=True, parser_class=Parser)
    for verb in VERBS:
        command = commands.add_parser(verb, usage=f"bench {verb} [--flag VALUE ..] [--section.key VALUE ..]")
        for verbs, option, arguments, says in OPTIONS:
            if verb in verbs.split():
                command.add_argument(option, help=says, **arguments)
        command.add_config()
    cuda = torch.cuda.is_available()
    default = {"checkpoint": "small", "step": "203m" if cuda else "tiny"}.get(argv[0], "tiny")
    o, c = top.parse_config(argv, default=default)
    if o.verb == "kernels":
        o.sizes = o.sizes or ([o.config] if o.config else ["203m", "608m", "1.2b", "3.1b"] if cuda else ["tiny"])
    for key, low in LOWEST.items():
        value = getattr(o, key, None)
        if value is not None and not low <= min(value if isinstance(value, list) else [value]) < math.inf:
            raise UserError(f"--{key}: got {value}, expected {low} or more")
    for key in ("json", "plot"):
        if (file := getattr(o, key)) and (Path(file).is_dir() or not Path(file).absolute().parent.is_dir()):
            raise UserError(f"--{key}: got {file}, expected a file in a folder that exists")
    if o.plot and Path(o.plot).suffix != ".png":
        raise UserError(f"--plot: got {o.plot}, expected a .png file")
    if o.plot:
        optional("matplotlib", "matplotlib", "--plot")
    if c.train.device == "mps":
        raise UserError("train.device: got mps, expected auto, cuda or cpu")
    return o, c


def plot(result: Row, file: str) -> None:
    """Draw one bar a row: tokens/s of `step`, seconds forward and backward of `kernels`; in words the bars."""
    from matplotlib.figure import Figure

    key, unit = ("tokens_per_second", "tokens/s") if result["bench"] == "step" else ("both", "seconds, both passes")
    rows = [r for r in result["rows"] if r.get(key)][::-1]
    names = [" ".join(r[k] for k in ("size", "kernel", "row") if k in r) for r in rows]
    colors = ["#0072B2" if r["row"].startswith(("ours", "triton")) else "#E69F00" for r in rows]
    missed = [[f"missed {b['what']}" for b in r.get("bars", []) if not b["reached"]] for r in rows]
    labels = ["; ".join([text(r[key]), *which]) for r, which in zip(rows, missed, strict=True)]
    figure = Figure(figsize=(9, 2 + len(rows) / 4), layout="constrained")
    ax = figure.subplots()
    drawn = ax.barh(names, [r[key] for r in rows], color=colors)
    ax.bar_label(drawn, labels, padding=3)
    ax.set(xmargin=0.3, xlabel=unit, title="\n".join([result["device"], *(show([b]) for b in result.get("bars", []))]))
    figure.savefig(file, dpi=150)


def main() -> None:
    o, c = parse(sys.argv[1:] or ["--help"])
    t = c.train
    device = pick_device("cpu" if t.device == "auto" and not torch.cuda.is_available() else t.device, 0)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if t.dtype == "bfloat16" or (t.dtype == "auto" and cuda) else torch.float32
    if problems := kernels.problems(t.kernels, cuda, c.model):
        raise UserError("\n".join(problems))
    if o.verb == "step" and not cuda:
        torch.set_num_threads(1)
    if o.row:
        print(json.dumps(step.row(o, c, device, dtype)))
        return
    name = device_name(device)
    print(f"bench {o.verb}: {name}, {dtype}")
    found = VERBS[o.verb](o, c, device, dtype)
    table(found["rows"])
    print(show(found.get("bars", [])))
    result = {"bench": o.verb, "device": name, "dtype": str(dtype), "threads": torch.get_num_threads()}
    result |= {"python": platform.python_version(), "date": time.strftime("%Y-%m-%dT%H:%M:%S")}
    for package in ("torch", "triton", "transformers", "liger-kernel"):
        result[package] = version(package) if find_spec(package.replace("-", "_")) else None
    command = shlex.join(["python", "-m", "bench", *sys.argv[1:]])
    result |= {"commit": logger.git_commit(), "command": command, "config": config.values(c), **found}
    if o.json:
        write_text(Path(o.json), json.dumps(result, indent=1) + "\n")
    if o.plot:
        plot(result, o.plot)


if __name__ == "__main__":
    with user_errors("bench"):
        main()
