"""Downstream tasks: our adapter of the harness beside transformers, with the same weights on the same batch, in turn.

A question and each of its four answers fill the context. Answers take an eighth of it, or one token, where both sides
read the question once for all four. Written answers are half a context after a quarter, by `generate` on both sides.
"""

import statistics
import timeit
from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any

import torch
from tqdm import tqdm

import config
import model as llama
from bench import peers
from bench.disk import documents
from bench.measure import Row
from kernels import check
from runtime.errors import UserError
from sample import generate
from text import prepare
from text.sources import optional
from text.tokenizer import Tokenizer

BATCH = 16
# Nats a token by which two sides may differ: 1e-4 is fp32's rounding many times over. bf16 has 8 bits: transformers'
# log-probabilities near -11 are multiples of 1/16, and a sum of many has a relative error of 1/256, 0.05 a token. Other
# weights change an answer of one token by some 0.5: that is the spread of logits where the weights are random.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.15}

Request = tuple[list[int], list[int]]  # ids of a question and of an answer
Calls = dict[str, tuple[Callable[[], list], Callable[[], list]]]  # {name: (ours, theirs)}


def run(o: Any, c: config.Config, device: torch.device, dtype: torch.dtype) -> Row:
    optional("transformers", "transformers", "bench eval")
    from tools import harness  # it needs the package lm-eval, which the other benchmarks do not

    tokenizer, T, rounds = Tokenizer(str(prepare.RANKS)), c.model.context, o.rounds or 5
    if c.model.vocab_size < tokenizer.vocab_size or T < 32:
        got, least = f"got {c.model.vocab_size} and {T}", f"expected {tokenizer.vocab_size} or more"
        raise UserError(f"model.vocab_size, model.context: {got}, {least}, the ids of the tokenizer, and 32 or more")
    with device:
        net = llama.Transformer(c.model, dtype, check.choose(c.train.kernels, c.model, dtype, device)).eval()
        peer = peers.hugging_face(c.model, net).to(device, dtype).eval()
    for w in net.parameters():  # once, as eval.py does
        w.data = w.data.to(dtype if w.dim() == 2 else w.dtype)
    ids = tokenizer.encode("".join(documents(20e-6 * BATCH * T)))
    questions, a = [ids[i * T : (i + 1) * T] for i in range(BATCH)], T // 8
    asked = {
        "four answers each": [(q[:-a], ids[k : k + a]) for q in questions for k in range(0, 4 * a, a)],
        "four answers of a token": [(q[:-1], [k]) for q in questions for k in range(4)],
    }
    prompts, new = [q[: T // 4] for q in questions], T // 2
    lm = harness.LM(net, tokenizer, BATCH)
    calls: Calls = {}
    for name, x in asked.items():
        own = partial(lm._loglikelihood_tokens, [(None, *request) for request in x])
        calls[name] = own, partial(their_nats, peer, x, device)
    calls["written answers"] = partial(generate, net, prompts, new, set()), partial(written, peer, prompts, new, device)
    tokens = {name: sum(len(q) + len(a) - 1 for q, a in x) for name, x in asked.items()}
    tokens["written answers"] = BATCH * new
    rows = list[Row]()
    for name, (ours, theirs) in tqdm(calls.items(), desc="eval", disable=None):
        mine, other = ours(), theirs()  # the first calls, which warm up
        if name in asked:
            gaps = [abs(x - y) / len(a) for (x, _), y, (_, a) in zip(mine, other, asked[name], strict=True)]
        else:  # the likeliest id may be another by rounding, and so all after it
            gaps = [shortfall(peer, p, new_ids, device) for p, new_ids in zip(prompts, mine, strict=True)]
        if not all(gap <= ROUNDING[dtype] for gap in gaps):  # nan too
            found = f"{name}: ours and transformers differ by {max(gaps):.2g} nats a token"
            raise UserError(f"bench eval: {found}, expected {ROUNDING[dtype]} or less; there is nothing to compare")
        # a call makes a list, so a device has ended its work
        pairs = [(timeit.timeit(ours, number=1), timeit.timeit(theirs, number=1)) for _ in range(rounds)]
        speed, peers_speed = (tokens[name] / statistics.median(times) for times in zip(*pairs, strict=True))
        rows.append(Row(row=f"ours: {name}", tokens_per_second=speed, ratio=speed / peers_speed, to="transformers"))
        rows.append(Row(row=f"transformers: {name}", tokens_per_second=peers_speed))
    print(f"{BATCH} rows of {T}; tokens are counted once an answer, of written answers the new ones")
    return {"batch": BATCH, "rounds": rounds, "rows": rows}


@torch.no_grad()
def their_nats(peer: Any, requests: list[Request], device: torch.device) -> list[float]:
    """Nats of each answer by transformers. Answers of one token to the same question share a row."""
    rows = [(ids, list(same)) for ids, same in groupby(requests, lambda request: request[0] + request[1][:-1])]
    nats = []
    for k in range(0, len(rows), BATCH):
        part = rows[k : k + BATCH]
        logp = peer(torch.tensor([ids for ids, _ in part], device=device)).logits.log_softmax(-1)
        for row, (_, same) in zip(logp, part, strict=True):
            for _, answer in same:
                target = torch.tensor(answer, device=device)
                nats.append(row[-len(target) :].gather(1, target[:, None]).sum().item())
    return nats


@torch.no_grad()
def shortfall(peer: Any, prompt: list[int], answer: list[int], device: torch.device) -> float:
    """Nats by which transformers finds an id of the answer less likely than the likeliest one: the largest."""
    logits = peer(torch.tensor([prompt + answer], device=device)).logits[0, len(prompt) - 1 : -1].float()
    return (logits.amax(-1) - logits.gather(1, torch.tensor(answer, device=device)[:, None])[:, 0]).max().item()


def written(peer: Any, prompts: list[list[int]], new: int, device: torch.device) -> list[list[int]]:
    """`new` ids after each prompt, by transformers."""
    peer.generation_config.eos_token_id = None  # to `generate` too every id is like any other
    how = {"max_new_tokens": new, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    return peer.generate(torch.tensor(prompts, device=device), **how)[:, len(prompts[0]) :].tolist()
