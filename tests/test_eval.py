"""Perplexity, its standard errors and samples, against slow independent versions of them."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import config
import eval as evaluation
import sample
from runtime import checkpoint
from runtime.errors import UserError
from runtime.files import write_json
from text import prepare, token_files

CPU = torch.device("cpu")


@pytest.fixture
def trained(train_cli, tmp_path):
    assert train_cli("--mode", "ptfs", "--version", "1") == 0
    return tmp_path / "run" / "ptfs-cosine" / "v1" / "step-000010"


def cli(*args, script="eval.py"):
    return subprocess.run([sys.executable, script, *map(str, args)], cwd=ROOT, capture_output=True, text=True)


def test_score_is_the_mean_over_every_token_and_by_document(trained, prepared):
    s = evaluation.score(trained, CPU, quiet=True)
    net, _ = evaluation.load_model(trained, CPU)
    stream = np.fromfile(prepared / "val.bin", "<u2").astype(np.int64)
    nats, document, by_document = [], 0, {}
    for i in range(0, len(stream) - 1, 32):  # one sequence at a time
        x, y = stream[i : i + 32][: len(stream) - 1 - i], stream[i + 1 : i + 33]
        logp = torch.log_softmax(net(torch.from_numpy(x)[None])[0].double(), -1)
        for t, target in enumerate(y):
            nats.append(-logp[t, target].item())
            by_document.setdefault(document, []).append(nats[-1])
            document += int(target == 256)
    assert len(nats) == len(stream) - 1 == s.tokens.sum()
    assert s.ppl == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)  # fp32 logits against fp64
    assert [len(v) for v in by_document.values()] == s.tokens.tolist()
    np.testing.assert_allclose([sum(v) for v in by_document.values()], s.nats, rtol=1e-4)


def test_shorter_windows_are_those_of_a_model_of_that_context(trained):
    net, _ = evaluation.load_model(trained, CPU)
    s = evaluation.score(trained, CPU, quiet=True, context=8)
    stream = np.fromfile(
        evaluation.open_data(trained, checkpoint.read_meta(trained), None).folder / "val.bin", "<u2"
    ).astype(np.int64)
    rows = torch.from_numpy(stream[: (len(stream) - 1) // 8 * 8]).view(-1, 8)
    targets = torch.from_numpy(stream[1 : rows.numel() + 1]).view(-1, 8)
    with torch.no_grad():
        assert s.nats.sum() == pytest.approx(
            net(rows, targets, "sum").item(), rel=1e-3
        )  # but for the last, shorter one
    assert s.ppl > evaluation.score(trained, CPU, quiet=True).ppl  # less to go by


def test_standard_errors_are_those_of_a_bootstrap_over_documents():
    r = np.random.default_rng(0)
    n = 400
    tokens = r.integers(50, 500, n)
    hard = r.normal(3, 0.5, n)
    a = evaluation.Score(tokens * (hard + r.normal(0, 0.05, n)), tokens)
    b = evaluation.Score(tokens * (hard + 0.1 + r.normal(0, 0.05, n)), tokens)
    drawn = r.integers(0, n, (4000, n))
    ppl = [np.exp(s.nats[drawn].sum(1) / s.tokens[drawn].sum(1)) for s in (a, b)]
    # 4,000 draws give a standard deviation to 1.1 %; the delta method is off by the square of a relative error of 3 %
    assert a.se == pytest.approx(ppl[0].std(), rel=0.05)
    difference, se = a.minus(b)
    assert difference == a.ppl - b.ppl and se == pytest.approx((ppl[0] - ppl[1]).std(), rel=0.05)
    assert se < a.se / 3  # pairing is what makes small differences visible


def test_appl():
    assert evaluation.appl({1: 99.0, 2: 20.0, 3: 22.0, 4: 27.0}, range(2, 5)) == 23.0
    assert evaluation.common([{1: 0, 2: 0, 3: 0, 5: 0}, {1: 0, 2: 0, 3: 0, 4: 0}]) == [
        2,
        3,
    ]  # a mean over others would not compare


def test_a_table_of_a_run_and_single_checkpoints(trained, train_cli, tmp_path):
    assert train_cli("--mode", "cpt", "--version", "2") == 0
    run = tmp_path / "run"
    table = json.loads(cli(run, "--json").stdout)
    one = json.loads(cli(trained, tmp_path / "run" / "cpt-cosine" / "v2" / "step-000020", "--json").stdout)
    ppls = [v["ppl"] for v in one.values()]
    assert table["ptfs-cosine"]["ppl"] == {"1": ppls[0]} and table["cpt-cosine"]["ppl"] == {"1": ppls[0], "2": ppls[1]}
    assert table["appl_versions"] == [] and math.isnan(table["cpt-cosine"]["appl"])  # PTFS has no version 2 here
    assert train_cli("--mode", "ptfs", "--version", "2") == 0
    assert json.loads(cli(run, "--json").stdout)["cpt-cosine"]["appl"] == ppls[1]
    text = cli(run).stdout
    assert f"{ppls[1]:.2f}" in text and "V2" in text and "documents" in text
    assert f"{ppls[1] - ppls[0]:+.3f} (SE" in cli(trained, run / "cpt-cosine" / "v2" / "step-000020").stdout


def test_a_sample_continues_its_prompt_and_repeats_with_its_seed(trained):
    a, b, c = (sample.continuations(trained, CPU, ["The whale"], 20, seed, None)[0] for seed in (1, 1, 2))
    assert a == b != c and a.startswith("The whale") and len(a) > len("The whale")
    assert cli(trained, "--prompt", "The whale", "--length", "20", script="sample.py").stdout == a + "\n"
    two = cli(trained, "--prompt", "The whale", "--prompt", "", "--length", "20", script="sample.py").stdout
    assert two.startswith(a + "\n\n")
    greedy = sample.continuations(trained, CPU, ["The whale"], 20, 1, None, temperature=0.0)
    assert greedy == sample.continuations(trained, CPU, ["The whale"], 20, 2, None, top_p=1e-9)
    assert len(sample.continuations(trained, CPU, ["x" * 100], 3, 1, None)[0]) > 100  # a prompt longer than the context


def test_bad_input(trained, tmp_path, prepared):
    (tmp_path / "empty").mkdir()
    for args, words in [
        ([tmp_path / "nowhere"], "does not exist"),
        ([tmp_path / "empty"], "holds no finished version"),
        ([trained, tmp_path / "empty"], "is no checkpoint"),
        ([trained, "--data", tmp_path / "empty"], "no prepared data"),
        ([trained, "--context", "x"], "invalid int value"),
        ([trained, "--context", "64"], "--context: got 64, expected at most the 32"),
        ([trained, "--context", "0"], "--context: got 0, expected 1 or more"),
    ]:
        r = cli(*args)
        assert r.returncode == 2 and words in r.stderr and len(r.stderr.splitlines()) == 1, r.stderr
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(50)))
    prepare.prepare(
        str(tmp_path / "other"), [str(tmp_path / "t.jsonl")], str(prepare.RANKS), [1], 0.5, jobs=1, quiet=True
    )
    with pytest.raises(UserError, match="its tokenizer is not the one"):
        evaluation.score(trained, CPU, str(tmp_path / "other"), quiet=True)
    meta = checkpoint.read_meta(trained)
    meta["config"]["model.n_layer"] = 2
    (trained / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="its hash does not fit its content"):
        evaluation.load_model(trained, CPU)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("model.hidden", 10**9, "model.context: got 32 and heads of 500000000"),
        ("model.hidden", 10**5, "of width 100,000 takes 640,"),
        ("model.n_layer", 10**9, "its model of 1,000,000,000 blocks of width 16 takes"),
        ("model.vocab_size", 2**62, "its tokenizer is not the one"),
        ("model.ffn", 10**15, "bytes, got files of"),
        ("model.context", 10**12, "model.context: got 1000000000000 and heads of 8"),
        ("model.n_layer", 2**64, "model.n_layer: got 18446744073709551616, expected a whole number"),
        ("model.n_layer", True, "model.n_layer: got True, expected a whole number"),
        ("model.n_layer", "1\n", r"model.n_layer: got '1\n', expected a whole number"),
        ("model.n_layer", 0, "model.n_layer: got 0, expected 1 or more"),
        ("model.n_head", 3, "model.n_head: got 3, expected a divisor"),
        ("model.rope_theta", 10**400, "model.rope_theta: got 1000"),
        ("model.rope_theta", float("nan"), "model.rope_theta: got nan"),
        ("model.hidden", ..., "its model of 1 blocks of width 64 takes"),
        ("data.path", 5, "no prepared data"),
        ("config", [], "config: got [], expected dict"),
        ("data", None, "data: got None, expected dict"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_a_hostile_shape_with_a_hash_that_fits_builds_nothing(trained, monkeypatch, key, value, words):
    meta = checkpoint.read_meta(trained)
    inside = meta["config"] if "." in key else meta
    inside[key] = value
    if value is ...:
        del inside[key]
    write_json(trained / "meta.json", meta, checkpoint.UNHASHED)
    if key.startswith("model"):
        monkeypatch.setattr(evaluation.llama, "Transformer", None)  # is not called
    with pytest.raises(UserError) as e:
        evaluation.score(trained, CPU, quiet=True)
    assert words in str(e.value) and len(str(e.value).splitlines()) == 1


def test_data_of_another_vocabulary_is_refused(trained, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "d")
    write_json(tmp_path / "d" / "meta.json", {**token_files.read_meta(prepared), "vocab_size": 300})
    with pytest.raises(UserError, match="its tokenizer is not the one"):
        evaluation.score(trained, CPU, str(tmp_path / "d"), quiet=True)


def test_models_are_those_of_their_configs(trained):
    net, meta = evaluation.load_model(trained, CPU)
    import model

    shape = config.Model(n_layer=1, n_head=2, hidden=16, vocab_size=257, context=32)
    assert sum(p.numel() for p in net.parameters()) == model.parameters(shape) and meta["step"] == 10
