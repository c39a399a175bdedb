"""Continuations against transformers', and the cache against whole sequences."""

import numpy as np
import pytest
import tokenizers
import torch
from helpers import small
from tokenizers import decoders, models, pre_tokenizers, processors

import model
import sample
from bench import peers
from kernels import attention
from text.tokenizer import Tokenizer


def net_of(**kw):
    torch.manual_seed(0)
    net = model.Transformer(small(context=96, **kw)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


SCALED = {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_context": 32}


@pytest.mark.parametrize("tile", [1, 32], ids=["", "as on a GPU"])
@pytest.mark.parametrize(
    "kw", [{}, {"n_kv_head": 2, "qkv_bias": True}, {"n_kv_head": 1, "tied": True, **SCALED}], ids=str
)
@torch.no_grad()
def test_the_cache_gives_the_logits_of_whole_sequences(monkeypatch, kw, tile):
    monkeypatch.setitem(attention.TILE, "cpu", tile)  # keys beyond the end, which the mask hides; from 64 on to all 90
    net = net_of(**kw)
    rows = [torch.randint(0, 61, (n,)) for n in (40, 23, 1)]  # of different lengths, read together, then token by token
    ids = torch.zeros(3, 40, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    cache, read = net.cache(3, 90), torch.tensor([40, 23, 1])
    logits = net.head(net.states(ids, cache=cache)[torch.arange(3), read - 1])
    for _ in range(50):
        for i, row in enumerate(rows):
            whole = net(row[None])[0, -1]
            # fp32 rounding of sums in another order, on logits of size about 3
            torch.testing.assert_close(logits[i], whole, rtol=1e-5, atol=1e-5)
        cache.lengths += read
        new = torch.randint(0, 61, (3, 1))
        rows = [torch.cat((row, n)) for row, n in zip(rows, new, strict=True)]
        read = torch.ones(3, dtype=torch.int64)
        logits = net.head(net.states(new, cache=cache))[:, 0]


@torch.no_grad()
def test_several_tokens_at_a_time_join_the_cache():
    net = net_of(n_kv_head=2)
    ids = torch.randint(0, 61, (2, 60))
    cache, parts = net.cache(2, 60), []
    for part in ids.split((20, 33, 7), dim=1):
        parts.append(net.head(net.states(part, cache=cache)))
        cache.lengths += part.shape[1]
    torch.testing.assert_close(torch.cat(parts, 1), net(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kw", [{}, {"n_kv_head": 2, "qkv_bias": True}], ids=str)
def test_greedy_equals_transformers_for_64_tokens(kw):
    net = net_of(**kw)
    twin = peers.hugging_face(net).eval()
    prompts = [torch.randint(0, 61, (n,)).tolist() for n in (3, 17, 32)]
    ours = sample.generate(net, prompts, 64, set())
    for prompt, found in zip(prompts, ours, strict=True):
        theirs = twin.generate(
            torch.tensor([prompt]),
            max_new_tokens=64,
            do_sample=False,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=None,
        )
        assert found == theirs[0, len(prompt) :].tolist() and len(found) == 64


def test_a_row_ends_and_does_not_depend_on_those_beside_it():
    net = net_of()
    prompts = [[1, 2, 3], [4] * 20, [5]]
    for how in ({}, {"how": sample.Sampling(1.0, 0.9)}):
        together = sample.generate(net, prompts, 30, set(), **how)
        assert [len(t) for t in together] == [30] * 3
        assert sample.generate(net, prompts[:1], 30, set(), **how) == together[:1]
        end = together[1][12]
        cut = sample.generate(net, prompts, 30, {end}, **how)
        assert cut[1] == together[1][: together[1].index(end)]  # the end itself is left out


def test_longer_than_the_context():
    net = net_of()
    (out,) = sample.generate(net, [list(range(60)) * 3], 250, set())
    assert len(out) == 250
    with torch.no_grad():  # the first is read from the last half of the context, as is the one after it is full
        window = torch.tensor([(list(range(60)) * 3)[-48:]])
        assert out[0] == net(window)[0, -1].argmax().item()
        assert out[49] == net(torch.tensor([out[1:49]]))[0, -1].argmax().item()


def sentencepiece(folder):
    """A tokenizer.json in the style of Llama 2: words begin with ▁, and a decoder drops the first space."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{b:02X}>": b + 3 for b in range(256)}}
    merges = [("▁", "T"), ("▁T", "h"), ("▁Th", "e"), ("▁", "w"), ("▁w", "a"), ("▁wa", "s")]
    for token in [*"▁abcdefghijklmnopqrstuvwxyzT", *("".join(pair) for pair in merges)]:
        vocab.setdefault(token, len(vocab))
    tok = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tok.decoder = decoders.Sequence(parts)
    tok.add_special_tokens(["<unk>", "<s>", "</s>"])
    tok.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}')
    return Tokenizer(str(folder)), tok


@pytest.fixture
def continued(monkeypatch):
    """continued(tokenizer, prompts, new ids) -> (texts, the ids that the model read)."""

    def call(tok, prompts, new):
        asked = []
        monkeypatch.setattr(sample, "load_model", lambda *a: (None, {}))
        monkeypatch.setattr(sample.resume, "open_tokenizer", lambda *a: tok)
        monkeypatch.setattr(sample, "generate", lambda net, ids, *a: asked.extend(ids) or [new] * len(ids))
        return sample.continuations(None, torch.device("cpu"), prompts, 9, sample.Sampling()), asked

    return call


def test_the_first_space_of_a_continuation_stays(tmp_path, continued):
    tok, theirs = sentencepiece(tmp_path)
    new = tok.encode("x was it")[1:]
    new = new[new.index(theirs.token_to_id("▁was")) :]
    texts, asked = continued(tok, ["The", "The whale", "", "The ", "鯨", "x\n"], new)
    assert texts == ["The was it", "The whale was it", "was it", "The  was it", "鯨 was it", "x\n was it"]
    assert asked[2] == [1] and asked[0] == [theirs.token_to_id("▁The")]  # an empty text begins with <s>
    # a byte that makes the prompt's last character invalid: the prompt stays as it was given
    assert continued(tok, ["鯨"], [3 + 0x80, *new])[0] == ["鯨\ufffd was it"]


def test_a_prompt_stays_as_given_where_its_tokens_say_less(tmp_path, continued):
    _, theirs = sentencepiece(tmp_path)
    theirs.normalizer = tokenizers.normalizers.Lowercase()
    theirs.save(str(tmp_path / "tokenizer.json"))
    tok = Tokenizer(str(tmp_path))
    new = [theirs.token_to_id("▁was")]
    assert continued(tok, ["THE Whale"], new)[0] == ["THE Whale was"]


def test_a_continuation_of_bytes_is_decoded_whole(tmp_path, continued):
    tok = Tokenizer("bytes")
    texts, asked = continued(tok, ["größer", "", "鯨"], list(" è鯨".encode()[:-1]))
    assert texts == ["größer è\ufffd", " è\ufffd", "鯨 è\ufffd"] and asked[1] == [256]
    byte = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    byte.pre_tokenizer, byte.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    byte.add_special_tokens(["<|endoftext|>"])
    byte.save(str(tmp_path / "tokenizer.json"))
    tok = Tokenizer(str(tmp_path))
    new = tok.encode("x è鯨")[1:-1]
    texts, asked = continued(tok, ["größer", "", "鯨 "], new)
    assert texts == ["größer è\ufffd", " è\ufffd", "鯨  è\ufffd"] and asked[1] == [tok.eot]


@pytest.mark.parametrize("temperature", [1e-320, 5e-324])
def test_draws_at_temperatures_whose_inverse_is_infinite(temperature):
    chance = [np.random.default_rng((2**80, i)) for i in range(3)]
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]]).repeat(3, 1)
    assert sample.draw(logits, sample.Sampling(temperature, 1e-320), chance) == [1, 1, 1]


def test_draws_follow_the_probabilities():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(20_000, 1)
    chance = [np.random.default_rng(i) for i in range(20_000)]
    # standard errors of 20,000 draws: at most 0.0036
    for temperature, top_p, expected in [
        (1.0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (1.0, 0.7, [0.625, 0.375, 0, 0]),
        (1.0, 0.01, [1, 0, 0, 0]),
        (1e-300, 1.0, [1, 0, 0, 0]),
        (1.0, 1e-300, [1, 0, 0, 0]),
        (0.5, 1.0, np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365),
        (0.0, 1.0, [1, 0, 0, 0]),
    ]:
        found = np.bincount(sample.draw(logits, sample.Sampling(temperature, top_p), chance), minlength=4) / 20_000
        np.testing.assert_allclose(found, expected, atol=0.015)
