"""A checkpoint is complete or absent, and damage is found before it is loaded. So is a folder that is made."""

import hashlib
import json
import os
import random
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import ROOT
from helpers import forged

import config
from runtime import checkpoint, files
from runtime.errors import UserError
from runtime.files import is_locked, lock, make_folder, write_json

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
    checkpoint.load(tmp_path / "step-000007", got)
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
    """The k-th fsync or rename of a save fails, for every k: the old one loads, the new one is complete or absent."""
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
    ],
)
def test_damage_is_named_and_the_earlier_one_offered(tmp_path, damage, words):
    save(tmp_path, 1)
    save(tmp_path, 2)
    damaged(tmp_path / "step-000002", damage)
    with pytest.raises(UserError) as e:
        checkpoint.verify(tmp_path / "step-000002")
    assert words in str(e.value) and checkpoint.REPAIR in str(e.value)
    checkpoint.verify(tmp_path / "step-000001")


def test_a_file_that_does_not_belong_is_refused(tmp_path):
    save(tmp_path, 1)
    damaged(tmp_path / "step-000001", "extra")
    with pytest.raises(UserError, match=r"more\.safetensors: is no part of this checkpoint"):
        checkpoint.verify(tmp_path / "step-000001")


def test_an_empty_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="is no checkpoint"):
        checkpoint.verify(tmp_path)


def test_nothing_unpickles():
    for file in [*ROOT.glob("*.py")]:
        text = file.read_text()
        assert (
            "torch.load" not in text and "import pickle" not in text and not re.search(r"(?<![\w.])(eval|exec)\(", text)
        ), file


# ----------------------------------------------------------------------------------------------------------
# Checkpoints whose checksums hold, but which are not what the model needs


OTHER = {
    "missing": (
        lambda t, o: t.pop("model.a"),
        "model.a: got shape none, expected (5, 7): another model",
    ),
    "no moments": (
        lambda t, o: [t.pop(k) for k in ("exp_avg.a", "updates.a")],
        "exp_avg.a: got shape none, expected (5, 7): another model, or weights alone",
    ),
    "extra": (
        lambda t, o: t.update({"model.z": torch.zeros(2)}) or o.update({"model.z": {"saved_offsets": [0]}}),
        "model.z: got shape (2,), expected none",
    ),
    "another shape": (lambda t, o: t.update({"model.a": torch.zeros(5, 6)}), "got shape (5, 6), expected (5, 7)"),
}


@pytest.mark.parametrize("what", OTHER)
def test_what_does_not_fit_is_named(tmp_path, what):
    change, words = OTHER[what]
    save(tmp_path, 1)
    forged(tmp_path / "step-000001", change)
    checkpoint.verify(tmp_path / "step-000001")
    want = tensors()
    with pytest.raises(UserError) as e:
        checkpoint.load(tmp_path / "step-000001", want)
    assert words in str(e.value) and len(str(e.value).splitlines()) == 1


def test_weights_alone_and_rng_of_another_device(tmp_path):
    """model.* alone loads from a full checkpoint; rng.cuda, which a checkpoint of a CPU lacks, stays as it is."""
    save(tmp_path, 1)
    weights = {"model.a": torch.zeros(5, 7)}
    checkpoint.load(tmp_path / "step-000001", weights)
    assert torch.equal(weights["model.a"], tensors()["model.a"])
    assert "rng.cuda" not in checkpoint.fits(tmp_path / "step-000001", {**tensors(), "rng.cuda": torch.zeros(16)})


def test_metadata_of_another_format_step_or_kind(tmp_path):
    save(tmp_path, 1)
    file = tmp_path / "step-000001" / "meta.json"
    meta = {k: v for k, v in json.loads(file.read_text()).items() if k != "hash"}
    rest = {k: v for k, v in meta.items() if k != "files"}  # as the meta.json of prepared data
    for other, words in (
        ({**meta, "format": 2}, "format 2, expected 1: another version"),
        ({**meta, "step": 2}, "it is that of step 2"),
        (rest, "step-000001: is no checkpoint"),
    ):
        write_json(file, other)
        with pytest.raises(UserError) as e:
            checkpoint.verify(tmp_path / "step-000001")
        assert words in str(e.value)


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


# ----------------------------------------------------------------------------------------------------------
# The file as bytes


