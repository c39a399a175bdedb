"""Log and validation loss against formulas, fp64 and loops over the raw files, on one rank and on two."""

import hashlib
import json
import shutil
import statistics

import numpy as np
import pytest
import torch
from runs import SHAPE, rate, records, run, run_on_ranks, weights, written_out

import config
import model
import train

T, STEPS = 32, 10
EVAL = 363  # 11 sequences of 32 tokens in batches of 4, 4 and 3 rows, and 11 tokens more
ARGS = ("--mode", "ptfs", "--version", "1", "--train.log_every", "1", "--train.micro_batch", "4")
ARGS += ("--train.eval_every", "5", "--train.eval_tokens", str(EVAL), "--train.save_at", "5", "--plan.warmup", "2")
WAYS = ("one process", "2 ranks, ddp", "2 ranks, fsdp")


@pytest.fixture(scope="module")
def runs(prepared, tmp_path_factory):
    """{way: the segment's folder} of one run in three ways."""
    work = tmp_path_factory.mktemp("ways")
    assert run(prepared, work / WAYS[0], *ARGS) == 0
    kinds = ((way, "--train.parallel", way[-4:].strip()) for way in WAYS[1:])
    run_on_ranks(2, prepared, work / "log", *((work / way, *ARGS, *kind) for way, *kind in kinds))
    return {way: work / way / "ptfs-cosine" / "v1" for way in WAYS}


@pytest.fixture(scope="module")
def written(prepared):
    return written_out(prepared, 1, STEPS)


def net_of(checkpoint):
    """The model of a checkpoint of the tests' shape, in fp64."""
    net = model.Transformer(config.load("tiny", SHAPE).model, torch.float64).double()
    net.load_state_dict({k: v.double() for k, v in weights(checkpoint).items()})
    return net


def nats(net, ids):
    """The negative log-likelihood of each token after the first, from all logits."""
    x = torch.tensor([int(i) for i in ids])
    with torch.no_grad():
        logp = net(x[None, :-1])[0].log_softmax(-1)
    return [-float(logp[i, t]) for i, t in enumerate(x[1:])]


