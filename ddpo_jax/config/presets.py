"""What the presets of the papers (``configs/papers``) share: how an argument is read, and the rule for the miniature.

A preset carries a paper's numbers for Stable Diffusion. Its argument ``model=mini`` (or a diffusers folder of that
size) runs the same experiment on the miniature, where whatever depends on the size of the model follows this rule:

- denoising steps, LoRA, guidance: the miniature's own, 10 steps, adapters of rank 8 and no guidance: the whole UNet
  with guidance hardly learns in so few queries, and then forgets (configs/results/README.md);
- ``clip_range``: 1e-4 * sqrt(16384 / latent dimensions), the same trust region on the mean of fewer dimensions;
- images of an epoch and of an update: the paper's, or fewer in the same number of updates where an epoch of the paper
  would be most of the run; the preset says which;
- ``learning_rate``: ``RATES`` of the reward for updates of 64 images, chosen on DDPO without additions among 0.9e-3,
  3e-3 and 9e-3 (configs/sweeps/setting.py), times sqrt(images of an update / 64): a mean over more images is less noisy
  by the square root of their number. Methods that a paper trains at one rate stay at one rate; PRDP, whose rate no
  paper gives, has a quarter of DDPO's (``prdp_rate``);
- ``num_epochs``: 1500 reward queries;
- ``algorithm.min_count``: 4, where there is one: a prompt is drawn some 30 times in a run, which is too few to wait for
  the papers' 16 before its own statistics count. With over 100 000 prompts it stays at the papers' 16: each is drawn
  once, 8 images of it do not reach 16, and DDPO falls back on the statistics of the whole batch, as on Stable
  Diffusion;
- ``timestep_fraction``: the miniature's own 3 of 10 steps, drawn in proportion to the weighting, so the gradient stays
  unbiased at a third of its cost; all steps where the loss couples them;
- one device, so that a result does not depend on the machine's cores; a sweep runs several at once (--parallel);
- ``replay.k``: per device, so that the replayed share of an epoch on one device is the paper's on its devices;
- prompts: 48 of the miniature's world in place of the 45 animals, its over 100 000 in place of as many of HPDv2;
- about 5 checkpoints and image grids in a run, each of which takes as long as half an epoch.

What the argument says beyond that has the last word.
"""

from __future__ import annotations

import math

from ml_collections import ConfigDict

from ddpo_jax.config import choose, keys, with_choices
from ddpo_jax.config.defaults import FAMILIES
from ddpo_jax.config.model import is_miniature

QUERIES = 1500  # reward queries of a run on the miniature
AT_IMAGES = 64
RATES = dict.fromkeys(("jpeg_compressibility", "jpeg_incompressibility", "aesthetic"), 9e-3)  # at so many images
RATE = 3e-3  # of every other
MIN_COUNT, MIN_COUNT_ON_MANY = 4, 16  # rewards of a prompt before its own statistics count: of few and of many prompts
SAVES = 5


def split(arg: str) -> tuple[str, str, str]:
    """The parts of a preset's argument, each again an argument: the model, the members, all else.

    A preset applies them in this order, setting what depends on each after it, so that the rest overrides the preset.
    """
    model: list[str] = []
    members: list[str] = []
    rest: list[str] = []
    for item in keys.split(arg):
        key = item.partition("=")[0].strip()
        family = key.removesuffix(".name")
        (model if key == "model" else members if family in FAMILIES else rest).append(item)
    return ",".join(model), ",".join(members), ",".join(rest)


def choose_members(config: ConfigDict, members: str, min_count: int = MIN_COUNT) -> None:
    """Applies the members of an argument and this module's rule for what depends on them, in place.

    Args:
      config: of the preset; changed in place.
      members: the part of the argument that names members.
      min_count: of the algorithm on the miniature.
    """
    with_choices(config, members)
    if is_miniature(config.model):
        config.train.learning_rate = learning_rate(config.train.batch_size, config.reward.name)
        if "min_count" in config.algorithm:
            config.algorithm.min_count = min_count


def learning_rate(images: int, reward: str) -> float:
    """The miniature's for updates of so many images."""
    return RATES.get(reward, RATE) * math.sqrt(images / AT_IMAGES)


def prdp_beta(config: ConfigDict) -> None:
    """The beta of Deng et al. 2024, section 4.4, where the reward is the one they give it for; else the default's."""
    if config.reward.name == "aesthetic":
        config.algorithm.kl_coef, config.algorithm.reward_unit = 10.0, "reward"


def prdp_rate(images: int, reward: str) -> float:
    """PRDP's rate on the miniature, where DDPO makes updates of so many images.

    At DDPO's own rate the first update moves a pair's difference of rhat by 0.14 against a target of 0.05.
    """
    return learning_rate(images, reward) / 4


def on_miniature(config: ConfigDict, images: int, update: int) -> bool:
    """Applies the rule of this module if ``config.model`` is of the miniature's size; says whether it is.

    Args:
      config: of the preset; changed in place.
      images: of an epoch on the miniature.
      update: images of an update on the miniature.
    """
    if not is_miniature(config.model):
        return False
    config.num_epochs = math.ceil(QUERIES / images)
    config.sample.num_steps = config.sample.guidance_scale = None  # the miniature's own
    config.train.lora_rank = config.train.clip_range = None
    config.sample.batch_size, config.sample.num_batches_per_epoch = images, 1
    config.train.batch_size, config.train.microbatch_size = update, None
    config.mesh.data = 1
    config.checkpoint.every = config.log.images_every = max(1, config.num_epochs // SAVES)
    config.log.evaluate_every = config.checkpoint.every
    choose(config, "prompts", "mini")
    return True
