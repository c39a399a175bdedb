"""The model and optimizer of one row of `bench step`, and the update that train.py makes of them."""

import gc
import itertools
import statistics
import time
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

import config
import kernels
import model as llama
from bench import peers
from bench.report import Row


class Trainer:
    def __init__(self, row: str, c: config.Config, device: torch.device, dtype: torch.dtype) -> None:
        self.c, self.device, self.cuda, t = c, device, device.type == "cuda", c.train
        torch.set_float32_matmul_precision("high" if dtype == torch.bfloat16 else "highest")  # as train.py
        torch.manual_seed(t.seed)
        use = kernels.choose("torch" if row == "ours-torch" else t.kernels, device)
        with device:
            ours = llama.Transformer(c.model, dtype, use, t.recompute)
            self.net: nn.Module = ours
            if row == "nanogpt":
                self.net = peers.NanoGPT(c.model)
            elif row.startswith("hf"):
                self.net = peers.hugging_face(c.model, ours, "liger" in row)
        self.hf = row.startswith("hf")
        self.autocast = dtype == torch.bfloat16 and not row.startswith("ours")
        self.compiled = row.endswith("compile") or (self.cuda and row in ("ours", "ours-torch", "nanogpt"))
        self.model: Any = torch.compile(self.net, dynamic=False) if self.compiled else self.net
        matrices = [w for w in self.net.parameters() if w.dim() >= 2]
        vectors = [w for w in self.net.parameters() if w.dim() < 2]
        groups = [{"params": matrices, "weight_decay": t.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(t.beta1, t.beta2), fused=True)

    def ids(self, sequences: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (sequences, context), the same for every row. Frequencies of 1/rank are soon learned."""
        generator, V = torch.Generator().manual_seed(seed), self.c.model.vocab_size
        uniform = torch.rand(sequences, self.c.model.context + 1, generator=generator, dtype=torch.float64)
        ids = ((V**uniform).long() - 1).clamp_(0, V - 1).to(self.device)
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
        """The last loss of some updates under a warm-up; compiling: what the first took beyond the median."""
        losses, seconds = [], []
        for i in range(updates):
            began = time.perf_counter()
            losses.append(self.step(*self.ids(sequences, i), micro, self.c.plan.max_lr * (i + 1) / updates).item())
            seconds.append(time.perf_counter() - began)
        compiling = seconds[0] - statistics.median(seconds) if self.compiled else None
        return {"loss": losses[-1], "compile_seconds": compiling}

    def speed(self, sequences: int, micro: int, warmup: int, steps: int) -> float:
        """Tokens/s of the median of `steps` updates after `warmup` others; on a GPU by device events."""

        def mark() -> Any:
            if not self.cuda:
                return time.perf_counter()
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event

        x, y = self.ids(sequences, 0)
        marks = []
        gc.collect()
        gc.disable()
        for _ in range(warmup + steps):
            marks.append(mark())
            self.step(x, y, micro, self.c.plan.max_lr)
        marks.append(mark())
        gc.enable()
        if self.cuda:
            torch.cuda.synchronize()
        timed = itertools.pairwise(marks[warmup:])
        seconds = [a.elapsed_time(b) / 1e3 if self.cuda else b - a for a, b in timed]
        return sequences * self.c.model.context / statistics.median(seconds)
