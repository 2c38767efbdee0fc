"""A folder that PyTorch diffusers built is trained, exported and sampled by PyTorch diffusers: the same images."""

import contextlib
import json
import re

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from models.test_models_pipeline import build as build_torch

from ddpo_jax.commands import _cli as cli
from ddpo_jax.commands import sample
from ddpo_jax.commands.export import main
from ddpo_jax.config import default_config
from ddpo_jax.config.override import override
from ddpo_jax.config.ready import make_ready
from ddpo_jax.models import lora, pipeline
from ddpo_jax.ops import random
from ddpo_jax.training import trained
from ddpo_jax.training.export import LORA_FILE
from ddpo_jax.training.loop import train
from ddpo_jax.workdir.checkpoint import Checkpointer

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
safetensors_torch = pytest.importorskip("safetensors.torch")

PROMPTS = ["a red circle", "two dotted blue squares"]
SEED = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An SD-2-like folder: v-prediction, linear projections."""
    return build_torch("sd2", tmp_path_factory.mktemp("base"))[1]


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Trains on demand, adapters for two epochs, the whole UNet for one; returns the folder of the run."""
    made = {}

    def run(rank):
        if rank not in made:
            made[rank] = tmp_path_factory.mktemp(f"run{rank}")
            (made[rank] / "prompts.txt").write_text("\n".join(PROMPTS))
            keys = {
                "model": base,
                "num_epochs": 2 if rank else 1,
                "prompts.name": "file",
                "prompts.path": made[rank] / "prompts.txt",
                "prompts.samples_per_prompt": 2,
                "sample.num_steps": 2,
                "sample.guidance_scale": 5.0,
                "sample.batch_size": 8,
                "train.batch_size": 8,
                "sample.num_batches_per_epoch": 1,
                "train.lora_rank": rank,
                "train.learning_rate": 0.01,
                "train.ema_decay": 0.5 if rank else 0.0,
                "checkpoint.every": 1,
                "log.images_every": 0,
            }
            config = default_config()
            override(config, [(key, str(value)) for key, value in keys.items()])
            train(make_ready(config, jax.default_backend(), jax.device_count()), made[rank] / "work")
        return made[rank] / "work"

    return run


def ours(workdir, *, steps=4, epoch="latest", ema=False):
    """(images, initial noise) of the trained weights by DDIM without noise."""
    config, model = trained.load_trained(workdir, epoch, ema)
    config = ConfigDict(config)
    config.sample.num_steps, config.sample.eta = steps, 0.0
    images = trained.draw(model, config, PROMPTS, 1, SEED)
    keys = random.sample_keys(jax.random.key(SEED), np.zeros(len(PROMPTS), np.int32))
    noise = random.normal(random.step_keys(keys, random.INITIAL_NOISE), model.pipeline.latent_shape)
    return images, np.asarray(noise)


def theirs(pipe, noise, steps=4):
    """Images of PyTorch diffusers from the same noise, in 0..255 and not rounded."""
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.tensor(noise.transpose(0, 3, 1, 2))
    call = dict(num_inference_steps=steps, guidance_scale=5.0, eta=0.0, latents=latents, output_type="np")
    return 255 * pipe(PROMPTS, **call).images


def torch_pipeline(folder):
    return diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def assert_same_images(got, want):
    assert got.shape == want.shape and got.std() > 5
    assert np.abs(got - want).max() <= 0.5 + 0.05  # levels of 255: rounding to whole ones, and float32 rounding


def command(*argv):
    return cli.run(main, argv)


def test_a_trained_unet_becomes_a_folder_that_torch_samples_alike(runs, base, tmp_path, capsys):
    runs(0)
    capsys.readouterr()  # what training says
    assert command(f"--workdir={runs(0)}", f"--out={tmp_path}") == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "epoch 1 of" in printed and str(tmp_path) in printed
    images, noise = ours(runs(0))
    assert_same_images(images, theirs(torch_pipeline(tmp_path), noise))
    assert np.abs(images - theirs(torch_pipeline(base), noise)).max() > 5  # training changed them
    again = pipeline.load(str(tmp_path))
    _, params = trained.read_params(runs(0), trained.read_config(runs(0)))
    kernel = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.kernel"
    got = again.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.kernel[...]
    np.testing.assert_array_equal(got, params[kernel])


def test_adapters_become_a_file_and_merged_weights(runs, base, tmp_path):
    assert command(f"--workdir={runs(2)}", f"--out={tmp_path}") == 0
    assert [path.name for path in tmp_path.iterdir()] == [LORA_FILE]
    images, noise = ours(runs(2))

    # What PEFT does with the file, in a few lines: W + alpha / r * B A for every layer named.
    by_hand = torch_pipeline(base)
    assert np.abs(images - theirs(by_hand, noise)).max() > 5
    tensors = safetensors_torch.load_file(tmp_path / LORA_FILE)
    layers = {name.removeprefix("unet.").partition(".lora_")[0] for name in tensors}
    modules = dict(by_hand.unet.named_modules())
    assert layers == {name for name in modules if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))}
    with torch.no_grad():
        for layer in layers:
            update = tensors[f"unet.{layer}.lora_B.weight"] @ tensors[f"unet.{layer}.lora_A.weight"]
            modules[layer].weight += update
    assert_same_images(images, theirs(by_hand, noise))

    assert command(f"--workdir={runs(2)}", f"--out={tmp_path / 'whole'}", "--format=folder") == 0
    assert_same_images(images, theirs(torch_pipeline(tmp_path / "whole"), noise))


