"""Speed and memory, side by side with what people would use instead: every ratio is of numbers measured in the same run.

    python -m bench step --size 203m     a training step: ours, Hugging Face's Llama, the same with Liger, nanoGPT's shape
    python -m bench step --memory        peak memory of the loss, in chunks and with all logits at once
    python -m bench kernels              each kernel beside PyTorch, torch.compile, Liger and its bar; --save tells train.py which is best
    python -m bench data                 the reader, and the shard writer beside tiktoken alone
    python -m bench checkpoint           save, its stall and load beside a plain write, copy and read of the same bytes
    python -m bench eval                 what downstream tasks ask, log-likelihoods and answers, beside transformers

A step is bf16 over fp32 weights on a GPU and fp32 on one thread on a CPU; each row runs in a fresh process, as a user would
run it, in turn with the others. `--json FILE` keeps everything, `--plot FILE.png` draws it. A peer that is not installed is
named with the command that installs it. A bar is what we set out to reach.
"""

import argparse
import contextlib
import gc
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import lzma
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import config
import data
import kernels
import model as llama
import train
from bench import peers
from kernels import attention, cross_entropy, rms_norm, rope, swiglu
from runtime import checkpoint
from runtime.command_line import Parser
from runtime.device import cpp_compiler, peak_flops, pick_device, steady_malloc
from runtime.errors import UserError, user_errors
from runtime.files import sha256, write_text
from text import prepare
from text.sources import optional
from text.tokenizer import Tokenizer
from tools import harness

Row = dict[str, Any]
PEERS = ("hf", "hf-compile", "hf-liger", "hf-liger-compile", "nanogpt")


# ----------------------------------------------------------------------------------------------------------
# Measuring


def missing(row: str, cuda: bool) -> str | None:
    """Why a row cannot run here."""
    for part, module, package in (("hf", "transformers", "transformers"), ("liger", "liger_kernel", "liger-kernel")):
        if part in row and not importlib.util.find_spec(module):
            return f"skipped: pip install {package}"
    if row == "ours-compile" and not cuda and not cpp_compiler():
        return "skipped: needs a C++ compiler, such as g++"
    return None if cuda or not ("liger" in row or row.startswith(("triton", "sdpa"))) else "skipped: needs CUDA"


