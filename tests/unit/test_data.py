"""prepare, add, verify, vocab and batch: nothing lost, nothing twice, the same everywhere; refusals."""

import glob
import gzip
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import tokenizers
from backports import zstd
from conftest import ROOT
from helpers import cl100k_cache

import data
from runtime.errors import UserError
from runtime.files import lock, write_json
from text import prepare, sources, token_files
from text.tokenizer import Tokenizer
from tools import huggingface


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
    return prepare.prepare(str(folder), sources, tokenizer, jobs=1, **kw)


def command(*args):
    """data.py with these arguments, in this process."""
    prepare.main([str(a) for a in args])


def listing(folder):
    """Every path below a folder, hidden ones too, and the content of files."""
    return {p: p.read_bytes() if p.is_file() else None for p in [folder, *folder.rglob("*")]}


def flip(file, at=100):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


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
    two = prepare.prepare(str(tmp_path / "two"), [str(tmp_path / "many")], "bytes", jobs=2)
    three = make(tmp_path / "three", [str(tmp_path / "many" / "*.jsonl.gz"), str(tmp_path / "many" / "y.jsonl.xz")])
    assert one["increments"] == two["increments"] == three["increments"] and one["val"] == two["val"] == three["val"]


def test_unequal_increments_and_weights(tmp_path):
    """The texts are fixed, so the bounds, of 3 standard deviations, are no chance. Repeated texts count once."""
    a, b = write(tmp_path / "a.jsonl", some_documents(600, 1) * 3), write(tmp_path / "b.jsonl", some_documents(600, 2))
    meta = make(tmp_path / "d", [a, b], increments=[1, 3], weights=[3, 1], val=0.1)
    kept = [d for part in parts(tmp_path / "d") for d in read(tmp_path / "d", part)]
    size = {s: sum(len(d.encode()) + 1 for d in kept if f" {s}-" in d) for s in (1, 2)}
    # all 600 of a, about 200 of b (standard deviation 11.5)
    assert sum(" 1-" in d for d in kept) == 600 and 2.5 < size[1] / size[2] < 3.7
    assert 2 < meta["increments"][1]["tokens"] / meta["increments"][0]["tokens"] < 4.5


def test_add_appends_only_what_is_new(tmp_path, capsys):
    docs = some_documents(300)
    folder = tmp_path / "d"
    make(folder, [write(tmp_path / "a.jsonl", docs)], increments=[1, 1])
    before = {f.name: f.read_bytes() for f in folder.iterdir() if f.name != "meta.json"}
    new = some_documents(50, 7)
    prepare.add(str(folder), [write(tmp_path / "b.jsonl", docs[:120] + new + new[:5])], jobs=1)
    assert "125 duplicates" in capsys.readouterr().out
    assert sorted(read(folder, "v3")) == sorted(new)
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    token_files.check_files(folder, quiet=True)
    before = listing(tmp_path)
    with pytest.raises(UserError, match="has no new document, 175 known ones"):
        prepare.add(str(folder), [str(tmp_path / "b.jsonl")], jobs=1)
    assert listing(tmp_path) == before and folder / "v3.ids" in before


def test_drop_undoes_the_last_add_and_nothing_else(copy, monkeypatch, capsys):
    monkeypatch.chdir(copy.parent)  # without an out/
    content = {f.name: f.read_bytes() for f in copy.iterdir() if f.is_file()}
    first, second = (write(copy.parent / f"{s}.jsonl", some_documents(50, s)) for s in (3, 4))
    prepare.add(str(copy), [first], jobs=1)
    one = {f.name: f.read_bytes() for f in copy.iterdir() if f.is_file()}
    prepare.add(str(copy), [second], jobs=1)
    for expected in (one, content):
        prepare.main(["drop", "--last", "--out", str(copy)])
        assert {f.name: f.read_bytes() for f in copy.iterdir() if f.is_file()} == expected
    for args in (["--last"], []):  # those of `prepare` stay, and which one is meant must be said
        with pytest.raises(SystemExit):
            prepare.main(["drop", *args, "--out", str(copy)])
    assert "nothing was added to it" in (said := capsys.readouterr().err) and "required: --last" in said
    prepare.add(str(copy), [first], jobs=1)
    assert {f.name: f.read_bytes() for f in copy.iterdir() if f.is_file()} == one  # bit for bit


def test_drop_killed_in_the_middle_leaves_a_usable_folder(copy, monkeypatch):
    monkeypatch.chdir(copy.parent)
    first, second = (write(copy.parent / f"{s}.jsonl", some_documents(50, s)) for s in (3, 4))
    prepare.add(str(copy), [first], jobs=1)
    real = Path.unlink

    def killed(path, **kw):
        if path.suffix in (".bin", ".ids"):
            raise KeyboardInterrupt
        real(path, **kw)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare.drop(str(copy))
    monkeypatch.undo()
    assert parts(copy) == ["val", "v1", "v2", "v3", "v4"] and (copy / "v5.bin").exists()
    token_files.check_files(copy, quiet=True)
    prepare.add(str(copy), [second], jobs=1)
    token_files.check_files(copy, quiet=True)
    assert sorted(read(copy, "v5")) == sorted(some_documents(50, 4))


def test_an_increment_that_a_run_was_trained_on_is_not_dropped(copy, monkeypatch):
    monkeypatch.chdir(copy.parent)
    prepare.add(str(copy), [write(copy.parent / "a.jsonl", some_documents(50, 3))], jobs=1)
    seen = [p["sha256"]["bin"] for p in token_files.read_meta(copy)["increments"]]
    for name, increments in (("main/step-000005", seen[:4]), ("ours-cosine/v5/step-000009", seen)):
        folder = copy.parent / "out" / "run" / name
        folder.mkdir(parents=True)
        write_json(folder / "meta.json", {"data": {"increments": increments}})
    with pytest.raises(UserError, match="out/run/ours-cosine/v5/step-000009 was trained on v5"):
        prepare.drop(str(copy))
    assert len(parts(copy)) == 6
    shutil.move(copy.parent / "out" / "run", copy.parent / "scratch")
    (copy.parent / "out" / "run").symlink_to(copy.parent / "scratch")  # a run on another disk
    with pytest.raises(UserError, match="out/run/ours-cosine/v5/step-000009 was trained on v5"):
        prepare.drop(str(copy))
    shutil.rmtree(copy.parent / "scratch" / "ours-cosine")
    prepare.drop(str(copy))
    assert len(parts(copy)) == 5


def test_one_process_at_a_time_makes_or_extends_a_folder(copy):
    """Under any of its names. A refusal leaves the lock of the other process alone."""
    source = write(copy.parent / "a.jsonl", some_documents(50))
    (copy.parent / "link").symlink_to(copy)
    for folder, attempt in ((copy, prepare.add), (copy.parent / "d", make)):
        with lock(folder.with_name(f".{folder.name}.lock"), "busy"):
            before = listing(copy.parent)
            for name in (folder, copy.parent / "link") if folder == copy else (folder,):
                with pytest.raises(UserError, match="another process is"):
                    attempt(str(name), [source])
            assert listing(copy.parent) == before


