"""Fine-tuning: what is learned from, packing, and that it is the training that unpacked examples would give."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import BASE, ROOT
from helpers import small

import data
import eval as evaluation
import model
import sample
from kernels.cross_entropy import IGNORE
from runtime import checkpoint, resume
from runtime.errors import UserError
from text import prepare
from text.examples import Examples, MixedData, SFTData, pack, prepare_examples
from text.tokenizer import Tokenizer

BYTES = Tokenizer("bytes")


def jsonl(file, records):
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(file)


def sums(n, seed=0):
    """Prompts whose answer is the letter after the last one."""
    r = np.random.default_rng(seed)
    letters = ["".join(chr(97 + i) for i in r.integers(0, 25, 4)) for _ in range(n)]
    return [{"prompt": f"{w} ->", "response": f" {chr(ord(w[-1]) + 1)}"} for w in letters]


MIXED = [
    {"prompt": "2 + 2 =", "response": " 4"},
    {
        "messages": [
            {"role": "system", "content": "Sums."},
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": "4"},
            {"role": "user", "content": "饿?"},
            {"role": "assistant", "content": "饿"},
            {"role": "user", "content": "unanswered"},
        ]
    },
    {"prompt": "", "response": "by itself"},
]


@pytest.fixture
def mixed(tmp_path):
    return Examples(prepare_examples(jsonl(tmp_path / "a.jsonl", MIXED), BYTES, tmp_path), 256, 1)


def test_loss_is_on_responses_and_nothing_else(mixed):
    """Against the text that transformers' ChatML template would write, here spelled out."""
    chat = (
        "<|im_start|>system\nSums.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
        "[4<|im_end|>]\n<|im_start|>user\n饿?<|im_end|>\n<|im_start|>assistant\n[饿<|im_end|>"
    )
    expected = ["2 + 2 =[ 4", chat, "[by itself"]
    for i, text in enumerate(expected):
        a, b = mixed.starts[i], mixed.ends[i]
        ids, loss = mixed.ids[a:b].tolist(), mixed.loss[a:b].tolist()
        assert bytes(ids[:-1]).decode() == text.replace("[", "").replace("]", "") and ids[-1] == BYTES.eot
        learned, inside = [], False
        for byte in text.encode():
            if byte in b"[]":
                inside = byte == ord("[")
            else:
                learned.append(int(inside))
        assert loss == [*learned, 1]  # <|endoftext|> is learned
    # in a row: the target of each place is the next token of its own example, where that is part of a response
    x, y, documents = mixed.rows(mixed.train)
    seen = sorted(y[y != IGNORE].tolist())
    assert seen == sorted(
        t
        for i in range(3)
        for t, m in zip(
            mixed.ids[mixed.starts[i] + 1 : mixed.ends[i]].tolist(),
            mixed.loss[mixed.starts[i] + 1 : mixed.ends[i]],
            strict=True,
        )
        if m
    )
    assert mixed.targets.tolist() == (y != IGNORE).sum(1).tolist()
    assert (
        (documents > 0).sum() == sum(mixed.ends - mixed.starts - 1)
        and (y[documents == 0] == IGNORE).all()
        and not x[documents == 0].any()
    )


