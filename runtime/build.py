"""The model of a run on its device, and its optimizer."""

from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from config import Config, Train
from kernels import check
from model import Transformer
from runtime import checkpoint, distributed
from runtime.device import activations, tune_cpu
from runtime.distributed import World, raise_on_all_ranks
from runtime.start import Start


def build(c: Config, start: Start, kind: str, world: World) -> tuple[Transformer, torch.nn.Module, torch.optim.AdamW]:
    """(the weights, the module to call, AdamW): float32 weights, activations in train.dtype."""
    t, device = c.train, world.device
    dtype = activations(t.dtype, device)
    bf16 = dtype == torch.bfloat16
    torch.set_float32_matmul_precision("high" if bf16 else "highest")  # with bf16, fp32 products may be TF32
    tune_cpu(device, c.model.parameters)
    torch.manual_seed(t.seed)
    with torch.device("meta"):  # no memory yet: a rank may hold a part of each weight
        net = Transformer(c.model, dtype, check.choose(t.kernels, c.model, dtype, device), t.recompute)
    if compiles(c, device):
        torch._dynamo.config.optimize_ddp = False  # it would cut a block's graph at DDP's buckets
        torch._dynamo.config.recompile_limit = 32  # training, validation, and its last batches
        # All blocks share their graphs, and FSDP2's work between them stays outside. A graph of the whole model would
        # return all gradients at once, before any is added to those of earlier micro-batches, and would add the
        # embedding's rows in any order
        for block in net.blocks:
            block.compile(dynamic=False)  # a shorter last batch of a validation must not change the graph of training
    if kind == "fsdp":
        distributed.shard(net, world, t.shard_ranks)
    net.allocate(device)
    optimizer = adamw(net, t)
    if start.origin:
        with raise_on_all_ranks(world):
            checkpoint.load(Path(start.origin), checkpoint.state(net, None if start.weights_only else optimizer))
    else:
        net.initialize(distributed.copy_part)
    if bf16 and kind != "fsdp":  # FSDP2 keeps such copies itself
        net.cast_weights()
        optimizer.register_step_post_hook(lambda *_: net.cast_weights())
    if kind == "ddp":
        ids = [device] if device.type == "cuda" else None
        return net, DistributedDataParallel(net, ids, gradient_as_bucket_view=True), optimizer
    return net, net, optimizer


def adamw(net: torch.nn.Module, t: Train) -> torch.optim.AdamW:
    """The optimizer of a model, with decay on matrices only."""
    matrices = [w for w in net.parameters() if w.dim() >= 2]
    vectors = [w for w in net.parameters() if w.dim() < 2]
    groups = [{"params": matrices, "weight_decay": t.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(t.beta1, t.beta2), fused=True)


def compiles(c: Config, device: torch.device) -> bool:
    return c.train.compile == "on" or (c.train.compile == "auto" and device.type == "cuda")