def test_an_increment_added_just_before_the_lock_is_not_overwritten(copy, monkeypatch):
    """Another add finishes between the start of this one and its lock."""
    first, second = (write(copy.parent / f"{s}.jsonl", some_documents(50, s)) for s in (3, 4))
    real = prepare.lock

    def late(*args, **kw):
        monkeypatch.setattr(prepare, "lock", real)
        prepare.add(str(copy), [first], jobs=1)
        return real(*args, **kw)

    monkeypatch.setattr(prepare, "lock", late)
    prepare.add(str(copy), [second], jobs=1)
    for part, seed in (("v5", 3), ("v6", 4)):
        assert sorted(read(copy, part)) == sorted(some_documents(50, seed))


def test_kinds_of_sources(tmp_path):
    docs = some_documents(60)
    pyarrow.parquet.write_table(pyarrow.table({"text": docs, "n": list(range(60))}), tmp_path / "a.parquet")
    write(tmp_path / "b.jsonl", docs)
    (tmp_path / "c.jsonl.zst").write_bytes(zstd.compress((tmp_path / "b.jsonl").read_bytes()))
    (tmp_path / "hub").mkdir()
    shutil.copy(tmp_path / "b.jsonl", tmp_path / "hub" / "train.jsonl")
    found = [str(tmp_path / "*.parquet"), str(tmp_path / "b.jsonl"), str(tmp_path / "c.jsonl.zst")]
    for source in (*found, f"hf:{tmp_path / 'hub'}"):
        assert list(sources.all_documents([sources.find_source(source)])) == [(0, d) for d in docs]


@pytest.mark.parametrize(
    "name, kind",
    [
        ("a.txt", ("text", "")),
        ("A.MD.ZST", ("text", ".zst")),
        ("a.TXT.gz", ("text", ".gz")),
        ("a.JSONL", ("json", "")),
        ("a.ndjson.xz", ("json", ".xz")),
        ("a.json.GZ", ("json", ".gz")),
        ("notes.jsonl.txt", ("text", "")),
        ("a.Parquet", ("parquet", "")),
        ("a.parquet.gz", ("", "")),
        ("a.Bin", ("tokens", "")),
        ("a.bin.gz", ("", "")),
        ("a.jsonl.bz2", ("", "")),
        ("a.jsonl\n", ("", "")),
        ("gz", ("", "")),
        ("a.gz", ("", "")),
        ("jsonl", ("", "")),
    ],
)
def test_the_kind_of_a_file_is_its_last_ending_in_any_case(name, kind):
    assert sources.kind_of(Path(name)) == kind


@pytest.fixture
def tree(tmp_path):
    """A folder with linked folders and names as they occur, with what it does not read."""
    t = tmp_path / "tree [1]"
    (t / "sub").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    write(t / "one.JSONL", ["one", "", " \n", "both"])
    (t / "one.JSONL").open("a").write('{"text": null}\n')
    (t / "sub" / "a.json.gz").write_bytes(gzip.compress(b'{"text": "two"}\n'))
    (tmp_path / "other" / "a.md.ZST").write_bytes(zstd.compress(b"three"))
    (t / "linked").symlink_to(tmp_path / "other")
    (t / "sub" / "up").symlink_to(t)
    (t / "notes.jsonl.txt").write_text("four")
    (t / "new\nline.ndjson").write_text('{"text": "both"}\n')
    (t / os.fsdecode(b"\xff.txt")).write_text("five")
    (t / "empty.txt").touch()
    for name in ("a.pdf", "b.PDF", "c.docx", "Makefile"):
        (t / name).touch()
    (t / "gone.txt").symlink_to("nowhere")
    os.mkfifo(t / "pipe.txt")
    return t


def test_a_folder_is_read_through_links_and_what_is_left_out_is_listed(tree, tmp_path, capsys):
    texts = ["both", "five", "four", "one", "three", "two"]
    for name in (str(tree), glob.escape(str(tree)) + "/*", str(tmp_path / "*"), str(tree / "sub" / "up")):
        source = sources.find_source(name)
        found = [t for _, t in sources.all_documents([source])]
        assert sorted(set(found)) == texts and len(found) == 7 and len(source.files) == 6
        assert source.left_out == {
            ".pdf": 2,
            ".docx": 1,
            "without ending": 1,
            "dangling link": 1,
            "special file": 1,
            "empty": 1,
            "blank documents": 3,
        }
    file = write(tmp_path / "c.jsonl", [f"more {i}" for i in range(40)])
    capsys.readouterr()
    prepare.prepare(str(tmp_path / "d"), [str(tree), file, file], "bytes", [1], 0.2, jobs=1)
    first, *table = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{str(tree)!r}: left out 2 .pdf, 1 ")
    rows = [line.rsplit(maxsplit=3) for line in table]
    tokens = sum(map(len, texts)) + 6, sum(len(f"more {i}") + 1 for i in range(40))
    meta = token_files.read_meta(tmp_path / "d")
    assert rows[0] == ["files", "documents", "tokens"] and [r[1:] for r in rows[1:4]] == [
        ["6", "6", str(tokens[0])],
        ["1", "40", str(tokens[1])],
        ["1", "0", "0"],
    ]
    for row, part in zip(rows[4:6], (meta["val"], *meta["increments"]), strict=True):
        assert row[0].endswith(f"d/{part['name']}.bin") and list(map(int, row[1:])) == [
            part["documents"],
            part["tokens"],
        ]
    assert sum(p["tokens"] for p in (meta["val"], *meta["increments"])) == sum(tokens)
    assert "3 blank documents" in table[6] and "1 duplicates" in table[6] and "2 .pdf" in table[6]
    assert table[7:] == [f"{file!r}: left out 40 duplicates"]


def test_documents_left_out_for_their_weight_are_counted(tmp_path, capsys):
    a, b = write(tmp_path / "a.jsonl", some_documents(100, 1)), write(tmp_path / "b.jsonl", some_documents(100, 2))
    prepare.prepare(str(tmp_path / "d"), [a, b], "bytes", [1], 0.1, [1, 4], jobs=1)
    out = capsys.readouterr().out.splitlines()
    kept = int(out[1].split()[-2])
    assert 10 < kept < 45 and out[-1] == f"{a!r}: left out {100 - kept} documents by --weights"
    assert kept == sum(" 1-" in d for part in parts(tmp_path / "d") for d in read(tmp_path / "d", part))


def test_two_thousand_files_of_as_many_endings(tmp_path):
    for i in range(2_000):
        (tmp_path / f"part.{i:04}").touch()
    (tmp_path / "a.txt").write_text("a")
    source = sources.find_source(str(tmp_path))
    assert source.left_out.total() == 2_000 and len(source.files) == 1
    assert source.listed().count(".") == 11 and source.listed().endswith(", ..")  # nine are named


