"""A checkpoint is whole or not there, and nothing in it is trusted unread."""

import json
import os

import pytest
import torch
from conftest import ROOT

import checkpoint
import disk
from config import UserError

RECORD = {"segment": "main", "version": 1, "path": {}, "finished": False, "parent": None, "config": {}, "data": {}, "pinned": False}


def tensors(seed=0):
    torch.manual_seed(seed)
    return {"model.a": torch.randn(5, 7), "exp_avg.a": torch.randn(5, 7), "updates.a": torch.tensor(3.0), "rng.cpu": torch.get_rng_state()}


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
        meta["hash"] = disk.content_hash(meta, checkpoint.UNHASHED)
        (folder / "meta.json").write_text(json.dumps(meta))
    else:
        file.write_bytes(raw[: int(len(raw) * damage)])


@pytest.mark.parametrize("damage, words", [("missing", "is missing"), ("flipped", "its bytes have changed"), (0, "got 0 bytes"), (0.5, "bytes, expected"), (0.99, "bytes, expected"), ("meta", "damaged"), ("bit", "damaged"), ("path", "names of files")])  # fmt: skip
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
    with disk.lock(tmp_path / "x" / ".lock", "busy"), pytest.raises(UserError, match="busy"), disk.lock(tmp_path / "x" / ".lock", "busy"):
        pass
    with disk.lock(tmp_path / "x" / ".lock", "busy"):
        pass


def test_nothing_unpickles():
    for file in [*ROOT.glob("*.py")]:
        text = file.read_text()
        assert "torch.load" not in text and "import pickle" not in text and "eval(" not in text.replace(".eval()", "") and "exec(" not in text
