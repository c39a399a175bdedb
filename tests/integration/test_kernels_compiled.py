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

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
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
            if arch == 90:
                assert k["stack"] == 0, k  # no register spilled
                assert k["wgmma"] == (k["kernel"] in MATRIX_KERNELS), k