def test_any_number_of_increments_takes_two_open_files(tmp_path, monkeypatch):
    """A process may often open 1,024 at most."""
    made = []

    def opened(file, *args):
        made.append(open(file, *args))
        assert sum(not f.closed for f in made) <= 2
        return made[-1]

    monkeypatch.setattr(prepare, "open", opened, raising=False)
    docs = some_documents(500)
    make(tmp_path / "d", [write(tmp_path / "a.jsonl", docs)], increments=[1.0] * 20)
    assert len(made) >= 42 and sorted(
        d for part in parts(tmp_path / "d") for d in read(tmp_path / "d", part)
    ) == sorted(docs)


def test_an_unreadable_folder_is_an_error(tree, monkeypatch):
    real = Path.iterdir

    def iterdir(path):
        if path.name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(PermissionError):
        sources.find_source(str(tree))


def test_a_file_that_shrinks_or_vanishes_while_it_is_read(tmp_path):
    file = Path(write(tmp_path / "a.jsonl", some_documents(5000)))
    found = sources.documents(file, lambda n: None)
    next(found)
    os.truncate(file, 300_000)
    os.truncate(file, 300_000 - file.read_bytes()[::-1].index(b"\n"))  # ends with a line
    with pytest.raises(UserError, match="a.jsonl: cannot be read after line .*shorter than the"):
        list(found)
    source = sources.find_source(str(file))
    file.unlink()
    with pytest.raises(FileNotFoundError, match="a.jsonl"):
        list(sources.all_documents([source]))


def test_parquet_columns_of_strings_and_of_other_types(tmp_path):
    texts = ["one", None, "", "two", "one"]
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(texts).cast(kind)}), tmp_path / "a.parquet")
        source = sources.find_source(str(tmp_path / "a.parquet"))
        assert [t for _, t in sources.all_documents([source])] == ["one", "two", "one"]
        assert source.left_out == {"blank documents": 2}
    for values in ([["a"]], [{"string": "a"}], [1], [b"a"]):
        pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
        with pytest.raises(UserError, match='has columns .* expected "text", of strings'):
            list(sources.documents(tmp_path / "a.parquet", lambda n: None))


def test_rows_of_hugging_face_that_are_no_text(monkeypatch):
    import datasets

    for rows, words in (([{"text": 5}], "got 5"), ([{"text": ["a"]}], "got ..a"), ([{"body": "a"}], "KeyError")):
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, rows=rows, **kw: iter([{"text": "a"}, *rows]))
        with pytest.raises(UserError, match=f'--source hf:x: .*{words}.*expected rows with a "text"'):
            list(sources.all_documents([sources.find_source("hf:x")]))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **kw: iter([{"text": t} for t in (None, "a", "")]))
    source = sources.find_source("hf:x")
    assert list(sources.all_documents([source])) == [(0, "a")]
    assert source.left_out == {"blank documents": 2}


def test_a_text_file_is_cut_at_empty_lines_and_nothing_is_lost(tmp_path):
    def documents(name, text):
        (tmp_path / name).write_text(text)
        return list(sources.documents(tmp_path / name, lambda n: None))

    prose = "\n\n".join("line of prose\n" * 30 for _ in range(200)) + "end"
    found = documents("book.txt", prose)
    assert "".join(found) == prose and len(found) > 5 and all(d.endswith("\n\n") for d in found[:-1])
    # blocks end inside no character, and a byte order mark is no text
    assert "".join(documents("wide.txt", "\ufeff" + "中" * 50_000)) == "中" * 50_000
    found = documents("one.md", "x" * 200_000)  # a single line is read and cut in blocks
    assert "".join(found) == "x" * 200_000 and max(map(len, found)) <= 1 << 17


def test_half_a_surrogate_pair_in_json_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a\ud800b"}))
    assert list(sources.documents(tmp_path / "a.jsonl", lambda n: None)) == ["a?b"]


def test_tokenizers_give_back_the_text():
    prose = "The whale, 1234567 miles; naïve café — 鲸鱼在海里。\n\n  def f(x):\n\treturn x <|endoftext|> \r\n"
    for name in ("bytes", str(prepare.RANKS)):
        tok = Tokenizer(name)
        ids = tok.encode(prose)
        assert max(ids) < tok.eot == tok.vocab_size - 1 and tok.decode([*ids, tok.eot, *ids]) == prose
    assert Tokenizer(str(prepare.RANKS)).vocab_size == 1024


def test_an_encoding_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cl100k_cache(tmp_path / "cache")))
    docs = some_documents(60)
    meta = make(tmp_path / "d", [write(tmp_path / "a.jsonl", docs)], "cl100k_base", increments=[1], val=0.2)
    assert (meta["vocab_size"], meta["dtype"], meta["eot"]) == (100277, "<u4", 100257)
    assert sorted(read(tmp_path / "d", "v1") + read(tmp_path / "d", "val")) == sorted(docs)
    tok = token_files.tokenizer_of(tmp_path / "d")
    assert tok.decode([9906, 100256, 9906]) == "Hello\ufffdHello"  # 100256 has no token
    np.array([1, 2], "<u2").tofile(tmp_path / "v1.bin")
    with pytest.raises(UserError, match="ids of 2 bytes, but the 100,277 of tokenizer cl100k_base need 4"):
        list(sources.token_texts(tmp_path / "v1.bin", lambda n: None, tok))


def test_the_shipped_ranks_are_reproduced(tmp_path):
    command("vocab", "--vocab_size", "1024", "--out", tmp_path / "new" / "r.tiktoken")
    assert (tmp_path / "new" / "r.tiktoken").read_bytes() == prepare.RANKS.read_bytes()


# ---- reading


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 1000, 4097])
def test_permute_is_a_permutation(n):
    out = data.permute(np.arange(n), n, (1, 2, 3))
    assert sorted(out.tolist()) == list(range(n))
    if n > 16:
        assert out.tolist() != data.permute(np.arange(n), n, (1, 2, 4)).tolist() != list(range(n))
        assert out[5:9].tolist() == data.permute(np.arange(5, 9), n, (1, 2, 3)).tolist()


def test_permute_looks_random():
    """Chi-squared of (index, image) on a 16 x 16 grid, mean of 20 seeds: 225 degrees of freedom, standard error 4.7."""
    n, x = 4096, []
    for seed in range(20):
        counts, _, _ = np.histogram2d(np.arange(n), data.permute(np.arange(n), n, (seed,)), bins=16)
        x.append(((counts - 16) ** 2 / 16).sum())
    assert 200 < np.mean(x) < 250


def test_batches_read_every_sequence_of_an_increment_once(prepared):
    t = data.Tokens(str(prepared), 32, 8, [20, 1000, 5, 5], seed=3)
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
    t = data.Tokens(str(prepared), 32, n, [3, 1, 1, 1], seed=1)
    a, b = t.batch(0)[0], t.batch(1)[0]
    assert not np.array_equal(a, b) and sorted(map(bytes, a)) == sorted(map(bytes, b))
    t.repeat = True
    assert t.problems(0, 3) == []
    t.repeat = False
    assert "and" in t.problems(0, 3)[0] and "are needed" in t.problems(0, 3)[0] and t.problems(0, 1) == []


