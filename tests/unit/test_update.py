"""The optimizer's step and the seeds, against sums written out in fp64, formulas and numbers."""

import math

import numpy as np
import pytest
import torch
from runs import records, run, tensors, weights, written_out

import config
import data
import eval as evaluation
import model

V1 = ("--mode", "ptfs", "--version", "1", "--train.log_every", "1")
CLIP = 0.65  # between the norms that occur, 0.6 to 1.2


@pytest.mark.parametrize("seed, clip", [(2, 10.0), (3, CLIP)])
def test_the_loop_is_adamw_written_out_at_other_seeds_and_with_clipping(prepared, tmp_path, seed, clip):
    """Weights, losses and gradient norms of eight updates, some of which a small clip scales down."""
    args = ("--plan.steps", "8", "--train.seed", str(seed), "--train.clip", str(clip))
    assert run(prepared, tmp_path, *V1, *args) == 0
    want = written_out(prepared, seed, 8, clip)
    assert set(want.clips) == ({True, False} if clip == CLIP else {False})
    folder = tmp_path / "ptfs-cosine" / "v1"
    got, log = weights(folder / "step-000008"), records(folder, "loss")
    # fp32 rounding, 6e-8, through some ten sums of at most 257 terms; the updates before carry it on
    assert [log[s]["loss"] for s in range(8)] == pytest.approx(want.losses, rel=1e-5)
    assert [log[s]["grad_norm"] for s in range(8)] == pytest.approx(want.norms, rel=1e-4)
    for name, p in want.weights.items():
        difference = (got[name].double() - p).abs()
        # an update is of size lr = 4e-3. fp32 gradients have an error of some 1e-6 of the largest, which Adam's
        # division by sqrt(v) makes more for small ones: at most 1e-3 of 8 updates, 1e-5 on average; seen: 2e-5, 3e-6
        assert difference.max() < 8 * 4e-3 * 1e-3 and difference.mean() < 8 * 4e-3 * 1e-5, name


def ramp(seed: int, repeat: bool = False) -> data.Tokens:
    """Two increments of 64 sequences of 4 tokens, each token its own place: a batch says where it was read."""
    t = data.Tokens.__new__(data.Tokens)
    t.context, t.B, t.seed, t.repeat, t.unique = 4, 8, seed, repeat, None
    t.ends, t.meta = [16, 32], {"vocab_size": 1000}
    t.files = {name: np.arange(64 * 4 + 1, dtype="<u2") for name in ("v1", "v2")}
    return t


