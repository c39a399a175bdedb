"""Perplexity, its standard errors and samples, against slow independent versions of them."""

import io
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch

import config
import eval as evaluation
import sample
from runtime import checkpoint, device, resume
from runtime.errors import UserError, user_errors
from runtime.files import sha256, write_json
from text import prepare, token_files

CPU = torch.device("cpu")


@pytest.fixture
def trained(train_cli, tmp_path):
    assert train_cli("--mode", "ptfs", "--version", "1") == 0
    return tmp_path / "run" / "ptfs-cosine" / "v1" / "step-000010"


@pytest.fixture
def cli(monkeypatch, capsys):
    """run(*args, script=) -> what it prints; an exit code of 2 and an error for bad input."""

    def run(*args, script=evaluation, code=0):
        monkeypatch.setattr(sys, "argv", ["x", *map(str, args)])
        capsys.readouterr()
        found = 0
        try:
            with user_errors("x"):
                script.main()
        except SystemExit as e:
            found = e.code
        out, err = capsys.readouterr()
        assert found == code, err
        return err if code else out

    return run


def test_score_is_the_mean_over_every_token_and_by_document(trained, prepared):
    s = evaluation.score(trained, CPU)
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
    s = evaluation.score(trained, CPU, evaluation.Text(context=8))
    stream = np.fromfile(evaluation.open_data(trained)[0].folder / "val.bin", "<u2").astype(np.int64)
    rows = torch.from_numpy(stream[: (len(stream) - 1) // 8 * 8]).view(-1, 8)
    targets = torch.from_numpy(stream[1 : rows.numel() + 1]).view(-1, 8)
    with torch.no_grad():
        assert s.nats.sum() == pytest.approx(
            net(rows, targets, "sum").item(), rel=1e-3
        )  # but for the last, shorter one
    assert s.ppl > evaluation.score(trained, CPU).ppl  # less to go by


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


def test_appl_of_a_run_is_over_all_versions_of_the_table():
    """39.80 of V2 to V4 was 35.76, that of V4 alone, once a run had a row with V4 alone."""
    ppl = {"ours": {1: 64.37, 2: 44.65, 3: 38.99, 4: 35.76}, "mixed": {4: 36.43}, "cpt": {1: 67.41, 2: 48.1, 3: 41.42}}
    tokens = np.array([100, 300])
    known = {
        f"{n} {v}": evaluation.Score(math.log(x) * tokens, tokens) for n, row in ppl.items() for v, x in row.items()
    }
    head, *rows = evaluation.run_table({n: {v: f"{n} {v}" for v in row} for n, row in ppl.items()}, known)
    assert head[1:] == ["V1", "V2", "V3", "V4", "APPL of V2, V3, V4"]
    appl = f"{(44.65 + 38.99 + 35.76) / 3:.2f}"
    assert [(row[0], row[-1]) for row in rows] == [("ours", appl), ("mixed", "-"), ("cpt", "-")]
    assert rows[1][1:4] == ["-"] * 3 and rows[1][4].startswith("36.43 (")


def test_a_version_that_one_paradigm_alone_has_is_not_in_appl():
    tokens = np.array([100, 300])
    known = {v: evaluation.Score(math.log(50 - v) * tokens, tokens) for v in range(1, 6)}
    run = {"ptfs": [1, 2, 3, 4], "cpt": [1, 2, 3, 4], "ours": [1, 2, 3, 4, 5]}
    head, *rows = evaluation.run_table({n: {v: v for v in versions} for n, versions in run.items()}, known)
    assert head[5:] == ["V5", "APPL of V2, V3, V4"] and [row[-1] for row in rows] == ["47.00"] * 3


def test_one_document_has_no_standard_error(trained, prepared, tmp_path, cli):
    """The influence of a single document is 0 by construction, which is no certainty."""
    one = evaluation.Score(np.array([300.0]), np.array([100]))
    assert one.se is None and one.minus(evaluation.Score(np.array([310.0]), np.array([100])))[1] is None
    shutil.copytree(prepared, tmp_path / "d")
    ids = np.fromfile(prepared / "val.bin", "<u2")
    ids = ids[: list(ids).index(256) + 1]
    ids.tofile(tmp_path / "d" / "val.bin")
    meta = token_files.read_meta(prepared)
    sums = {**meta["val"]["sha256"], "bin": sha256(tmp_path / "d" / "val.bin")}
    val = {**meta["val"], "documents": 1, "tokens": len(ids), "sha256": sums}
    write_json(tmp_path / "d" / "meta.json", {**meta, "val": val})
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    _, *rows, last = cli(trained, other, "--data", tmp_path / "d").splitlines()
    assert [row.split()[2] for row in rows] == ["-", "+0.000"] and "(" not in "".join(rows) and "1 documents" in last
    (row, _) = json.loads(cli(trained, other, "--data", tmp_path / "d", "--json"))["val"].values()
    assert row["se"] is None and row["ppl"] > 1
    _, *rows, last = cli(tmp_path / "run", "--data", tmp_path / "d").splitlines()
    assert [row.split() for row in rows] == [["ptfs-cosine", f"{row['ppl']:.2f}", "-"]] and "1 documents" in last


def test_checkpoints_of_other_held_out_text_are_not_compared(trained, prepared, tmp_path, cli):
    """As many documents and tokens, but another text: refused before anything is scored."""
    shutil.copytree(prepared, tmp_path / "d")
    ids = np.fromfile(prepared / "val.bin", "<u2")
    ids[5] += 1
    ids.tofile(tmp_path / "d" / "val.bin")
    meta = token_files.read_meta(prepared)
    sums = {**meta["val"]["sha256"], "bin": sha256(tmp_path / "d" / "val.bin")}
    write_json(tmp_path / "d" / "meta.json", {**meta, "val": {**meta["val"], "sha256": sums}})
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    meta = checkpoint.read_meta(other)
    meta["config"]["data.path"] = str(tmp_path / "d")
    write_json(other / "meta.json", {k: v for k, v in meta.items() if k != "hash"})
    assert "have different validation sets" in cli(trained, other, code=2)
    assert cli(trained, other, "--data", tmp_path / "d").count("step-000010") == 1


def test_a_score_is_measured_once_for_a_model_a_text_and_a_context(trained, tmp_path, monkeypatch):
    measured = []
    original = evaluation.load_model
    monkeypatch.setattr(evaluation, "load_model", lambda *a: measured.append(a) or original(*a))
    (first,) = evaluation.scores([trained], CPU).values()
    (again,) = evaluation.scores([trained], CPU).values()
    assert len(measured) == 1 and (again.nats == first.nats).all() and (again.tokens == first.tokens).all()
    (short,) = evaluation.scores([trained], CPU, evaluation.Text(context=8)).values()
    assert len(measured) == 2 and short.ppl > first.ppl
    assert evaluation.scores([trained], CPU)[trained].ppl == first.ppl == evaluation.score(trained, CPU).ppl

    # a damaged file is measured again, as is a model whose code has changed; the order is that of the paths
    file, _ = sorted((trained.parent / "scores").iterdir(), key=lambda f: f.stat().st_mtime_ns)
    np.savez(other := io.BytesIO(), nats=np.array([1.0]), tokens=np.array([1]))
    for damaged in (b"", file.read_bytes()[:100], b"text", other.getvalue()):
        file.write_bytes(damaged)
        assert evaluation.scores([trained], CPU)[trained].ppl == first.ppl
    assert len(measured) == 7  # one by `score` itself
    other = tmp_path / "other" / "step-000010"
    shutil.copytree(trained, other)
    assert list(evaluation.scores([other, trained], CPU)) == [other, trained]
    (tmp_path / "code" / "kernels").mkdir(parents=True)
    (tmp_path / "code" / "model.py").write_text("another model")
    monkeypatch.setattr(evaluation, "__file__", str(tmp_path / "code" / "eval.py"))
    evaluation.scores([trained], CPU)
    assert len(measured) == 9


def test_a_kept_score_does_not_hide_that_weights_are_missing(trained):
    evaluation.scores([trained], CPU)
    (weights,) = trained.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match="safetensors: got .* bytes, expected"):
        evaluation.scores([trained], CPU)


def test_a_folder_that_cannot_be_written_is_scored(trained, tmp_path):
    (trained.parent / "scores").write_text("in the way, as a read-only folder is")
    assert evaluation.scores([trained], CPU)[trained].ppl == evaluation.score(trained, CPU).ppl


def test_one_thread_for_a_small_model_unless_the_user_says_otherwise(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    device.tune_cpu(CPU, 262_464)
    assert not chosen  # OMP_NUM_THREADS is given in all tests
    monkeypatch.delenv("OMP_NUM_THREADS")
    device.tune_cpu(CPU, 1_214_095_872)
    device.tune_cpu(torch.device("cuda"), 262_464)
    assert not chosen
    device.tune_cpu(CPU, 262_464)
    assert chosen == [1]


def test_a_model_without_a_perplexity_is_refused(trained, monkeypatch):
    for factor in (1e4, float("nan")):  # exp of 50,000 nats overflows; JSON has no NaN
        with monkeypatch.context() as m:
            m.setattr(evaluation.Transformer, "forward", lambda net, x, y, reduction, f=factor: y.double() * 0 + f)
            with pytest.raises(UserError, match="nats a token, no perplexity"):
                evaluation.score(trained, CPU)


def test_a_table_of_a_run_and_single_checkpoints(trained, train_cli, tmp_path, cli):
    assert train_cli("--mode", "cpt", "--version", "2") == 0
    run = tmp_path / "run"
    found = json.loads(cli(trained, cpt := run / "cpt-cosine" / "v2" / "step-000020", "--json"))["val"]
    assert list(found) == [str(trained), str(cpt)]
    one, two = ({form: f"{s['ppl']:{form}} ({s['se']:{form}})" for form in (".2f", ".3f")} for s in found.values())
    head, *rows, last = cli(run).splitlines()
    assert rows[0].split() == ["cpt-cosine", *one[".2f"].split(), *two[".2f"].split(), f"{found[str(cpt)]['ppl']:.2f}"]
    assert rows[1].split() == ["ptfs-cosine", *one[".2f"].split(), "-", "-"]  # it has no version 2 here
    assert (
        head.endswith("APPL of V2")
        and last.startswith("val: ")
        and last.endswith(" documents")
        and "; SE over " in last
    )
    assert train_cli("--mode", "ptfs", "--version", "2") == 0
    assert cli(run).splitlines()[1] == rows[0]
    first, second = cli(trained, cpt).splitlines()[1:3]
    difference = found[str(cpt)]["ppl"] - found[str(trained)]["ppl"]
    assert first.split()[:-1] == [str(trained), *one[".3f"].split(), "-"]
    assert second.split()[:4] == [str(cpt), *two[".3f"].split(), f"{difference:+.3f}"] and second.split()[4][0] == "("
    assert second.split()[-1] == f"{found[str(cpt)]['loss']:.4f}"


def test_versions_are_found_by_what_is_recorded(trained, tmp_path):
    """Folders of any name: CPT has the version 1 that it descends from, and a fine-tuned CPT has its fine-tuning."""
    meta = checkpoint.read_meta(trained)

    def record(segment, version, parent=None, path_parent=None, **data):
        folder = tmp_path / "r" / segment / "step-000010"
        folder.mkdir(parents=True)
        own = {"segment": segment, "version": version, "parent": parent and {"segment": parent, "step": 10}}
        path = {**meta["path"], "parent": (path_parent or parent) and [path_parent or parent, 10]}
        made = {**meta, **own, "path": path, "data": {**meta["data"], **data}}
        write_json(folder / "meta.json", made)
        return folder

    a1, b2 = record("a/v1", 1), record("b/v2", 2, "a/v1")
    b3, c2 = record("b/v3", 3, "b/v2"), record("c/v2", 2, "import", "main")
    tuned = [record(f"sft/{s}", v, s, epochs=1) for s, v in (("a/v1", 1), ("b/v3", 3))]
    (lost := tmp_path / "r" / "b" / "v4" / "step-000040").mkdir(parents=True)
    with pytest.raises(UserError, match=r"step-000040: in the way of a checkpoint and not one \(no meta.json\)"):
        resume.finished(tmp_path / "r")
    lost.rmdir()
    assert resume.finished(tmp_path / "r") == {
        "a": {1: a1},
        "b": {1: a1, 2: b2, 3: b3},
        "c": {2: c2},
        "sft/a": {1: tuned[0]},
        "sft/b": {1: tuned[0], 3: tuned[1]},
    }


def test_a_sample_continues_its_prompt_and_repeats_with_its_seed(trained, cli):
    def drawn(*how):
        return sample.continuations(trained, CPU, ["The whale"], 20, sample.Sampling(*how))[0]

    a, b, c = drawn(1.0, 1.0, 1), drawn(1.0, 1.0, 1), drawn(1.0, 1.0, 2)
    assert a == b != c and a.startswith("The whale") and len(a) > len("The whale")
    assert cli(trained, "--prompt", "The whale", "--length", "20", script=sample) == a + "\n"
    two = cli(trained, "--prompt", "The whale", "--prompt", "", "--length", "20", script=sample)
    assert two.startswith(a + "\n\n")
    assert drawn(0.0) == drawn(1.0, 1e-9, 2)
    (text,) = sample.continuations(trained, CPU, ["x" * 100], 3, sample.Sampling())  # longer than the context
    assert len(text) > 100


@pytest.mark.parametrize("script, more", [(evaluation, ()), (sample, ("--prompt", "x"))])
def test_an_empty_name_is_not_the_current_folder(trained, prepared, cli, monkeypatch, script, more):
    for there, args in ((prepared, (trained, "--data", "")), (trained, ("",))):
        monkeypatch.chdir(there)
        said = cli(*args, *more, script=script, code=2)
        assert "got '', expected a folder" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "option", ["--length 0", "--temperature nan", "--temperature -1", "--top_p 0", "--top_p 1.5", "--seed -1"]
)
def test_options_of_a_sample_are_refused_by_name(trained, cli, option):
    said = cli(trained, "--prompt", "x", *option.split(), script=sample, code=2)
    assert said.startswith(f"x: error: {option.split()[0]}: got ") and "expected" in said


def test_bad_input(trained, tmp_path, prepared, cli):
    (tmp_path / "empty").mkdir()
    for args, words in [
        ([tmp_path / "nowhere"], "is not there; expected RUN/SEGMENT/step-NUMBER"),
        ([tmp_path / "empty"], "is no checkpoint; expected RUN"),
        ([trained, tmp_path / "empty"], "is no checkpoint"),
        ([trained, "--data", tmp_path / "empty"], "no prepared data"),
        ([trained, "--context", "x"], "invalid int value"),
        ([trained, "--context", "64"], "--context: got 64, expected 0 to 32"),
        ([trained, "--context", "-1"], "--context: got -1, expected 0 to 32"),
    ]:
        said = cli(*args, code=2)
        assert words in said and len(said.splitlines()) == 1, said
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(50)))
    prepare.prepare(str(tmp_path / "other"), [str(tmp_path / "t.jsonl")], str(prepare.RANKS), [1], 0.5, jobs=1)
    with pytest.raises(UserError, match="its tokenizer is not that of"):
        evaluation.score(trained, CPU, evaluation.Text(str(tmp_path / "other")))
    meta = checkpoint.read_meta(trained)
    meta["config"]["model.n_layer"] = 2
    (trained / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="its hash does not fit its content"):
        evaluation.load_model(trained, CPU)


