"""Every kernel and PyTorch's version of it, within a bound of the rounding errors; references against PyTorch's own.

Without a GPU the kernels run in Triton's interpreter in fp32, and are compiled, not run, for sm_80 and sm_90.
"""

from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from kernels import attention as attn
from kernels import cross_entropy as ce
from kernels import rms_norm as norm
from kernels import rope as rot
from kernels import swiglu as glu

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.gpu] * CUDA  # there the kernels run on it
USE = ["triton", "torch"]
EPS = 1e-5  # of RMSNorm


# ----------------------------------------------------------------------------------------------------------
# Rounding errors in the worst case. A sum of n terms, added in any order, is off by at most gamma(n - 1) times the sum
# of their absolute values (Higham 2002, sections 3.1 and 4.2). So the bounds hold for every BLAS and every GPU.


def gamma(n):
    """The largest relative error of n roundings to float32, one after the other."""
    return n * 2.0**-24 / (1 - n * 2.0**-24)


class Rounded:
    """A float64 value, and a bound of |value - the same computed in float32|."""

    def __init__(self, value, error=None):
        self.value = value
        self.error = torch.zeros_like(value) if error is None else error

    def rounded(self, n=2):  # 2 for one operation: some have a factor folded in, such as log2(e)
        return Rounded(self.value, self.error + gamma(n) * (self.value.abs() + self.error))

    def each(self, permute):
        return Rounded(permute(self.value), permute(self.error))

    @property
    def T(self):
        return self.each(lambda t: t.mT)

    def __add__(self, other):
        return Rounded(self.value + other.value, self.error + other.error).rounded()

    def __sub__(self, other):
        return Rounded(self.value - other.value, self.error + other.error).rounded()

    def __mul__(self, other):
        if not isinstance(other, Rounded):
            return Rounded(self.value * other, self.error * abs(other)).rounded()
        a, b = self.value.abs(), other.value.abs()
        return Rounded(self.value * other.value, a * other.error + self.error * (b + other.error)).rounded()

    def __truediv__(self, other):
        q = self.value / other.value
        return Rounded(q, (self.error + q.abs() * other.error) / (other.value.abs() - other.error)).rounded(4)

    def __matmul__(self, other):
        a, b = self.value.abs(), other.value.abs()
        error = a @ other.error + self.error @ (b + other.error)
        size = (a + self.error) @ (b + other.error)
        return Rounded(self.value @ other.value, error + gamma(sum_roundings(a.shape[-1])) * size)

    def sum(self, dim):
        size = (self.value.abs() + self.error).sum(dim, keepdim=True)
        error = self.error.sum(dim, keepdim=True) + gamma(sum_roundings(self.value.shape[dim])) * size
        return Rounded(self.value.sum(dim, keepdim=True), error)

    def mean(self):
        return self.sum(-1) * (1 / self.value.shape[-1])

    def exp(self, size=0.0):
        """`size`: of the numbers whose difference the argument is; rounding them changes the result by a factor."""
        y = self.value.exp()
        return Rounded(y, y * self.error.expm1()).rounded(8 + 4 * (size + self.value.clamp(min=-1e4).abs()))

    def log(self):
        return Rounded(self.value.log(), -(-self.error / self.value).log1p()).rounded(4)

    def rsqrt(self):
        y = self.value.rsqrt()
        return Rounded(y, y * ((1 - self.error / self.value).rsqrt() - 1)).rounded(4)

    def sigmoid(self):
        y = self.value.sigmoid()
        return Rounded(y, y * self.error.expm1()).rounded(8 + 4 * self.value.abs())

    def softmax_sums(self, mask=None):
        """exp(x - max), its sum, and the max, over the last dimension; nothing where `mask` holds."""
        x = self.value if mask is None else self.value.masked_fill(mask, -torch.inf)
        top = x.amax(-1, keepdim=True)
        weights = Rounded(x - top, self.error).exp(size=top.abs() + self.value.abs())
        return weights, weights.sum(-1), top


