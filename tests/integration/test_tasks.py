"""Downstream tasks: the adapter against the harness's own, tables, local copies of datasets, ranks."""

import importlib
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_hf import byte_level, checkpoint_of

import config
import model
import sample
from runtime.errors import UserError, user_errors
from text.tokenizer import Tokenizer
from tools import harness, huggingface

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # of the ranks that are started
lm_eval = pytest.importorskip("lm_eval")

CPU = torch.device("cpu")
FIXTURES = ROOT / "tests" / "fixtures" / "tasks"
NAMES = ["choosing", "continuing", "reading"]
ALL = [str(FIXTURES / f"{n}.yaml") for n in NAMES]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Converted datasets go to a folder of this session; no retries of a network that is not there."""
    import datasets
    import huggingface_hub

    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()
    os.environ["HF_DATASETS_CACHE"] = str(datasets.config.HF_DATASETS_CACHE)


@pytest.fixture(scope="module", params=["bytes", "folder"])
def asked(request, tmp_path_factory):
    """(the adapter, our model) of the same weights, a token a byte: of bytes or of tokenizer.json."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = config.Model(n_layer=2, n_head=4, n_kv_head=2, hidden=32, vocab_size=257, context=96)
    net = model.Transformer(shape).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
        net.head.weight[97:123] += 0.5 * net.head.weight[97:123]  # letters are likelier, and so are stop strings
    if request.param == "bytes":
        return harness.LM(net, Tokenizer("bytes"), 3), net
    # byte-level BPE spells a byte as a printable character
    keep, rest = [*range(33, 127), *range(161, 173), *range(174, 256)], iter(range(256, 400))
    spelling = {chr(b) if b in keep else chr(next(rest)): b for b in range(256)}
    tok = tokenizers.Tokenizer(models.BPE(spelling, []))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(["<|endoftext|>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    tok.save(str(folder / "tokenizer.json"))
    return harness.LM(net, Tokenizer(str(folder)), 3), net


def requests(*args):
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, a, i, ("t", 7, 1)) for i, a in enumerate(args)]


def nats(net, before, after):
    """(nats of the ids `after`, is each the likeliest), from the logits that our model gives to the whole."""
    ids = (before + after)[-net.config.context - 1 :]
    with torch.no_grad():
        logits = net(torch.tensor([ids[:-1]]))[0, -len(after) :].log_softmax(-1)
    target = torch.tensor(after)
    return logits.gather(1, target[:, None]).sum().item(), bool((logits.argmax(-1) == target).all())


def test_log_likelihoods_are_those_of_our_model(asked):
    lm, net = asked
    pairs = [
        ("The whale", " swims"),
        ("The whale", " sings"),
        ("A or B? ", "A"),  # the space moves to the answer
        ("A or B? ", "B"),
        ("", "no context"),
        ("Ein Wal, größer als 40 Fuß:", " 鯨"),
        ("far too long for the context " * 10, " and cut on its left"),
        ("x", "y" * 96),
    ]
    found = lm.loglikelihood(requests(*pairs))
    for (question, answer), (value, best) in zip(pairs, found, strict=True):
        kept = list(question.rstrip().encode())
        expected = nats(net, kept or [256], list((question + answer).encode())[len(kept) :])
        assert (value, best) == (pytest.approx(expected[0], abs=1e-4), expected[1]), question
    # the likeliest next token is known to be it
    ids = list(b"The whale")
    best = net(torch.tensor([ids]))[0, -1].argmax().item()
    assert lm._loglikelihood_tokens([(None, ids, [best]), (None, ids, [best ^ 1])])[0][1] is True
    with pytest.raises(ValueError, match="an answer 'y* of 97 tokens, expected 1 to 96"):
        lm.loglikelihood(requests(("x", "y" * 97)))