def timed(fn: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a call; on CUDA by device events, the L2 cache flushed before each."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(fn, return_mode="median") / 1e3
    fn()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < 0.1 and len(times) < 500):
        began = time.perf_counter()
        fn()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def matmul(device: torch.device, dtype: torch.dtype) -> tuple[str, Callable[[], Tensor], float]:
    """A large square product, the roof of the arithmetic: its name, the call, its FLOPs."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return f"{n}^3 in {str(dtype).removeprefix('torch.')}", lambda: a @ b, 2.0 * n**3


def floors(device: torch.device, dtype: torch.dtype, shapes: dict[str, tuple[int, int, int]]) -> Row:
    """What this machine does now: bytes/s of a large copy, FLOP/s of a large product and of each (M, N, K) with its two gradients."""
    a = torch.zeros(int(4e9 if device.type == "cuda" else 2.5e8), dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    name, product, flops = matmul(device, dtype)
    out: Row = {
        "copy_bytes_per_second": 2 * len(a) / timed(lambda: b.copy_(a), device),
        "matmul": name,
        "matmul_flops": flops / timed(product, device),
        "gemms": {},
    }
    print(
        f"copy {out['copy_bytes_per_second'] / 1e9:,.4g} GB/s, read and written; matmul {name} {out['matmul_flops'] / 1e12:,.4g} TFLOP/s"
    )
    for name, (M, N, K) in shapes.items():
        x, w, dy = (torch.randn(s, device=device, dtype=dtype) for s in ((M, K), (N, K), (M, N)))
        calls: Row = {
            "forward": lambda x=x, w=w: x @ w.T,
            "dx": lambda w=w, dy=dy: dy @ w,
            "dw": lambda x=x, dy=dy: dy.T @ x,
        }
        out["gemms"][name] = {"M": M, "N": N, "K": K} | {
            k: 2 * M * N * K / timed(fn, device) for k, fn in calls.items()
        }
        print(
            f"  {name:9}{f'{M} x {N} x {K}':22}"
            + ", ".join(f"{k} {out['gemms'][name][k] / 1e12:,.4g}" for k in calls)
            + " TFLOP/s"
        )
    return out


def gemm_shapes(m: config.Model, sequences: int) -> dict[str, tuple[int, int, int]]:
    """(M, N, K) of the products of a forward pass."""
    h, f, M = m.hidden, m.ffn or 4 * m.hidden, sequences * m.context
    rows = h + 2 * (m.n_kv_head or m.n_head) * (h // m.n_head)
    return {
        "qkv": (M, rows, h),
        "attn_out": (M, h, h),
        "gate_up": (M, 2 * f, h),
        "ffn_out": (M, h, f),
        "head": (M, m.vocab_size, h),
    }


def table(rows: list[Row], **columns: tuple[str, str, float]) -> None:
    """Print rows; a column is key = (title, format, factor), and is left out where no row has it."""
    shown = {k: v for k, v in columns.items() if any(r.get(k) is not None for r in rows)}
    lines = [[title for title, _, _ in shown.values()]]
    for r in rows:
        lines.append(
            ["" if r.get(k) is None else format(r[k] * by, f) if f else str(r[k]) for k, (_, f, by) in shown.items()]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print(
            "  ".join(
                cell.rjust(w) if f else cell.ljust(w)
                for cell, w, (_, f, _) in zip(line, widths, shown.values(), strict=True)
            ).rstrip()
        )


def verdict(what: str, got: float | None, bar: float | None, at_most: bool = False) -> list[Row]:
    """[what, got, bar, reached], or nothing where there is nothing to compare."""
    if got is None or bar is None:
        return []
    return [{"what": what, "got": got, "bar": bar, "reached": got <= bar if at_most else got >= bar}]


def show(bars: list[Row]) -> str:
    return "; ".join(
        f"{b['what']} {b['got']:,.3g}: {'reached' if b['reached'] else 'missed'} {b['bar']:,.3g}" for b in bars
    )


# ----------------------------------------------------------------------------------------------------------
# step

# by layers and width, 203M to 3.1B; tokens/s of one H100, times Hugging Face's with torch.compile, peak memory to the same
STEP_BARS = {
    (24, 512): (317e3, 1.34, 0.40),
    (12, 1024): (227e3, 1.28, 0.45),
    (24, 1024): (133e3, 1.23, 0.55),
    (24, 1536): (74.6e3, 1.16, 0.65),
    (48, 1536): (39.9e3, 1.14, 0.75),
    (40, 2048): (29.7e3, 1.14, 0.85),
}
CPU_BARS = (0.50, 1.1)  # part of the matmul, times nanoGPT's shape


class Trainer:
    """A row: its model, its optimizer, and the update that train.py would make of them."""

    def __init__(self, row: str, c: config.Config, device: torch.device, dtype: torch.dtype) -> None:
        self.c, self.device, t = c, device, c.train
        torch.set_float32_matmul_precision("high" if dtype == torch.bfloat16 else "highest")  # as train.py
        torch.manual_seed(t.seed)
        with device:
            ours = llama.Transformer(
                c.model,
                dtype,
                kernels.choose("torch" if row == "ours-torch" else t.kernels, device, c.model),
                t.recompute,
            )
            self.net: nn.Module = ours
            if not row.startswith("ours"):
                self.net = (
                    peers.NanoGPT(c.model) if row == "nanogpt" else peers.hugging_face(c.model, ours, "liger" in row)
                )
        self.hf, self.autocast = row.startswith("hf"), dtype == torch.bfloat16 and not row.startswith("ours")
        compiled = row.endswith("compile") or (device.type == "cuda" and row in ("ours", "ours-torch", "nanogpt"))
        self.model: Any = torch.compile(self.net, dynamic=False) if compiled else self.net
        groups = [
            {"params": [p for p in self.net.parameters() if (p.dim() >= 2) is m], "weight_decay": t.weight_decay * m}
            for m in (True, False)
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(t.beta1, t.beta2), fused=True)

    def ids(self, sequences: int, seed: int) -> tuple[Tensor, Tensor]:
        """Ids as frequent as 1/rank, about as words are, so that a few updates have something to learn. The same for every row."""
        own, m = torch.Generator().manual_seed(seed), self.c.model
        ids = (m.vocab_size ** torch.rand(sequences, m.context + 1, generator=own, dtype=torch.float64)).long() - 1
        ids = ids.clamp_(0, m.vocab_size - 1).to(self.device)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step(self, x: Tensor, y: Tensor, micro: int, lr: float) -> Tensor:
        """One update; returns the loss before it."""
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

    def losses(self, sequences: int, micro: int, updates: int) -> Row:
        """The loss of the last of some updates under a warm-up, and what the first took longer than the others: compiling."""
        losses, seconds = [], []
        for i in range(updates):
            began = time.perf_counter()
            losses.append(self.step(*self.ids(sequences, i), micro, self.c.plan.max_lr * (i + 1) / updates).item())
            seconds.append(time.perf_counter() - began)
        return {
            "loss": losses[-1],
            "compile_seconds": seconds[0] - statistics.median(seconds) if self.model is not self.net else None,
        }

    def seconds(self, sequences: int, micro: int, warm: int, n: int) -> list[float]:
        """Seconds of each of n updates after `warm` others; on a GPU by device events."""
        cuda = self.device.type == "cuda"
        x, y = self.ids(sequences, 0)
        marks: list[Any] = []
        gc.collect()
        gc.disable()
        for i in range(warm + n + 1):
            if i >= warm:
                marks.append(torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter())
                if cuda:
                    marks[-1].record()
            if i < warm + n:
                self.step(x, y, micro, self.c.plan.max_lr)
        gc.enable()
        if cuda:
            torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 if cuda else b - a for a, b in itertools.pairwise(marks)]


def one(o: Any, c: config.Config, device: torch.device, dtype: torch.dtype) -> Row:
    """A row in this process: the loss after --updates and which micro-batch is fastest, or with 0 updates only the speed of the first."""
    cuda, micros = device.type == "cuda", o.micro
    if o.row.startswith("ours"):  # as train.py does; a peer runs as its users run it
        steady_malloc(device)
    trainer = Trainer(o.row, c, device, dtype)
    sequences = (
        0 if cuda else max(micros[0], c.batch_sequences)
    )  # of an update: on a GPU one micro-batch, on a CPU all of the config's batch
    _, product, flops = matmul(device, dtype)
    out, until = Row(micro=micros[0]), time.perf_counter() + o.minutes * 60
    if o.updates:
        out |= Row(no_memory=[], no_time=[], tried=[])
        for micro in micros:
            if out["no_memory"] and micro > min(out["no_memory"]):
                out["no_memory"].append(micro)
            elif out["tried"] and time.perf_counter() > until:
                out["no_time"].append(micro)
            else:
                try:
                    if "loss" not in out:
                        out |= trainer.losses(micros[0], micro, o.updates)
                    out["tried"].append(attempt(trainer, sequences or micro, micro))
                except torch.OutOfMemoryError:
                    out["no_memory"].append(micro)
                if micro in out["no_memory"]:  # not in the handler: the exception holds the tensors
                    trainer.optimizer.zero_grad(set_to_none=True)
                    gc.collect()
                    torch.cuda.empty_cache()
        if not out["tried"]:
            raise RuntimeError("no micro-batch fits")
        out["micro"] = max(out["tried"], key=lambda t: t["tokens_per_second"])["micro"]
    n, roof = sequences or out["micro"], [0.0] if cuda else [timed(product, device)]
    seconds = trainer.seconds(n, out["micro"], o.warmup, o.steps)
    roof += [] if cuda else [timed(product, device)]
    speed = n * c.model.context / statistics.median(seconds)
    return out | {"tokens_per_second": speed, "roof": flops / statistics.mean(roof) if roof[0] else None}


def attempt(trainer: Trainer, sequences: int, micro: int) -> Row:
    cuda = trainer.device.type == "cuda"
    trainer.seconds(sequences, micro, 2, 1)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    rate = sequences * trainer.c.model.context / statistics.median(trainer.seconds(sequences, micro, 1, 5))
    return {
        "micro": micro,
        "tokens_per_second": rate,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }


def estimate(c: config.Config, micro: int, item: int) -> float:
    """Bytes that a plain PyTorch peer needs: weights, gradients and AdamW's moments in fp32, activations of `item` bytes, and
    logits of 12 bytes in all, with their fp32 copy and gradients."""
    m = c.model
    activations = m.n_layer * (16 * m.hidden + 4 * (m.ffn or 4 * m.hidden)) * item
    return 16.0 * llama.parameters(m) + micro * m.context * (activations + 12.0 * m.vocab_size)


def total_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_size(c: config.Config, device: torch.device, micro: int, item: int) -> None:
    """UserError if the smallest micro-batch of a peer cannot fit into the device's memory."""
    need, have = estimate(c, micro, item), total_memory(device)
    if need > have:
        fits = next((m for m in (2, 1) if m < micro and estimate(c, m, item) <= have), None)
        lower = (
            f"take --micro {fits}"
            if fits
            else "take a smaller --size or lower model.n_layer, model.hidden or model.context"
        )
        raise UserError(
            f"--size: {llama.parameters(c.model):,} parameters need about {need / 1e9:,.1f} GB at a micro-batch of {micro}; "
            f"this {device.type} has {have / 1e9:,.1f} GB; {lower}"
        )