def sum_roundings(n):
    """Of one term of n: one in its product, n - 1 in the sum, and those of online softmax, which rescales by blocks."""
    return n + n // 8 + 8


def cat(parts, dim):
    return Rounded(*(torch.cat([getattr(p, name) for p in parts], dim) for name in ("value", "error")))


# The formulas and gradients at the top of the files: (inputs, gradients of outputs) -> (outputs, gradients of inputs)


def rms_norm_formula(x, w, dy):
    r = ((x * x).mean() + Rounded(torch.tensor(EPS, dtype=torch.float64))).rsqrt()
    n = x * r
    g = dy * w
    dx = r * (g - n * (g * n).mean())
    return n * w, dx, (dy * n).each(lambda t: t.reshape(-1, t.shape[-1])).sum(0).each(lambda t: t[0])


def add_rms_norm_formula(x, residual, w, dy, dz):
    z = x + residual
    y, dx, dw = rms_norm_formula(z, w, dy)
    return y, z, dx + dz, dx + dz, dw


def swiglu_formula(gate_up, dy):
    g, u = (gate_up.each(lambda t, i=i: t.chunk(2, -1)[i]) for i in (0, 1))
    s, one = g.sigmoid(), Rounded(torch.ones((), dtype=torch.float64))
    return g * s * u, cat((dy * u * s * (one + g * (one - s)), dy * g * s), -1)


def rope_formula(cos, sin, H, K):
    c, s = (Rounded(torch.cat(t, -1).double().unsqueeze(-2)) for t in ((cos, cos), (-sin, sin)))
    half = cos.shape[-1]

    def formula(qkv, dq, dk, dv):
        q, k, v = (qkv.each(lambda t, i=i: t.split((H, K, K), 2)[i]) for i in range(3))
        turned = [x * c + x.each(lambda t: t.roll(half, -1)) * s for x in (q, k)]
        back = [x * c + (x * s).each(lambda t: t.roll(half, -1)) for x in (dq, dk)]
        return *turned, v, cat((*back, dv), 2)

    return formula


def attention_formula(q, k, v, dy):
    heads = lambda x: x.each(lambda t: t.transpose(1, 2))  # noqa: E731
    q, k, v, dy = map(heads, (q, k, v, dy))
    K, group, scale = k.value.shape[1], q.value.shape[1] // k.value.shape[1], q.value.shape[-1] ** -0.5
    k, v = (x.each(lambda t: t.repeat_interleave(group, 1)) for x in (k, v))
    own = lambda x: x.each(lambda t: t.unflatten(1, (K, group))).sum(2).each(lambda t: t[:, :, 0])  # noqa: E731
    s = q @ k.T * scale
    weights, total, _ = s.softmax_sums(torch.ones(s.value.shape[-2:], dtype=torch.bool).triu(1))
    p = weights / total
    y = p @ v
    ds = p * (dy @ v.T - (dy * y).sum(-1))
    return [heads(x) for x in (y, ds @ k * scale, own(ds.T @ q) * scale, own(p.T @ dy))]


def cross_entropy_formula(targets, reduction):
    """Without the gradient of the output: it is 1."""
    kept, t = (targets != ce.IGNORE)[:, None], targets.clamp(min=0)[:, None]
    c = 1 / max(1, int(kept.sum())) if reduction == "mean" else 1.0

    def formula(x, w, dy):
        z = x @ w.T
        weights, total, top = z.softmax_sums()
        losses = (total.log() + Rounded(top) - z.each(lambda y: y.gather(1, t))).each(lambda y: y * kept)
        onehot = Rounded(torch.zeros_like(z.value).scatter_(1, t, 1.0))
        dz = ((weights / total - onehot) * c).each(lambda y: y * kept) * dy
        loss = losses.each(lambda y: y[:, 0])
        loss = loss if reduction == "none" else (loss.sum(0) * c).each(lambda y: y[0])
        return loss, dz @ w, dz.T @ x

    return formula


def on_device(x):
    """A leaf on the device with the strides of x; `to` makes a view contiguous."""
    storage = torch.empty(0, dtype=x.dtype).set_(x.detach().untyped_storage()).to(DEVICE)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset()).requires_grad_()


