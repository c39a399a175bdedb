"""A checkpoint is whole or not there, and nothing in it is trusted unread."""

import json
import os
import pickle
import random
import re

import pytest
import torch
from conftest import ROOT

from runtime import checkpoint
from runtime.errors import UserError
from runtime.files import content_hash, lock, sha256, write_json

RECORD = {
    "segment": "main",
    "version": 1,
    "path": {},
    "finished": False,
    "parent": None,
    "config": {},
    "data": {},
    "pinned": False,
}


def tensors(seed=0):
    torch.manual_seed(seed)
    return {
        "model.a": torch.randn(5, 7),
        "exp_avg.a": torch.randn(5, 7),
        "updates.a": torch.tensor(3.0),
        "rng.cpu": torch.get_rng_state(),
    }


def save(folder, step, seed=0, **record):
    folder.mkdir(exist_ok=True)
    return checkpoint.save(folder, step, tensors(seed), {**RECORD, **record})


def test_what_is_loaded_is_what_was_saved_bit_for_bit(tmp_path):
    save(tmp_path, 7)
    got = {k: torch.zeros_like(v) for k, v in tensors().items()}
    assert checkpoint.load(tmp_path / "step-000007", got)["step"] == 7
    assert all(torch.equal(got[k], v) for k, v in tensors().items())
    assert torch.equal(torch.get_rng_state(), tensors()["rng.cpu"])


def test_the_files_are_safetensors_and_json(tmp_path):
    from safetensors import safe_open

    save(tmp_path, 7)
    files = sorted(f.name for f in (tmp_path / "step-000007").iterdir())
    assert files == ["meta.json", "shard-00001-model-00001-of-00001.safetensors"]
    with safe_open(tmp_path / "step-000007" / files[1], "pt") as f:
        assert torch.equal(f.get_tensor("model.a"), tensors()["model.a"])


def test_a_checkpoint_that_is_there_is_never_written_again(tmp_path):
    first = save(tmp_path, 7)
    assert save(tmp_path, 7, seed=1) == first


def test_prune_keeps_the_last_and_the_pinned(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, pinned=step in (2, 4))
    checkpoint.pin(tmp_path / "step-000003")
    checkpoint.prune(tmp_path, 2, 7)
    assert checkpoint.steps(tmp_path) == [2, 3, 4, 6, 7]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{s:06d}" for s in (2, 3, 4, 6, 7)]


def test_prune_leaves_later_and_damaged_ones_alone(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step)
    (tmp_path / "step-000002" / "meta.json").write_text("{")
    checkpoint.prune(tmp_path, 2, 5)
    assert checkpoint.steps(tmp_path) == [2, 4, 5, 6, 7]


def test_prune_keeps_what_a_missing_fork_point_will_be_made_from(tmp_path):
    for step in (3, 6, 9, 15):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, 1, 15, required=[5, 11, 15, 20])  # 5 and 11 could not be saved
    assert checkpoint.steps(tmp_path) == [3, 9, 15]


def test_a_prune_that_fails_is_no_failed_save(tmp_path, monkeypatch, capsys):
    save(tmp_path, 1)
    saver = checkpoint.Saver(tmp_path, keep=1)
    monkeypatch.setattr(
        checkpoint.shutil,
        "rmtree",
        lambda p, **kw: None if kw else (_ for _ in ()).throw(OSError(5, "Input/output error", str(p))),
    )
    saver.save(2, tensors(), RECORD)
    saver.wait()
    assert (
        checkpoint.steps(tmp_path) == [2]
        and "an old checkpoint could not be deleted: Input/output error" in capsys.readouterr().err
    )


