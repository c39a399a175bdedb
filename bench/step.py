"""A training step beside its peers: tokens/s, MFU, peak memory, loss. Fresh processes, rounds in turn (A B A B)."""

import gc
import statistics
import time
from typing import Any

import torch
from tqdm import tqdm

import config
from bench.measure import fresh_row, require, roofs, square_product, timed, total_memory
from bench.peers import PEERS, missing
from bench.report import Row, show, table, verdict
from bench.trainer import Trainer
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
COLUMNS = (
    "row micro tokens_per_second ours_ratio mfu mfu_published peak_bytes memory_ratio compile_seconds loss "
    "loss_difference left_out note"
)
CPU_BARS = (0.50, 1.1)  # MFU of the matrix product, speed relative to nanoGPT's shape


def run(o: Any, c: config.Config, device: torch.device, dtype: torch.dtype) -> Row:
    cuda = device.type == "cuda"
    o.micro = o.micro or ([16, 32, 8, 4] if cuda else [8, 16, 4])
    check(o.micro, c, device, dtype)
    if not cuda:
        torch.set_num_threads(1)
    names = ["ours", "ours-torch"] if cuda else ["ours", "ours-compile"]
    names += [p for p in PEERS if p in o.peers or ("all" in o.peers and (cuda or p in ("hf", "nanogpt")))]
    rows = {name: Row(row=name, note=missing(name, cuda)) for name in names}
    floors = roofs(device, dtype, c.model)
    peak, source = 0.0, "the 1024^3 product before and after the row, one thread"
    if cuda:
        torch.cuda.empty_cache()
        peak, source = peak_flops(device, dtype)
    measure_rounds(o, rows)
    compare(rows, c, peak)
    bars = bars_of(rows, c, cuda)
    table(list(rows.values()), COLUMNS)
    what = f"{peak / 1e12:,.4g} TFLOP/s, {source}" if peak else source
    print(f"MFU of {what}, attention with its causal half; mfu_published: with all of it. loss: of update {o.updates}.")
    print(show(bars))
    result = {"floors": floors, "peak_flops": peak or None, "peak_from": source}
    return result | {"rows": list(rows.values()), "bars": bars}


def check(micros: list[int], c: config.Config, device: torch.device, dtype: torch.dtype) -> None:
    """UserError if micro-batches do not divide the batch, or if the smallest cannot fit a peer into memory."""
    if any(n % m for m in micros for n in (micros[0], c.batch_sequences) if m <= n):
        got = ",".join(map(str, micros))
        raise UserError(f"--micro: got {got}, expected divisors of the batch of {c.batch_sequences} sequences: 8,4,2")
    what = f"--size: {c.model.parameters:,} parameters at a micro-batch of {min(micros)}"
    fix = "take a smaller --size, --micro or model.context"
    require(what, estimate(c, min(micros), dtype.itemsize), total_memory(device), fix)


def estimate(c: config.Config, micro: int, item: int) -> float:
    """Bytes of a plain PyTorch peer: fp32 weights, gradients and moments; activations of `item` bytes; logits, their
    fp32 copy and gradients in 12 bytes each."""
    m = c.model
    activations = m.n_layer * (16 * m.hidden + 4 * (m.ffn or 4 * m.hidden)) * item
    return 16.0 * m.parameters + micro * m.context * (activations + 12.0 * m.vocab_size)


def measure_rounds(o: Any, rows: dict[str, Row]) -> None:
    """Add to each row its fastest micro-batch and loss of the first round, and the speed of every round."""
    until = time.perf_counter() + o.minutes * 60
    minutes = str(o.minutes / 3 / len(rows))
    for turn in tqdm(range(o.rounds or 3), desc="rounds", disable=None):
        if turn and time.perf_counter() > until:
            print(f"{turn} rounds in {o.minutes:g} minutes")
            break
        for name, row in rows.items():
            if row["note"]:
                continue
            how = ["--micro", ",".join(map(str, [row["micro"]] if turn else o.micro))]
            how += ["--updates", "0"] if turn else []
            found = fresh_row("--row", name, "--minutes", minutes, *how)
            row |= {k: v for k, v in found.items() if k not in row or k == "note"}
            row.setdefault("rounds", []).append({k: found.get(k) for k in ("tokens_per_second", "roof")})