@pytest.mark.parametrize("chunk", [64, 1 << 24])
@pytest.mark.parametrize("in_background", [False, True])
def test_the_file_is_what_safetensors_itself_reads(tmp_path, monkeypatch, chunk, in_background):
    """With tensors that lie in several chunks, too. Names, shapes, dtypes, values, metadata; the checksum by hand."""
    monkeypatch.setattr(files, "CHUNK", chunk)
    want = {**tensors(), "model.b": torch.randn(3, 2, 5).bfloat16(), "model.c": torch.arange(9)}
    if in_background:
        saver = checkpoint.Saver(tmp_path)
        for step in (6, 7):  # the second in the memory of the first
            saver.save(step, {n: t + step if n == "model.c" else t for n, t in want.items()}, RECORD)
        saver.wait()
        want["model.c"] = want["model.c"] + 7
    else:
        checkpoint.save(tmp_path, 7, want, RECORD)
    file = next((tmp_path / "step-000007").glob("*.safetensors"))
    got = safetensors.torch.load_file(file)
    assert got.keys() == want.keys() and all(
        got[n].dtype == t.dtype and got[n].shape == t.shape and torch.equal(got[n], t) for n, t in want.items()
    )
    with safetensors.safe_open(file, "pt") as f:
        more = f.metadata()
    assert json.loads(more.pop("DCP_SHARDING_INFO")) == {n: {"saved_offsets": [0] * t.dim()} for n, t in want.items()}
    assert more == {"DCP_VERSION": "1.0", "format": "pt"}
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + length])
    del entries["__metadata__"]
    assert length % 8 == 0 and all(e["data_offsets"][0] % want[n].element_size() == 0 for n, e in entries.items())
    parts = [hashlib.sha256(raw[at : at + chunk]).digest() for at in range(0, len(raw), chunk)]
    record = {"bytes": len(raw), "chunked_sha256": hashlib.sha256(b"".join(parts)).hexdigest()}
    assert checkpoint.read_meta(tmp_path / "step-000007")["files"] == {file.name: record}
    checkpoint.verify(tmp_path / "step-000007")
    raw = bytearray(raw)
    raw[-1] ^= 1  # in the last chunk
    file.write_bytes(raw)
    with pytest.raises(UserError, match="its bytes have changed"):
        checkpoint.verify(tmp_path / "step-000007")


def test_checkpoints_with_a_checksum_of_the_whole_file_are_read_and_checked(tmp_path):
    """As they were written until November 2026, by safetensors."""
    save(tmp_path, 1)
    forged(tmp_path / "step-000001", lambda t, o: None)
    assert [set(r) for r in checkpoint.read_meta(tmp_path / "step-000001")["files"].values()] == [{"bytes", "sha256"}]
    checkpoint.verify(tmp_path / "step-000001")
    got = {k: torch.zeros_like(v) for k, v in tensors().items()}
    checkpoint.load(tmp_path / "step-000001", got)
    assert all(torch.equal(got[k], v) for k, v in tensors().items())
    damaged(tmp_path / "step-000001", "flipped")
    with pytest.raises(UserError, match="its bytes have changed"):
        checkpoint.verify(tmp_path / "step-000001")


def test_an_error_of_the_disk_names_the_file(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as e:
        save(tmp_path, 1)
    assert (e.value.errno, Path(e.value.filename).name) == (28, "shard-00001-model-00001-of-00001.safetensors")


# ----------------------------------------------------------------------------------------------------------
# What would happen on a GPU, without one


def test_a_save_of_tensors_on_the_cpu_does_not_touch_a_gpu(tmp_path, monkeypatch):
    """Where one is there: to wait for it starts CUDA, after which a process cannot fork."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: pytest.fail("waited for a GPU"))
    saver = checkpoint.Saver(tmp_path)
    saver.save(1, tensors(), RECORD)
    saver.wait()
    assert checkpoint.steps(tmp_path) == [1]


def test_pinned_memory_of_1_2b_wastes_little_and_a_gpu_is_waited_for(tmp_path, monkeypatch):
    """PyTorch rounds each piece of pinned memory up to a power of two (CachingHostAllocatorImpl::allocate)."""
    pieces, waits, real = [], [], torch.empty

    class OnGPU(torch.Tensor):
        is_cuda = True

    def empty(n, dtype, pin_memory):
        pieces.append((n, pin_memory))
        return real(n, dtype=dtype, device="meta")

    size = 80_000 + 12 * config.load("1.2b").model.parameters
    parts = [real(80_000, device="meta"), real(size - 80_000, device="meta").as_subclass(OnGPU)]
    saver = checkpoint.Saver(tmp_path)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(len(pieces)))
    saver._copy(parts)
    saver._copy(parts)  # in the same memory
    monkeypatch.undo()
    assert sum(n for n, _ in pieces) == size and all(pin for _, pin in pieces) and waits == 2 * [len(pieces)]
    assert sum(1 << (n - 1).bit_length() for n, _ in pieces) < 1.01 * size


# ----------------------------------------------------------------------------------------------------------
# Files and folders that several processes write


def test_a_lock_is_held_by_one_and_let_go(tmp_path):
    file = tmp_path / "x" / ".lock"
    for remove in (False, True):
        with lock(file, "busy", remove):
            assert is_locked(file)
            with pytest.raises(UserError, match="busy"), lock(file, "busy", remove):
                pass
        assert not is_locked(file) and file.exists() != remove


def test_a_folder_that_is_refused_leaves_nothing(tmp_path):
    target = tmp_path / "a" / "b" / "c"
    for error in (UserError, OSError, KeyboardInterrupt):
        with pytest.raises(error), make_folder(target) as work:
            (work / "file").write_text("half")
            raise error
        assert not list(tmp_path.iterdir())
    (tmp_path / "a" / "b" / ".c.partial" / "old").mkdir(parents=True)  # of a killed process
    with make_folder(target) as work:
        assert not list(work.iterdir()) and not target.exists()
        (work / "d").mkdir()
        (work / "d" / "file").write_text("whole")
        with pytest.raises(UserError, match="another process is making it"), make_folder(target):
            pass
    assert (target / "d" / "file").read_text() == "whole" and [p.name for p in target.parent.iterdir()] == ["c"]
    with pytest.raises(UserError, match="is there already"), make_folder(target):
        pass
    assert (target / "d" / "file").read_text() == "whole" and [p.name for p in target.parent.iterdir()] == ["c"]