def test_tidy_removes_what_a_killed_save_left(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".step-000002.partial").mkdir()
    checkpoint.tidy(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_save_that_fails_anywhere_leaves_the_last_good_one(tmp_path, monkeypatch, call):
    """The k-th fsync or rename of a save fails, for every k: the old checkpoint loads, the new one is whole or not there."""
    save(tmp_path, 1)
    real, k = getattr(os, call), 0
    while True:
        k, left = k + 1, [k + 1]

        def failing(*args, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(28, "No space left on device")
            return real(*args)

        monkeypatch.setattr(os, call, failing)
        try:
            save(tmp_path, 2)
            done = True
        except OSError:
            done = False
        monkeypatch.setattr(os, call, real)
        for step in checkpoint.steps(tmp_path):
            checkpoint.verify(checkpoint.path(tmp_path, step))
            checkpoint.load(checkpoint.path(tmp_path, step), tensors(9))
        assert 1 in checkpoint.steps(tmp_path) and not list(tmp_path.glob(".*partial"))
        if done:
            break
    assert k > (1 if call == "rename" else 3) and checkpoint.steps(tmp_path) == [1, 2]


def damaged(folder, damage):
    file = next(folder.glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "flipped":
        raw[-3] ^= 16
        file.write_bytes(raw)
    elif damage == "meta":
        (folder / "meta.json").write_text("{}")
    elif damage == "bit":
        text = (folder / "meta.json").read_text()
        (folder / "meta.json").write_text(text.replace('"version": 1', '"version": 3'))
    elif damage == "extra":
        (folder / "more.safetensors").write_bytes(bytes(raw))
    elif damage == "path":
        meta = json.loads((folder / "meta.json").read_text())
        meta["files"] = {"../../evil.safetensors": {"bytes": 1, "sha256": ""}}
        meta["hash"] = content_hash(meta, checkpoint.UNHASHED)
        (folder / "meta.json").write_text(json.dumps(meta))
    else:
        file.write_bytes(raw[: int(len(raw) * damage)])


@pytest.mark.parametrize(
    "damage, words",
    [
        ("missing", "is missing"),
        ("flipped", "its bytes have changed"),
        (0, "got 0 bytes"),
        (0.5, "bytes, expected"),
        (0.99, "bytes, expected"),
        ("meta", "damaged"),
        ("bit", "damaged"),
        ("path", "files: got"),
    ],
)
def test_damage_is_named_and_the_earlier_one_offered(tmp_path, damage, words):
    save(tmp_path, 1)
    save(tmp_path, 2)
    damaged(tmp_path / "step-000002", damage)
    with pytest.raises(UserError) as e:
        checkpoint.verify(tmp_path / "step-000002")
    assert words in str(e.value) and "to go on from step-000001" in str(e.value)
    checkpoint.verify(tmp_path / "step-000001")


def test_a_file_that_does_not_belong_is_refused(tmp_path):
    save(tmp_path, 1)
    damaged(tmp_path / "step-000001", "extra")
    with pytest.raises(UserError, match=r"more\.safetensors: is no part of this checkpoint"):
        checkpoint.verify(tmp_path / "step-000001")


def test_another_shape_is_refused(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(UserError, match=r"model.a has shape \(5, 7\) of torch.float32, expected \(5, 8\)"):
        checkpoint.load(tmp_path / "step-000001", {"model.a": torch.zeros(5, 8)})
    with pytest.raises(UserError, match="has no model.b; it is a model of another shape"):
        checkpoint.load(tmp_path / "step-000001", {"model.b": torch.zeros(5, 8)})
    with pytest.raises(UserError, match="is no checkpoint"):
        checkpoint.verify(tmp_path)


def test_a_lock_is_held_by_one_and_let_go(tmp_path):
    with (
        lock(tmp_path / "x" / ".lock", "busy"),
        pytest.raises(UserError, match="busy"),
        lock(tmp_path / "x" / ".lock", "busy"),
    ):
        pass
    with lock(tmp_path / "x" / ".lock", "busy"):
        pass


def test_nothing_unpickles():
    for file in [*ROOT.glob("*.py")]:
        text = file.read_text()
        assert (
            "torch.load" not in text and "import pickle" not in text and not re.search(r"(?<![\w.])(eval|exec)\(", text)
        ), file


# ----------------------------------------------------------------------------------------------------------
# A checkpoint of a stranger: its checksums fit, its content does not


def forged(folder, change, name="shard-00001-model-00001-of-00001.safetensors"):
    """Replace the tensors of a checkpoint's file by `change(tensors, offsets)` and make all checksums fit; bytes are written as they are."""
    from safetensors.torch import load_file, save_file

    file = folder / name
    tensors = load_file(file)
    offsets = {k: {"saved_offsets": [0] * v.dim()} for k, v in tensors.items()}
    raw = change(tensors, offsets)
    if isinstance(raw, bytes):
        file.write_bytes(raw)
    else:
        save_file(tensors, file, {"DCP_SHARDING_INFO": json.dumps(offsets), "format": "pt"})
    meta = json.loads((folder / "meta.json").read_text())
    meta["files"] = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in folder.glob("*.safetensors")}
    write_json(folder / "meta.json", {k: v for k, v in meta.items() if k != "hash"}, checkpoint.UNHASHED)


def header(size, text=b"{}"):
    return size.to_bytes(8, "little") + text


HOSTILE = {
    "a pickle": (lambda t, o: pickle.dumps({"model.a": [1, 2]}), "is no safetensors file"),
    "a zip, as torch.save makes": (lambda t, o: b"PK\x03\x04" + bytes(100), "is no safetensors file"),
    "a header of 2^62 bytes": (lambda t, o: header(1 << 62), "is no safetensors file"),
    "a header of 200 MB": (lambda t, o: header(200_000_000), "is no safetensors file"),
    "a tensor of 2^60 bytes": (
        lambda t, o: header(
            90, b'{"model.a":{"dtype":"F32","shape":[288230376151711744],"data_offsets":[0,1152921504606846976]}}'[:90]
        ),
        "is no safetensors file",
    ),
    "no JSON": (lambda t, o: header(4, b"\xff\xff\xff\xff"), "is no safetensors file"),
    "missing": (lambda t, o: t.pop("model.a"), "has no model.a; it is a model of another shape"),
    "no moments": (lambda t, o: t.pop("exp_avg.a"), "it holds weights alone, but AdamW's moments are to be kept"),
    "extra": (
        lambda t, o: t.update({"model.z": torch.zeros(2)}) or o.update({"model.z": {"saved_offsets": [0]}}),
        "1 tensors that this model lacks, such as model.z",
    ),
    "misshapen": (lambda t, o: t.update({"model.a": torch.zeros(5, 6)}), "model.a has shape (5, 6)"),
    "too few rows": (lambda t, o: t.update({"model.a": torch.zeros(4, 7)}), "model.a has shape (4, 7)"),
    "another type": (
        lambda t, o: t.update({"model.a": torch.zeros(5, 7, dtype=torch.float64)}),
        "model.a has shape (5, 7) of torch.float64",
    ),
    "nan": (lambda t, o: t["model.a"].view(-1)[3:4].fill_(torch.nan), "model.a holds values that are not finite"),
    "inf in a moment": (
        lambda t, o: t["exp_avg.a"].view(-1)[3:4].fill_(torch.inf),
        "exp_avg.a holds values that are not finite",
    ),
    "rows that begin later": (
        lambda t, o: o.update({"model.a": {"saved_offsets": [1, 0]}}),
        "the parts of model.a do not fit together",
    ),
    "columns": (
        lambda t, o: o.update({"model.a": {"saved_offsets": [0, 1]}}),
        "the parts of model.a do not fit together",
    ),
    "offsets below 0": (lambda t, o: o.update({"model.a": {"saved_offsets": [-1, 0]}}), "do not fit together"),
    "offsets of 2^60": (lambda t, o: o.update({"model.a": {"saved_offsets": [1 << 60, 0]}}), "do not fit together"),
    "offsets that are texts": (lambda t, o: o.update({"model.a": {"saved_offsets": ["0", "0"]}}), "damaged (TypeError"),
    "no offsets": (lambda t, o: o.pop("model.a"), "damaged (KeyError"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_does_not_fit_is_named(tmp_path, what):
    change, words = HOSTILE[what]
    save(tmp_path, 1)
    forged(tmp_path / "step-000001", change)
    checkpoint.verify(tmp_path / "step-000001")
    want = tensors()
    with pytest.raises(UserError) as e:
        checkpoint.load(tmp_path / "step-000001", want)
    assert words in str(e.value) and len(str(e.value).splitlines()) == 1
    if "finite" not in words:  # found before anything was filled in
        assert all(torch.equal(want[k], v) for k, v in tensors().items())


def test_parts_that_overlap_or_leave_a_gap_are_refused(tmp_path):
    from safetensors.torch import save_file

    for first, second, words in ((3, 2, None), (3, 3, "do not fit"), (2, 2, "has shape (4, 7)")):
        folder = tmp_path / f"{first}{second}"
        save(folder, 1)
        part = torch.ones(second, 7)
        meta = {
            "DCP_SHARDING_INFO": json.dumps({"model.a": {"saved_offsets": [first if words != "do not fit" else 2, 0]}})
        }
        save_file({"model.a": part}, folder / "step-000001" / "shard-00002-model-00001-of-00001.safetensors", meta)
        forged(folder / "step-000001", lambda t, o, n=first: t.update({"model.a": t["model.a"][:n].clone()}))
        got = tensors(5)
        if words:
            with pytest.raises(UserError, match=words.replace("(", r"\(").replace(")", r"\)")):
                checkpoint.load(folder / "step-000001", got)
        else:
            checkpoint.load(folder / "step-000001", got)
            assert torch.equal(got["model.a"], torch.cat([tensors()["model.a"][:3], part]))


META = [
    ({"format": 2}, "format 2, expected 1: another version"),
    ({"step": "1"}, "step: got '1', expected int"),
    ({"version": True}, "version: got True"),
    ({"finished": "no"}, "finished: got 'no', expected bool"),
    ({"pinned": None}, "pinned: got None"),
    ({"path": []}, "path: got []"),
    ({"config": "x" * 10_000}, "config: got 'xxx"),
    ({"files": {}}, "0 files, version 1"),
    ({"version": -1}, "1 files, version -1"),
    ({"format": True}, "format True, expected 1"),
    ({"files": {"../../../etc/passwd.safetensors": {"bytes": 1, "sha256": "0" * 64}}}, "files: got '../../../etc"),
    ({"files": {"/etc/a.safetensors": {"bytes": 1, "sha256": "0" * 64}}}, "files: got '/etc"),
    ({"files": {"a.safetensors": {"bytes": 1e300, "sha256": "0" * 64}}}, "files: got 'a.safetensors'"),
    ({"files": {"a.safetensors": {"bytes": 1, "sha256": "no"}}}, "files: got 'a.safetensors'"),
    ({"files": {"a.safetensors": 7}}, "damaged (TypeError"),
    ({"files": {"a.pt": {"bytes": 1, "sha256": "0" * 64}}}, "files: got 'a.pt'"),
]


@pytest.mark.parametrize("change, words", META)
def test_metadata_that_cannot_be(tmp_path, change, words):
    save(tmp_path, 1)
    file = tmp_path / "step-000001" / "meta.json"
    meta = {k: v for k, v in json.loads(file.read_text()).items() if k != "hash"}
    write_json(file, {**meta, **change}, checkpoint.UNHASHED)
    with pytest.raises(UserError) as e:
        checkpoint.verify(tmp_path / "step-000001")
    assert words in str(e.value) and str(file) in str(e.value) and len(str(e.value)) < 400


def test_absurd_sizes_are_not_read(tmp_path):
    save(tmp_path, 1)
    file = tmp_path / "step-000001" / "meta.json"
    with open(file, "wb") as f:
        f.truncate(1 << 40)  # a terabyte, sparse
    with pytest.raises(UserError, match="damaged"):
        checkpoint.verify(tmp_path / "step-000001")


def test_one_byte_in_each_of_fifty_places_and_every_truncation_is_found(tmp_path):
    save(tmp_path, 1)
    folder = tmp_path / "step-000001"
    rng = random.Random(1)
    files = sorted(folder.iterdir())
    whole = {f: f.read_bytes() for f in files}
    damages = []
    for _ in range(50):
        f = rng.choice(files)
        raw = bytearray(whole[f])
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        damages.append((f, bytes(raw)))
    damages += [(f, whole[f][:n]) for f in files for n in (0, 1, len(whole[f]) // 2, len(whole[f]) * 99 // 100)]
    for f, raw in damages:
        f.write_bytes(raw)
        with pytest.raises(UserError):
            checkpoint.verify(folder)
        f.write_bytes(whole[f])
    checkpoint.verify(folder)


def test_too_little_room_is_said_before_a_byte_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    with pytest.raises(UserError, match=r"a checkpoint takes 0.01 MB and 0.00 MB are free; make room"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
