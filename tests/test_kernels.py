"""Every kernel and PyTorch's version of it against the reference in fp64; the references against PyTorch's operations.

Without a GPU the kernels run in Triton's interpreter in fp32, and are compiled, not run, for sm_80 and sm_90.
"""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import config
import kernels
import model
from kernels import attention as attn
from kernels import cross_entropy as ce
from kernels import rms_norm as norm
from kernels import rope as rot
from kernels import swiglu as glu
from runtime.errors import UserError

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
USE = ["triton", "torch"]
EPS = 2.0**-24  # of fp32: the largest relative error of one rounding


def rounding(terms, operations=8):
    """How far fp32 may be off, as |got - exact| / |exact|: sums of `terms` random products lose eps * sqrt(terms), and
    each of a few operations before and after them loses eps once. Twice that, because a test must not fail by luck."""
    return 2 * EPS * (math.sqrt(terms) + operations)


def compare(function, reference, inputs, terms, floor=0.0):
    """Values and all gradients of `function` in fp32 against `reference` in fp64.

    `floor`: the size of the terms where a result is their difference and may cancel to nothing.
    """
    ours = [x.detach().to(DEVICE).requires_grad_() for x in inputs]
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    for x, given in zip(ours, inputs, strict=True):
        assert x.stride() == given.stride()
    before = [x.detach().clone() for x in ours]
    got, want = function(*ours), reference(*exact)
    got, want = (y if isinstance(y, tuple) else (y,) for y in (got, want))
    upstream = [torch.randn_like(y) for y in want]
    torch.autograd.backward(got, [g.to(y.dtype).to(DEVICE) for g, y in zip(upstream, got, strict=True)])
    torch.autograd.backward(want, [g.to(y.dtype).double() for g, y in zip(upstream, got, strict=True)])
    pairs = [*zip(got, want, strict=True), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]
    for i, (a, b) in enumerate(pairs):
        assert a.shape == b.shape and a.dtype == torch.float32
        error = (a.detach().cpu().double() - b).norm()
        assert error <= rounding(terms) * (b.norm() + floor * math.sqrt(b.numel())), (
            f"{i}: {error / b.norm():.2e} > {rounding(terms):.2e}"
        )
    for x, y in zip(ours, before, strict=True):
        assert torch.equal(x, y), "an input was changed"


# ----------------------------------------------------------------------------------------------------------
# RMSNorm

ROWS = {
    "one row": (1, 33),
    "one column": (4, 1),
    "odd": (3, 7, 48),
    "wide": (5, 1000),
    "many rows": (301, 8),
    "empty": (0, 16),
    "wider than 2048": (3, 2050),
}


@pytest.mark.parametrize("use", USE)
@pytest.mark.parametrize("shape", ROWS.values(), ids=ROWS.keys())
def test_rms_norm(shape, use):
    torch.manual_seed(0)
    x, residual, w = torch.randn(shape), torch.randn(shape), torch.randn(shape[-1])
    terms = max(shape[-1], math.prod(shape[:-1]))
    floor = (
        1 / (x + residual).abs().min().item() if shape[-1] == 1 else 0.0
    )  # a single element is normed to its sign: the gradient cancels
    compare(
        lambda x, w: norm.rms_norm(x, w, 1e-5, use), lambda x, w: norm.rms_norm_ref(x, w, 1e-5), (x, w), terms, floor
    )
    compare(
        lambda x, r, w: norm.add_rms_norm(x, r, w, 1e-5, use),
        lambda x, r, w: (norm.rms_norm_ref(x + r, w, 1e-5), x + r),
        (x, residual, w),
        terms,
        floor,
    )


@pytest.mark.parametrize("use", USE)
def test_rms_norm_of_rows_apart_and_columns_apart(use):
    torch.manual_seed(0)
    for x in (torch.randn(9, 64)[:, :40], torch.randn(12, 40)[::2], torch.randn(40, 9).T):
        compare(
            lambda x, w: norm.rms_norm(x, w, 1e-5, use),
            lambda x, w: norm.rms_norm_ref(x, w, 1e-5),
            (x, torch.randn(40)),
            40,
        )


def test_rms_norm_ref_is_that_of_pytorch():
    x, w = torch.randn(6, 10, dtype=torch.float64), torch.randn(10, dtype=torch.float64)
    torch.testing.assert_close(norm.rms_norm_ref(x, w, 1e-5), F.rms_norm(x, (10,), w, 1e-5))