END, MESSAGE, BEGIN = "<|endoftext|>", "<|im_end|>", "<s>"
BEGINNINGS = {  # files beside tokenizer.json, the token that its post-processor puts before a text, the expected start
    "ours": (None, None, END),
    "llama": ({"bos_token": {"__type": "AddedToken", "content": BEGIN}, "eos_token": END}, BEGIN, BEGIN),
    "bos, not added": ({"bos_token": BEGIN, "eos_token": MESSAGE}, None, BEGIN),
    "qwen": ({"bos_token": None, "eos_token": MESSAGE}, None, MESSAGE),
    "older files": ({}, BEGIN, BEGIN),
    "trained on messages": ({"eos_token": END}, None, END),
}


@pytest.fixture(scope="module", params=BEGINNINGS)
def exported(request, tmp_path_factory):
    """(the adapter, the harness's own on the exported folder, model, tokenizer): texts begin in different ways."""
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(1)
    settings, before, start = BEGINNINGS[request.param]
    folder = tmp_path_factory.mktemp("exported")
    named = byte_level(folder / "tok", [END, MESSAGE, BEGIN], [("a", "b"), ("Ġ", "x")], before)
    if settings is not None:
        kept = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
        (folder / "tok" / "tokenizer_config.json").write_text(json.dumps(kept))
        (folder / "tok" / "generation_config.json").write_text(json.dumps({"eos_token_id": [256 + 2, 256 + 3]}))
    if not settings and before:
        (folder / "tok" / "special_tokens_map.json").write_text(json.dumps({"bos_token": BEGIN, "eos_token": END}))
    chat = request.param == "trained on messages"
    if chat:
        (folder / "tok" / "generation_config.json").write_text(json.dumps({"eos_token_id": 256 + 2}))
    made, tok, net = checkpoint_of(folder, named, named, noise=0.3, seen={"examples": "1", "chat": chat})
    assert tok.start == tok.hf.token_to_id(start)
    theirs = HFLM(
        pretrained=str(huggingface.export_model(str(made), str(folder / "hf"))),
        dtype="float32",
        batch_size=3,
        max_length=96,
        device="cpu",
    )
    return harness.LM(net, tok, 3, chat=chat), theirs, net, tok


def test_texts_begin_as_in_the_harness(exported):
    """With the tokenizer's own token where nothing is before a text, and with what its post-processor adds."""
    ours, theirs, *_ = exported
    texts = [("short",), ("a" * 96,), ("It was late, and the rain had not stopped. " * 7,), ("ab" * 97,)]
    assert ours.loglikelihood_rolling(requests(*texts)) == pytest.approx(
        theirs.loglikelihood_rolling(requests(*texts), disable_tqdm=True), abs=1e-3, rel=1e-6
    )
    pairs = [("", "no context"), ("The whale", " swims"), ("A or B? ", "A")]
    pairs += [(" \n", "x")] if ours.tok_encode("") else []  # the harness's own cannot without a token before it
    found = zip(ours.loglikelihood(requests(*pairs)), theirs.loglikelihood(requests(*pairs), True), strict=True)
    for mine, other in found:
        assert mine == (pytest.approx(other[0], abs=1e-4), other[1])
    how = {"until": ["e"], "max_gen_toks": 60}
    asked = [(text, how) for text in ("The ship", "One two three", "A", "größer als", "q", "zz", "To be", "or not")]
    mine, other = (lm.generate_until(requests(*asked), disable_tqdm=True) for lm in (ours, theirs))
    assert mine == other and len({*mine}) > 4


def test_a_token_that_spans_question_and_answer_is_the_answers(exported):
    lm, _, net, tok = exported
    ids = {token: tok.hf.token_to_id(token) for token in ("ab", "b", "c", "d", "Ġx", "Ġ")}
    first = lm.tok_encode("")  # what the tokenizer puts before every text
    begin = first or [tok.start]
    for asked, before, after in (
        (("cda", "b"), [*first, ids["c"], ids["d"]], [ids["ab"]]),
        (("a", "bc"), begin, [ids["ab"], ids["c"]]),  # nothing is left of the question
        (("c ", "x"), [*first, ids["c"]], [ids["Ġx"]]),
        (("  ", "xd"), begin, [ids["Ġ"], ids["Ġx"], ids["d"]]),  # spaces alone are the answer's
    ):
        for beside in ([], [("other", " words")]):  # alone in its batch, and not
            found = lm.loglikelihood(requests(asked, *beside))[0][0]
            assert found == pytest.approx(nats(net, before, after)[0], abs=1e-4) and found < -0.5, asked


