"""A Stable Diffusion of a few thousand random weights and a run of a few images, for tests that need a whole model.

It learns nothing worth seeing: it is there so that every part of a run meets every other part within seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.config import default_config
from ddpo_jax.config.override import override
from ddpo_jax.config.ready import Ready, make_ready
from ddpo_jax.mini.bpe import train_bpe
from ddpo_jax.models import keys, pipeline
from ddpo_jax.models.clip import CLIPText, CLIPTextConfig
from ddpo_jax.models.unet import UNet2DCondition, UNetConfig
from ddpo_jax.models.vae import AutoencoderKL, VAEConfig

PROMPTS = ["a red circle", "a striped blue square", "two dotted green stars", "a cross above a heart"]
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}
UNET = UNetConfig(
    sample_size=8,
    down_block_types=("CrossAttnDownBlock2D",) * 2,
    up_block_types=("CrossAttnUpBlock2D",) * 2,
    block_out_channels=(8, 16),
    layers_per_block=1,
    cross_attention_dim=16,
    attention_head_dim=2,
    norm_num_groups=4,
)
# One level without attention but in the middle: a quarter of the program to compile, where many are.
SMALLEST_UNET = dataclasses.replace(
    UNET, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), block_out_channels=(8,)
)
VAE = VAEConfig(
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(8, 8, 8),
    norm_num_groups=4,
)
SETTINGS: dict[str, Any] = {
    "num_epochs": 2,
    "checkpoint.every": 1,
    "log.evaluate_every": 0,
    "sample.guidance_scale": 5.0,
    "train.lora_rank": 0,
    "train.learning_rate": 1.4e-4,
    "sample.num_steps": 3,
    "sample.batch_size": 8,
    "sample.num_batches_per_epoch": 1,
    "train.batch_size": 8,
    "prompts.samples_per_prompt": 2,
    "log.num_images": 4,
}


def tiny_pipeline_folder(
    path: pathlib.Path, *, seed: int = 0, scheduler: dict[str, Any] | None = None, unet: UNetConfig = UNET
) -> pathlib.Path:
    """Writes a diffusers folder: latents 8 x 8 x 4, images 32 x 32, rows of 24 tokens. Returns ``path``.

    Beside it stands ``prompts.txt``, the prompts of ``tiny_config``.

    Args:
      path: the folder, made if missing.
      seed: of the random weights.
      scheduler: changes to the content of ``scheduler_config.json``.
      unet: its sizes.
    """
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = train_bpe(PROMPTS, 560, path / "tokenizer", max_length=24)
    text = CLIPTextConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=24,
        eos_token_id=tokenizer.eos_token_id,
    )
    rng = np.random.default_rng(seed)
    tiny = pipeline.Pipeline(
        unet=random_module(UNet2DCondition, unet, rng),
        vae=random_module(AutoencoderKL, VAE, rng),
        text_encoder=random_module(CLIPText, text, rng),
        tokenizer=tokenizer,
        configs={
            "unet": dataclasses.asdict(unet),
            "vae": dataclasses.asdict(VAE),
            "text_encoder": dataclasses.asdict(text),
            "scheduler": SCHEDULER | (scheduler or {}),
        },
    )
    pipeline.save(tiny, path)
    (path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return path


@contextlib.contextmanager
def quick_compilation() -> Iterator[None]:
    """Without XLA's optimisations a program of a tiny model compiles in less time, of which it is most of a test's."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def random_module(cls: Any, config: Any, rng: np.random.Generator) -> Any:
    """``cls(config)`` with normal weights of variance 1 / fan-in, drawn by numpy: initialisers would be compiled."""
    tensors = {}
    for name, shape in keys.upstream_shapes(keys.abstract(cls, config)).items():
        if len(shape) == 1:  # biases, and the scales of norms
            tensors[name] = 0.1 * rng.standard_normal(shape) + ("norm" in name and name.endswith("weight"))
        else:
            tensors[name] = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return keys.load(cls, config, {name: value.astype(np.float32) for name, value in tensors.items()})


def tiny_config(folder: pathlib.Path, **overrides: Any) -> ConfigDict:
    """The resolved config of a run of 2 epochs of 8 images on ``folder``, in 3 steps, with the JPEG reward.

    Args:
      folder: of ``tiny_pipeline_folder``.
      overrides: dotted keys (``**{"train.lora_rank": 2}``); the name of a member brings the member's own keys.
    """
    return ConfigDict(tiny_ready(folder, **overrides).config)


def tiny_ready(folder: pathlib.Path, **overrides: Any) -> Ready:
    """The same, valid and with its members: what ``build`` and ``train`` take."""
    config = default_config()
    override(config, [(key, str(value)) for key, value in (settings(folder) | overrides).items()])
    return make_ready(config, jax.default_backend(), jax.device_count())


def settings(folder: pathlib.Path) -> dict[str, Any]:
    """The keys by which ``tiny_config`` differs from the defaults."""
    return {"model": str(folder), "prompts.name": "file", "prompts.path": str(folder / "prompts.txt")} | SETTINGS
