"""bench on the CPU: every subcommand, its formulas against numbers made by hand, its peers against our model."""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import config
import model
from bench import __main__ as bench
from bench import kernels, measure, peers, step
from runtime import build, checkpoint
from runtime.distributed import World
from runtime.errors import user_errors
from runtime.start import Start

SHAPE = {"n_layer": 1, "n_head": 2, "hidden": 16, "vocab_size": 64, "context": 16}
TINY = (
    "--model.n_layer 1 --model.n_head 2 --model.hidden 16 --model.vocab_size 64 --model.context 16 --train.device cpu"
).split()
QUICK = "--rounds 1 --updates 3 --micro 4 --train.batch_tokens 64".split()


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*args) -> (exit code, the JSON or None, what was printed), in this process and an empty folder."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["bench", *args[:1], *(["--json", "out.json"] if args else []), *args[1:]])
        code = 0
        try:
            with user_errors("bench"):
                bench.main()
        except SystemExit as e:
            code = e.code
        file = tmp_path / "out.json"
        said = capsys.readouterr()
        return code, json.loads(file.read_text()) if file.exists() else None, said.out + said.err

    yield call
    torch.set_num_threads(threads)


def without(monkeypatch, *names):
    """As if these packages were not installed."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in names else real(name, *a))


def by_row(result):
    """The rows by name, after a look at every number: finite, and above 0 where it is a rate or a time."""

    def look(x, key=""):
        if isinstance(x, dict):
            for k, v in x.items():
                look(v, k)
        elif isinstance(x, list):
            for v in x:
                look(v, key)
        elif isinstance(x, float):
            assert math.isfinite(x), key
            assert x > 0 or key in ("loss_difference", "got") or key.endswith("_ms"), key

    assert {"device", "torch", "triton", "python", "date", "commit", "command", "config"} <= result.keys()
    look({k: result[k] for k in result if k != "config"})
    return {r["row"]: r for r in result["rows"]}


# ----------------------------------------------------------------------------------------------------------
# The subcommands


def test_without_arguments_it_explains(run):
    code, _, said = run()
    assert code == 0 and "python -m bench step --size 203m" in said


def test_step(run, monkeypatch):
    without(monkeypatch, "liger_kernel")
    real = peers.missing
    monkeypatch.setattr(peers, "missing", lambda row, cuda: "here" if row == "ours-compile" else real(row, cuda))

    def in_this_process(name, micro, updates, end):
        o, c = bench.parse([*sys.argv[1:], "--row", name, "--micro", str(micro), "--updates", str(updates)])
        return json.loads(json.dumps(step.row(o, c, torch.device("cpu"), torch.float32)))

    monkeypatch.setattr(step, "fresh_row", in_this_process)
    options = ("--peers", "hf", "hf-liger", "nanogpt", "ours-torch", "--profile")
    code, result, said = run("step", *TINY, *QUICK, *options)
    rows = by_row(result)
    assert code == 0 and list(rows) == ["ours", "ours-compile", "hf", "hf-liger", "nanogpt", "ours-torch"]
    assert rows["hf-liger"]["note"] == "skipped: pip install liger-kernel" and "pip install liger-kernel" in said
    for r in ("ours", "hf", "nanogpt", "ours-torch"):
        assert rows[r]["note"] is None and rows[r]["micro"] == 4, rows[r]
        rate, roof = rows[r]["tokens_per_second"], rows[r]["rounds"][0]["roof"]
        assert rows[r]["mfu"] == pytest.approx(rate * config.Model(**SHAPE).flops_per_token() / roof)
        parts = sum(rows[r][f"{part}_ms"] for part in ("products", "attention", "others", "gaps"))
        assert parts == pytest.approx(64e3 / rate) and min(rows[r]["products_ms"], rows[r]["attention_ms"]) > 0
    for r in ("hf", "ours-torch"):  # the same weights: fp32 rounding over three updates
        assert abs(rows[r]["loss_difference"]) < 1e-5
    assert "loss" not in rows["nanogpt"]


def test_rows_in_fresh_processes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "step", *TINY, *QUICK])
    now = time.perf_counter()
    found = step.fresh_row("ours", 2, 1, now + 100)
    assert found["micro"] == 2 and found["tokens_per_second"] > 0 and found["loss"] > 0
    assert step.fresh_row("ours", 2, 1, time.perf_counter() + 0.01) == {"note": "failed: no end after 0 s"}
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--train.seed", "x"])
    assert "train.seed: got 'x'" in step.fresh_row("ours", 2, 1, now + 200)["note"]


class Clock:
    """A clock, and processes of rows that move it: seconds and speeds of (row, micro), none: out of memory."""

    def __init__(self, monkeypatch, seconds, speed=lambda micro: micro):
        self.now, self.seconds, self.speed, self.asked = 0.0, seconds, speed, []
        monkeypatch.setattr(step, "child", self.child)
        monkeypatch.setattr(step.time, "perf_counter", lambda: self.now)

    def child(self, *arguments, seconds):
        _, name, _, micro, _, updates = arguments[-6:]
        micro = int(micro)
        self.asked.append((name, micro, int(updates)))
        took, fits = self.seconds(name, micro)
        self.now += min(took, seconds)
        if took > seconds:
            return False, f"no end after {seconds:.0f} s"
        found = {"micro": micro, "tokens_per_second": self.speed(micro)} | ({"loss": 1.0} if int(updates) else {})
        return True, json.dumps(found if fits else {"note": step.NO_MEMORY})


def measured(o, names, deadline):
    """The rows that step.measure_rounds makes of the 203M config on a device of 80 GB."""
    rows = {name: {"row": name, "note": None} for name in names}
    step.measure_rounds(o, config.load("203m"), rows, 80e9, deadline)
    return rows


def test_a_run_ends_within_its_minutes(monkeypatch):
    o = Namespace(micro=[16, 32, 8, 4, 2, 1], rounds=1, minutes=8, updates=20)
    names = ("ours", "hf-compile", "hf-liger")
    clock = Clock(monkeypatch, lambda name, micro: ({"ours": 45, "hf-compile": 100, "hf-liger": 30}[name], True))
    rows = measured(o, names, 460)
    assert clock.now == 460 and all(row["note"] is None and row["loss"] == 1.0 for row in rows.values())
    tried = {name: [t["micro"] for t in row["tried"]] for name, row in rows.items()}
    assert tried == {"ours": [16, 32, 8], "hf-compile": [16, 32], "hf-liger": [16, 32]}
    assert clock.asked[:4] == [("ours", 16, 20), ("hf-compile", 16, 20), ("hf-liger", 16, 20), ("ours", 32, 0)]
    assert rows["ours"]["left_out"] == "4: too small; 2: too small; 1: too small"
    assert rows["hf-compile"]["left_out"] == "8: failed: no end after 65 s; 4: too small; 2: too small; 1: too small"
    assert rows["hf-liger"]["left_out"] == "8: no time, raise --minutes; 4: too small; 2: too small; 1: too small"
    # a row that is ended, or never began, says so
    clock = Clock(monkeypatch, lambda name, micro: (300, True))
    rows = measured(o, names, 460)
    assert clock.now == 460 and rows["ours"]["note"] is None
    assert rows["hf-compile"]["note"].startswith(
        "16: failed: no end after 160 s; 32: no time, raise --minutes; 8: no time"
    )
    assert rows["hf-liger"]["note"].startswith("16: no time, raise --minutes; 32: no time, raise --minutes; 8: ")


def test_rounds_in_turn_while_there_is_time(monkeypatch, capsys):
    o = Namespace(micro=[8, 16, 4], rounds=3, minutes=8, updates=20)
    clock = Clock(monkeypatch, lambda name, micro: (20, True), speed=lambda micro: 100 - micro)
    rows = measured(o, ("a", "b"), 300)  # 6 x 20 s, then two rounds of 40 s
    assert clock.asked[6:] == [("a", 4, 0), ("b", 4, 0)] * 2 and len(rows["a"]["rounds"]) == 3
    clock = Clock(monkeypatch, lambda name, micro: (50, True))
    rows = measured(o, ("a", "b"), 300)  # half of the time: micro-batch 8 twice, 16 once
    assert clock.asked[2:] == [("a", 16, 0), ("a", 16, 0), ("b", 8, 0), ("a", 16, 0)] and clock.now == 300
    assert [len(row["rounds"]) for row in rows.values()] == [3, 2] and not rows["b"]["note"]
    assert "2 of 3 rounds: b: no time, raise --minutes" in capsys.readouterr().out


def test_micro_batches_that_do_not_fit(monkeypatch):
    o = Namespace(micro=[16, 32, 8, 4, 2, 1], rounds=1, minutes=8, updates=20)
    clock = Clock(monkeypatch, lambda name, micro: (10, micro <= 8))
    row = measured(o, ["ours"], 400)["ours"]
    assert [micro for _, micro, _ in clock.asked] == [16, 8, 4, 2] and row["micro"] == 8
    assert row["left_out"] == "16: no memory; 32: no memory; 1: too small"
    row = measured(Namespace(**vars(o) | {"micro": [2, 1]}), ["ours"], 900)["ours"]
    assert row["note"] is None
    Clock(monkeypatch, lambda name, micro: (10, False))
    row = measured(o, ["ours"], 900)["ours"]
    assert row["note"].startswith("16: no memory; 32: no memory; 8: no memory") and "tried" not in row


def test_out_of_memory_and_other_failures_of_a_row(monkeypatch):
    c = config.load("tiny", {f"model.{k}": str(v) for k, v in SHAPE.items()} | {"train.batch_tokens": "64"})
    o = Namespace(row="ours", micro=[4], updates=1, profile=False)
    monkeypatch.setattr(step, "product_speed", lambda *a: 1.0)
    where = torch.device("cpu"), torch.float32
    assert step.row(o, c, *where)["tokens_per_second"] > 0
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried .."), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")):
        monkeypatch.setattr(step.Trainer, "step", lambda *a, error=error: (_ for _ in ()).throw(error))
        assert step.row(o, c, *where) == {"note": step.NO_MEMORY}
    monkeypatch.setattr(step.Trainer, "step", lambda *a: (_ for _ in ()).throw(RuntimeError("shapes")))
    with pytest.raises(RuntimeError, match="shapes"):
        step.row(o, c, *where)


def test_a_size_that_does_not_fit_is_skipped(run, monkeypatch):
    monkeypatch.setattr(step, "child", lambda *a, **kw: pytest.fail("it was tried"))
    code, result, _ = run(
        "step", "--size", "3.1b", "--model.n_layer", "100000", "--train.device", "cpu", "--peers", "hf"
    )
    notes = {row["row"]: row["note"] for row in result["rows"]}
    assert code == 0 and notes["ours"] == notes["hf"] == "8: no memory; 16: no memory; 4: no memory"


def test_ours_is_what_train_makes(monkeypatch):
    """Two updates of the benchmark, and of train.py's own parts on the same batch."""
    c = config.load("tiny", {f"model.{k}": str(v) for k, v in SHAPE.items() if v is not None})
    cpu = torch.device("cpu")
    trainer = step.Trainer("ours", c, cpu, torch.float32)
    net, module, optimizer = build.build(c, Start(0, []), "none", World(device=cpu))
    for _ in range(2):
        x, y = trainer.ids(8, 0)
        loss = trainer.step(x, y, 4, 1e-3)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        parts = [module(a, b) / 2 for a, b in zip(x.split(4), y.split(4), strict=True)]
        sum(parts).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), c.train.clip)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(loss, sum(parts).detach(), rtol=1e-6, atol=0)
    for mine, theirs in zip(trainer.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    made = []
    monkeypatch.setattr(step, "build", lambda c, *a: made.append(c.train) or (net, module, optimizer))
    for name in ("ours", "ours-compile", "ours-torch,swiglu=triton"):
        step.Trainer(name, c, cpu, torch.float32)
    assert [(t.compile, t.kernels) for t in made] == [("auto", "auto"), ("on", "auto"), ("auto", "torch,swiglu=triton")]


def test_no_less_memory_than_these_bytes():
    c = config.load("203m")
    P, tokens, block = c.model.parameters, 4 * 2048, 24 * 2 * (4 * 512 + 2 * 2048)
    assert step.least_bytes("ours", c, 4) == step.least_bytes("hf-liger", c, 4) == 16 * P + tokens * block
    assert step.least_bytes("hf-compile", c, 4) == 16 * P + tokens * (block + 4 * 100277)


# ----------------------------------------------------------------------------------------------------------
# Timing on CUDA, with a device that records its calls


class Device:
    """torch.cuda as `capture` uses it. A capture that fails raises as it ends, as PyTorch's does."""

    def __init__(self, monkeypatch, breaks=""):
        self.mode, self.capturing, self.replays, self.breaks = "default", False, 0, breaks
        device = self

        class Graph:
            def __init__(self, graph=None, stream=None):
                assert graph is None or stream == "side"

            def __enter__(self):
                assert device.mode == "default"
                device.capturing = True

            def __exit__(self, *error):
                device.capturing = False
                if device.breaks == "capture":
                    raise RuntimeError("operation failed due to a previous error during capture")

            def replay(self):
                device.replays += 1

        for name, value in {
            "CUDAGraph": Graph,
            "graph": Graph,
            "synchronize": lambda: self.waits(),
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
            "current_stream": lambda: "side",
            "memory_allocated": lambda: 0,
            "max_memory_allocated": lambda: 1000,
            "reset_peak_memory_stats": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def waits(self):
        if self.mode == "error" or self.capturing:
            raise RuntimeError("called a synchronizing CUDA operation")


@pytest.mark.parametrize("breaks, eager", [("", None), ("item", "forward both"), ("capture", "forward both")])
def test_kernels_are_timed_as_graphs_and_what_cannot_be_one_is_named(monkeypatch, breaks, eager):
    device, calls = Device(monkeypatch, breaks), []

    def square(x):
        calls.append("captured" if device.capturing else "called")
        if breaks == "item":
            device.waits()
        return x * x

    class Cuda:  # in the place of torch.device("cuda"): tensors stay on the CPU
        type = "cuda"

    real = torch.randn
    monkeypatch.setattr(torch, "Generator", lambda device: torch._C.Generator())
    monkeypatch.setattr(torch, "randn", lambda *a, device=None, **kw: real(*a, **kw))
    monkeypatch.setattr(kernels, "timed", lambda call, device: (call(), 1.0)[1])
    row = kernels.times(square, [torch.ones(3, requires_grad=True)], Cuda())
    assert row.get("eager") == eager and row["forward"] == row["both"] == 1.0 and row["extra_bytes"] == 1000 - 12
    assert device.replays == (0 if eager else 2) and device.mode == "default" and not device.capturing
    assert calls.count("captured") == {"": 2, "item": 0, "capture": 2}[breaks]  # a call that waits is never captured


def test_kernels(run, monkeypatch):
    without(monkeypatch, "liger_kernel")
    monkeypatch.setattr(torch, "compile", lambda f, **kw: f)  # a C++ compiler would take a minute
    code, result, _ = run("kernels", *TINY)
    by_row(result)
    rows = {(r["kernel"], r["row"]): r for r in result["rows"]}
    assert code == 0 and {k for k, _ in rows} == set(kernels.CASES)
    for case in kernels.CASES:
        assert (
            rows[case, "triton"]["note"] == "skipped: needs CUDA"
            and min(rows[case, "torch"][d] for d in ("forward", "both")) > 0
        )
        assert case == "attention" or rows[case, "liger"]["note"] == "skipped: pip install liger-kernel"
    assert rows["attention", "sdpa cudnn"]["note"] == "skipped: needs CUDA"
    assert rows["cross_entropy", "torch"]["both_tflops"] > 0 and rows["rope", "torch"]["both"] > 0


def test_make_bench_goes_on_after_a_failure_and_names_it(tmp_path):
    python = tmp_path / "python"  # fails for one size
    python.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/asked\ncase "$*" in *"step --size 1.2b"*) exit 3;; esac\n')
    python.chmod(0o755)
    command = ["make", "bench", f"PY={python}", f"FIGURES={tmp_path}/gpu"]
    done = subprocess.run(command, cwd=Path(bench.__file__).parent.parent, capture_output=True, text=True)
    asked = (tmp_path / "asked").read_text().splitlines()[1:]
    assert done.returncode != 0 and done.stdout.partition("make bench: failed:")[2].count("\n  ") == 1
    assert [" ".join(line.split()[:5]) for line in asked] == [
        "-m pytest -q -m gpu",
        f"-m bench kernels --json {tmp_path}/gpu/kernels.json",
        *(f"-m bench step --size {size}" for size in ("203m", "1.2b", "3.1b")),
        "-m bench checkpoint --size 1.2b",
    ]


def test_data(run):
    code, result, _ = run("data", "--megabytes", "0.2", "--rounds", "1")
    alone, ours, reader = by_row(result).values()
    assert code == 0 and result["documents"] == 25 and result["tokens"] > 25 * 1000
    assert ours["ratio"] == ours["tokens_per_second"] / alone["tokens_per_second"] and reader["tokens_per_second"] > 0


def test_data_that_is_too_little_says_so(run):
    code, result, said = run("data", "--megabytes", "0.1", "--rounds", "1")
    assert code == 2 and result is None and "bench: error: --megabytes 0.1: data.py could not prepare that text" in said


def test_checkpoint(run, tmp_path, monkeypatch):
    saves, real = [], checkpoint.Saver.save

    def save(self, step, *args, **kw):
        saves.append((bool(self.host), self.running is None, checkpoint.path(self.segment, step).exists()))
        real(self, step, *args, **kw)

    monkeypatch.setattr(checkpoint.Saver, "save", save)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code, result, _ = run("checkpoint", *TINY, "--rounds", "2")
    rows = by_row(result)
    to = {"stall": "copy to the host", "load": "plain read", "save": "plain write and fsync"}
    assert code == 0 and rows.keys() == to.keys() | set(to.values())
    assert {name: r["to"] for name, r in rows.items() if "to" in r} == to
    seconds = {name: r["seconds"] for name, r in rows.items()}
    assert all(rows[name]["ratio"] == seconds[of] / seconds[name] for name, of in to.items())
    # the first allocates; then in turn one with buffers and a synchronous one; none waits or finds its work done
    assert saves == [(False, True, False), *[(True, True, False), (False, True, False)] * 2]
    c = config.Model(1, 2, None, 16, None, 64, 16)
    assert result["bytes"] >= 12 * c.parameters
    assert [f.name for f in tmp_path.iterdir()] == ["out.json"]  # nothing is left


@pytest.mark.parametrize(
    "args, said",
    [
        (["checkpoint", "--size", "3.1b", "--model.n_layer", "1000000"], "--size: needs about"),
        (["step", "--peers", "jax"], "--peers: got jax, expected some of hf hf-compile"),
        (["step", "--peers", "ours-jax"], "train.kernels: got 'jax', expected auto, triton or torch"),
        (["step", "--peers", "ours-triton"], "train.kernels: got 'triton', but the device is no CUDA GPU"),
        (["step", "--rounds", "0"], "--rounds: got 0, expected 1 or more"),
        (["step", "--micro", "a"], "--micro"),
        (["step", "--train.kernels", "triton"], "train.kernels"),
        (["kernels", "--json", "."], "--json: got ., expected a file in a folder that exists"),
        (["stride"], "invalid choice"),
    ],
    ids=str,
)
def test_what_cannot_run_is_refused_before_it_begins(run, monkeypatch, args, said):
    for module in (measure, kernels):
        monkeypatch.setattr(module, "timed", lambda *a: pytest.fail("it ran"))
    monkeypatch.setattr("kernels.INTERPRETED", False)
    code, result, text = run(*args, *([] if args == ["stride"] else ["--train.device", "cpu"]))
    errors = [line for line in text.splitlines() if line.startswith("bench: error")]
    assert code == 2 and result is None and len(errors) == 1 and said in errors[0]


# ----------------------------------------------------------------------------------------------------------
# Peers and formulas

SHAPES = [{}, {"n_kv_head": 2}, {"qkv_bias": True}, {"ffn": 48}]


def small(**kw):
    return config.Model(
        **{"n_layer": 2, "n_head": 4, "hidden": 32, "vocab_size": 61, "context": 24, "rope_theta": 500.0, **kw}
    )


@pytest.mark.parametrize("kw", SHAPES, ids=str)
def test_nanogpt_has_our_flops(kw):
    c = small(**kw)
    net = peers.NanoGPT(c)
    products = sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Linear))
    assert 6 * products + 6 * c.n_layer * c.hidden * c.context == c.flops_per_token()
    assert kw or net.blocks[0].c_fc.weight.shape == (6 * 32, 32)
    x, y = torch.randint(0, 61, (2, 2, 24))
    assert abs(net(x, y).item() - math.log(61)) < 0.1  # a uniform guess


