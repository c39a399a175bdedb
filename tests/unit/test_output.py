"""What is printed and written does not depend on the machine's encoding, and numbers beyond any use are one line."""

import ast
import os
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import cost
import data
from runtime.errors import UserError, user_errors
from text import token_files
from tools import paths

ROOMS = ("kernels", "runtime", "text", "tools", "paper", "bench")
SOURCES = [*ROOT.glob("*.py"), *(f for room in ROOMS for f in (ROOT / room).glob("*.py"))]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_text_can_be_printed_in_any_encoding(encoding):
    code = "from runtime.errors import user_errors\nwith user_errors('x'):\n    print('größer ± 鲸 \\udcff')"
    env = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    r = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
    expected = "größer ± 鲸 \udcff".encode(encoding, "backslashreplace")
    assert (r.returncode, r.stdout.strip()) == (0, expected), r.stderr


def test_text_files_are_opened_as_utf_8():
    """Without an encoding, Python takes the machine's, which may be Latin-1."""
    found = []
    for file in SOURCES:
        for call in ast.walk(ast.parse(file.read_text("utf-8"))):
            name = getattr(getattr(call, "func", None), "attr", getattr(getattr(call, "func", None), "id", ""))
            if not isinstance(call, ast.Call) or name not in ("open", "fdopen", "read_text", "write_text"):
                continue
            words = [a.value for a in call.args if isinstance(a, ast.Constant)]
            binary = any(isinstance(w, str) and "b" in w for w in words)
            ours = name == "write_text" and isinstance(call.func, ast.Name)  # of runtime.files
            opener = name == "open" and isinstance(call.func, ast.Attribute)  # of os and of libraries
            named = any(k.arg == "encoding" for k in call.keywords) or any("utf-8" in str(w) for w in words)
            if not (binary or ours or opener or named):
                found.append(f"{file.relative_to(ROOT)}:{call.lineno}")
    assert found == []


ABSURD = {
    cost: ["--peak 5e-324", "--peak nan", "--mfu 1e-308", "--price 1e308", "--plan.steps 9000000000000000000"],
    paths: [
        "--plan.versions 1000000000000",
        "--plan.versions 1e12",
        "--plan.steps " + "9" * 200,
        "--plan.steps 9000000000000000000",
        "--plan.increments 7,9000000000000000000",
        "--plan.max_lr 5e-324",
        "--plan.min_lr 5e-324",
        "--plan.alpha 5e-324",
        "--plan.cycle nan",
        "--plot NEW/plot.foo",
    ],
}


@pytest.mark.parametrize("script, words", [(s, w) for s, cases in ABSURD.items() for w in cases])
def test_absurd_numbers_are_refused_in_one_line(script, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script.__name__, *words.split()])
    with pytest.raises(SystemExit, match="2"), user_errors(script.__name__):
        script.main()
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and words.split()[0].strip("-") in err and "expected" in err
    assert list(tmp_path.iterdir()) == []


def test_a_main_path_may_be_empty(monkeypatch, capsys, tmp_path):
    """alpha 1 without a warm-up: the one branch leaves at step 0."""
    picture = tmp_path / "paths.png"
    words = f"--plan.alpha 1 --plan.warmup 0 --plan.versions 1 --plot {picture}"
    monkeypatch.setattr(sys, "argv", ["paths", *words.split()])
    paths.main()
    assert "no updates" in capsys.readouterr().out and picture.read_bytes()[1:4] == b"PNG"


def test_a_config_may_begin_with_a_byte_order_mark(monkeypatch, capsys, tmp_path):
    file = tmp_path / "bom.toml"
    file.write_bytes("﻿[plan]\nsteps = 50\n".encode())
    for script in (paths, cost):
        monkeypatch.setattr(sys, "argv", [script.__name__, "--config", str(file)])
        script.main()
        assert "290" in capsys.readouterr().out.replace(",", "")  # 4 * 50 + 3 * 30


def test_commands_in_errors_can_be_pasted(prepared, tmp_path):
    with pytest.raises(UserError) as missing:
        token_files.read_meta(folder := tmp_path / "my texts")
    shutil.copytree(prepared, folder)
    (short,) = data.Tokens(str(folder), 32, 1, [1] * 5, 0).problems(4, 5)
    for said, verb in ((str(missing.value), "prepare"), (short, "add")):
        words = shlex.split(said[said.index("python ") :])
        assert words[:5] == ["python", "data.py", verb, "--out", str(folder)]
