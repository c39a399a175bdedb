"""Files that several processes replace at the same time, and what killed ones leave."""

import multiprocessing
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
