"""What a step on a GPU depends on, checked on a CPU: copies, casts, memory, graphs, names of cards."""

import re
from functools import partialmethod

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import config
import model
from kernels import NAMES
from kernels.linear import linear
from runtime import build, device
from runtime.distributed import World
from runtime.start import Start

NOTHING = Start(0, [])


def net_of(**keys):
    """(net, module, optimizer) of a small config with these keys."""
    c = config.load("tiny", {k.replace("__", "."): str(v) for k, v in keys.items()})
    return build.build(c, NOTHING, "none", World())


# ----------------------------------------------------------------------------------------------------------
# The start


class Draws(TorchDispatchMode):
    """Counts the numbers that are drawn, and the elements of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.drawn = self.largest = 0

    def __torch_dispatch__(self, f, types, args=(), kw=None):
        out = f(*args, **(kw or {}))
        if "normal" in str(f) or "uniform" in str(f):
            self.drawn += out.numel() * (not out.is_meta)
        if isinstance(out, torch.Tensor) and not out.is_meta:
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("tied", ["true", "false"])
def test_a_model_is_made_without_memory_and_drawn_once(tied):
    keys = {"model.n_layer": "3", "model.tied": tied, "model.qkv_bias": "true"}
    c = config.load("tiny", keys).model
    with torch.device("meta"), Draws() as on_meta:
        net = model.Transformer(c)
    assert on_meta.drawn == 0 and on_meta.largest <= net.cos.numel()  # RoPE's tables alone are real
    with Draws() as counted:
        net.allocate(torch.device("cpu"))
        torch.manual_seed(5)
        net.initialize()
    assert counted.drawn == sum(p.numel() for p in net.parameters() if p.dim() == 2)
    assert counted.largest == max(p.numel() for p in net.parameters())  # a weight at a time
    assert (net.head.weight is net.embed.weight) == (tied == "true")
    torch.manual_seed(5)
    direct = model.Transformer(c)
    for (name, a), (_, b) in zip(net.named_parameters(), direct.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    ids = torch.arange(6)[None]
    assert torch.equal(net(ids), direct(ids))


# ----------------------------------------------------------------------------------------------------------
# Weights in float32, products in bfloat16


class WeightTraffic(TorchDispatchMode):
    """Bytes of tensors of the weight's shape that operations read and write; of matrix products only the result."""

    def __init__(self, weight):
        super().__init__()
        self.shapes, self.bytes = (weight.shape, weight.T.shape), 0

    def __torch_dispatch__(self, f, types, args=(), kw=None):
        out = f(*args, **(kw or {}))
        tensors = [t for t in (out, *args) if isinstance(t, torch.Tensor) and t.shape in self.shapes]
        if not f.is_view and "detach" not in str(f):
            if f in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                tensors = [t for t in tensors if t is out]
            self.bytes += sum(t.nbytes for t in tensors)
        return out


@pytest.mark.parametrize("kept, bytes_each", [(False, 26), (True, 16)])
def test_bytes_a_parameter_of_a_micro_batch(kept, bytes_each):
    """With a copy that is kept: dW in float32, added to the gradient. Without: two casts and a rounding more."""
    w = torch.randn(96, 64, requires_grad=True)
    low = w.detach().bfloat16() if kept else None

    def micro_batch():
        x = torch.randn(2, 8, 64, dtype=torch.bfloat16, requires_grad=True)
        linear(x, w, None, low).sum().backward()

    micro_batch()  # the first one makes the gradient
    with WeightTraffic(w) as traffic:
        micro_batch()
    assert traffic.bytes == bytes_each * w.numel()


def test_the_gradient_of_a_weight_is_not_rounded_to_bfloat16():
    torch.manual_seed(0)
    x, dy = (torch.randn(2, 40, n).bfloat16() for n in (64, 96))
    w, b = torch.randn(96, 64), torch.randn(96)
    exact = dy.flatten(0, 1).double().T @ x.flatten(0, 1).double()
    found = {}
    for kept in (True, False):
        mine, weight, bias = (t.clone().requires_grad_() for t in (x, w, b))
        y = linear(mine, weight, bias, w.bfloat16() if kept else None)
        y.backward(dy)
        found[kept] = (y, mine.grad, bias.grad)
        error = (weight.grad.double() - exact).norm() / exact.norm()
        assert weight.grad.dtype == torch.float32
        # 80 sums in float32, or one rounding to eight bits, of relative size 2^-9 at most and a third of it on average
        assert error < 80 * 2**-24 if kept else 2**-12 < error < 2**-9
    assert all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))  # all else is the same


def test_kept_copies_follow_the_weights():
    net, module, optimizer = net_of(train__dtype="bfloat16")
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    ids = torch.arange(40)[None]
    for _ in range(2):
        module(ids, ids).backward()
        optimizer.step()
        layers = [m for m in net.blocks.modules() if isinstance(m, model.Linear)]
        assert len(layers) == 4 * net.config.n_layer
        assert all(torch.equal(m.low, m.weight.bfloat16()) for m in layers)
    assert net.head.low is None and all(m.low is None for m in net_of()[0].blocks[0].modules() if hasattr(m, "low"))


