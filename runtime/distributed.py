"""Several ranks, one model: DDP, FSDP2, and agreement between ranks.

DDP keeps a whole copy of the weights on each rank. FSDP2 cuts weights, gradients and moments into rows, a part a rank;
hybrid sharding (`train.shard_ranks`) keeps one sharded copy in every group of ranks, say a node.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel

from config import Config
from model import Transformer
from runtime.errors import UserError, describe, first_line

HASH_FACTOR = 6364136223846793005  # odd, so that a change of one element always changes the hash; Knuth's


class RankLost(UserError):
    """Other ranks are gone or stuck. The user's input is fine: the same command goes on from the last checkpoint."""

    code = 124  # as timeout(1) has it


@dataclass(frozen=True)
class World:
    """This process among the processes of a run."""

    rank: int = 0
    local_rank: int = 0
    ranks: int = 1
    device: torch.device = torch.device("cpu")


def world_from_environment() -> World:
    """World as torchrun sets it, one rank without torchrun. UserError where the variables contradict each other."""
    given = {k: os.environ[k] for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if k in os.environ}
    if not given:
        return World()
    if len(given) == 3 and all(value.isdecimal() for value in given.values()):
        rank, local_rank, ranks = map(int, given.values())
        if local_rank <= rank < ranks and (ranks == 1 or {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()):
            return World(rank, local_rank, ranks)
    got = " ".join(f"{k}={value}" for k, value in given.items())
    expected = "LOCAL_RANK <= RANK < WORLD_SIZE with MASTER_ADDR and MASTER_PORT"
    raise UserError(f"got {got}, expected {expected}; start several processes with torchrun, or unset these variables")


# ---- Which way to share the work -------------------------------------------------------------------------------------


def problems(c: Config, ranks: int) -> list[str]:
    """Problems of the batch, train.parallel and train.shard_ranks on this many ranks, one line each."""
    wanted, shard_ranks, found = c.train.parallel, c.train.shard_ranks, batch_problems(c, ranks)
    if wanted == "none" and ranks > 1:
        found.append(f"train.parallel: got none on {ranks} ranks; take auto, ddp or fsdp, or one process")
    if shard_ranks and (wanted != "fsdp" or ranks % shard_ranks):
        expected = f"train.parallel fsdp and a divisor of the {ranks} ranks"
        found.append(f"train.shard_ranks: got {shard_ranks} with train.parallel {wanted}, expected {expected}")
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # https://github.com/pytorch/pytorch/issues/135712
        fix = "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before, and take --standalone or --rdzv-backend c10d"
        found.append(f"torchrun --max-restarts: new ranks would be given the addresses of the dead ones; {fix}")
    return found


def batch_problems(c: Config, ranks: int) -> list[str]:
    """The global batch must be whole micro-batches on every rank, or 1 and 8 GPUs would not run the same updates."""
    batch, unit = c.train.batch_tokens, c.train.micro_batch * c.model.context * ranks
    if batch % unit:
        expected = f"a multiple of micro_batch x context x {ranks} ranks = {unit}"
        return [f"train.batch_tokens: got {batch}, expected {expected}; lower train.micro_batch or take fewer ranks"]
    B, d = c.batch_sequences, c.data
    parts = {"decay_mix": d.decay_mix, "replay": d.replay, "replay_branch": d.replay_branch}
    expected = f"of {B} sequences, expected {1 / B:.3g} to {1 - 1 / B:.3g}"
    return [f"data.{k}: got {p:g} {expected}" for k, p in parts.items() if p and not 0 < int(p * B + 0.5) < B]


def choose(wanted: str, parameters: int, world: World) -> str:
    """none, ddp or fsdp; "auto" is fsdp on GPUs from 2B parameters, or where DDP takes over a third of their memory."""
    if world.ranks == 1:
        return "fsdp" if wanted == "fsdp" else "none"
    if wanted != "auto":
        return wanted
    if world.device.type != "cuda":
        return "ddp"
    state = 18 * parameters  # bytes: weights, a copy in bfloat16, gradients and moments; the rest is for activations
    memory = torch.cuda.get_device_properties(world.device).total_memory
    return "fsdp" if parameters >= 2e9 or 3 * state > memory else "ddp"


# ---- Joining and agreeing --------------------------------------------------------------------------------------------


def join(world: World, timeout: float) -> None:
    """Make the process group: gloo for tensors on the CPU, NCCL for those on GPUs. FSDP2 needs one on one rank, too."""
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if world.ranks == 1 else {}
    later = timedelta(seconds=2 * timeout + 300)  # than the Watchdog, which names the step
    try:
        dist.init_process_group(backend, timeout=later, **alone)
    except (RuntimeError, ValueError) as e:  # the address is taken, or no rank answers
        why = f"{first_line(e)}; MASTER_ADDR and MASTER_PORT must be rank 0's"
        raise RankLost(f"rank {world.rank} could not meet the other {world.ranks - 1}: {why}") from None


@contextmanager
def lost_rank_errors(world: World) -> Iterator[None]:
    """Raise RankLost where a collective fails because other ranks are gone."""
    try:
        yield
    except RuntimeError as e:
        if world.ranks == 1 or not (isinstance(e, dist.DistError) or "gloo" in str(e)):
            raise
        why = "the rank that failed first says why. The same command goes on from the last checkpoint"
        raise RankLost(f"rank {world.rank} has lost the others ({first_line(e)}); {why}") from None


@contextmanager
def raise_on_all_ranks(world: World, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """If a rank raises in this block, every rank raises. Only the lowest such rank prints."""
    error: Exception | None = None
    try:
        yield
    except Exception as e:
        error = e
    if world.ranks > 1:
        first = torch.tensor(world.rank if error else world.ranks)
        dist.all_reduce(first, dist.ReduceOp.MIN, group=group)
        if first < world.ranks and group:  # of a background thread: every rank raises the lowest rank's error
            said = broadcast(describe(error) if error else "", world.ranks, int(first), group)
            error = UserError(f"rank {int(first)}: {said}")
        elif first < world.ranks and world.rank != first:
            error = UserError()
    if error:
        raise error


def broadcast(value: Any, ranks: int, source: int = 0, group: dist.ProcessGroup | None = None) -> Any:
    """A value of rank `source`, on all ranks."""
    if ranks == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, source, group=group, device=torch.device("cpu"))
    return values[0]


def mean_over_ranks(values: Tensor, world: World) -> Tensor:
    """The mean of a tensor over the ranks. The argument is overwritten with the sum."""
    if world.ranks > 1:
        dist.all_reduce(values)
    return values / world.ranks


def check_same(here: dict[str, Any], world: World, remedy: str) -> None:
    """UserError unless all ranks hold the same values; it names the first rank that differs, and the keys."""
    there = broadcast(here, world.ranks)
    different = [f"{k}: {here.get(k)} here, {there.get(k)} there" for k in there | here if here.get(k) != there.get(k)]
    with raise_on_all_ranks(world):
        if different:
            raise UserError(f"rank {world.rank} differs from rank 0 ({', '.join(different)}); {remedy}")


def check_replicas(net: torch.nn.Module, world: World, step: int) -> None:
    """UserError on all ranks unless every copy of the weights, on one rank or sharded over some, has the same bits."""
    weight = next(net.parameters())
    shards = weight.device_mesh.size(-1) if isinstance(weight, DTensor) else 1  # ranks that hold one copy
    if world.ranks == shards:
        return
    mine = torch.tensor(fingerprint(net), dtype=torch.int64)
    every = [torch.empty_like(mine) for _ in range(world.ranks)]
    dist.all_gather(every, mine)
    copies = torch.stack(every).view(-1, shards)  # (copies, shards)
    odd = (copies != copies.mode(0).values).flatten().nonzero().flatten().tolist()  # against the majority
    if odd:
        fix = "stopped, nothing saved. A device may be at fault: start again without it"
        error = f"step {step}: the weights of rank {', '.join(map(str, odd))} differ from the other copies'; {fix}"
        raise UserError(error if world.rank == 0 else "")


def fingerprint(net: torch.nn.Module) -> int:
    """A 64-bit hash of the bits of this rank's weights."""
    parts = [local_part(p.detach()).reshape(-1).view(torch.int32) for p in net.parameters()]
    total = torch.zeros((), dtype=torch.int64, device=parts[0].device)
    for bits in parts:
        for piece in bits.split(1 << 24):  # int64 copies of a little at a time
            odd = torch.arange(1, 2 * len(piece), 2, device=piece.device)
            total = total * HASH_FACTOR + (piece.long() * odd).sum()  # modulo 2^64
    return int(total)


# ---- The model on many ranks -----------------------------------------------------------------------------------------


def local_part(t: Tensor) -> Tensor:
    """This rank's part of a tensor: the rows it holds under FSDP2, else all of it."""
    return t.to_local() if isinstance(t, DTensor) else t


def full_tensor(t: Tensor) -> Tensor:
    """All of a tensor that ranks hold in parts, such as the norm of a gradient."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def local_offset(t: Tensor) -> list[int]:
    """The place in the whole tensor at which this rank's part begins."""
    if isinstance(t, DTensor):
        return list(compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)[1])
    return [0] * t.dim()


def copy_part(t: Tensor, whole: Tensor) -> None:
    """Copy the values of a whole tensor, or this rank's rows of it, into `t`."""
    part = local_part(t)
    part.copy_(whole[tuple(slice(first, first + n) for first, n in zip(local_offset(t), part.shape, strict=True))])


def shard(net: Transformer, world: World, shard_ranks: int | None) -> None:
    """Apply FSDP2 block by block, in place: one gathering of weights and one reduction of gradients a step."""
    if shard_ranks and shard_ranks < world.ranks:
        shape, names = (world.ranks // shard_ranks, shard_ranks), ("replicate", "shard")
        mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    else:
        mesh = init_device_mesh(world.device.type, (world.ranks,))
    # embedding and head stay float32, since their gradients are sums over all tokens of a batch
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
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext():
        yield


@contextmanager
def gathered_weights(net: torch.nn.Module) -> Iterator[None]:
    """All weights on all ranks: forward passes need no other rank, so ranks may run different numbers of them."""
    parts = [m for m in net.modules() if isinstance(m, FSDPModule)]
    for m in parts:
        m.unshard()
    yield
    for m in parts:
        m.reshard()
