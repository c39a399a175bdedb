"""What goes to disk and comes back, beside plain tools on the same bytes: token files and checkpoints."""

import itertools
import json
import os
import shutil
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import config
import data
import model as llama
from bench.measure import Row, child, timed, total_memory
from runtime import checkpoint
from runtime.errors import UserError
from runtime.files import fsync
from text import prepare, sources
from text.tokenizer import Tokenizer

BESIDE = {"stall": "copy to the host", "save": "plain write and fsync", "load": "plain read"}


def run_data(o: Any, c: config.Config, device: torch.device, dtype: torch.dtype) -> Row:
    """The shard writer beside tiktoken alone, on the same documents and all cores; the reader on one core."""
    tokenizer, rounds, cores = Tokenizer(str(prepare.RANKS)), o.rounds or 3, os.cpu_count() or 1
    text = "".join(sources.documents(prepare.TEXT, lambda read: None))
    # documents of 8,000 characters; each pass over the text is cut elsewhere, because the writer drops equal ones
    starts = [k for i in range(80) for k in range(97 * i, len(text), 8000)]
    docs = [text[k : k + 8000] for k in starts[: round(o.megabytes * 125)]]
    alone, ours = [], []  # tokens/s
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).absolute()
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in docs), "utf-8")
        for i in tqdm(range(rounds), desc="data", disable=None):
            began = time.perf_counter()
            count = sum(map(len, tokenizer.encode_many(docs)))
            middle = time.perf_counter()
            options = ["--source", f"{folder}/text.jsonl", "--out", f"{folder}/{i}", "--tokenizer", tokenizer.name]
            succeeded, said = child("data.py", "prepare", *options)
            if not succeeded:
                raise UserError(f"--megabytes {o.megabytes:g}: data.py could not prepare that text: {said}")
            alone.append(count / (middle - began))
            ours.append(count / (time.perf_counter() - middle))
        tokens = data.Tokens(f"{folder}/0", c.model.context, c.batch_sequences, [10**9], c.train.seed)
        steps = itertools.count()
        seconds = timed(lambda: tokens.batch(next(steps)), torch.device("cpu"))
    reader = c.batch_sequences * c.model.context / seconds
    writer = statistics.median(a / b for a, b in zip(ours, alone, strict=True))
    rows = [
        Row(row=f"tiktoken alone, {cores} threads", tokens_per_second=statistics.median(alone)),
        Row(row=f"data.py prepare, {cores} processes", tokens_per_second=statistics.median(ours), ratio=writer),
        Row(row=f"reader, {c.batch_sequences} x {c.model.context} a batch", tokens_per_second=reader),
    ]
    print(f"{len(docs):,} documents, {count:,} tokens by {prepare.RANKS.name}")
    return {"documents": len(docs), "tokens": count, "jobs": cores, "rows": rows}


def run_checkpoint(o: Any, c: config.Config, device: torch.device, dtype: torch.dtype) -> Row:
    """A checkpoint's save, its stall and its load beside a plain write, copy and read of the same bytes, in turn."""
    need, have = 5.0 * checkpoint.BYTES * c.model.parameters, total_memory(torch.device("cpu"))
    if need > have:
        sizes = f"needs about {need / 1e9:,.1f} GB of the host's memory, and {have / 1e9:,.1f} GB are there"
        raise UserError(f"--size: {sizes}; take a smaller one")
    with device:
        net = llama.Transformer(c.model)
    state = checkpoint.state(net, torch.optim.AdamW(net.parameters(), fused=True))
    for name, t in state.items():
        if name.startswith("exp_avg"):
            t.normal_()  # zeros could be compressed
    with tempfile.TemporaryDirectory() as folder:
        seconds = checkpoint_seconds(state, Path(folder), o.rounds or 3)
    middle = {name: statistics.median(s) for name, s in seconds.items()}
    size = sum(t.nbytes for t in state.values())
    rows = [Row(row=name, seconds=s, bytes_per_second=size / s) for name, s in middle.items()]
    for row in rows:
        if to := BESIDE.get(row["row"]):
            row |= {"ratio": middle[to] / row["seconds"], "to": to}
    print(f"{size:,} bytes in {tempfile.gettempdir()}; reads come from the page cache, as they were just written")
    return {"bytes": size, "rows": rows}


def checkpoint_seconds(state: dict[str, Tensor], folder: Path, rounds: int) -> dict[str, list[float]]:
    """{name of a measure: its seconds in each round}. stall: of an asynchronous save that finds its buffers."""
    segment, plain = folder / "segment", folder / "plain"
    segment.mkdir()
    saver, saved = checkpoint.Saver(segment), checkpoint.path(segment, 0)
    record = {"segment": "", "version": 1, "path": {}, "finished": False, "pinned": False, "config": {}, "data": {}}
    host = {name: torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for name, t in state.items()}
    seconds: dict[str, list[float]] = {}

    def clock(name: str, call: Callable[[], Any]) -> None:
        seconds.setdefault(name, []).append(timeit.timeit(call, number=1))

    def copy() -> None:
        for name, t in state.items():
            host[name].copy_(t, non_blocking=True)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def write() -> None:
        with open(plain, "wb") as f:
            for t in host.values():
                f.write(t.reshape(-1).numpy().data)
        fsync(plain)

    saver.save(0, state, record)  # allocates
    for _ in tqdm(range(rounds), desc="checkpoint", disable=None):
        saver.wait()
        shutil.rmtree(saved)  # a save leaves an existing checkpoint as it is
        clock("copy to the host", copy)
        clock("stall", lambda: saver.save(0, state, record))
        saver.wait()
        shutil.rmtree(saved)
        plain.unlink(missing_ok=True)  # freeing its pages is no part of a write
        clock("plain write and fsync", write)
        clock("save", lambda: checkpoint.save(segment, 0, state, record))
        clock("plain read", plain.read_bytes)
        clock("load", lambda: checkpoint.load(saved, state))
    return seconds
