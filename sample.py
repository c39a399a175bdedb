"""Continuations of prompts, many side by side; the keys and values of the tokens read so far are kept in a cache."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eval import load_model
from model import Transformer
from runtime import resume
from runtime.command_line import Parser
from runtime.device import pick_device
from runtime.errors import UserError, user_errors
from text.sources import clean


@dataclass(frozen=True)
class Sampling:  # how the next id is drawn
    temperature: float = 0.0  # 0: the most likely id
    top_p: float = 1.0  # draw from the likeliest ids that together have this probability (Holtzman et al. 2020)
    seed: int = 1


def draw(logits: Tensor, how: Sampling, chance: list[np.random.Generator]) -> list[int]:
    """An id for each row of logits (B, V), drawn with the row's own random generator: other rows do not matter."""
    if how.temperature == 0:
        return logits.argmax(-1).tolist()
    logits = logits.cpu().double()  # small temperatures and probabilities do not vanish; MPS has no float64
    scaled = (logits - logits.amax(-1, keepdim=True)) / max(how.temperature, 1e-300)  # 1 / it stays finite
    p, order = torch.softmax(scaled, -1).sort(descending=True, stable=True)
    edges = (p * (p.cumsum(-1) - p < how.top_p)).cumsum(-1)  # the first always stays
    u = torch.tensor([c.random() for c in chance])[:, None] * edges[:, -1:]
    at = (edges <= u).sum(-1, keepdim=True).clamp(max=logits.shape[1] - 1)
    return order.gather(1, at)[:, 0].tolist()


@torch.no_grad()
def generate(
    net: Transformer, prompts: list[list[int]], length: int, ends: set[int], how: Sampling = Sampling()
) -> list[list[int]]:
    """Up to `length` ids after each prompt of one id or more; a row ends before an id of `ends`."""
    out: list[list[int]] = [[] for _ in prompts]
    chance = [np.random.default_rng((how.seed, i)) for i in range(len(prompts))]
    device, context = net.embed.weight.device, net.config.context
    over: set[int] = set()  # rows that have ended
    while alive := [i for i in range(len(prompts)) if i not in over]:  # read them, go on until the cache is full
        rows = [prompts[i] + out[i] for i in alive]
        left = max(length - len(out[i]) for i in alive)
        longest = min(max(map(len, rows)), context - min(left, context // 2))
        rows = [row[-longest:] for row in rows]  # the context is full: up to half of it is dropped at a time
        cache = net.cache(len(rows), min(longest + left, context))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        read = torch.tensor([len(row) for row in rows], device=device)
        while not over.issuperset(alive):
            logits = net.head(net.states(ids, cache=cache)[torch.arange(len(rows), device=device), read - 1])  # (B, V)
            cache.lengths += read
            new = draw(logits, how, [chance[i] for i in alive])
            for i, token in zip(alive, new, strict=True):
                if i not in over and token not in ends:
                    out[i].append(token)
                if token in ends or len(out[i]) >= length:
                    over.add(i)
            if cache.end == cache.k.shape[2]:
                break
            ids, read = torch.tensor(new, device=device)[:, None], torch.ones_like(read)
    return out


def continuations(
    path: Path, device: torch.device, prompts: list[str], length: int, how: Sampling, folder: str | None = None
) -> list[str]:
    """Each prompt with the text of up to `length` tokens after it. `folder`: prepared data, for its tokenizer."""
    net, meta = load_model(path, device)
    tok = resume.open_tokenizer(path, meta, folder)
    prompts = [clean(p) for p in prompts]
    read = [tok.encode(p) for p in prompts]
    made = generate(net, [ids or [tok.start] for ids in read], length, {tok.eot}, how)
    texts = []
    for prompt, ids, new in zip(prompts, read, made, strict=True):
        # decoded alone, new ids may lose the space that they begin with; a new byte can make the last character invalid
        before, whole = tok.decode(ids), tok.decode(ids + new)
        texts.append(prompt + (whole[len(before) :] if whole.startswith(before) else tok.decode(new)))
    return texts


def main() -> None:
    a = Parser(prog="sample.py", description=__doc__)
    a.add_checkpoints("checkpoints")
    a.add_argument("--prompt", metavar="TEXT", action="append", required=True, help="continue this; again for more")
    a.add_argument("--length", type=int, default=100, help="tokens of a continuation [100]")
    a.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token each time [1]")
    a.add_argument("--top_p", type=float, default=1.0, help="draw from the likeliest tokens of this probability [1]")
    a.add_argument("--seed", type=int, default=1, help="of the continuations [1]")
    o = a.parse_args()
    for name, low, high in (("length", 1, 1e9), ("temperature", 0, 1e9), ("top_p", 1e-9, 1), ("seed", 0, 1e18)):
        if not low <= (got := getattr(o, name)) <= high:  # nan is refused too
            raise UserError(f"--{name}: got {got}, expected {low:g} to {high:g}")
    device, how = pick_device(o.device, 0), Sampling(o.temperature, o.top_p, o.seed)
    texts = {str(p): continuations(p, device, o.prompt, o.length, how, o.data) for p in o.path}
    shown = ["\n\n".join([f"{p}:"] * (len(texts) > 1) + written) for p, written in texts.items()]
    print(json.dumps(texts, indent=1) if o.json else "\n\n".join(shown))


if __name__ == "__main__":
    with user_errors("sample.py"):
        main()