def test_peft_reads_the_file_and_writes_it_back(runs, base, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed; it is in the test extra")
    assert command(f"--workdir={runs(2)}", f"--out={tmp_path}") == 0
    images, noise = ours(runs(2))
    pipe = torch_pipeline(base)
    untrained = theirs(pipe, noise)
    # Named, since a pipeline calls its first adapter default_0 and a network saves the one called default.
    pipe.load_lora_weights(tmp_path, adapter_name="trained")
    assert_same_images(images, theirs(pipe, noise))
    assert np.abs(images - untrained).max() > 5

    pipe.unet.save_lora_adapter(tmp_path / "network", adapter_name="trained")
    pipe.save_lora_weights(
        tmp_path / "pipeline",
        unet_lora_layers=peft.get_peft_model_state_dict(pipe.unet, adapter_name="trained"),
        unet_lora_adapter_metadata=pipe.unet.peft_config["trained"].to_dict(),
    )
    _, params = trained.read_params(runs(2), trained.read_config(runs(2)))
    for folder in (tmp_path, tmp_path / "network", tmp_path / "pipeline"):
        back = lora.load(folder / LORA_FILE)
        assert set(back) == set(params)
        for name, value in params.items():
            np.testing.assert_array_equal(back[name], value, err_msg=name)


def test_the_file_is_sampled_without_the_run(runs, base, tmp_path, capsys):
    assert command(f"--workdir={runs(2)}", f"--out={tmp_path}") == 0
    file = str(tmp_path / LORA_FILE)
    config, model = trained.load_base(str(base), file, jax.default_backend(), 1)
    config = ConfigDict(config)
    config.sample.num_steps, config.sample.eta, config.sample.guidance_scale = 4, 0.0, 5.0
    assert_same_images(trained.draw(model, config, PROMPTS, 1, SEED), ours(runs(2))[0])

    argv = ["--prompt=a", f"--out={tmp_path / 'grid.png'}", "--steps=1"]
    assert cli.run(sample.main, [f"--model={base}", f"--lora={file}", *argv]) == 0
    capsys.readouterr()
    for given, message in (
        (["--model=mini", f"--lora={file}"], "use the --model that the adapters were trained on"),
        ([f"--workdir={runs(2)}", f"--lora={file}"], "--lora: received with --workdir"),
        ([f"--model={base}", "--lora=nowhere"], "nowhere"),
    ):
        assert cli.run(sample.main, [*given, *argv]) == 2
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1 and message in printed, printed


def test_which_weights_are_taken(runs):
    config = trained.read_config(runs(2))
    assert trained.read_params(runs(2), config)[0] == trained.read_params(runs(2), config, "2")[0] == 2
    with Checkpointer(runs(2), read_only=True) as saver:
        best = saver.best_epoch()
    assert trained.read_params(runs(2), config, "best")[0] == best
    (_, latest), (_, first), (_, ema) = (
        trained.read_params(runs(2), config, *which) for which in (("latest",), (1,), ("latest", True))
    )
    assert set(latest) == set(first) == set(ema) and all(lora.is_lora(name) for name in latest)
    assert all(np.abs(latest[n] - other[n]).max() > 0 for other in (first, ema) for n in latest if n.endswith("up"))


def test_the_model_of_a_run_keeps_its_reference(runs):
    _, model = trained.load_trained(runs(2), dtype="float32")
    assert set(model.reference) == set(model.params)
    assert all(float(abs(value).max()) == 0 for value in model.reference.values())


@pytest.mark.parametrize(
    ("rank", "argv", "message"),
    [
        (0, ["--format=lora"], "the run trained the whole UNet; use --format=folder"),
        (2, ["--epoch=7"], "received '7'; saved in .* are 1, 2; use one, latest or best"),
        (0, ["--format=onnx"], "--format: invalid choice"),
        (0, ["--quick"], "unrecognized arguments: --quick"),
        (None, [], "there is no config.json in it"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(runs, tmp_path, capsys, rank, argv, message):
    workdir = tmp_path if rank is None else runs(rank)
    capsys.readouterr()  # of the training
    assert command(f"--workdir={workdir}", f"--out={tmp_path / 'out'}", *argv) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and re.search(message, printed), printed


def test_the_model_of_the_run_is_not_overwritten(runs, base, capsys):
    before = (base / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert command(f"--workdir={runs(0)}", f"--out={base}") == 2
    assert "the model the run started from" in capsys.readouterr().err
    assert (base / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before


def test_a_run_without_average_or_of_another_version_is_refused(runs, tmp_path):
    content = json.loads((runs(2) / "config.json").read_text())
    content["train"]["ema_decay"] = 0.0
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = trained.read_config(tmp_path)
    with pytest.raises(ValueError, match="kept no average"):
        trained.read_params(tmp_path, config, ema=True)
    with pytest.raises(ValueError, match="no folder"):
        trained.read_params(tmp_path, config)
    del content["train"]["lora_rank"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="it lacks train.lora_rank"):
        trained.read_config(tmp_path)


def test_a_run_in_progress_is_left_alone(runs, tmp_path):
    unfinished = runs(2) / "checkpoints" / "9.orbax-checkpoint-tmp"
    unfinished.mkdir()
    with contextlib.ExitStack() as stack:
        stack.callback(unfinished.rmdir)
        trained.read_params(runs(2), trained.read_config(runs(2)))
        assert unfinished.is_dir()