def test_an_answer_of_nothing_is_refused(exported):
    lm = exported[0]
    for asked in (("A?", ""), ("A? ", ""), ("", "")):
        for beside in ([], [("other", " words")]):
            with pytest.raises(ValueError, match="an answer '' of 0 tokens, expected 1 to"):
                lm.loglikelihood(requests(*beside, asked))


def test_a_task_with_an_empty_choice_is_refused_by_name(tmp_path, trained):
    task = {"task": "odd", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "odd.jsonl"}}}
    task |= {"test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_target": 0}
    task |= {"target_delimiter": "", "doc_to_choice": "{{choices}}"}
    write(tmp_path / "odd.yaml", {**task, "metric_list": [{"metric": "acc"}]})  # JSON is YAML
    questions = [{"text": "A?", "choices": ["a", "b"]}, {"text": "B?", "choices": ["b", ""]}]
    write(tmp_path / "odd.jsonl", *questions)
    with pytest.raises(UserError, match="^--tasks .*odd.yaml: .*an answer '' of 0 tokens, expected 1 to"):
        harness.evaluate(trained, [str(tmp_path / "odd.yaml")], CPU, data_dir=str(tmp_path))
    # the first question alone: a score without a standard error
    found = harness.evaluate(trained, [str(tmp_path / "odd.yaml")], CPU, data_dir=str(tmp_path), limit=1)
    assert found["odd"]["n"] == 1 and found["odd"]["se"] is None


def test_a_task_file_is_a_program(tmp_path, trained):
    (tmp_path / "words.py").write_text("def text(doc):\n    return doc['text'] + ' by Python'\n")
    (tmp_path / "odd.yaml").write_text(
        "task: program\ndataset_path: json\ndataset_kwargs: {data_files: {test: p.jsonl}}\ntest_split: test\n"
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: !function words.text\n"
        "metric_list: [{metric: byte_perplexity}]\n"
    )
    write(tmp_path / "p.jsonl", {"text": "read"})
    name = str(tmp_path / "odd.yaml")
    (task,) = harness.leaves(harness.load((name,), str(tmp_path), None))
    assert task.doc_to_target(next(iter(task.eval_docs))) == "read by Python"
    assert harness.evaluate(trained, [name], CPU, data_dir=str(tmp_path))["program"]["value"] > 1


def test_whole_texts_are_scored_in_windows(asked):
    lm, net = asked
    texts = ["short", "a" * 96, "b" * 97]  # a window holds 96
    short, full, more = lm.loglikelihood_rolling(requests(*((t,) for t in texts)))
    assert short == pytest.approx(nats(net, [256], list(b"short"))[0], abs=1e-4)
    assert full == pytest.approx(nats(net, [256], [97] * 96)[0], abs=1e-3)
    assert more == pytest.approx(nats(net, [256], [98] * 96)[0] + nats(net, [98] * 96, [98])[0], abs=1e-3)


def test_answers_are_those_of_our_sampler(asked):
    """Greedy ones, up to a stop string or the end of a document; a long question is cut on its left."""
    lm, net = asked
    hows = [
        {"until": ["e"], "max_gen_toks": 40},
        {"until": ["th", "\n"], "max_gen_toks": 16, "do_sample": False},
        {"until": [], "max_gen_toks": 8, "temperature": 0.0},
    ]
    long = "cut to the context less the new tokens " * 5
    texts = ("The ship", "One two three", "A", long, "größer als")
    found = lm.generate_until(requests(*((text, how) for how in hows for text in texts)))
    expected = []
    for how in hows:
        for text in texts:
            new = how["max_gen_toks"]
            (ids,) = sample.generate(net, [list(text.encode())[new - 96 :]], new, {256})
            said = bytes(ids).decode(errors="replace")
            expected.append(min((said.split(stop)[0] for stop in how["until"]), key=len, default=said))
    assert found == expected and len({*found[:5]}) > 3
    assert any(len(t.encode()) < 40 for t in found[:5])


