"""Processes that make one folder, or take one lock, or train in one run, at the same time."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

from conftest import BASE, ROOT

import config
from runtime import checkpoint
from runtime.errors import UserError
from runtime.files import lock, make_folder
from text import prepare
from text.examples import prepare_examples
from text.tokenizer import Tokenizer


def contend(folder, start, said):
    """Make 100 folders, all at the same time as others: how many of them were made, and what else went wrong."""
    for i in range(100):
        start.wait(60)
        try:
            with make_folder(Path(folder) / f"{i}") as work:
                (work / "pid").write_text(str(os.getpid()))
            said.put((i, "made"))
        except UserError as e:
            said.put((i, "refused" if "another process" in str(e) or "is there already" in str(e) else str(e)))
        except Exception as e:
            said.put((i, repr(e)))


def test_of_processes_that_make_one_folder_exactly_one_does(tmp_path):
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    start, said = spawn.Barrier(3), spawn.Queue()
    makers = [spawn.Process(target=contend, args=(str(tmp_path), start, said)) for _ in range(3)]
    for p in makers:
        p.start()
    results = sorted(said.get(timeout=60) for _ in range(300))
    for p in makers:
        p.join()
    assert results == sorted((i, word) for i in range(100) for word in ("made", "refused", "refused"))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(map(str, range(100)))  # no locks, no partial folders


def enter_and_leave(file, inside, start, said):
    """Take a lock that is removed on leaving, again and again; say how often another process held it as well."""
    start.wait(60)
    together, taken = 0, 0
    for _ in range(2000):
        try:
            with lock(Path(file), "busy", remove=True):
                taken += 1
                try:
                    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    together += 1
                os.unlink(inside)
        except UserError:
            pass
    said.put((together, taken))


def test_a_lock_that_is_removed_is_never_held_twice(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    start, said = spawn.Barrier(3), spawn.Queue()
    args = (str(tmp_path / ".lock"), str(tmp_path / "inside"), start, said)
    processes = [spawn.Process(target=enter_and_leave, args=args) for _ in range(3)]
    for p in processes:
        p.start()
    results = [said.get(timeout=60) for _ in processes]
    for p in processes:
        p.join()
    assert all(together == 0 and taken > 0 for together, taken in results), results


def share(cwd, start, said):
    """Prepare the text that ships, and then examples, at the same time as others."""
    os.chdir(cwd)
    prepare.TEXT = Path("text.jsonl")
    start.wait(60)
    try:
        prepare.ship(config.Data().path)
        said.put(str(prepare_examples("examples.jsonl", Tokenizer("bytes"), Path("run"))))
    except Exception as e:
        said.put(repr(e))


def test_what_several_runs_need_is_prepared_once_and_the_others_wait(tmp_path):
    rows = [{"prompt": f"{i} + 1 =", "response": str(i + 1)} for i in range(50)]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"document {i} " * 9}) + "\n" for i in range(200)))
    spawn = multiprocessing.get_context("spawn")
    start, said = spawn.Barrier(3), spawn.Queue()
    makers = [spawn.Process(target=share, args=(str(tmp_path), start, said)) for _ in range(3)]
    for p in makers:
        p.start()
    folders = {said.get(timeout=120) for _ in makers}
    for p in makers:
        p.join()
    (made,) = folders  # the same for all, and no error
    assert sorted(f.name for f in (tmp_path / made).iterdir()) == sorted(
        ["meta.json", "ids.bin", "loss.bin", "ends.bin", "held.bin"]
    )
    assert [f.name for f in (tmp_path / "data").iterdir()] == ["demo"] and len(list((tmp_path / "run").iterdir())) == 1


EIGHT = """
import json, sys
import soak  # imports all once; the eight are forks of this process
runs = [soak.Run(argv, log=soak.Path(sys.argv[2])) for argv in json.loads(sys.argv[1])]
print([code for run in runs for code in run.wait()])
"""


def test_eight_segments_of_one_run_start_at_once(prepared, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    common = ["--config", "tiny", *BASE, "--data.path", str(prepared), "--out", str(out), "--mode", "ptfs"]
    made = [(name, version) for name in ("cosine", "knee") for version in "1234"]
    argvs = [[*common, "--version", v, "--plan.schedule", name] for name, v in made]
    command = [sys.executable, "-c", EIGHT, json.dumps(argvs), str(log)]
    r = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests")
    assert r.stdout.strip() == str([0] * 8), r.stderr + log.read_text()
    for name, v in made:
        (step,) = checkpoint.steps(folder := out / f"ptfs-{name}" / f"v{v}")
        assert step == 10 * int(v) and checkpoint.read_meta(checkpoint.path(folder, step))["finished"]
    config.load(str(out / "config.toml"))  # written by one of them, whole
    assert sorted(f.name for f in out.iterdir()) == ["config.toml", "ptfs-cosine", "ptfs-knee"]
