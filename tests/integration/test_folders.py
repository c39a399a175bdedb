"""Processes that make one folder, or take one lock, at the same time."""

import multiprocessing
import os
from pathlib import Path

from runtime.errors import UserError
from runtime.files import lock, make_folder


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