def child(*more: str) -> Row:
    """The JSON that this command, with some flags more, prints in a fresh process. What it prints else goes to stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "bench", *sys.argv[1:], *more], capture_output=True, text=True, cwd=prepare.ROOT
    )
    if done.returncode:
        return {"note": f"failed: {(done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1][:160]}"}
    return json.loads(done.stdout.splitlines()[-1])


def step(o: Any, c: config.Config, device: torch.device, dtype: torch.dtype) -> Row:
    cuda = device.type == "cuda"
    o.micro = o.micro or ([16, 32, 8, 4] if cuda else [8, 16, 4])
    check_size(c, device, min(o.micro), dtype.itemsize)
    if any(n % m for m in o.micro for n in (o.micro[0], c.batch_sequences) if m <= n):
        raise UserError(
            f"--micro: got {','.join(map(str, o.micro))}, expected divisors of the batch of {c.batch_sequences} sequences, such as 8,4,2"
        )
    if not cuda:
        torch.set_num_threads(1)  # the floors as well as the rows
    if o.row:
        return one(o, c, device, dtype)
    ours = ["ours", "ours-torch"] if cuda else ["ours", "ours-compile"]
    names = ours + [p for p in PEERS if p in o.peers or ("all" in o.peers and (cuda or p in ("hf", "nanogpt")))]
    rows = {name: Row(row=name, note=missing(name, cuda)) for name in names}
    floor = floors(device, dtype, gemm_shapes(c.model, 8))
    if cuda:
        torch.cuda.empty_cache()
    peak, source = (
        peak_flops(device, dtype) if cuda else (0.0, "the 1024^3 product before and after the row, one thread")
    )
    until = time.perf_counter() + o.minutes * 60
    for turn in tqdm(
        range(o.rounds or 3), desc="rounds", disable=None
    ):  # A B C A B C: when the machine slows down, all of them do
        if turn and time.perf_counter() > until:
            print(f"{turn} rounds in {o.minutes:g} minutes")
            break
        for name, row in rows.items():
            if not row["note"]:
                how = (
                    ("--micro", f"{row['micro']}", "--updates", "0")
                    if turn
                    else ("--micro", ",".join(map(str, o.micro)))
                )
                found = child("--row", name, *how, "--minutes", str(o.minutes / 3 / len(rows)))
                row |= {k: v for k, v in found.items() if k not in row or k in ("note", "micro")}
                row.setdefault("rounds", []).append({k: found.get(k) for k in ("tokens_per_second", "roof")})
    bars = compare(rows, c, peak)
    table(
        list(rows.values()),
        row=("row", "", 1),
        micro=("micro", "d", 1),
        tokens_per_second=("tokens/s", ",.0f", 1),
        ours_ratio=("ours/row", ".2f", 1),
        mfu=("MFU", ".1%", 1),
        mfu_published=("published", ".1%", 1),
        peak_bytes=("peak GB", ",.2f", 1e-9),
        memory_ratio=("ours/row", ".2f", 1),
        compile_seconds=("compile s", ".1f", 1),
        loss=("loss", ".4f", 1),
        loss_difference=("to ours", "+.1e", 1),
        left_out=("left out", "", 1),
        note=("", "", 1),
    )
    print(
        f"MFU of {f'{peak / 1e12:,.4g} TFLOP/s, ' if peak else ''}{source}, attention with its causal half; published: with all of it. Loss of update {o.updates}."
    )
    print(show(bars))
    return {"floors": floor, "peak_flops": peak or None, "peak_from": source, "rows": list(rows.values()), "bars": bars}


def compare(rows: dict[str, Row], c: config.Config, peak: float) -> list[Row]:
    """Fill in the medians, MFUs and ratios of the rounds; returns the bars. `peak`: of a GPU; 0: a round brings its own."""
    ours = rows["ours"]
    for name, row in rows.items():
        if row["note"]:
            continue
        each = [r["tokens_per_second"] for r in row["rounds"]]
        row["tokens_per_second"] = statistics.median(each)
        if not ours["note"]:
            row["ours_ratio"] = statistics.median(
                a["tokens_per_second"] / b for a, b in zip(ours["rounds"], each, strict=True)
            )
        for key, causal in (("mfu", True), ("mfu_published", False)):
            flops = llama.flops_per_token(c.model, causal)
            row[key] = statistics.median(r["tokens_per_second"] * flops / (peak or r["roof"]) for r in row["rounds"])
        row["peak_bytes"] = next((t["peak_bytes"] for t in row.get("tried", []) if t["micro"] == row["micro"]), None)
        both = [
            (s["micro"], s["peak_bytes"] / t["peak_bytes"])
            for s in ours.get("tried", [])
            for t in row.get("tried", [])
            if s["micro"] == t["micro"] and t["peak_bytes"]
        ]
        row["memory_ratio"] = max(both)[1] if both else None  # at the largest micro-batch that both could do
        if name == "nanogpt":  # which has other weights
            row.pop("loss", None)
        elif "loss" in row and "loss" in ours:
            row["loss_difference"] = row["loss"] - ours["loss"]
        gaps = (("no memory", row.get("no_memory")), ("no time", row.get("no_time")))
        row["left_out"] = "; ".join(f"{why} for {','.join(map(str, m))}" for why, m in gaps if m) or None
    if peak:
        speed, ratio, memory_ratio = STEP_BARS.get((c.model.n_layer, c.model.hidden), (None, None, None))
        hf = rows.get("hf-compile", {})
        return [
            *verdict("tokens/s (an H100's)", ours.get("tokens_per_second"), speed),
            *verdict("to hf-compile", hf.get("ours_ratio"), ratio),
            *verdict("memory to hf-compile", hf.get("memory_ratio"), memory_ratio, at_most=True),
        ]
    peer, bars = rows.get("nanogpt", {"note": "left out"}), []
    nano = [] if peer["note"] else peer["rounds"]
    for name in ("ours", "ours-compile"):
        each = [r["tokens_per_second"] for r in rows[name].get("rounds", []) if not rows[name]["note"]]
        ratio = (
            statistics.median(a / b["tokens_per_second"] for a, b in zip(each, nano, strict=True))
            if each and nano
            else None
        )
        bars += verdict(f"{name}: part of the matmul", rows[name].get("mfu"), CPU_BARS[0]) + verdict(
            f"{name}: to nanogpt", ratio, CPU_BARS[1]
        )
    return bars


def memory(o: Any, c: config.Config, device: torch.device, dtype: torch.dtype) -> Row:
    """Peak memory of the loss, forward and backward, over 2,048 tokens, in a fresh process each."""
    h, V, M = c.model.hidden, c.model.vocab_size, 2048
    need, have = 4.0 * (2 * V * h + 2 * M * h + 4 * M * V), total_memory(device)
    if need > have:
        raise UserError(
            f"--memory: all logits need about {need / 1e9:,.1f} GB, this {device.type} has {have / 1e9:,.1f} GB; lower model.vocab_size"
        )
    if o.row:
        x = torch.randn(M, h, device=device, dtype=dtype, requires_grad=True)
        w = (
            0.02 * torch.randn(V, h, device=device)
        ).requires_grad_()  # as at the start of training; of larger logits a CPU makes slow denormals
        y = torch.randint(0, V, (M,), device=device)
        (x[:64] @ w[:64].type_as(x).T).sum()  # what the first product sets up is nobody's
        before = torch.cuda.memory_allocated() if device.type == "cuda" else resident("VmRSS")
        if o.row == "chunked":
            cross_entropy.linear_cross_entropy(x, w, y).backward()
        else:
            cross_entropy.linear_cross_entropy_ref(x, w.type_as(x), y).backward()
        return {
            "peak_bytes": (torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")) - before
        }
    rows = [Row(row=row) | child("--row", row) for row in ("chunked", "all logits")]
    for r in rows:
        r["memory_ratio"] = (
            rows[0]["peak_bytes"] / r["peak_bytes"] if "peak_bytes" in r and "peak_bytes" in rows[0] else None
        )
    print(
        f"cross-entropy of {M:,} tokens, hidden {h:,}, vocabulary {V:,}, {dtype}: peak memory on top of the inputs, gradients included"
    )
    table(
        rows,
        row=("row", "", 1),
        peak_bytes=("peak GB", ",.3f", 1e-9),
        memory_ratio=("chunked/row", ".3f", 1),
        note=("", "", 1),
    )
    return {"tokens": M, "hidden": h, "vocab_size": V, "rows": rows}


def resident(field: str) -> int:
    """Bytes of this process, now (VmRSS) or at most (VmHWM). getrusage would count what the parent held when it started this one."""
    if not (status := Path("/proc/self/status")).exists():
        raise UserError("--memory: on a CPU it reads /proc/self/status, which this system does not have; take Linux")
    return int(next(line for line in status.read_text().splitlines() if line.startswith(field)).split()[1]) * 1024


# ----------------------------------------------------------------------------------------------------------
# kernels

CASES = ("rms_norm", "add_rms_norm", "rope", "attention", "swiglu", "cross_entropy")
MATMULS = ("attention", "cross_entropy")  # whose roof is the matmul; the others' is the copy
# (case, direction): part of the copy, or TFLOP/s (on an H100) for attention, by head dim, and cross_entropy, by hidden; and times faster than other rows
_NORM = ({512: 0.75, 1024: 0.85, 1536: 0.89, 2048: 0.91}, {512: 0.70, 1024: 0.78, 1536: 0.82, 2048: 0.85})
KERNEL_BARS: dict[tuple[str, str], tuple[float | dict[int, float], dict[str, float | dict[int, float]]]] = {
    **{(case, "forward"): (_NORM[0], {"compile": 1.25, "liger": 1.0}) for case in CASES[:2]},
    **{(case, "backward"): (_NORM[1], {"compile": 1.6}) for case in CASES[:2]},
    **{("rope", direction): (0.80, {"hf": 5.0}) for direction in ("forward", "backward")},
    **{("swiglu", direction): (0.90, {"torch": 1.6, "compile": 1.0}) for direction in ("forward", "backward")},
    ("attention", "forward"): ({64: 340, 96: 320, 128: 320}, {"sdpa flash": 1.2}),
    ("attention", "both"): ({64: 275}, {"sdpa flash": 1.2}),
    ("cross_entropy", "both"): ({512: 380, 1024: 500, 1536: 550, 2048: 590}, {"liger": {512: 2.0, 2048: 1.3}}),
}
EXTRA_BAR = 1e9  # bytes of cross_entropy beside its gradients


def traffic(case: str, m: config.Model, B: int, item: int) -> dict[str, float]:
    """Bytes of each direction if every input is read once and every output written once; weights and tables are fp32."""
    h, f, M, T = m.hidden, m.ffn or 4 * m.hidden, B * m.context, m.context
    D, kv = h // m.n_head, (m.n_kv_head or m.n_head) * (h // m.n_head)
    forward, backward = {
        "rms_norm": (2 * M * h * item + 4 * h, 3 * M * h * item + 8 * h),
        "add_rms_norm": (4 * M * h * item + 4 * h, 4 * M * h * item + 8 * h),
        "rope": (2 * M * (h + 2 * kv) * item + 4 * T * D,) * 2,
        "attention": (2 * M * (h + kv) * item, 4 * M * (h + kv) * item),
        "swiglu": (3 * M * f * item, 5 * M * f * item),
        "cross_entropy": (2 * M * h * item + 8 * m.vocab_size * h + 8 * M, 0),  # the gradients are made in the forward
    }[case]
    return {"forward": forward, "backward": backward, "both": forward + backward}


def work(case: str, m: config.Model, B: int) -> dict[str, float]:
    """FLOPs of each direction: attention with its causal half and 2.5 forwards as backward; the elementwise by an element's operations."""
    h, f, M = m.hidden, m.ffn or 4 * m.hidden, B * m.context
    kv = (m.n_kv_head or m.n_head) * (h // m.n_head)
    forward, backward = {
        "rms_norm": (4 * M * h, 8 * M * h),
        "add_rms_norm": (5 * M * h, 9 * M * h),
        "rope": (3 * M * (h + kv), 3 * M * (h + kv)),
        "attention": (2 * M * m.context * h, 5 * M * m.context * h),
        "swiglu": (5 * M * f, 10 * M * f),
        "cross_entropy": (6 * M * m.vocab_size * h, 0),
    }[case]
    return {"forward": forward, "backward": backward, "both": forward + backward}


def candidates(
    case: str, m: config.Model, B: int, device: torch.device, dtype: torch.dtype
) -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    """{row: (function, inputs)}; `triton` and `torch` are what the choices in train.kernels run."""
    h, H, T, eps = m.hidden, m.n_head, m.context, m.norm_eps
    K, D, f, V = m.n_kv_head or H, h // H, m.ffn or 4 * h, m.vocab_size

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)

    cuda, lg, hf_rope = device.type == "cuda", None, None  # type: bool, Any, Any
    if not missing("liger", cuda):
        lg = importlib.import_module("liger_kernel.transformers.functional")
    if not missing("hf", cuda):
        hf_rope = importlib.import_module("transformers.models.llama.modeling_llama").apply_rotary_pos_emb
    inputs: list[Tensor]
    ours: Callable[..., Any]
    more: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {}
    x, w = randn(B, T, h), torch.ones(h, device=device, requires_grad=True)
    if case == "rms_norm":
        inputs, ours = [x, w], lambda use, x, w: rms_norm.rms_norm(x, w, eps, use)
        more["liger"] = (lambda x, w: lg.liger_rms_norm(x, w, eps), inputs)
    elif case == "add_rms_norm":
        inputs, ours = [x, randn(B, T, h), w], lambda use, x, r, w: rms_norm.add_rms_norm(x, r, w, eps, use)
        more["liger"] = (lambda x, r, w: lg.liger_fused_add_rms_norm(x, r, w, eps), inputs)
    elif case == "swiglu":
        inputs, ours = [randn(B, T, 2 * f)], lambda use, gu: swiglu.swiglu(gu, use)
        more["liger"] = (lg and lg.liger_swiglu, [randn(B, T, f), randn(B, T, f)])
    elif case == "rope":
        cos, sin = (t.to(device) for t in rope.rope_table(T, D, m.rope_theta))
        inputs, ours = [randn(B, T, H + 2 * K, D)], lambda use, qkv: rope.rope(qkv, cos, sin, H, K, use)
        wide = [torch.cat((t, t), 1)[None].to(dtype) for t in (cos, sin)]  # (1, T, D): what transformers hands on
        views = [randn(B, T, n, D).detach().transpose(1, 2).requires_grad_() for n in (H, K)]
        more["hf"] = (lambda q, k: hf_rope(q, k, *wide), views)
        more["liger"] = (lambda q, k: lg.liger_rope(q, k, *wide), views)
    elif case == "attention":
        inputs, ours = [randn(B, T, n, D) for n in (H, K, K)], lambda use, q, k, v: attention.attention(q, k, v, use)
        for name in ("flash", "cudnn", "efficient"):
            backend = SDPBackend.__members__[f"{name.upper()}_ATTENTION"]
            more[f"sdpa {name}"] = (sdpa_kernel(backend)(lambda q, k, v: attention.attention(q, k, v, "torch")), inputs)
    else:
        y = torch.randint(0, V, (B, T), device=device)
        w = (0.02 * torch.randn(V, h, device=device)).requires_grad_()
        inputs, ours = (
            [x, w],
            lambda use, x, w, n=None: cross_entropy.linear_cross_entropy(x, w, y, use=use, chunk_bytes=n),
        )

        def all_logits(x: Tensor, w: Tensor) -> Tensor:
            return cross_entropy.linear_cross_entropy_ref(x, w.type_as(x), y)

        more |= {
            "all logits": (all_logits, inputs),
            "all logits compile": (torch.compile(all_logits, dynamic=False), inputs),
        }
        more["liger"] = (
            lambda x, w: lg.liger_fused_linear_cross_entropy(x.view(-1, h), w.type_as(x), y.view(-1)),
            inputs,
        )
        for n in (1 << 27, 1 << 28, 1 << 29, 1 << 30) if cuda else ():
            more[f"triton {n >> 20} MiB"] = (partial(ours, "triton", n=n), inputs)
    out: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
        use: (partial(ours, use), inputs) for use in ("triton", "torch")
    }
    if case != "cross_entropy":  # which is one operation to torch.compile
        out["compile"] = (torch.compile(out["torch"][0], dynamic=False), inputs)
    return out | more


