"""Released models in, ours out: logits against transformers', weights bit for bit, tiktoken's ids, refusals."""

import functools
import json
import lzma
import os
import pickle
import random
import shlex
import shutil
import sys

import numpy as np
import pytest
import tiktoken
import tokenizers
import torch
import transformers
from helpers import cl100k_cache
from safetensors.torch import load_file, save_file
from test_train import tensors
from tiktoken_ext import openai_public

import config
import eval
import model
import sample
import train
from runtime import checkpoint, distributed, resume
from runtime.errors import UserError, user_errors
from runtime.files import read_json, write_json
from text import prepare, token_files
from text.examples import Examples, SFTData, prepare_examples
from text.tokenizer import Tokenizer
from tools import huggingface

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 24}
YARN2 = {**YARN, "factor": 2.0, "beta_fast": 6.0, "beta_slow": 0.5, "original_max_position_embeddings": 48}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}
DEFAULT = {"rope_type": "default", "rope_theta": 777.0}


def released(folder, kind="Llama", dtype=torch.float32, shard=None, rows=301, **kw):
    """A random model as transformers saves it, with the tokenizer `bytes` of 257 ids: the other rows are padding."""
    settings = {
        "vocab_size": rows,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
        "rms_norm_eps": 1e-5,
        **kw,
    }
    torch.manual_seed(1)
    net = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))  # so that norms, biases and depth all matter
    net.to(dtype).save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    (folder / "tokenizer.json").write_text(json.dumps(huggingface.to_tokenizer_json(Tokenizer("bytes"))))
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    )  # a net that was cast has angles that were cast


def edit(folder, **changes):
    file = folder / "config.json"
    settings = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in settings.items() if v != "gone"}))


@torch.no_grad()
def check_logits(net, twin):
    """At all positions up to the context, where stretched angles differ.

    fp32 rounding over two blocks of sums of at most 44 terms, on logits of size about 3: 1e-5 is 30 units in the last
    place.
    """
    ids = torch.randint(0, net.config.vocab_size, (3, net.config.context))
    expected = twin(input_ids=ids).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(net(ids), expected, rtol=1e-5, atol=1e-5)


CASES = [
    ("Llama", {}),
    ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    ("Llama", {"rope_parameters": LINEAR}),
    ("Llama", {"rope_parameters": YARN, "rows": 259, "intermediate_size": 128}),
    ("Qwen2", {"rope_parameters": YARN2, "num_key_value_heads": 1}),
    ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": DEFAULT, "shard": "10KB"}),
    ("Llama", {"dtype": torch.bfloat16, "rope_parameters": LLAMA3}),
    ("Qwen2", {"dtype": torch.float16, "shard": "10KB"}),
]


@pytest.mark.parametrize("kind, kw", CASES, ids=str)
def test_there_and_back(kind, kw, tmp_path):
    twin = released(tmp_path / "hf", kind, **kw)
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() == ("shard" in kw)
    made = huggingface.import_model(str(tmp_path / "hf"), str(tmp_path / "out" / "x"))
    net, meta = eval.load_model(made, torch.device("cpu"))
    check_logits(net, twin)
    assert (meta["segment"], meta["step"], meta["finished"], meta["pinned"], meta["tokens"]) == (
        resume.IMPORT,
        0,
        True,
        True,
        0,
    )
    c = config.load(str(tmp_path / "out" / "x" / "model.toml"))  # what train.py takes
    assert c.model == net.config and distributed.batch_problems(c, 1) == []
    resume.check_model(made, meta, c, Tokenizer(str(tmp_path / "hf")).sha256)

    out = huggingface.export_model(str(made), str(tmp_path / "back"))
    theirs, original = load_file(out / "model.safetensors"), twin.state_dict()
    assert theirs.keys() == original.keys() - ({"lm_head.weight"} if net.config.tied else set())
    assert all(t.dtype == torch.float32 and torch.equal(t, original[name]) for name, t in theirs.items())  # bit for bit
    check_logits(net, transformers.AutoModelForCausalLM.from_pretrained(out))
    again = huggingface.import_model(str(out), str(tmp_path / "out" / "y"))
    first, second = tensors(made), tensors(again)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    new = checkpoint.read_meta(again)
    assert new["data"] == meta["data"]
    assert {k: v for k, v in new["config"].items() if k.startswith("model.")} == {
        k: v for k, v in meta["config"].items() if k.startswith("model.")
    }
    assert sorted(p.name for p in tmp_path.rglob("*") if p.name.endswith(".partial")) == []


