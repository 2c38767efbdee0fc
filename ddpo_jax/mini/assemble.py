"""Writes the miniature's assets from the results of pre-training: ordinary diffusers and transformers folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from ddpo_jax.errors import InputError
from ddpo_jax.mini import stages
from ddpo_jax.mini.training import trained
from ddpo_jax.mini.verifier import Verifier
from ddpo_jax.mini.world import IMAGE_SIZE
from ddpo_jax.models import keys, pipeline, preprocess, weights
from ddpo_jax.models.clip import CLIP, CLIPText
from ddpo_jax.models.pipeline import Pipeline
from ddpo_jax.models.vae import AutoencoderKL
from ddpo_jax.workdir import files

LARGEST = 25 * 2**20  # bytes of all assets together
NOTE = "made by ddpo_jax pretrain"


def make_pipeline(context: stages.Context) -> Pipeline:
    """The trained miniature as a Stable Diffusion pipeline."""
    clip = trained(stages.clip_stage(context), context.workdir, context.seed)
    factor = float(stages.encode_bank(context)["scaling_factor"])
    vae_config = stages.vae_config(context, factor)
    vae = trained(stages.vae_stage(context), context.workdir, context.seed)
    vae = keys.load(AutoencoderKL, vae_config, keys.to_upstream(vae), where="vae")
    text_config = stages.clip_config(context).text
    text = keys.load(CLIPText, text_config, keys.select(keys.to_upstream(clip), "text_model"), where="text_encoder")
    ids = {name: getattr(context.tokenizer, name) for name in ("bos_token_id", "pad_token_id")}
    return Pipeline(
        unet=trained(stages.unet_stage(context), context.workdir, context.seed),
        vae=vae,
        text_encoder=text,
        tokenizer=context.tokenizer,
        configs={
            "unet": dataclasses.asdict(stages.unet_config(context)),
            "vae": {**dataclasses.asdict(vae_config), "sample_size": IMAGE_SIZE},
            "text_encoder": {**dataclasses.asdict(text_config), **ids},
            "scheduler": stages.SCHEDULER,
        },
    )


def write(context: stages.Context, folder: Path) -> int:
    """Writes ``stable-diffusion-mini``, ``clip``, ``aesthetic`` and ``verifier`` into ``folder``; returns their bytes.

    Parts whose stage has not been trained at all are an error: the rewards would miss them later.
    """
    pipeline.save(make_pipeline(context), folder / "stable-diffusion-mini")
    write_clip(trained(stages.clip_stage(context), context.workdir, context.seed), context, folder / "clip")
    head = trained(stages.aesthetic_stage(context), context.workdir, context.seed)
    write_module(head, folder / "aesthetic", "head.safetensors", {"_note": NOTE, **dataclasses.asdict(head.config)})
    Verifier(trained(stages.verifier_stage(context), context.workdir, context.seed)).save(folder / "verifier")
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if total > LARGEST:
        raise InputError(f"{folder}: the assets have {total} bytes, more than {LARGEST}; make the networks smaller")
    return total


def write_clip(clip: CLIP, context: stages.Context, folder: Path) -> None:
    """A folder that ``CLIPModel.from_pretrained`` reads, with tokenizer and image processor."""
    config = clip.config
    ids = {name: getattr(context.tokenizer, name) for name in ("bos_token_id", "pad_token_id")}
    write_module(
        clip,
        folder,
        "model.safetensors",
        {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": config.projection_dim,
            "logit_scale_init_value": config.logit_scale_init_value,
            "text_config": {**dataclasses.asdict(config.text), **ids, "model_type": "clip_text_model"},
            "vision_config": {**dataclasses.asdict(config.vision), "model_type": "clip_vision_model"},
        },
    )
    context.tokenizer.save(folder)
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": IMAGE_SIZE},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": preprocess.CLIP_MEAN,
            "image_std": preprocess.CLIP_STD,
        },
    )


def write_module(module: nnx.Module, folder: Path, file: str, config: Mapping[str, Any]) -> None:
    """Tensors under upstream's names, and ``config.json`` beside them."""
    weights.write_safetensors(folder / file, keys.to_upstream(module))
    write_json(folder / "config.json", config)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the file at once, so that a reader never sees half of it."""
    files.write_json(path, content, indent=2)