@pytest.mark.parametrize("way", WAYS)
def test_the_log_is_of_the_update_that_was_made(runs, written, way):
    """Learning rate, tokens, loss and gradient norm of each update: formulas and fp64."""
    log = records(runs[way], "loss")
    assert sorted(log) == list(range(STEPS))
    # the same formula in the same precision, its terms perhaps in another order
    assert [log[s]["lr"] for s in range(STEPS)] == pytest.approx([rate(s, STEPS) for s in range(STEPS)], rel=1e-12)
    assert [log[s]["tokens"] for s in range(STEPS)] == [256 * (s + 1) for s in range(STEPS)]
    # fp32 rounding, 6e-8, through some ten sums of at most 257 terms; the updates before carry it on
    assert [log[s]["loss"] for s in range(STEPS)] == pytest.approx(written.losses, rel=1e-5)
    assert [log[s]["grad_norm"] for s in range(STEPS)] == pytest.approx(written.norms, rel=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_the_validation_loss_is_the_mean_over_tokens(runs, prepared, way):
    """Each of the first 363 targets of val.bin counts once, whatever batch it is in."""
    ids = np.fromfile(prepared / "val.bin", "<u2")[: EVAL + 1]
    log = records(runs[way], "val_loss")
    assert sorted(log) == [5, 10] and [log[s]["tokens"] for s in (5, 10)] == [5 * 256, 10 * 256]
    for step in (5, 10):
        net = net_of(runs[way] / f"step-{step:06d}")
        rows = [nats(net, ids[first : first + T + 1]) for first in range(0, EVAL, T)]
        assert [len(r) for r in rows] == [T] * 11 + [11]
        # fp32 sums of 128 terms, 6e-8 each; a mean over batches is off by 1e-4 at the least, which is asserted
        mean = sum(map(sum, rows)) / EVAL
        assert log[step]["val_loss"] == pytest.approx(mean, rel=2e-6)
        batches = [rows[0:4], rows[4:8], rows[8:11], rows[11:]]
        wrong = statistics.fmean(sum(map(sum, b)) / sum(map(len, b)) for b in batches)
        assert abs(wrong / mean - 1) > 1e-4


def test_validation_reads_all_of_it_where_there_is_less(prepared, tmp_path):
    """A limit beyond its end: every token of val.bin but the first."""
    assert run(prepared, tmp_path, "--mode", "ptfs", "--version", "1", "--train.eval_tokens", str(10**6)) == 0
    ids = np.fromfile(prepared / "val.bin", "<u2")
    net = net_of(tmp_path / "ptfs-cosine" / "v1" / "step-000010")
    rows = [nats(net, ids[first : first + T + 1]) for first in range(0, len(ids) - 1, T)]
    assert sum(map(len, rows)) == len(ids) - 1
    got = records(tmp_path / "ptfs-cosine" / "v1", "val_loss")[10]["val_loss"]
    assert got == pytest.approx(sum(map(sum, rows)) / (len(ids) - 1), rel=2e-6)  # as above


def test_a_fine_tuning_validates_on_what_it_held_out(prepared, tmp_path):
    """Its examples one at a time, held out by the hash of their text: the mean over the tokens of their responses."""
    examples = [(f"{i} plus {i % 7} is", f" {i + i % 7}" + "!" * (i % 5)) for i in range(400)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in examples))
    assert run(prepared, tmp_path, "--mode", "ptfs", "--version", "1") == 0
    parent = tmp_path / "ptfs-cosine" / "v1" / "step-000010"
    tune = ("--mode", "sft", "--parent", str(parent), "--data.sft", str(file), "--data.epochs", "1")
    assert run(prepared, tmp_path, *tune, "--plan.warmup", "1", "--train.eval_tokens", "4096") == 0
    folder = tmp_path / "sft" / "ptfs-cosine" / "v1"
    ((step, record),) = records(folder, "val_loss").items()
    net = net_of(folder / f"step-{step:06d}")

    def mean(chosen):
        of_responses = []
        for prompt, response in chosen:
            found = nats(net, [*prompt.encode(), *response.encode(), 256])
            of_responses += found[
                len(prompt) - 1 :
            ]  # what is predicted after the prompt's last token, and <|endoftext|>
            assert len(of_responses) and len(found) == len(prompt) + len(response)
        return sum(of_responses) / len(of_responses)

    def hashed(text):
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest()[:8], "little")

    held = [e for e in examples if hashed("".join(e)) < 2**64 / 50]
    trained = [e for e in examples if e not in held]
    assert 3 <= len(held) <= 20
    assert record["val_loss"] == pytest.approx(mean(held), rel=2e-6)  # as above
    assert (
        abs(mean(trained) / mean(held) - 1) > 1e-4 and abs(mean(examples) / mean(held) - 1) > 1e-4
    )  # else it shows nothing


def test_the_spike_guard_knows_only_the_losses_before(prepared, tmp_path, monkeypatch, capsys):
    """A run that reached its end goes back to a checkpoint: the median is that of what was logged before it."""
    args = ("--mode", "ptfs", "--version", "2", "--train.log_every", "1", "--train.save_at", "8,12")
    folder = tmp_path / "ptfs-cosine" / "v2"
    assert run(prepared, tmp_path, *args) == 0
    losses = [records(folder, "loss")[s]["loss"] for s in range(20)]
    for step in (12, 20):
        shutil.rmtree(folder / f"step-{step:06d}")
    original = train.Transformer.forward
    monkeypatch.setattr(train.Transformer, "forward", lambda self, *a, **kw: original(self, *a, **kw) * 3)
    capsys.readouterr()
    assert run(prepared, tmp_path, *args, "--train.spike", "1.0") == 2
    said = capsys.readouterr().err
    usual = statistics.median(losses[:8])
    spike = f"loss {3 * losses[8]:.4g}, more than train.spike = 1 above {usual:.4g}, the median"
    assert f"step 8, batch 8 of increment v1: {spike}" in said
    assert f"{usual:.4g}" not in (
        f"{statistics.median(losses):.4g}",
        f"{statistics.median(losses[:9]):.4g}",
    )  # else it shows nothing
