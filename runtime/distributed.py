"""Several ranks, one model: DDP, FSDP2, and what the ranks must agree on.

DDP keeps a whole copy of the weights on each rank and sums gradients. FSDP2 cuts weights, gradients and moments into
rows, a part a rank; a block's weights are gathered once a step, and its gradients reduced once. Hybrid sharding
(`train.shard_ranks`) keeps one such cut copy in every group of ranks, say a node, and sums gradients between groups.

Nothing here makes a schedule or a batch: the same global batch goes through the same update on any number of ranks.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import model as llama
from runtime.errors import UserError, first_line

MIX = 6364136223846793005  # odd, as every factor of the hash; Knuth's


class RankLost(UserError):
    """Other ranks are gone or stuck. Nothing that the user wrote is wrong: the same command goes on from the last checkpoint."""

    code = 124  # as timeout(1) has it


# ----------------------------------------------------------------------------------------------------------
# Which way


def problems(wanted: str, shard_ranks: int | None, ranks: int) -> list[str]:
    """What is wrong with train.parallel and train.shard_ranks on this many ranks, a line each."""
    found = []
    if wanted == "none" and ranks > 1:
        found.append(
            f"train.parallel: got none on {ranks} ranks, which would train {ranks} times the same; take auto, ddp or fsdp, or one process"
        )
    if shard_ranks and wanted != "fsdp":
        found.append(
            f"train.shard_ranks: got {shard_ranks} with train.parallel {wanted}, expected fsdp; leave one of them out"
        )
    elif shard_ranks and ranks % shard_ranks:
        near = max(n for n in range(1, min(ranks, shard_ranks) + 1) if ranks % n == 0)
        found.append(
            f"train.shard_ranks: got {shard_ranks}, expected a divisor of the {ranks} ranks; the nearest below is {near}"
        )
    if (
        os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
        and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    ):
        # https://github.com/pytorch/pytorch/issues/135712
        found.append(
            "torchrun --max-restarts: ranks that were started again would be given the addresses of the dead ones; "
            "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, and take --standalone or --rdzv-backend c10d"
        )
    return found


def choose(wanted: str, ranks: int, parameters: int, device: torch.device) -> tuple[str, str]:
    """("none", "ddp" or "fsdp", why). auto: DDP while float32 weights, gradients and two moments fit a third of a device,
    which leaves the rest to activations, the loss and buckets; on a CPU always.
    """
    state = 16 * parameters  # bytes
    if ranks == 1:
        return ("fsdp" if wanted == "fsdp" else "none"), "one rank"
    if wanted != "auto":
        return wanted, "as asked"
    if device.type != "cuda":
        return "ddp", "on a CPU always"
    memory = torch.cuda.get_device_properties(device).total_memory
    kind = "ddp" if 3 * state <= memory else "fsdp"
    return (
        kind,
        f"{state / 1e9:.3g} GB of weights, gradients and moments {'fit' if kind == 'ddp' else 'do not fit'} a third of {memory / 1e9:.3g} GB",
    )


# ----------------------------------------------------------------------------------------------------------
# Joining and agreeing


def join(device: torch.device, rank: int, ranks: int, timeout: float) -> None:
    """The process group: gloo for tensors on the CPU, NCCL for those on GPUs. FSDP2 wants one on a single rank, too.

    Its own timeout, which names no step, is only there should the Watchdog's, `timeout` seconds, not come first.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    alone: dict[str, Any] = {"store": dist.HashStore(), "rank": rank, "world_size": ranks} if ranks == 1 else {}
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=2 * timeout + 300),
            **alone,
        )
    except (RuntimeError, ValueError) as e:  # the address is taken, or nobody is there
        raise RankLost(
            f"rank {rank} could not meet the other {ranks - 1}: {first_line(e)}; MASTER_ADDR and MASTER_PORT must be rank 0's"
        ) from None


def rank0_error(message: str, rank: int) -> UserError:
    """For what all ranks meet at the same step: rank 0 says it."""
    return UserError(message if rank == 0 else "")


@contextmanager
def lost_rank_errors(rank: int, ranks: int) -> Iterator[None]:
    """Lost, where a collective fails because others are gone."""
    try:
        yield
    except RuntimeError as e:
        if ranks == 1 or not (isinstance(e, dist.DistError) or "gloo" in str(e)):
            raise
        raise RankLost(
            f"rank {rank} has lost the others ({first_line(e)}); the rank that failed first says why. The same command goes on from the last checkpoint"
        ) from None


@contextmanager
def raise_on_all_ranks(rank: int, ranks: int) -> Iterator[None]:
    """What stops one rank stops all. The first one of those says why; the others leave in silence, and wait for nobody."""
    error: Exception | None = None
    try:
        yield
    except (UserError, OSError) as e:
        error = e
    if ranks > 1:
        first = torch.tensor(rank if error else ranks)
        dist.all_reduce(first, dist.ReduceOp.MIN)
        if first < ranks and rank != first:
            error = UserError()
    if error:
        raise error


def broadcast(value: Any, ranks: int, source: int = 0, group: dist.ProcessGroup | None = None) -> Any:
    """The value that one rank has, which JSON can hold, on all ranks."""
    if ranks == 1:
        return value
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    size = torch.tensor(len(text))
    dist.broadcast(size, source, group=group)
    text = text if dist.get_rank() == source else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(text, source, group=group)
    return json.loads(bytes(text.tolist()))


def check_same(values: dict[str, Any], rank: int, ranks: int, remedy: str) -> None:
    """UserError unless all ranks hold the same values; names the first rank that differs, and the keys."""
    theirs, here = broadcast(values, ranks), json.loads(json.dumps(values))
    with raise_on_all_ranks(rank, ranks):
        if different := [
            f"{k}: {here.get(k)} here, {theirs.get(k)} there"
            for k in {**theirs, **here}
            if here.get(k) != theirs.get(k)
        ]:
            raise UserError(f"rank {rank} differs from rank 0 ({', '.join(different)}); {remedy}")


