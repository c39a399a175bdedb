"""Speed and memory beside peers: every ratio is of numbers measured in the same run.

    python -m bench step --size 203m     a training step: ours, Hugging Face's Llama, with Liger, nanoGPT's shape
    python -m bench kernels              each kernel beside PyTorch, torch.compile and Liger
    python -m bench data                 the reader, and the shard writer beside tiktoken alone
    python -m bench checkpoint           save, its stall and load beside a plain write, copy and read of the same bytes

A step is bf16 over fp32 weights on a GPU, and fp32 on one thread on a CPU. Each of its rows runs in a fresh process, in
turn with the others. `--json FILE` keeps everything.
"""

import argparse
import json
import math
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import config
import kernels
from bench import disk, peers, step
from bench import kernels as kernel_rows
from bench.measure import environment, table
from runtime import logger
from runtime.command_line import Parser
from runtime.device import activations, pick_device
from runtime.errors import UserError, refuse, user_errors
from runtime.files import write_text

VERBS: Any = {"step": step.run, "kernels": kernel_rows.run}
VERBS |= {"data": disk.run_data, "checkpoint": disk.run_checkpoint}
PEERS = f"some of {' '.join(peers.PEERS)}, and ours-K with a value K of train.kernels, such as ours-torch; none: ours"
ALL = " ".join(VERBS)
# (commands, option, its argparse arguments, help)
OPTIONS: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    (ALL, "--size", {"dest": "config"}, "a name in configs/ or a .toml file, as --config [kernels on a GPU: several]"),
    ("step", "--peers", {"nargs": "*"}, f"{PEERS} [hf-compile hf-liger; on a CPU hf nanogpt]"),
    ("step", "--micro", {"nargs": "+", "type": int}, "micro-batches to try [16 32 8 4 2 1; on a CPU 8 16 4]"),
    ("step", "--minutes", {"type": float, "default": 8.0}, "for everything; what it ends or leaves out is named [8]"),
    ("step", "--updates", {"type": int, "default": 20}, "updates whose last loss is compared; 0: none [20]"),
    ("step", "--profile", {"action": "store_true"}, "also an update's milliseconds by kind of operation"),
    ("step", "--row", {}, argparse.SUPPRESS),  # measure this row alone, in this process
    ("step data checkpoint", "--rounds", {"type": int}, "rounds, all rows in turn [3; step on a GPU 1]"),
    ("data", "--megabytes", {"type": float, "default": 64.0}, "of text to tokenize [64]"),
    (ALL, "--json", {}, "write everything to this file"),
)
LOWEST = {"micro": 1, "rounds": 1, "megabytes": 0.1, "minutes": 0, "updates": 0}


def parse(argv: list[str]) -> tuple[argparse.Namespace, config.Config]:
    """The options and the config. UserError for an option that cannot work, before anything is touched."""
    top = Parser(prog="bench", description=__doc__)
    commands = top.add_subparsers(dest="verb", required=True, parser_class=Parser)
    for verb in VERBS:
        command = commands.add_parser(verb, usage=f"bench {verb} [--flag VALUE ..] [--section.key VALUE ..]")
        for verbs, option, arguments, says in OPTIONS:
            if verb in verbs.split():
                command.add_argument(option, help=says, **arguments)
        command.add_config()
    default = {"checkpoint": "small", "step": "203m" if torch.cuda.is_available() else "tiny"}.get(argv[0], "tiny")
    o, c = top.parse_config(argv, default=default)
    cuda = torch.cuda.is_available() and c.train.device != "cpu"
    for key, value in (step.DEFAULTS[cuda] if o.verb == "step" else {}).items():
        if getattr(o, key) is None:
            setattr(o, key, value)
    for key, low in LOWEST.items():
        value = getattr(o, key, None)
        if value is not None and not low <= min(value if isinstance(value, list) else [value]) < math.inf:
            raise UserError(f"--{key}: got {value}, expected {low} or more")
    if o.json and (Path(o.json).is_dir() or not Path(o.json).absolute().parent.is_dir()):
        raise UserError(f"--json: got {o.json}, expected a file in a folder that exists")
    if c.train.device == "mps":
        raise UserError("train.device: got mps, expected auto, cuda or cpu")
    found = kernels.problems(c.train.kernels, cuda, c.model)
    for peer in o.peers if o.verb == "step" else []:
        if peer.startswith("ours-"):
            found += kernels.problems(peer.removeprefix("ours-"), cuda, c.model)
        elif peer not in peers.PEERS:
            found.append(f"--peers: got {peer}, expected {PEERS}")
    refuse(found)
    return o, c


def main() -> None:
    o, c = parse(sys.argv[1:] or ["--help"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C, it ends the process of a row as well
    t = c.train
    device = pick_device("cpu" if t.device == "auto" and not torch.cuda.is_available() else t.device, 0)
    dtype = activations(t.dtype, device)
    if o.verb == "step" and device.type == "cpu":
        torch.set_num_threads(1)
    if o.verb == "step" and o.row:
        print(json.dumps(step.row(o, c, device, dtype)))
        return
    where = environment(device)
    print(f"bench {o.verb}: {where['device']}, {dtype}")
    found = VERBS[o.verb](o, c, device, dtype)
    table(found["rows"])
    command = shlex.join(["python", "-m", "bench", *sys.argv[1:]])
    result = {"bench": o.verb, "dtype": str(dtype), **where, "commit": logger.git_commit(), "command": command}
    result |= {"config": config.values(c), **found}
    if o.json:
        write_text(Path(o.json), json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    with user_errors("bench"):
        main()
