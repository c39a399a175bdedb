"""The shard writer beside tiktoken alone, on the same documents and as many processes; the reader in one process."""

import itertools
import json
import lzma
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import config
import data
from bench.measure import child
from bench.report import Row, show, table, verdict
from runtime.errors import UserError
from text import prepare
from text.tokenizer import Tokenizer


def run(o: Any, c: config.Config, device: torch.device, dtype: torch.dtype) -> Row:
    if o.tokenizer == "bytes":
        raise UserError("--tokenizer: got bytes, expected a tiktoken encoding or a rank file, to compare with tiktoken")
    tokenizer, rounds = Tokenizer(o.tokenizer), o.rounds or 3
    docs = documents(o.megabytes)
    alone, ours = [], []  # tokens/s
    with tempfile.TemporaryDirectory(dir=o.dir) as name:
        folder = Path(name).absolute()
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in docs))
        for i in tqdm(range(rounds), desc="data", disable=None):
            began = time.perf_counter()
            count = sum(map(len, tokenizer.encoding.encode_ordinary_batch(docs, num_threads=o.jobs)))
            middle = time.perf_counter()
            where = ["--source", f"{folder}/text.jsonl", "--out", f"{folder}/{i}"]
            how = ["--tokenizer", o.tokenizer, "--jobs", str(o.jobs)]
            succeeded, said = child("data.py", "prepare", *where, *how)
            if not succeeded:
                raise UserError(f"--megabytes {o.megabytes:g}: data.py could not prepare that text: {said}")
            alone.append(count / (middle - began))
            ours.append(count / (time.perf_counter() - middle))
        prepared = (Path(c.data.path) / "meta.json").exists()
        reads = read(c, c.data.path if prepared else str(folder / "0"), rounds)
    writer = statistics.median(a / b for a, b in zip(ours, alone, strict=True))
    reader = statistics.median(reads[1:])  # the first round maps the file into memory
    bars = verdict("writer", writer, 0.90) + verdict("reader", reader, 30e6)
    beside = {"ratio": writer, "to": "tiktoken", "bar": show(bars[:1])}
    shape = f"{c.batch_sequences} x {c.model.context}"
    rows: list[Row] = [
        {"row": f"tiktoken alone, {o.jobs} threads", "tokens_per_second": statistics.median(alone)},
        {"row": f"data.py prepare, {o.jobs} processes", "tokens_per_second": statistics.median(ours)} | beside,
        {"row": f"reader, {shape} a batch", "tokens_per_second": reader, "bar": show(bars[1:])},
    ]
    read_from = c.data.path if prepared else "the same"
    print(f"{len(docs):,} documents, {count:,} tokens by {Path(o.tokenizer).name}; the reader on {read_from}")
    table(rows, "row tokens_per_second ratio to bar")
    return {"documents": len(docs), "tokens": count, "jobs": o.jobs, "rows": rows, "bars": bars}


def corpus() -> str:
    """The text that ships with the project."""
    with lzma.open(prepare.TEXT, "rt", encoding="utf-8") as f:
        return "".join(json.loads(line)["text"] for line in f)


def documents(megabytes: float) -> list[str]:
    """Documents of 8,000 characters; every pass over the text is cut elsewhere, since the writer drops equal ones."""
    text = corpus()
    starts = itertools.chain.from_iterable(range(97 * i, len(text), 8000) for i in range(80))
    return [text[k : k + 8000] for k in itertools.islice(starts, round(megabytes * 125))]


def read(c: config.Config, folder: str, rounds: int) -> list[float]:
    """Tokens/s of the reader, in rounds of half a second after one more."""
    tokens = data.Tokens(folder, c.model.context, c.batch_sequences, [10**9], c.train.seed, repeat=True)
    if problems := tokens.problems(0, 1):
        raise UserError("\n".join(problems))
    speeds, steps = [], itertools.count()
    for _ in range(rounds + 1):
        began, n = time.perf_counter(), 0
        while time.perf_counter() < began + 0.5:
            n += tokens.batch(next(steps))[0].size
        speeds.append(n / (time.perf_counter() - began))
    return speeds
