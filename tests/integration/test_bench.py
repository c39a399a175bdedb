"""bench on the CPU: every subcommand, its formulas against numbers made by hand, its peers against our model."""

import importlib.util
import json
import math
import sys
from argparse import Namespace

import pytest
import torch
import torch.nn as nn

import config
import model
import sample
from bench import __main__ as bench
from bench import evaluation, kernels, measure, peers, step
from runtime import checkpoint
from runtime.errors import user_errors

TINY = (
    "--model.n_layer 1 --model.n_head 2 --model.hidden 16 --model.vocab_size 64 --model.context 16 --train.device cpu"
).split()
QUICK = "--rounds 1 --steps 2 --warmup 1 --updates 3 --micro 4 2 --train.batch_tokens 64".split()


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
            assert x > 0 or key in ("loss_difference", "got"), key

    assert {"device", "torch", "triton", "python", "date", "commit", "command", "config"} <= result.keys()
    look({k: result[k] for k in result if k != "config"})
    return {r["row"]: r for r in result["rows"]}


# ----------------------------------------------------------------------------------------------------------
# The subcommands


def test_without_arguments_it_explains(run):
    code, _, said = run()
    assert code == 0 and "python -m bench step --size 203m" in said


def test_step(run, monkeypatch, tmp_path):
    without(monkeypatch, "liger_kernel")
    # with 0 minutes the first of the micro-batches alone is tried, so that one shape is compiled
    short = ("--minutes", "0", "--plot", "step.png")
    code, result, said = run("step", *TINY, *QUICK, "--peers", "hf", "hf-liger", "nanogpt", *short)
    rows = by_row(result)
    assert code == 0 and list(rows) == ["ours", "ours-compile", "hf", "hf-liger", "nanogpt"]
    assert rows["hf-liger"]["note"] == "skipped: pip install liger-kernel" and "pip install liger-kernel" in said
    compiled = rows["ours-compile"]["note"] is None  # where there is a C++ compiler
    assert compiled or "C++ compiler" in rows["ours-compile"]["note"] or "failed" in rows["ours-compile"]["note"]
    for r in ("ours", "hf", "nanogpt", *["ours-compile"] * compiled):
        assert rows[r]["note"] is None and rows[r]["micro"] == 4 and rows[r]["no_time"] == [2], rows[r]
        rate, roof = rows[r]["tokens_per_second"], rows[r]["rounds"][0]["roof"]
        assert rows[r]["mfu"] == pytest.approx(
            rate * config.Model(1, 2, None, 16, None, 64, 16).flops_per_token() / roof
        )
    assert (
        abs(rows["hf"]["loss_difference"]) < 1e-5 and abs(rows["ours-compile"].get("loss_difference", 0)) < 1e-5
    )  # fp32 rounding over three updates
    assert "loss" not in rows["nanogpt"] and (tmp_path / "step.png").stat().st_size > 0
    assert [b["what"] for b in result["bars"]] == [
        f"{r}: {w}" for r in ["ours"] + ["ours-compile"] * compiled for w in ("part of the matmul", "to nanogpt")
    ]


def test_rounds_of_rows_in_turn_and_a_row_whose_process_dies(run, monkeypatch):
    real, asked = measure.fresh_row, []

    def fresh_row(*options):
        asked.append(options)
        if "nanogpt" in options:
            return real(*options, "--train.seed", "x")
        return {"micro": 2, "tried": [], "loss": 5.0 - len(asked), "tokens_per_second": 100.0 * len(asked), "roof": 1e9}

    monkeypatch.setattr(peers, "missing", lambda row, cuda: "not here" if row == "ours-compile" else None)
    monkeypatch.setattr(step, "fresh_row", fresh_row)
    code, result, _ = run("step", *TINY, *QUICK, "--peers", "nanogpt", "hf", "--rounds", "2")
    rows = by_row(result)
    assert code == 0 and "train.seed: got 'x'" in rows["nanogpt"]["note"]
    assert [o[1] for o in asked] == ["ours", "nanogpt", "hf", "ours", "hf"]
    assert [o[4:] for o in asked] == [("--micro", "4", "2")] * 3 + [("--micro", "2", "--updates", "0")] * 2
    assert rows["ours"]["note"] is None and rows["ours"]["loss"] == 4.0  # of the first round
    assert [r["tokens_per_second"] for r in rows["hf"]["rounds"]] == [300, 500] and "rounds" not in rows["ours-compile"]


