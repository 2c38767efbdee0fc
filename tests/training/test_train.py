"""Whole runs on the smallest model: what they leave behind, how they fail, stop and go on; resuming is exact."""

import dataclasses
import itertools
import json
import math
import os
import pathlib
import signal
import types

import jax
import numpy as np
import pytest
import tiny
import tiny_reward
from PIL import Image

from ddpo_jax import main
from ddpo_jax.algorithms import ddpo
from ddpo_jax.config.keys import from_json
from ddpo_jax.errors import Interrupted, RunFailure
from ddpo_jax.ops.advantages import PromptStats
from ddpo_jax.training import epoch as epochs
from ddpo_jax.training.build import build
from ddpo_jax.training.loop import train
from ddpo_jax.workdir import metrics
from ddpo_jax.workdir.folder import diff_that_matters

TESTS = pathlib.Path(__file__).resolve().parents[1] / "helpers"
KEYS = [
    *("reward/mean", "reward/std", "reward/words", "sample/distinct_prompts"),
    *("train/loss", "train/grad_norm", "train/ratio_first_update_deviation"),
    *("time/rollout_s", "time/reward_s", "time/update_s"),
]
REWARD = {"reward.name": "tiny_reward:reward"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The smallest model."""
    with tiny.quick_compilation():
        yield tiny.tiny_pipeline_folder(tmp_path_factory.mktemp("tiny"), unet=tiny.SMALLEST_UNET)


@pytest.fixture(autouse=True)
def fresh_reward():
    tiny_reward.reset()


def values(workdir):
    """The rows of a run without its times."""
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows(workdir)]


def rows(workdir):
    return metrics.read_metrics(workdir)


def pixels(workdir, name):
    with Image.open(workdir / "samples" / f"{name}.png") as picture:
        return np.asarray(picture)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The folder of a run of three epochs that nothing disturbed."""
    tiny_reward.reset()
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    train(tiny.tiny_ready(folder, num_epochs=3, **REWARD), workdir)
    return workdir


def arguments(folder, workdir, task, num_epochs=3):
    """The command line of the ``finished`` run; ``task`` is where its config file goes."""
    task.write_text("from ddpo_jax.config import default_config as get_config\n")
    changed = tiny.settings(folder) | {"num_epochs": num_epochs} | REWARD
    return [f"--config={task}", f"--workdir={workdir}", *(f"--config.{key}={value}" for key, value in changed.items())]


@pytest.fixture
def log(monkeypatch):
    """Lines that the training loop logs."""
    lines = []
    stand_in = types.SimpleNamespace(info=lambda text, *args: lines.append(text % args if args else str(text)))
    monkeypatch.setattr("ddpo_jax.training.loop.logging", stand_in)
    return lines


# ---- what a run leaves behind ----


def test_files_of_a_run(folder, finished):
    config = from_json((finished / "config.json").read_text())
    expected = tiny.tiny_config(folder, num_epochs=3, **REWARD)
    expected.train.clip_range = 1e-4 * math.sqrt(16384 / 256)  # 8 x 8 x 4 latents
    assert diff_that_matters(config, expected) == []
    for number in range(3):
        with Image.open(finished / "samples" / f"epoch_{number:04d}.png") as picture:
            picture.verify()
    shown = {name: pixels(finished, name) for name in ("before", "after", "before_after")}
    assert shown["before"].shape == shown["after"].shape and (shown["before"] != shown["after"]).any()
    for part, name in (
        (np.s_[:, : shown["before"].shape[1]], "before"),
        (np.s_[:, -shown["after"].shape[1] :], "after"),
    ):
        np.testing.assert_array_equal(shown["before_after"][part], shown[name])
    with Image.open(finished / "reward.png") as curve:
        assert curve.width > 300
    assert sorted(p.name for p in (finished / "checkpoints").iterdir() if p.name.isdigit())[-1] == "3"
    assert not list(finished.rglob("*.tmp"))


def test_rows_of_a_run(finished):
    found = rows(finished)
    assert [row["epoch"] for row in found] == [0, 1, 2]
    assert [row["reward_queries"] for row in found] == [8, 16, 24]
    for row in found:
        for key in KEYS:
            assert math.isfinite(row[key]), key
        assert 0 < row["reward/min"] < row["reward/mean"] < row["reward/max"] < 1 and row["reward/std"] > 0
        assert row["sample/distinct_prompts"] == 4  # 8 images, 2 of each prompt
        assert 3 <= row["reward/words"] <= 5
        assert row["train/grad_norm"] > 0
        assert row["train/ratio_first_update_deviation"] < 0.1 * 1e-4 * math.sqrt(16384 / 256)
    assert len({row["reward/mean"] for row in found}) == 3


def test_tensorboard_has_the_scalars_of_every_epoch(finished):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(finished), size_guidance={"scalars": 0})
    events.Reload()
    for key in ("reward/mean", "train/loss", "time/update_s"):
        np.testing.assert_allclose(
            [event.value for event in events.Scalars(key)], [row[key] for row in rows(finished)], rtol=1e-6
        )
    assert len(events.Images("samples")) == 3
    assert [event.step for event in events.Images("fixed_prompts")] == [0, 3]


