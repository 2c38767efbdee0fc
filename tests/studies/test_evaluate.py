"""Evaluating a run: paired noise, chunks and devices that do not matter, resuming, statistics by hand."""

import json
import types

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from ddpo_jax import sharding
from ddpo_jax.commands import _cli as cli
from ddpo_jax.commands import evaluate as command_line
from ddpo_jax.config import choose
from ddpo_jax.diffusion import ddim, sampler
from ddpo_jax.diffusion.policy import Policy
from ddpo_jax.studies import evaluate
from ddpo_jax.training.build import load_model

CALLS = []


def brightness(images, prompts, metadata):
    """A reward of the user's own, with a part that speaks of circles only."""
    CALLS.append(len(images))
    values = images.astype(np.float64).mean((1, 2, 3))
    return values, {"circle": np.where(["circle" in prompt for prompt in prompts], values, np.nan)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Config and model of a run whose parameters were moved by training."""
    folder = tiny.tiny_pipeline_folder(tmp_path_factory.mktemp("tiny"), unet=tiny.SMALLEST_UNET)
    config = tiny.tiny_config(folder, **{"sample.num_steps": 2})
    model = load_model(config)
    model.params = {name: value * 1.05 for name, value in model.params.items()}
    return config, model


@pytest.fixture
def command(run, monkeypatch, tmp_path):
    """Runs the command on ``run`` and returns the JSON."""
    monkeypatch.setattr(evaluate, "load_trained", lambda workdir, epoch, ema: run)
    monkeypatch.setattr(evaluate, "make_rewards", lambda config, text: {name: brightness for name in text.split(",")})
    CALLS.clear()

    def call(*flags, out="out"):
        words = ["--workdir=w", "--prompts=training", "--rewards=own", f"--out={tmp_path / out}", *flags]
        code = cli.run(command_line.main, words)
        path = tmp_path / out / "evaluation.json"
        return code, json.loads(path.read_text()) if path.is_file() else None

    return call


@pytest.fixture
def painted(monkeypatch):
    """In place of the sampler: images of one brightness that prompt, number and parameters give."""

    def make_sampler(model, config, mesh):
        def images(params, prompts, numbers, key, batch_size):
            total = float(sum(np.asarray(value, np.float64).sum() for value in params.values()))
            shades = [
                (len(prompt) * 7 + number * 13 + total) % 256 for prompt, number in zip(prompts, numbers, strict=True)
            ]
            return np.tile(np.array(shades, np.uint8)[:, None, None, None], (1, 8, 8, 3))

        return types.SimpleNamespace(images=images, rules=sharding.DEFAULT_RULES)

    monkeypatch.setattr(evaluate, "make_sampler", make_sampler)


def test_both_models_are_scored_on_the_same_noise(command, run, tmp_path, capsys):
    config, model = run
    with tiny.quick_compilation():
        code, result = command("--samples-per-prompt=3", "--batch-size=8")
    assert code == 0
    assert sorted(result["settings"]["prompts"]) == sorted(tiny.PROMPTS)
    assert CALLS == [8, 4, 8, 4]  # 12 images of each model
    table = capsys.readouterr().out
    assert "4 prompts x 3 images" in table and "own/circle" in table
    assert Image.open(tmp_path / "out" / "images.png").size[0] > 300

    # The same images in one batch on one device, without the command's sampler.
    pipe, scores = model.pipeline, {}
    process = ddim.make(pipe.scheduler_config, 2, config.sample.eta)
    policy = Policy(process, model.network, config.sample.guidance_scale)
    draw = jax.jit(
        lambda p, k, c, u: sampler.sample(policy, p, model.frozen, k, c, u, pipe.latent_shape).latents[:, -1]
    )
    for label, params in (("base", model.reference), ("trained", model.params)):
        context = pipe.embed([prompt for prompt in result["settings"]["prompts"] for _ in range(3)])
        keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(0), number))(np.arange(12))
        with tiny.quick_compilation():
            images = np.asarray(pipe.decode(draw(params, keys, context, pipe.embed([""])[0])))
        scores[label] = brightness(images, ["circle"] * 12, None)[0].reshape(4, 3)
    for label, values in scores.items():
        assert result["rewards"]["own"][label]["mean"] == pytest.approx(values.mean(), abs=0.05)
    difference = scores["trained"] - scores["base"]
    assert abs(difference).max() > 0.5  # the models do differ
    assert result["rewards"]["own"]["difference"]["mean"] == pytest.approx(difference.mean(), abs=0.05)
    assert result["rewards"]["own/circle"]["base"]["prompts"] == 1


def test_an_interrupted_evaluation_goes_on_and_another_is_refused(command, painted, tmp_path, capsys):
    flags = ("--samples-per-prompt=4", "--batch-size=8", "--num-prompts=4")
    code, whole = command(*flags)
    chunks = sorted((tmp_path / "out" / "chunks").glob("*.npz"))
    assert code == 0 and len(chunks) == 4
    chunks[1].unlink()
    (tmp_path / "out" / "evaluation.json").unlink()
    CALLS.clear()
    code, again = command(*flags)
    assert code == 0 and CALLS == [8] and again == whole
    capsys.readouterr()
    assert command(*flags, "--epoch=3")[0] == 2
    assert "which holds an evaluation with other epoch; use another --out" in capsys.readouterr().err


def test_a_reward_that_compares_gets_all_images_of_a_prompt(command, painted, monkeypatch, capsys):
    def best(images, prompts, metadata):
        CALLS.append((len(images), len(set(prompts))))
        values = images.mean((1, 2, 3))
        return (values == values.max()).astype(float)

    best.groupwise = True
    monkeypatch.setattr(evaluate, "make_rewards", lambda config, text: {"best": best})
    flags = ("--batch-size=8", "--num-prompts=4")  # 8 images do not hold whole groups of 3
    code, result = command("--samples-per-prompt=3", *flags, out="grouped")
    assert code == 0 and CALLS == [(3, 1)] * 8
    assert result["rewards"]["best"]["base"]["mean"] == pytest.approx(1 / 3)
    assert command("--samples-per-prompt=1", *flags, out="alone")[0] == 2
    assert "reward 'best' compares the images of a prompt" in capsys.readouterr().err


def test_an_untrained_run_differs_by_nothing(command, painted, run, monkeypatch):
    config, model = run
    same = type(model)(model.pipeline, model.network, dict(model.reference), model.frozen, model.reference)
    monkeypatch.setattr(evaluate, "load_trained", lambda workdir, epoch, ema: (config, same))
    code, result = command("--samples-per-prompt=2", "--batch-size=8")
    assert code == 0
    assert result["rewards"]["own"]["difference"] == {"mean": 0.0, "half_width": 0.0, "prompts": 4}


def test_a_failing_reward_is_exit_code_1(command, painted, monkeypatch, capsys):
    def broken(images, prompts, metadata):
        raise RuntimeError("no network")

    monkeypatch.setattr(evaluate, "make_rewards", lambda config, text: {"broken": broken})
    assert command("--samples-per-prompt=2")[0] == 1
    assert "reward 'broken' raised RuntimeError: no network" in capsys.readouterr().err


def test_statistics_take_prompts_as_the_sample():
    nan = np.nan
    found = evaluate.statistics(np.array([[1.0, 3.0], [4.0, 4.0], [nan, nan], [nan, 6.0]]))
    assert (found["mean"], found["prompts"]) == (4.0, 3)  # means 2, 4, 6
    assert found["half_width"] == pytest.approx(4.302653 * 2 / 3**0.5, rel=1e-6)
    one = evaluate.statistics(np.array([[1.0, 2.0, 3.0]]))
    assert (one["mean"], one["prompts"]) == (2.0, 1) and one["half_width"] == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert evaluate.statistics(np.array([[nan]])) == {"mean": None, "half_width": None, "prompts": 0}


def test_prompts_are_the_runs_the_novel_ones_or_a_files(run, tmp_path):
    config, _ = run
    assert {prompt for prompt, _ in evaluate.find_prompts(config, "training", None, 0)} == set(tiny.PROMPTS)
    file = tmp_path / "mine.txt"
    file.write_text("one\n\ntwo\none\nthree\n")
    assert [prompt for prompt, _ in evaluate.find_prompts(config, str(file), None, 0)] == ["one", "two", "three"]
    assert len(evaluate.find_prompts(config, str(file), 2, 0)) == 2
    with pytest.raises(ValueError, match="the run's source 'file' has no novel split"):
        evaluate.find_prompts(config, "novel", None, 0)
    animals = config.copy_and_resolve_references()
    choose(animals, "prompts", "animals")
    novel = dict(evaluate.find_prompts(animals, "novel", None, 0))
    assert len(novel) == 45 and novel["an elephant"] == {"animal": "elephant"}
    assert animals.prompts.split == "training"  # the run's config is left alone
    few = config.copy_and_resolve_references()
    choose(few, "prompts", "mini")
    few.prompts.count = 2
    assert len(evaluate.find_prompts(few, "training", None, 0)) == 2
    assert len(evaluate.find_prompts(few, "novel", None, 0)) == 45  # to train on few says nothing of the others


def test_rewards_are_named_with_options(run):
    config, _ = run
    assert [*evaluate.make_rewards(config, "")] == ["jpeg_compressibility"]
    text = "jpeg_incompressibility,weighted[rewards='jpeg_compressibility=1,jpeg_incompressibility=-1']"
    rewards = evaluate.make_rewards(config, text)
    images = np.random.default_rng(0).integers(256, size=(2, 32, 32, 3), dtype=np.uint8)
    plain, doubled = (reward(images, ["a"] * 2, [{}] * 2)[0] for reward in rewards.values())
    np.testing.assert_allclose(doubled, -2 * plain, rtol=1e-6)
    for text, fault in (
        ("nonsense", "there is no 'nonsense'"),
        ("clip_score[scale=1", "it must be name or name"),
        ("jpeg_compressibility[quality=3]", "unknown key 'reward.quality'"),
    ):
        with pytest.raises(ValueError, match=fault):
            evaluate.make_rewards(config, text)