@pytest.mark.parametrize("use", USE)
def test_rms_norm_of_a_weight_that_is_not_in_one_piece(use):
    torch.manual_seed(0)
    for w in (torch.randn(12)[::2], torch.ones(1).expand(6)):
        x = torch.randn(4, 6)
        got = norm.rms_norm(x.to(DEVICE), w.to(DEVICE), 1e-5, use).cpu()
        torch.testing.assert_close(
            got.double(), norm.rms_norm_ref(x.double(), w.double(), 1e-5), rtol=1e-6, atol=1e-6
        )  # a few roundings
    with pytest.raises(ValueError, match=r"x \(4, 6\) and residual \(1, 6\)"):
        norm.add_rms_norm(x.to(DEVICE), x[:1].to(DEVICE), w.to(DEVICE), 1e-5, use)


# ----------------------------------------------------------------------------------------------------------
# SwiGLU and RoPE


@pytest.mark.parametrize("use", USE)
@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 140), (2, 2 * 1025), (0, 8), (7, 64)], ids=str)
def test_swiglu(shape, use):
    torch.manual_seed(0)
    x = 4 * torch.randn(shape)
    compare(lambda x: glu.swiglu(x, use), glu.swiglu_ref, (x,), 1)
    compare(lambda x: glu.swiglu(x, use), glu.swiglu_ref, (x.mT.contiguous().mT,), 1)


OVERFLOW = pytest.mark.filterwarnings(
    "ignore:overflow encountered"
)  # numpy, under the interpreter, where a GPU has inf and goes on


@OVERFLOW
def test_swiglu_far_out():
    with pytest.raises(ValueError, match="last dimension of 3"):
        glu.swiglu(torch.randn(4, 3))
    x = torch.tensor([[-1e4, 1e4, -80.0, 0.0, 2.0, 3.0, 5.0, 7.0]])
    for use in USE:
        assert glu.swiglu(x.to(DEVICE), use).tolist()[0] == pytest.approx([0.0, 3e4, 0.0, 0.0], abs=1e-30)


@pytest.mark.parametrize("use", USE)
@pytest.mark.parametrize(
    "B, T, H, K, D",
    [(2, 9, 4, 2, 48), (1, 1, 1, 1, 2), (2, 5, 3, 1, 10), (1, 7, 5, 5, 96), (0, 4, 2, 2, 8), (1, 3, 40, 8, 64)],
)
def test_rope(B, T, H, K, D, use):
    torch.manual_seed(0)
    cos, sin = rot.rope_table(T + 3, D, 100.0)
    cos, sin = cos[:T], sin[:T]
    qkv = torch.randn(B, T, H + 2 * K, D)
    on = [t.to(DEVICE) for t in (cos, sin)]
    compare(
        lambda x: rot.rope(x, *on, H, K, use), lambda x: rot.rope_ref(x, cos.double(), sin.double(), H, K), (qkv,), 2
    )
    compare(
        lambda x: rot.rope(x, *on, H, K, use),
        lambda x: rot.rope_ref(x, cos.double(), sin.double(), H, K),
        (qkv.transpose(1, 2).contiguous().transpose(1, 2),),
        2,
    )


def test_rope_turns_by_position_and_keeps_products_relative():
    cos, sin = rot.rope_table(16, 8, 10000.0)
    torch.manual_seed(0)
    x = (
        torch.randn(3, 1, 1, 8).expand(3, 16, 1, 8).transpose(0, 2)[0][None]
    )  # (1, 16, 3, 8): the same q, k, v at each position
    q, k, v = (t[0, :, 0].double() for t in rot.rope(x, cos, sin, 1, 1))
    assert torch.equal(v, x[0, :, 2].double())
    products = q @ k.T  # depends on the distance alone
    for distance in range(-15, 16):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)
    pairs = torch.complex(x[0, 5, 0, :4].double(), x[0, 5, 0, 4:].double())
    turned = pairs * torch.exp(1j * 5 * 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8))
    torch.testing.assert_close(q[5], torch.cat((turned.real, turned.imag)), rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------
# Attention

# (T, H, K, D): one token, lengths around the blocks of 64 and 128, grouped queries, every head dim
LENGTHS = [
    (1, 2, 1, 16),
    (2, 1, 1, 64),
    (63, 2, 2, 32),
    (64, 1, 1, 64),
    (65, 2, 2, 96),
    (77, 4, 1, 128),
    (128, 2, 1, 96),
    (129, 1, 1, 64),
    (200, 4, 2, 64),
    (257, 1, 1, 16),
]


@pytest.mark.parametrize("use", USE)
@pytest.mark.parametrize("T, H, K, D", LENGTHS)
def test_attention(T, H, K, D, use):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, T, H, D), torch.randn(2, T, K, D), torch.randn(2, T, K, D)
    compare(
        lambda q, k, v: attn.attention(q, k, v, use), attn.attention_ref, (q, k, v), T * H // K + D, floor=float(T == 1)
    )  # one token: p is 1, and the gradients of q and k cancel


