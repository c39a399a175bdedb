"""Which operation is used: what the user asked for, and what agrees with PyTorch's at the start on a GPU."""

from dataclasses import astuple, replace

import pytest
import torch

import config
import kernels
from kernels import check
from runtime.errors import UserError

CUDA = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] * CUDA  # there the kernels run on it
DEVICE = torch.device("cuda" if CUDA else "cpu")
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TORCH, TRITON = (dict.fromkeys(kernels.NAMES, use) for use in ("torch", "triton"))
MODEL = config.Model(n_head=2, n_kv_head=1, hidden=32, ffn=40, vocab_size=301)


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability=, faults=) simulates a GPU on which these operations do not agree; a list of those compared."""

    def simulate(capability=(9, 0), faults=()):
        compared = []
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(
            check, "find_fault", lambda name, *a: compared.append(name) or ("off by 3" if name in faults else "")
        )
        return compared

    check.say.cache_clear()
    return simulate


def choose(text, device=GPU):
    return check.choose(text, MODEL, torch.float32, device)


def test_a_choice_is_of_this_form():
    for bad in ("cuda", "triton=attention", "softmax=triton", "auto,", ""):
        with pytest.raises(UserError, match="train.kernels"):
            choose(bad, CPU)


def test_auto_is_triton_on_a_gpu_that_it_serves_and_pytorch_elsewhere(gpu, monkeypatch, capsys):
    compared = gpu()
    assert choose("auto") == TRITON and compared == list(kernels.NAMES)
    assert choose("auto,rms_norm=torch") == TRITON | {"rms_norm": "torch"} and "rms_norm" not in compared[5:]
    assert choose("torch") == TORCH and len(compared) == 9
    compared = gpu(capability=(7, 5))
    assert choose("auto") == TORCH == choose("auto", CPU)
    assert choose("torch,rope=triton") == TORCH | {"rope": "triton"} and compared == ["rope"]
    gpu()
    monkeypatch.setattr(check, "HAVE_TRITON", False)
    assert choose("auto") == TORCH
    assert not capsys.readouterr().err


def test_an_operation_that_disagrees_is_named_and_pytorchs_is_used(gpu, capsys):
    gpu(faults=("rope", "attention"))
    for _ in range(2):  # said once
        assert choose("auto") == TRITON | {"rope": "torch", "attention": "torch"}
    lines = [f"Triton's {name} fails here: off by 3; PyTorch's is used" for name in ("rope", "attention")]
    assert capsys.readouterr().err.splitlines() == lines


@pytest.mark.parametrize("text", ["triton", "auto,rope=triton"])
def test_an_operation_asked_for_by_name_that_disagrees_is_an_error(text, gpu, capsys):
    gpu(faults=("rope",))
    with pytest.raises(UserError) as e:
        choose(text)
    assert str(e.value) == f"train.kernels: Triton's rope fails here: off by 3; take {text},rope=torch"
    assert choose(f"{text},rope=torch")["rope"] == "torch"
    assert e.value.code == 2 and not capsys.readouterr().err


def test_a_cpu_compares_nothing(gpu):
    compared = gpu()
    assert choose("triton, attention=torch", CPU) == TRITON | {"attention": "torch"} and not compared


@pytest.fixture
def compared(monkeypatch):
    """compared(name) -> the fault of an operation in float32, on few tokens."""
    if not CUDA:
        monkeypatch.setattr(check, "T", 9)
    find = check.find_fault.__wrapped__
    return lambda name, c=MODEL: find(name, astuple(c), torch.float32, DEVICE)


OPERATION = {"rms_norm": "add_rms_norm", "cross_entropy": "linear_cross_entropy"}
BREAKS = {
    "a row": lambda y: torch.cat((y.reshape(-1)[:-1], y.reshape(-1)[-1:] * 1.3)).view_as(y),
    "nan": lambda y: y * torch.nan,
    "the gradient": lambda y: y.detach() + 1.1 * (y - y.detach()),
}


@pytest.mark.parametrize("name", kernels.NAMES)
def test_a_right_operation_agrees_and_a_broken_one_does_not(name, compared, monkeypatch):
    assert compared(name) == ""
    attribute = OPERATION.get(name, name)
    operation = getattr(check, attribute)
    for damage in BREAKS.values():

        def broken(*args, damage=damage):
            out = operation(*args)
            if args[-1] != "triton":
                return out
            return (damage(out[0]), *out[1:]) if isinstance(out, tuple) else damage(out)

        monkeypatch.setattr(check, attribute, broken)
        assert compared(name).startswith("off by ")


@pytest.mark.parametrize("name", kernels.NAMES)
def test_results_do_not_depend_on_memory_that_nobody_wrote(name, compared):
    """As on a GPU a hundred repeats in the same bits (test_kernels): here torch.empty gives nan the second time."""
    call, inputs = check.case(name, MODEL, check.B, check.T, torch.float32, DEVICE)
    first = check.results(call, "triton", inputs)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
        second = check.results(call, "triton", inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("size", ["203m", "1.2b", "3.1b"])
def test_all_kernels_are_right_at_the_shapes_of_the_configs(size):
    """As at the start of a run; in float32 and on few tokens the tests above do the same without a GPU."""
    triton = check.choose("triton", config.load(size).model, torch.bfloat16, torch.device("cuda", 0))
    assert triton == TRITON  # an error names the one that is not


def test_whatever_an_operation_raises_is_its_fault(compared, monkeypatch):
    def raises(*args):
        raise RuntimeError("PTX was compiled with an unsupported toolchain. See the log\nand more")

    monkeypatch.setattr(check, "swiglu", raises)
    assert compared("swiglu") == "RuntimeError: PTX was compiled with an unsupported toolchain"
    assert compared("attention", replace(MODEL, hidden=80)).startswith("ValueError: attention: head dim 40")


def test_the_comparison_leaves_nothing_behind(compared):
    """Not in the random numbers, not in a graph of the caller, not in a GPU's memory; and each time it is the same."""

    def state():
        random = [torch.get_rng_state()]
        if CUDA:
            random += [torch.cuda.get_rng_state(), torch.tensor(torch.cuda.memory_allocated())]
        return torch.cat([r.flatten() for r in random])

    compared("cross_entropy")  # a first call may start libraries, which keep memory
    before = state()
    with torch.no_grad(), torch.device("meta"):  # as where a model is made
        assert [compared(name) for name in kernels.NAMES] == [""] * 5
        assert not torch.is_grad_enabled()
    assert torch.equal(state(), before)


def test_what_cannot_be_served_is_said(monkeypatch):
    c = config.Model(n_head=1, hidden=40)
    assert kernels.problems("auto", False, c) == kernels.problems("torch", False, c) == []
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    assert "no CUDA GPU" in kernels.problems("auto,rope=triton", False, c)[0]
    assert "head dims (16, 32, 64, 96, 128), got 40;" in kernels.problems("triton", True, c)[0]
    assert kernels.problems("triton,attention=torch", True, c) == []
    monkeypatch.setattr(kernels, "HAVE_TRITON", False)
    assert "not installed" in kernels.problems("triton", True, c)[0]
