"""What the CLIP rewards share: finding and reading a CLIP folder, its image processor, and batches of one size."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

import ddpo_jax
from ddpo_jax.errors import InputError
from ddpo_jax.models import clip, keys, preprocess, weights

ASSETS = Path(ddpo_jax.__file__).parent / "mini" / "assets"
B32, L14 = "openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14"
# A hub id without a commit may change under a run; these are the ones whose scores the papers report.
REVISIONS = {
    B32: "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268",
    L14: "32bd64288804d66eefd0ccbe215aa642df71cc41",
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SMALL_FILES = ["*.json", "merges.txt"]
_WEIGHTS = ["model.safetensors", "pytorch_model.bin"]


def embedded(name: str, key: str, value: str) -> Path:
    """The folder ``name`` of the embedded assets.

    Args:
      name: of the folder.
      key: the config key that asked for it, for the message.
      value: what that key holds.
    Raises:
      InputError: it is not there.
    """
    folder = ASSETS / name
    if not folder.is_dir():
        raise InputError(
            f"{key}={value!r}: the miniature's {name!r} weights are not in this installation ({folder}); "
            "make them with python -m ddpo_jax.mini.pretrain, or install a released version"
        )
    return folder


def chosen_folder(config: ConfigDict, default: str) -> Path:
    """The CLIP folder of a reward's options ``clip`` and ``weights``.

    Args:
      config: ``clip`` names a folder or hub id; empty, ``weights`` decides: "mini" is the miniature's.
      default: hub id of all other ``weights``.

    Raises:
      InputError: as ``embedded`` and ``clip_folder``.
    """
    if not config.clip and config.weights == "mini":
        return embedded("clip", "reward.weights", "mini")
    return clip_folder(config.clip or default, "reward.clip")


def clip_folder(source: str, key: str) -> Path:
    """A CLIP folder: a local one, or that of a hub id, which is downloaded once.

    Raises:
      InputError: it is neither, or it cannot be downloaded.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{key}={source!r}: no config.json there; give a folder that CLIPModel.save_pretrained wrote"
            )
        return folder
    if not _HUB_ID.fullmatch(source) or source.startswith("."):
        raise InputError(f"{key}={source!r}: no such folder; give a CLIP folder or a hub id such as {B32}")
    import huggingface_hub

    try:
        revision = REVISIONS.get(source)
        folder = Path(huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=_SMALL_FILES))
        for name in _WEIGHTS:
            huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=[name])
            if (folder / name).is_file():
                return folder
    except Exception as error:  # no network, no such repository, no access: the hub's client has many errors
        cause = " ".join(str(error).split())
        raise InputError(
            f"{key}={source!r}: no such folder, and the hub does not give it ({type(error).__name__}: {cause[:300]}); "
            "give a local CLIP folder, or download it where there is a network"
        ) from error
    raise InputError(f"{key}={source!r}: the repository holds none of {', '.join(_WEIGHTS)}; convert the model first")


@dataclasses.dataclass(frozen=True)
class Processor:
    """uint8 images of any size to the input of a vision tower."""

    size: int
    mean: tuple[float, ...] = preprocess.CLIP_MEAN
    std: tuple[float, ...] = preprocess.CLIP_STD

    @classmethod
    def from_folder(cls, folder: Path, image_size: int) -> Processor:
        """Reads preprocessor_config.json; a folder without one means CLIP's own constants.

        Raises:
          InputError: it asks for anything but shortest side, bicubic, centre crop to ``image_size``, normalise.
        """
        file = folder / "preprocessor_config.json"
        if not file.is_file():
            return cls(image_size)
        values = json.loads(file.read_text(encoding="utf-8"))
        wanted = {
            "size": (image_size, {"shortest_edge": image_size}, {"height": image_size, "width": image_size}),
            "crop_size": (image_size, {"height": image_size, "width": image_size}),
            "resample": (3,),
            **{f"do_{step}": (True,) for step in ("resize", "center_crop", "rescale", "normalize")},
        }
        for key, allowed in wanted.items():
            if key in values and values[key] not in allowed:
                raise InputError(f"{file}: {key} = {values[key]!r} is not supported; it must be {allowed[0]!r}")
        mean, std = (
            tuple(values.get(key, default)) for key, default in (("image_mean", cls.mean), ("image_std", cls.std))
        )
        return cls(image_size, mean, std)

    def __call__(self, images: UInt8[Array, "N H W 3"]) -> Float[Array, "N size size 3"]:
        return preprocess.clip_pixels(images, self.size, path="pil", mean=self.mean, std=self.std)


def read_config(folder: Path) -> clip.CLIPConfig:
    """The folder's config.json."""
    return clip.CLIPConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def load_vision(folder: Path) -> tuple[clip.CLIPVisionProjected, Processor]:
    """The vision tower with its projection; the text tower of the folder is not read."""
    config = read_config(folder)
    vision = dataclasses.replace(config.vision, projection_dim=config.projection_dim)
    tensors = keys.select(weights.read_folder(folder), "vision_model", "visual_projection")
    return (
        keys.load(clip.CLIPVisionProjected, vision, tensors, where=str(folder)),
        Processor.from_folder(folder, vision.image_size),
    )


def load_clip(folder: Path) -> tuple[clip.CLIP, Processor]:
    """Both towers."""
    config = read_config(folder)
    model = keys.load(clip.CLIP, config, weights.read_folder(folder), where=str(folder))
    return model, Processor.from_folder(folder, config.vision.image_size)


def in_batches(
    model: nnx.Module, fn: Callable[[Any, Array], Array], batch_size: int
) -> Callable[[np.ndarray], np.ndarray]:
    """``fn`` on the host, jitted: rows in batches of ``batch_size``, the last one filled up with copies of a row.

    Args:
      model: the networks; their parameters are arguments of the compiled program, not constants in it.
      fn: (model, rows) to rows, each computed on its own.
      batch_size: rows per call of the device.
    Returns:
      rows [N, ...] to f32[N, ...], of any N > 0; another N does not compile again.
    """
    if batch_size < 1:
        raise InputError(f"reward.batch_size={batch_size} must be at least 1")
    graphdef, state = nnx.split(model)

    @jax.jit
    def compiled(state: Any, rows: Array) -> Array:
        # Scores are published in float32. A reward network runs once per image, so this costs next to nothing.
        with jax.default_matmul_precision("highest"):
            return fn(nnx.merge(graphdef, state), rows).astype(jnp.float32)

    def run(rows: np.ndarray) -> np.ndarray:
        done: list[Any] = []
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            padding = np.broadcast_to(batch[:1], (batch_size - len(batch), *batch.shape[1:]))
            done.append(compiled(state, np.concatenate([batch, padding]))[: len(batch)])
        return np.concatenate(jax.device_get(done))

    return run