def measure(fn: Callable[..., Any], inputs: list[Tensor], device: torch.device) -> Row:
    """Seconds forward, backward and both; bytes at the peak of both beside inputs and gradients."""

    def forward() -> list[Tensor]:
        y = fn(*inputs)
        return [t for t in (y if isinstance(y, tuple) else (y,)) if t.requires_grad]

    ys = forward()
    grads = [torch.randn_like(y) for y in ys]
    with torch._functorch.config.patch(donated_buffer=False):  # compiled backwards are called more than once
        ys = forward()
        out: Row = {
            "forward": timed(forward, device),
            "backward": timed(lambda: torch.autograd.grad(ys, inputs, grads, retain_graph=True), device),
            "both": timed(lambda: torch.autograd.grad(forward(), inputs, grads), device),
        }
    if device.type == "cuda":
        del ys
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        made = torch.autograd.grad(forward(), inputs, grads)
        out["extra_bytes"] = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in made)
    return out


def kernel_bars(case: str, m: config.Model, rows: dict[str, Row]) -> list[Row]:
    """The bars of a case against its triton row."""
    found, ours = [], rows["triton"]
    for (name, direction), (roof, faster) in KERNEL_BARS.items():
        if name == case and direction in ours:
            at = m.hidden // m.n_head if case == "attention" else m.hidden
            unit = "tflops" if case in MATMULS else "of_copy"
            found += verdict(
                f"{direction} {unit}", ours[f"{direction}_{unit}"], roof.get(at) if isinstance(roof, dict) else roof
            )
            for other, times in faster.items():
                got = rows[other][direction] / ours[direction] if direction in rows.get(other, {}) else None
                found += verdict(
                    f"{direction} {other}/triton", got, times.get(at) if isinstance(times, dict) else times
                )
    return found + (
        verdict("extra bytes", ours.get("extra_bytes"), EXTRA_BAR, at_most=True) if case == "cross_entropy" else []
    )


