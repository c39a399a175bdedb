"""Keys of the config that are not marked free change the weights, the free ones do not."""

import shutil

import pytest
import torch
from runs import run, weights

import config
from runtime import checkpoint

PTFS, CPT, BRANCH, AVERAGE = ("ptfs", "1"), ("cpt", "2"), ("branch", "1"), ("average", "2")
FORM = {"model.rope_context": "8", "model.rope_factor": "4"}  # of a stretch from 8 tokens to 32
STRETCHED, FULLY = {**FORM, "model.rope_scaling": "llama3"}, {"model.rope_factor": "4", "model.rope_scaling": "linear"}

# key: (other value, mode and version in which it acts, keys that both runs have, for those that act only with others)
CHANGES: dict[str, tuple[str, tuple[str, str], dict[str, str]]] = {
    "model.n_layer": ("2", PTFS, {}),
    "model.n_head": ("4", PTFS, {}),
    "model.n_kv_head": ("1", PTFS, {}),
    "model.hidden": ("20", PTFS, {}),
    "model.ffn": ("40", PTFS, {}),
    "model.context": ("16", PTFS, {}),
    "model.qkv_bias": ("true", PTFS, {}),
    "model.tied": ("true", PTFS, {}),
    "model.rope_theta": ("100", PTFS, {}),
    "model.rope_scaling": ("linear", PTFS, {"model.rope_factor": "4"}),
    "model.rope_factor": ("2", PTFS, FULLY),
    "model.rope_context": ("16", PTFS, STRETCHED),
    "model.rope_low": ("0.1", PTFS, STRETCHED),
    "model.rope_high": ("2", PTFS, STRETCHED),
    "model.norm_eps": ("1e-4", PTFS, {}),
    "data.unique": ("2", PTFS, {"data.repeat": "true"}),
    "data.order": ("shuffled", PTFS, {}),
    "plan.schedule": ("knee", PTFS, {}),
    "plan.steps": ("5", PTFS, {}),
    "plan.increments": ("5,6", PTFS, {}),
    "plan.warmup": ("1", PTFS, {}),
    "plan.max_lr": ("3e-3", PTFS, {}),
    "plan.min_lr": ("3e-4", PTFS, {}),
    "plan.alpha": ("0.5", BRANCH, {}),
    "plan.decay_steps": ("2", BRANCH, {"plan.alpha": "none"}),
    "plan.cpt_variant": ("keep_min", CPT, {}),
    "plan.cycle": ("30", PTFS, {}),
    "data.replay": ("0.25", CPT, {}),
    "data.replay_branch": ("0.25", ("branch", "2"), {}),
    "plan.average": ("0.5", AVERAGE, {"plan.alpha": "0"}),
    "plan.average_points": ("2", AVERAGE, {"plan.alpha": "0", "plan.average": "0.5"}),
    "train.batch_tokens": ("512", PTFS, {}),
    "train.seed": ("2", PTFS, {}),
    "train.beta1": ("0.8", PTFS, {}),
    "train.beta2": ("0.99", PTFS, {}),
    "train.weight_decay": ("0.2", PTFS, {}),
    "train.clip": ("0.6", PTFS, {}),
    "train.reset_moments": ("true", BRANCH, {}),
    "train.dtype": ("bfloat16", PTFS, {}),
}
# not free, and yet no value of theirs changes the weights of such a run
ELSEWHERE = {
    "model.vocab_size": "any other than the data's is refused (below)",
    "data.repeat": "only where an increment is too short, which is refused without it (below)",
    "plan.from_mean": "another parent, in a folder of its own (test_average.py)",
    "plan.mean_lr": "the rate of branches from the mean (test_schedule.py)",
    "plan.versions": "only how far the main path goes (below)",
    "train.base": "needs an imported model: test_hf.py",
}


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    """((mode, version), keys) -> the weights at the end of a segment of a plan of 6 steps; a run is made once."""
    work, made = tmp_path_factory.mktemp("keys"), {}

    def train(way: tuple[str, str], keys: dict[str, str]) -> dict[str, torch.Tensor]:
        if (name := str((way, sorted(keys.items())))) in made:
            return made[name]
        out = work / str(len(made))
        args = [w for k, v in {"plan.steps": "6", **keys}.items() for w in (f"--{k}", v)]
        for mode, version in {
            "cpt": (("cpt", "1"), way),
            "branch": (("main", way[1]), way),
            "average": (("main", way[1]), way),
        }.get(way[0], (way,)):
            assert run(prepared, out, "--mode", mode, "--version", version, *args) == 0, keys
        (folder,) = (f for f in out.glob(f"*/v{way[1]}") if f.parent.name.startswith(way[0].replace("branch", "ours")))
        made[name] = weights(checkpoint.path(folder, checkpoint.steps(folder)[-1]))
        shutil.rmtree(out)
        return made[name]

    return train


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)  # of one shape, too


def test_no_key_is_forgotten():
    fixed = {k for k, (f, _) in config.flatten(config.Config()).items() if not f.metadata.get("free")}
    assert fixed == CHANGES.keys() | ELSEWHERE.keys() and not CHANGES.keys() & ELSEWHERE.keys()


@pytest.mark.parametrize("key", CHANGES)
def test_a_key_that_is_not_free_changes_the_weights(trained, key):
    value, way, both = CHANGES[key]
    assert not same(trained(way, both), trained(way, both | {key: value}))


def test_free_keys_change_nothing(trained):
    """A sample, all at once, bit for bit. Those that only change the order of sums are in test_parallel.py."""
    free = {
        "train.log_every": "1",
        "train.eval_every": "1",
        "train.eval_tokens": "64",
        "train.checkpoint_every": "2",
        "train.keep": "1",
        "train.save_at": "3",
        "train.recompute": "true",
        "train.spike": "100",
        "train.timeout": "900",
        "train.on_save_error": "continue",
        "data.verify": "false",
        "data.epochs": "3",
        "train.kernels": "torch",
        "train.compile": "off",
        "train.device": "auto" if not torch.cuda.is_available() else "cpu",
    }
    assert same(trained(PTFS, {}), trained(PTFS, free))


def test_what_the_other_keys_do(trained, prepared, tmp_path, capsys):
    assert run(prepared, tmp_path / "a", "--mode", "ptfs", "--version", "1", "--model.vocab_size", "258") == 2
    assert "model.vocab_size: got 258, expected 257" in capsys.readouterr().err
    assert same(trained(PTFS, {}), trained(PTFS, {"data.repeat": "true"}))
    long = ("--mode", "main", "--version", "1", "--plan.steps", "200", "--plan.alpha", "0.1")
    assert (
        run(prepared, tmp_path / "b", *long) == 2 and run(prepared, tmp_path / "b", *long, "--data.repeat", "true") == 0
    )
    assert same(trained(PTFS, {}), trained(PTFS, {"plan.versions": "3"}))
    for versions, steps in (("1", [2]), ("2", [2, 8])):
        out = tmp_path / versions
        assert run(prepared, out, "--mode", "main", "--plan.steps", "6", "--plan.versions", versions) == 0
        assert checkpoint.steps(out / "main") == steps