def test_markers_are_tokens_where_the_tokenizer_has_them(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {c: i for i, c in enumerate(tokenizers.pre_tokenizers.ByteLevel.alphabet())}
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    tok.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    (tmp_path / "tok").mkdir()
    tok.save(str(tmp_path / "tok" / "tokenizer.json"))
    ours = Tokenizer(str(tmp_path / "tok"))
    record = json.loads(json.dumps(MIXED[1]))
    record["messages"][3]["content"] = "<|im_end|>"
    e = Examples(prepare_examples(jsonl(tmp_path / "a.jsonl", [record]), ours, tmp_path), 256, 1)
    rendered = (
        "<|im_start|>system\nSums.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
        "<|im_start|>user\n"
    )
    before = tok.encode(rendered, add_special_tokens=False).ids  # special tokens in text are special here
    assert e.ids[: len(before)].tolist() == before and before.count(257) == 4
    assert e.ids[len(before)] != 258  # what a user wrote is text
    assert ours.encode("<|im_end|>") == e.ids[len(before) : len(before) + 10].tolist() and (e.ids == 258).sum() == 5
    # the same in a folder whose tokens are not flagged special
    spec = json.loads((tmp_path / "tok" / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["special"] = False
    (tmp_path / "tok" / "tokenizer.json").write_text(json.dumps(spec))
    f = prepare_examples(str(tmp_path / "a.jsonl"), Tokenizer(str(tmp_path / "tok")), tmp_path)
    assert f != e.folder and (f / "ids.bin").read_bytes() == (e.folder / "ids.bin").read_bytes()


@pytest.mark.parametrize("room, longest, n", [(10, 10, 500), (100, 60, 2000), (128, 3, 100), (7, 7, 1), (5, 1, 0)])
def test_packing(room, longest, n):
    lengths = np.random.default_rng(0).integers(0, longest + 1, n)
    rows = pack(lengths, room)
    assert sorted(i for row in rows for i in row) == list(range(n))
    assert all(lengths[row].sum() <= room for row in rows)
    # best fit decreasing is within 11/9 of the best, which is at least the total over the room (Johnson 1974)
    assert len(rows) <= 11 / 9 * max(1, -(-lengths.sum() // room)) + 1


def test_packed_is_unpacked(tmp_path):
    """Loss and gradients of packed rows are those of the examples one by one: no example sees another."""
    r = np.random.default_rng(0)
    records = [
        {
            "prompt": "".join(map(chr, r.integers(97, 123, r.integers(0, 12)))),
            "response": "".join(map(chr, r.integers(97, 123, r.integers(1, 9)))),
        }
        for _ in range(30)
    ]
    e = Examples(prepare_examples(jsonl(tmp_path / "a.jsonl", records), BYTES, tmp_path), 64, 1)
    torch.manual_seed(0)
    net = model.Transformer(small(vocab_size=257, context=64, n_kv_head=2)).double()
    net.dtype = torch.float64  # so that any leak would stand out; in float32 the same within rounding, below

    def total(net, rows):
        x, y, documents = map(torch.from_numpy, e.rows(rows))
        loss = net(x, y, "sum", documents)
        loss.backward()
        return loss.item()

    assert max(map(len, e.train)) > 3
    packed = total(net, e.train)
    gradients = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    alone = 0.0
    for i in (i for row in e.train for i in row):
        ids = torch.tensor(e.ids[e.starts[i] : e.ends[i]].tolist())
        learned = torch.tensor(e.loss[e.starts[i] + 1 : e.ends[i]].tolist(), dtype=torch.bool)
        loss = net(
            ids[None, :-1], ids[None, 1:].masked_fill(~learned[None], IGNORE), "sum"
        )  # the usual causal attention
        loss.backward()
        alone += loss.item()
    # rotary tables are float32, so positions that differ turn pairs by angles that differ by 1e-7
    assert packed == pytest.approx(alone, rel=1e-6)
    for g, p in zip(gradients, net.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-4, atol=1e-6)
    single = model.Transformer(small(vocab_size=257, context=64, n_kv_head=2))
    single.load_state_dict({k: v.float() for k, v in net.state_dict().items()}, strict=False)
    assert total(single, e.train) == pytest.approx(packed, rel=1e-5)  # 24 bits over sums of some hundred terms


def test_an_epoch_reads_every_example_once_and_batches_are_a_function_of_the_step(tmp_path):
    e = Examples(prepare_examples(jsonl(tmp_path / "a.jsonl", sums(300)), BYTES, tmp_path), 32, 1)
    t = SFTData(e, {}, 8, 3)
    n = len(e.train)
    orders = [e.order(np.arange(n) + k * n).tolist() for k in range(3)]
    assert all(sorted(o) == list(range(n)) for o in orders) and len({tuple(o) for o in orders}) == 3
    assert sum(len(row) for row in e.train) + sum(len(row) for row in e.val) == 300 and e.val  # a fiftieth, by hash
    counted = [t.batch(s) for s in range(t.steps)]
    assert (
        sum((y != IGNORE).sum() for _, y, _ in counted)
        == 3 * e.targets.sum()
        == sum(t.targets(s) for s in range(t.steps))
    )
    for s in (0, t.steps - 1):
        parts = [t.batch(s, slice(i, i + 2)) for i in range(0, 8, 2)]
        for whole, pieces in zip(counted[s], zip(*parts, strict=True), strict=True):
            assert (whole == np.concatenate(pieces)).all()


@pytest.fixture
def parent(train_cli, tmp_path):
    assert train_cli("--mode", "main", "--version", "1") == 0 and train_cli("--mode", "branch", "--version", "1") == 0
    return tmp_path / "run" / "ours-cosine" / "v1" / "step-000010"


def weights(path):
    from safetensors.torch import load_file

    return {
        k: v
        for f in sorted(path.glob("*.safetensors"))
        for k, v in load_file(f).items()
        if k.startswith(("model.", "exp_avg"))
    }


TUNE = ("--mode", "sft", "--data.epochs", "3", "--plan.warmup", "1", "--train.batch_tokens", "256")


def test_a_fine_tuning_is_a_segment(train_cli, parent, tmp_path, capsys):
    """Fresh moments, its own steps; resumed in the same bits; in any micro-batches and on two ranks within rounding."""
    file = jsonl(tmp_path / "a.jsonl", sums(200))
    args = (*TUNE, "--parent", str(parent), "--data.sft", file)
    assert train_cli(*args, out="whole") == 0
    assert "200 examples" in capsys.readouterr().out
    end = max((tmp_path / "whole/sft/ours-cosine/v1").glob("step-*"))
    meta = checkpoint.read_meta(end)
    assert meta["finished"] and meta["version"] == 1 and meta["parent"]["hash"] == checkpoint.read_meta(parent)["hash"]
    assert meta["step"] == -(-len(Examples(next((tmp_path / "whole").glob("examples-*")), 32, 1).train) * 3 // 8)
    assert train_cli(*args, "--train.save_at", "7", out="half") == 0
    import shutil

    shutil.rmtree(tmp_path / "half/sft/ours-cosine/v1" / end.name)
    assert train_cli(*args, out="half") == 0
    a, b = weights(end), weights(tmp_path / "half/sft/ours-cosine/v1" / end.name)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert train_cli(*args, "--train.micro_batch", "1", out="small") == 0
    c = weights(tmp_path / "small/sft/ours-cosine/v1" / end.name)
    ranks = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "train.py",
        "--config",
        "tiny",
        *BASE,
        *args,
        "--out",
    ]
    subprocess.run(
        [*ranks, str(tmp_path / "two"), "--data.path", str(checkpoint.read_meta(parent)["config"]["data.path"])],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    d = weights(tmp_path / "two/sft/ours-cosine/v1" / end.name)
    for other in (c, d):
        for k in a:
            if k.startswith(
                "model"
            ):  # the mean is over the batch's targets, however they are spread; sums in another order
                torch.testing.assert_close(a[k], other[k], rtol=1e-3, atol=1e-5)
    capsys.readouterr()
    # what changes the examples, or starts from elsewhere, is another fine-tuning
    other = jsonl(tmp_path / "b.jsonl", sums(200, 1))
    for changed, words in (
        ((*TUNE, "--parent", str(parent), "--data.sft", other), "examples of the data: "),
        (
            (*TUNE, "--parent", str(parent), "--data.sft", file, "--data.epochs", "4"),
            "epochs of the data: 3 there, 4 here",
        ),
        (
            (*TUNE[:-1], "512", "--parent", str(parent), "--data.sft", file),
            "train.batch_tokens: 256 there, 512 here",
        ),  # a shorter one
        ((*TUNE, "--parent", str(parent.parents[2] / "main" / "step-000004"), "--data.sft", file), None),
        ((*TUNE, "--parent", str(end), "--data.sft", file), None),
    ):
        code = train_cli(*changed, out="whole")
        assert code == (2 if words else 0)
        assert not words or words in capsys.readouterr().err
    assert (tmp_path / "whole/sft/sft/ours-cosine/v1").exists()


def test_its_place_is_the_parents_run(train_cli, parent, tmp_path, monkeypatch):
    """Also where the parent is named from inside its folder."""
    import train

    file = jsonl(tmp_path / "a.jsonl", sums(40))
    monkeypatch.chdir(parent.parent)
    args = ["--mode", "sft", "--parent", parent.name, "--data.sft", file]
    monkeypatch.setattr(sys, "argv", ["train.py", *args, "--train.batch_tokens", "256", "--plan.warmup", "1"])
    train.main()
    (end,) = (tmp_path / "run/sft/ours-cosine/v1").glob("step-*")
    settings = checkpoint.read_meta(end)["config"]
    assert settings["model.hidden"] == 16 and settings["plan.max_lr"] == 2e-5
    assert resume.finished(tmp_path / "run")["sft/ours-cosine"] == {1: end}
    assert not (parent.parent / "out").exists()


def test_a_task_is_learned(train_cli, tmp_path):
    """Letters after letters, from 2,000 examples: prompts that were never seen are answered."""
    bigger = "--model.hidden 64 --model.n_layer 2 --train.batch_tokens 512 --train.micro_batch 16".split()
    bigger += "--plan.max_lr 3e-3 --train.weight_decay 0".split()
    assert train_cli("--mode", "ptfs", "--version", "1", *bigger) == 0
    start = tmp_path / "run/ptfs-cosine/v1/step-000010"
    tune = ("--mode", "sft", "--parent", str(start), "--data.sft", jsonl(tmp_path / "a.jsonl", sums(2000)))
    assert train_cli(*tune, "--data.epochs", "8", *bigger, "--plan.warmup", "10") == 0
    end = max((tmp_path / "run/sft/ptfs-cosine/v1").glob("step-*"))
    unseen = [s for s in sums(400, seed=9) if s not in sums(2000)]
    assert len(unseen) > 300

    def right(path):
        net, _ = evaluation.load_model(path, torch.device("cpu"))
        answers = sample.generate(net, [BYTES.encode(s["prompt"]) for s in unseen], 5, {BYTES.eot})
        return np.mean([BYTES.decode(a) == s["response"] for a, s in zip(answers, unseen, strict=True)])

    assert right(start) == 0 and right(end) > 0.9


def test_examples_in_the_decay_of_a_branch(train_cli, tmp_path, capsys):
    """data.decay_mix: the last rows of a batch are examples, the others the text that the plain branch reads."""
    assert train_cli("--mode", "main", "--version", "1") == 0
    file = jsonl(tmp_path / "a.jsonl", sums(100))
    mix = ("--mode", "branch", "--version", "1", "--data.sft", file, "--data.decay_mix", "0.25")
    assert train_cli(*mix) == 0 and train_cli("--mode", "branch", "--version", "1") == 0
    plain, mixed = (tmp_path / "run" / name / "v1" / "step-000010" for name in ("ours-cosine", "ours-cosine-mix0.25"))
    meta = checkpoint.read_meta(mixed)
    assert meta["parent"] == checkpoint.read_meta(plain)["parent"] and meta["data"]["mix"] == 0.25
    assert not torch.equal(weights(plain)["model.embed.weight"], weights(mixed)["model.embed.weight"])
    tokens = MixedData(meta["config"]["data.path"], 32, 8, [10] * 4, 1)
    plain = data.Tokens(meta["config"]["data.path"], 32, 8, [10] * 4, 1)
    text = [plain.batch(s) for s in range(4, 10)]
    e = Examples(next((tmp_path / "run").glob("examples-*")), 32, 1)
    tokens.mix(e, 0.25, 4)
    for s in range(4, 10):
        x, y, documents = tokens.batch(s)
        assert (x[:6] == text[s - 4][0][:6]).all() and (y[:6] == text[s - 4][1][:6]).all() and not documents[:6].any()
        expected = e.rows([e.train[i] for i in e.order(np.arange(2) + 2 * (s - 4))])
        assert all((got[6:] == want).all() for got, want in zip((x, y, documents), expected, strict=True))
        assert tokens.targets(s) == 6 * 32 + (expected[1] != IGNORE).sum() == (y != IGNORE).sum()
        halves = [tokens.batch(s, slice(i, i + 4)) for i in (0, 4)]
        assert (np.concatenate([h[1] for h in halves]) == y).all()
    capsys.readouterr()
    for args, words in (
        ((*mix[:4], "--data.decay_mix", "0.25"), "data.decay_mix: needs examples"),
        (
            (*mix[:6], "--data.decay_mix", "0.01"),
            "data.decay_mix: got 0.01 of 8 sequences, expected 0.125 to 0.875",
        ),
        ((*mix[:6], "--data.decay_mix", "1"), "expected 0 or more and below 1"),
        (
            (*mix[:4], "--data.sft", jsonl(tmp_path / "b.jsonl", sums(100, 2)), *mix[6:]),
            "examples of the data: ",
        ),
    ):
        assert train_cli(*args) == 2
        assert words in (err := capsys.readouterr().err) and len(err.splitlines()) == 1, err


GOOD = json.dumps(MIXED[0]) + "\n"


@pytest.mark.parametrize(
    "text, words",
    [
        (GOOD + "{\n", "a.jsonl:2: got '{': Expecting property name"),
        (GOOD + "\n" + '{"prompt": "x"}\n', "a.jsonl:3: got"),
        ('{"prompt": "x", "response": ""}\n', "a.jsonl:1: got"),
        ('{"prompt": 1, "response": "a"}\n', "a.jsonl:1: got"),
        ("[]\n", "a.jsonl:1: got"),
        ("[" * 100_000 + "\n", "a.jsonl:1: got"),
        ('{"messages": []}\n', "a.jsonl:1: got"),
        ('{"messages": ["hello"]}\n', "a.jsonl:1: got"),
        ('{"messages": [{"role": "robot", "content": "a"}]}\n', "role 'robot'"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}\n', "role 'user' and content ['a']"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "no message of the assistant"),
        (
            GOOD + '{"messages": [{"role": "user", "content": "<|im_end|>\\n<|im_start|>assistant"}, '
            '{"role": "assistant", "content": "a"}]}\n',
            'a.jsonl:2: got \'{"messages": [{"role": "user", "content": "<|im_end|>',
        ),
        (
            '{"messages": [{"role": "assistant", "content": "a<|im_start|>"}]}\n',
            "<|im_start|> or <|im_end|> in a message, which this tokenizer cannot tell from a marker",
        ),
        ("\n", "holds no example"),
    ],
)
def test_lines_that_are_no_examples(tmp_path, text, words):
    (tmp_path / "a.jsonl").write_text(text)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as e:
        prepare_examples(str(tmp_path / "a.jsonl"), BYTES, tmp_path / "new" / "run")
    assert words in str(e.value) and len(str(e.value).splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_odd_examples(tmp_path):
    """Half a surrogate pair is a question mark. So few that all would be held out are not. Too long is refused."""

    def packed(record, context=32):
        return Examples(prepare_examples(jsonl(tmp_path / "a.jsonl", [record]), BYTES, tmp_path), context, 1)

    e = packed({"prompt": "a", "response": "\ud800"})
    assert bytes(e.ids[:-1].tolist()) == b"a?" and e.targets.tolist() == [2]
    numbers = (i for i in range(999) if prepare.hashes(f"{i}x")[0] < 2**64 / 50)
    e = packed({"prompt": str(next(numbers)), "response": "x"})
    assert np.fromfile(e.folder / "held.bin", "u1").tolist() == [1] and len(e.train) == 1 and not e.val
    with pytest.raises(UserError, match="no example in it fits model.context = 32"):
        packed({"prompt": "2" * 40, "response": "x"})


def test_the_files_that_are_read_and_left_out(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    jsonl(tmp_path / "data" / "a.JSONL", sums(20))
    jsonl(tmp_path / "data" / "b.json", sums(20, 1))
    (tmp_path / "data" / "README").touch()
    folder = prepare_examples(str(tmp_path / "data"), BYTES, tmp_path)
    assert Examples(folder, 32, 1).meta["examples"] == 40
    assert capsys.readouterr().out == f"{str(tmp_path / 'data')!r}: left out 1 without ending\n"
    (tmp_path / "notes.jsonl.txt").write_text("text")
    with pytest.raises(UserError, match="data.sft .*has nothing to read: 1 .txt; expected .jsonl, .ndjson, .json"):
        prepare_examples(str(tmp_path / "notes.jsonl.txt"), BYTES, tmp_path)


def test_what_is_refused(train_cli, parent, tmp_path, capsys, monkeypatch):
    file = jsonl(tmp_path / "a.jsonl", sums(40))
    (tmp_path / "a.txt").write_text("text")
    capsys.readouterr()
    for args, words in [
        (("--data.sft", file), "expects --parent CHECKPOINT"),
        (("--parent", str(tmp_path), "--data.sft", file), "is no checkpoint"),
        (("--parent", str(parent)), "and --data.sft FILE.jsonl"),
        (("--parent", str(parent), "--data.sft", str(tmp_path / "nowhere.jsonl")), "nowhere.jsonl': there is no file"),
        (
            ("--parent", str(parent), "--data.sft", str(tmp_path / "a.txt")),
            "has nothing to read: 1 .txt; expected .jsonl",
        ),
        (
            ("--parent", str(parent), "--data.sft", file, "--model.n_layer", "2"),
            "model.n_layer: got 2, but ",
        ),
        (
            ("--parent", str(parent), "--data.sft", file, "--model.context", "64"),
            "model.context: got 64, expected at most the 32",
        ),
        (
            ("--parent", str(parent), "--data.sft", file, "--version", "2"),
            "--version: got 2, expected 1 to 9999, and none with --mode sft",
        ),
        (
            ("--parent", str(parent), "--data.sft", file, "--plan.warmup", "-1"),
            "plan.warmup: got -1, expected 0 or more",
        ),
        (("--parent", str(parent), "--data.sft", file, "--data.path", str(tmp_path)), "no prepared data"),
    ]:
        assert train_cli(*TUNE, *args, out="bad") == 2
        err = capsys.readouterr().err
        assert words in err and len(err.splitlines()) == 1, err
    assert not (tmp_path / "bad" / "sft").exists()
    folder = prepare_examples(file, BYTES, tmp_path)
    assert prepare_examples(file, BYTES, tmp_path) == folder  # once
    for name in (
        "ids.bin",
        "loss.bin",
        "ends.bin",
        "held.bin",
        "meta.json",
    ):  # a byte that changed, and a file that is gone
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{name}: damaged"):
            prepare_examples(file, BYTES, tmp_path)
        (folder / name).unlink()
        with pytest.raises(UserError, match=f"{name}: damaged"):
            prepare_examples(file, BYTES, tmp_path)
        (folder / name).write_bytes(whole)
    assert (
        prepare.TEXT.exists()
        and train_cli(*TUNE, "--parent", str(parent), "--data.sft", file, "--dry_run", out="dry") == 0
    )
    assert "40 examples" in capsys.readouterr().out and not (tmp_path / "dry").exists()
