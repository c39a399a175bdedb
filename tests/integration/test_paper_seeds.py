"""Seeds: each command that python -m paper launches or prints is its own cell's, each number its own checkpoint's."""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BASE, ROOT, InThisProcess

import config
import eval as evaluation
import train
from paper import __main__ as paper
from paper import downstream, graph, scales, tables, workers
from runtime import resume
from runtime.command_line import Parser

CPU = torch.device("cpu")

NAMES = ["table1", "table2", "table3", "table6", "table8", "table10", "table12", "table13", "fig4", "fig5"]


class Parsed(BaseException):
    """What train.py's command line names; no except clause of the program catches it."""


@pytest.fixture
def parse(monkeypatch):
    """parse(train.py's arguments) -> its own arguments and the config that it would run with."""
    original = Parser.parse_config

    def stop(*args, **kw):
        raise Parsed(original(*args, **kw))

    def run(words):
        with monkeypatch.context() as m, pytest.raises(Parsed) as parsed:
            m.setattr(Parser, "parse_config", stop)
            m.setattr(sys, "argv", ["train.py", *words])
            train.main()
        return parsed.value.args[0]

    return run


@pytest.fixture
def told(monkeypatch, capsys):
    """told(python -m paper's arguments) -> the lines that it prints in place of training."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["paper", *args, "--run", "no"])
        paper.main()
        *lines, last = capsys.readouterr().out.splitlines()
        assert "segments are not trained yet" in last
        return lines

    return run


def segment_of(o, c):
    return resume.pick(c, o.mode, o.version).segment


def cells_of(s, seeds):
    """The graph of all tables, built in the test: {folder: cell}."""
    cells: graph.Graph = {}
    for name in NAMES:
        for row in tables.TABLES[name](s).rows:
            for point in [*row.points.values(), *row.also]:
                for seed in seeds:
                    graph.add(cells, s, point, seed)
    return cells


def check_seeds(commands, root, cells, seeds, parse):
    """Each command, as train.py reads it, has its cell's config and its folder's seed; the rest is the same for all."""
    seen: dict[int, dict[str, dict]] = {seed: {} for seed in seeds}
    for words in commands:
        o, c = parse(words)
        folder = (Path(c.out).relative_to(root) / segment_of(o, c).name).as_posix()
        # the config's own seed, 1, has its base setting in the root itself
        (seed,) = map(int, re.findall(r"-s(\d+)/", folder) or [1])
        assert c.train.seed == seed == cells[folder].config.train.seed, words
        changed = {"out": "", "train.save_at": []}  # where it goes, and what others need of it
        values = config.values(c) | changed
        assert values == config.values(cells[folder].config) | changed, words
        parent = Path(o.parent).relative_to(root).as_posix() if o.parent else ""
        plain, its_parent = (name.replace(f"base-s{seed}/", "").replace(f"-s{seed}/", "/") for name in (folder, parent))
        kept = values | {"train.seed": 0, "train.save_at": c.train.save_at, "parent": its_parent}
        assert not parent or f"-s{seed}/" in parent or seed == 1
        assert seen[seed].setdefault(plain, kept) == kept, words
    first = seen[seeds[0]]
    assert first and all(of == first for of in seen.values())
    assert sum(map(len, seen.values())) == len(cells)
    return first


def test_printed_commands_have_the_seeds_of_their_cells(told, parse, tmp_path):
    """One after another as torchrun's: each parent is made by a line before its child's."""
    args = ["--scale", "paper", "--seeds", "2", "--schedules", "cosine,knee", "--out", str(tmp_path / "out")]
    lines = [line for line in told(*NAMES, *args) if line.startswith("torchrun ")]
    start = "torchrun --nproc_per_node 8 train.py "
    assert all(line.startswith(start) for line in lines)
    commands = [shlex.split(line.removeprefix(start)) for line in lines]
    s = scales.Setup(scales.load_scale("paper"), {}, ["cosine", "knee"])
    check_seeds(commands, tmp_path / "out", cells_of(s, [1, 2]), [1, 2], parse)

    made: set[str] = set()  # checkpoints
    for words in commands:
        o, c = parse(words)
        segment = segment_of(o, c)
        if segment.parent:
            assert (o.parent or f"{c.out}/{segment.parent[0]}/step-{segment.parent[1]:06d}") in made, words
        made |= {f"{c.out}/{segment.name}/step-{step:06d}" for step in [segment.end, *c.train.save_at]}
    assert len([line for line in told("table3", *args) if line.startswith(start)]) == 2 * (1 + 2 * 11 + 3)


def test_slurm_jobs_have_the_seeds_of_their_cells_and_wait_for_their_parents(told, parse, tmp_path):
    args = ["--scale", "paper", "--seeds", "2", "--schedules", "cosine", "--out", str(tmp_path / "out"), "--slurm"]
    lines = [line for line in told(*NAMES, *args) if "sbatch" in line]
    subprocess.run(["bash", "-n"], input="\n".join(lines), text=True, check=True)
    form = r"(\w+)=\$\(sbatch --parsable --job-name=(\S+?)(?: --dependency=(\w+):\$(\w+))? tools/slurm.sh (.*)\)"
    jobs = [re.fullmatch(form, line).groups() for line in lines]
    commands = [shlex.split(words) for *_, words in jobs]
    cells = cells_of(scales.Setup(scales.load_scale("paper"), {}, ["cosine"]), [1, 2])
    # a main path is several jobs, a version each; all end with the config of the cell but for the version
    check_seeds(commands, tmp_path / "out", cells, [1, 2], parse)
    assert len({job for job, *_ in jobs}) == len(jobs)

    of: dict[str, tuple] = {}  # job: its command, and the checkpoints that are there when it ends well
    for (job, _, kind, before, line), words in zip(jobs, commands, strict=True):
        o, c = parse(words)
        segment = segment_of(o, c)
        there: set[str] = set()
        if before:
            assert before in of  # a line of the shell above this one
            # afterok: it ended well, as did what it waited for; afterany: stopped perhaps, and the same line goes on
            assert kind == ("afterany" if of[before][0] == line else "afterok"), line
            there = of[before][1] if kind == "afterok" else of[before][2]
        if segment.parent:
            parent = o.parent or f"{c.out}/{segment.parent[0]}/step-{segment.parent[1]:06d}"
            assert parent in there, line
        if o.mode == "main" and int(o.version) > 1:
            # it goes on where the job of the version before ended: at that version's fork point
            assert f"{c.out}/main/step-{c.plan.fork(int(o.version) - 1):06d}" in there, line
        saves = {f"{c.out}/{segment.name}/step-{at:06d}" for at in [segment.end, *c.train.save_at] if at <= segment.end}
        of[job] = (line, there | saves, there)
    # 8 GPUs at 0.4 of 989e12 FLOP/s: 40,000 steps of 2^20 tokens of 6.813e9 FLOPs take 25.1 hours, 30,000 take 18.8,
    # and a job is of 20; a version of the main path, 10,000 steps, takes 6.3
    named = [name for _, name, *_ in jobs]
    for name, times in (("ptfs-cosine/v3", 1), ("ptfs-cosine/v4", 2), ("cpt-cosine/v4", 1), ("main", 4)):
        assert [named.count(f"{folder}{name}") for folder in ("", "base-s2/")] == [times] * 2
    made = set().union(*(after for _, after, _ in of.values()))
    assert {f"{tmp_path / 'out'}/{n}/step-{at:06d}" for n, cell in cells.items() for at in cell.required} <= made


def test_launched_commands_have_the_seeds_of_their_cells(prepared, parse, monkeypatch, tmp_path):
    """Processes that save what train.py would, and nothing else: each starts when its parent is there."""
    root, launched = tmp_path / "out", []

    class Process:
        returncode = 0

        def __init__(self, argv, **kw):
            words = argv[argv.index(str(ROOT / "train.py")) + 1 :]
            o, c = parse(words)
            segment = segment_of(o, c)
            if segment.parent:
                parent = Path(o.parent or f"{c.out}/{segment.parent[0]}/step-{segment.parent[1]:06d}")
                assert (parent / "meta.json").exists(), words
            whole = {segment.end, *c.train.save_at}
            self.saves = [Path(c.out) / segment.name / f"step-{at:06d}" for at in whole]
            points = set(segment.points) - whole if segment.paradigm == "main" else ()
            self.saves += [Path(c.out) / segment.name / "points" / f"step-{at:06d}" for at in points]
            launched.append(words)

        def poll(self):  # once: then it is over
            for folder in self.saves:
                folder.mkdir(parents=True, exist_ok=True)
                # no segment is trained twice, none in another's folder
                (folder / "meta.json").touch(exist_ok=False)
            return 0

    class Trained(Exception):
        pass

    def trained(*args, **options):
        raise Trained

    scale = tmp_path / "s.toml"  # its sizes are of the model that the command line gives
    scale.write_text(
        (ROOT / "configs" / "scales" / "tiny.toml").read_text().replace("model.hidden", "model.rope_theta")
    )
    scale.write_text(scale.read_text().replace("model.n_head = 4, ", ""))
    own = [*BASE, "--data.path", str(prepared), "--plan.versions", "2"]
    monkeypatch.setattr(workers, "subprocess", SimpleNamespace(Popen=Process, STDOUT=None))
    monkeypatch.setattr(evaluation, "scores", trained)
    argv = ["paper", *NAMES, *own, "--seeds", "2", "--train.seed", "5", "--schedules", "cosine", "--jobs", "500"]
    monkeypatch.setattr(sys, "argv", [*argv, "--out", str(root), "--run", "yes", "--scale", str(scale)])
    with pytest.raises(Trained):
        paper.main()
    overrides = {k.removeprefix("--"): v for k, v in zip(own[::2], own[1::2], strict=True)} | {"train.seed": "5"}
    s = scales.Setup(scales.load_scale(str(scale)), overrides, ["cosine"])
    first = check_seeds(launched, root, cells_of(s, [5, 6]), [5, 6], parse)
    assert len(launched) == 2 * len(first)


# ----------------------------------------------------------------------------------------------------------
# For real: two seeds of the smallest table


@pytest.fixture(scope="module")
def two_seeds(prepared, tmp_path_factory):
    """The folder of `python -m paper table1 --seeds 2`: two versions, one schedule, train.py in this process."""
    root = tmp_path_factory.mktemp("seeds") / "out"
    argv = ["paper", "table1", "--schedules", "cosine", "--seeds", "2", *BASE, "--data.path", str(prepared)]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(workers, "subprocess", SimpleNamespace(Popen=InThisProcess, STDOUT=None))
        m.setattr(sys, "argv", [*argv, "--plan.versions", "2", "--run", "yes", "--jobs", "64", "--out", str(root)])
        paper.main()
    return root


@pytest.fixture(scope="module")
def own_ppl(prepared):
    """own_ppl(checkpoint): a sequence at a time over val.bin, log-softmax and sum in float64."""
    stream = np.fromfile(prepared / "val.bin", "<u2").astype(np.int64)

    @torch.no_grad()
    def run(path):
        net, _ = evaluation.load_model(path, torch.device("cpu"))
        nats = 0.0
        for i in range(0, len(stream) - 1, 32):
            y = torch.from_numpy(stream[i + 1 : i + 33])
            x = torch.from_numpy(stream[i : i + len(y)])
            logp = torch.log_softmax(net(x[None])[0].double(), -1)
            nats -= logp[torch.arange(len(y)), y].sum().item()
        return math.exp(nats / (len(stream) - 1))

    return run


def test_each_number_of_a_record_is_its_own_checkpoints(two_seeds, own_ppl):
    record = json.loads((two_seeds / "results" / "table1.json").read_text())
    assert record["seeds"] == [1, 2] and record["columns"] == ["V2"]
    assert [r["name"] for r in record["rows"]] == ["PTFS", "CPT"]
    all_of_them = []
    for row, segment in zip(record["rows"], ("ptfs-cosine/v2", "cpt-cosine/v2"), strict=True):
        own = [own_ppl(two_seeds / folder / segment / "step-000020") for folder in ("", "base-s2")]
        # float32 logits and losses of batches of 1 and of 16 sequences: each some 1e-6 off, and of either sign
        assert row["seeds"]["V2"] == pytest.approx(own, rel=1e-5)
        assert row["ppl"]["V2"] == pytest.approx((own[0] + own[1]) / 2, rel=1e-5)
        all_of_them += own
    # four models of their own: 1e-3 is a hundred times the tolerance above
    assert all(abs(a / b - 1) > 1e-3 for i, a in enumerate(all_of_them) for b in all_of_them[:i])


def test_the_cpt_of_a_seed_starts_from_that_seeds_version_1(two_seeds):
    for seed, folder in ((1, ""), (2, "base-s2")):
        run = two_seeds / folder
        metas = {
            n: json.loads((run / n / "meta.json").read_text())
            for n in ("ptfs-cosine/v1/step-000010", "cpt-cosine/v2/step-000020")
        }
        assert {m["config"]["train.seed"] for m in metas.values()} == {seed}
        first, second = metas.values()
        assert second["parent"]["hash"] == first["hash"]


def test_scores_are_kept_by_weights_not_by_place(two_seeds, own_ppl, tmp_path):
    """Another model at the same path and step, beside the scores of the first."""
    there = tmp_path / "run" / "ptfs-cosine" / "v2" / "step-000020"
    found = []
    for folder in ("", "base-s2", ""):
        shutil.rmtree(there, ignore_errors=True)
        shutil.copytree(two_seeds / folder / "ptfs-cosine" / "v2" / "step-000020", there)
        found.append(evaluation.scores([there], CPU, jobs=64)[there].ppl)
        assert found[-1] == pytest.approx(own_ppl(there), rel=1e-5)  # as above
    assert found[0] == found[2] != found[1]
    # and one of the same name elsewhere, asked for together with it
    elsewhere = two_seeds / "base-s2" / "ptfs-cosine" / "v2" / "step-000020"
    both = evaluation.scores([there, elsewhere], CPU)
    assert [both[there].ppl, both[elsewhere].ppl] == found[:2]


def test_fine_tunings_of_two_seeds_have_a_folder_and_a_parent_each(two_seeds, parse, tmp_path):
    (tmp_path / "sft.jsonl").write_text('{"prompt": "Q:", "response": " red"}\n' * 80)
    s = scales.Setup(scales.load_scale("tiny"), {"train.device": "cpu"}, ["cosine"], tmp_path / "tuned")
    segments = ("ptfs-cosine/v2", "cpt-cosine/v2")
    at = {two_seeds / run / n / "step-000020": (run or "base-s1", n) for run in ("", "base-s2") for n in segments}
    settings = {p: run.replace("base-s1", "") for p, (run, _) in at.items()}
    found, results = downstream.tunings(s, settings, str(tmp_path / "sft.jsonl"), 1)
    assert len(found) == 4 and len(set(results.values())) == 4
    for name, node in found.items():
        o, c = parse(graph.command(found, node))
        (path,) = (p for p, n in at.items() if p == Path(o.parent))
        run, segment = at[path]
        assert Path(c.out).name.startswith(f"{run}-sft-") and name == f"{Path(c.out).name}/sft/{segment}"
        assert results[path].parent == tmp_path / "tuned" / name


def test_a_seed_begins_with_weights_of_its_own(train_cli, tmp_path):
    """A learning rate of 1e-12 leaves the weights where they begin: ten updates of Adam move each by 1e-11 or so."""
    nets = []
    for seed in ("1", "2"):
        words = ("--mode", "ptfs", "--version", "1", "--plan.max_lr", "1e-12", "--train.seed", seed)
        assert train_cli(*words, out=seed) == 0
        net, _ = evaluation.load_model(tmp_path / seed / "ptfs-cosine" / "v1" / "step-000010", torch.device("cpu"))
        nets.append([w for w in net.parameters() if w.dim() == 2])
    # an entry of the same weights would be equal to 1e-10; of two draws hardly one in a hundred is as near as 1e-4
    assert all(((a - b).abs() > 1e-4).float().mean() > 0.9 for a, b in zip(*nets, strict=True))
