"""train.py's main in this process or under torchrun, and what it left, read without the project's own readers."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import BASE
from safetensors import safe_open

import config
import model
import train
from data import Tokens
from runtime import logger

SHAPE = {
    k.removeprefix("--"): v for k, v in zip(BASE[::2], BASE[1::2], strict=True)
}  # of BASE, as config.load wants it


def run(data: Path, out: Path, *args: str) -> int:
    """The exit code of train.py with the tiny model of the tests."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(
            sys, "argv", ["train.py", "--config", "tiny", *BASE, "--data.path", str(data), "--out", str(out), *args]
        )
        m.setattr(logger, "peak_flops", lambda *_: (1e12, "not timed"))  # a third of a second each time
        try:
            train.main()
        except SystemExit as e:
            return int(e.code or 0)
    return 0


FORK = """
import json, sys
import soak
for argv in json.loads(sys.argv[1]):
    codes = soak.Run(argv, int(sys.argv[2]), log=soak.Path(sys.argv[3])).wait()
    assert not any(codes), codes
"""


def run_on_ranks(ranks: int, data: Path, log: Path, *runs: tuple[Path, *tuple[str, ...]]) -> None:
    """Runs of (out, arguments ..) in turn, forked from one process that has imported all: a start is cheap."""
    argvs = [["--config", "tiny", *BASE, "--data.path", str(data), "--out", str(out), *args] for out, *args in runs]
    command = [sys.executable, "-c", FORK, json.dumps(argvs), str(ranks), str(log)]
    r = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert r.returncode == 0, r.stderr[-1000:] + log.read_text()[-2000:]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint, its parts put together in the order of their rows."""
    parts: dict[str, list[tuple[list[int], torch.Tensor]]] = {}
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            where = json.loads(f.metadata()["DCP_SHARDING_INFO"])
            for name in f.keys():
                parts.setdefault(name, []).append((where[name]["saved_offsets"], f.get_tensor(name)))
    whole = {name: [t for _, t in sorted(p, key=lambda x: x[0])] for name, p in parts.items()}
    return {name: torch.cat(ts) if len(ts) > 1 else ts[0] for name, ts in whole.items()}


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {k.removeprefix("model."): v for k, v in tensors(checkpoint).items() if k.startswith("model.")}


def records(folder: Path, key: str) -> dict[int, dict]:
    """{step: record} of the log's records that have a key; of a step that is there twice the later one."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {r["step"]: r for r in lines if key in r}


def rate(step: int, steps: int, warmup: int = 2, high: float = 4e-3, low: float = 4e-4) -> float:
    """The learning rate of PTFS's version 1 with the cosine schedule, written out."""
    if step < warmup:
        return high * (step + 1) / warmup
    return low + (high - low) * (1 + math.cos(math.pi * (step - warmup + 1) / (steps - warmup))) / 2


@dataclass
class Written:
    """AdamW with clipping, in fp64 by hand, from the initial weights of a seed: what PTFS's version 1 should be."""

    weights: dict[str, torch.Tensor]
    losses: list[float]
    norms: list[float]  # of the gradients, before clipping
    clips: list[bool]  # did it act?


def written_out(folder: Path, seed: int, steps: int, clip: float = 1.0) -> Written:
    c = config.load("tiny", SHAPE | {"train.seed": str(seed)})
    torch.manual_seed(seed)
    net = model.Transformer(c.model, torch.float64).double()
    tokens = Tokens(str(folder), 32, 8, [steps], seed)
    out = Written(dict(net.named_parameters()), [], [], [])
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in out.weights.items()}
    for step in range(steps):
        x, y = map(torch.from_numpy, tokens.batch(step))
        loss = torch.nn.functional.cross_entropy(net(x).flatten(0, 1), y.flatten())
        grads = dict(zip(out.weights, torch.autograd.grad(loss, list(out.weights.values())), strict=True))
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        factor = min(1.0, clip / norm)
        out.losses.append(loss.item())
        out.norms.append(norm)
        out.clips.append(norm > clip)
        lr = rate(step, steps)
        with torch.no_grad():
            for n, p in out.weights.items():
                (m, v), g = moments[n], grads[n] * factor
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.95).add_(0.05 * g**2)
                p.mul_(1 - lr * (0.1 if p.dim() == 2 else 0.0))
                p.sub_(lr * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8))
    out.weights = {n: p.detach() for n, p in out.weights.items()}
    return out
