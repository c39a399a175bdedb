"""A training step beside its peers: tokens/s, MFU, peak memory, loss. Fresh processes, rounds in turn (A B A B)."""

import gc
import itertools
import statistics
import time
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

import config
import model as llama
from bench import peers
from bench.measure import Row, fresh_row, require, roofs, square_product, total_memory, verdict
from kernels import check
from runtime.device import peak_flops, steady_malloc
from runtime.errors import UserError

# (layers, width), 203M to 3.1B parameters: tokens/s of one H100, speed and peak memory relative to hf-compile
BARS = {
    (24, 512): (317e3, 1.34, 0.40),
    (12, 1024): (227e3, 1.28, 0.45),
    (24, 1024): (133e3, 1.23, 0.55),
    (24, 1536): (74.6e3, 1.16, 0.65),
    (48, 1536): (39.9e3, 1.14, 0.75),
    (40, 2048): (29.7e3, 1.14, 0.85),
}
CPU_BARS = (0.50, 1.1)  # MFU of the matrix product, speed relative to nanoGPT's shape


class Trainer:
    """The model and optimizer of one row, and the update that train.py makes of them."""

    def __init__(self, row: str, c: config.Config, device: torch.device, dtype: torch.dtype) -> None:
        self.c, self.device, self.cuda, t = c, device, device.type == "cuda", c.train
        torch.set_float32_matmul_precision("high" if dtype == torch.bfloat16 else "highest")  # as train.py
        torch.manual_seed(t.seed)
        use = check.choose("torch" if row == "ours-torch" else t.kernels, c.model, dtype, device)
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

    def speed(self, micro: int, warmup: int, steps: int) -> float:
        """Tokens/s of the median of `steps` updates after `warmup` others; on a GPU by device events."""

        def mark() -> Any:
            if self.cuda:
                return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))
            return time.perf_counter()

        # an update is on a GPU one micro-batch, on a CPU the batch of the config
        sequences = micro if self.cuda else max(micro, self.c.batch_sequences)
        x, y = self.ids(sequences, 0)
        gc.disable()  # as train.py does
        marks = []
        for _ in range(warmup + steps):
            marks.append(mark())
            self.step(x, y, micro, self.c.plan.max_lr)
        marks.append(mark())
        if self.cuda:
            torch.cuda.synchronize()
        timed = itertools.pairwise(marks[warmup:])
        seconds = [a.elapsed_time(b) / 1e3 if self.cuda else b - a for a, b in timed]
        return sequences * self.c.model.context / statistics.median(seconds)


def run(o: Any, c: config.Config, device: torch.device, dtype: torch.dtype) -> Row:
    cuda = device.type == "cuda"
    o.micro = o.micro or ([16, 32, 8, 4] if cuda else [8, 16, 4])
    if any(n % m for m in o.micro for n in (o.micro[0], c.batch_sequences) if m <= n):
        raise UserError(f"--micro: got {o.micro}, expected divisors of the batch of {c.batch_sequences} sequences")
    state = 16.0 * c.model.parameters  # weights, gradients and two moments in fp32
    require(f"--size: training {c.model.parameters:,} parameters", state, total_memory(device), "take a smaller --size")
    names = ["ours", "ours-torch"] if cuda else ["ours", "ours-compile"]
    names += (peers.PEERS if cuda else ("hf", "nanogpt")) if o.peers is None else o.peers
    rows = {name: Row(row=name, note=peers.missing(name, cuda)) for name in names}
    floors = roofs(device, dtype, c.model)
    torch.cuda.empty_cache()  # for the processes of the rows
    peak, source = 0.0, "the 1024^3 product before and after the row, one thread"  # on a CPU each row measures it
    if cuda:
        peak, source = peak_flops(device, dtype)
    measure_rounds(o, rows)
    measured = {name: row for name, row in rows.items() if not row["note"]}
    compare(measured, c, peak)
    what = f"{peak / 1e12:,.4g} TFLOP/s, {source}" if peak else source
    print(f"MFU of {what}, attention with its causal half; mfu_published: with all of it. loss: of update {o.updates}.")
    found = {"rows": list(rows.values()), "bars": bars_of(measured, c, cuda)}
    return {"floors": floors, "peak_flops": peak or None, "peak_from": source} | found


def measure_rounds(o: Any, rows: dict[str, Row]) -> None:
    """Add to each row its fastest micro-batch and loss of the first round, and the speed of every round."""
    until = time.perf_counter() + o.minutes * 60
    for turn in tqdm(range(o.rounds or 3), desc="rounds", disable=None):
        if turn and time.perf_counter() > until:
            print(f"{turn} rounds in {o.minutes:g} minutes")
            break
        for name, row in rows.items():
            if row["note"]:
                continue
            how = ["--micro", str(row["micro"]), "--updates", "0"] if turn else ["--micro", *map(str, o.micro)]
            found = fresh_row("--row", name, "--minutes", str(o.minutes / 3 / len(rows)), *how)
            row |= {k: v for k, v in found.items() if k not in row or k == "note"}
            row.setdefault("rounds", []).append({k: found.get(k) for k in ("tokens_per_second", "roof")})


