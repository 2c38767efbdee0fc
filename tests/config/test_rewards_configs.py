"""The configs of the rewards: what they choose, that they run on the miniature, and what they say without weights."""

import pathlib

import numpy as np
import pytest
import tiny

from ddpo_jax.config.file import load_file
from ddpo_jax.config.override import override
from ddpo_jax.config.ready import make_ready
from ddpo_jax.errors import InputError
from ddpo_jax.rollout.scoring import make_reward
from ddpo_jax.training.loop import train
from ddpo_jax.workdir import metrics

pytestmark = pytest.mark.usefixtures("nothing_at_home")

ROOT = pathlib.Path(__file__).resolve().parents[2] / "configs"
CONFIGS = {  # name -> reward, what is downloaded first for Stable Diffusion
    "hps": ("hps", "HPS_v2.1_compressed.pt of the hub repository xswu/HPSv2"),
    "pickscore": ("pickscore", "model.safetensors of the hub repository yuvalkirstain/PickScore_v1"),
    "image_reward": ("image_reward", "ImageReward.pt of the hub repository THUDM/ImageReward"),
    "prdp_mixture": ("weighted", "model.safetensors of the hub repository yuvalkirstain/PickScore_v1"),
    "compbench:reward=vqa": ("vqa", "model.safetensors of the hub repository Salesforce/blip-vqa-capfilt-large"),
}
SMALL = {
    **{"num_epochs": 2, "sample.num_steps": 2, "sample.batch_size": 8, "sample.num_batches_per_epoch": 1},
    **{"log.evaluate_every": 0, "log.images_every": 0, "train.timestep_fraction": 1.0},
}


def ready(name, backend="cpu", **overrides):
    file, _, choices = name.partition(":")
    config = load_file(ROOT / f"{file}.py", choices)
    override(config, [(key, str(value)) for key, value in overrides.items()])
    return make_ready(config, backend, 1)


@pytest.mark.parametrize("name", [*CONFIGS, "compbench", "compbench:reward=numeracy"])
def test_it_is_valid_on_the_miniature_and_its_command_is_in_its_docstring(name):
    config = ready(name).config
    assert config.model == "mini" and config.prompts.name == "mini"
    assert config.reward.name == CONFIGS.get(name, (name.partition("=")[2] or "spatial",))[0]
    file = name.partition(":")[0]
    assert f"--config=configs/{file}.py" in (ROOT / f"{file}.py").read_text()


@pytest.mark.parametrize("name", CONFIGS)
def test_for_stable_diffusion_the_missing_file_is_named_in_one_line(name, tmp_path):
    overrides = {}
    if "compbench" in name:
        name += f",model=stable-diffusion-v1-5/stable-diffusion-v1-5,prompts.path={tmp_path}"
    made = ready(name, "gpu", **overrides)
    assert made.config.model == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert made.config.prompts.name == ("compbench" if "compbench" in name else "animals")
    reward, wanted = CONFIGS[name.partition(",")[0]]
    with pytest.raises(InputError) as caught:
        make_reward(made.config.reward, made.members.reward)
    message = str(caught.value)
    assert wanted in message and "put it at " in message and "\n" not in message


def test_the_mixture_is_that_of_its_paper():
    config = ready("prdp_mixture").config
    assert config.algorithm.name == "prdp"
    assert config.reward.rewards == "pickscore=10,hps=2,aesthetic=0.05"
    fn = make_reward(config.reward, ready("prdp_mixture").members.reward)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    scores, parts = fn(images, ["a red circle"] * 3, [{}] * 3)
    # PickScore over 100, as in the paper: its part holds the cosine, of which the score is exp(logit scale) / 100
    assert 0 < np.abs(parts["pickscore"] / parts["pickscore/pickscore_cosine"]).max() <= 1.0 + 1e-5
    total = 10 * parts["pickscore"] + 2 * parts["hps"] + 0.05 * parts["aesthetic"]
    np.testing.assert_allclose(scores, total, rtol=1e-5)


@pytest.mark.parametrize(
    ("choice", "category"), [("", "spatial"), ("reward=numeracy", "numeracy"), ("reward=vqa", "color")]
)
def test_the_benchmarks_prompts_go_with_the_reward(choice, category):
    assert ready(f"compbench:{choice}").config.prompts.category == category
    assert ready(f"compbench:{choice},prompts.category=shape").config.prompts.category == "shape"


@pytest.mark.parametrize("name", ["compbench", "prdp_mixture:reward.normalise=advantages"])
def test_two_epochs_on_the_miniature(name, tmp_path):
    """The verifier as the detector; and CLIP and head of the miniature for the three rewards of the mixture."""
    with tiny.quick_compilation():
        train(ready(name, **SMALL), tmp_path)
    rows = metrics.read_metrics(tmp_path)
    assert [row["reward_queries"] for row in rows] == [8, 16]
    parts = ("objects_found",) if name == "compbench" else ("pickscore", "hps", "aesthetic")
    assert all(np.isfinite(row[f"reward/{part}"]) for row in rows for part in parts)
    assert all(np.isfinite(row["train/loss"]) for row in rows)