def test_a_finished_run_says_so_and_leaves_its_files(folder, finished, log):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    train(tiny.tiny_ready(folder, num_epochs=3, **REWARD), finished)
    assert any("is finished: 3 of 3 epochs; raise num_epochs to go on" in line for line in log)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    assert tiny_reward.calls == 0


def test_another_run_in_the_same_folder_is_refused_by_key(folder, finished):
    other = tiny.tiny_ready(folder, num_epochs=2, seed=5, **{"train.learning_rate": 1e-3}, **REWARD)
    with pytest.raises(ValueError) as raised:
        train(other, finished)
    lines = str(raised.value).splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == ["num_epochs", "seed", "train.learning_rate"]
    assert json.loads((finished / "config.json").read_text())["seed"] == 0
    assert tiny_reward.calls == 0


# ---- failing, stopping, going on ----


def failing(kind):
    def act(images, prompts):
        if kind == "raises":
            raise OSError("the service is down")
        scores = np.ones(len(images) - (kind == "length"))
        return np.where(np.arange(len(scores)) == 1, np.nan, scores) if kind == "nan" else scores

    return act


MESSAGES = {
    "raises": "OSError: the service is down",
    "nan": "returned nan for image 1",
    "length": "returned shape (7,)",
}


def test_a_reward_that_fails_in_mid_run_loses_no_epoch(folder, finished, tmp_path):
    """Epoch 1 fails in three ways, one command after the other; the last command finishes as if nothing had been."""
    config = tiny.tiny_ready(folder, num_epochs=3, **REWARD)
    for attempt, (kind, message) in enumerate(MESSAGES.items()):
        tiny_reward.reset(**{"at_1" if attempt == 0 else "at_0": failing(kind)})
        with pytest.raises(RunFailure) as raised:
            train(config, tmp_path)
        text = str(raised.value)
        assert text.startswith("epoch 1: reward 'tiny_reward:reward'") and message in text and "goes on" in text
        assert "\n" not in text
        assert [row["epoch"] for row in rows(tmp_path)] == [0]
    tiny_reward.reset()
    train(config, tmp_path)
    assert tiny_reward.calls == 2
    assert values(tmp_path) == values(finished)


def test_a_failure_is_exit_code_1_and_one_line(folder, tmp_path, capsys, monkeypatch):
    """Through the command line; in the first epoch, so that there is nothing to save and the run starts again."""
    file = tmp_path / "tiny_task.py"
    argv = arguments(folder, tmp_path / "run", file, num_epochs=1)
    tiny_reward.reset(at_0=failing("nan"))
    assert main.main(argv) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "epoch 0" in errors[0] and MESSAGES["nan"] in errors[0]
    tiny_reward.reset()
    assert main.main(argv) == 0
    assert [row["epoch"] for row in rows(tmp_path / "run")] == [0]


@pytest.mark.parametrize("failure", ["loss", "reward"])
def test_a_failure_between_two_checkpoints_loses_no_epoch(folder, finished, tmp_path, monkeypatch, capsys, failure):
    """checkpoint.every is 5 and epoch 2 fails: its state was given away to the update, and yet it is what goes on."""

    advantages, calls = ddpo.advantages, itertools.count()

    def spoiled(*args):
        return advantages(*args) * (np.nan if next(calls) == 2 else 1)

    if failure == "loss":
        monkeypatch.setattr(ddpo, "advantages", spoiled)
    else:
        tiny_reward.reset(at_2=failing("raises"))
    argv = [*arguments(folder, tmp_path / "run", tmp_path / "task.py"), "--config.checkpoint.every=5"]
    assert main.main(argv) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith("error: epoch 2: ")
    assert values(tmp_path / "run") == values(finished)[:2]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
    tiny_reward.reset()
    monkeypatch.undo()
    before = (tmp_path / "run" / "samples" / "before.png").stat().st_mtime_ns
    assert main.main(argv) == 0
    assert tiny_reward.calls == 1 and values(tmp_path / "run") == values(finished)
    assert (tmp_path / "run" / "samples" / "before.png").stat().st_mtime_ns == before  # it was not drawn again
    np.testing.assert_array_equal(pixels(tmp_path / "run", "before_after"), pixels(finished, "before_after"))