def test_kernels(run, monkeypatch, tmp_path):
    without(monkeypatch, "liger_kernel")
    monkeypatch.setattr(torch, "compile", lambda f, **kw: f)  # a C++ compiler would take a minute
    code, result, _ = run("kernels", *TINY, "--plot", "roof.png")
    by_row(result)
    rows = {(r["kernel"], r["row"]): r for r in result["rows"]}
    assert code == 0 and {k for k, _ in rows} == set(kernels.CASES) and (tmp_path / "roof.png").stat().st_size > 0
    for case in kernels.CASES:
        assert (
            rows[case, "triton"]["note"] == "skipped: needs CUDA"
            and min(rows[case, "torch"][d] for d in ("forward", "backward", "both")) > 0
        )
        assert case == "attention" or rows[case, "liger"]["note"] == "skipped: pip install liger-kernel"
    assert rows["attention", "sdpa cudnn"]["note"] == "skipped: needs CUDA"
    assert rows["cross_entropy", "torch"]["both_tflops"] > 0 and rows["rope", "hf"]["both"] > 0


def test_data(run):
    code, result, _ = run("data", "--megabytes", "0.2", "--jobs", "1", "--rounds", "1")
    by_row(result)
    assert (
        code == 0
        and result["documents"] == 25
        and result["tokens"] > 25 * 1000
        and [b["what"] for b in result["bars"]] == ["writer", "reader"]
    )


def test_data_that_is_too_little_says_so(run):
    code, result, said = run("data", "--megabytes", "0.1", "--jobs", "1", "--rounds", "1")
    assert code == 2 and result is None and "bench: error: --megabytes 0.1: data.py could not prepare that text" in said


def test_eval(run):
    pytest.importorskip("lm_eval")
    code, result, text = run("eval", *TINY, "--model.vocab_size", "1024", "--model.context", "32", "--rounds", "2")
    rows = by_row(result)
    names = ("four answers each", "four answers of a token", "written answers")
    assert (
        code == 0
        and list(rows) == [f"{n}: {who}" for n in names for who in ("ours", "transformers")]
        and "tokens_per_second" in text
    )
    for n, b in zip(names, result["bars"], strict=True):
        ours, theirs = (rows[f"{n}: {who}"]["tokens_per_second"] for who in ("ours", "transformers"))
        assert rows[f"{n}: ours"]["ratio"] == b["got"] == ours / theirs and b["what"] == n
    code, _, text = run("eval", *TINY)
    assert code == 2 and "model.vocab_size, model.context: got 64 and 16, expected 1024 or more" in text


