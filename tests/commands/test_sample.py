"""Text to image: image k of every prompt starts from the same noise; the command and its faults."""

import numpy as np
import pytest
import tiny
from PIL import Image

from ddpo_jax.commands import _cli as cli
from ddpo_jax.commands import sample
from ddpo_jax.training.build import load_model
from ddpo_jax.training.trained import draw


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.tiny_pipeline_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def made(folder):
    config = tiny.tiny_config(folder, **{"mesh.data": 1})
    return config, load_model(config)


def command(*argv):
    return cli.run(sample.main, argv)


def test_image_k_of_a_prompt_depends_on_the_seed_and_k_alone(made):
    config, model = made
    a, b = tiny.PROMPTS[:2]
    images = draw(model, config, [a, b], num_images=3, seed=5)
    assert images.shape == (6, 32, 32, 3) and images.dtype == np.uint8
    config = config.copy_and_resolve_references()
    config.sample.batch_size = 2
    alone = draw(model, config, [b], num_images=3, seed=5)  # in two batches, the second filled up
    assert np.abs(alone.astype(int) - images[3:]).max() <= 1
    assert np.abs(images[0].astype(int) - images[1]).max() > 10
    other = draw(model, config, [b], num_images=2, seed=6)
    assert np.abs(other.astype(int) - alone[:2]).max() > 10


def test_the_command_writes_a_captioned_grid_and_one_line(folder, tmp_path, capsys):
    out = tmp_path / "new" / "grid.png"
    argv = [f"--model={folder}", "--prompt=a red circle", "--prompt=", "--steps=2", "--eta=0", "--num-images=2"]
    assert command(*argv, f"--out={out}") == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "4 images of 2 prompts" in printed and "2 steps, guidance 1, eta 0, seed 0" in printed
    first = np.asarray(Image.open(out))
    assert first.shape[0] > 128 and first.shape[1] > 128
    assert command(*argv, f"--out={out}") == 0
    np.testing.assert_array_equal(np.asarray(Image.open(out)), first)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt=a"], "--model, --workdir: received neither"),
        (["--model=mini"], "--prompt"),
        (["--model=mini", "--prompt=a", "--epoch=best"], "add --workdir"),
        (["--model=mini", "--prompt=a", "--eta=2"], "--eta: received 2.0"),
        (["--model=mini", "--prompt=a", "--guidance=nan"], "--guidance: received nan"),
        (["--model=mini", "--prompt=a", "--num-images=0"], "--num-images"),
        (["--model=mini", "--prompt=a", "--out=grid"], "it must end in .png"),
        (["--model=mini", "--prompt=a", "--seed=-1"], "--seed: received '-1'"),
        (["--workdir=nowhere", "--prompt=a"], "no config.json"),
        (["--model=nowhere/at/all", "--prompt=a"], "no such folder"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert command("--out=grid.png", *argv) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and message in printed, printed
