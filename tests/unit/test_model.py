"""The model against transformers, against fp64, and against the counts of Table 9."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from helpers import small

import config
import model
from bench import peers

TABLE9 = json.loads((ROOT / "results" / "paper.json").read_text())["table9_sizes"]


@pytest.mark.parametrize("row", TABLE9, ids=lambda r: r["size"])
def test_parameters_of_table_9(row):
    c = config.load(row["size"].lower())
    assert (c.model.hidden, c.model.n_head, c.model.n_layer, c.plan.max_lr) == (
        row["hidden"],
        row["heads"],
        row["layers"],
        row["max_lr"],
    )
    assert c.model.parameters == row["params_derived"]
    with torch.device("meta"):
        net = model.Transformer(c.model)
    assert sum(p.numel() for p in net.parameters()) == row["params_derived"]
    assert net.head.weight.shape == (100_277, row["hidden"])


def test_parameters_of_qwen():
    c, llama = config.load("qwen-1.2b").model, config.load("1.2b").model
    assert c.parameters == llama.parameters + 24 * 3 * 1536
    with torch.device("meta"):
        assert sum(p.numel() for p in model.Transformer(c).parameters()) == c.parameters


@pytest.mark.parametrize(
    "size, gflop",
    [("203m", 1.063), ("406m", 1.975), ("608m", 3.334), ("1.2b", 6.813), ("2.1b", 12.70), ("3.1b", 18.35)],
)
def test_flops_per_token(size, gflop):
    c = config.load(size).model
    L, h, V, T, f = c.n_layer, c.hidden, c.vocab_size, c.context, 4 * c.hidden
    assert c.flops_per_token() == 6 * (L * (4 * h * h + 3 * h * f) + V * h) + 6 * L * h * T
    assert c.flops_per_token() / 1e9 == pytest.approx(gflop, rel=5e-4)  # the digits given
    assert c.flops_per_token(causal=False) - c.flops_per_token() == 6 * L * h * T


@pytest.mark.parametrize(
    "kw", [{}, {"qkv_bias": True}, {"n_kv_head": 2}, {"n_kv_head": 1}, {"n_head": 2, "hidden": 24}], ids=str
)
def test_logits_and_loss_equal_transformers(kw):
    c = small(**kw)
    torch.manual_seed(0)
    ours = model.Transformer(c)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.1 * torch.randn_like(p))  # so that norms, biases and depth all matter
    twin = peers.hugging_face(ours)  # transformers' own Llama or Qwen2 with our weights
    ids = torch.randint(0, 61, (3, 19))
    expected = twin(input_ids=ids).logits
    # fp32 rounding over two blocks of sums of at most 128 terms: eps * sqrt(128) * a few, on logits of size about 3
    torch.testing.assert_close(ours(ids), expected, rtol=1e-4, atol=2e-5)
    loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(ours(ids[:, :-1], ids[:, 1:]), loss, rtol=1e-5, atol=0)
    with torch.no_grad():
        each = ours(ids[:, :-1], ids[:, 1:], reduction="none")
    assert each.shape == (3, 18)
    torch.testing.assert_close(each.mean(), loss, rtol=1e-5, atol=0)


def test_the_future_is_not_seen():
    torch.manual_seed(0)
    m = model.Transformer(small())
    ids = torch.randint(0, 61, (1, 20))
    changed = ids.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 61
    a, b = m(ids), m(changed)
    assert torch.equal(a[:, :12], b[:, :12]) and not torch.equal(a[:, 12:], b[:, 12:])


def test_initial_loss_is_that_of_a_uniform_guess():
    torch.manual_seed(0)
    m = model.Transformer(small())
    ids = torch.randint(0, 61, (16, 24))
    assert abs(m(ids, ids).item() - torch.log(torch.tensor(61.0)).item()) < 0.05
    out = m.blocks[0].attn_out.weight
    assert abs(out.std().item() / (0.02 / 2) - 1) < 0.1  # 0.02 / sqrt(2 * 2 layers), from 1,024 draws
