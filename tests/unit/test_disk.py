"""Files that several processes replace at the same time, and what killed ones leave."""

import multiprocessing
import os
import time
from pathlib import Path

from runtime import files
from runtime.files import write_text

SPAWN = multiprocessing.get_context("spawn")  # a fork of a process that has threads may hang


def write_many(file, letter, start, said):
    """200 times the same text, after all are ready. What goes wrong is said."""
    start.wait()
    try:
        for _ in range(200):
            write_text(Path(file), letter * 5000)
        said.put("")
    except OSError as e:
        said.put(repr(e))


def test_two_processes_that_write_one_file_do_not_disturb_each_other(tmp_path):
    """As two segments of a run do with config.toml: no write fails, and the file is always whole."""
    file = tmp_path / "config.toml"
    write_text(file, "a" * 5000)
    start, said = SPAWN.Barrier(3), SPAWN.Queue()
    writers = [SPAWN.Process(target=write_many, args=(str(file), letter, start, said)) for letter in "ab"]
    for p in writers:
        p.start()
    start.wait(60)
    seen = set()
    while any(p.is_alive() for p in writers):
        seen.add(file.read_text())
    for p in writers:
        p.join()
    assert [said.get(timeout=10) for _ in writers] == ["", ""]
    assert seen <= {"a" * 5000, "b" * 5000} and [f.name for f in tmp_path.iterdir()] == ["config.toml"]


def test_what_killed_writes_left_is_removed_and_what_is_being_written_is_not(tmp_path):
    file, ours, theirs = tmp_path / "meta.json", tmp_path / ".meta.json.partial", tmp_path / ".other.json.0a.partial"
    left, new, folder = (
        tmp_path / ".meta.json.0a.partial",
        tmp_path / ".meta.json.0b.partial",
        tmp_path / ".meta.json.d.partial",
    )
    for f in (ours, theirs, left, new):
        f.write_text("half")
    folder.mkdir()
    for f in (ours, theirs, left, folder):
        os.utime(f, (time.time() - 2 * files.STALE,) * 2)
    write_text(file, "whole")
    assert file.read_text() == "whole"
    assert set(tmp_path.iterdir()) == {file, theirs, new, folder}


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    write_text(file := tmp_path / "a", "old")
    for kind in (OSError, KeyboardInterrupt):
        try:
            with files.replacing(file) as partial:
                partial.write_text("half")
                raise kind
        except kind:
            pass
        assert list(tmp_path.iterdir()) == [file] and file.read_text() == "old"
