"""Which operations are Triton's, and whether those are right on this GPU: nobody may have run them on its kind before.

At the start each chosen Triton operation is compared with PyTorch's: values and gradients of a small tensor with the
run's own widths, heads, vocabulary and dtype. If it differs, raises or does not compile, PyTorch's is used.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import astuple, replace
from typing import Any

import torch
from torch import Tensor

import config
from kernels import HAVE_TRITON, NAMES, parse
from kernels.attention import attention
from kernels.cross_entropy import IGNORE, linear_cross_entropy
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope, rope_table
from kernels.swiglu import swiglu
from runtime.errors import UserError, first_line

Case = tuple[Callable[..., Any], list[Tensor]]  # a function and its inputs
B, T = 2, 144  # sequences and tokens: more than a block of attention, more rows than programs of a kernel


def choose(text: str, c: config.Model, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """ "torch" or "triton" for each operation; `text` is train.kernels. UserError if one that it names is not right."""
    wishes, gpu = parse(text), device.type == "cuda"
    new = gpu and HAVE_TRITON and torch.cuda.get_device_capability(device) >= (8, 0)
    auto = "triton" if new else "torch"
    chosen = {name: auto if wish == "auto" else wish for name, wish in wishes.items()}
    for name in [n for n in NAMES if gpu and chosen[n] == "triton"]:
        if fault := find_fault(name, astuple(c), dtype, device):
            if wishes[name] == "triton":
                raise UserError(f"train.kernels: Triton's {name} fails here: {fault}; take {text},{name}=torch")
            say(f"Triton's {name} fails here: {fault}; PyTorch's is used")
            chosen[name] = "torch"
    return chosen


@functools.cache
def say(line: str) -> None:
    """To stderr, once in a process."""
    print(line, file=sys.stderr, flush=True)


@functools.cache
def find_fault(name: str, shape: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> str:
    """What compare says of an operation at a model's shape, or why it does not run; "" if it is right."""
    c = config.Model(*shape)
    if name == "cross_entropy":
        c = replace(c, hidden=64)  # the kernel sees logits only
    try:
        # here, not where the caller makes tensors, such as meta; to compile PyTorch's operations would take longer
        with device, torch.compiler.set_stance("force_eager"):
            fault = compare(*case(name, c, B, T, dtype, device))
            if name == "rms_norm" and not fault:
                fault = compare(*case("add_rms_norm", c, B, T, dtype, device))
            return fault
    except Exception as e:  # whatever a compiler, a driver or a GPU finds
        return f"{type(e).__name__}: {first_line(e)}"


def compare(call: Callable[..., Any], inputs: list[Tensor]) -> str:
    """How Triton's values or gradients differ from float64's more than PyTorch's do.

    Both round to the dtype of the inputs, at other places: ours may be off by four times PyTorch's largest error, and
    by two units in the last place of the largest value where PyTorch's happens to be exact, and by 1e-5 of it for the
    order of float32 sums. A wrong row, block or mask is off by a tenth of it or more.
    """
    eps, doubles = torch.finfo(inputs[0].dtype).eps, [x.double() for x in inputs]
    runs = results(call, "triton", inputs), results(call, "torch", inputs), results(call, "torch", doubles)
    for ours, own, exact in zip(*runs, strict=True):
        off, allowed = ((y.double() - exact).abs().max().item() for y in (ours, own))
        size = exact.abs().max().item()
        if not off <= 4 * allowed + (2 * eps + 1e-5) * size:  # nan is not
            return f"off by {off:.2g} where PyTorch's is off by {allowed:.2g}, of values up to {size:.2g}"
    return ""


def results(call: Callable[..., Any], use: str, inputs: list[Tensor]) -> list[Tensor]:
    """The outputs, and the gradients of the inputs for random gradients of the outputs, the same in every dtype."""
    generator = torch.Generator(inputs[0].device).manual_seed(1)
    with torch.enable_grad():
        given = [x.detach().requires_grad_() for x in inputs]
        out = call(use, *given)
        out = out if isinstance(out, tuple) else (out,)
    dy = [torch.randn(y.shape, dtype=torch.bfloat16, device=y.device, generator=generator).type_as(y) for y in out]
    return [*out, *torch.autograd.grad(out, given, dy)]


def case(name: str, c: config.Model, B: int, T: int, dtype: torch.dtype, device: torch.device) -> Case:
    """An operation as the model calls it: a function of the choice, "torch" or "triton", and of inputs; the inputs."""
    C, H, V, eps = c.hidden, c.n_head, c.vocab_size, c.norm_eps
    D, K, f = C // H, c.n_kv_head or H, c.ffn or 4 * C
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    if name == "rms_norm":
        return lambda use, x, w: rms_norm(x, w, eps, use), [randn(B, T, C), randn(C, dtype=torch.float32)]
    if name == "add_rms_norm":
        inputs = [randn(B, T, C), randn(B, T, C), randn(C, dtype=torch.float32)]
        return lambda use, x, residual, w: add_rms_norm(x, residual, w, eps, use), inputs
    if name == "rope":
        cos, sin = (t.to(device) for t in rope_table(T, D, c.rope_theta))
        return lambda use, qkv: rope(qkv, cos, sin, H, K, use), [randn(B, T, H + 2 * K, D)]
    if name == "attention":
        return lambda use, q, k, v: attention(q, k, v, use), [randn(B, T, n, D) for n in (H, K, K)]
    if name == "swiglu":
        return lambda use, x: swiglu(x, use), [randn(B, T, 2 * f)]
    targets = torch.randint(V, (B, T), generator=generator, device=device)
    targets[0, 0] = IGNORE
    # logits of size 4, so that some probabilities are large, and so their gradients
    inputs = [randn(B, T, C), 4 / C**0.5 * randn(V, C, dtype=torch.float32)]
    return lambda use, x, w: linear_cross_entropy(x, w, targets, "mean", use), inputs