def compare(function, reference, formula, inputs):
    """Each element of the values and gradients of `function` in fp32 is within the bound of `formula`.

    `reference` in fp64, through autograd, has the values of `formula`.
    """
    ours = [on_device(x) for x in inputs]
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    assert all(x.stride() == given.stride() for x, given in zip(ours, inputs, strict=True))
    before = [x.detach().clone() for x in ours]
    got, want = function(*ours), reference(*exact)
    got, want = (y if isinstance(y, tuple) else (y,) for y in (got, want))
    upstream = [torch.randn_like(y).float() for y in want]
    torch.autograd.backward(got, [g.to(DEVICE) for g in upstream])
    torch.autograd.backward(want, [g.double() for g in upstream])
    bounds = formula(*(Rounded(x.detach()) for x in exact), *(Rounded(g.double()) for g in upstream))
    got, want = [*got, *(x.grad for x in ours)], [*want, *(x.grad for x in exact)]
    for i, (a, b, bound) in enumerate(zip(got, want, bounds, strict=True)):
        assert a.shape == b.shape == bound.value.shape and a.dtype == torch.float32
        assert ((bound.value - b).abs() <= 1e-7 * bound.error + 1e-30).all(), f"{i}: the formula is not the reference"
        off = (a.detach().cpu().double() - b).abs() / (
            bound.error + 1e-30
        )  # 1e-30: float32 underflows, float64 does not
        assert (off <= 1).all(), f"{i}: off by {off.max():.2g} times the bound"
    assert all(torch.equal(x, y) for x, y in zip(ours, before, strict=True)), "an input was changed"


# ----------------------------------------------------------------------------------------------------------
# RMSNorm

ROWS = {
    "one row": (1, 33),
    "one column": (4, 1),
    "odd": (3, 7, 48),
    "wide": (5, 1000),
    "many rows": (301, 8),
    "more rows than programs": (19, 1030),
    "empty": (0, 16),
    "wider than 2048": (3, 2050),
}


def rms_norm(use):
    return (
        lambda x, w: norm.rms_norm(x, w, EPS, use),
        lambda x, w: norm.rms_norm_ref(x, w, EPS),
        rms_norm_formula,
    )


@pytest.mark.parametrize("use", USE)
@pytest.mark.parametrize("shape", ROWS.values(), ids=ROWS.keys())
def test_rms_norm(shape, use):
    torch.manual_seed(0)
    x, residual, w = torch.randn(shape), torch.randn(shape), torch.randn(shape[-1])
    compare(*rms_norm(use), (x, w))
    compare(
        lambda x, r, w: norm.add_rms_norm(x, r, w, EPS, use),
        lambda x, r, w: (norm.rms_norm_ref(x + r, w, EPS), x + r),
        add_rms_norm_formula,
        (x, residual, w),
    )


@pytest.mark.parametrize("use", USE)
def test_rms_norm_of_strided_inputs(use):
    torch.manual_seed(0)
    for x in (torch.randn(9, 64)[:, :40], torch.randn(12, 40)[::2], torch.randn(40, 9).T):
        compare(*rms_norm(use), (x, torch.randn(40)))
    for w in (torch.randn(12)[::2], torch.ones(1).expand(6)):
        compare(*rms_norm(use), (torch.randn(4, 6), w))


def test_add_rms_norm_does_not_broadcast():
    with pytest.raises(ValueError, match=r"x is \(4, 6\), residual \(1, 6\)"):
        norm.add_rms_norm(torch.randn(4, 6), torch.randn(1, 6), torch.randn(6), EPS)


def test_rms_norm_ref_is_that_of_pytorch():
    x, w = torch.randn(6, 10, dtype=torch.float64), torch.randn(10, dtype=torch.float64)
    torch.testing.assert_close(norm.rms_norm_ref(x, w, EPS), F.rms_norm(x, (10,), w, EPS))


# ----------------------------------------------------------------------------------------------------------
# SwiGLU and RoPE