def test_the_letters_are_asked_as_the_examples_teach():
    """Each answer is the letter after the word's last; no question is an example; a constant is right 51 times."""
    (task,) = harness.load(("next_letter",), str(harness.OURS), None).values()
    examples = [json.loads(line) for line in open(harness.OURS / "letters" / "examples.jsonl")]
    taught = {e["prompt"]: e["response"] for e in examples}
    asked = {task.doc_to_text(d): task.doc_to_target(d) for d in task.eval_docs}
    assert (len(taught), len(asked)) == (250, 1000) and not taught.keys() & asked.keys()
    for prompt, letter in (taught | {p: f" {a}" for p, a in asked.items()}).items():
        word, arrow = prompt.split()
        assert (arrow, letter) == ("=>", f" {chr(ord(word[-1]) + 1)}")
    answers = list(asked.values())
    assert set(answers) < set(task.doc_to_choice(next(iter(task.eval_docs))))
    assert max(map(answers.count, answers)) == 51


def test_the_headline_of_a_task():
    both = {
        "exact_match,strict-match": 0.25,
        "exact_match_stderr,strict-match": 0.1,
        "exact_match,flexible-extract": 0.5,
        "exact_match_stderr,flexible-extract": 0.2,
        "alias": "x",
        "sample_len": 4,
    }
    assert harness.headline(both) == {"value": 0.5, "se": 0.2, "metric": "exact_match (flexible-extract)", "n": 4}
    assert harness.headline({"acc_norm,none": 1.0, "acc,none": 0.75, "acc_stderr,none": "N/A", "sample_len": 1}) == {
        "value": 0.75,
        "se": None,
        "metric": "acc",
        "n": 1,
    }
    assert (
        harness.headline({"word_perplexity,none": 9.0, "byte_perplexity,none": 2.0, "sample_len": 1})["metric"]
        == "word_perplexity"
    )
    assert (
        harness.headline({"exact_match,get-answer": 0.5, "exact_match_stderr,get-answer": math.nan, "sample_len": 1})[
            "se"
        ]
        is None
    )


def test_the_table_has_versions_and_paradigms_and_a_mean():
    def r(value, metric="acc"):
        return {"value": value, "se": 0.1, "metric": metric, "n": 8}

    record = harness.table(
        "t",
        ["Ver.", "TP"],
        [(["V2", "PTFS"], {"a": r(0.25), "b": r(0.5)}), (["V2", "Ours"], {"a": r(0.125), "b": r(1.0)})],
    )
    assert record["header"] == ["Ver.", "TP", "a", "b", "AVG"]
    assert record["rows"] == [["V2", "PTFS", "25.00", "50.00", "37.50"], ["V2", "Ours", "12.50", "100.00", "56.25"]]
    mixed = harness.table("t", ["checkpoint"], [(["x"], {"a": r(0.25), "b": r(7.5, "word_perplexity")})])
    assert mixed["rows"] == [["x", "25.00", "7.50", "-"]] and mixed["notes"] == [
        "a: acc, %, of 8",
        "b: word_perplexity, of 8",
    ]


# ----------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def trained(train_cli, tmp_path):
    assert train_cli("--mode", "ptfs", "--version", "1") == 0
    return tmp_path / "run" / "ptfs-cosine" / "v1" / "step-000010"


