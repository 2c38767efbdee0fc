"""``ddpo_jax measure``: the estimates against a policy whose branch variances are known, and the command."""

import dataclasses
import json
import math
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import tiny_pipeline_folder, tiny_ready

from ddpo_jax import find
from ddpo_jax.commands import _cli as cli
from ddpo_jax.commands import measure as command
from ddpo_jax.diffusion import ddim, sampler, schedule
from ddpo_jax.diffusion.policy import Policy
from ddpo_jax.studies import measure
from ddpo_jax.training.build import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipeline_folder(tmp_path_factory.mktemp("measure") / "model")


@pytest.fixture
def no_network(monkeypatch):
    """A network that predicts no noise, and "images" that are the latents' bytes: nothing large to compile."""

    def load(config):
        model = load_model(config)
        monkeypatch.setattr(model.pipeline, "decode", as_bytes)
        return dataclasses.replace(model, network=lambda trained, frozen, latents, timesteps, context: 0 * latents)

    monkeypatch.setattr(measure, "load_model", load)
    return load


def as_bytes(latents):
    """The 256 numbers of each latent as an image of 32 x 32 pixels, the same in all three channels."""
    numbers = np.ascontiguousarray(np.asarray(latents, np.float32))
    return np.repeat(numbers.view(np.uint8).reshape(-1, 32, 32, 1), 3, axis=3)


def corner(images, prompts, metadata):
    """The first number of each latent, whose distribution is known."""
    return np.ascontiguousarray(images[:, 0, :4, 0]).view(np.float32)[:, 0]


def known_variances(the_schedule):
    """Var(final | latents before step t) of one latent number under a network that predicts no noise.

    A step is then x' = c x + std z with c = sqrt(alpha_prev / alpha), so noise of step k reaches the end multiplied by
    the c of all steps after it.
    """
    alpha, before, std = (
        np.asarray(x, np.float64) for x in (the_schedule.alpha, the_schedule.alpha_prev, the_schedule.std)
    )
    c = np.sqrt(before / alpha)
    steps = range(len(std))
    return [sum((std[k] * math.prod(c[k + 1 :])) ** 2 for k in steps if k >= t) for t in steps]


