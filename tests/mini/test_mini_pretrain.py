"""Pre-training of the miniature: the loop (resume, refusals, averaging), the data, the whole command at tiny scale."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ddpo_jax.commands import _cli as cli
from ddpo_jax.commands import pretrain as command
from ddpo_jax.mini import grammar, pretrain, quality, stages, training, world
from ddpo_jax.models import pipeline
from ddpo_jax.rewards import mini_verifier


class Line(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        return self.linear(x)


def line_stage(**changes) -> training.Stage:
    def make_batch(rng, n):
        x = rng.normal(size=(n, 3)).astype(np.float32)
        return {"x": x, "y": x @ np.array([[1.0], [-2.0], [0.5]], np.float32)}

    def loss(model, batch, key):
        noisy = batch["x"] + 0.01 * jax.random.normal(key, batch["x"].shape)
        value = jnp.mean((model(noisy) - batch["y"]) ** 2)
        return value, {}

    settings = {
        "steps": 30,
        "batch_size": 8,
        "learning_rate": 0.05,
        "ema_decay": 0.9,
        "chunk": 5,
        "checkpoint_every": 10,
    }
    return training.Stage("line", Line, make_batch, loss, **{**settings, **changes})


def quiet(line: str) -> None:
    del line


def leaves(module: nnx.Module) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(module))]


class Stop(Exception):
    pass


def test_an_interrupted_stage_ends_as_one_that_never_stopped(tmp_path):
    stage = line_stage()
    whole = training.train(stage, tmp_path / "whole", 0, log=quiet)

    def interrupt(module, step):
        if step == 20:
            raise Stop

    with pytest.raises(Stop):
        training.train(stage, tmp_path / "parts", 0, on_checkpoint=interrupt, log=quiet)
    assert not training.finished(stage, tmp_path / "parts", 0)
    lines = []
    resumed = training.train(stage, tmp_path / "parts", 0, log=lines.append)
    assert lines[0] == "line: continues at step 20 of 30"
    for a, b in zip(leaves(whole), leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert training.finished(stage, tmp_path / "parts", 0)
    for a, b in zip(leaves(whole), leaves(training.trained(stage, tmp_path / "parts", 0)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_stage_learns_and_delivers_the_average(tmp_path):
    averaged = training.train(line_stage(steps=300, learning_rate=0.1), tmp_path / "ema", 0, log=quiet)
    np.testing.assert_allclose(np.asarray(averaged.linear.kernel[...])[:, 0], [1, -2, 0.5], atol=0.02)
    plain = training.train(line_stage(ema_decay=0.0), tmp_path / "plain", 0, log=quiet)
    short = training.train(line_stage(), tmp_path / "short", 0, log=quiet)
    assert not np.allclose(plain.linear.kernel[...], short.linear.kernel[...])  # 30 steps in, the average lags behind


def test_other_settings_on_the_same_folder_are_refused_by_name(tmp_path):
    training.train(line_stage(steps=5), tmp_path, 0, log=quiet)
    with pytest.raises(ValueError, match="batch_size was 8, now 16"):
        training.train(line_stage(steps=5, batch_size=16), tmp_path, 0, log=quiet)
    with pytest.raises(ValueError, match="seed was 0, now 1"):
        training.finished(line_stage(steps=5), tmp_path, 1)


def test_a_fault_in_the_data_thread_reaches_the_caller(tmp_path):
    def broken(rng, n):
        raise RuntimeError("no picture today")

    with pytest.raises(RuntimeError, match="no picture today"):
        training.train(dataclasses.replace(line_stage(), make_batch=broken), tmp_path, 0)


def test_neighbors_are_sentences_that_differ_in_one_respect():
    rng = np.random.default_rng(0)
    seen = Counter()
    for caption in world.captions(world.sample_scenes(rng, 400)):
        spec = grammar.parse(caption)
        other = stages.neighbor(spec, rng)
        assert grammar.parse(grammar.describe(other)) == other
        assert other.kind == spec.kind
        if other.things == spec.things:
            assert (other.relation != spec.relation) != (other.number != spec.number)
            seen["relation" if spec.relation else "number"] += 1
        elif other.things == spec.things[::-1]:
            assert (other.relation, other.number) == (spec.relation, spec.number)
            seen["order"] += 1
        else:
            changes = [
                name
                for old, new in zip(spec.things, other.things, strict=True)
                for name in ("color", "shape", "texture")
                if getattr(old, name) != getattr(new, name)
            ]
            assert len(changes) == 1
            seen[changes[0]] += 1
    assert set(seen) == {"relation", "number", "order", "color", "shape", "texture"}


def test_reconstruction_loss_by_hand():
    target = jnp.zeros((1, 4, 4, 3))
    constant = target + 0.5  # no edge: pixels count, differences do not
    np.testing.assert_allclose(stages.reconstruction_loss(constant, target), 0.5, rtol=1e-6)
    stripes = target.at[:, :, ::2].set(1.0)  # columns 1 0 1 0: neighbors in a row differ by 1, two apart by 0
    np.testing.assert_allclose(stages.reconstruction_loss(stripes, target), 0.5 + 0.25, rtol=1e-6)


@pytest.mark.slow
def test_the_bank_has_unit_variance_and_the_animals_are_words(tiny):
    context = stages.Context(tiny, 0, pretrain.SCALES["tiny"])
    bank = stages.encode_bank(context)
    assert abs(float(bank["latents"].astype(np.float32).std()) - 1) < 1e-2
    assert bank["ids"].shape == (16, 24)
    tokens = context.tokenizer(["a striped red circle", "a photo of a cat", ""])
    lengths = (tokens != context.tokenizer.pad_token_id).sum(1)  # the end token is the padding token
    assert lengths.tolist() == [5, 6, 1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A work directory in which the whole command was run at tiny scale."""
    workdir = tmp_path_factory.mktemp("pretrain")
    assert cli.run(command.main, ["--workdir", str(workdir), "--scale", "tiny"]) == 0
    return workdir