def test_the_older_spelling_is_read(tmp_path):
    twin = released(tmp_path / "hf", rope_parameters=LLAMA3)
    old = {("type" if k == "rope_type" else k): v for k, v in LLAMA3.items() if k != "rope_theta"}
    edit(tmp_path / "hf", rope_parameters="gone", rope_theta=500, rope_scaling=old, head_dim=None)
    check_logits(
        eval.load_model(huggingface.import_model(str(tmp_path / "hf"), str(tmp_path / "x")), torch.device("cpu"))[0],
        twin,
    )


def test_a_tied_head_may_be_there_and_old_angles_too(tmp_path):
    released(tmp_path / "hf", tie_word_embeddings=True)
    file = tmp_path / "hf" / "model.safetensors"
    w = load_file(file)
    save_file(
        {
            **w,
            "lm_head.weight": w["model.embed_tokens.weight"].clone(),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        },
        file,
    )
    assert "model.head.weight" not in tensors(huggingface.import_model(str(tmp_path / "hf"), str(tmp_path / "x")))


# ----------------------------------------------------------------------------------------------------------
# Tokenizers

HARD = [
    "",
    " ",
    "\n",
    "鲸鱼在海里。",
    "中文 English 混合123",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈",
    "e\u0301\u0302a\u0308 café",
    "a\r\n\r\n b\n\r\t\v\f c",
    "  \n  \n\n   x  ",
    "1234567890 12 3,456.78",
    "I'LL WE'VE DON'T it's I'M they'Re 'S 'ſ",
    "a\0b\0\0",
    "<|endoftext|> <|im_start|>user",
    "مرحبا שלום नमस्ते ไทย",
    "\u00a0\u2003\u2028x\u0085",
    "ǅ ß İ ŉ",
    *(c * n for c in " =-a\n\t*🙂" for n in (1, 7, 64, 81, 128, 257, 1000)),
    "ab" * 3000,
]


@pytest.fixture(scope="module")
def data_of(tmp_path_factory):
    """data_of(tokenizer) -> a small prepared folder in its tokens."""

    @functools.cache
    def make(tokenizer):
        folder = tmp_path_factory.mktemp("data")
        text = "".join(json.dumps({"text": f"text {i} of a few words"}) + "\n" for i in range(40))
        (folder / "a.jsonl").write_text(text)
        out = str(folder / "data")
        prepare.prepare(out, [str(folder / "a.jsonl")], tokenizer, [1.0], val=0.3, jobs=1)
        return out

    return make