def test_branch_variance_and_x0_change_of_a_known_policy(folder, monkeypatch, no_network):
    ready = tiny_ready(folder, **{"sample.batch_size": 64, "train.batch_size": 64})
    config = ready.config
    model = no_network(config)
    monkeypatch.setattr(measure, "make_reward", lambda config, member: corner)
    plan = measure.Plan(num_prompts=8, repeats=2, branches=33)
    table = measure.measure(ready, plan)
    the_schedule = ddim.make(model.pipeline.scheduler_config, 3, 1.0)
    want = np.array(known_variances(the_schedule))
    # The mean of 16 unbiased variances of 33 normals has relative deviation sqrt(2 / 32 / 16) = 6 %; five of them.
    np.testing.assert_allclose(table["branch_variance"]["mean"], want, rtol=0.31)
    assert (np.array(table["branch_variance"]["standard_error"]) < 0.2 * want).all()

    # The predicted clean latent of a network that predicts no noise is latents / sqrt(alpha).
    latents = trajectories(config, model, the_schedule, np.arange(16))[..., 0, 0, 0]
    rewards = np.concatenate([latents[:, :3] / np.sqrt(the_schedule.alpha), latents[:, 3:]], axis=1)
    change = np.diff(rewards, axis=1)
    np.testing.assert_allclose(table["x0_reward"]["mean"], rewards.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(table["x0_change"]["mean"], change.mean(axis=0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(table["x0_change_abs"]["mean"], np.abs(change).mean(axis=0), rtol=1e-4)
    by_prompt = change.reshape(8, 2, 3).mean(axis=1)
    error = by_prompt.std(axis=0, ddof=1) / math.sqrt(8)
    np.testing.assert_allclose(table["x0_change"]["standard_error"], error, rtol=1e-3)


def trajectories(config, model, the_schedule, ids):
    policy = Policy(the_schedule, model.network, config.sample.guidance_scale)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(config.seed), i))(ids)
    context, uncond = np.zeros((len(ids), 24, 16), np.float32), np.zeros((24, 16), np.float32)
    path = sampler.sample(policy, model.params, model.frozen, keys, context, uncond, model.pipeline.latent_shape)
    return np.asarray(path.latents)


# ---- the command ----


@pytest.fixture
def config_file(folder, tmp_path):
    path = tmp_path / "tiny_run.py"
    path.write_text(
        "from ddpo_jax.config import default_config, with_choices\nfrom ddpo_jax.config.override import override\n"
        "def get_config(arg=''):\n"
        "    config = default_config()\n"
        f"    given = [('model', {str(folder)!r}), ('prompts.name', 'file'),\n"
        f"             ('prompts.path', {str(folder / 'prompts.txt')!r}), ('sample.num_steps', '2'),\n"
        "             ('sample.batch_size', '8'), ('sample.num_batches_per_epoch', '1'), ('train.batch_size', '8')]\n"
        "    override(config, given)\n"
        "    return with_choices(config, arg)\n"
    )
    return path


def run(capsys, *argv):
    code = cli.run(command.main, list(map(str, argv)))
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, [line.removeprefix("error: ") for line in err.splitlines() if line.startswith("error: ")]


def test_the_command_writes_a_table_that_is_a_weighting(capsys, config_file, tmp_path, no_network):
    out = tmp_path / "a" / "results"
    small = ["--num-prompts=3", "--branches=2"]
    chosen = f"{config_file}:weighting=advantage_variance,seed=3"  # whose table is what this is going to write
    code, printed, errors = run(capsys, f"--config={chosen}", f"--out={out}", *small)
    assert (code, errors) == (0, [])
    table = json.loads((out / "measure.json").read_text())
    assert table["num_steps"] == len(table["timesteps"]) == 2
    assert (table["seed"], table["reward"], table["branches"]) == (3, "jpeg_compressibility", 2)
    assert len(table["x0_reward"]["mean"]) == 3 and len(table["x0_change"]["standard_error"]) == 2
    change = np.diff(table["x0_reward"]["mean"])
    np.testing.assert_allclose(table["x0_change"]["mean"], change, rtol=1e-6, atol=1e-9)
    variance = table["branch_variance"]["mean"]
    assert min(variance) >= 0 and variance[0] > 0
    lines = printed.splitlines()
    assert lines[0].split() == ["step", "timestep", "x0", "reward", "change", "|change|", "sigma", "weight"]
    assert len(lines) == 1 + 2 + 2 and str(out / "measure.json") in lines[-1]
    width, height = Image.open(out / "measure.png").size
    assert width > 2 * height  # two panels

    module = find.find("weighting", "advantage_variance")
    options = module.default_config()
    options.table = str(out / "measure.json")
    got = module.weights(np.zeros((1, 3, 1, 1, 1), np.float32), schedule.make({"steps_offset": 1}, 2, 1.0), options)
    np.testing.assert_allclose(got, [variance], rtol=1e-6)


def test_one_part_of_one_prompt(capsys, config_file, tmp_path, no_network):
    argv = ["--config", config_file, "--out", tmp_path, "--what", "x0_change", "--num-prompts", "1"]
    code, printed, errors = run(capsys, *argv)
    assert (code, errors) == (0, [])
    table = json.loads((tmp_path / "measure.json").read_text())
    assert "branch_variance" not in table
    assert table["x0_change"]["standard_error"] == [None, None]  # one trajectory has none
    assert "sigma" not in printed and "±" not in printed


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--what=variance"], "--what: received 'variance'; it must be x0_change, branch_variance or both"),
        (["--branches=1"], "--branches: received 1; a variance takes at least 2"),
        (["--num-prompts=0"], "--num-prompts: received '0'; it must be a whole number of at least 1"),
        (["--nonsense=3"], "unknown flag '--nonsense'"),
        (["--workdir=x"], "--workdir: this is no run; results go to --out"),
        (["--config.sample.num_steps=0"], "sample.num_steps: received 0"),
        (["--config.nonsense=0"], "unknown key 'nonsense'"),
        (["--config.model=./nowhere"], "model: received './nowhere'; no such folder"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(capsys, config_file, tmp_path, flags, message):
    code, _, errors = run(capsys, f"--config={config_file}", f"--out={tmp_path / 'out'}", *flags)
    assert code == 2 and len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "out").exists()


def test_out_must_be_given_and_writable(capsys, config_file, tmp_path):
    code, _, errors = run(capsys, f"--config={config_file}")
    assert code == 2 and "--out" in errors[0]
    (tmp_path / "file").write_text("")
    code, _, errors = run(capsys, f"--config={config_file}", f"--out={tmp_path / 'file'}")
    assert code == 2 and "--out: received" in errors[0] and "a file stands in its place" in errors[0]


def test_a_reward_that_fails_is_exit_code_1(capsys, config_file, tmp_path, monkeypatch, no_network):
    (tmp_path / "broken_reward.py").write_text("def score(images, prompts, metadata):\n    raise OSError('no luck')\n")
    monkeypatch.syspath_prepend(tmp_path)
    argv = [f"--config={config_file}:reward=broken_reward:score", f"--out={pathlib.Path(tmp_path) / 'out'}"]
    code, _, errors = run(capsys, *argv, "--num-prompts=1", "--what=x0_change")
    assert code == 1 and len(errors) == 1 and "OSError: no luck" in errors[0]