def test_data_of_another_vocabulary_is_refused(trained, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "d")
    write_json(tmp_path / "d" / "meta.json", {**token_files.read_meta(prepared), "vocab_size": 300})
    with pytest.raises(UserError, match="its tokenizer is not that of"):
        evaluation.score(trained, CPU, evaluation.Text(str(tmp_path / "d")))


def test_models_are_those_of_their_configs(trained):
    net, meta = evaluation.load_model(trained, CPU)

    shape = config.Model(n_layer=1, n_head=2, hidden=16, vocab_size=257, context=32)
    assert sum(p.numel() for p in net.parameters()) == shape.parameters and meta["step"] == 10


def test_several_texts_and_the_mean_over_those_seen(train_cli, prepared, tmp_path, cli):
    """PPL on each held-out text is that of scoring it alone; an increment that is still to come is not in the mean."""
    folder = shutil.copytree(prepared, tmp_path / "data")
    lines = [json.dumps({"text": f"{n} other words, {n * n} of them, " * 40}) for n in range(60)]
    (tmp_path / "new.jsonl").write_text("\n".join(lines))
    prepare.add(str(folder), [str(tmp_path / "new.jsonl")], jobs=1, val=0.3)
    for version in ("4", "5"):
        assert train_cli("--mode", "ptfs", "--version", version, "--plan.steps", "4", data=folder) == 0
    run = tmp_path / "run"
    old, new = run / "ptfs-cosine" / "v4" / "step-000016", run / "ptfs-cosine" / "v5" / "step-000020"
    alone = {
        (p, name): evaluation.score(p, CPU, evaluation.Text(name=name))
        for p in (old, new)
        for name in ("val", "val-v5")
    }
    found = json.loads(cli(old, new, "--json"))
    assert {(p, n): s["ppl"] for n, of in found.items() for p, s in of.items()} == {
        (str(p), n): s.ppl for (p, n), s in alone.items()
    }
    said = cli(run).splitlines()
    assert said[0].split()[2:4] == ["val", "val-v5"] and [line.split()[1] for line in said[1:]] == ["V4", "V5"]
    mean = np.mean([alone[new, n].loss for n in ("val", "val-v5")])
    assert said[1].endswith(f"{alone[old, 'val'].loss:.4f} of 1") and said[2].endswith(f"{mean:.4f} of 2")
    # folders by --data, each once
    both = cli(old, "--data", prepared, "--data", folder).splitlines()
    assert both[0].split()[2:5] == [f"{prepared}/val", f"{folder}/val", f"{folder}/val-v5"] and "of 2" in both[1]
