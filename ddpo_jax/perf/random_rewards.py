"""Rewards with their published networks and random weights: the files that they read, and images per second.

Speed does not depend on what the weights are, so nothing has to be downloaded; what is timed is the reward itself, from
images on the host to scores.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tokenizers
from flax import nnx

from ddpo_jax import find
from ddpo_jax.config import default_config
from ddpo_jax.config.defaults import STABLE_DIFFUSION
from ddpo_jax.config.override import override
from ddpo_jax.config.resolve import resolve
from ddpo_jax.errors import InputError
from ddpo_jax.mini.bpe import train_bpe
from ddpo_jax.models import aesthetic_head, clip, deberta, keys
from ddpo_jax.models.blip import networks
from ddpo_jax.models.weights import write_safetensors
from ddpo_jax.perf.benchmark import Row, median_time
from ddpo_jax.rewards._shared.check import call
from ddpo_jax.rollout.scoring import make_reward

BATCH, SIDE = 16, 512  # images that are scored together, and their pixels
PROMPT = "a photo of a red cat beside a wooden chair, number {}"
CLIPS = {"aesthetic": clip.L14, "clip_score": clip.B32, "hps": clip.H14, "pickscore": clip.H14}
BLIPS: dict[str, tuple[type[nnx.Module], networks.BlipConfig, str]] = {
    "image_reward": (networks.ImageReward, networks.IMAGE_REWARD, "ImageReward.safetensors"),
    "vqa": (networks.VisualQuestionAnswering, networks.VQA, "model.safetensors"),
}
ENCODER = deberta.DebertaConfig(num_hidden_layers=40)
Options = dict[str, str]


def answer(images: np.ndarray, question: str) -> list[str]:
    """Stands in for the vision-language model of ``vlm``, which is no part of this package: only the rest is timed."""
    return [f"{question} a cat, {number}" for number in range(len(images))]


def _tensors(cls: type[nnx.Module], config: Any) -> dict[str, np.ndarray]:
    """Kernels of variance 1 / fan-in, scales of norms 1 and all else 0, under upstream's names."""
    rng, found = np.random.default_rng(0), {}
    for name, shape in keys.upstream_shapes(keys.abstract(cls, config)).items():
        if len(shape) > 1:
            found[name] = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(np.prod(shape[1:])))
        else:
            found[name] = np.full(shape, name.endswith("weight"), np.float32)
    return found


def _clip(folder: pathlib.Path, name: str) -> Options:
    config = CLIPS[name]
    tokenizer = train_bpe([PROMPT], 600, folder, max_length=config.text.max_position_embeddings)
    towers = dataclasses.asdict(config)
    towers["text"]["eos_token_id"] = tokenizer.eos_token_id
    content = {
        "text_config": towers["text"],
        "vision_config": towers["vision"],
        "projection_dim": config.projection_dim,
    }
    (folder / "config.json").write_text(json.dumps(content))
    write_safetensors(folder / "model.safetensors", _tensors(clip.CLIP, config))
    return {"clip": str(folder), "batch_size": str(BATCH)}


def _aesthetic(folder: pathlib.Path) -> Options:
    head = aesthetic_head.AestheticHeadConfig(CLIPS["aesthetic"].projection_dim)
    write_safetensors(folder / "random.safetensors", _tensors(aesthetic_head.AestheticHead, head))
    return _clip(folder, "aesthetic") | {"head": str(folder / "random.safetensors")}


def _blip(folder: pathlib.Path, name: str) -> Options:
    cls, config, file = BLIPS[name]
    letters = [prefix + letter for letter in "abcdefghijklmnopqrstuvwxyz0123456789,?" for prefix in ("", "##")]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", *letters]
    words += [f"[unused{number}]" for number in range(config.text.vocab_size - 2 - len(words))]  # [DEC], [ENC] follow
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    write_safetensors(folder / file, _tensors(cls, config))
    return {"blip": str(folder), "batch_size": str(BATCH)}


def _vlm(folder: pathlib.Path) -> Options:
    words = ["[PAD]", "[CLS]", "[SEP]", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("")
    form = {"model_type": "deberta", "relative_attention": True, "position_biased_input": False}
    content = dataclasses.asdict(ENCODER) | form | {"pos_att_type": "c2p|p2c"}
    (folder / "config.json").write_text(json.dumps(content))
    write_safetensors(folder / "model.safetensors", _tensors(deberta.Deberta, ENCODER))
    layer = str(ENCODER.num_hidden_layers)
    return {"encoder": str(folder), "layer": layer, "answerer": f"{answer.__module__}:{answer.__name__}"}


# What writes the files of a reward into a folder and says which options read them.
FILES: dict[str, Callable[[pathlib.Path], Options]] = {
    "jpeg_compressibility": lambda folder: {},
    "aesthetic": _aesthetic,
    **{name: functools.partial(_clip, name=name) for name in ("clip_score", "hps", "pickscore")},
    **{name: functools.partial(_blip, name=name) for name in BLIPS},
    "vlm": _vlm,
}


def check_names(text: str) -> list[str]:
    """The names in ``text``, with commas; all there are if it is "all".

    Raises:
      InputError: one of them cannot be had with random weights.
    """
    names = [*FILES] if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in FILES:
            near = find.nearest(name, [*FILES])
            raise InputError(
                f"--rewards: received {name!r}; it must be of {', '.join(FILES)}; use {near or 'jpeg_compressibility'}"
            )
    return names


def speed(names: Sequence[str], repeats: int) -> Iterator[Row]:
    """Images per second of each reward on ``BATCH`` images of ``SIDE`` x ``SIDE`` pixels, and its first call."""
    images = np.random.default_rng(0).integers(0, 256, (BATCH, SIDE, SIDE, 3), dtype=np.uint8)
    prompts = [PROMPT.format(number) for number in range(BATCH)]
    metadata: list[dict[str, Any]] = [{} for _ in range(BATCH)]
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            config = default_config()
            options = {f"reward.{key}": value for key, value in FILES[name](pathlib.Path(folder)).items()}
            override(config, [("model", STABLE_DIFFUSION), ("reward.name", name), *options.items()])
            resolved, members = resolve(config, jax.default_backend(), jax.device_count())
            reward = make_reward(resolved.reward, members.reward)  # all of it in memory: the gigabytes may go
        first, typical = median_time(lambda: call(reward, images, prompts, metadata, name), repeats)  # noqa: B023
        yield f"{name}, {BATCH} images of {SIDE} x {SIDE}", BATCH / typical, "images/s"
        yield f"{name}, first call (compiles)", first, "s"
