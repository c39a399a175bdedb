"""Speed and memory beside peers: every ratio is of numbers measured in the same run.

    python -m bench step --size 203m     a training step: ours, Hugging Face's Llama, the same with Liger, nanoGPT's shape
    python -m bench step --memory        peak memory of the loss, in chunks and with all logits at once
    python -m bench kernels              each kernel beside PyTorch, torch.compile, Liger and its bar
    python -m bench data                 the reader, and the shard writer beside tiktoken alone
    python -m bench checkpoint           save, its stall and load beside a plain write, copy and read of the same bytes
    python -m bench eval                 log-likelihoods and answers of downstream tasks beside transformers

A step is bf16 over fp32 weights on a GPU, and fp32 on one thread on a CPU. Each row runs in a fresh process, in turn with the others.
`--json FILE` keeps everything, `--plot FILE.png` draws it. A peer that is not installed is named with the command that installs
it. A bar is the goal that we set for a number.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import config
import kernels
from bench import checkpoint, data, evaluation, memory, step
from bench import kernels as kernel_rows
from bench.kernels import CASES
from bench.peers import PEERS
from bench.plot import plot
from bench.report import versions
from runtime.command_line import Parser
from runtime.device import pick_device
from runtime.errors import UserError, user_errors
from runtime.files import write_text
from text import prepare
from text.sources import optional

VERBS = {
    "step": (step, "a training step beside its peers"),
    "kernels": (kernel_rows, "each kernel beside its peers"),
    "data": (data, "reader and shard writer"),
    "checkpoint": (checkpoint, "save and load"),
    "eval": (evaluation, "downstream tasks beside transformers"),
}
FIGURES = (".png", ".pdf", ".svg")
GPU_SIZES = ["203m", "608m", "1.2b", "3.1b"]


def number(low: float, kind: Callable[[str], float] = int) -> Callable[[str], float]:
    """An argparse type: a number of `low` or more."""

    def parse(text: str) -> float:
        try:
            if low <= (value := kind(text)) <= 1e6:
                return value
        except ValueError:
            pass
        kind_name = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {kind_name} of {low} or more")

    return parse


def names(*known: str) -> Callable[[str], list[str]]:
    """An argparse type: some of the known names, separated by commas."""

    def parse(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"got {name!r}, expected {', '.join(known)}")
        return text.split(",")

    return parse


def whole_numbers(text: str) -> list[float]:
    return [number(1)(part) for part in text.split(",")]


# commands, option, its argparse arguments, help
OPTIONS: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("step data checkpoint eval", "--size", {"dest": "config"}, "a name in configs/ or a .toml file, as --config"),
    ("kernels", "--size", {"dest": "sizes", "nargs": "+"}, f"names in configs/ [{' '.join(GPU_SIZES)}; on a CPU tiny]"),
    ("kernels", "--only", {"type": names(*CASES)}, f"some of {','.join(CASES)}"),
    ("step", "--peers", {"type": names("all", "none", *PEERS), "default": ["all"]}, f"some of {','.join(PEERS)} [all]"),
    (
        "step",
        "--micro",
        {"type": whole_numbers},
        "micro-batches to try [16,32,8,4; on a CPU 8,16,4]; the first has the loss",
    ),
    ("step", "--memory", {"action": "store_true"}, "peak memory of the loss instead [model.vocab_size 100277]"),
    (
        "step",
        "--minutes",
        {"type": number(0, float), "default": 10.0},
        "no round begins later; a third is for --micro [10]",
    ),
    ("step", "--steps", {"type": number(1), "default": 20}, "timed updates of a round [20]"),
    ("step", "--warmup", {"type": number(0), "default": 10}, "updates before them [10]"),
    ("step", "--updates", {"type": number(0), "default": 20}, "updates whose last loss is compared [20]"),
    ("step", "--row", {}, argparse.SUPPRESS),  # measure this row alone, in this process
    ("step data checkpoint eval", "--rounds", {"type": number(1)}, "rounds, all rows in turn [3; eval 5]"),
    (
        "data",
        "--megabytes",
        {"type": number(0.1, float), "default": 64.0},
        "of text; a little times process starts [64]",
    ),
    (
        "data",
        "--jobs",
        {"type": number(1), "default": os.cpu_count() or 1},
        "processes, threads of tiktoken [one a core]",
    ),
    ("data", "--tokenizer", {"default": str(prepare.RANKS)}, f"tiktoken encoding or rank file [{prepare.RANKS.name}]"),
    ("data checkpoint", "--dir", {}, "where to write [the system's temporary folder]"),
    ("step kernels data checkpoint eval", "--json", {}, "write everything to this file"),
    ("step kernels", "--plot", {}, "draw it into this file"),
)


def parse(argv: list[str]) -> tuple[argparse.Namespace, config.Config]:
    """The options and the config. UserError for every option that cannot work, before anything is touched."""
    top = Parser(prog="bench", description=__doc__)
    top.set_defaults(row=None, plot=None, dir=None, memory=False)
    commands = top.add_subparsers(dest="verb", required=True, parser_class=Parser)
    for verb, (_, says) in VERBS.items():
        usage = f"bench {verb} [--flag VALUE ..] [--section.key VALUE ..]"
        command = commands.add_parser(verb, usage=usage, help=says, description=says)
        for verbs, option, arguments, says in OPTIONS:
            if verb in verbs.split():
                command.add_argument(option, help=says, **arguments)
        command.add_config()
    if not argv:
        top.print_help()
        sys.exit()
    cuda = torch.cuda.is_available()
    default = {"checkpoint": "small", "step": "203m" if cuda else "tiny"}.get(argv[0], "tiny")
    o, c = top.parse_config(argv, default=default)
    if o.verb == "kernels":
        o.sizes = o.sizes or ([o.config] if o.config else GPU_SIZES if cuda else ["tiny"])
    o.overrides = {k: getattr(o, k) for k in config.values(c) if getattr(o, k) is not None}
    if o.memory and "model.vocab_size" not in o.overrides:
        c.model.vocab_size = 100277
    check(o, c)
    return o, c


def check(o: argparse.Namespace, c: config.Config) -> None:
    for folder in [Path(f).absolute().parent for f in (o.json, o.plot) if f] + [Path(o.dir)] * bool(o.dir):
        if not folder.is_dir():
            raise UserError(f"{folder}: is no folder; make it")
    if o.json and Path(o.json).is_dir():
        raise UserError(f"--json: got {o.json}, which is a folder, expected a file")
    if o.plot:
        if Path(o.plot).suffix not in FIGURES:
            raise UserError(f"--plot: got {o.plot}, expected a name that ends in one of {', '.join(FIGURES)}")
        if o.memory:
            raise UserError("--plot: step --memory draws nothing; leave it out")
        optional("matplotlib", "matplotlib", "--plot")
    if c.train.device == "mps":
        raise UserError("train.device: got mps, expected auto, cuda or cpu")


def main() -> None:
    o, c = parse(sys.argv[1:])
    t = c.train
    device = pick_device("cpu" if t.device == "auto" and not torch.cuda.is_available() else t.device, 0)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if t.dtype == "bfloat16" or (t.dtype == "auto" and cuda) else torch.float32
    if problems := kernels.problems(t.kernels, cuda, c.model):
        raise UserError("\n".join(problems))
    if o.row:
        print(json.dumps((memory if o.memory else step).row(o, c, device, dtype)))
        return
    name = torch.cuda.get_device_name(device) if cuda else f"cpu, {platform.machine()}"
    print(f"bench {o.verb}: {name}, {dtype}")
    found = (memory if o.memory else VERBS[o.verb][0]).run(o, c, device, dtype)
    about = {"bench": o.verb, "device": name, "dtype": str(dtype), "threads": torch.get_num_threads()}
    result = {**about, **versions(), "config": config.values(c), **found}
    if o.json:
        write_text(Path(o.json), json.dumps(result, indent=1) + "\n")
    if o.plot:
        plot(o.verb, result, o.plot)


if __name__ == "__main__":
    with user_errors("bench"):
        main()