def row(o: Any, c: config.Config, device: torch.device, dtype: torch.dtype) -> Row:
    """One row, in this process: its loss and fastest micro-batch (with --updates 0 the first one), then its speed."""
    cuda = device.type == "cuda"
    if not cuda:
        torch.set_num_threads(1)
    if o.row.startswith("ours"):  # as train.py does; a peer runs as its users run it
        steady_malloc(device)
    trainer = Trainer(o.row, c, device, dtype)
    # an update's sequences: on a GPU one micro-batch, on a CPU the batch of the config
    sequences = 0 if cuda else max(o.micro[0], c.batch_sequences)
    found = fastest_micro(o, trainer, sequences) if o.updates else Row(micro=o.micro[0])
    _, product, flops = square_product(device, dtype)
    roof = [] if cuda else [timed(product, device)]
    speed = trainer.speed(sequences or found["micro"], found["micro"], o.warmup, o.steps)
    roof += [] if cuda else [timed(product, device)]
    return found | {"tokens_per_second": speed, "roof": flops / statistics.mean(roof) if roof else None}


def fastest_micro(o: Any, trainer: Trainer, sequences: int) -> Row:
    """The loss after --updates and the fastest of the micro-batches that memory and --minutes allow."""
    out, until = Row(no_memory=[], no_time=[], tried=[]), time.perf_counter() + o.minutes * 60
    for micro in o.micro:
        if micro > min(out["no_memory"], default=micro):
            out["no_memory"].append(micro)
        elif out["tried"] and time.perf_counter() > until:
            out["no_time"].append(micro)
        else:
            try:
                if "loss" not in out:
                    out |= trainer.losses(o.micro[0], micro, o.updates)
                out["tried"].append(attempt(trainer, sequences or micro, micro))
                continue
            except torch.OutOfMemoryError:
                out["no_memory"].append(micro)
            # outside of the handler, whose exception holds the tensors
            trainer.optimizer.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
    if not out["tried"]:
        raise RuntimeError("no micro-batch fits")
    return out | {"micro": max(out["tried"], key=lambda t: t["tokens_per_second"])["micro"]}


def attempt(trainer: Trainer, sequences: int, micro: int) -> Row:
    trainer.speed(sequences, micro, 2, 1)
    if trainer.cuda:
        torch.cuda.reset_peak_memory_stats()
    rate = trainer.speed(sequences, micro, 1, 5)
    peak = torch.cuda.max_memory_allocated() if trainer.cuda else None
    return {"micro": micro, "tokens_per_second": rate, "peak_bytes": peak}


def speeds(row: Row) -> list[float]:
    """Tokens/s of each round; empty if the row has none."""
    return [] if row.get("note", "left out") else [r["tokens_per_second"] for r in row["rounds"]]


def median_ratio(a: Row, b: Row) -> float | None:
    """The median over rounds of a's speed relative to b's."""
    ratios = [x / y for x, y in zip(speeds(a), speeds(b), strict=False)]
    return statistics.median(ratios) if ratios else None


def compare(rows: dict[str, Row], c: config.Config, peak: float) -> None:
    """Add medians, MFUs and ratios of the rounds. `peak`: FLOP/s of the device; 0: each round has its own "roof"."""
    ours = rows["ours"]
    for name, row in rows.items():
        if row["note"]:
            continue
        row["tokens_per_second"] = statistics.median(speeds(row))
        if not ours["note"]:
            row["ours_ratio"] = median_ratio(ours, row)
        for key, causal in (("mfu", True), ("mfu_published", False)):
            flops = c.model.flops_per_token(causal)
            row[key] = statistics.median(r["tokens_per_second"] * flops / (peak or r["roof"]) for r in row["rounds"])
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
        speed, ratio, memory = BARS.get((c.model.n_layer, c.model.hidden), (None, None, None))
        hf = rows.get("hf-compile", {})
        bars = verdict("tokens/s (an H100's)", rows["ours"].get("tokens_per_second"), speed)
        bars += verdict("to hf-compile", hf.get("ours_ratio"), ratio)
        return bars + verdict("memory to hf-compile", hf.get("memory_ratio"), memory, at_most=True)
    bars = []
    for name in ("ours", "ours-compile"):
        bars += verdict(f"{name}: part of the matmul", rows[name].get("mfu"), CPU_BARS[0])
        bars += verdict(f"{name}: to nanogpt", median_ratio(rows[name], rows.get("nanogpt", {})), CPU_BARS[1])
    return bars