@pytest.mark.parametrize("kw", SHAPES, ids=str)
def test_hugging_face_with_our_weights_has_our_loss(kw):
    c = small(**kw)
    torch.manual_seed(0)
    ours = model.Transformer(c)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.1 * torch.randn_like(p))  # so that norms and biases matter
    x, y = torch.randint(0, 61, (2, 3, 24))
    theirs = peers.hugging_face(ours)(input_ids=x, labels=y, shift_labels=y).loss
    torch.testing.assert_close(theirs, ours(x, y), rtol=1e-5, atol=0)  # fp32 rounding over two blocks


def test_bytes_and_flops_by_hand():
    c = config.Model(n_layer=1, n_head=4, n_kv_head=2, hidden=32, ffn=80, vocab_size=100, context=16)  # D = 8
    M, item = 3 * 16, 2
    amounts = {  # forward, both: bytes, of the last two FLOPs
        "rms_norm": (2 * 48 * 32 * 2 + 32 * 4, 5 * 48 * 32 * 2 + 3 * 32 * 4),
        "add_rms_norm": (4 * 48 * 32 * 2 + 32 * 4, 8 * 48 * 32 * 2 + 3 * 32 * 4),
        "rope": (2 * 48 * 8 * 8 * 2 + 2 * 16 * 4 * 4, 4 * 48 * 8 * 8 * 2 + 4 * 16 * 4 * 4),
        "swiglu": (48 * 3 * 80 * 2, 48 * 8 * 80 * 2),
        "attention": (3 * 4 * 16 * 16 * 8 * 2, 3.5 * 3 * 4 * 16 * 16 * 8 * 2),
        "cross_entropy": (None, 6 * 48 * 100 * 32),
    }
    assert M == 48
    for case, (forward, both) in amounts.items():
        found = kernels.rates({"kernel": case, "forward": 1.0, "both": 4.0}, c, 3, item, 1e12)  # a copy of 1e12 bytes/s
        got = {k.partition("_")[0]: rate * 1e12 for k, rate in found.items()}
        assert got == pytest.approx({"both": both / 4} | ({"forward": forward} if forward else {})), case