def test_checkpoint(run, tmp_path, monkeypatch):
    saves, real = [], checkpoint.Saver.save

    def save(self, step, *args, **kw):
        saves.append((bool(self.host), self.thread is None, checkpoint.path(self.segment, step).exists()))
        real(self, step, *args, **kw)

    monkeypatch.setattr(checkpoint.Saver, "save", save)
    code, result, _ = run("checkpoint", *TINY, "--rounds", "2", "--dir", str(tmp_path))
    rows = by_row(result)
    to = {
        "the first one, which allocates": "copy to the host",
        "stall of an asynchronous save": "copy to the host",
        "load": "plain read",
        "whole asynchronous save": "plain write and fsync",
        "save": "plain write and fsync",
        "verify": "SHA-256 of it",
    }
    assert (
        code == 0
        and rows.keys() == to.keys() | set(to.values())
        and {name: r["to"] for name, r in rows.items() if "to" in r} == to
    )
    seconds = {name: r["seconds"] for name, r in rows.items()}
    assert all(rows[name]["ratio"] == seconds[of] / seconds[name] for name, of in to.items())
    assert seconds["stall of an asynchronous save"] < seconds["whole asynchronous save"]
    bars = {b["what"]: (b["got"], b["bar"], b["reached"]) for b in result["bars"]}
    save_to_write, stall = rows["save"]["ratio"], seconds["stall of an asynchronous save"] / seconds["copy to the host"]
    assert bars == {
        "save to plain write": (save_to_write, 0.85, save_to_write >= 0.85),
        "stall by copy": (stall, 1.5, stall <= 1.5),
    }
    # the first allocates; then in turn one with buffers and a synchronous one; none waits or finds its work done
    assert saves == [(False, True, False), *[(True, True, False), (False, True, False)] * 2]
    c = config.Model(1, 2, None, 16, None, 64, 16)
    assert result["bytes"] >= 12 * c.parameters
    assert [f.name for f in tmp_path.iterdir()] == ["out.json"]  # nothing is left


@pytest.mark.parametrize(
    "args, said",
    [
        (["step", "--size", "3.1b", "--model.n_layer", "100000"], "take a smaller --size"),
        (["checkpoint", "--size", "3.1b", "--model.n_layer", "1000000"], "take a smaller --size or another --dir"),
        (["step", "--peers", "jax"], "invalid choice: 'jax'"),
        (["step", "--micro", "8", "3"], "expected divisors of the batch of 32 sequences"),
        (["step", "--steps", "0"], "--steps: got 0, expected 1 or more"),
        (["step", "--micro", "a"], "--micro"),
        (["step", "--train.kernels", "triton"], "train.kernels"),
        (["kernels", "--only", "gelu"], "invalid choice: 'gelu'"),
        (["checkpoint", "--dir", "nowhere"], "nowhere: No such file"),
        (["kernels", "--json", "."], "--json: got ., expected a file in a folder that exists"),
        (["kernels", "--plot", "roof.foo"], "--plot: got roof.foo, expected a .png file"),
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


def test_the_fastest_micro_batch_that_fits():
    class Trainer:  # out of memory at 16, fastest at 4
        cuda = False
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])

        def losses(self, sequences, micro, updates):
            return {"loss": 1.0}

        def speed(self, micro, warmup, steps):
            if micro == 16:
                raise torch.OutOfMemoryError
            return {8: 10.0, 4: 20.0}[micro]

    found = step.fastest_micro(Namespace(micro=[16, 32, 8, 4], minutes=1, updates=1), Trainer())
    assert found["micro"] == 4 and found["no_memory"] == [16, 32] and [t["micro"] for t in found["tried"]] == [8, 4]


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
    theirs = peers.hugging_face(c, ours)(input_ids=x, labels=y, shift_labels=y).loss
    torch.testing.assert_close(theirs, ours(x, y), rtol=1e-5, atol=0)  # fp32 rounding over two blocks


def test_answers_hold_the_same_ids_also_the_one_that_transformers_ends_at():
    torch.manual_seed(0)
    ours = model.Transformer(small()).eval()
    prompts = torch.randint(0, 61, (8, 4)).tolist()
    found = sample.generate(ours, prompts, 16, set())
    peer = peers.hugging_face(ours.config, ours).eval()
    assert any(peer.config.eos_token_id in ids for ids in found)
    assert evaluation.written(peer, prompts, 16, torch.device("cpu")) == found