@pytest.mark.parametrize("use", USE)
@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 140), (2, 2 * 1025), (0, 8), (7, 64)], ids=str)
def test_swiglu(shape, use):
    torch.manual_seed(0)
    x = 4 * torch.randn(shape)
    for given in (x, x.mT.contiguous().mT):
        compare(lambda x: glu.swiglu(x, use), glu.swiglu_ref, swiglu_formula, (given,))


# numpy, which the interpreter runs on, warns where a GPU has inf and goes on
OVERFLOW = pytest.mark.filterwarnings("ignore:overflow encountered")


@OVERFLOW
def test_swiglu_of_large_gates_and_of_an_odd_width():
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
@pytest.mark.parametrize("rows", ["one table", "a table a row"])
def test_rope(B, T, H, K, D, rows, use):
    torch.manual_seed(0)
    cos, sin = rot.rope_table(T + 3 * B + 3, D, 100.0)
    # a batch whose rows have come to positions 3 apart, as in generation from prompts of unequal length
    at = torch.arange(T) if rows == "one table" else torch.arange(T) + 3 * torch.arange(B)[:, None]
    cos, sin = cos[at], sin[at]
    qkv = torch.randn(B, T, H + 2 * K, D)
    on = [t.to(DEVICE) for t in (cos, sin)]
    for given in (qkv, qkv.transpose(1, 2).contiguous().transpose(1, 2)):
        compare(
            lambda x: rot.rope(x, *on, H, K, use),
            lambda x: rot.rope_ref(x, cos.double(), sin.double(), H, K),
            rope_formula(cos, sin, H, K),
            (given,),
        )


def test_rope_refuses_tables_of_other_tokens():
    qkv = torch.randn(2, 5, 4, 8)
    for shape in ((7, 4), (1, 5, 4), (2, 4, 4), (10, 4)):
        with pytest.raises(ValueError, match=r"angles .* for qkv \(2, 5, 4, 8\)"):
            rot.rope(qkv, torch.ones(shape), torch.ones(shape), 2, 1)


def test_rope_turns_by_position_and_keeps_products_relative():
    cos, sin = rot.rope_table(16, 8, 10000.0)
    torch.manual_seed(0)
    x = torch.randn(1, 1, 3, 8).expand(1, 16, 3, 8)  # the same q, k and v at each position
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
    compare(lambda q, k, v: attn.attention(q, k, v, use), attn.attention_ref, attention_formula, (q, k, v))


@OVERFLOW
@pytest.mark.parametrize("use", USE)
def test_attention_of_views_of_an_empty_batch_and_of_large_scores(use):
    torch.manual_seed(0)
    for scale in (1, 30):  # at 30 exp of the scores overflows in fp32, and their softmax does not
        q, k, v = (scale * torch.randn(1, 70, 6, 16)).split(2, dim=2)
        compare(lambda q, k, v: attn.attention(q, k, v, use), attn.attention_ref, attention_formula, (q, k, v))
    q = torch.randn(0, 5, 2, 16, device=DEVICE, requires_grad=True)
    attn.attention(q, q, q, use).sum().backward()
    assert q.grad.shape == q.shape


def test_attention_ref_is_softmax_of_all_scores():
    q, k, v = (torch.randn(2, 9, n, 8, dtype=torch.float64) for n in (4, 2, 2))
    want = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(attn.attention_ref(q, k, v), want)


def masks(B, T, S):
    """{name: (B, 1, T, S)}; each query sees a key. With T < S the rows of a cache have come to unequal lengths."""
    at = torch.arange(T) + torch.randint(S - T + 1, (B, 1))  # the positions of the queries
    seen = torch.arange(S) <= at[:, :, None]
    documents = torch.randint(3, (B, S)).sort()[0]
    return {
        "cache": seen[:, None],
        "documents": (seen & (documents.gather(1, at)[:, :, None] == documents[:, None]))[:, None],
    }