def test_shuffled_reads_the_sequences_of_all_increments_once_each_and_mixed(prepared):
    """Sequences are looked up in the files: increment and number of each."""
    where = {}  # a sequence and its last target: (increment, number)
    for i in (0, 1):
        stream = np.fromfile(prepared / f"v{i + 1}.bin", "<u2").astype(np.int64)
        where |= {stream[32 * k : 32 * k + 33].tobytes(): (i, k) for k in range((len(stream) - 1) // 32)}

    def read(tokens, *steps):
        """What the rows of these steps are, one step after another."""
        rows = (np.concatenate([x, y[:, -1:]], 1) for x, y in map(tokens.batch, range(*steps)))
        return [where[row.tobytes()] for batch in rows for row in batch]

    def opened(B, increments, mixed, seed=3):
        tokens = data.Tokens(str(prepared), 32, B, increments, seed)
        tokens.mixed = mixed
        return tokens

    counts = [sum(i == of for i, _ in where.values()) for of in (0, 1)]
    assert len(where) == sum(counts) > 2000  # no two sequences are alike
    assert sorted(read(opened(1, counts, sum(counts)), sum(counts))) == sorted(where.values())  # steps that use all

    # 60 steps of 8 of each increment: the same sequences as without, in another order
    plain, mixed = opened(8, [60, 60], 0), opened(8, [60, 60], 120)
    a, b = read(plain, 120), read(mixed, 120)
    assert len(set(a)) == 960 and sorted(a) == sorted(b) and a != b
    old = np.array([i == 0 for i, _ in b]).reshape(120, 8).sum(1)
    assert abs(old[:60].mean() - 4) < 0.6 and 1.2 < old.std() < 1.6  # by chance 0.18 from 4, and sqrt(2)
    # version 1 has an order of its own; a rank reads its rows of the same batch; another seed has another order
    first = read(opened(8, [60, 60], 60), 60)
    assert sorted(first) == sorted(a[:480]) and first not in (a[:480], b[:480])
    for part in (slice(0, 4), slice(4, 8)):
        assert all(np.array_equal(x, y[part]) for x, y in zip(mixed.batch(7, part), mixed.batch(7), strict=True))
    assert read(opened(8, [60, 60], 120, seed=4), 120) != b == read(opened(8, [60, 60, 60, 60], 120), 120)
    # all of it is looked at before the first step, and recorded after it
    assert [n for n, _, _ in mixed.needs(7, 120)] == ["v1", "v2"] and [n for n, _, _ in plain.needs(67, 120)] == ["v2"]
    assert mixed.identity(1) == plain.identity(120) and mixed.identity(0) == plain.identity(0)


def test_validation_covers_every_token_once_on_any_number_of_ranks(prepared):
    t = data.Tokens(str(prepared), 32, 8, [1], seed=1)
    stream = np.asarray(t.tokens("val")).astype(np.int64)
    for rows, ranks in ((5, 1), (3, 2), (64, 3)):
        targets = [y.flatten() for r in range(ranks) for _, y in t.validation(rows, 0, r, ranks)]
        assert sorted(np.concatenate(targets)) == sorted(stream[1:])
    assert np.array_equal(np.concatenate([y.flatten() for _, y in t.validation(5)]), stream[1:])
    assert sum(y.size for _, y in t.validation(4, 100)) == 100


def test_a_part_of_an_increment_read_again_and_again(prepared):
    """data.unique: 3 steps' worth of v1, each sequence once an epoch, in another order each time."""
    t = data.Tokens(str(prepared), 32, 4, [12], seed=1)
    t.unique = 3
    ids = np.asarray(t.tokens("v1"))[: 12 * 32].reshape(12, 32)  # the first 12 sequences
    epochs = [np.concatenate([t.batch(s)[0] for s in range(e, e + 3)]) for e in (0, 3, 6)]
    for rows in epochs:
        assert sorted(map(tuple, rows)) == sorted(map(tuple, ids.astype(np.int64)))
    assert not np.array_equal(epochs[0], epochs[1])
    assert t.needs(0, 12) == [("v1", 12 * 32 + 1, t.meta["increments"][0]["tokens"])] and t.problems(0, 12) == []
    assert t.problems(0, 13) == ["data.increments: 12 steps in all, expected at least the 13 trained"]


def test_increments_that_are_missing_or_shorter_than_a_sequence(prepared):
    t = data.Tokens(str(prepared), 32, 4, [1] * 6, seed=1)
    t.meta["increments"][3]["tokens"] = 32
    drop, *missing = t.problems(0, 6)
    assert f"v4 has 32 tokens and 129 are needed; take it back: python data.py drop --last --out {prepared}" in drop
    add = f"python data.py add --out {prepared} --source TEXT"
    assert missing == [f"data.path {prepared}: has no increment {v}; append it: {add}" for v in ("v5", "v6")]
    t.repeat = True
    assert t.problems(0, 4) == [drop]


# ---- token files of others


def llmc(file, ids, magic=20240520, version=1, dtype="<u2", count=None):
    """As llm.c's data_common.py writes it."""
    head = np.zeros(256, "<i4")
    head[:3] = magic, version, len(ids) if count is None else count
    file.write_bytes(head.tobytes() + np.array(ids, dtype).tobytes())


def streams(docs):
    """The documents in bytes' ids, each ended by <|endoftext|> (nanoGPT) and each begun by it (llm.c)."""
    return [i for d in docs for i in [*d.encode(), 256]], [i for d in docs for i in [256, *d.encode()]]


def test_token_files_of_nanogpt_and_llmc_are_a_source_like_their_text(tmp_path, capsys, monkeypatch):
    """Bit for bit what their documents give as text, also where blocks end within documents."""
    monkeypatch.setattr(sources, "IDS", 100)
    a, b, c, d = (some_documents(40, s) for s in (1, 2, 3, 4))
    (t := tmp_path / "tokens").mkdir()
    np.array(streams(a)[0] + streams(a[:3])[0], "<u2").tofile(t / "a.bin")
    llmc(t / "b.bin", streams(b)[1])
    llmc(t / "c.BIN", streams(c)[1][1:-1], 20240801, 7, "<u4")  # begins and ends within a document
    np.array(list(b"one document"), "<u2").tofile(t / "d.bin")  # no <|endoftext|>
    texts = [*a, *b, *c[:-1], c[-1][:-1], "one document"]
    made = make(tmp_path / "d", [str(t)])
    assert f"{str(t)!r}: left out 3 duplicates" in capsys.readouterr().out
    same = make(tmp_path / "same", [write(tmp_path / "a.jsonl", texts)])
    assert (made["val"], made["increments"]) == (same["val"], same["increments"])
    # `add` takes the folder's tokenizer, and knows texts and tokens again
    np.array(streams([*a, *d])[0], "<u2").tofile(tmp_path / "new.bin")
    prepare.add(str(tmp_path / "d"), [str(tmp_path / "new.bin")], jobs=1)
    assert sorted(read(tmp_path / "d", "v5")) == sorted(d)
    with pytest.raises(UserError, match="has no new document"):
        prepare.add(str(tmp_path / "d"), [write(tmp_path / "b.jsonl", texts)], jobs=1)


# ---- damage, refusals, kills


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda d: (d / "v2.bin").unlink(), "v2.bin: is missing"),
        (lambda d: os.truncate(d / "v2.bin", 1000), "v2.bin: got 1000 bytes, expected"),
        (lambda d: flip(d / "v3.bin"), "v3.bin: SHA-256 is"),
        (lambda d: flip(d / "v1.ids", 3), "v1.ids: SHA-256 is"),
        (lambda d: (d / "meta.json").write_text("{"), "meta.json: damaged"),
        (lambda d: flip(d / "meta.json"), "meta.json: damaged"),
        (lambda d: write_json(d / "meta.json", {"format": 9}), "meta.json: format 9, expected 1"),
        (lambda d: write_json(d / "meta.json", {"format": 1, "step": 4}), "expected 1 and increments"),
        (lambda d: (d / "meta.json").unlink(), "no prepared data; make it: python data.py prepare"),
        (
            lambda d: write_json(d / "meta.json", {**token_files.read_meta(d), "tokenizer_sha256": "0" * 64}),
            "bytes: is not the tokenizer that",
        ),
    ],
)
def test_verify_finds_damage(copy, capsys, damage, words):
    damage(copy)
    with pytest.raises(SystemExit) as e:
        command("verify", copy)
    assert e.value.code == 2 and words in capsys.readouterr().err


