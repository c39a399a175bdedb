"""A training step beside its peers: tokens/s, MFU, peak memory, loss. Fresh processes, rounds in turn (A B A B)."""

import gc
import json
import statistics
import sys
import time
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd import DeviceType
from tqdm import tqdm

import model as llama
from bench import peers
from bench.measure import Row, child, product_speed, total_memory
from config import Config
from runtime.build import adamw, build
from runtime.device import peak_flops
from runtime.distributed import World
from runtime.start import Start

DEFAULTS: dict[bool, Row] = {  # of options; on a GPU: no more than eight minutes at 203M
    True: {"micro": [16, 32, 8, 4, 2, 1], "peers": ["hf-compile", "hf-liger"], "rounds": 1},
    False: {"micro": [8, 16, 4], "peers": ["hf", "nanogpt"], "rounds": 3},
}
NO_MEMORY = "no memory"
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
START = 20.0  # seconds of a new process: importing torch and transformers, reaching the device


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

    def losses(self, micro: int, updates: int) -> Row:
        """The last loss of some updates under a warm-up."""
        found = Row()
        for i in range(updates):
            x, y = self.ids(16 // micro * micro or micro, i)
            found["loss"] = self.step(x, y, micro, self.c.plan.max_lr * (i + 1) / updates).item()
        return found

    def seconds(self, x: Tensor, y: Tensor, micro: int) -> float:
        """Median seconds of an update, after some that warm up; on a GPU by device events."""
        warmup, steps = (4, 12) if self.cuda else (10, 20)

        def mark() -> Any:
            if self.cuda:
                return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))
            return time.perf_counter()

        gc.disable()  # as train.py does
        marks = [mark()]
        for _ in range(warmup + steps):
            self.step(x, y, micro, self.c.plan.max_lr)
            marks.append(mark())
        if self.cuda:
            torch.cuda.synchronize()
        timed = pairwise(marks[warmup:])
        return statistics.median(a.elapsed_time(b) / 1e3 if self.cuda else b - a for a, b in timed)

    def profile(self, x: Tensor, y: Tensor, micro: int, seconds: float) -> Row:
        """Milliseconds of an update that took `seconds`, by kind of operation; gaps: the device had nothing to do."""
        with torch.profiler.profile() as p:
            self.step(x, y, micro, self.c.plan.max_lr).item()
        total = products = attention = 0.0
        for e in p.key_averages():
            ms = (e.self_device_time_total if self.cuda else e.self_cpu_time_total) / 1e3
            if e.device_type == DeviceType.CPU:  # an operation, with the kernels that it started
                products += ms * (e.key in PRODUCTS)
                attention += ms * ("attention" in e.key)
            if (e.device_type == DeviceType.CUDA) == self.cuda and not e.is_user_annotation:
                total += ms
        parts = {"products_ms": products, "attention_ms": attention, "others_ms": total - products - attention}
        return parts | {"gaps_ms": seconds * 1e3 - total}


def run(o: Any, c: Config, device: torch.device, dtype: torch.dtype) -> Row:
    cuda, deadline = device.type == "cuda", time.perf_counter() + 60 * o.minutes - START
    names = ["ours", *([] if cuda else ["ours-compile"]), *o.peers]
    rows = {name: Row(row=name, note=peers.missing(name, cuda)) for name in names}
    peak, source = 0.0, "the 1024^3 product before and after the row, one thread"  # on a CPU each row measures it
    if cuda:
        peak, source = peak_flops(device, dtype)
    measure_rounds(o, c, rows, total_memory(device), deadline)
    measured = {name: row for name, row in rows.items() if not row["note"]}
    compare(measured, c, peak)
    what = f"{peak / 1e12:,.4g} TFLOP/s, {source}" if peak else source
    print(f"MFU of {what}, attention with its causal half; mfu_published: with all of it. loss: of update {o.updates}.")
    return {"peak_flops": peak or None, "peak_from": source, "rows": list(rows.values())}


def least_bytes(row: str, c: Config, micro: int) -> float:
    """Bytes below which training in bfloat16 cannot be: a size that needs more is not tried.

    Weights, gradients and two moments in fp32. For each token: the inputs of a block's four products, q and SwiGLU's
    gate and up; the logits, where they exist as a whole, and their gradient.
    """
    m = c.model
    blocks = 0 if c.train.recompute else m.n_layer * 2 * (4 * m.hidden + 2 * (m.ffn or 4 * m.hidden))
    logits = 0 if row.startswith("ours") or "liger" in row else 4 * m.vocab_size
    return 16.0 * m.parameters + micro * m.context * (blocks + logits)


