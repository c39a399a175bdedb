"""y = x W' + b (' transposes), where W and its gradient are float32 and products are in the dtype of the activations.

    dx = dy W        dW = dy' x        db = sum over rows of dy

`low` is a copy of W in the dtype of x. Kept from one update to the next, it spares a cast of W in each micro-batch,
and dW is written once, in float32: tensor cores sum in float32, and nothing rounds the sum before it is added to the
gradient. Without it W is cast here, and autograd's dW is rounded to the dtype of x before it is cast back.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("pathswitch::weight_gradient", mutates_args=())
def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    if dy.is_cuda:
        return torch.mm(dy.t(), x, out_dtype=torch.float32)
    return dy.t().float() @ x.float()


_weight_gradient.register_fake(lambda dy, x: x.new_empty(dy.shape[1], x.shape[1], dtype=torch.float32))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor) -> Tensor:
        ctx.save_for_backward(x, low)
        return F.linear(x, low, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, low = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        db = rows.sum(0) if ctx.needs_input_grad[2] else None
        return dy @ low, _weight_gradient(rows, x.reshape(-1, x.shape[-1])), db, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, low: Tensor | None = None) -> Tensor:
    """x (.., C), weight (N, C), bias (N,) -> (.., N) in the dtype of x. `low`: the weight in that dtype."""
    bias = bias if bias is None else bias.to(x.dtype)
    if low is None:
        return F.linear(x, weight.to(x.dtype), bias)
    return _Linear.apply(x, weight, bias, low)