def byte_level(folder, special, merges=(), before=None):
    """Write a byte-level tokenizer.json with special tokens and merges of two letters; `before` begins each text."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, list(merges)))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    tok.add_special_tokens(special)
    if before:
        ids = [(before, tok.token_to_id(before))]
        tok.post_processor = tokenizers.processors.TemplateProcessing(f"{before} $A", special_tokens=ids)
    folder.mkdir(exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    return str(folder)


def checkpoint_of(folder, tokenizer, data, noise=0.0, seen=None, **kw):
    """A checkpoint of random weights with this tokenizer; `seen`: what it records of its data."""
    tok = Tokenizer(tokenizer)
    c = config.Config(model=config.Model(n_layer=1, n_head=2, hidden=8, vocab_size=tok.vocab_size, context=96, **kw))
    c.data.path = data
    torch.manual_seed(1)
    net = model.Transformer(c.model).eval()
    with torch.no_grad():
        for p in net.parameters() if noise else ():
            p.add_(noise * torch.randn_like(p))
    record = {
        "segment": "main",
        "version": 1,
        "path": {},
        "finished": True,
        "pinned": True,
        "parent": None,
        "tokens": 0,
        "config": config.values(c),
        "data": {"tokenizer": tok.sha256, "increments": [], **(seen or {})},
    }
    (folder / "main").mkdir()
    checkpoint.save(folder / "main", 0, checkpoint.state(net), record)
    return folder / "main" / "step-000000", tok, net


def corpus():
    with lzma.open(prepare.TEXT, "rt") as f:
        return [json.loads(line)["text"] for line in f]


def hard_texts():
    """The beginning of every book, and texts made to be hard."""
    r = random.Random(0)
    made_up = [
        "".join(r.choices(letters, k=r.randint(1, 60)))
        for letters in ("ab", " \n", " =-", "aA's", "中文 ", "\r\n \t", "0 1a")
        for _ in range(100)
    ]
    return [text[:3000] for text in corpus()] + HARD + made_up


@pytest.mark.parametrize("name", ["gpt2", "o200k_base"])
def test_the_patterns_of_other_encodings(name, monkeypatch):
    """As tiktoken has them, over ranks that are here: its own come from the network."""
    tok = Tokenizer(str(prepare.RANKS))
    ranks = tok.encoding._mergeable_ranks
    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(openai_public, loader, lambda *a, **kw: ranks)
    pattern = getattr(openai_public, name)()["pat_str"]
    assert pattern != tok.encoding._pat_str
    tok.encoding = tiktoken.Encoding(
        name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}
    )
    made = tokenizers.Tokenizer.from_str(json.dumps(huggingface.to_tokenizer_json(tok)))
    made.encode_special_tokens = True
    texts = hard_texts()
    assert [e.ids for e in made.encode_batch(texts)] == tok.encode_many(texts)


@pytest.mark.parametrize("name", ["bytes", str(prepare.RANKS), "cl100k_base"])
def test_an_exported_tokenizer_gives_the_same_ids(name, tmp_path, monkeypatch, data_of):
    if name == "cl100k_base":
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cl100k_cache(tmp_path / "cache")))
    made, tok, _ = checkpoint_of(tmp_path, name, data_of(name))
    out = huggingface.export_model(str(made), str(tmp_path / "hf"))
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    theirs.backend_tokenizer.encode_special_tokens = (
        True  # text that looks like a special token is text, as it is for us
    )
    texts = hard_texts()
    assert any("\u4e00" <= c <= "\u9fff" for t in texts for c in t)
    for many in (texts[i : i + 100] for i in range(0, len(texts), 100)):
        expected = tok.encode_many(many)
        found = [e.ids for e in theirs.backend_tokenizer.encode_batch(many)]
        assert found == expected
        assert [theirs.decode(i, clean_up_tokenization_spaces=False) for i in found] == many
    assert theirs(HARD[4]).input_ids == tok.encode(HARD[4])
    assert theirs.eos_token_id == tok.eot and theirs.convert_tokens_to_ids("<|endoftext|>") == tok.eot
    assert theirs.chat_template is None and theirs.bos_token is None  # this model has seen no message
    back = Tokenizer(str(out))  # and is ours again: the same prepared data goes on
    assert (back.sha256, back.vocab_size, back.eot) == (tok.sha256, tok.vocab_size, tok.eot)
    assert (
        checkpoint.read_meta(huggingface.import_model(str(out), str(tmp_path / "x")))["data"]["tokenizer"] == tok.sha256
    )


@pytest.mark.parametrize(
    "kw",
    [
        {},
        {
            "qkv_bias": True,
            "tied": True,
            "rope_scaling": "yarn",
            "rope_factor": 4.0,
            "rope_context": 24,
            "rope_high": 32.0,
        },
    ],
    ids=str,
)
def test_greedy_equals_transformers_on_the_exported_folder(kw, tmp_path, data_of):
    made, tok, net = checkpoint_of(tmp_path, str(prepare.RANKS), data_of(str(prepare.RANKS)), **kw)
    out = huggingface.export_model(str(made), str(tmp_path / "hf"))
    twin, theirs = (
        transformers.AutoModelForCausalLM.from_pretrained(out),
        transformers.AutoTokenizer.from_pretrained(out),
    )
    assert type(twin).__name__ == ("Qwen2ForCausalLM" if kw else "LlamaForCausalLM")
    check = torch.randint(0, tok.vocab_size, (2, 96))
    with torch.no_grad():
        torch.testing.assert_close(net(check), twin(check).logits, rtol=1e-5, atol=1e-5)
    prompt = theirs("The whale", return_tensors="pt").input_ids
    (ours,) = sample.generate(net, prompt.tolist(), 64, set())
    found = twin.generate(prompt, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert found[0, prompt.shape[1] :].tolist() == ours and len(ours) == 64


def test_a_pattern_that_cannot_be_exported_is_found(tmp_path, monkeypatch, data_of):
    made, _, _ = checkpoint_of(tmp_path, str(prepare.RANKS), data_of(str(prepare.RANKS)))
    monkeypatch.setattr(huggingface, "plain_pattern", lambda p: p.replace(r"\p{N}{1,3}", r"\p{N}"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="gives other ids for 'The whale, 1234567"):
        huggingface.export_model(str(made), str(tmp_path / "hf"))
    assert sorted(tmp_path.rglob("*")) == before


# ----------------------------------------------------------------------------------------------------------
# Chat templates

TALK = [
    {"role": "system", "content": "Sums."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "\n\nAnd abab?"},  # a token can span two newlines
    {"role": "assistant", "content": "c"},
]
TALKS, PAIRS = [{"prompt": "a", "response": "b"}, {"messages": TALK}], [{"prompt": "2 + 2 =", "response": " 4"}]
END, MARKERS = "<|endoftext|>", ["<|im_start|>", "<|im_end|>"]


def tuned(folder, tok, records, parent=None):
    """The data of a fine-tuning on these examples."""
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    e = Examples(prepare_examples(str(folder / "a.jsonl"), tok, folder), 512, 1)
    return SFTData(e, parent or {}, 1, 1)


def base_files(folder, special):
    """A tokenizer with a template of its own, in both places where transformers looks for one."""
    named = byte_level(folder, special, [("a", "b"), ("Ċ", "Ċ")], "<s>")
    settings = {"bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": END, "chat_template": "old"}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8-sig")  # with a BOM
    (folder / "chat_template.jinja").write_text("older still")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 300, "temperature": 0.6}))
    return named


def tokenizer_named(name, folder, data_of):
    """(name of a tokenizer, a folder with it) for `bytes`, the shipped ranks, and imported ones."""
    if name.startswith("base"):
        return (base_files(folder, [END, "<s>", *(MARKERS if name == "base" else [])]),) * 2
    return name, data_of(name)


@pytest.mark.parametrize("name", ["bytes", str(prepare.RANKS), "base", "base without markers"])
def test_the_exported_template_writes_the_tokens_of_training(name, tmp_path, data_of):
    name, data = tokenizer_named(name, tmp_path / "tok", data_of)
    sft = tuned(tmp_path / "sft", Tokenizer(name), TALKS)
    made, tok, _ = checkpoint_of(tmp_path, name, data, seen=sft.identity(1))
    out = huggingface.export_model(str(made), str(tmp_path / "hf"))
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    trained = sft.examples.ids[sft.examples.starts[1] :].tolist()
    learned = sft.examples.loss[sft.examples.starts[1] :].tolist()
    assert trained.pop() == tok.eot and any(learned)
    asked = theirs.apply_chat_template(TALK[:-1], add_generation_prompt=True, return_dict=False)
    # up to the last answer, of which transformers knows nothing yet
    answer = len(trained) - learned[:-1][::-1].index(0)
    assert asked == trained[:answer]
    whole = theirs.apply_chat_template(TALK, return_dict=False)
    assert whole == trained + tok.encode("\n")
    message = tok.hf.token_to_id("<|im_end|>") if tok.hf else None
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert generation.eos_token_id == [tok.eot, *([] if message is None else [message])]
    if tok.is_folder:  # the rest is as it came
        assert (theirs.bos_token, theirs.padding_side, generation.temperature) == ("<s>", "left", 0.6)


@pytest.mark.parametrize("name", ["bytes", "base"])
@pytest.mark.parametrize("seen", [{}, {"examples": "1", "epochs": 1, "chat": False}, {"examples": "1", "epochs": 1}])
def test_a_template_that_was_not_trained_is_not_exported(name, seen, tmp_path, data_of):
    name, data = tokenizer_named(name, tmp_path / "tok", data_of)
    made, tok, _ = checkpoint_of(tmp_path, name, data, seen=seen)
    out = huggingface.export_model(str(made), str(tmp_path / "hf"))
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    older = "examples" in seen and "chat" not in seen  # of a checkpoint made before this was recorded
    generation = json.loads((out / "generation_config.json").read_text())
    if tok.is_folder:
        assert theirs.chat_template == "older still"
        assert generation == {"eos_token_id": 300, "temperature": 0.6}
        settings = json.loads((tmp_path / "tok" / "tokenizer_config.json").read_text(encoding="utf-8-sig"))
        assert json.loads((out / "tokenizer_config.json").read_text()) == settings
    else:
        assert theirs.chat_template == (huggingface.CHATML if older else None)
        assert generation["eos_token_id"] in (tok.eot, [tok.eot])


def test_a_fine_tuning_of_a_fine_tuning_keeps_what_its_parent_saw(tmp_path):
    tok, chats = Tokenizer("bytes"), {}
    older = {"examples": "1", "epochs": 1}
    for i, (records, parent) in enumerate(
        (r, p) for r in (TALKS, PAIRS) for p in ({}, {**older, "chat": True}, {**older, "chat": False}, older)
    ):
        sft = tuned(tmp_path / str(i), tok, records, parent)
        chats[i] = sft.identity(1)["chat"]
        if i == 4:  # examples prepared before this was recorded
            del sft.examples.meta["chat"]
            assert sft.identity(1)["chat"] is None
    assert list(chats.values()) == [True] * 4 + [False, True, False, None]


# ----------------------------------------------------------------------------------------------------------
# Training


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A folder with an imported model in x/, and a.jsonl in its tokens in data/."""
    home = tmp_path_factory.mktemp("qwen")
    released(home / "hf", "Qwen2", tie_word_embeddings=True)
    huggingface.import_model(str(home / "hf"), str(home / "x"))
    pieces = [t[i : i + 400] for t in corpus()[:40] for i in range(0, len(t), 400)]
    (home / "a.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in pieces))
    meta = prepare.prepare(
        str(home / "data"), [str(home / "a.jsonl")], str(home / "x" / "tokenizer"), [1.0, 1.0], jobs=1
    )
    assert (meta["vocab_size"], meta["eot"]) == (301, 256)  # the padding rows are the model's vocabulary, too
    return home


@pytest.fixture
def imported(qwen, tmp_path, monkeypatch):
    """(run(*flags, out=) -> exit code of train.py, the imported checkpoint, the prepared data of this test)."""
    made, folder = checkpoint.path(qwen / "x" / "import", 0), tmp_path / "data"
    shutil.copytree(qwen / "data", folder)
    torch.set_num_threads(1)

    def run(*flags, out="run"):
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "train.py",
                "--config",
                str(qwen / "x" / "model.toml"),
                "--model.context",
                "32",
                "--train.batch_tokens",
                "128",
                "--plan.steps",
                "6",
                "--plan.versions",
                "2",
                "--plan.warmup",
                "2",
                "--train.eval_every",
                "0",
                "--train.eval_tokens",
                "320",
                "--train.device",
                "cpu",
                "--data.path",
                str(folder),
                "--out",
                str(tmp_path / out),
                *flags,
            ],
        )
        try:
            train.main()
        except SystemExit as e:
            return e.code
        return 0

    return run, made, folder