def test_bytes_and_flops_by_hand():
    c = config.Model(n_layer=1, n_head=4, n_kv_head=2, hidden=32, ffn=80, vocab_size=100, context=16)  # D = 8
    M, item = 3 * 16, 2
    amounts = {  # forward, backward: bytes, of the last two FLOPs
        "rms_norm": (2 * 48 * 32 * 2 + 32 * 4, 3 * 48 * 32 * 2 + 2 * 32 * 4),
        "add_rms_norm": (4 * 48 * 32 * 2 + 32 * 4, 4 * 48 * 32 * 2 + 2 * 32 * 4),
        "rope": (2 * 48 * 8 * 8 * 2 + 2 * 16 * 4 * 4, 2 * 48 * 8 * 8 * 2 + 2 * 16 * 4 * 4),
        "swiglu": (48 * 3 * 80 * 2, 48 * 5 * 80 * 2),
        "attention": (3 * 4 * 16 * 16 * 8 * 2, 2.5 * 3 * 4 * 16 * 16 * 8 * 2),
        "cross_entropy": (6 * 48 * 100 * 32, 0),
    }
    assert M == 48
    for case, (forward, backward) in amounts.items():
        row = {"kernel": case, "forward": 1.0, "backward": 2.0, "both": 4.0}
        found = kernels.rates(row, c, 3, item, 1e12)  # a copy of 1e12 bytes/s, so that both kinds are in 1e12 a second
        got = {k.partition("_")[0]: rate * 1e12 for k, rate in found.items()}
        expected = {"forward": forward, "backward": backward / 2, "both": (forward + backward) / 4}
        assert got == pytest.approx({k: expected[k] for k in got}) and "both" in got, case
        assert len(got) == (1 if case == "cross_entropy" else 3)
    shapes = measure.gemm_shapes(c, 3)
    assert 3 * sum(2 * m * n * k for m, n, k in shapes.values()) + 6 * 32 * 16 * M == M * c.flops_per_token()


def test_bars_of_a_kernel():
    c = config.load("203m").model
    ours = {"forward": 1.0, "backward": 1.0, "forward_of_copy": 0.8, "backward_of_copy": 0.5}
    bars = kernels.kernel_bars(
        "rms_norm", c, {"triton": ours, "compile": {"forward": 1.5, "backward": 1.5}, "liger": {}}
    )
    assert [(b["what"], b["bar"], b["reached"]) for b in bars] == [
        ("forward of_copy", 0.75, True),
        ("forward compile/triton", 1.25, True),
        ("backward of_copy", 0.70, False),
        ("backward compile/triton", 1.6, False),
    ]
    ours = {"both": 1.0, "both_tflops": 400.0, "extra_bytes": 2_000_000_000}
    bars = kernels.kernel_bars("cross_entropy", c, {"triton": ours, "liger": {"both": 1.5}})
    assert [(b["bar"], b["reached"]) for b in bars] == [(380, True), (2.0, False), (1e9, False)]


def test_step_is_compared_with_the_bars_of_its_size():
    c = config.load("203m")
    gb = {
        r: [{"micro": m, "tokens_per_second": 1.0, "peak_bytes": b} for m, b in sizes]
        for r, sizes in {"ours": ((4, 4), (8, 6), (16, 10)), "hf-compile": ((4, 10), (8, 20))}.items()
    }
    rows = {
        r: {
            "row": r,
            "note": None,
            "tried": t,
            "no_memory": [32],
            "micro": 8,
            "rounds": [{"tokens_per_second": s} for s in (1e5, 2e5, 3e5)],
        }
        for r, t in gb.items()
    }
    rows["ours"]["rounds"] = [{"tokens_per_second": s} for s in (3e5, 4e5, 3e5)]
    step.compare(rows, c, 989e12)
    bars = step.bars_of(rows, c, cuda=True)
    assert (
        rows["ours"]["tokens_per_second"] == 3e5 and rows["hf-compile"]["ours_ratio"] == 2.0
    )  # the median of 3, 2 and 1: round by round
    assert (
        rows["hf-compile"]["memory_ratio"] == 6 / 20 and rows["ours"]["left_out"] == "no memory for 32"
    )  # at 8, the largest that both did
    assert (
        rows["ours"]["mfu"] == pytest.approx(3e5 * 1.063e9 / 989e12, rel=1e-3)
        and rows["ours"]["mfu_published"] > rows["ours"]["mfu"]
    )
    assert [b["reached"] for b in bars] == [False, True, True]