def test_pipes_and_large_files_are_not_read_as_ranks(tmp_path):
    os.mkfifo(tmp_path / "pipe.tiktoken")
    with open(tmp_path / "large.tiktoken", "w") as f:
        f.truncate(1 << 40)
    for name in (tmp_path / "pipe.tiktoken", tmp_path / "large.tiktoken", "/dev/zero"):
        with pytest.raises(UserError, match="expected a file of at most"):
            Tokenizer(str(name))


@pytest.fixture(scope="module")
def material(tmp_path_factory, prepared):
    """A folder of good and bad input. No refused command may change it."""
    t = tmp_path_factory.mktemp("parent") / "material"
    (t / "empty").mkdir(parents=True)
    (t / "pic.png").write_bytes(b"x")
    os.mkfifo(t / "pipe.txt")
    (t / "blank.txt").write_text(" \n\n ")
    write(t / "all.jsonl", some_documents(500))
    (t / "bad.jsonl").write_text('{"text": "a"}\n{"tex\n')
    (t / "key.jsonl").write_text('{"body": "a"}\n')
    (t / "deep.jsonl").write_text("[" * 100_000 + "\n")
    (t / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    write(t / "cut.jsonl.gz", some_documents(500))
    os.truncate(t / "cut.jsonl.gz", 5000)
    (t / "cut.jsonl.zst").write_bytes(zstd.compress((t / "all.jsonl").read_bytes())[:-5])
    (t / "cut.parquet").write_bytes(b"PAR1xxxx")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), t / "int.parquet")
    write(t / "few.jsonl", some_documents(2))
    (t / "bad.tiktoken").write_text("YQ== 0\nYg== 5\n")
    (t / "twice.tiktoken").write_bytes(prepare.RANKS.read_bytes() + b"YQ== 1023\n")  # a again
    shutil.copytree(prepared, t / "d")
    shutil.copytree(prepared, t / "damaged")
    flip(t / "damaged" / "v1.ids", 3)
    (t / "empty.bin").write_bytes(b"")
    (t / "odd.bin").write_bytes(b"abc")
    np.array([5, 257, 6], "<u2").tofile(t / "large.bin")
    np.array([256, 256], "<u2").tofile(t / "ends.bin")
    np.array([97, 98], "<u2").tofile(t / "good.bin")
    llmc(t / "short.bin", [1, 2, 3], count=4)
    llmc(t / "negative.bin", [1, 2, 3], count=-1)
    llmc(t / "version.bin", [1, 2, 3], version=2)
    llmc(t / "magic.bin", [1, 2, 3], magic=20240521)
    llmc(t / "head.bin", [], count=0)
    np.arange(20, dtype="<u4").tofile(t / "wide.bin")
    return t


PREPARE = "prepare --jobs 1 --out {t}/new/deeper/d"
ADD = "add --jobs 1 --source {t}/all.jsonl"
BINS = f"{PREPARE} --tokenizer bytes --source"
VOCAB = "vocab --vocab_size 300 --out {t}/new/deeper/r.tiktoken"