def test_an_imported_model_is_trained_on_by_every_mode(imported, tmp_path, capsys):
    run, made, folder = imported
    parent = ("--parent", str(made))
    record = {"segment": "import", "step": 0, "hash": checkpoint.read_meta(made)["hash"]}
    assert run("--mode", "main", "--dry_run") == 0 and f"from {made}" in capsys.readouterr().out
    assert run("--mode", "main") == 0  # train.base of model.toml
    main = tmp_path / "run" / "main"
    assert checkpoint.read_meta(checkpoint.path(main, 8))["parent"] == record  # the fork point of version 2
    assert run("--mode", "branch", "--version", "2") == 0  # from that main path
    assert run("--mode", "branch", "--version", "1", *parent, out="alone") == 0
    assert run("--mode", "cpt", "--version", "2", *parent, out="cpt") == 0
    ends = [tmp_path / p for p in ("run/ours-cosine/v2", "alone/ours-cosine/v1", "cpt/cpt-cosine/v2")]
    last = [checkpoint.path(p, checkpoint.steps(p)[-1]) for p in ends]
    assert checkpoint.read_meta(last[0])["parent"]["segment"] == "main" and all(
        checkpoint.read_meta(p)["parent"] == record for p in last[1:]
    )
    assert checkpoint.read_meta(last[0])["data"]["tokenizer"] == checkpoint.read_meta(made)["data"]["tokenizer"]

    # Resumed, and not from another one
    assert run("--mode", "main") == 0 and "nothing to do" in capsys.readouterr().out
    released(tmp_path / "hf2", "Qwen2", tie_word_embeddings=True)
    w = load_file(tmp_path / "hf2" / "model.safetensors")
    save_file({k: v + 1e-3 for k, v in w.items()}, tmp_path / "hf2" / "model.safetensors", {"format": "pt"})
    other = huggingface.import_model(str(tmp_path / "hf2"), str(tmp_path / "y"))
    assert (
        run("--mode", "main", "--train.base", str(other)) == 2 and "was begun from another" in capsys.readouterr().err
    )

    # Perplexity and samples of both
    more = "".join(json.dumps({"text": t}) + "\n" for t in corpus()[40:80])
    (tmp_path / "more.jsonl").write_text(more)
    prepare.add(str(folder), [str(tmp_path / "more.jsonl")], jobs=1)
    assert token_files.read_meta(folder)["increments"][2]["documents"] > 30
    before = eval.score(made, torch.device("cpu"), eval.Text(str(folder))).ppl
    assert eval.score(last[0], torch.device("cpu")).ppl < before
    for path in (made, last[0]):
        assert sample.continuations(path, torch.device("cpu"), ["The whale"], 5, sample.Sampling())[0].startswith(
            "The whale"
        )
    out = huggingface.export_model(str(last[0]), str(tmp_path / "back"))
    settings = json.loads((out / "config.json").read_text())
    assert (
        settings["max_position_embeddings"] == 32
        and settings["pathswitch"]["segment"] == "ours-cosine/v2"
        and settings["bos_token_id"] is None
    )
    check_logits(
        eval.load_model(last[0], torch.device("cpu"))[0], transformers.AutoModelForCausalLM.from_pretrained(out)
    )