def test_sigterm_saves_and_the_run_goes_on_exactly_and_further(folder, finished, tmp_path):
    """The signal comes while the first epoch is scored; the second command also raises num_epochs, from 2 to 3. The
    first draws no images to look at, which changes no number."""

    def act(images, prompts):
        os.kill(os.getpid(), signal.SIGTERM)
        return tiny_reward.scores(images, prompts)

    tiny_reward.reset(at_0=act)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Interrupted) as raised:
        train(tiny.tiny_ready(folder, num_epochs=2, **{"log.images_every": 0}, **REWARD), tmp_path)
    assert raised.value.exit_code == 143 and "after epoch 0" in str(raised.value)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert values(tmp_path) == values(finished)[:1] and not list((tmp_path / "samples").iterdir())
    train(tiny.tiny_ready(folder, num_epochs=3, **REWARD), tmp_path)
    assert values(tmp_path) == values(finished)
    np.testing.assert_array_equal(pixels(tmp_path, "after"), pixels(finished, "after"))


# ---- an epoch ----


@pytest.fixture
def optimised(folder):
    """Programs as a user has them: what they round is part of the question."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def run_epoch(folder, **overrides):
    """``(config, rollout, row of metrics)`` of the first epoch on one device."""
    ready = tiny.tiny_ready(folder, **{"mesh.data": 1, "train.microbatch_size": 2} | overrides)
    parts, config = build(ready), ready.config
    state = parts.init()
    rollout = parts.collector.collect(0, state.params)
    _, row = epochs.update(parts, config, state, PromptStats(), rollout, 0)
    return config, rollout, row


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_the_first_update_every_ratio_is_one(folder, optimised, dtype):
    """Within a tenth of the clip range, though the rollout ran 8 images at once and the update 2; in bfloat16 because
    the old log-probs are recomputed by the update's own calls."""
    config, rollout, row = run_epoch(folder, dtype=dtype)
    assert config.train.recompute_log_prob == ("on" if dtype == "bfloat16" else "off")
    assert row["train/ratio_first_update_deviation"] < 0.1 * config.train.clip_range
    assert row["train/clip_fraction"] == 0


def test_recomputed_log_probs_are_those_of_the_policy_that_sampled(folder):
    """PRDP's clip is around the sampler (Deng et al. 2024, Eq. 20), here the untrained model throughout."""
    own = {"algorithm.name": "prdp", "algorithm.refresh_every": 0, "prompts.samples_per_prompt": 2}
    ready = tiny.tiny_ready(folder, **own, **{"train.recompute_log_prob": "on", "train.learning_rate": 0.01})
    parts, stats = build(ready), PromptStats()
    state = parts.init()
    for epoch in range(2):
        state, sampler = epochs.refresh(state, parts.traits, epoch)
        rollout = parts.collector.collect(epoch, sampler)
        samples = epochs.assign(parts, ready.config, stats, rollout)
        found = epochs.recompute(parts, state, samples, np.random.default_rng(0), ready.config.train.batch_size)
        np.testing.assert_allclose(found, rollout.log_prob, atol=1e-4)
        state, _ = epochs.update(parts, ready.config, state, stats, rollout, epoch)
    trained = dataclasses.replace(state, behaviour=state.params)
    found = epochs.recompute(parts, trained, samples, np.random.default_rng(0), ready.config.train.batch_size)
    assert np.abs(found - rollout.log_prob).max() > 1e-2  # so the two policies can be told apart


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("overrides", [{"train.microbatch_size": 4}, {"train.lora_rank": 2}, {"train.remat": "on"}])
def test_on_the_first_update_every_ratio_is_one_for_the_larger_model(tmp_path, optimised, dtype, overrides):
    config, _, row = run_epoch(tiny.tiny_pipeline_folder(tmp_path), dtype=dtype, **overrides)
    assert row["train/ratio_first_update_deviation"] < 0.1 * config.train.clip_range
