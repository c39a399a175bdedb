"""The operations that decide the speed of a step, one a file: formula, gradient, PyTorch reference, Triton kernels.

    rms_norm.py  rope.py  attention.py  swiglu.py  cross_entropy.py     and linear.py, whose products are PyTorch's

An operation takes `use`: "torch" is PyTorch's own operations and runs everywhere, "triton" is the kernel and needs a
CUDA GPU. With TRITON_INTERPRET=1 in the environment the kernels run on the CPU too, in float32, slowly.
check.py turns the key train.kernels into one choice an operation, and tries those of a GPU before they are used.
"""

import functools
import os
from types import SimpleNamespace
from typing import Any

import torch

import config
from runtime.errors import UserError

try:
    import triton
    import triton.language as tl

    HAVE_TRITON = True
except ImportError:  # macOS, Windows: the files below can be imported, and "torch" is the only choice
    HAVE_TRITON = False
    triton: Any = SimpleNamespace(jit=lambda f: f)  # type: ignore[no-redef]
    tl: Any = SimpleNamespace(constexpr=None)  # type: ignore[no-redef]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU, as in the tests
# "auto" takes Triton's of each on a CUDA GPU of sm_80 or later, as measured on an H200: docs/performance.md
NAMES = (
    "rms_norm",  # one pass with the addition, and dw in it
    "rope",  # one pass that also splits q, k and v: half the time of torch.compile
    "attention",  # the same bits in every run, unlike SDPA's dq; SDPA is 2.4 % of a step faster at 1.2B
    "swiglu",  # one pass, both gradients side by side: three quarters of torch.compile's time
    "cross_entropy",  # 3 passes over the logits in bf16, compiled PyTorch 11: 8 % of a step at 203M
)
HEAD_DIMS = (16, 32, 64, 96, 128)  # what attention.py serves
MOST_ANGLES = 1 << 27  # context x head size: cosines and sines in memory; a million tokens at the usual 128


def parse(text: str) -> dict[str, str]:
    """ "triton" or "auto,attention=torch" -> a wish for every operation. UserError if it is not of this form."""
    wishes = dict.fromkeys(NAMES, "auto")
    for part in text.replace(" ", "").split(","):
        name, eq, wish = part.rpartition("=")
        if wish not in ("auto", "triton", "torch") or (eq and name not in NAMES):
            expected = "auto, triton or torch, and after it exceptions such as ,attention=torch"
            raise UserError(f"train.kernels: got {text!r}, expected {expected}; the kernels are {', '.join(NAMES)}")
        wishes.update({name: wish} if eq else dict.fromkeys(NAMES, wish))
    return wishes


def problems(text: str, cuda: bool, c: config.Model) -> list[str]:
    """Why the kernels that `text` asks for by name cannot run: here, or at this shape."""
    found, D = rope_problems(c), c.hidden // c.n_head
    asked = [name for name, wish in parse(text).items() if wish == "triton"]
    if asked and not HAVE_TRITON:
        found.append(f"train.kernels: got {text!r}, but Triton is not installed: pip install triton, or take torch")
    elif asked and not cuda and not INTERPRETED:
        found.append(f"train.kernels: got {text!r}, but the device is no CUDA GPU; take --train.kernels torch or auto")
    elif "attention" in asked and D not in HEAD_DIMS:
        found.append(f"train.kernels: attention serves head dims {HEAD_DIMS}, got {D}; take {text},attention=torch")
    return found


def rope_problems(c: config.Model) -> list[str]:
    """What is wrong with the rotary angles that a model asks for, one line each."""
    D, stretched, yarn = c.hidden // c.n_head, c.rope_scaling in ("llama3", "yarn"), c.rope_scaling == "yarn"
    checks = [  # key, value, expected, valid
        ("context", c.context, f"at most {MOST_ANGLES // D:,} with heads of {D}", c.context * D <= MOST_ANGLES),
        ("rope_low", c.rope_low, f"below rope_high = {c.rope_high:g}", not stretched or c.rope_low < c.rope_high),
        ("rope_theta", c.rope_theta, "above 1 for yarn", not yarn or c.rope_theta > 1),
        ("rope_high", c.rope_high, "at most 1e9 for yarn", not yarn or c.rope_high <= 1e9),
    ]
    return [f"model.{name}: got {got}, expected {expected}" for name, got, expected, fine in checks if not fine]


def served(name: str, x: torch.Tensor) -> None:
    """TypeError if the kernels would silently round x; RuntimeError if they cannot run on its device."""
    if not (x.is_cuda or INTERPRETED):
        raise RuntimeError(f"{name}: got a tensor on {x.device}; expected CUDA, or TRITON_INTERPRET=1 at import")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"{name}: got {x.dtype}; the Triton kernels serve bfloat16, float16 and float32: use 'torch'")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once, at least. Fixed for a device, and so are the bits of sums over programs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