def order(t: data.Tokens, step: int) -> list[int]:
    """The numbers of the sequences that a batch reads."""
    x, y = t.batch(step)
    assert (x == x[:, :1] + np.arange(4)).all() and (y == x + 1).all() and (x[:, 0] % 4 == 0).all()
    return (x[:, 0] // 4).tolist()


def test_the_order_of_the_data_is_the_seeds():
    """Numbers written out: batches 0 and 7 of the first increment, and batch 0 of the second."""
    assert order(ramp(1), 0) == [57, 0, 2, 16, 48, 37, 22, 24]
    assert order(ramp(1), 7) == [1, 56, 58, 19, 51, 30, 13, 54]
    assert order(ramp(1), 16) == [59, 35, 46, 1, 16, 38, 29, 21]
    assert order(ramp(2), 0) == [3, 25, 27, 41, 9, 55, 48, 44]
    assert order(ramp(2), 16) == [0, 36, 21, 20, 45, 14, 19, 44]


def test_every_increment_and_epoch_has_an_order_of_its_own():
    orders = []
    for seed in (1, 2):
        t = ramp(seed, repeat=True)
        for first in (0, 8, 16, 24):  # two epochs of increment 1, two of increment 2
            orders.append(tuple(i for step in range(first, first + 8) for i in order(t, step)))
    assert all(sorted(o) == list(range(64)) for o in orders)  # each sequence once
    assert len(set(orders)) == len(orders)
    # no two of them agree in more places than chance would have it: 1 of 64 on average, 8 once in a million
    assert max(sum(a == b for a, b in zip(o, p, strict=True)) for o in orders for p in orders if o != p) < 8


FIRST = {  # values of some initial weights, by seed
    1: {
        "embed.weight": (-0.03051192, -0.01500464, -0.01307962),
        "blocks.0.attn_out.weight": (-0.00901737, -0.00336084, 0.00173438),
        "head.weight": (0.00183239, 0.00627555, 0.01363438),
    },
    2: {
        "embed.weight": (-0.02081602, 0.01833208, -0.02608381),
        "blocks.0.attn_out.weight": (0.01032552, 0.0067224, 0.00393087),
        "head.weight": (-0.00573672, -0.00940915, 0.03105516),
    },
}


def test_the_initial_weights_are_the_seeds(prepared, tmp_path):
    """Numbers written out. PyTorch's generator is the same on every CPU but for the last bits of log and cos."""
    for seed, values in FIRST.items():
        assert run(prepared, tmp_path / str(seed), *V1, "--train.seed", str(seed), "--train.save_at", "0") == 0
        got = weights(tmp_path / str(seed) / "ptfs-cosine" / "v1" / "step-000000")
        for name, three in values.items():
            assert got[name].flatten()[:3].tolist() == pytest.approx(three, abs=1e-7), (seed, name)


def test_initial_weights_have_the_spread_of_the_formula():
    """normal(0, 0.02), what writes to the residual stream by 1 / sqrt(2 L) smaller, norms 1, biases 0."""
    L = 8
    torch.manual_seed(0)
    c = config.Model(n_layer=L, n_head=4, hidden=64, ffn=96, vocab_size=300, context=8, qkv_bias=True)
    stds = {"embed.weight": 0.02, "head.weight": 0.02, "norm.weight": None}
    for i in range(L):
        stds |= {f"blocks.{i}.{n}.weight": 0.02 for n in ("qkv", "gate_up")}
        stds |= {f"blocks.{i}.{n}.weight": 0.02 / 4 for n in ("attn_out", "ffn_out")}  # sqrt(2 * 8)
        stds |= dict.fromkeys((f"blocks.{i}.attn_norm.weight", f"blocks.{i}.ffn_norm.weight"), None)
        stds[f"blocks.{i}.qkv.bias"] = 0.0
    found = dict(model.Transformer(c).named_parameters())
    assert found.keys() == stds.keys()
    for name, std in stds.items():
        w = found[name].detach().double()
        if std is None or std == 0:
            assert (w == (1.0 if std is None else 0.0)).all(), name
        else:  # five standard errors: that of a mean is std / sqrt(n), that of a standard deviation std / sqrt(2 n)
            assert abs(w.mean()) < 5 * std / math.sqrt(w.numel()), name
            assert abs(w.std() / std - 1) < 5 / math.sqrt(2 * w.numel()), name
            assert w.abs().max() > 2.5 * std, name  # normal, not uniform, which ends at 1.7


def test_at_a_constant_rate_continual_training_is_training_from_scratch(prepared, tmp_path):
    """Weights and moments bit for bit: CPT's version 2 goes on with those of version 1, and with the next batch."""
    constant = ("--plan.schedule", "constant")
    for mode, version in (("ptfs", "2"), ("cpt", "1"), ("cpt", "2")):
        assert run(prepared, tmp_path, "--mode", mode, "--version", version, *constant) == 0
    a, b = (tensors(tmp_path / f"{p}-constant" / "v2" / "step-000020") for p in ("ptfs", "cpt"))
    assert a.keys() == b.keys() and any(k.startswith("exp_avg_sq.") for k in a)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_on_a_cpu_a_model_is_evaluated_in_float32(prepared, tmp_path):
    assert run(prepared, tmp_path, *V1) == 0
    path = tmp_path / "ptfs-cosine" / "v1" / "step-000010"
    net, _ = evaluation.load_model(path, torch.device("cpu"))
    assert net.dtype == torch.float32 and net(torch.zeros(1, 4, dtype=torch.int64)).dtype == torch.float32
    stored = weights(path)
    assert all(p.dtype == torch.float32 and torch.equal(p, stored[n]) for n, p in net.named_parameters())