@pytest.mark.parametrize(
    "args, words",
    [
        ("", "required: command"),
        ("prapare", "invalid choice: 'prapare'"),
        (f"{PREPARE} --source {{t}}/nowhere.jsonl", "there is no file"),
        (f"{PREPARE} --source {{t}}/pic.png", "has nothing to read: 1 .png;"),
        (f"{PREPARE} --source {{t}}/pi*.png", "has nothing to read: 1 .png;"),
        (f"{PREPARE} --source {{t}}/pipe.txt", "has nothing to read: 1 special file;"),
        (f"{PREPARE} --source {{t}}/empty", "there is no file"),
        (f"{PREPARE} --source {{t}}/blank.txt", "the text is empty"),
        (f"{PREPARE} --source {{t}}/bad.jsonl", "bad.jsonl:2: got '{\"tex"),
        (f"{PREPARE} --source {{t}}/key.jsonl", "key.jsonl:1: got '{\"body"),
        (f"{PREPARE} --source {{t}}/deep.jsonl", "deep.jsonl:1: got '[[["),
        (f"{PREPARE} --source {{t}}/latin.txt", "latin.txt: cannot be read after line 0"),
        (f"{PREPARE} --source {{t}}/cut.jsonl.gz", "cannot be read after line"),
        (f"{PREPARE} --source {{t}}/cut.jsonl.zst", "cannot be read after line"),
        (f"{PREPARE} --source {{t}}/int.parquet", "has columns {'text': 'int64'}; expected"),
        (f"{PREPARE} --source {{t}}/cut.parquet", "not a readable parquet file"),
        (f"{PREPARE} --source {{t}}/few.jsonl", "no documents fell into it; give more text"),
        (f"{PREPARE} --source {{t}}/few.jsonl --source {{t}}/blank.txt --weights 1,1", "so it can have no weight"),
        (f"{PREPARE} --source=", "--source '': there is no file"),
        (f"{PREPARE} --tokenizer cl1000k", "tokenizer cl1000k: Unknown encoding cl1000k"),
        (f"{PREPARE} --tokenizer {{t}}/no.tiktoken", "No such file"),
        (f"{PREPARE} --tokenizer {{t}}/bad.tiktoken", "not a rank file"),
        (f"{PREPARE} --tokenizer {{t}}/twice.tiktoken", "each token there once"),
        (f"{PREPARE} --tokenizer {{t}}/empty", "tokenizer.json: is not there"),
        (f"{PREPARE} --jobs 1000000000000", "--jobs: got 1000000000000"),
        (f"{PREPARE} --increments 100000000000", "--increments: got '100000000000'"),
        (f"{PREPARE} --increments 0", "--increments: got '0'"),
        (f"{PREPARE} --increments 1,-2", "--increments: got '1,-2'"),
        (f"{PREPARE} --increments 1e308,1e308", "--increments: got '1e308,1e308'"),
        (f"{PREPARE} --increments " + ",".join(["1e-300"] * 10_000), "--increments: got '1e-300"),
        (f"{PREPARE} --increments " + "9" * 5000, "--increments"),
        (f"{PREPARE} --weights 1e-320,1 --source {{t}}/all.jsonl", "--weights: got '1e-320,1'"),
        (f"{PREPARE} --weights 1e200,1e-200 --source {{t}}/all.jsonl", "--weights: got '1e200"),
        (f"{PREPARE} --jobs -1", "--jobs: got -1"),
        (f"{PREPARE} --val 1", "--val: got 1.0"),
        (f"{PREPARE} --val nan", "--val: got nan"),
        (f"{PREPARE} --val 1e-300", "--val: got 1e-300"),
        (f"{PREPARE} --val 0.9999999999999999", "--val: got 0.9999999999999999"),
        (f"{PREPARE} --weights 1,2", "--weights: got 2 for 1 sources"),
        ("prepare --out {t}/empty", "is there already and is never overwritten"),
        ("prepare --out {t}/pic.png/d", "pic.png: File exists"),
        ("prepare --out {t}/new/" + "x" * 300 + "/d", "File name too long"),
        ("prepare --out /proc/nope/d", "/proc/nope: "),
        ("add --out {t}/d", "required: --source"),
        (f"{ADD} --out {{t}}/nowhere", "no prepared data"),
        (f"{ADD} --out {{t}}/damaged", "v1.ids: SHA-256 is"),
        (f"{ADD} --out {{t}}/d --weights 1,2", "--weights: got 2 for 1 sources"),
        (f"{ADD} --out {{t}}/d --source {{t}}/nowhere.jsonl", "there is no file"),
        (f"{ADD} --out {{t}}/d --source {{t}}/bad.jsonl", "bad.jsonl:2: got"),
        ("add --jobs 1 --out {t}/d --source {t}/blank.txt", "has no new document"),
        ("verify {t}/damaged", "v1.ids: SHA-256 is"),
        (f"{BINS} {{t}}/nowhere.bin", "nowhere.bin': there is no file"),
        (f"{BINS} {{t}}/empty.bin", "has nothing to read: 1 empty"),
        (f"{BINS} {{t}}/odd.bin", "odd.bin: got 3 bytes, expected 2"),
        (f"{BINS} {{t}}/large.bin", "large.bin: token id 257, expected below the vocabulary's 257"),
        (f"{BINS} {{t}}/ends.bin", "the text is empty"),
        (f"{BINS} {{t}}/short.bin", "short.bin: got 1,030 bytes, expected 1,032"),
        (f"{BINS} {{t}}/negative.bin", "negative.bin: got 1,030 bytes, expected 1,022"),
        (f"{BINS} {{t}}/version.bin", "magic number and version (20240520, 2), expected one of [(20240520, 1)"),
        (f"{BINS} {{t}}/magic.bin", "magic.bin: got magic number and version (20240521, 1), expected"),
        (f"{BINS} {{t}}/head.bin", "the text is empty"),
        (f"{BINS} {{t}}/wide.bin", "wide.bin: got ids of 4 bytes without a header, expected 2"),
        (f"{VOCAB} --source {{t}}/good.bin", "good.bin: holds token ids, expected text"),
        (f"{VOCAB} --source {{t}}/nowhere.jsonl", "there is no file"),
        (f"{VOCAB} --source {{t}}/bad.jsonl", "bad.jsonl:2: got"),
        (f"{VOCAB} --source {{t}}/few.jsonl", "--vocab_size: got 300, expected at most"),
        ("vocab --vocab_size 9 --out {t}/new/r.tiktoken", "--vocab_size: got 9, expected 257"),
        ("vocab --vocab_size 1e30 --out {t}/new/r.tiktoken", "--vocab_size: invalid int value: '1e30'"),
        ("vocab --vocab_size 1000000000000 --out {t}/new/r.tiktoken", "--vocab_size: got 1000000000000, expected 257"),
        ("vocab --vocab_size 300 --out {t}/pic.png", "is there already and is never overwritten"),
    ],
)
def test_a_refused_command_says_why_in_one_line_and_leaves_nothing_behind(material, capsys, args, words):
    before = listing(material.parent)
    with pytest.raises(SystemExit) as e:
        command(*args.format(t=material).split())
    err = capsys.readouterr().err.strip()
    errors = [line for line in err.splitlines() if "error" in line]
    assert e.value.code == 2 and len(errors) == 1 and words in errors[0], err
    assert listing(material.parent) == before


def test_no_network_for_an_encoding_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(SystemExit) as e:
        command("prepare", "--tokenizer", "o200k_base", "--out", tmp_path / "d")
    err = capsys.readouterr().err.strip()
    assert e.value.code == 2 and "TIKTOKEN_CACHE_DIR" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "d").exists() and not (tmp_path / ".d.lock").exists()


STOPPED = """
import sys, time
from text import prepare

real = prepare.all_documents

def documents(*args):  # says so after the first batches, whose processes are at work, and waits to be killed
    for i, document in enumerate(real(*args)):
        if i == 3 * prepare.BATCH:
            print("ready", flush=True)
            while True:  # not one long sleep: a signal just before it would wait for its end
                time.sleep(0.1)
        yield document

if __name__ == "__main__":
    prepare.all_documents = documents
    sys.argv[0] = "data.py"
    exec(compile(open("data.py").read(), "data.py", "exec"))
"""