def test_messages_in_training_are_recorded_and_older_checkpoints_go_on(imported, tmp_path, capsys):
    run, made, _ = imported
    for name, records in (("talks", TALKS * 20), ("pairs", PAIRS * 20)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    talks, pairs = (("--data.sft", str(tmp_path / f"{name}.jsonl")) for name in ("talks", "pairs"))
    long = ("--model.context", "96", "--train.batch_tokens", "192")
    mix = ("--mode", "branch", "--version", "1", "--parent", str(made), "--data.decay_mix", "0.5", *long)
    assert run(*mix, *talks, out="mix") == 0 and run(*mix, *pairs, out="plain") == 0
    last = [sorted((tmp_path / out / "ours-cosine-mix0.5" / "v1").glob("step-*"))[-1] for out in ("mix", "plain")]
    assert [checkpoint.read_meta(p)["data"]["chat"] for p in last] == [True, False]
    tune = ("--mode", "sft", "--parent", str(last[0]), *pairs, *long, "--train.save_at", "2", "--data.epochs", "2")
    assert run(*tune, out="sft") == 0
    ends = sorted((tmp_path / "sft").glob("sft/**/step-*"))
    metas = [checkpoint.read_meta(p) for p in ends]
    assert [m["data"]["chat"] for m in metas] == [True] * len(ends)
    out = huggingface.export_model(str(ends[-1]), str(tmp_path / "hf"))
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == huggingface.CHATML

    # As made before: the key is nowhere
    for p, meta in zip(ends, metas, strict=True):
        old = {k: v for k, v in meta["data"].items() if k != "chat"}
        write_json(p / "meta.json", {**meta, "data": old})
    (folder,) = (tmp_path / "sft").glob("examples-*")
    write_json(folder / "meta.json", {k: v for k, v in read_json(folder / "meta.json").items() if k != "chat"})
    capsys.readouterr()
    assert run(*tune, out="sft") == 0 and "nothing to do" in capsys.readouterr().out
    shutil.rmtree(ends[-1])
    assert run(*tune, out="sft") == 0 and checkpoint.read_meta(ends[-1])["finished"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--model.ffn", "48"), "is another model (model.ffn: 44 there, 48 here)"),
        (("--model.rope_theta", "5"), "is another model (model.rope_theta: 10000.0 there, 5.0 here)"),
        (("--model.context", "128"), "model.context: got 128, expected at most the 96"),
        (
            ("--model.vocab_size", "257", "--data.path", "{prepared}"),
            "is another model (model.vocab_size: 301 there, 257 here)",
        ),
    ],
)
def test_what_disagrees_with_the_imported_model_is_refused(imported, prepared, tmp_path, capsys, flags, words):
    run, _, _ = imported
    assert run("--mode", "main", *(f.replace("{prepared}", str(prepared)) for f in flags)) == 2
    assert words in capsys.readouterr().err and not list((tmp_path / "run").glob("*/step-*"))


