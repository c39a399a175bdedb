"""A checkpoint's save, its stall and its load beside a plain write, copy and read of the same bytes, in turn."""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import config
import model as llama
from bench.measure import require, total_memory
from bench.report import Row, show, table, verdict
from runtime import checkpoint
from runtime.files import sha256

STALL, WHOLE, FIRST = "stall of an asynchronous save", "whole asynchronous save", "the first one, which allocates"
COPY, WRITE, READ, HASH = "copy to the host", "plain write and fsync", "plain read", "SHA-256 of it"
BESIDE = {STALL: COPY, FIRST: COPY, WHOLE: WRITE, "save": WRITE, "verify": HASH, "load": READ}


def run(o: Any, c: config.Config, device: torch.device, dtype: torch.dtype) -> Row:
    where = o.dir or tempfile.gettempdir()
    need, fix = 12 * c.model.parameters, "take a smaller --size or another --dir"
    require(f"--dir {where}", 2.2 * need, shutil.disk_usage(where).free, fix)
    require("--size: the memory of the host", 5.0 * need, total_memory(torch.device("cpu")), fix)
    with device:
        net = llama.Transformer(c.model)
    state = checkpoint.state(net, torch.optim.AdamW(net.parameters(), fused=True))
    for name, t in state.items():
        if name.startswith("exp_avg"):
            t.normal_()  # zeros could be compressed
    with tempfile.TemporaryDirectory(dir=where) as folder:
        seconds = measure(state, Path(folder), o.rounds or 3)
    middle = {name: statistics.median(s) for name, s in seconds.items()}
    size = sum(t.nbytes for t in state.values())
    rows = [Row(row=name, seconds=s, bytes_per_second=size / s) for name, s in middle.items()]
    for row in rows:
        if to := BESIDE.get(row["row"]):
            row |= {"ratio": middle[to] / row["seconds"], "to": to}
    bars = verdict("save to plain write", middle[WRITE] / middle["save"], 0.85)
    bars += verdict("stall by copy", middle[STALL] / middle[COPY], 1.5, at_most=True)
    print(f"{size:,} bytes in {where}; reads come from the page cache, since the same bytes were just written")
    table(rows, "row seconds bytes_per_second ratio to")
    print(show(bars))
    return {"bytes": size, "rows": rows, "bars": bars}


def measure(state: dict[str, Tensor], folder: Path, rounds: int) -> dict[str, list[float]]:
    """{name of a measure: its seconds in each round}."""
    segment, plain = folder / "segment", folder / "plain"
    segment.mkdir()
    saver, saved = checkpoint.Saver(segment), checkpoint.path(segment, 0)
    record = {"segment": "", "version": 1, "path": {}, "finished": False, "pinned": False, "config": {}, "data": {}}
    seconds: dict[str, list[float]] = {}

    def clock(*calls: tuple[str, Callable[[], Any]]) -> None:
        """Make the calls; note under each name the seconds from the first call's start to this call's end."""
        began = time.perf_counter()
        for name, call in calls:
            call()
            seconds.setdefault(name, []).append(time.perf_counter() - began)

    def copy() -> None:
        for name, t in state.items():
            saver.host[name].copy_(t, non_blocking=t.is_cuda)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def write() -> None:
        with open(plain, "wb") as f:
            for t in saver.host.values():
                f.write(t.reshape(-1).numpy().data)
            f.flush()
            os.fsync(f.fileno())

    begin = partial(saver.save, 0, state, record)
    clock((FIRST, begin))
    saver.wait()
    for _ in tqdm(range(rounds), desc="checkpoint", disable=None):
        shutil.rmtree(saved)  # a save leaves an existing checkpoint as it is
        clock((COPY, copy))
        clock((STALL, begin), (WHOLE, saver.wait))
        shutil.rmtree(saved)
        plain.unlink(missing_ok=True)  # freeing its pages is no part of a write
        clock((WRITE, write))
        clock(("save", partial(checkpoint.save, segment, 0, state, record)))
        clock((HASH, partial(sha256, plain)))
        clock(("verify", partial(checkpoint.verify, saved)))
        clock((READ, plain.read_bytes))
        clock(("load", partial(checkpoint.load, saved, state)))
    return seconds
