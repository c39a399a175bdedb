"""Kernels through torch.compile, and compiled for GPUs that are not here."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import config
import kernels
import model
from kernels import attention

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.gpu] * CUDA  # there the kernels run on it
USE = ["triton", "torch"]
KERNELS = {
    *("rms_norm._forward", "rms_norm._backward", "swiglu._forward", "swiglu._backward", "rope._turn"),
    *("attention._delta", "cross_entropy._rows_kernel"),
}
MATRIX_KERNELS = {"attention._forward", "attention._backward_kv", "attention._backward_q"}  # on tensor cores


@pytest.mark.parametrize("use", USE)
def test_the_compiled_model_is_one_graph(use):
    c = config.Model(n_layer=2, n_head=2, hidden=32, vocab_size=61, context=24)
    torch.manual_seed(0)
    net = model.Transformer(c, use=dict.fromkeys(kernels.NAMES, use)).to(DEVICE)
    ids = torch.randint(61, (2, 20), device=DEVICE)
    loss = net(ids, ids)
    loss.backward()
    want = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    torch._dynamo.reset()
    again = torch.compile(net, backend="aot_eager", fullgraph=True)(ids, ids)  # an error if it is not one graph
    again.backward()
    # the same operations, some in another order: 1e-4 is 1,700 roundings, and one to bfloat16 is 4e-3
    torch.testing.assert_close(again, loss, rtol=1e-4, atol=0)
    for p, g in zip(net.parameters(), want, strict=True):
        assert (p.grad - g).norm() <= 1e-4 * g.norm()


@pytest.mark.parametrize("cached", [False, True], ids=["documents", "a cache"])
def test_masked_attention_of_a_gpu_is_captured_in_a_block(cached, monkeypatch):
    """One graph, with the choice of PyTorch's backend in it, which is as before afterwards."""
    monkeypatch.setattr(model, "masked_attention", attention._without_cudnn)
    c = config.Model(n_layer=1, n_head=4, n_kv_head=2, hidden=32, vocab_size=61, context=24)
    torch.manual_seed(0)
    block = model.Block(c, dict.fromkeys(kernels.NAMES, "torch")).to(DEVICE)
    T, S = (1, 16) if cached else (16, 16)
    x, angles = torch.randn(2, T, 32, device=DEVICE), torch.randn(2, T, 4, device=DEVICE)
    at = torch.full((2, T), 7, device=DEVICE)
    past = (torch.randn(2, S, 2, 8, device=DEVICE), torch.randn(2, S, 2, 8, device=DEVICE), at) if cached else None
    mask = (torch.arange(S) <= (at.cpu() if cached else torch.arange(T))[..., None]).expand(2, T, S)[:, None].to(DEVICE)
    before = torch.nn.attention._cur_sdpa_kernel_backends()
    torch._dynamo.reset()
    with torch.set_grad_enabled(not cached):
        want = block(x, None, angles, angles, mask, past)
        got = torch.compile(block, backend="aot_eager", fullgraph=True)(x, None, angles, angles, mask, past)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    if not cached:
        both = [torch.autograd.grad(y[0].sum() + y[1].sum(), list(block.parameters())) for y in (got, want)]
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-6)
    assert torch.nn.attention._cur_sdpa_kernel_backends() == before


def test_the_kernels_compile_for_gpus_that_are_not_here():
    """To machine code for sm_80 and sm_90, in bf16, at the head dims and widths of the configs."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests" / "compile_kernels.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    running = {arch: subprocess.Popen([*command, str(arch), "--json"], **pipes) for arch in (80, 90)}
    for arch, shared in ((80, 163), (90, 227)):  # KiB of shared memory that a block can have
        out, err = running[arch].communicate()
        assert running[arch].returncode == 0, err[-2000:]
        built = json.loads(out)
        assert {k["kernel"] for k in built} == KERNELS | MATRIX_KERNELS
        for k in built:
            assert k["shared"] <= shared * 1024, k
            assert k["wide_loads"] > 0, k  # 16 bytes at a time
            if arch == 90 or k["kernel"] == "cross_entropy._rows_kernel":
                assert k["stack"] == 0, k  # no register spilled
            if arch == 90:
                assert k["wgmma"] == (k["kernel"] in MATRIX_KERNELS), k