@pytest.mark.slow
def test_the_command_writes_every_asset(tiny):
    assets = tiny / "assets"
    files = {str(path.relative_to(assets)) for path in assets.rglob("*") if path.is_file()}
    assert {
        "stable-diffusion-mini/model_index.json",
        "stable-diffusion-mini/scheduler/scheduler_config.json",
        "clip/model.safetensors",
        "clip/vocab.json",
        "clip/preprocessor_config.json",
        "aesthetic/head.safetensors",
        "verifier/model.safetensors",
        "quality.json",
        "QUALITY.md",
        "samples.png",
    } <= files
    table = json.loads((assets / "quality.json").read_text())
    values = [value for rows in table.values() if isinstance(rows, dict) for value in rows.values()]
    assert len(values) > 30
    loaded = pipeline.load(str(assets / "stable-diffusion-mini"))
    assert loaded.latent_shape == (8, 8, 4)
    bank = np.load(tiny / "vae" / "bank.npz")
    assert loaded.vae_scaling_factor == pytest.approx(float(bank["scaling_factor"]))


@pytest.mark.slow
def test_a_second_start_does_nothing_again(tiny, capsys):
    before = (tiny / "unet" / "checkpoint.npz").stat().st_mtime_ns
    assert cli.run(command.main, ["--workdir", str(tiny), "--scale", "tiny", "--stages", "verifier,unet"]) == 0
    assert "unet: already trained" in capsys.readouterr().out
    assert (tiny / "unet" / "checkpoint.npz").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--stages", "vae,unett"], "unett"),
        (["--stages", "unet", "--scale", "tiny"], "needs clip trained to its end"),
    ],
)
def test_mistakes_give_one_line_and_exit_code_2(tmp_path, capsys, arguments, says):
    assert cli.run(command.main, ["--workdir", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.fixture(scope="module")
def shipped():
    """Images of 64 single objects by the weights that ship, and what the shipped verifier reads in them."""
    articles = {color: "an" if color[0] in "aeiou" else "a" for color in grammar.COLORS}
    prompts = [f"{articles[color]} {color} {shape}" for color in grammar.COLORS for shape in grammar.SHAPES][:64]
    images = quality.Sampler(pipeline.load("mini"), guidance=3.0)(prompts, seed=0)
    config = mini_verifier.default_config()
    _, parts = mini_verifier.make(config)(images, prompts, [{} for _ in prompts])
    return images, parts


def test_what_ships_draws_the_world_and_reads_it(shipped):
    """The goals of the miniature, on fresh samples. Damaged weights of UNet, VAE, text encoder or verifier fail here:
    guessing would be right in one of eight cases."""
    images, parts = shipped
    assert images.shape == (64, 32, 32, 3)
    assert np.mean(parts["color"]) >= 0.9
    assert np.mean(parts["shape"]) >= 0.6


def test_the_quality_table_is_the_one_that_was_measured():
    path = pretrain.ASSETS / "quality.json"
    table = json.loads(path.read_text())
    assert quality.markdown(table) == (path.parent / "QUALITY.md").read_text()
    for section, rows in table.items():
        if section.startswith("samples"):  # what is left for reinforcement learning to improve
            assert rows["shape"] <= 0.6 and rows["spatial"] <= 0.5
    assert sum(file.stat().st_size for file in pretrain.ASSETS.rglob("*") if file.is_file()) <= 25 * 2**20
