"""Speed and memory beside peers: every ratio is of numbers measured in the same run.

    python -m bench step --size 203m     a training step: ours, Hugging Face's Llama, with Liger, nanoGPT's shape
    python -m bench step --memory        peak memory of the loss, in chunks and with all logits at once
    python -m bench kernels              each kernel beside PyTorch, torch.compile, Liger and its bar
    python -m bench data                 the reader, and the shard writer beside tiktoken alone
    python -m bench checkpoint           save, its stall and load beside a plain write, copy and read of the same bytes
    python -m bench eval                 log-likelihoods and answers of downstream tasks beside transformers

A step is bf16 over fp32 weights on a GPU, and fp32 on one thread on a CPU. Each row runs in a fresh process, in turn
with the others. `--json FILE` keeps everything, `--plot FILE.png` draws it. A peer that is not installed is named with
the command that installs it. A bar is the goal that we set for a number.
"""

import argparse
import json
import math
import os
import platform
import sys
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

VERBS: Any = {"step": step, "kernels": kernel_rows, "data": data, "checkpoint": checkpoint, "eval": evaluation}
FIGURES = (".png", ".pdf", ".svg")
GPU_SIZES = ["203m", "608m", "1.2b", "3.1b"]


def words(value: str) -> list[str]:
    return value.split(",")


def numbers(value: str) -> list[int]:
    return [int(v) for v in value.split(",")]


# (commands, option, its argparse arguments, help)
OPTIONS: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("step data checkpoint eval", "--size", {"dest": "config"}, "a name in configs/ or a .toml file, as --config"),
    ("kernels", "--size", {"dest": "sizes", "nargs": "+"}, "names in configs/ [203m to 3.1b; on a CPU tiny]"),
    ("kernels", "--only", {"type": words}, f"some of {','.join(CASES)}"),
    ("step", "--peers", {"type": words, "default": ["all"]}, f"all, none, or some of {','.join(PEERS)} [all]"),
    ("step", "--micro", {"type": numbers}, "micro-batches to try [16,32,8,4; on a CPU 8,16,4]"),
    ("step", "--memory", {"action": "store_true"}, "peak memory of the loss [model.vocab_size 100277]"),
    ("step", "--minutes", {"type": float, "default": 10.0}, "no round begins later; a third is for --micro [10]"),
    ("step", "--steps", {"type": int, "default": 20}, "timed updates of a round [20]"),
    ("step", "--warmup", {"type": int, "default": 10}, "updates before them [10]"),
    ("step", "--updates", {"type": int, "default": 20}, "updates whose last loss is compared; 0: none [20]"),
    ("step", "--row", {}, argparse.SUPPRESS),  # measure this row alone, in this process
    ("step data checkpoint eval", "--rounds", {"type": int}, "rounds, all rows in turn [3; eval 5]"),
    ("data", "--megabytes", {"type": float, "default": 64.0}, "of text to tokenize [64]"),
    ("data", "--jobs", {"type": int, "default": os.cpu_count() or 1}, "processes, threads of tiktoken [one a core]"),
    ("data", "--tokenizer", {"default": str(prepare.RANKS)}, f"tiktoken encoding or ranks [{prepare.RANKS.name}]"),
    ("data checkpoint", "--dir", {}, "where to write [the system's temporary folder]"),
    ("step kernels data checkpoint eval", "--json", {}, "write everything to this file"),
    ("step kernels", "--plot", {}, "draw it into this file"),
)
LOWEST = {"micro": 1, "steps": 1, "rounds": 1, "jobs": 1, "megabytes": 0.1, "minutes": 0, "warmup": 0, "updates": 0}


def parse(argv: list[str]) -> tuple[argparse.Namespace, config.Config]:
    """The options and the config. UserError for an option that cannot work, before anything is touched."""
    top = Parser(prog="bench", description=__doc__)
    top.set_defaults(row=None, plot=None, dir=None, memory=False)
    commands = top.add_subparsers(dest="verb", required=True, parser_class=Parser)
    for verb, module in VERBS.items():
        usage = f"bench {verb} [--flag VALUE ..] [--section.key VALUE ..]"
        command = commands.add_parser(verb, usage=usage, description=module.__doc__)
        for verbs, option, arguments, says in OPTIONS:
            if verb in verbs.split():
                command.add_argument(option, help=says, **arguments)
        command.add_config()
    if not argv:
        top.print_help()
        sys.exit(0)
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
    for key, low in LOWEST.items():
        value = getattr(o, key, None)
        if value is not None and not low <= min(value if isinstance(value, list) else [value]) < math.inf:
            raise UserError(f"--{key}: got {value}, expected {low} or more")
    for key, known in (("peers", ("all", "none", *PEERS)), ("only", CASES)):
        for name in getattr(o, key, None) or ():
            if name not in known:
                raise UserError(f"--{key}: got {name!r}, expected {', '.join(known)}")
    for key in ("json", "plot"):
        if (file := getattr(o, key)) and (Path(file).is_dir() or not Path(file).absolute().parent.is_dir()):
            raise UserError(f"--{key}: got {file}, expected a file in a folder that exists")
    if o.dir and not Path(o.dir).is_dir():
        raise UserError(f"--dir: got {o.dir}, which is no folder; make it")
    if o.plot and (o.memory or Path(o.plot).suffix not in FIGURES):
        raise UserError(
            f"--plot: got {o.plot}, expected one of {', '.join(FIGURES)}, and no --memory, which has no figure"
        )
    if o.plot:
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
    found = (memory if o.memory else VERBS[o.verb]).run(o, c, device, dtype)
    about = {"bench": o.verb, "device": name, "dtype": str(dtype), "threads": torch.get_num_threads()}
    result = {**about, **versions(), "config": config.values(c), **found}
    if o.json:
        write_text(Path(o.json), json.dumps(result, indent=1) + "\n")
    if o.plot:
        plot(o.verb, result, o.plot)


if __name__ == "__main__":
    with user_errors("bench"):
        main()
