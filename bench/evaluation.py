"""Downstream tasks: our adapter of the harness beside transformers, with the same weights on the same batch, in turn.

A question and each of its four answers fill the context. Answers take an eighth of it, or one token, where the question is read once for
all four. Written answers are half a context after a quarter. transformers is called as the harness's own adapter calls it, which
also reads such a question once: all logits of a row, and `generate`.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import config
import kernels
import model as llama
from bench import data, peers
from bench.report import Row, show, table, verdict
from runtime.errors import UserError
from sample import generate
from text import prepare
from text.sources import optional
from text.tokenizer import Tokenizer
from tools import harness

BATCH = 16
WRITTEN = "written answers"

Request = tuple[list[int], list[int]]  # ids of a question and of an answer


def run(o: Any, c: config.Config, device: torch.device, dtype: torch.dtype) -> Row:
    optional("transformers", "transformers", "bench eval")
    tokenizer, T, rounds = Tokenizer(str(prepare.RANKS)), c.model.context, o.rounds or 5
    if c.model.vocab_size < tokenizer.vocab_size or T < 32:
        raise UserError(
            f"model.vocab_size, model.context: got {c.model.vocab_size} and {T}, expected {tokenizer.vocab_size} or more, "
            f"the ids of {prepare.RANKS.name}, and 32 or more"
        )
    with device:
        net = llama.Transformer(c.model, dtype, kernels.choose(c.train.kernels, device)).eval()
        peer = peers.hugging_face(c.model, net).to(device, dtype).eval()
    asked, prompts = questions(tokenizer.encode(data.corpus()[: 20 * BATCH * T]), T)
    lm = harness.LM(net, tokenizer, BATCH)

    def ours(requests: list[Request]) -> list[float]:
        return [nats for nats, _ in lm._loglikelihood_tokens([(None, *request) for request in requests])]

    calls: dict[str, dict[str, Callable[[], list]]] = {
        name: {"ours": partial(ours, x), "transformers": partial(log_likelihoods, peer, x, device)}
        for name, x in asked.items()
    }
    calls[WRITTEN] = {
        "ours": partial(generate, net, prompts, T // 2, set()),
        "transformers": partial(write, peer, torch.tensor(prompts, device=device), T // 2),
    }
    tokens = {name: sum(len(q) + len(a) - 1 for q, a in x) for name, x in asked.items()} | {WRITTEN: BATCH * (T // 2)}
    seconds = measure(calls, rounds, tolerance=1e-3 if dtype == torch.float32 else 0.05)
    rows, bars = [], []
    for name in calls:
        speed = {who: tokens[name] / statistics.median(seconds[name, who]) for who in calls[name]}
        ratio = speed["ours"] / speed["transformers"]
        bar = verdict(name, ratio, 1.0)
        beside = {"ours": {"ratio": ratio, "to": "transformers", "bar": show(bar)}, "transformers": {}}
        rows += [{"row": f"{name}: {who}", "tokens_per_second": v} | beside[who] for who, v in speed.items()]
        bars += bar
    print(f"{BATCH} rows of {T}; tokens are counted once an answer, of written answers the new ones")
    table(rows)
    return {"batch": BATCH, "rounds": rounds, "rows": rows, "bars": bars}


def questions(ids: list[int], T: int) -> tuple[dict[str, list[Request]], list[list[int]]]:
    """{kind: a batch of questions with four answers each}, and prompts to be continued."""
    a, rows = T // 8, [ids[i * T : (i + 1) * T] for i in range(BATCH)]
    asked = {
        "four answers each": [(row[:-a], ids[k : k + a]) for row in rows for k in range(0, 4 * a, a)],
        "four answers of a token": [(row[:-1], [k]) for row in rows for k in range(4)],
    }
    return asked, [row[: T // 4] for row in rows]


@torch.no_grad()
def log_likelihoods(peer: Any, requests: list[Request], device: torch.device) -> list[float]:
    """Nats of each answer by transformers. Answers of one token to the same question share a row."""
    out = [0.0] * len(requests)
    read: dict[tuple[int, ...], list[int]] = {}  # {row: requests}
    for i, (question, answer) in enumerate(requests):
        read.setdefault((*question, *answer[:-1]), []).append(i)
    for k in range(0, len(read), BATCH):
        part = list(read)[k : k + BATCH]
        logp = peer(torch.tensor(part, device=device)).logits.log_softmax(-1)
        for row, key in zip(logp, part, strict=True):
            for i in read[key]:
                target = torch.tensor(requests[i][1], device=device)
                out[i] = row[-len(target) :].gather(1, target[:, None]).sum().item()
    return out


def write(peer: Any, prompts: torch.Tensor, new: int) -> list[list[int]]:
    """`new` ids after each prompt by transformers."""
    lengths = {"max_new_tokens": new, "min_new_tokens": new}
    made = peer.generate(prompts, **lengths, do_sample=False, use_cache=True, pad_token_id=0)
    return made[:, prompts.shape[1] :].tolist()


def measure(
    calls: dict[str, dict[str, Callable[[], list]]], rounds: int, tolerance: float
) -> dict[tuple[str, str], list[float]]:
    """{(kind, side): seconds of each round}, after one round that warms up. UserError if the two sides disagree."""
    seconds: dict[tuple[str, str], list[float]] = {(name, who): [] for name, sides in calls.items() for who in sides}
    for i in tqdm(range(rounds + 1), desc="eval", disable=None):
        for name, sides in calls.items():
            found = {}
            for who, call in sides.items():
                began = time.perf_counter()
                found[who] = np.array(call(), dtype=np.float64)  # made of a list, so a device has ended its work
                seconds[name, who] += [time.perf_counter() - began] if i else []
            if not np.allclose(found["ours"], found["transformers"], rtol=tolerance):
                raise UserError(f"bench eval: {name}: ours and transformers disagree, so there is nothing to compare")
    return seconds