def bench_kernels(o: Any, c: config.Config, device: torch.device, dtype: torch.dtype) -> Row:
    cuda = device.type == "cuda"
    B = 8 if cuda else 2
    if o.save and not cuda:
        raise UserError("--save: got a CPU; it is for CUDA, since on a CPU auto is always torch")
    sizes = {name: config.load(name, o.overrides).model for name in o.sizes}
    floor = floors(device, dtype, {})
    rows: list[Row] = []
    todo: dict[tuple[str, str], tuple[str, config.Model]] = {}
    for size, m in sizes.items():
        for case in o.only or CASES:
            todo.setdefault((case, kernels.shape_key(case.removeprefix("add_"), m)), (size, m))
    for (case, key), (size, m) in tqdm(todo.items(), desc="kernels", disable=None):
        torch._dynamo.reset()  # or its limit of recompilations would end in eager rows
        torch.manual_seed(0)
        each: dict[str, Row] = {}
        for row, (fn, inputs) in candidates(case, m, B, device, dtype).items():
            each[row] = v = Row(size=size, kernel=case, key=key, row=row, note=missing(row, cuda))
            if not v["note"]:
                try:
                    v |= measure(fn, inputs, device)
                except Exception as e:  # one that this device or shape cannot do; the others go on
                    v["note"] = f"failed: {(str(e).strip().splitlines() or [type(e).__name__])[0][:120]}"
            flops, moved = work(case, m, B), traffic(case, m, B, dtype.itemsize)
            for d in ("forward", "backward", "both") if "both" in v else ():
                if case not in MATMULS:
                    v[f"{d}_bytes_per_second"] = moved[d] / v[d]
                    v[f"{d}_of_copy"] = moved[d] / v[d] / floor["copy_bytes_per_second"]
                elif d == "both" or case == "attention":
                    v[f"{d}_tflops"] = flops[d] / v[d] / 1e12
                v["roofline"] = (flops["both"] / moved["both"], flops["both"] / v["both"] / 1e12)
        each["triton"] |= {"bars": (bars := kernel_bars(case, m, each)), "bar": show(bars) or None}
        rows += each.values()
    table(
        rows,
        size=("size", "", 1),
        kernel=("kernel", "", 1),
        row=("row", "", 1),
        forward=("fwd us", ",.1f", 1e6),
        backward=("bwd us", ",.1f", 1e6),
        both=("both us", ",.1f", 1e6),
        forward_of_copy=("fwd/copy", ".2f", 1),
        backward_of_copy=("bwd/copy", ".2f", 1),
        forward_tflops=("fwd TFLOP/s", ",.3g", 1),
        both_tflops=("both TFLOP/s", ",.3g", 1),
        extra_bytes=("extra GB", ",.3f", 1e-9),
        note=("", "", 1),
        bar=("bar", "", 1),
    )
    if o.save:
        save_best(rows, torch.cuda.get_device_name(device))
    return {"floors": floor, "sequences": B, "rows": rows}


def save_best(rows: list[Row], device: str) -> None:
    """Write into kernels/measured.json which of triton and torch, compiled or not, was faster at each shape; other entries stay."""
    known = json.loads(kernels.MEASURED.read_text()) if kernels.MEASURED.exists() else {}
    best = dict(known.get(device, {}).get("best", {}))
    mine = [
        r for r in rows if r["kernel"] != "rms_norm"
    ]  # all norms of the model but the first are add_rms_norm, and it decides for both
    for key in {r["key"] for r in mine}:
        seconds = {r["row"]: r["both"] for r in mine if r["key"] == key and "both" in r}
        torchs = [seconds[name] for name in ("torch", "compile") if name in seconds]
        if torchs:
            best[key] = "triton" if seconds.get("triton", min(torchs)) < min(torchs) else "torch"
    known[device] = {**{k: about()[k] for k in ("torch", "triton", "date")}, "best": dict(sorted(best.items()))}
    write_text(kernels.MEASURED, json.dumps(known, indent=1) + "\n")
    print(f"{kernels.MEASURED}: {len(best)} shapes of {device}")


# ----------------------------------------------------------------------------------------------------------
# data, checkpoint


