"""Kernels in the model and its callers, through torch.compile, and compiled for GPUs that are not here."""

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
import sample
from kernels import attention
from kernels.cross_entropy import IGNORE
from text.tokenizer import Tokenizer

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.gpu] * CUDA  # there the kernels run on it
USE = ["triton", "torch"]
KERNELS = {
    *("rms_norm._forward", "rms_norm._backward", "swiglu._forward", "swiglu._backward", "rope._turn"),
    "cross_entropy._rows_kernel",
}
MATRIX_KERNELS = {"attention._forward", "attention._backward_kv", "attention._backward_q"}  # on tensor cores


# ---- The callers: training, validation, packed documents, generation, log-likelihoods -------------------------------


def nets(uses, **kw):
    """A model with these choices, and the same by PyTorch's operations alone."""
    c = config.Model(**{"n_layer": 1, "n_head": 2, "hidden": 32, "vocab_size": 257, "context": 24, "ffn": 40, **kw})
    torch.manual_seed(0)
    both = [model.Transformer(c, use=TORCH | uses).to(DEVICE), model.Transformer(c).to(DEVICE)]
    with torch.no_grad():
        for p in both[0].parameters():  # no bias of 0, no norm of 1
            p.add_(0.1 * torch.randn(p.shape).to(DEVICE))
    both[1].load_state_dict(both[0].state_dict())
    return both


TORCH, TRITON = (dict.fromkeys(kernels.NAMES, use) for use in ("torch", "triton"))
SHAPES = {
    "plain": {},
    "grouped, tied": {"n_kv_head": 1, "tied": True},
    "biased, llama3": {"qkv_bias": True, "rope_scaling": "llama3", "rope_factor": 8.0, "rope_context": 16},
}


@pytest.mark.parametrize("kw", SHAPES.values(), ids=SHAPES)
def test_a_step_and_a_validation_with_all_kernels_are_those_of_pytorch(kw):
    for recompute, shape, packed in [(False, (2, 7), False), (True, (1, 11), True), (False, (1, 1), False)]:
        found = []
        ids = torch.randint(257, shape, device=DEVICE)
        targets = torch.where(torch.rand(shape, device=DEVICE) < 0.8, ids.roll(1), IGNORE) if packed else ids.roll(1)
        documents = (torch.arange(11, device=DEVICE) // 4).expand(shape) if packed else None
        for net in nets(TRITON, **kw):
            net.recompute = recompute
            loss = net(ids, targets, "sum" if packed else "mean", documents)
            loss.backward()
            with torch.no_grad():  # the last batch of a validation set may have one row
                one = None if documents is None else documents[:1]
                valid = [net(ids[:1], targets[:1], how, one) for how in ("sum", "none")]
            found.append(
                [loss.detach(), *valid, net(ids, None, "mean", documents), *(p.grad for p in net.parameters())]
            )
        for i, (a, b) in enumerate(zip(*found, strict=True)):
            # fp32 rounding of sums in another order, through a block and back: 1e-4 is 1,700 roundings
            assert (a - b).norm() <= 1e-4 * b.norm() + 1e-7, (i, recompute, shape)


EACH = {name: {name: "triton"} for name in kernels.NAMES} | {"all": TRITON}


@pytest.mark.parametrize("uses", EACH.values(), ids=EACH)
def test_generation_with_kernels_from_prompts_of_unequal_length(uses):
    """Side by side and alone, beyond the context, the ids of PyTorch's operations."""
    kernel, own = (net.eval() for net in nets(uses, n_kv_head=1, context=12))
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]
    want = sample.generate(own, prompts, 8, set())
    assert sample.generate(kernel, prompts, 8, set()) == want
    assert [sample.generate(kernel, [p], 8, set())[0] for p in prompts[1:]] == want[1:]


def test_the_logits_of_a_cache_with_kernels_are_those_of_whole_sequences():
    kernel, own = (net.eval() for net in nets(TRITON, qkv_bias=True))
    ids = torch.randint(257, (2, 20), device=DEVICE)
    lengths = torch.tensor([11, 4], device=DEVICE)
    cache = kernel.cache(2, 20)
    with torch.no_grad():
        kernel.states(ids[:, :11], cache=cache)
        cache.lengths += lengths
        for n in (1, 3, 1):  # a token, or several, of rows that have come to unequal positions
            new = torch.stack([row[a : a + n] for row, a in zip(ids, cache.lengths.tolist(), strict=True)])
            got = kernel.head(kernel.states(new, cache=cache))
            cache.lengths += n
            for row, logits, end in zip(ids, got, cache.lengths.tolist(), strict=True):
                torch.testing.assert_close(logits, own(row[None, :end])[0, -n:], rtol=1e-4, atol=1e-4)


def test_log_likelihoods_with_all_kernels_are_those_of_pytorch():
    pytest.importorskip("lm_eval")
    from tools import harness

    requests = [
        (("", ""), list(range(5, 5 + n)), [70, 71, 72][:k]) for n, k in ((1, 1), (9, 3), (9, 2), (19, 3), (4, 1))
    ]
    found = [harness.LM(net.eval(), Tokenizer("bytes"), 2)._loglikelihood_tokens(requests) for net in nets(TRITON)]
    for (a, best), (b, also) in zip(*found, strict=True):
        assert a == pytest.approx(b, rel=1e-5) and best == also


# ---- torch.compile --------------------------------------------------------------------------------------------------


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
    block = model.Transformer(c).to(DEVICE).blocks[0]
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
            if k["kernel"] == "cross_entropy._rows_kernel":
                assert k["stack"] <= 8, k  # Triton 3.6 keeps 8 bytes of validation's variant there
            elif arch == 90 and "float32" not in k["shape"]:
                # no register spilled; at head dim 128 the tiles that were fastest on an H200 spill 34 of them
                spills = k["kernel"] == "attention._backward_kv" and "D=128" in k["shape"]
                assert k["stack"] <= 136 * spills, k
            if arch == 90:
                assert k["wgmma"] == (k["kernel"] in MATRIX_KERNELS and "float32" not in k["shape"]), k