def test_a_run_and_two_ranks(trained, train_cli, tmp_path, monkeypatch, capsys):
    assert train_cli("--mode", "cpt", "--version", "2") == 0
    ask = ["--tasks", ",".join(ALL), "--data_dir", str(FIXTURES), "--device", "cpu"]

    def said(*args):
        monkeypatch.setattr(sys, "argv", ["harness", *map(str, args), *ask])
        capsys.readouterr()
        harness.main()
        return capsys.readouterr()

    r = said(tmp_path / "run")
    second = trained.parents[2] / "cpt-cosine" / "v2" / "step-000020"  # version 1 is both paradigms'
    assert [line.split()[0] for line in r.out.splitlines()[1:3]] == [str(trained), str(second)]
    assert "2 of 2: " in r.err and "choosing: acc, %, of 14" in r.out
    one = json.loads(said(tmp_path / "run", "--json").out)
    assert list(one) == [str(trained), str(second)] and one[str(trained)] != one[str(second)]
    assert list(one[str(trained)]) == NAMES
    limited = harness.evaluate(trained, ALL[:1], CPU, None, str(FIXTURES), limit=2, num_fewshot=0)
    assert limited["choosing"]["n"] == 4

    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = subprocess.run(
        [*start, "-m", "tools.harness", str(trained), *ask, "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert two.stderr.count(f": {trained}: ") == 1, two.stderr  # one rank speaks
    (found,) = json.loads(two.stdout).values()
    for name, want in one[str(trained)].items():
        for key, value in want.items():  # sums in another order
            assert found[name][key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), (
                name,
                key,
            )
    with pytest.raises(UserError, match="colours has 1 questions for 2 ranks"):
        harness.check(harness.load(tuple(ALL), str(FIXTURES), None), 32, 1, 2)


def write(file, *rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def test_our_own_tasks_load_local_copies(tmp_path, trained):
    ask = {
        "id": 0,
        "context": ["甲：你要茶吗？", "乙：要。"],
        "question": "乙要什么？",
        "choice": ["茶", "水", "酒"],
        "answer": "茶",
    }
    write(
        tmp_path / "clue" / "clue" / "README.md",
        "---\nconfigs:\n- config_name: c3\n  data_files:\n  - {split: train, path: c3/train.jsonl}\n"
        "  - {split: validation, path: c3/validation.jsonl}\n---\n",
    )
    for split in ("train", "validation"):
        write(tmp_path / "clue" / "clue" / "c3" / f"{split}.jsonl", ask, {**ask, "choice": ["水", "茶"]})
    for split in ("train", "test"):
        write(
            tmp_path / "ydli-ai" / "CSL" / "benchmark" / "cls_ctg" / f"{split}.tsv",
            'to category\t"纸船"的浮力\t理学\n',
            "to category\t陶罐上的纹样\t艺术学\n",
        )
    questions = {
        "keywords": "x",
        "example": [
            {"question": f"{i}．一加一等于（　　） \nA．1\nB．2\nC．3\nD．4\n", "answer": ["B"], "index": i, "score": 4}
            for i in range(2)
        ],
    }
    for subject in OURS_GAOKAO:
        write(tmp_path / "OpenLMLab" / "GAOKAO-Bench" / "Data" / "Objective_Questions" / f"{subject}.json", questions)
    found = harness.load(("c3", "csl", "gaokao"), str(tmp_path), None)
    c3, csl = found["c3"], found["csl"]
    doc = list(c3.eval_docs)[1]
    assert (
        c3.doc_to_text(doc) == "文章：甲：你要茶吗？\n乙：要。\n问题：乙要什么？\n答案："
        and c3.doc_to_choice(doc)[c3.doc_to_target(doc)] == "茶"
    )
    docs = list(csl.eval_docs)
    assert csl.doc_to_text(docs[0]) == '论文标题："纸船"的浮力\n论文门类：' and [
        csl.doc_to_target(d) for d in docs
    ] == [
        "理学",
        "艺术学",
    ]
    g = harness.leaves({"gaokao": found["gaokao"]})
    doc = next(iter(g[0].eval_docs))
    assert len(g) == 7 and g[0].doc_to_text(doc).endswith("D．4\n答案：")
    assert [
        g[0].process_results(doc, [(-9.0, False)] * i + [(-1.0, False)] + [(-9.0, False)] * (3 - i))["acc"]
        for i in range(4)
    ] == [0, 1, 0, 0]
    assert csl.process_results(docs[1], [(-9.0, False)] * 9 + [(-1.0, False)] + [(-9.0, False)] * 3)["acc"] == 1
    result = harness.evaluate(trained, ["c3", "csl", "gaokao"], CPU, data_dir=str(tmp_path), batch=5)
    assert {n: r["n"] for n, r in result.items()} == {"c3": 2, "csl": 2, "gaokao": 14} and {
        r["metric"] for r in result.values()
    } == {"acc"}


OURS_GAOKAO = (
    "2010-2022_Biology_MCQs",
    "2010-2022_Chemistry_MCQs",
    "2010-2013_English_MCQs",
    "2010-2022_History_MCQs",
    "2010-2022_Math_I_MCQs",
    "2010-2022_Math_II_MCQs",
    "2010-2022_Political_Science_MCQs",
)


def test_the_harness_has_the_papers_tasks_and_loads_local_copies(tmp_path):
    for split in ("train", "test"):
        write(
            tmp_path / "openai" / "gsm8k" / "main" / f"{split}.jsonl",
            *({"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(8)),
        )
    write(
        tmp_path / "openai" / "gsm8k" / "README.md",
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: train, path: main/train.jsonl}\n"
        "  - {split: test, path: main/test.jsonl}\n---\n",
    )
    gsm8k = harness.load(("gsm8k",), str(tmp_path), None)["gsm8k"]
    assert gsm8k.doc_to_text(gsm8k.eval_docs[3]) == "Question: What is 3 + 1?\nAnswer:"
    with pytest.raises(UserError, match="gsm8k asks for 256 new tokens, and the model's context is 96"):
        harness.check({"gsm8k": gsm8k}, 96, None, 1)
    harness.check({"gsm8k": gsm8k}, 257, None, 8)
    names = ("mmlu", "bbh", "agieval", "ceval-valid", "cmmlu")
    known = harness.catalogue((harness.OURS,), True)
    assert set(names) <= set(known.all_groups)
    for name, copy in zip(
        names, ("cais/mmlu", "SaylorTwift/bbh", "hails/agieval-", "ceval/ceval-exam", "haonan-li/cmmlu"), strict=True
    ):
        with pytest.raises(UserError, match=f"Couldn't reach '{copy}.*on the Hub"):
            harness.load((name,), str(tmp_path), None)


@pytest.mark.parametrize(
    "args, words",
    [
        (["--tasks", "gsmk8"], "'gsmk8' is not a registered task/group/tag name"),
        (
            ["--tasks", FIXTURES / "nothing.yaml"],
            "nothing.yaml: the harness cannot run it (FileNotFoundError",
        ),
        (["--tasks", "c3", "--data_dir", "nowhere"], "No such file or directory: 'nowhere'); correct the task, or"),
        (["--tasks", "c3", "--data_dir", FIXTURES], "(ConnectionError: Couldn't reach 'clue/clue' on the Hub"),
        (["--tasks", "csl", "--data_dir", FIXTURES], "/fixtures/tasks/ydli-ai/CSL/benchmark/cls_ctg/train.tsv'); "),
        (["--tasks", "c3", "--limit", "9" * 200], "--limit: got 99999999999999999999, expected 1 or more, below 10^12"),
        (["--tasks", "c3", "--num_fewshot", str(10**12)], "--num_fewshot: got 1000000000000, expected 0 or more"),
        (["--tasks", "csl"], "/ydli-ai/CSL/benchmark/cls_ctg/train.tsv'); correct the task, or"),
        (["--tasks", "c3"], "; correct the task, or put its dataset below --data_dir"),
        (["--tasks", ","], "--tasks: got no name"),
        (["--tasks", "c3", "--limit", "0"], "--limit: got 0, expected 1 or more"),
        (["--tasks", "c3", "--batch", "0"], "--batch: got 0, expected 1 or more"),
        (["--tasks", "c3", "--num_fewshot", "-1"], "--num_fewshot: got -1, expected 0 or more"),
        (["--tasks", ALL[0], "--data_dir", FIXTURES], "is no checkpoint"),
    ],
    ids=lambda v: " ".join(map(str, v))[-40:] if isinstance(v, list) else "",
)
def test_bad_input(tmp_path, monkeypatch, capsys, args, words):
    (tmp_path / "meta.json").write_text("{}")  # no model is read before all this is known
    if "is no checkpoint" in words:
        (tmp_path / "meta.json").unlink()
        args, tmp_path = [tmp_path, *args], FIXTURES
    monkeypatch.setattr(sys, "argv", ["harness", str(tmp_path), *map(str, args)])
    with pytest.raises(SystemExit) as e, user_errors("harness"):
        harness.main()
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert e.value.code == 2 and len(lines) == 1 and words in lines[0], lines


def test_a_dataset_is_read_as_the_file_says_or_refused(tmp_path, trained):
    task = {"task": "odd", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "odd.jsonl"}}}
    task |= {"test_split": "test", "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": ""}
    task |= {"generation_kwargs": {"until": ["x"], "max_gen_toks": 4, "num_beams": 2}}
    write(tmp_path / "odd.yaml", {**task, "metric_list": [{"metric": "exact_match"}]})  # JSON is YAML
    write(tmp_path / "odd.jsonl", {"text": "a"})
    name = str(tmp_path / "odd.yaml")
    assert harness.evaluate(trained, [name], CPU, data_dir=str(tmp_path))["odd"]["n"] == 1
    write(tmp_path / "odd.jsonl", "not JSON\n")
    with pytest.raises(UserError, match="the harness cannot run it .DatasetGenerationError"):
        harness.load((name,), str(tmp_path), 1)


def test_several_tasks_without_a_score_of_their_own_are_refused(tmp_path):
    shown = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "a.jsonl"}}, "test_split": "test"}
    shown |= {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "a", "tag": "marked"}
    for name in ("one", "two"):
        write(tmp_path / f"{name}.yaml", {"task": name, **shown})
    write(tmp_path / "a.jsonl", {"text": "a"})
    write(tmp_path / "both.yaml", {"group": "both", "task": ["one", "two"]})
    group = str(tmp_path / "both.yaml")
    for names in ((group,), (group, "marked")):
        with pytest.raises(UserError, match="got both, which has no score of its own; name some of one, two"):
            harness.load(names, str(tmp_path), None)
    with pytest.raises(UserError, match="got marked, which has no score of its own; name some of one, two"):
        harness.load((str(tmp_path / "one.yaml"), "marked"), str(tmp_path), None)


def test_without_the_harness(monkeypatch):
    monkeypatch.delitem(sys.modules, "tools.harness")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="--tasks needs the package lm-eval .*: pip install"):
        importlib.import_module("tools.harness")


@pytest.mark.parametrize(
    "text, words",
    [
        ("task: [a]\n", "the harness cannot run it"),
        ("{", "the harness cannot run it"),
        (
            "task: x\ndataset_path: json\ndataset_kwargs: {data_files: {test: q.jsonl}}\ntest_split: zzz\n"
            "output_type: multiple_choice\n",
            "the harness cannot run it",
        ),
        ("task: x\ndoc_to_text: !function utils.go\n", "the harness cannot run it .ImportError"),
        ("task: !!python/object/apply:os.system ['true']\n", "the harness cannot run it"),
    ],
)
def test_broken_task_files_are_one_line(tmp_path, text, words):
    (tmp_path / "t.yaml").write_text(text)
    (tmp_path / "q.jsonl").write_text('{"question": "a"}\n')
    with pytest.raises(UserError, match=words) as e:
        harness.load((str(tmp_path / "t.yaml"),), str(tmp_path), None)
    assert len(str(e.value).splitlines()) == 1
