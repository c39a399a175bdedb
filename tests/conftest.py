import os
import sys
from pathlib import Path

import pytest
import torch

# Without a GPU, Triton's kernels run in Triton's interpreter; the variable is read when they are imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # side by side with others; the shapes here gain nothing from more
ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A small prepared folder in bytes: 4 increments of about 37,000 tokens of the text that ships."""
    from text import prepare

    folder = tmp_path_factory.mktemp("data") / "bytes"
    text = tmp_path_factory.mktemp("text") / "some.jsonl"
    import lzma

    with lzma.open(prepare.TEXT, "rt") as f, open(text, "w") as g:
        g.writelines(line for _, line in zip(range(16), f, strict=False))
    # one long book cut into many documents spreads evenly
    import json

    docs = [json.loads(line)["text"] for line in open(text)]
    pieces = [d[i : i + 500] for d in docs for i in range(0, len(d), 500)]
    text.write_text("".join(json.dumps({"text": p}) + "\n" for p in pieces))
    prepare.prepare(str(folder), [str(text)], "bytes", jobs=1)
    return folder


SHAPE = "--model.n_layer 1 --model.n_head 2 --model.hidden 16 --model.vocab_size 257 --model.context 32".split()
BASE = (
    SHAPE
    + (
        "--plan.steps 10 --plan.warmup 2 --train.batch_tokens 256 --train.micro_batch 4 --train.eval_every 0 "
        "--train.eval_tokens 320 --train.checkpoint_every 0 --train.device cpu"
    ).split()
)


@pytest.fixture
def train_cli(prepared, tmp_path, monkeypatch):
    """run(*args, out=) -> exit code of train.py's main in this process, with a tiny model on the prepared bytes."""
    import train

    torch.set_num_threads(1)

    def run(*args, out="run", data=prepared):
        argv = ["train.py", "--config", "tiny", *BASE, "--data.path", str(data), "--out", str(tmp_path / out), *args]
        monkeypatch.setattr(sys, "argv", argv)
        try:
            train.main()
        except SystemExit as e:
            return e.code
        return 0

    return run


class InThisProcess:
    """A child of paper.workers' that runs train.py's main here, at once."""

    returncode = 0

    def __init__(self, argv, **kw):
        import train

        torch.set_num_threads(1)
        with pytest.MonkeyPatch.context() as m:
            m.setattr(sys, "argv", argv[argv.index(str(ROOT / "train.py")) :])
            train.main()

    def poll(self):
        return 0


@pytest.fixture
def second_save_fails(monkeypatch):
    """The second save from now on finds the disk full; the list that is returned counts them, and may be cleared."""

    from runtime import checkpoint

    original, calls = checkpoint.write_shard, []

    def full(*args, **kw):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", "shard")
        return original(*args, **kw)

    monkeypatch.setattr(checkpoint, "write_shard", full)
    return calls