def test_step_is_compared_by_rounds_and_at_equal_micro_batches():
    c = config.load("203m")
    peak = {"ours": {4: 4, 8: 6, 16: 10}, "hf-compile": {4: 10, 8: 20}}
    rates = {"ours": (3e5, 4e5, 3e5), "hf-compile": (1e5, 2e5, 3e5)}
    rows = {
        r: {
            "row": r,
            "tried": [{"micro": m, "peak_bytes": b} for m, b in sizes.items()],
            "rounds": [{"tokens_per_second": s} for s in rates[r]],
        }
        for r, sizes in peak.items()
    }
    step.compare(rows, c, 989e12)
    ours, hf = rows["ours"], rows["hf-compile"]
    assert ours["tokens_per_second"] == 3e5 and hf["ours_ratio"] == 2.0  # the median of 3, 2 and 1: round by round
    assert hf["memory_ratio"] == 6 / 20  # at 8, the largest that both did
    assert ours["mfu"] == pytest.approx(3e5 * 1.063e9 / 989e12, rel=1e-3) and ours["mfu_published"] > ours["mfu"]


def test_a_benchmark_that_is_terminated_ends_the_process_of_its_row(run, monkeypatch):
    """SIGTERM raises, so that subprocess.run kills its child, as after Ctrl-C."""
    ended = []

    def measuring(*_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            ended.append(True)

    monkeypatch.setitem(bench.VERBS, "step", measuring)
    handler = signal.getsignal(signal.SIGTERM)
    code, found, _ = run("step", *TINY)
    signal.signal(signal.SIGTERM, handler)
    assert code == 143 and found is None and ended


def test_only_the_benchmark_of_tasks_needs_the_harness():
    code = "import sys; sys.modules['lm_eval'] = sys.modules['datasets'] = None; import bench.__main__"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(bench.__file__).parent.parent).returncode == 0