def test_a_killed_prepare_leaves_nothing_that_looks_finished(tmp_path):
    write(tmp_path / "a.jsonl", some_documents(4 * prepare.BATCH))
    (tmp_path / "stopped.py").write_text(STOPPED)
    args = ["prepare", "--source", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "d"), "--tokenizer", "bytes"]
    before = listing(tmp_path)
    for sig in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        p = subprocess.Popen(
            [sys.executable, str(tmp_path / "stopped.py"), *args, "--jobs", "2"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
        )
        assert p.stdout.readline() == b"ready\n" and (tmp_path / ".d.partial").exists()
        p.send_signal(sig)
        p.communicate(timeout=300)  # its output ends when its processes have, too
        assert p.returncode and not (tmp_path / "d").exists()
        if sig != signal.SIGKILL:  # the others clean up, also after the killed one
            assert listing(tmp_path) == before
    make(tmp_path / "d", [str(tmp_path / "a.jsonl")])
    assert token_files.check_files(tmp_path / "d", quiet=True)


# ---- tokenizers of the Hugging Face library, and texts that libraries fail on


def hf_folder(folder, added=(), pattern=None):
    """A folder with the tokenizer.json of the rank file, with tokens added and none flagged special."""
    made = huggingface.to_tokenizer_json(Tokenizer(str(prepare.RANKS)))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    made["added_tokens"][0]["special"] = False
    made["added_tokens"] += [{"id": 1024 + i, "content": text, **flags} for i, text in enumerate(added)]
    if pattern:
        made["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(made))
    return str(folder)


CONTROLS = ("<|im_start|>", "<|im_end|>", "<tool_call>", "[INST]", "<a\nb>")
WORDS = ("whale", "    ", "a>b")


def test_text_is_never_a_control_token_whatever_tokenizer_json_calls_it(tmp_path):
    """Against the library: what it makes of a text without control tokens, and of each control token alone."""
    name = hf_folder(tmp_path / "tok", added=CONTROLS + WORDS)
    plain = tokenizers.Tokenizer.from_file(f"{name}/tokenizer.json")
    tok = Tokenizer(name)
    ids = {text: plain.token_to_id(text) for text in ("<|endoftext|>", *CONTROLS, *WORDS)}
    assert tok.eot == ids["<|endoftext|>"] == 1023 and tok.vocab_size == 1032
    assert tok.markers == {m: ids[m] for m in CONTROLS[:2]}
    for text in ("<|endoftext|>", *CONTROLS):
        assert ids[text] in plain.encode(f"a {text} b").ids  # the library alone lets it through
        for around in ("{}", "a{}b", " {} \n", "{0}{0}"):
            found = tok.encode(around.format(text))
            assert not set(found) & {ids[t] for t in ("<|endoftext|>", *CONTROLS)}
            assert tok.decode(found) == around.format(text)
    for text in ("the whale    sees", "xa>by"):  # words that the vocabulary was extended by
        assert tok.encode(text) == plain.encode(text).ids and max(tok.encode(text)) > 1023
    docs = [f"{d} <|endoftext|> <|im_end|> and on" for d in some_documents(60)]
    make(tmp_path / "d", [write(tmp_path / "a.jsonl", docs)], name, increments=[1], val=0.2)
    assert sorted(read(tmp_path / "d", "v1") + read(tmp_path / "d", "val")) == sorted(docs)


def test_a_vocabulary_that_spells_its_control_token_is_refused(tmp_path):
    """</s> as an ordinary piece, which a text with </s> in it becomes."""
    vocab = [("<unk>", 0.0), ("</s>", -1.0), *((c, -5.0) for c in "</s>aé中\0 \n")]
    tok = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, 0, False))
    (tmp_path / "tok").mkdir()
    tok.save(str(tmp_path / "tok" / "tokenizer.json"))
    with pytest.raises(UserError, match="tokenizer.json: encodes </s> in a text as the control token"):
        Tokenizer(str(tmp_path / "tok"))


@pytest.fixture(scope="module")
def spaces():
    """Documents with white space that tiktoken and rustbpe cannot match, and some others."""
    return [f"{i} {run} end" for i, run in enumerate([" " * 999_998, "  \xa0\t" * 250_000])] + some_documents(30)