def test_another_tokenizer_than_the_imported_model_s_is_refused(prepared, tmp_path, monkeypatch, capsys):
    released(tmp_path / "hf", rows=257)
    huggingface.import_model(str(tmp_path / "hf"), str(tmp_path / "x"))
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "train.py",
            "--config",
            str(tmp_path / "x" / "model.toml"),
            "--model.context",
            "32",
            "--train.batch_tokens",
            "128",
            "--plan.steps",
            "6",
            "--plan.warmup",
            "2",
            "--data.path",
            str(prepared),
        ],
    )
    with pytest.raises(SystemExit) as e:
        train.main()
    assert e.value.code == 2 and "has another tokenizer than data.path" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------
# Refusals


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A released model, to be copied and damaged."""
    released(folder := tmp_path_factory.mktemp("plain") / "hf")
    return folder


def weights(**changes):
    """Tensors changed, added (a tensor), or taken away (None)."""

    def change(folder):
        w = load_file(file := folder / "model.safetensors")
        w |= {name.replace("__", "."): t for name, t in changes.items()}
        save_file({n: t for n, t in w.items() if t is not None}, file, {"format": "pt"})

    return change


def files(first=lambda names: names[:5], second=lambda names: names[5:]):
    """The tensors in two files, these in each."""

    def change(folder):
        w = load_file(folder / "model.safetensors")
        os.remove(folder / "model.safetensors")
        for i, names in enumerate((first(sorted(w)), second(sorted(w)))):
            save_file({n: w[n] for n in names}, folder / f"m-{i}.safetensors")

    return change


def keys(**changes):
    return lambda folder: edit(folder, **changes)


def pickled(folder):
    os.remove(folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def put(name, content):
    return lambda folder: (folder / name).write_bytes(content)


NORM, DOWN = "model__norm__weight", "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda f: os.remove(f / "config.json"),
            "config.json: is not there; expected a folder that save_pretrained made",
        ),
        (put("config.json", b"{"), "config.json: is not JSON"),
        (put("config.json", b"[1]"), "config.json: got '[1]', expected a JSON object"),
        (put("config.json", b"[" * 100000), "config.json: is not JSON"),
        (
            keys(architectures=["MistralForCausalLM"]),
            "architectures: got ['MistralForCausalLM'], expected one of LlamaForCausalLM, Qwen2ForCausalLM",
        ),
        (keys(architectures=[[]]), "architectures: got [[]]"),
        (keys(architectures="gone"), "architectures: got None"),
        (keys(model_type="mistral"), "model_type: got 'mistral', expected llama"),
        (keys(hidden_size="32"), "hidden_size: got '32', expected a whole number"),
        (keys(num_hidden_layers=True), "num_hidden_layers: got True, expected a whole number"),
        (keys(hidden_size="gone"), "hidden_size: got None, expected a whole number"),
        (keys(num_attention_heads=0), "model.n_head: got 0"),
        (keys(num_key_value_heads=3), "model.n_kv_head: got 3, expected a divisor"),
        (keys(rms_norm_eps=None, max_position_embeddings=1 << 40), "model.context: got"),
        (keys(num_hidden_layers=10**12), "num_hidden_layers: got 1,000,000,000,000, but the files hold 21 tensors"),
        (keys(vocab_size=10**15), "model.embed_tokens.weight has shape (301, 32), expected (1000000000000000, 32)"),
        (keys(hidden_size=1 << 40, head_dim=1 << 38), "model.context: got 96"),
        (keys(head_dim=16), "head_dim: got 16, expected hidden_size / num_attention_heads = 8"),
        (keys(attention_bias=True), "attention_bias: got True, expected False"),
        (keys(mlp_bias=True), "mlp_bias: got True, expected False"),
        (keys(hidden_act="gelu"), "hidden_act: got 'gelu', expected 'silu'"),
        (keys(use_sliding_window=True), "use_sliding_window: got True"),
        (keys(layer_types=["full_attention", "sliding_attention"]), "layer_types: got"),
        (keys(quantization_config={"bits": 4}), "quantization_config: got {'bits': 4}"),
        (keys(partial_rotary_factor=0.5), "partial_rotary_factor: got 0.5"),
        (keys(auto_map={"AutoModel": "evil.Model"}), "auto_map: got"),
        (keys(tie_word_embeddings=1), "tie_word_embeddings: got 1, expected true or false"),
        (
            keys(rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
            "rope_parameters.rope_type: got 'dynamic', expected one of default, linear, llama3, yarn",
        ),
        (keys(rope_parameters="gone", rope_scaling={"type": "longrope"}), "rope_scaling.rope_type: got 'longrope'"),
        (keys(rope_parameters="gone", rope_scaling={"type": ["yarn"]}), "rope_scaling.rope_type: got ['yarn']"),
        (keys(rope_parameters=7), "rope_parameters: got 7"),
        (keys(rope_parameters={"full_attention": {"rope_type": "default"}}), "rope_parameters: got"),
        (keys(rope_parameters={"rope_theta": -1.0}), "model.rope_theta: got -1.0"),
        (keys(rope_parameters={"rope_theta": float("nan")}), "rope_parameters.rope_theta: got nan"),
        (keys(rope_parameters={"rope_type": "linear"}), "rope_parameters.factor: got None, expected a number"),
        (keys(rope_parameters={**LLAMA3, "mix": 1}), "rope_parameters.mix: got 1, expected it not to be there"),
        (keys(rope_parameters={**LLAMA3, "low_freq_factor": 4.0}), "model.rope_low: got 4.0, expected below"),
        (
            keys(rope_parameters={**LLAMA3, "partial_rotary_factor": 0.5}),
            "rope_parameters.partial_rotary_factor: got 0.5",
        ),
        (keys(rope_parameters={**YARN, "factor": float("nan")}), "rope_parameters.factor: got nan, expected a number"),
        (keys(rope_parameters={**YARN, "beta_fast": 1e308}), "model.rope_high: got 1e+308, expected at most 1e9"),
        (keys(rope_parameters={**YARN, "rope_theta": 1.0}), "model.rope_theta: got 1.0, expected above 1 for yarn"),
        (
            keys(rope_parameters={**YARN, "attention_factor": 1.5}),
            "rope_parameters.attention_factor: got 1.5, expected 0.1 ln(factor) + 1 = 1.13863",
        ),
        (keys(rope_parameters={**YARN, "mscale": 1.0}), "rope_parameters.mscale: got 1.0"),
        (keys(rope_parameters={**YARN, "truncate": False}), "rope_parameters.truncate: got False, expected true"),
        (
            keys(rope_parameters={k: v for k, v in YARN.items() if "orig" not in k}),
            "rope_parameters.original_max_position_embeddings: got None",
        ),
        (pickled, "pickled weights are not read"),
        (lambda f: os.remove(f / "model.safetensors"), "has no .safetensors file"),
        (lambda f: os.truncate(f / "model.safetensors", 999), "model.safetensors: is no safetensors file"),
        (weights(**{DOWN: None}), f"{DOWN} is missing; expected the 21 tensors"),
        (weights(lm_head__weight=None), "lm_head.weight is missing"),
        (weights(**{NORM: torch.ones(31)}), "model.norm.weight has shape (31,), expected (32,)"),
        (weights(**{NORM: torch.ones(2, 16)}), "model.norm.weight has shape (2, 16), expected (32,)"),
        (
            weights(**{NORM: torch.ones(32, dtype=torch.float64)}),
            "model.norm.weight: got F64, expected one of F32, BF16, F16",
        ),
        (weights(**{NORM: torch.full((32,), torch.inf)}), "model.norm.weight holds values that are not finite"),
        (weights(extra__lora_A=torch.ones(3)), "extra.lora_A is no part of a model that is served"),
        (lambda f: edit(f, tie_word_embeddings=True), "lm_head.weight is not model.embed_tokens.weight"),
        (files(second=lambda names: names[6:]), "is missing; expected the 21 tensors"),
        (files(second=lambda names: names[4:]), "m-0.safetensors too; remove one of them"),
        (lambda f: os.remove(f / "tokenizer.json"), "tokenizer.json: is not there; make it"),
        (put("tokenizer.json", b"{}"), "tokenizer.json: is no tokenizer of Hugging Face"),
        (lambda f: released(f, rows=200), "tokenizer.json: has ids to 256, expected below the 200 rows of the model"),
    ],
)
def test_what_cannot_be_imported_is_refused_by_name(tmp_path, monkeypatch, capsys, plain, change, words):
    shutil.copytree(plain, tmp_path / "hf")
    change(tmp_path / "hf")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(
        sys, "argv", ["huggingface", "import", str(tmp_path / "hf"), "--out", str(tmp_path / "out" / "x")]
    )
    capsys.readouterr()
    with pytest.raises(SystemExit) as e, user_errors("huggingface"):
        huggingface.main()
    said = capsys.readouterr().err
    assert (
        e.value.code == 2
        and words in said
        and len(said.strip().splitlines()) == 1
        and said.startswith("huggingface: error: ")
    ), said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_byte_order_mark_and_several_files_are_read(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "hf")
    files()(tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    marked = huggingface.import_model(str(tmp_path / "hf"), str(tmp_path / "x"))
    bare = huggingface.import_model(str(plain), str(tmp_path / "y"))
    assert all(torch.equal(w, tensors(bare)[k]) for k, w in tensors(marked).items())


@pytest.mark.parametrize("name", ["a b $c 'd'", "two\nlines"])
def test_names_are_quoted_in_the_config_of_an_import(plain, tmp_path, name):
    out = tmp_path / name
    huggingface.import_model(str(plain), str(out))
    assert config.load(str(out / "model.toml")).out == str(out)
    comment = next(line for line in (out / "model.toml").read_text().splitlines() if "--tokenizer" in line)
    assert shlex.split(comment.partition("--tokenizer")[2])[0] == str(out / "tokenizer").replace("\n", " ")


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(tmp_path, second_save_fails, data_of, plain):
    shutil.copytree(plain, tmp_path / "hf")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there: is there already and is never overwritten"):
        huggingface.import_model(str(tmp_path / "hf"), str(tmp_path / "there"))
    with pytest.raises(UserError, match="config.json: is not there; expected a folder"):
        huggingface.import_model(str(tmp_path / "nowhere"), str(tmp_path / "x"))
    made = huggingface.import_model(str(tmp_path / "hf"), str(tmp_path / "x"))
    with pytest.raises(OSError, match="No space left"):
        huggingface.import_model(str(tmp_path / "hf"), str(tmp_path / "y"))
    with pytest.raises(UserError, match="there: is there already"):
        huggingface.export_model(str(made), str(tmp_path / "there"))
    with pytest.raises(UserError, match="is no checkpoint"):
        huggingface.export_model(str(tmp_path / "hf"), str(tmp_path / "z"))
    with pytest.raises(UserError, match="was trained with another tokenizer"):
        huggingface.export_model(str(made), str(tmp_path / "z"), data_of(str(prepare.RANKS)))
    shard = next(made.glob("*.safetensors"))
    shard.write_bytes(bytes(np.frombuffer(shard.read_bytes(), np.uint8)[::-1]))
    with pytest.raises(UserError, match="its bytes have changed"):
        huggingface.export_model(str(made), str(tmp_path / "z"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "there", "x"]