# ----------------------------------------------------------------------------------------------------------
# Memory and graphs of a block


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_that_a_block_keeps(recompute):
    """With our kernels 20 h a token (40 h bytes in bfloat16): 2 norms' inputs and outputs, q k v, attention's output,

    which attn_out reads as well, gate and up (8 h), and their product (4 h). With recompute the two inputs.
    """
    c = config.Model(n_layer=3, n_head=4, hidden=64, vocab_size=61, context=32)
    net = model.Transformer(c, use=dict.fromkeys(NAMES, "triton"), recompute=recompute)
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def keep(t):
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    ids = torch.randint(61, (2, 32))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        net.states(ids)
    tokens, h = ids.numel(), c.hidden
    floats = sum(t.numel() for t in kept.values() if t.is_floating_point()) / (tokens * h * c.n_layer)
    # beside 20: r of two norms and L of each head, 6 numbers a token; the last norm's and the tables, once a model
    if recompute:
        assert floats < 3
    else:
        assert 20 <= floats < 20 + 6 / h + 2 / c.n_layer + 2 * net.cos.numel() / (tokens * h * c.n_layer)


@pytest.mark.parametrize("dtype, recompute", [("float32", "true"), ("bfloat16", "false")])
def test_blocks_share_their_graphs(monkeypatch, dtype, recompute):
    """Two graphs to train, since the first block has no residual stream yet; two to validate; then others for sizes

    that vary. None is cut, and none is left to run eagerly.
    """
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    counters.clear()
    keys = {"train__dtype": dtype, "train__recompute": recompute, "train__compile": "on"}
    net, module, optimizer = net_of(model__n_layer=5, **keys)
    ids = torch.randint(1024, (4, 64))
    seen = []
    for _ in range(3):
        module(ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    seen.append(counters["stats"]["unique_graphs"])
    with torch.no_grad():
        for rows, T in ((4, 64), (3, 64), (2, 64), (1, 17), (1, 19)):
            net(ids[:rows, :T], ids[:rows, :T], "sum")
            seen.append(counters["stats"]["unique_graphs"])
    assert seen == [2, 4, 6, 8, 10, 12]
    documents = torch.zeros_like(ids)
    module(ids, ids, "sum", documents).backward()
    assert counters["stats"]["unique_graphs"] == 14 < torch._dynamo.config.recompile_limit
    assert not torch._dynamo.config.optimize_ddp
    torch._dynamo.reset()


def test_a_compiled_step_is_the_step(monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager", fullgraph=True))
    ids = torch.randint(1024, (4, 64))
    found = []
    for compiled in ("on", "off"):
        torch._dynamo.reset()
        net, module, _ = net_of(train__compile=compiled)
        module(ids, ids).backward()
        found.append([p.grad for p in net.parameters()])
    # the same operations, some in another order: 1e-4 is 1,700 roundings
    assert all((a - b).norm() <= 1e-4 * b.norm() for a, b in zip(*found, strict=True))
    torch._dynamo.reset()


# ----------------------------------------------------------------------------------------------------------
# Batches, cards, memory


def test_a_batch_is_copied_from_contiguous_memory(monkeypatch):
    """A view of a window, such as its inputs, would be copied by way of memory that is not pinned."""
    window = np.arange(12).reshape(3, 4)
    for t, want in zip(device.to_device((window[:, :-1], window[:, 1:]), torch.device("cpu")), (0, 1), strict=True):
        assert t.is_contiguous() and t.tolist() == window[:, want : want + 3].tolist()


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
    ],
)
def test_peak_of_a_card(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: name)
    assert device.peak_flops(torch.device("cuda", 0), torch.bfloat16) == (tflops * 1e12, "data sheet")


def test_peak_memory_is_cudas(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda d: 7)
    assert device.peak_memory(torch.device("cuda", 0)) == {"peak_bytes": 7}
    assert device.peak_memory(torch.device("cpu")) == {}


@pytest.mark.parametrize("name", ["203m", "406m", "608m", "1.2b", "2.1b", "3.1b", "qwen-1.2b"])
def test_micro_batches_of_the_configs_fit(name):
    """The figures in their comments, computed: 18 bytes a parameter, 40 h a token and layer, 1.5 GB for the loss."""
    c = config.load(name)

    def gigabytes(micro):
        activations = 40 * c.model.hidden * c.model.n_layer * c.model.context * micro
        return round((18 * c.model.parameters + activations + 1.5e9) / 1e9)

    line = next(f for f in (ROOT / "configs" / f"{name}.toml").read_text().splitlines() if "micro_batch" in f)
    micro, here, other, there = map(int, re.findall(r"\b(\d+)\b(?= #| GB|,|:)", line.replace("H200", "")))
    assert (micro, here, there) == (c.train.micro_batch, gigabytes(micro), gigabytes(other)), line
    assert here < 80