def bench_data(o: Any, c: config.Config, device: torch.device, dtype: torch.dtype) -> Row:
    """The shard writer beside tiktoken alone on the same documents and as many processes; the reader in one process."""
    jobs, rounds = o.jobs, o.rounds or 3
    tok = Tokenizer(o.tokenizer)
    if o.tokenizer == "bytes":
        raise UserError(
            "--tokenizer: got bytes, expected a tiktoken encoding or a rank file: bytes has nothing to compare with"
        )
    with lzma.open(prepare.TEXT, "rt", encoding="utf-8") as f:
        whole = "".join(json.loads(line)["text"] for line in f)
    # documents of 8,000 characters, every further pass over the text cut elsewhere, since the writer drops equal ones
    starts = itertools.chain.from_iterable(range(97 * i, len(whole), 8000) for i in range(80))
    docs = [whole[k : k + 8000] for k in itertools.islice(starts, round(o.megabytes * 125))]
    raw, ours, speeds = [], [], []  # tokens/s
    with tempfile.TemporaryDirectory(dir=o.dir) as folder:
        (Path(folder) / "text.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in docs))
        for i in tqdm(range(rounds), desc="data", disable=None):
            began = time.perf_counter()
            count = sum(map(len, tok.encoding.encode_ordinary_batch(docs, num_threads=jobs)))
            middle = time.perf_counter()
            out = Path(folder) / str(i)
            done = subprocess.run(
                [
                    sys.executable,
                    str(prepare.ROOT / "data.py"),
                    "prepare",
                    "--out",
                    str(out),
                    "--source",
                    f"{folder}/text.jsonl",
                    "--tokenizer",
                    o.tokenizer,
                    "--jobs",
                    str(jobs),
                ],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise UserError(
                    f"--megabytes {o.megabytes:g}: data.py could not prepare that text: {done.stderr.strip().splitlines()[-1]}"
                )
            raw.append(count / (middle - began))
            ours.append(count / (time.perf_counter() - middle))
        there = (Path(c.data.path) / "meta.json").exists()
        tokens = data.Tokens(
            c.data.path if there else str(out), c.model.context, c.batch_sequences, [10**9], c.train.seed, repeat=True
        )
        if problems := tokens.problems(0, 1):
            raise UserError("\n".join(problems))
        steps = itertools.count()
        for _ in range(rounds + 1):
            until, n, began = time.perf_counter() + 0.5, 0, time.perf_counter()
            while time.perf_counter() < until:
                n += tokens.batch(next(steps))[0].size
            speeds.append(n / (time.perf_counter() - began))
    writer = statistics.median(a / b for a, b in zip(ours, raw, strict=True))
    speed = statistics.median(speeds[1:])  # the first round maps the file into memory
    bars = verdict("writer", writer, 0.90) + verdict("reader", speed, 30e6)
    rows = [
        {"row": f"tiktoken alone, {jobs} threads", "tokens_per_second": statistics.median(raw)},
        {
            "row": f"data.py prepare, {jobs} processes",
            "tokens_per_second": statistics.median(ours),
            "ratio": writer,
            "to": "tiktoken",
            "bar": show(bars[:1]),
        },
        {
            "row": f"reader, {c.batch_sequences} x {c.model.context} a batch",
            "tokens_per_second": speed,
            "bar": show(bars[1:]),
        },
    ]
    print(
        f"{len(docs):,} documents, {count:,} tokens by {Path(o.tokenizer).name}; the reader on {c.data.path if there else 'the same'}"
    )
    table(
        rows,
        row=("row", "", 1),
        tokens_per_second=("tokens/s", ",.0f", 1),
        ratio=("ratio", ".2f", 1),
        to=("to", "", 1),
        bar=("bar", "", 1),
    )
    return {"documents": len(docs), "tokens": count, "jobs": jobs, "rows": rows, "bars": bars}


def bench_checkpoint(o: Any, c: config.Config, device: torch.device, dtype: torch.dtype) -> Row:
    """Save and load of weights and moments beside plain files and copies of the same bytes, in turn."""
    need, rounds = 12 * llama.parameters(c.model), o.rounds or 3
    where = o.dir or tempfile.gettempdir()
    for what, factor, have in (
        ("of disk", 2.2, shutil.disk_usage(where).free),
        ("of memory", 5.0, total_memory(torch.device("cpu"))),
    ):
        if have < factor * need:
            raise UserError(
                f"--size: {factor * need / 1e9:,.1f} GB {what} are needed and {have / 1e9:,.1f} GB are there; take a smaller --size or another --dir"
            )
    with device:
        net = llama.Transformer(c.model)
    state = checkpoint.state(net, torch.optim.AdamW(net.parameters(), fused=True))
    for name, t in state.items():
        if name.startswith("exp_avg"):
            t.normal_()  # zeros could be compressed
    record = {"segment": "", "version": 1, "pinned": False}
    seconds: dict[str, list[float]] = {}

    def clock(name: str, fn: Callable[[], Any], began: float | None = None) -> float:
        """Note how long a call took, or how long ago another one began; returns when that was."""
        began = began or time.perf_counter()
        fn()
        seconds.setdefault(name, []).append(time.perf_counter() - began)
        return began

    def copy() -> None:
        for name, t in state.items():
            saver.host[name].copy_(t, non_blocking=t.is_cuda)
        if device.type == "cuda":
            torch.cuda.synchronize()

    def write() -> None:
        with open(plain, "wb") as f:
            for t in saver.host.values():
                f.write(t.reshape(-1).numpy().data)
            f.flush()
            os.fsync(f.fileno())

    with tempfile.TemporaryDirectory(dir=where) as folder:
        segment, plain = Path(folder) / "segment", Path(folder) / "plain"
        segment.mkdir()
        saver, saved = checkpoint.Saver(segment), checkpoint.path(segment, 0)
        begin = partial(saver.save, 0, state, record)
        clock("the first one, which allocates", begin)
        saver.wait()
        for _ in tqdm(range(rounds), desc="checkpoint", disable=None):
            shutil.rmtree(saved)  # a save leaves one that is there as it is
            clock("copy to the host", copy)
            began = clock("stall of an asynchronous save", begin)
            clock("whole asynchronous save", saver.wait, began)
            shutil.rmtree(saved)
            plain.unlink(missing_ok=True)  # to free its pages is no part of a write
            clock("plain write and fsync", write)
            clock("save", partial(checkpoint.save, segment, 0, state, record))
            clock("SHA-256 of it", partial(sha256, plain))
            clock("verify", partial(checkpoint.verify, saved))
            clock("plain read", plain.read_bytes)
            clock("load", partial(checkpoint.load, saved, state))
    middle = {name: statistics.median(s) for name, s in seconds.items()}
    size = sum(t.nbytes for t in saver.host.values())
    stall, copied, written = "stall of an asynchronous save", "copy to the host", "plain write and fsync"
    beside = {
        stall: copied,
        "the first one, which allocates": copied,
        "whole asynchronous save": written,
        "save": written,
        "verify": "SHA-256 of it",
        "load": "plain read",
    }
    rows = [Row(row=name, seconds=s, bytes_per_second=size / s) for name, s in middle.items()]
    for r in rows:
        if to := beside.get(r["row"]):
            r |= {"ratio": middle[to] / r["seconds"], "to": to}
    bars = verdict("save to plain write", middle[written] / middle["save"], 0.85)
    bars += verdict("stall by copy", middle[stall] / middle[copied], 1.5, at_most=True)
    print(f"{size:,} bytes in {where}; what is read was written just before, so it comes from the memory")
    table(
        rows,
        row=("row", "", 1),
        seconds=("seconds", ".4f", 1),
        bytes_per_second=("GB/s", ".3g", 1e-9),
        ratio=("ratio", ".2f", 1),
        to=("to", "", 1),
    )
    print(show(bars))
    return {"bytes": size, "rows": rows, "bars": bars}


def bench_eval(o: Any, c: config.Config, device: torch.device, dtype: torch.dtype) -> Row:
    """Our adapter for downstream tasks beside transformers with the same weights on the same batch, in turn.

    A question and each of its four answers fill the context: answers of an eighth of it, or of one token, where the question is read once for
    all four. Written answers are half a context after a quarter. transformers does what the harness's own adapter asks of it, which
    reads questions once as well: all logits of a row, and `generate`.
    """
    optional("transformers", "transformers", "bench eval")

    tok, m, B, rounds = Tokenizer(str(prepare.RANKS)), c.model, 16, o.rounds or 5
    if m.vocab_size < tok.vocab_size or m.context < 32:
        raise UserError(
            f"model.vocab_size, model.context: got {m.vocab_size} and {m.context}, expected {tok.vocab_size} or more, of {prepare.RANKS.name}, and 32 or more"
        )
    with device:
        net = llama.Transformer(m, dtype, kernels.choose(c.train.kernels, device, m)).eval()
        peer: Any = peers.hugging_face(m, net).to(device, dtype).eval()
    lm = harness.LM(net, tok, B)
    with lzma.open(prepare.TEXT, "rt", encoding="utf-8") as f:
        ids = tok.encode("".join(json.loads(line)["text"] for line in f)[: 20 * B * m.context])
    T, a = m.context, m.context // 8
    questions = [ids[i * T : (i + 1) * T] for i in range(B)]
    answers = {
        "four answers each": [(q[:-a], ids[k : k + a]) for q in questions for k in range(0, 4 * a, a)],
        "four answers of a token": [(q[:-1], [k]) for q in questions for k in range(4)],
    }
    prompts = [q[: T // 4] for q in questions]

    @torch.no_grad()
    def all_logits(asked: list[tuple[list[int], list[int]]]) -> list[float]:
        out = [0.0] * len(asked)
        read: dict[tuple[int, ...], list[int]] = {}  # answers of one token read the same
        for i, (q, x) in enumerate(asked):
            read.setdefault((*q, *x[:-1]), []).append(i)
        for k in range(0, len(read), B):
            part = list(read)[k : k + B]
            logp = peer(torch.tensor(part, device=device)).logits.log_softmax(-1)
            for row, key in zip(logp, part, strict=True):
                for i in read[key]:
                    answer = torch.tensor(asked[i][1], device=device)
                    out[i] = row[-len(answer) :].gather(1, answer[:, None]).sum().item()
        return out

    def write() -> list[list[int]]:
        made = peer.generate(
            torch.tensor(prompts, device=device),
            max_new_tokens=T // 2,
            min_new_tokens=T // 2,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
        return made[:, len(prompts[0]) :].tolist()

    def ours(asked: list[tuple[list[int], list[int]]]) -> list[float]:
        return [nats for nats, _ in lm._loglikelihood_tokens([(None, *p) for p in asked])]

    calls: dict[str, dict[str, Callable[[], Any]]] = {
        name: {"ours": partial(ours, x), "transformers": partial(all_logits, x)} for name, x in answers.items()
    }
    calls["written answers"] = {"ours": lambda: harness.generate(net, prompts, T // 2, set()), "transformers": write}
    tokens = {name: sum(len(q) + len(x) - 1 for q, x in asked) for name, asked in answers.items()} | {
        "written answers": B * (T // 2)
    }
    seconds: dict[tuple[str, str], list[float]] = {}
    for i in tqdm(range(rounds + 1), desc="eval", disable=None):
        for name, sides in calls.items():
            found = {}
            for who, fn in sides.items():
                began = time.perf_counter()
                found[who] = fn()  # lists, so a device has ended its work
                if i:  # the first warms up
                    seconds.setdefault((name, who), []).append(time.perf_counter() - began)
            flat = {who: np.array(x, dtype=np.float64) for who, x in found.items()}
            if not np.allclose(flat["ours"], flat["transformers"], rtol=1e-3 if dtype == torch.float32 else 0.05):
                raise UserError(f"bench eval: {name}: ours and transformers disagree, so there is nothing to compare")
    rows, bars = [], []
    for name, sides in calls.items():
        speed = {who: tokens[name] / statistics.median(seconds[name, who]) for who in sides}
        ratio = speed["ours"] / speed["transformers"]
        bars += verdict(name, ratio, 1.0)
        rows += [
            {"row": f"{name}: {who}", "tokens_per_second": speed[who]}
            | ({"ratio": ratio, "to": "transformers", "bar": show(bars[-1:])} if who == "ours" else {})
            for who in sides
        ]
    print(f"{B} rows of {T}; tokens are counted once for each answer, and new ones for those that are written")
    table(
        rows,
        row=("row", "", 1),
        tokens_per_second=("tokens/s", ",.0f", 1),
        ratio=("ratio", ".2f", 1),
        to=("to", "", 1),
        bar=("bar", "", 1),
    )
    return {"batch": B, "rounds": rounds, "rows": rows, "bars": bars}


# ----------------------------------------------------------------------------------------------------------
# Output


def about() -> Row:
    """What the numbers depend on, apart from the config."""
    names = [
        d for d in ("torch", "triton", "transformers", "liger-kernel") if importlib.util.find_spec(d.replace("-", "_"))
    ]
    installed = {d: importlib.metadata.version(d) for d in names}
    return {
        "python": platform.python_version(),
        "triton": None,
        **installed,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "commit": train.git_commit(),
        "command": shlex.join(["python", "bench", *sys.argv[1:]]),
    }


def plot(verb: str, result: Row, file: str) -> None:
    """step: tokens/s of the rows. kernels: the roofline of this machine, and the kernels under it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    if verb == "step":
        rows = [r for r in result["rows"] if r.get("tokens_per_second")][::-1]
        colors = ["#0072B2" if r["row"].startswith("ours") else "#E69F00" for r in rows]
        ax.bar_label(
            ax.barh([r["row"] for r in rows], [r["tokens_per_second"] for r in rows], color=colors),
            fmt="{:,.0f}",
            padding=3,
        )
        ax.margins(x=0.15)
        ax.set(xlabel="tokens/s")
    else:
        copy, roof = result["floors"]["copy_bytes_per_second"] / 1e12, result["floors"]["matmul_flops"] / 1e12
        x = np.geomspace(0.1, 1e5, 200)
        ax.plot(x, np.minimum(copy * x, roof), color="black", label=f"copy {copy:.3g} TB/s, matmul {roof:.3g} TFLOP/s")
        which = "triton" if any("both" in r for r in result["rows"] if r["row"] == "triton") else "torch"
        looks = zip(CASES, ("#E69F00", "#D55E00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2"), "ov^sDP", strict=True)
        for case, color, marker in looks:
            points = [
                r["roofline"] for r in result["rows"] if r["kernel"] == case and r["row"] == which and "both" in r
            ]
            if points:
                ax.scatter(*zip(*points, strict=True), color=color, marker=marker, label=f"{case} ({which})", zorder=3)
        ax.set(
            xscale="log",
            yscale="log",
            xlabel="FLOPs a byte, each input read and each output written once",
            ylabel="TFLOP/s, forward and backward",
        )
        ax.legend()
    ax.set_title(result["device"])
    figure.savefig(file, dpi=150)


def at_least(low: float, kind: Callable[[str], float] = int) -> Callable[[str], float]:
    def parse(value: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= (found := kind(value)) <= 1e6:
                return found
        raise argparse.ArgumentTypeError(
            f"got {value!r}, expected {'a whole number' if kind is int else 'a number'} of {low} or more"
        )

    return parse


def one_of(*names: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in names:
            raise argparse.ArgumentTypeError(f"got {value!r}, expected {', '.join(names)}")
        return value

    return parse


def some(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda value: [parse(v) for v in value.split(",")]


def main() -> None:
    argv = sys.argv[1:]
    a = Parser(prog="bench", description=__doc__)
    a.set_defaults(row=None, plot=None, dir=None, memory=False)
    add = a.add_subparsers(dest="verb", required=True, parser_class=Parser)
    verbs = {
        v: add.add_parser(v, usage=f"bench {v} [--flag VALUE ..] [--section.key VALUE ..]", help=h, description=h)
        for v, h in (
            ("step", "a training step beside its peers"),
            ("kernels", "each kernel beside its peers"),
            ("data", "reader and shard writer"),
            ("checkpoint", "save and load"),
            ("eval", "downstream tasks beside transformers"),
        )
    }
    yes: Row = {"action": "store_true"}
    flags: tuple[tuple[str, str, Row, str], ...] = (
        ("step data checkpoint eval", "--size", {"dest": "config"}, "a name in configs/ or a .toml file, as --config"),
        (
            "kernels",
            "--size",
            {"dest": "sizes", "nargs": "+"},
            "names in configs/ [203m 608m 1.2b 3.1b; on a CPU tiny]",
        ),
        ("kernels", "--only", {"type": some(one_of(*CASES))}, f"some of {','.join(CASES)}"),
        (
            "kernels",
            "--save",
            yes,
            "write which is fastest into kernels/measured.json, where train.kernels = auto looks it up",
        ),
        (
            "step",
            "--peers",
            {"type": some(one_of("all", "none", *PEERS)), "default": ["all"]},
            f"all, none, or some of {','.join(PEERS)} [all]",
        ),
        (
            "step",
            "--micro",
            {"type": some(at_least(1))},
            "micro-batches to try [16,32,8,4; on a CPU 8,16,4]; the loss is of batches of the first",
        ),
        ("step", "--memory", yes, "peak memory of the loss instead, at a vocabulary of 100,277 if none is given"),
        (
            "step",
            "--minutes",
            {"type": at_least(0, float), "default": 10.0},
            "no further round begins after these, and a third of them goes to the look for the best micro-batch [10]",
        ),
        ("step", "--steps", {"type": at_least(1), "default": 20}, "timed updates of a round [20]"),
        ("step", "--warmup", {"type": at_least(0), "default": 10}, "updates before them [10]"),
        ("step", "--updates", {"type": at_least(0), "default": 20}, "updates whose last loss is compared [20]"),
        ("step", "--row", {}, argparse.SUPPRESS),
        (
            "step data checkpoint eval",
            "--rounds",
            {"type": at_least(1)},
            "how often all is measured, in turn [3; eval 5]",
        ),
        (
            "data",
            "--megabytes",
            {"type": at_least(0.1, float), "default": 64.0},
            "of text to tokenize [64]; of little text the start of the processes is most of the time",
        ),
        (
            "data",
            "--jobs",
            {"type": at_least(1), "default": os.cpu_count() or 1},
            "processes, and threads of tiktoken [one a core]",
        ),
        (
            "data",
            "--tokenizer",
            {"default": str(prepare.RANKS)},
            f"a tiktoken encoding or a rank file [{prepare.RANKS.name}]",
        ),
        ("data checkpoint", "--dir", {}, "where to write [the system's temporary folder]"),
        ("step kernels data checkpoint eval", "--json", {}, "write everything to this file"),
        ("step kernels", "--plot", {}, "draw it into this file"),
    )
    for names, flag, how, what in flags:
        for v in names.split():
            verbs[v].add_argument(flag, help=what, **how)
    for parser in verbs.values():
        parser.add_config()
    if not argv:
        a.print_help()
        return
    cuda = torch.cuda.is_available()
    default = "small" if argv[0] == "checkpoint" else "203m" if cuda and argv[0] == "step" else "tiny"
    o, c = a.parse_config(argv, default=default)
    if o.verb == "kernels":
        o.sizes = o.sizes or ([o.config] if o.config else ["203m", "608m", "1.2b", "3.1b"] if cuda else ["tiny"])
    o.config = o.config or default
    o.overrides = {k: getattr(o, k) for k in config.values(c) if getattr(o, k) is not None}
    for file in filter(None, (o.json, o.plot, o.dir and f"{o.dir}/file")):
        if not Path(file).absolute().parent.is_dir():
            raise UserError(f"{Path(file).absolute().parent}: is no folder; make it")
    if o.json and Path(o.json).is_dir():
        raise UserError(f"--json: got {o.json}, which is a folder, expected a file")
    if o.plot and Path(o.plot).suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot: got {o.plot}, expected a name that ends in .png, .pdf or .svg")
    if o.plot and o.memory:
        raise UserError("--plot: step --memory draws nothing; leave it out")
    if o.plot:
        optional("matplotlib", "matplotlib", "--plot")
    if c.train.device == "mps":
        raise UserError("train.device: got mps, expected auto, cuda or cpu")
    if o.memory and "model.vocab_size" not in o.overrides:
        c.model.vocab_size = 100277
    device = pick_device("cpu" if c.train.device == "auto" and not cuda else c.train.device, 0)
    dtype = (
        torch.bfloat16
        if c.train.dtype == "bfloat16" or (c.train.dtype == "auto" and device.type == "cuda")
        else torch.float32
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {platform.machine()}"
    if problems := kernels.problems(c.train.kernels, device.type == "cuda", c.model):
        raise UserError("\n".join(problems))
    if o.row:
        print(json.dumps((memory if o.memory else step)(o, c, device, dtype)))
        return
    print(f"bench {o.verb}: {name}, {dtype}")
    run = {
        "step": memory if o.memory else step,
        "kernels": bench_kernels,
        "data": bench_data,
        "checkpoint": bench_checkpoint,
        "eval": bench_eval,
    }[o.verb]
    found = run(o, c, device, dtype)
    result = {
        "bench": o.verb,
        "device": name,
        "dtype": str(dtype),
        "threads": torch.get_num_threads(),
        **about(),
        "config": config.values(c),
        **found,
    }
    if o.json:
        write_text(Path(o.json), json.dumps(result, indent=1) + "\n")
    if o.plot:
        plot(o.verb, result, o.plot)


if __name__ == "__main__":
    with user_errors("bench"):
        main()