@pytest.mark.parametrize("run", [attn.masked_attention, attn._without_cudnn], ids=["as here", "as on a GPU"])
@pytest.mark.parametrize("T, S, H, K", [(1, 1, 2, 1), (9, 9, 4, 2), (1, 40, 4, 2), (7, 128, 6, 2), (5, 16, 3, 3)])
def test_masked_attention(T, S, H, K, run):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, T, H, 16), torch.randn(3, S, K, 16), torch.randn(3, S, K, 16)
    for mask in masks(3, T, S).values():
        m = mask.to(DEVICE)
        got, want = (
            values_and_gradients(lambda *x, f=f, m=m: f(*x, m), [x.to(DEVICE, dtype) for x in (q, k, v)])
            for f, dtype in ((run, torch.float32), (masked_ref, torch.float64))
        )
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def masked_ref(q, k, v, mask):
    """The softmax over all keys, each query head by itself."""
    G = q.shape[2] // k.shape[2]
    heads = []
    for h in range(q.shape[2]):
        s = q[:, :, h] @ k[:, :, h // G].mT / q.shape[3] ** 0.5  # (B, T, S)
        heads.append(s.masked_fill(~mask[:, 0], -torch.inf).softmax(-1) @ v[:, :, h // G])
    return torch.stack(heads, 2)


@pytest.mark.parametrize("T, S", [(1, 128), (9, 128), (128, 128)])
def test_masked_attention_of_a_gpu_is_not_cudnns(T, S, monkeypatch):
    asked = []

    def sdpa(q, k, v, attn_mask):
        asked.append((_cur_sdpa_kernel_backends(), k.shape, attn_mask.shape))
        return q

    monkeypatch.setattr(attn.F, "scaled_dot_product_attention", sdpa)
    with FakeTensorMode():
        q, k = (torch.empty(3, *shape, 16, device="cuda") for shape in ((T, 8), (S, 2)))
        y = attn.masked_attention(q, k, k, torch.ones(3, 1, T, S, device="cuda", dtype=torch.bool))
    ((backends, keys, mask),) = asked
    assert set(backends) == {SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH}
    assert y.shape == q.shape and keys == (3, 8, S, 16) and mask == (3, 1, T, S)


def test_a_head_dim_that_is_not_served_is_named():
    q = torch.randn(1, 4, 1, 40, device=DEVICE)
    with pytest.raises(ValueError, match="head dim 40.*16, 32, 64, 96, 128"):
        attn.attention(q, q, q, "triton")


def test_a_dtype_that_is_not_served_is_named():
    x = torch.randn(2, 4, 3, 16, device=DEVICE, dtype=torch.float64)
    table = rot.rope_table(4, 16, 10.0)
    for call in (
        lambda: attn.attention(x, x, x, "triton"),
        lambda: norm.rms_norm(x, x[0, 0, 0], EPS, "triton"),
        lambda: glu.swiglu(x, "triton"),
        lambda: rot.rope(x, *table, 1, 1, "triton"),
        lambda: ce.linear_cross_entropy(x, x[0, 0], torch.zeros(2, 4, 3, dtype=torch.int64), use="triton"),
    ):
        with pytest.raises(TypeError, match="float64.*bfloat16, float16 and float32"):
            call()


# ----------------------------------------------------------------------------------------------------------
# Linear and cross-entropy


def in_chunks(*args):
    with mock.patch.dict(ce.CHUNK_BYTES, dict.fromkeys(("cpu", "cuda"), 1)):
        return ce.linear_cross_entropy(*args)


def cross_entropy(targets, reduction, use):
    """`function`, `reference` and `formula` of compare; 128 rows a chunk."""
    return (
        lambda x, w: in_chunks(x, w, targets.to(DEVICE), reduction, use),
        lambda x, w: ce.linear_cross_entropy_ref(x, w, targets, reduction),
        cross_entropy_formula(targets, reduction),
    )


def check_losses(x, w, targets, use):
    with torch.no_grad():
        each = in_chunks(x.to(DEVICE), w.to(DEVICE), targets.to(DEVICE), "none", use)
    exact = [Rounded(t.double()) for t in (x, w)]
    bound = cross_entropy_formula(targets.long(), "none")(*exact, Rounded(torch.ones((), dtype=torch.float64)))[0]
    assert ((each.cpu() - bound.value).abs() <= bound.error).all()


@pytest.mark.parametrize("use", USE)
@pytest.mark.parametrize(
    "N, C, vocab, reduction",
    [
        (300, 16, 50, "mean"),  # two chunks and a part
        (300, 16, 50, "sum"),
        (1, 8, 2, "mean"),
        (70, 12, 128, "sum"),
        (6, 4, 9000, "sum"),  # two of the kernel's blocks of 4,096 and a part
        (6, 4, 100_277, "mean"),
    ],
)
def test_linear_cross_entropy(N, C, vocab, reduction, use):
    torch.manual_seed(0)
    x, w, t = torch.randn(N, C), torch.randn(vocab, C), torch.randint(vocab, (N,))
    t[: N // 7] = ce.IGNORE
    compare(*cross_entropy(t, reduction, use), (x, w))
    check_losses(x, w, t, use)


@pytest.mark.parametrize("use", USE)
def test_linear_cross_entropy_of_nothing(use):
    x, w = (torch.randn(n, 8, device=DEVICE, requires_grad=True) for n in (0, 5))
    for reduction in ("mean", "sum"):
        loss = ce.linear_cross_entropy(x, w, torch.zeros(0, dtype=torch.long, device=DEVICE), reduction, use)
        loss.backward()
        assert loss.item() == 0 and x.grad.shape == (0, 8) and not w.grad.any()


@OVERFLOW
@pytest.mark.parametrize("use", USE)
def test_linear_cross_entropy_of_ignored_targets_and_large_logits(use):
    torch.manual_seed(0)
    x, w = (torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((5, 7, 8), (100, 8)))
    for reduction in ("mean", "sum"):
        loss = ce.linear_cross_entropy(x, w, torch.full((5, 7), ce.IGNORE, device=DEVICE), reduction, use)
        loss.backward()
        assert loss.item() == 0 and not x.grad.any() and not w.grad.any()
    t = torch.randint(100, (35,))
    big = 1e4 * x.detach().cpu().flatten(0, 1)  # exp of the logits overflows, their softmax does not
    compare(*cross_entropy(t, "mean", use), (big, w.detach().cpu()))


@pytest.mark.parametrize("use", USE)
@pytest.mark.parametrize("wrong", [100, 128, 5000, -1])
def test_a_target_outside_the_vocabulary(wrong, use):
    x, w = (torch.randn(n, 8, device=DEVICE) for n in (4, 100))
    t = torch.tensor([1, 2, wrong, 3], device=DEVICE)
    if CUDA:
        assert ce.linear_cross_entropy(x, w, t, "sum", use).isnan()
    else:
        with pytest.raises(IndexError, match=f"got {wrong}, expected 0 .. 99"):
            ce.linear_cross_entropy(x, w, t, "sum", use)
    # on a GPU, which cannot raise
    losses, _ = ce._rows(torch.randn(4, 128, device=DEVICE), t, torch.ones((), device=DEVICE), 100, False, True, use)
    assert losses.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("use", USE)
def test_strided_targets_and_other_integer_types(use):
    torch.manual_seed(0)
    x, w, t = torch.randn(9, 4), torch.randn(7, 4), torch.randint(7, (18,))
    for targets in (t[::2], t[:1].expand(9), t[:9].int(), t[:9].to(torch.uint8)):
        check_losses(x, w, targets, use)


def test_a_gpu_compiles_the_loss_twice_for_chunks_of_any_length():
    """And twice without the gradient; torch.compile goes on eagerly, in silence, after eight."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with mock.patch.object(torch, "compile", partial(torch.compile, backend=backend)):
        run = ce._compiled.__wrapped__()
    torch.manual_seed(0)
    c, logits, t = torch.tensor(0.25), torch.randn(300, 128), torch.randint(100, (1000,))
    for gradient in (True, False):
        for first, n in [(0, 300), (300, 300), (600, 7), (607, 2), *((0, n) for n in range(20, 120, 10))]:
            z, targets = logits[:n].clone(), t[first : first + n]
            want = ce._rows_ref(z.clone(), targets, c, 100, gradient)
            torch.testing.assert_close(run(z, targets, c, 100, gradient), want)
    assert len(compiled) <= 4


def test_the_loss_without_a_gradient_writes_no_gradient():
    z = torch.randn(6, 128, dtype=torch.bfloat16)
    assert ce._rows_ref(z, torch.randint(100, (6,)), torch.ones(()), 100, False)[1] is z


@pytest.mark.parametrize("programs", [1, 4, 7, 100])
def test_the_bits_of_the_loss_do_not_depend_on_the_number_of_programs(programs, monkeypatch):
    torch.manual_seed(0)
    x, w, t = torch.randn(7, 8), torch.randn(9000, 8), torch.randint(9000, (7,))
    run = lambda: values_and_gradients(  # noqa: E731
        lambda x, w: ce.linear_cross_entropy(x, w, t.to(DEVICE), "mean", "triton"), [x.to(DEVICE), w.to(DEVICE)]
    )
    want = run()
    monkeypatch.setattr(ce, "multiprocessors", lambda device: programs)
    for a, b in zip(run(), want, strict=True):
        assert torch.equal(a, b)


def test_a_second_derivative_is_refused():
    x, w = torch.randn(9, 4, requires_grad=True), torch.randn(7, 4)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(ce.linear_cross_entropy(x, w, torch.randint(7, (9,))), x, create_graph=True)


def test_reduction_none_has_no_gradient():
    with pytest.raises(ValueError, match="no gradient"):
        ce.linear_cross_entropy(torch.randn(2, 4, requires_grad=True), torch.randn(8, 4), torch.tensor([1, 2]), "none")


# ----------------------------------------------------------------------------------------------------------
# References by finite differences; operations as torch.compile sees them


def test_gradcheck_of_every_reference():
    torch.manual_seed(0)
    r = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    cos, sin = (t.double() for t in rot.rope_table(3, 4, 10.0))
    t = torch.tensor([0, 4, ce.IGNORE])
    check = torch.autograd.gradcheck
    assert check(lambda x, w: norm.rms_norm_ref(x, w, EPS), (r(3, 5), r(5)))
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
        (norm._op, (r(6, 16), None, w, EPS)),
        (norm._op, (r(6, 16), r(6, 16), w, EPS)),
        (glu._op, (r(3, 16),)),
        (rot._op, (r(1, 5, 4, 16), cos, sin, 2, 1)),
        (attn._op, (q, k, k)),
        (ce._op, (r(6, 16), r(20, 16), t, "mean", True, 4, "triton")),
        (ce._op, (r(6, 16), r(20, 16), t, "sum", True, 4, "torch")),
    ):
        torch.library.opcheck(op, args)


# ----------------------------------------------------------------------------------------------------------
# On a GPU

CASES = ["rms_norm", "swiglu", "rope", "cross_entropy", "attention 64", "attention 96", "attention 128"]


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
            *(lambda x, w, u=u: norm.rms_norm(x, w, EPS, u) for u in USE),
            lambda x, w: norm.rms_norm_ref(x, w, EPS),
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


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_bf16_error_is_at_most_twice_that_of_pytorch(name):
    triton, own, exact, inputs = cases()[name]
    want = values_and_gradients(exact, [x.double() for x in inputs])
    both = (values_and_gradients(f, inputs) for f in (triton, own))
    for i, (*results, w) in enumerate(zip(*both, want, strict=True)):
        error, of_pytorch = (((t.double() - w).norm() / w.norm()).item() for t in results)
        # 1e-6: PyTorch's result may be exact
        assert error <= 2 * of_pytorch + 1e-6, f"{name} {i}: {error:.2e}, PyTorch's own {of_pytorch:.2e}"


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_hundred_repeats_give_the_same_bits(name):
    triton, _, _, inputs = cases()[name]
    first = values_and_gradients(triton, inputs)
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(first, values_and_gradients(triton, inputs), strict=True))