@OVERFLOW
@pytest.mark.parametrize("use", USE)
def test_attention_of_cuts_of_one_tensor_of_nothing_and_of_large_scores(use):
    torch.manual_seed(0)
    for scale in (1, 30):  # scores up to 30 * 30 * sqrt(16) * 4: exp of them overflows in fp32, softmax must not
        q, k, v = (scale * torch.randn(1, 70, 6, 16)).split(2, dim=2)
        # a score of size s carries an error of eps * s, and softmax turns that into a relative one
        compare(
            lambda q, k, v: attn.attention(q, k, v, use),
            attn.attention_ref,
            (q, k, v),
            (86 + (scale**2 * 16) ** 2 * (scale > 1)),
        )
    q = torch.randn(0, 5, 2, 16, device=DEVICE, requires_grad=True)
    attn.attention(q, q, q, use).sum().backward()
    assert q.grad.shape == q.shape


def test_attention_ref_is_softmax_of_all_scores():
    q, k, v = (torch.randn(2, 9, n, 8, dtype=torch.float64) for n in (4, 2, 2))
    want = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(attn.attention_ref(q, k, v), want)


def test_attention_keeps_the_log_sum_exp():
    q, k, v = (torch.randn(1, 70, 2, 16, device=DEVICE) for _ in range(3))
    s = torch.einsum("bthd,bshd->bhts", q, k) / 4
    s = s.masked_fill(torch.ones(70, 70, dtype=torch.bool, device=DEVICE).triu(1), -torch.inf)
    torch.testing.assert_close(attn._op(q, k, v)[1] * math.log(2), s.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_a_head_dim_that_is_not_served_is_named():
    q = torch.randn(1, 4, 1, 40, device=DEVICE)
    with pytest.raises(ValueError, match="head dim 40.*16, 32, 64, 96, 128"):
        attn.attention(q, q, q, "triton")


def test_a_dtype_that_is_not_served_is_named():
    x = torch.randn(2, 4, 3, 16, device=DEVICE, dtype=torch.float64)
    table = rot.rope_table(4, 16, 10.0)
    for call in (
        lambda: attn.attention(x, x, x, "triton"),
        lambda: norm.rms_norm(x, x[0, 0, 0], 1e-5, "triton"),
        lambda: glu.swiglu(x, "triton"),
        lambda: rot.rope(x, *table, 1, 1, "triton"),
        lambda: ce.linear_cross_entropy(x, x[0, 0], torch.zeros(2, 4, 3, dtype=torch.int64), use="triton"),
    ):
        with pytest.raises(TypeError, match="float64.*bfloat16, float16 and float32"):
            call()


# ----------------------------------------------------------------------------------------------------------
# Linear and cross-entropy


@pytest.mark.parametrize("use", USE)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("N, C, vocab", [(300, 16, 50), (1, 8, 2), (70, 12, 128), (0, 8, 5), (6, 4, 100_277)])
def test_linear_cross_entropy(N, C, vocab, reduction, use):
    """128 rows a chunk: the first shape has two and a part."""
    torch.manual_seed(0)
    x, w, t = torch.randn(2, N, C)[0], torch.randn(vocab, C), torch.randint(vocab, (N,))
    t[: N // 7] = ce.IGNORE
    ours = lambda x, w: ce.linear_cross_entropy(x, w, t.to(DEVICE), reduction, use, chunk_bytes=1)  # noqa: E731
    exact = lambda x, w: ce.linear_cross_entropy_ref(x, w, t, reduction) if N else (x.sum() + w.sum()) * 0  # noqa: E731
    floor = math.sqrt(C) if N == 1 else 0.0  # one loss near 0 is a difference of logits, which are of this size
    compare(ours, exact, (x, w), vocab + N, floor)
    with torch.no_grad():
        each = ce.linear_cross_entropy(x.to(DEVICE), w.to(DEVICE), t.to(DEVICE), "none", use, chunk_bytes=1)
    want = ce.linear_cross_entropy_ref(x.double(), w.double(), t, "none")
    torch.testing.assert_close(each.cpu().double(), want, rtol=rounding(vocab), atol=rounding(vocab))


@OVERFLOW
@pytest.mark.parametrize("use", USE)
def test_linear_cross_entropy_of_ignored_targets_and_large_logits(use):
    torch.manual_seed(0)
    x, w = (
        torch.randn(5, 7, 8, device=DEVICE, requires_grad=True),
        torch.randn(100, 8, device=DEVICE, requires_grad=True),
    )
    for reduction in ("mean", "sum"):
        loss = ce.linear_cross_entropy(x, w, torch.full((5, 7), ce.IGNORE, device=DEVICE), reduction, use)
        loss.backward()
        assert loss.item() == 0 and not x.grad.any() and not w.grad.any()
    t = torch.randint(100, (5, 7), device=DEVICE)
    big = 1e4 * x.detach()  # exp of the logits overflows, their softmax does not
    loss = ce.linear_cross_entropy(big, w, t, "mean", use)
    want = ce.linear_cross_entropy_ref(big.double().cpu(), w.double().cpu(), t.cpu())
    torch.testing.assert_close(loss.cpu().double(), want, rtol=1e-6, atol=0)
    loss.backward()
    assert w.grad.isfinite().all()


@pytest.mark.parametrize("use", USE)
@pytest.mark.parametrize("wrong", [100, 128, 5000, -1])
def test_a_target_outside_the_vocabulary(wrong, use):
    x, w, t = (
        torch.randn(4, 8, device=DEVICE),
        torch.randn(100, 8, device=DEVICE),
        torch.tensor([1, 2, wrong, 3], device=DEVICE),
    )
    if CUDA:
        assert ce.linear_cross_entropy(x, w, t, "sum", use).isnan()
    else:
        with pytest.raises(IndexError, match=f"got {wrong}, expected 0 .. 99"):
            ce.linear_cross_entropy(x, w, t, "sum", use)
    # what a GPU, which cannot raise, makes of it
    losses, _ = ce._rows(torch.randn(4, 128, device=DEVICE), t, torch.ones((), device=DEVICE), 100, False, True, use)
    assert losses.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("use", USE)
def test_targets_that_are_not_in_one_piece_or_of_another_integer_type(use):
    torch.manual_seed(0)
    x, w, t = torch.randn(9, 4), torch.randn(7, 4), torch.randint(7, (18,))
    for targets in (t[::2], t[:1].expand(9), t[:9].int(), t[:9].to(torch.uint8)):
        got = ce.linear_cross_entropy(x.to(DEVICE), w.to(DEVICE), targets.to(DEVICE), use=use)
        torch.testing.assert_close(
            got.cpu(), ce.linear_cross_entropy_ref(x, w, targets.long()), rtol=1e-5, atol=0
        )  # a mean of nine


def test_a_second_derivative_is_refused():
    x, w = torch.randn(9, 4, requires_grad=True), torch.randn(7, 4)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(ce.linear_cross_entropy(x, w, torch.randint(7, (9,))), x, create_graph=True)


def test_reduction_none_has_no_gradient():
    with pytest.raises(ValueError, match="no gradient"):
        ce.linear_cross_entropy(
            torch.randn(2, 4, requires_grad=True), torch.randn(8, 4), torch.tensor([1, 2]), reduction="none"
        )


# ----------------------------------------------------------------------------------------------------------
# References by finite differences; operations as torch.compile sees them


def test_gradcheck_of_every_reference():
    torch.manual_seed(0)
    r = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    cos, sin = (t.double() for t in rot.rope_table(3, 4, 10.0))
    t = torch.tensor([0, 4, ce.IGNORE])
    check = torch.autograd.gradcheck
    assert check(lambda x, w: norm.rms_norm_ref(x, w, 1e-5), (r(3, 5), r(5)))
    assert check(glu.swiglu_ref, (r(3, 8),))
    assert check(lambda x: rot.rope_ref(x, cos, sin, 2, 1), (r(2, 3, 4, 4),))
    assert check(attn.attention_ref, (r(1, 4, 2, 3), r(1, 4, 1, 3), r(1, 4, 1, 3)))
    assert check(lambda x, w: ce.linear_cross_entropy_ref(x, w, t), (r(3, 4), r(5, 4)))
    assert check(lambda x, w: ce.linear_cross_entropy(x, w, t), (r(3, 4), r(5, 4)))  # gradients by hand


def test_every_operation_is_one_that_torch_compile_can_see():
    """Schema, fake implementation, autograd and aot_autograd of each, by torch.library's own test."""
    torch.manual_seed(0)
    r = lambda *shape: torch.randn(*shape, device=DEVICE, requires_grad=True)  # noqa: E731
    cos, sin = (t.to(DEVICE) for t in rot.rope_table(5, 16, 10.0))
    q, k, w, t = r(1, 5, 2, 16), r(1, 5, 1, 16), r(16), torch.randint(20, (6,), device=DEVICE)
    for op, args in (
        (norm._op, (r(6, 16), None, w, 1e-5)),
        (norm._op, (r(6, 16), r(6, 16), w, 1e-5)),
        (glu._op, (r(3, 16),)),
        (rot._op, (r(1, 5, 4, 16), cos, sin, 2, 1)),
        (attn._op, (q, k, k)),
        (ce._op, (r(6, 16), r(20, 16), t, "mean", True, 4, "triton")),
        (ce._op, (r(6, 16), r(20, 16), t, "sum", True, 4, "torch")),
    ):
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("use", USE)
def test_the_compiled_model_is_one_graph(use):
    c = config.Model(n_layer=2, n_head=2, hidden=32, vocab_size=61, context=24)
    torch.manual_seed(0)
    net = model.Transformer(c, use=dict.fromkeys(kernels.NAMES, use)).to(DEVICE)
    ids = torch.randint(61, (2, 20), device=DEVICE)
    torch._dynamo.reset()
    seen = torch._dynamo.explain(net)(ids, ids)
    assert seen.graph_count == 1 and seen.graph_break_count == 0
    loss = net(ids, ids)
    loss.backward()
    want = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    again = torch.compile(net, backend="aot_eager", fullgraph=True)(ids, ids)
    again.backward()
    torch.testing.assert_close(again, loss)
    for p, g in zip(net.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)  # the same operations, some in another order


def test_the_kernels_compile_for_gpus_that_are_not_here():
    """For sm_80 and sm_90, in bf16, at every head dim and the widths of the configs, down to the machine code."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    for arch, shared in ((80, 163), (90, 227)):  # KiB of shared memory that a block can have
        r = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "compile_kernels.py"), str(arch), "--json"],
            capture_output=True,
            text=True,
            env=env,
        )
        assert r.returncode == 0, r.stderr[-2000:]
        built = json.loads(r.stdout)
        names = {k["kernel"] for k in built}
        assert {
            "rms_norm._forward",
            "rms_norm._backward",
            "swiglu._forward",
            "swiglu._backward",
            "rope._turn",
            "attention._forward",
            "attention._delta",
            "attention._backward_kv",
            "attention._backward_q",
            "cross_entropy._rows_kernel",
        } == names
        for k in built:
            assert k["shared"] <= shared * 1024, k
            assert k["wide_loads"] > 0, k  # 16 bytes at a time
            if arch == 90:
                assert k["stack"] == 0, k  # no register spilled
                assert k["wgmma"] == (
                    k["kernel"] in ("attention._forward", "attention._backward_kv", "attention._backward_q")
                ), k


# ----------------------------------------------------------------------------------------------------------
# Which is chosen


def test_choice(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    torchs = dict.fromkeys(kernels.NAMES, "torch")
    assert kernels.choose("auto", cpu) == kernels.choose("torch", gpu) == torchs
    assert kernels.choose("triton, attention=torch", cpu) == dict.fromkeys(kernels.NAMES, "triton") | {
        "attention": "torch"
    }
    for bad in ("cuda", "triton=attention", "softmax=triton", "auto,", ""):
        with pytest.raises(UserError, match="train.kernels"):
            kernels.parse(bad)
    monkeypatch.setitem(kernels.AUTO, "rms_norm", "triton")  # on a GPU auto takes what the table says
    assert kernels.choose("auto", gpu) == torchs | {"rms_norm": "triton"} and kernels.choose("auto", cpu) == torchs
    assert kernels.choose("auto,rms_norm=torch,swiglu=triton", gpu) == torchs | {"swiglu": "triton"}


def test_what_cannot_be_served_is_said(monkeypatch):
    c = config.Model(n_head=1, hidden=40)
    assert kernels.problems("auto", False, c) == kernels.problems("torch", False, c) == []
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "no CUDA GPU" in kernels.problems("auto,rope=triton", False, c)[0]
    assert "16, 32, 64, 96, 128, got model.hidden / model.n_head = 40" in kernels.problems("triton", True, c)[0]
    assert kernels.problems("triton,attention=torch", True, c) == []
    monkeypatch.setattr(kernels, "HAVE_TRITON", False)
    assert "not installed" in kernels.problems("triton", True, c)[0]


# ----------------------------------------------------------------------------------------------------------
# On a GPU

on_a_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")


def cases():
    """{name: (triton, PyTorch's own low-precision version, fp64, inputs)} in bf16, at the widths of the configs."""
    torch.manual_seed(0)
    r = lambda *shape: torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)  # noqa: E731
    cos, sin = (t.to(DEVICE) for t in rot.rope_table(1024, 96, 1e4))
    t = torch.randint(100_277, (512,), device=DEVICE)
    turn = lambda use: lambda x: rot.rope(x, cos, sin, 16, 16, use)  # noqa: E731
    head = lambda use: lambda x, w: ce.linear_cross_entropy(x, w, t, "mean", use)  # noqa: E731
    out = {
        "rms_norm": (
            *(lambda x, w, u=u: norm.rms_norm(x, w, 1e-5, u) for u in USE),
            lambda x, w: norm.rms_norm_ref(x, w, 1e-5),
            (r(999, 1536), r(1536)),
        ),
        "swiglu": (*(lambda x, u=u: glu.swiglu(x, u) for u in USE), glu.swiglu_ref, (r(999, 8192),)),
        "rope": (turn("triton"), turn("torch"), turn("torch"), (r(2, 1024, 48, 96),)),
        "cross_entropy": (
            head("triton"),
            head("torch"),
            lambda x, w: ce.linear_cross_entropy_ref(x, w, t),
            (r(512, 512), r(100_277, 512)),
        ),
    }
    for D in (64, 96, 128):
        out[f"attention {D}"] = (
            *(lambda q, k, v, u=u: attn.attention(q, k, v, u) for u in USE),
            attn.attention_ref,
            (r(2, 1000, 8, D), r(2, 1000, 4, D), r(2, 1000, 4, D)),
        )
    return out


def values_and_gradients(function, inputs, seed=1):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    torch.autograd.backward(out, [torch.randn(y.shape, device=DEVICE, generator=generator).to(y.dtype) for y in out])
    return [y.detach() for y in out] + [x.grad for x in inputs]


@on_a_gpu
@pytest.mark.parametrize(
    "name", ["rms_norm", "swiglu", "rope", "cross_entropy", "attention 64", "attention 96", "attention 128"]
)
def test_bf16_error_is_at_most_twice_that_of_pytorch(name):
    triton, own, exact, inputs = cases()[name]
    want = values_and_gradients(exact, [x.double() for x in inputs])
    for i, (a, b, w) in enumerate(
        zip(values_and_gradients(triton, inputs), values_and_gradients(own, inputs), want, strict=True)
    ):
        errors = [((t.double() - w).norm() / w.norm()).item() for t in (a, b)]
        assert errors[0] <= 2 * errors[1] + 1e-6, (
            f"{name} {i}: {errors[0]:.2e}, PyTorch's own {errors[1]:.2e}"
        )  # 1e-6: where PyTorch's is exact


@on_a_gpu
@pytest.mark.parametrize(
    "name", ["rms_norm", "swiglu", "rope", "cross_entropy", "attention 64", "attention 96", "attention 128"]
)
def test_a_hundred_repeats_give_the_same_bits(name):
    triton, _, _, inputs = cases()[name]
    first = values_and_gradients(triton, inputs)
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(first, values_and_gradients(triton, inputs), strict=True))
