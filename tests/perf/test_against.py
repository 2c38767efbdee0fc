"""Epochs in turns with a peer's."""

import dataclasses
import math
import stat
import types

import numpy as np
import pytest
from flax import nnx

from ddpo_jax.commands import _cli as cli
from ddpo_jax.commands import benchmark as command
from ddpo_jax.config import default_config
from ddpo_jax.config.override import override
from ddpo_jax.config.ready import make_ready
from ddpo_jax.errors import InputError
from ddpo_jax.models import lora, pipeline
from ddpo_jax.models.functional import functional
from ddpo_jax.perf import against
from ddpo_jax.training.build import build


def test_the_ratio_is_taken_turn_by_turn():
    """A machine that is twice as slow in every second turn slows both."""
    ratio, low, high = against.faster([10, 20, 10, 20], [5, 10, 5, 10])
    assert (ratio, low, high) == pytest.approx((2.0, 2.0, 2.0))
    # log2 of the ratios 1, 2 and 4: mean 1, deviation 1 with n - 1; t at 0.975 with 2 degrees of freedom is 4.3027
    ratio, low, high = against.faster([1, 2, 4], [1, 1, 1])
    assert ratio == pytest.approx(2.0) and low == pytest.approx(2 ** (1 - 4.3027 / math.sqrt(3)), rel=1e-4)
    assert high == pytest.approx(2 ** (1 + 4.3027 / math.sqrt(3)), rel=1e-4)


def test_the_table_compares_each_of_ours_with_the_peer():
    found = {what: value for what, value, _ in against.rows({"trl": [4.0, 4.0], "all": [2.0, 2.0], "some": [1.0, 1.0]})}
    assert found["trl: an epoch"] == 4.0 and found["all: faster than trl"] == 2.0
    assert found["some: faster than trl"] == 4.0 and found["some: 95 % interval, low"] == 4.0


def test_a_peer_that_is_not_installed_is_one_line(tmp_path, monkeypatch, capsys):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'trl'\" >&2\nexit 1\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(against.sys, "executable", str(python))
    assert cli.run(command.main, ["--against=trl"]) == 2
    said = capsys.readouterr().err
    assert "--against: received 'trl', which did not start: ModuleNotFoundError: No module named 'trl'; install" in said
    assert "Traceback" not in said


@pytest.fixture(scope="module")
def work():
    """A run of the miniature, and its work as the PyTorch loop is told it."""
    backend, devices = cli.start_jax(cache=False)
    config = default_config()
    override(config, [("train.batch_size", "4"), ("train.microbatch_size", "2"), ("sample.num_steps", "3")])
    ready = make_ready(config, backend, devices)
    parts = build(ready)
    with parts.reward:
        yield parts, against.loop_of(ready.config, parts)


def test_the_loop_is_told_the_same_gaussians(work):
    parts, loop = work
    rng, transition = np.random.default_rng(0), parts.sampler.policy.transition
    output, latents = rng.standard_normal((2, 3, *loop.latent)).astype(np.float32)
    mean, std = transition.step(output, latents, np.arange(3))
    tables = (np.reshape(values, (3, 1, 1, 1)) for values in (loop.from_latents, loop.from_output))
    by_latents, by_output = tables
    np.testing.assert_allclose(by_latents * latents + by_output * output, mean, atol=1e-5)
    np.testing.assert_array_equal(np.float32(loop.std), std)
    assert loop.timesteps == np.asarray(transition.timesteps).tolist()


@pytest.mark.parametrize("rank", [0, 4])
def test_the_loop_trains_as_many_numbers(work, rank):
    """Where the network is the same, so is what is trained of it; and an update moves it."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    from ddpo_jax.perf.torch_peer import Loop

    parts, told = work
    there = Loop(dataclasses.asdict(dataclasses.replace(told, rank=rank)))
    pipe, config = pipeline.load("mini"), default_config()
    if rank:
        lora.add(pipe.unet, rank, config.train.lora_targets, nnx.Rngs(0))
    _, params, _ = functional(pipe.unet, lora.is_lora if rank else lambda name: True)
    assert sum(p.numel() for p in there.trained) == sum(x.size for x in params.values())
    before = [p.detach().clone() for p in there.trained]
    assert there.run("rollout") > 0 and there.run("update") > 0
    assert any((p.detach() != b).any() for p, b in zip(there.trained, before, strict=True))
    assert len(there.latents) == 4 and there.latents[0].shape == (4, *np.roll(told.latent, 1))


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_devices_that_the_loop_cannot_have_are_refused(work, monkeypatch, kind):
    parts, _ = work
    monkeypatch.setattr(against.jax, "default_backend", lambda: kind)
    many = dataclasses.replace(parts, mesh=types.SimpleNamespace(size=2))
    with pytest.raises(InputError, match=f"on 2 x {kind}; .* use --set=mesh.data=1"):
        against.beside_torch(default_config(), many, 1)


@pytest.mark.slow
def test_torch_itself(capsys):
    pytest.importorskip("diffusers")
    assert cli.run(command.main, ["--against=torch", "--repeats=1", "--steps=2", "--batch=4"]) == 0
    printed = capsys.readouterr().out
    assert "rollout: faster than torch" in printed and "update: faster than torch" in printed


@pytest.mark.slow
def test_trl_itself(capsys):
    pytest.importorskip("trl")
    assert cli.run(command.main, ["--against=trl", "--repeats=1"]) == 0
    assert "all steps: faster than trl" in capsys.readouterr().out
