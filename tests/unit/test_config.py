import tomllib

import pytest
from conftest import ROOT

import config
import schedule
from runtime import distributed
from runtime.command_line import Parser
from runtime.errors import UserError

NAMES = sorted(f.stem for f in (ROOT / "configs").glob("*.toml"))


def refused(*overrides, name="tiny"):
    with pytest.raises(UserError) as e:
        config.load(name, dict(overrides))
    return str(e.value).splitlines()


def test_all_configs_are_there():
    assert set(NAMES) >= {"tiny", "small", "203m", "406m", "608m", "1.2b", "2.1b", "3.1b", "qwen-1.2b"}


@pytest.mark.parametrize("name", NAMES)
def test_resolved_config_can_be_loaded_again(name, tmp_path):
    c = config.load(name, {"plan.cycle": "inf", "plan.increments": "5,6"})
    (tmp_path / "config.toml").write_text(config.to_toml(c))
    assert config.load(str(tmp_path / "config.toml")) == c


def test_overrides_are_typed():
    c = config.load(
        "tiny",
        {
            "plan.alpha": "none",
            "plan.decay_steps": "7",
            "plan.increments": "700,500",
            "data.repeat": "true",
            "plan.cycle": "inf",
            "plan.max_lr": "1",
        },
    )
    p = c.plan
    assert (p.alpha, p.decay_steps, p.T, c.data.repeat, p.cycle) == (None, [7], [700, 500], True, float("inf"))
    assert type(c.plan.max_lr) is float


def test_a_key_of_the_command_line_replaces_the_files_alternative(tmp_path):
    file = tmp_path / "c.toml"

    def plan(text, **keys):
        file.write_text(f"[plan]\nwarmup = 1\n{text}")
        return config.load(str(file), {f"plan.{k}": v for k, v in keys.items()}).plan

    assert plan("alpha = 0.6", decay_steps="7").decays == [7]
    assert plan("decay_steps = 7", alpha="0.5").decays == [50]
    assert plan("decay_steps = 7", alpha="none").decays == [7]
    assert plan("decay_steps = 7", alpha="none", decay_steps="8").decays == [8]
    assert plan("decay_steps = [7, 9]").decays == plan("alpha = 0.6", decay_steps="7,9").decays == [7, 9]
    for key in ("steps", "versions"):  # which of the lengths to keep, nobody can tell
        with pytest.raises(UserError, match=f"plan.{key}: the file has plan.increments; give --plan.increments"):
            plan("increments = [9, 8]", **{key: "5"})
    assert plan("increments = [9, 8]", steps="5", increments="5,5,5").T == [5] * 3
    assert plan("versions = 3\nsteps = 5", increments="9,8").T == [9, 8]
    for text, keys in (("alpha = 0.6\ndecay_steps = 7", {}), ("", {"alpha": "0.6", "decay_steps": "7"})):
        p = plan(text, **keys)  # both in one place: refused where the plan is made
        assert schedule.problems(p, "ours") == ["decay_steps: got [7], expected none beside alpha = 0.6"]


@pytest.mark.parametrize(
    "override, line",
    [
        (("model.n_layers", "3"), "unknown key model.n_layers; did you mean model.n_layer?"),
        (("max_lr", "3"), "unknown key max_lr; did you mean plan.max_lr?"),
        (("model.n_layer", "3.5"), "model.n_layer: got '3.5', expected a whole number"),
        (("model.n_layer", "0"), "model.n_layer: got 0, expected 1 or more"),
        (("data.repeat", "1"), "data.repeat: got '1', expected true or false"),
        (("data.repeat", "yes"), "data.repeat: got 'yes', expected true or false"),
        (("plan.max_lr", "high"), "plan.max_lr: got 'high', expected a number"),
        (("plan.increments", "5,x"), "plan.increments: got '5,x', expected a list of whole numbers"),
        (("data.increments", "5,0"), "data.increments: got [5, 0], expected 1 or more"),
        (("train.clip", "nan"), "train.clip: got nan, expected 1e-12 or more"),
        (("train.beta2", "1"), "train.beta2: got 1.0, expected 0 or more and below 1"),
        (("train.device", "tpu"), "train.device: got 'tpu', expected one of auto, cuda, mps, cpu"),
        (("model.n_head", "3"), "model.n_head: got 3, expected to divide model.hidden = 64 into even parts"),
        (("model.n_kv_head", "3"), "model.n_kv_head: got 3, expected a divisor of model.n_head = 2"),
    ],
)
def test_each_problem_is_named(override, line):
    lines = refused(override)
    assert len(lines) == 1 and lines[0].endswith(line)


def test_all_problems_at_once():
    assert len(refused(("model.n_layer", "x"), ("plan.alpah", "1"), ("train.beta1", "2"))) == 3


def test_types_in_the_file(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('steps = 3\n[plan]\nsteps = true\nmax_lr = 1\n[data]\nrepeat = "true"\n[modle]\nhidden = 3\n')
    lines = refused(name=str(file))
    assert [line.split(": ", 1)[1] for line in lines] == [
        "unknown key steps; did you mean plan.steps?",
        "plan.steps: got True, expected a whole number",
        "data.repeat: got 'true', expected true or false",
        "unknown key modle.hidden; did you mean model.hidden?",
    ]
    file.write_text("a = [")
    assert "not TOML" in refused(name=str(file))[0]
    assert "there is no" in refused(name="tinny")[0] and "tiny" in refused(name="tinny")[0]


def test_the_batch_is_whole_micro_batches():
    c = config.load("tiny")
    assert distributed.batch_problems(c, 1) == []
    (line,) = distributed.batch_problems(c, 3)
    assert "got 4096" in line and "x 3 ranks = 3072; lower train.micro_batch" in line


def test_help_names_every_key_with_its_default(capsys):
    p = Parser(prog="x")
    p.add_config()
    with pytest.raises(SystemExit):
        p.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for key, (f, _) in config.flatten(config.Config()).items():
        assert f"--{key} " in text and " ".join(f.metadata["help"].split()) in text


def test_configs_hold_only_known_sections():
    for name in NAMES:
        assert set(tomllib.loads((ROOT / "configs" / f"{name}.toml").read_text())) <= {
            "out",
            "model",
            "data",
            "plan",
            "train",
        }


def test_any_text_can_be_written_and_read_again(tmp_path):
    c = config.load("tiny", {"out": 'a "b" \\ \x7f \t é 🙂'})
    (file := tmp_path / "c.toml").write_text(config.to_toml(c), encoding="utf-8")
    assert config.load(str(file)).out == c.out
