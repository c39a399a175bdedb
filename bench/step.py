"""A training step beside its peers: tokens/s, MFU, peak memory, loss. Fresh processes, rounds in turn (A B A B)."""

import json
import statistics
import sys
import time
from dataclasses import replace
from itertools import product
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

import model as llama
from bench import peers
from bench.measure import Row, check_memory, child, timed
from config import Config
from runtime.build import adamw, build
from runtime.device import peak_flops, peak_memory
from runtime.distributed import World
from runtime.start import Start

NO_MEMORY = "no memory"


class Trainer:
    """The model and optimizer of one row: ours as train.py makes them, a peer's as its users do."""

    def __init__(self, row: str, c: Config, device: torch.device, dtype: torch.dtype) -> None:
        self.c, self.device, self.cuda, t = c, device, device.type == "cuda", c.train
        self.hf, self.autocast = row.startswith("hf"), dtype == torch.bfloat16 and not row.startswith("ours")
        self.net: nn.Module
        self.model: Any
        if row.startswith("ours"):
            change = row.partition("-")[2]  # "", "compile" or a value of train.kernels
            t = replace(t, compile="on") if change == "compile" else replace(t, kernels=change or t.kernels)
            c, world = replace(c, train=t), World(device=device)
            self.net, self.model, self.optimizer = build(c, Start(0, []), "none", world)
            return
        torch.set_float32_matmul_precision("high" if self.autocast else "highest")
        torch.manual_seed(t.seed)
        ours = llama.Transformer(c.model)  # the weights that train.py draws
        with device:
            self.net = peers.hugging_face(ours, "liger" in row) if self.hf else peers.NanoGPT(c.model)
        compiled = row.endswith("compile") or (self.cuda and row == "nanogpt")
        self.model = torch.compile(self.net, dynamic=False) if compiled else self.net
        self.optimizer = adamw(self.net, t)

    def ids(self, sequences: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (sequences, context), the same for every row. Frequencies of 1/rank are soon learned."""
        generator, V = torch.Generator().manual_seed(seed), self.c.model.vocab_size
        uniform = torch.rand(sequences, self.c.model.context + 1, generator=generator, dtype=torch.float64)
        ids = ((V**uniform).long() - 1).clamp_(0, V - 1).to(self.device)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step(self, x: Tensor, y: Tensor, micro: int, lr: float) -> Tensor:
        """One update, as train.py makes it; returns the loss before it."""
        total = torch.zeros((), device=self.device)
        for a, b in zip(x.split(micro), y.split(micro), strict=True):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                loss = self.model(input_ids=a, labels=b, shift_labels=b).loss if self.hf else self.model(a, b)
            loss = loss * (micro / len(x))
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.c.train.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


def run(o: Any, c: Config, device: torch.device, dtype: torch.dtype) -> Row:
    cuda = device.type == "cuda"
    check_memory(16.0 * c.model.parameters, device)  # weights, gradients and two moments in fp32
    o.micro = o.micro or ([16, 32, 8, 4, 2, 1] if cuda else [8, 16, 4])
    o.rounds = o.rounds or (1 if cuda else 3)
    if o.peers is None:
        o.peers = ["hf-compile", "hf-liger"] if cuda else ["hf", "nanogpt"]
    names = ["ours", *([] if cuda else ["ours-compile"]), *o.peers]
    rows = {name: Row(row=name, note=peers.missing(name, cuda)) for name in names}
    measure_rounds(o, rows)
    compare({name: row for name, row in rows.items() if not row["note"]}, c)
    print(f"mfu: attention with its causal half; mfu_published: with all of it. loss: of update {o.updates}.")
    return {"rows": list(rows.values())}


def measure_rounds(o: Any, rows: dict[str, Row]) -> None:
    """Add to each row its fastest micro-batch, the loss of the first, and the speed of every round.

    The first round tries every micro-batch with every row, the others repeat each row's fastest. What is running when
    the minutes are over is ended.
    """
    deadline = time.perf_counter() + 60 * o.minutes
    tried: dict[str, list[Row]] = {name: [] for name, row in rows.items() if not row["note"]}
    for micro, name in tqdm(list(product(o.micro, tried)), desc="micro-batches", disable=None):
        if any(row.get("note") == NO_MEMORY and row["micro"] < micro for row in tried[name]):
            found = Row(note=NO_MEMORY)
        else:
            known = any("loss" in row for row in tried[name])
            found = fresh_row(name, micro, 0 if known else o.updates, deadline)
        tried[name].append(Row(micro=micro) | found)
    for name, every in tried.items():
        good = [row for row in every if "note" not in row]
        why = "; ".join(f"{row['micro']}: {row['note']}" for row in every if "note" in row)
        if good:
            fastest = max(good, key=lambda row: row["tokens_per_second"])
            rows[name] |= good[0] | fastest | {"left_out": why, "tried": good, "rounds": [fastest]}
        else:
            rows[name]["note"] = why
    names = [name for name in tried if not rows[name]["note"]]
    for turn, name in tqdm(list(product(range(1, o.rounds), names)), desc="rounds", disable=None):
        found = fresh_row(name, rows[name]["micro"], 0, deadline)
        if "note" in found:
            print(f"{turn} of {o.rounds} rounds: {name}: {found['note']}")
            return
        rows[name]["rounds"].append(found)


def fresh_row(name: str, micro: int, updates: int, end: float) -> Row:
    """The row that this command measures at a micro-batch in a fresh process; a note if that fails or has no time."""
    seconds = end - time.perf_counter()
    if seconds <= 0:
        return Row(note="no time, raise --minutes")
    options = ["--row", name, "--micro", str(micro), "--updates", str(updates)]
    succeeded, said = child("-m", "bench", *sys.argv[1:], *options, seconds=seconds)
    return json.loads(said) if succeeded else Row(note=f"failed: {said[:160]}")


def row(o: Any, c: Config, device: torch.device, dtype: torch.dtype) -> Row:
    """A row at one micro-batch, in this process: its loss, speed, peak memory, and the FLOP/s of the device."""
    cuda, (micro,) = device.type == "cuda", o.micro
    try:
        trainer = Trainer(o.row, c, device, dtype)
        found = Row(micro=micro)
        for i in range(o.updates):  # under a warm-up
            x, y = trainer.ids(16 // micro * micro or micro, i)
            found["loss"] = trainer.step(x, y, micro, c.plan.max_lr * (i + 1) / o.updates).item()
        # an update is on a GPU four micro-batches, on a CPU the batch of the config
        x, y = trainer.ids(4 * micro if cuda else c.batch_sequences // micro * micro or micro, 0)
        for _ in range(2):  # the first compiles and has no moments yet
            trainer.step(x, y, micro, c.plan.max_lr)
        found |= peak_memory(device)
        found["tokens_per_second"] = x.numel() / timed(lambda: trainer.step(x, y, micro, c.plan.max_lr), device, 3.0)
    except RuntimeError as e:  # PyTorch's, and those of cuBLAS, cuDNN and Triton
        if "out of memory" not in str(e) and "ALLOC_FAILED" not in str(e):
            raise
        return Row(note=NO_MEMORY)
    if isinstance(trainer.net, llama.Transformer):  # what the check at the start has left
        found["triton"] = " ".join(name for name, use in trainer.net.use.items() if use == "triton") or None
    return found | {"peak_flops": peak_flops(device, dtype)[0]}


def compare(rows: dict[str, Row], c: Config) -> None:
    """Add medians, MFUs and ratios of the rounds."""
    ours = rows.get("ours", Row(rounds=[], tried=[]))  # it may have failed
    for name, row in rows.items():
        row["tokens_per_second"] = statistics.median(r["tokens_per_second"] for r in row["rounds"])
        pairs = zip(ours["rounds"], row["rounds"], strict=False)
        if ratios := [a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs]:
            row["ours_ratio"] = statistics.median(ratios)
        tokens_per_flop = statistics.median(r["tokens_per_second"] / r["peak_flops"] for r in row["rounds"])
        row["mfu"] = tokens_per_flop * c.model.flops_per_token()
        row["mfu_published"] = tokens_per_flop * c.model.flops_per_token(causal=False)
        mine, its = ({t["micro"]: t.get("peak_bytes") for t in r["tried"]} for r in (ours, row))
        micro = max(mine.keys() & its.keys(), default=0)
        if mine.get(micro):
            row["memory_ratio"] = mine[micro] / its[micro]
        if name == "nanogpt":  # its weights are others
            row.pop("loss", None)
        elif "loss" in row and "loss" in ours:
            row["loss_difference"] = row["loss"] - ours["loss"]