def check_replicas(net: torch.nn.Module, shards: int, rank: int, ranks: int, step: int) -> None:
    """Every copy of the weights must have the same bits, or a device computes wrongly. UserError on all ranks if not.

    `shards`: ranks that hold one copy together.
    """
    if ranks == shards:
        return
    mine = torch.tensor(fingerprint(net), dtype=torch.int64)
    every = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(every, mine)
    copies = torch.stack(every).view(-1, shards)  # (copies, shards)
    odd = (copies != copies.mode(0).values).flatten().nonzero().flatten().tolist()  # against what most copies have
    if odd:
        raise rank0_error(
            f"step {step}: the weights of rank {', '.join(map(str, odd))} differ from those of the other copies; stopped, nothing saved. "
            "A device may be at fault: start again without it",
            rank,
        )


def fingerprint(net: torch.nn.Module) -> int:
    """A 64-bit hash of the bits of this rank's weights. A change of one element always changes it: its factor is odd."""
    parts = [local_part(p.detach()).reshape(-1).view(torch.int32) for p in net.parameters()]
    total = torch.zeros((), dtype=torch.int64, device=parts[0].device)
    for bits in parts:
        for some in bits.split(1 << 24):  # int64 copies of a little at a time
            total = (
                total * MIX + (some.long() * torch.arange(1, 2 * len(some), 2, device=some.device)).sum()
            )  # modulo 2^64
    return int(total)


# ----------------------------------------------------------------------------------------------------------
# The model on many ranks


def local_part(t: Tensor) -> Tensor:
    """This rank's part of a tensor: the rows it holds under FSDP2, else all of it."""
    return t.to_local() if isinstance(t, DTensor) else t


def full_tensor(t: Tensor) -> Tensor:
    """All of a tensor that ranks hold in parts, such as the norm of a gradient."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def shard(net: llama.Transformer, device: torch.device, ranks: int, shard_ranks: int | None) -> None:
    """FSDP2, block by block, in place. Weights move to the device a block at a time, so the whole need not fit it.

    Blocks compute from bfloat16 copies where activations are bfloat16; embedding and head stay float32, since their
    gradients are sums over all tokens of a batch. Gradients are reduced in float32. What was gathered for a forward pass
    is kept for the backward, and for the next micro-batches: one gathering, one reduction a step.
    """
    if shard_ranks and shard_ranks < ranks:
        mesh = init_device_mesh(device.type, (ranks // shard_ranks, shard_ranks), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device.type, (ranks,))
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)  # RoPE's tables stay float32
    low = MixedPrecisionPolicy(param_dtype=net.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in net.blocks:
        fully_shard(block, mesh=mesh, mp_policy=low, reshard_after_forward=False)
    fully_shard(net, mesh=mesh, mp_policy=exact, reshard_after_forward=False)


@contextmanager
def sync_gradients(model: torch.nn.Module, last: bool) -> Iterator[None]:
    """Around a micro-batch: gradients cross ranks in the backward pass of the `last` one only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
        model.set_is_last_backward(last)
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


@contextmanager
def gathered_weights(net: torch.nn.Module) -> Iterator[None]:
    """All weights on all ranks, so that forward passes need no other rank: ranks may take different numbers of them."""
    parts = [m for m in net.modules() if isinstance(m, FSDPModule)]
    for m in parts:
        m.unshard()
    yield
    for m in parts:
        m.reshard()


# ----------------------------------------------------------------------------------------------------------


class SecondSignal(threading.Thread):
    """Ends the process at the second SIGTERM or SIGINT, also while the main thread is inside a collective, where no handler runs.

    One that comes within a second of the first is the same request: torchrun hands on what its ranks were sent already.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.read, self.write = os.pipe()
        os.set_blocking(self.write, False)
        signal.set_wakeup_fd(self.write, warn_on_full_buffer=False)  # a byte for each signal, as soon as it arrives

    def run(self) -> None:
        first = 0.0
        while (number := os.read(self.read, 1)) != b"\0":
            if first and time.monotonic() > first + 1:
                os._exit(128 + number[0])
            first = first or time.monotonic()

    def stop(self) -> None:
        signal.set_wakeup_fd(-1)
        os.write(self.write, b"\0")
        self.join()
        os.close(self.read)
        os.close(self.write)


def world() -> tuple[int, int, int]:
    """(rank, local rank, ranks) as torchrun sets them; (0, 0, 1) without it. UserError where they contradict each other."""
    given = {
        k: os.environ[k] for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if k in os.environ
    }
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    if not any(k in given for k in names):
        return 0, 0, 1
    missing = [k for k in names if k not in given]
    if given.get("WORLD_SIZE") != "1":
        missing += [k for k in ("MASTER_ADDR", "MASTER_PORT") if k not in given]
    if missing:
        raise UserError(
            f"{missing[0]}: not set, but {', '.join(k for k in names if k in given)} is; start several processes with torchrun, or unset them"
        )
    for k in names:
        if not given[k].isdecimal() or len(given[k]) > 6:
            raise UserError(
                f"{k}: got {given[k]!r}, expected a whole number; start several processes with torchrun, or unset it"
            )
    rank, local_rank, ranks = (int(given[k]) for k in names)
    if not local_rank <= rank < ranks:
        raise UserError(
            f"RANK: got {rank} with LOCAL_RANK {local_rank} and WORLD_SIZE {ranks}, expected LOCAL_RANK <= RANK < WORLD_SIZE; torchrun sets them"
        )
    return rank, local_rank, ranks
