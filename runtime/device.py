"""The device of a run: which one, its peak speed, and settings that make a CPU fast."""

import ctypes
import os
import platform
import shutil
import time

import numpy as np
import torch

from runtime.errors import UserError

# Dense bf16 FLOP/s of the data sheets, by a part of the card's name: the first that fits, so longer names first
PEAK = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
PEAK |= {"GB200": 2500e12, "B200": 2250e12}
SMALL = 1_000_000  # parameters of a model that one thread computes


def pick_device(name: str, local_rank: int) -> torch.device:
    """The device of train.device on this rank; "auto" is the first there is."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [kind for kind, is_there in have.items() if is_there]
    name = there[0] if name == "auto" else name
    if name not in there:
        raise UserError(f"train.device: got {name}, which this machine does not have; expected {' or '.join(there)}")
    if name == "cuda" and local_rank >= (gpus := torch.cuda.device_count()):
        raise UserError(f"LOCAL_RANK: got {local_rank} on a machine with {gpus} GPUs; lower --nproc_per_node to that")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def activations(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of train.dtype; "auto" is bfloat16 on CUDA and float32 elsewhere."""
    bf16 = wanted == "bfloat16" or (wanted == "auto" and device.type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {platform.machine()}"


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that a step could reach at best, and its source: a data sheet, or a matrix product timed here."""
    for gpu, flops in PEAK.items():
        if gpu in device_name(device) and dtype == torch.bfloat16:
            return flops, "data sheet"
    n = 1024 if device.type == "cpu" else 4096
    own = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay as they are
    a = torch.randn(n, n, device=device, dtype=dtype, generator=own)
    best, until = float("inf"), time.perf_counter() + 0.3
    while time.perf_counter() < until:
        t = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for the device
        best = min(best, time.perf_counter() - t)
    return 2 * n**3 / best, f"{n}^3 matrix product timed at the start, threads: {torch.get_num_threads()}"


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most bytes that tensors took since the start; on CUDA alone. A leak shows before memory is full."""
    return {"peak_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}


def to_device(arrays: tuple[np.ndarray, ...], device: torch.device) -> list[torch.Tensor]:
    """Copy a batch; from pinned memory asynchronously: the host prepares the next one while the device computes."""
    host = [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]  # a strided copy would wait for the device
    return [(h.pin_memory() if device.type == "cuda" else h).to(device, non_blocking=True) for h in host]


def tune_cpu(device: torch.device, parameters: int) -> None:
    """On a CPU, one thread for a model of so few parameters, unless OMP_NUM_THREADS is given, and steady memory."""
    if device.type != "cpu":
        return
    # OpenMP's threads wait for each other in a loop that takes the core, at every one of many small operations. Beside
    # other work, two threads were 10 times and more slower than one; alone they gain little at this size
    if parameters < SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        # glibc keeps freed memory for the next tensor: to get large blocks again page by page is slow
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: at its largest, 32 MiB
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def cpp_compiler() -> bool:
    """Whether there is a C++ compiler, which torch.compile needs on a CPU."""
    return any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++"))))