def measure_rounds(o: Any, c: Config, rows: dict[str, Row], memory: float, deadline: float) -> None:
    """Add to each row its fastest micro-batch, the loss of the first, and the speed of every round.

    The first round tries the first micro-batch with every row, then the second, and so on, for half of the time if more
    rounds follow. Those repeat each row's fastest. What is running at the deadline is ended.
    """
    middle = deadline if o.rounds == 1 else (time.perf_counter() + deadline) / 2
    tried: dict[str, list[Row]] = {name: [] for name, row in rows.items() if not row["note"]}
    for micro in tqdm(o.micro, desc="micro-batches", disable=None):
        for name, so_far in tried.items():
            done = [row["micro"] for row in so_far if not row.get("note")]
            too_large = [row["micro"] for row in so_far if row.get("note") == NO_MEMORY]
            if least_bytes(name, c, micro) > memory or any(micro > other for other in too_large):
                found = Row(note=NO_MEMORY)
            elif any(4 * micro < other for other in done):  # casts and launches only weigh more
                found = Row(note="too small")
            elif done:
                found = fresh_row(name, micro, 0, middle)
            else:
                found = fresh_row(name, micro, o.updates, deadline)
            so_far.append(Row(micro=micro) | found)
    for name, every in tried.items():
        good = [row for row in every if not row.get("note")]
        why = "; ".join(f"{row['micro']}: {row['note']}" for row in every if row.get("note"))
        if good:
            fastest = max(good, key=lambda row: row["tokens_per_second"])
            rows[name] |= good[0] | fastest | {"left_out": why, "tried": good, "rounds": [fastest]}
        else:
            rows[name]["note"] = why
    names = [name for name in tried if not rows[name]["note"]]
    for turn, name in tqdm(list(product(range(1, o.rounds), names)), desc="rounds", disable=None):
        found = fresh_row(name, rows[name]["micro"], 0, deadline)
        if found.get("note"):
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
    """A row at one micro-batch, in this process: its loss, speed and peak memory."""
    cuda, micro = device.type == "cuda", o.micro[0]
    before = 0.0 if cuda else product_speed(device, dtype)
    try:
        trainer = Trainer(o.row, c, device, dtype)
        found = Row(micro=micro) | trainer.losses(micro, o.updates)
        # an update is on a GPU four micro-batches, on a CPU the batch of the config
        x, y = trainer.ids(4 * micro if cuda else c.batch_sequences // micro * micro or micro, 0)
        seconds = trainer.seconds(x, y, micro)
        found["tokens_per_second"] = x.numel() / seconds
        found["peak_bytes"] = torch.cuda.max_memory_allocated() if cuda else None
        if isinstance(trainer.net, llama.Transformer):  # what the check at the start has left
            found["triton"] = " ".join(name for name, use in trainer.net.use.items() if use == "triton") or None
        if o.profile:
            found |= trainer.profile(x, y, micro, seconds)
    except RuntimeError as e:  # PyTorch's, and those of cuBLAS, cuDNN and Triton
        if "out of memory" not in str(e) and "ALLOC_FAILED" not in str(e):
            raise
        return Row(note=NO_MEMORY)
    found["roof"] = None if cuda else statistics.harmonic_mean([before, product_speed(device, dtype)])
    return found


def compare(rows: dict[str, Row], c: Config, peak: float) -> None:
    """Add medians, MFUs and ratios of the rounds. `peak`: FLOP/s of the device; 0: each round has its own "roof"."""
    ours = rows.get("ours", {})
    for name, row in rows.items():
        row["tokens_per_second"] = statistics.median(r["tokens_per_second"] for r in row["rounds"])
        pairs = zip(ours.get("rounds", []), row["rounds"], strict=False)  # `ours` may be missing
        ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs]
        row["ours_ratio"] = statistics.median(ratios) if ratios else None
        tokens_per_flop = statistics.median(r["tokens_per_second"] / (peak or r["roof"]) for r in row["rounds"])
        row["mfu"] = tokens_per_flop * c.model.flops_per_token()
        row["mfu_published"] = tokens_per_flop * c.model.flops_per_token(causal=False)
        mine, theirs = ({t["micro"]: t["peak_bytes"] for t in r.get("tried", [])} for r in (ours, row))
        both = [m for m in mine.keys() & theirs.keys() if theirs[m]]
        row["memory_ratio"] = mine[max(both)] / theirs[max(both)] if both else None
        if name == "nanogpt":  # its weights are others
            row.pop("loss", None)
        elif "loss" in row and "loss" in ours:
            row["loss_difference"] = row["loss"] - ours["loss"]
