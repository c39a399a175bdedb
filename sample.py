"""Continuations of prompts, many side by side, with the keys and values of what was read already in a cache."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import model as llama
from eval import load_model
from runtime import resume
from runtime.command_line import Parser
from runtime.device import pick_device, steady_malloc
from runtime.errors import UserError, user_errors
from text.sources import clean


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


def continuations(
    path: Path,
    device: torch.device,
    prompts: list[str],
    length: int,
    seed: int,
    folder: str | None,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[str]:
    """Each prompt and `length` tokens drawn after it, or fewer where the text ends."""
    net, meta = load_model(path, device)
    tok = resume.open_tokenizer(path, meta, folder)
    prompts = [clean(p) for p in prompts]
    ids = [tok.encode(p) or [tok.eot] for p in prompts]
    return [
        p + tok.decode(new)
        for p, new in zip(prompts, generate(net, ids, length, {tok.eot}, temperature, top_p, seed), strict=True)
    ]


def main() -> None:
    a = Parser(prog="sample.py", description=__doc__)
    a.add_argument("path", nargs="+", help="checkpoints")
    a.add_argument(
        "--prompt", metavar="TEXT", action="append", required=True, help="continue this text; again for more"
    )
    a.add_argument("--data", help="a prepared folder [the one that the checkpoint was trained on]")
    a.add_argument("--length", type=int, default=100, help="tokens of a continuation [100]")
    a.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token each time [1]")
    a.add_argument("--top_p", type=float, default=1.0, help="draw from the likeliest tokens of this probability [1]")
    a.add_argument("--seed", type=int, default=1, help="of the continuations [1]")
    a.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    a.add_argument("--json", action="store_true")
    o = a.parse_args()
    if not 0 <= o.seed < 2**63 or o.length < 0:
        raise UserError(f"--seed, --length: got {o.seed} and {o.length}, expected 0 or more, and the seed below 2^63")
    if not 0 <= o.temperature < math.inf:
        raise UserError(f"--temperature: got {o.temperature}, expected 0 or more")
    if not 0 < o.top_p <= 1:
        raise UserError(f"--top_p: got {o.top_p}, expected above 0 and at most 1")
    device = pick_device(o.device, 0)
    steady_malloc(device)
    texts = {
        p: continuations(Path(p), device, o.prompt, o.length, o.seed, o.data, o.temperature, o.top_p) for p in o.path
    }
    if o.json:
        print(json.dumps(texts, indent=1))
    else:
        print("\n\n".join("\n\n".join([f"{p}:"] * (len(texts) > 1) + written) for p, written in texts.items()))


if __name__ == "__main__":
    with user_errors("sample.py"):
        main()
