"""Continuations of prompts, many side by side, with the keys and values of what was read already in a cache."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

import model as llama


def draw(logits: Tensor, temperature: float, top_p: float, chance: list[np.random.Generator]) -> list[int]:
    """An id for each row of logits (B, V), with one random number of its own a row, so that the rows beside it do not matter.

    temperature 0: the most likely. top_p: only of the likeliest ids that together have this probability (Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits.argmax(-1).tolist()
    logits = (
        logits.cpu() if logits.device.type == "mps" else logits
    ).double()  # so that no temperature and no part is too small
    p, order = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, -1).sort(
        descending=True, stable=True
    )
    p = p * (p.cumsum(-1) - p < top_p)  # the first always stays
    edges = p.cumsum(-1)
    u = torch.tensor([c.random() for c in chance], device=p.device)[:, None] * edges[:, -1:]
    at = (edges <= u).sum(-1, keepdim=True).clamp(max=logits.shape[1] - 1)
    return order.gather(1, at)[:, 0].tolist()


@torch.no_grad()
def generate(
    net: llama.Transformer,
    prompts: Sequence[list[int]],
    length: int,
    ends: set[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 1,
    done: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """Up to `length` ids after each prompt, which has one at least. A row ends before an id of `ends`, or when done(row, its ids) says so.

    What does not fit the context is forgotten from the left, up to half a context at a time.
    """
    out: list[list[int]] = [[] for _ in prompts]
    chance = [np.random.default_rng((seed, i)) for i in range(len(prompts))]
    alive, device, context = list(range(len(prompts))), net.embed.weight.device, net.config.context
    while alive := [i for i in alive if len(out[i]) < length]:
        rows = [prompts[i] + out[i] for i in alive]
        left = max(length - len(out[i]) for i in alive)
        longest = max(map(len, rows))
        if longest + left > context:
            longest = min(longest, context - min(left, context // 2))
        rows = [row[-longest:] for row in rows]
        cache = net.cache(len(rows), min(longest + left, context))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        read = torch.tensor([len(row) for row in rows], device=device)
        over: set[int] = set()
        while True:
            logits = net.head(net.states(ids, cache=cache)[torch.arange(len(rows), device=device), read - 1])  # (B, V)
            cache.lengths += read
            new = draw(logits, temperature, top_p, [chance[i] for i in alive])
            for i, token in zip(alive, new, strict=True):
                if i not in over:
                    if token in ends:
                        over.add(i)
                        continue
                    out[i].append(token)
                    if len(out[i]) == length or (done and done(i, out[i])):
                        over.add(i)
            if len(over) == len(alive) or cache.end == cache.k.shape[2]:
                break
            ids, read = torch.tensor(new, device=device)[:, None], torch.ones_like(read)
        alive = [i for i in alive if i not in over]
    return out