def row(o: Any, c: config.Config, device: torch.device, dtype: torch.dtype) -> Row:
    """One row, in this process: its loss and fastest micro-batch (with --updates 0 the first one), then its speed."""
    cuda = device.type == "cuda"
    if o.row.startswith("ours"):  # as train.py does; a peer runs as its users run it
        steady_malloc(device)
    trainer = Trainer(o.row, c, device, dtype)
    found = fastest_micro(o, trainer) if o.updates else Row(micro=o.micro[0])
    before = 0.0 if cuda else square_product(device, dtype)[1]
    speed = trainer.speed(found["micro"], o.warmup, o.steps)
    roof = None if cuda else statistics.harmonic_mean([before, square_product(device, dtype)[1]])
    return found | {"tokens_per_second": speed, "roof": roof}


def fastest_micro(o: Any, trainer: Trainer) -> Row:
    """The loss after --updates and the fastest of the micro-batches that memory and --minutes allow."""
    loss, tried, no_memory, no_time = Row(), list[Row](), list[int](), list[int]()
    until = time.perf_counter() + o.minutes * 60
    for micro in o.micro:
        if micro > min(no_memory, default=micro):
            no_memory.append(micro)
        elif tried and time.perf_counter() > until:
            no_time.append(micro)
        else:
            try:
                loss = loss or trainer.losses(o.micro[0], micro, o.updates)
                trainer.speed(micro, 2, 1)
                if trainer.cuda:
                    torch.cuda.reset_peak_memory_stats()
                rate = trainer.speed(micro, 1, 5)
                peak = torch.cuda.max_memory_allocated() if trainer.cuda else None
                tried.append(Row(micro=micro, tokens_per_second=rate, peak_bytes=peak))
            except torch.OutOfMemoryError:
                no_memory.append(micro)
            # outside of the handler, whose exception holds the tensors
            trainer.optimizer.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
    assert tried, "no micro-batch fits into memory"
    fastest = max(tried, key=lambda t: t["tokens_per_second"])["micro"]
    return loss | {"no_memory": no_memory, "no_time": no_time, "tried": tried, "micro": fastest}


def median_ratio(a: Row, b: Row) -> float | None:
    """The median over rounds of a's speed relative to b's; None if either is empty, as it was not measured."""
    if not a or not b:
        return None
    rounds = zip(a["rounds"], b["rounds"], strict=True)
    return statistics.median(x["tokens_per_second"] / y["tokens_per_second"] for x, y in rounds)


def compare(rows: dict[str, Row], c: config.Config, peak: float) -> None:
    """Add medians, MFUs and ratios of the rounds. `peak`: FLOP/s of the device; 0: each round has its own "roof"."""
    ours = rows.get("ours", {})
    for name, row in rows.items():
        row["tokens_per_second"] = statistics.median(r["tokens_per_second"] for r in row["rounds"])
        row["ours_ratio"] = median_ratio(ours, row)
        tokens_per_flop = statistics.median(r["tokens_per_second"] / (peak or r["roof"]) for r in row["rounds"])
        row["mfu"] = tokens_per_flop * c.model.flops_per_token()
        row["mfu_published"] = tokens_per_flop * c.model.flops_per_token(causal=False)
        mine, theirs = ({t["micro"]: t["peak_bytes"] for t in r.get("tried", [])} for r in (ours, row))
        row["peak_bytes"] = theirs.get(row["micro"])
        both = [m for m in mine.keys() & theirs.keys() if theirs[m]]
        row["memory_ratio"] = mine[max(both)] / theirs[max(both)] if both else None
        if name == "nanogpt":  # its weights are others
            row.pop("loss", None)
        elif "loss" in row and "loss" in ours:
            row["loss_difference"] = row["loss"] - ours["loss"]
        gaps = (("no memory", row.get("no_memory")), ("no time", row.get("no_time")))
        row["left_out"] = "; ".join(f"{why} for {','.join(map(str, micros))}" for why, micros in gaps if micros) or None


def bars_of(rows: dict[str, Row], c: config.Config, cuda: bool) -> list[Row]:
    if cuda:
        ours, hf = rows.get("ours", {}), rows.get("hf-compile", {})
        speed, ratio, memory = BARS.get((c.model.n_layer, c.model.hidden), (None, None, None))
        bars = verdict("tokens/s (an H100's)", ours.get("tokens_per_second"), speed)
        bars += verdict("to hf-compile", hf.get("ours_ratio"), ratio)
        return bars + verdict("memory to hf-compile", hf.get("memory_ratio"), memory, at_most=True)
    bars = []
    for name in [name for name in rows if name not in peers.PEERS]:
        bars += verdict(f"{name}: part of the matmul", rows[name]["mfu"], CPU_BARS[0])
        bars += verdict(f"{name}: to nanogpt", median_ratio(rows[name], rows.get("nanogpt", {})), CPU_BARS[1])
    return bars