@pytest.mark.parametrize("name", [str(prepare.RANKS), "cl100k_base"])
def test_white_space_that_a_library_cannot_encode_is_cut(tmp_path, monkeypatch, spaces, name):
    """What the library can encode keeps its ids, up to the very length at which it fails."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cl100k_cache(tmp_path / "cache")))
    tok = Tokenizer(name)
    texts = [" " * 1000 + "a", " " * 999_998 + "a", "\t\xa0" * 499_999 + "a", "\n" * 1_000_100 + "a"]
    for text in texts:  # the pattern reads lines in another way than spaces, so the last may be longer
        assert tok.encode(text) == tok.encoding.encode_ordinary(text)
    for text in (" " * 999_999 + "a", spaces[0]):
        with pytest.raises(BaseException, match="StackOverflow"):
            tok.encoding.encode_ordinary(text)
    for text, ids in zip(spaces, tok.encode_many(spaces), strict=True):
        assert tok.encoding.decode(ids) == text
    assert tok.encode_many(spaces[2:]) == tok.encoding.encode_ordinary_batch(spaces[2:])


def test_white_space_that_tokenizers_cannot_encode_is_cut(tmp_path):
    """Its regular expressions give up after ten million steps, of which this pattern takes four a character."""
    tok = Tokenizer(hf_folder(tmp_path / "tok", pattern=r"\s+\z|\s+\z|\s+\z|\s+\z|\s+(?!\S)|\s|\S"))
    text = " " * 2_700_000 + "a"
    with pytest.raises(BaseException, match="retry-limit-in-match over"):
        tok.hf.encode(text)
    assert tok.decode(tok.encode(text)) == text


def test_long_white_space_is_prepared_and_trained_on(tmp_path, spaces):
    file = write(tmp_path / "a.jsonl", spaces)
    make(tmp_path / "d", [file], str(prepare.RANKS), increments=[1], val=0.2)
    assert sorted(read(tmp_path / "d", "v1") + read(tmp_path / "d", "val")) == sorted(spaces)
    args = "--vocab_size", 270, "--out", tmp_path / "r.tiktoken", "--increments", "1e9,1e-9", "--val", "1e-9"
    command("vocab", "--source", file, *args)
    assert b"  " in Tokenizer(str(tmp_path / "r.tiktoken")).encoding._mergeable_ranks


def test_a_document_that_a_library_fails_on_is_named(monkeypatch):
    tok = Tokenizer(str(prepare.RANKS))
    monkeypatch.setattr(prepare, "_tokenizer", tok, raising=False)

    class Panic(BaseException):  # as the libraries raise
        pass

    class Library:
        def encode_ordinary(self, text):
            if "bad" in text:
                raise Panic("called `unwrap()`. Report this")
            return [1]

    monkeypatch.setattr(tok, "encoding", Library())
    assert len(prepare._encode([(0, "a"), (1, "b")])) == 2
    with pytest.raises(UserError) as e:
        prepare._encode([(0, "a"), (1, "bad\n" * 90)])
    message = str(e.value)
    assert message.startswith(f"{('bad' + chr(10)) * 15!r}: tokenizer {prepare.RANKS} cannot encode")
    assert "called `unwrap()`" in message and len(message.splitlines()) == 1


def test_a_tokenizer_that_loses_text_is_refused(tmp_path):
    """BPE without byte-level drops characters that its vocabulary lacks; others make all of them one id."""
    letters = {c: i for i, c in enumerate("abc")} | {"<|endoftext|>": 3, "[UNK]": 4}
    for i, model in enumerate(
        (tokenizers.models.BPE(letters, []), tokenizers.models.WordLevel(letters, unk_token="[UNK]"))
    ):
        (folder := tmp_path / str(i)).mkdir()
        tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))
        with pytest.raises(UserError, match="cannot encode every text"):
            Tokenizer(str(folder))


def test_a_folder_that_is_called_as_an_encoding_is_not_taken_for_a_tokenizer(tmp_path, monkeypatch):
    (tmp_path / "bytes").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Tokenizer("bytes").encode("a") == [97]
    with pytest.raises(UserError, match=r"bytes/tokenizer.json: is not there"):
        Tokenizer("./bytes")


def test_a_rank_file_does_not_replace_a_link(tmp_path):
    (tmp_path / "link.tiktoken").symlink_to(tmp_path / "nowhere" / "ranks.tiktoken")
    with pytest.raises(UserError, match="is there already"):
        prepare.vocab(str(tmp_path / "link.tiktoken"), [], 257, [1.0], 0.1)
    assert (tmp_path / "link.tiktoken").is_symlink()


def test_what_is_added_keeps_a_held_out_part(prepared, tmp_path):
    """By the same hash as validation: what is there stays, and the parts hold each document once; drop takes both."""
    copy = shutil.copytree(prepared, tmp_path / "data")
    there = {f.name: f.read_bytes() for f in copy.glob("*.bin")}
    texts = some_documents(200, 7)
    prepare.add(str(copy), [write(tmp_path / "a.jsonl", texts)], jobs=1, val=0.25)
    assert {name: (copy / name).read_bytes() for name in there} == there
    added = token_files.read_meta(copy)["increments"][-1]
    assert (added["name"], added["val"]["name"]) == ("v5", "val-v5")
    assert added["documents"] + added["val"]["documents"] == 200 and 25 < added["val"]["documents"] < 75
    assert sorted(read(copy, "v5") + read(copy, "val-v5")) == sorted(texts)
    assert all(sources.hashes(text)[0] < 2**62 for text in read(copy, "val-v5"))
    (copy / "val-v5.bin").write_bytes(b"")
    with pytest.raises(UserError, match="val-v5.bin: got 0 bytes"):
        token_files.check_files(copy)
    prepare.drop(str(copy))
    assert {f.name for f in copy.glob("v*.bin")} == set(there)
    with pytest.raises(UserError, match="has no new document"):  # held-out documents are known ones
        prepare.add(str(copy), [str(tmp_path / "a.jsonl")], jobs=1, val=0.25)
        prepare.add(str(copy), [str(tmp_path / "a.jsonl")], jobs=1, val=0.25)


def test_so_few_documents_that_all_would_be_held_out_are_refused(copy, tmp_path):
    low = next(text for text in some_documents(200, 8) if sources.hashes(text)[0] < 2**62)
    file = write(tmp_path / "a.jsonl", [low])
    before = listing(tmp_path)
    with pytest.raises(UserError, match="--val 0.25: all new documents fell into it"):
        prepare.add(str(copy), [file], jobs=1, val=0.25)
    assert listing(tmp_path) == before
    prepare.add(str(copy), [file], jobs=1)
    assert read(copy, "v5") == [low] and "val" not in token_files.read_meta(copy)["increments"][-1]


# ---- Replay ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def replaying(prepared):
    """Four increments of 12, 6, 9 and 5 steps; 3 of 8 rows are of earlier ones."""
    t = data.Tokens(str(prepared), 32, 8, [12, 6, 9, 5], seed=3)
    t.replayed = 3
    return t


def place_of(t, x):
    """{(increment, sequence)} that a row of inputs may be: found by comparing with the token files."""
    found = []
    for i in range(4):
        ids = np.asarray(t.tokens(f"v{i + 1}")).astype(np.int64)
        whole = ids[: (len(ids) - 1) // 32 * 32].reshape(-1, 32)
        found += [(i, int(k)) for k in np.flatnonzero((whole == x).all(1))]
    return found


def test_replayed_rows_are_of_earlier_increments_evenly_and_each_once(prepared, replaying):
    plain = data.Tokens(str(prepared), 32, 8, [12, 6, 9, 5], seed=3)
    for step in range(12):
        assert np.array_equal(replaying.batch(step), plain.batch(step))  # none in the first
    for i, (first, end) in enumerate(((12, 18), (18, 27), (27, 32)), 1):
        old = []
        for step in range(first, end):
            x, _ = replaying.batch(step)
            assert np.array_equal(x[:5], plain.batch(step)[0][:5])  # the other rows are what they were
            old += [min(place_of(replaying, row)) for row in x[5:]]
        counts = np.bincount([j for j, _ in old], minlength=i)
        assert len(counts) == i and counts.max() - counts.min() <= 1
        assert len(set(old)) == len(old)  # no sequence twice within an increment


def test_replayed_rows_do_not_depend_on_the_ranks_and_follow_the_seed(prepared, replaying):
    whole = replaying.batch(20)
    for ranks in (2, 4):
        parts = [replaying.batch(20, slice(r * 8 // ranks, (r + 1) * 8 // ranks)) for r in range(ranks)]
        assert all(np.array_equal(np.concatenate(p), w) for p, w in zip(zip(*parts, strict=True), whole, strict=True))
    other = data.Tokens(str(prepared), 32, 8, [12, 6, 9, 5], seed=4)
    other.replayed = 3
    assert not np.array_equal(other.batch(20)[0][5:], whole[0][5:])


def test_replay_needs_the_earlier_increments(prepared, replaying):
    assert [name for name, _, _ in replaying.needs(18, 27)] == ["v1", "v2", "v3"]
    plain = data.Tokens(str(prepared), 32, 8, [12, 6, 9, 5], seed=3)
    assert [name for name, _, _ in plain.needs(18, 27)] == ["v3"]
    needs = {name: need for name, need, _ in replaying.needs(18, 27)}
    assert needs == {"v1": 14 * 32 + 1, "v2": 14 * 32 + 1, "v3": 9 * 8 * 32 + 1}  # 27 rows, in turn from two


@pytest.mark.parametrize("path, branch", [(4, 2), (6, 1), (2, 5), (0, 3), (3, 0)])
def test_a_branch_replays_what_the_main_path_has_not(prepared, path, branch):
    """Of the same increment: the branch's turns go on from those that the path had taken at the fork."""
    main, own = (data.Tokens(str(prepared), 32, 8, [12, 6, 9, 5], seed=3) for _ in range(2))
    main.replayed, main.fork = path, (0, path)
    own.replayed, own.fork = branch, (22, path)
    old = [min(place_of(main, row)) for step in range(18, 22) for row in main.batch(step)[0][8 - path :] if path]
    old += [min(place_of(own, row)) for step in range(22, 27) for row in own.batch(step)[0][8 - branch :] if branch]
    assert len(set(old)) == len(old) == 4 * path + 5 * branch
    counts = np.bincount([j for j, _ in old], minlength=2)
    assert abs(counts[0] - counts[1]) <= 1
