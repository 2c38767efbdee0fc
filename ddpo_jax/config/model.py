"""What is known of ``config.model`` before any weight is read: its folder, the shape of its latents, its scheduler."""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
from typing import Any

import ddpo_jax
from ddpo_jax.errors import InputError, one_line

MINI = pathlib.Path(ddpo_jax.__file__).parent / "mini" / "assets" / "stable-diffusion-mini"
# Commits of hub models that are taken when the user names none: a hub id alone may change under a run.
PINNED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
    "stabilityai/stable-diffusion-2-1": "5cae40e6a2745ae2b01ad92ae5043f95f23644d6",
}
# (h, w, c) of the latents of published models, so that their configs are complete without a network.
LATENTS = {
    "CompVis/stable-diffusion-v1-4": (64, 64, 4),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (64, 64, 4),
    "stabilityai/stable-diffusion-2-base": (64, 64, 4),
    "stabilityai/stable-diffusion-2-1-base": (64, 64, 4),
    "stabilityai/stable-diffusion-2": (96, 96, 4),
    "stabilityai/stable-diffusion-2-1": (96, 96, 4),
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
MINIATURE_SIDE = 16  # latents of at most 16 x 16


def local_folder(model: str) -> pathlib.Path | None:
    """The folder of the miniature or of a local diffusers folder; None for a hub id.

    Raises:
      InputError: it cannot be a model: empty, an unknown user's home, a path that does not exist, no model_index.json.
    """
    what = f"model: received {model[:80]!r}; "
    fix = "; give a diffusers folder, a hub id, or mini"
    if model == "":
        raise InputError(f"{what}it must name a model; use mini")
    if model == "mini":
        if not MINI.is_dir():
            raise InputError(f"{what}the embedded miniature is not in this installation; install the package whole")
        return MINI
    try:
        folder = pathlib.Path(model).expanduser()
        found = folder.is_dir()
        has_index = os.path.lexists(folder / "model_index.json")
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, ~nouser, a null byte
        raise InputError(f"{what}{one_line(error)}{fix}") from error
    if found:
        if not has_index:
            raise InputError(f"{what}the folder has no model_index.json{fix}")
        return folder
    if model[0] in "/.~" or not HUB_ID.fullmatch(model):
        raise InputError(f"{what}no such folder, and it is no hub id (owner/name){fix}")
    return None


def latent_shape(model: str, revision: str) -> tuple[int, int, int]:
    """(h, w, c) of one sample, from ``unet/config.json`` alone; of a hub id that small file is downloaded.

    Raises:
      InputError: the file cannot be had or does not say it.
    """
    if local_folder(model) is None and model in LATENTS:
        return LATENTS[model]
    path = _small_file(model, revision, "unet/config.json")
    config = read_json(path)
    config = {"sample_size": None, "in_channels": None} | config
    size, channels = config["sample_size"], config["in_channels"]
    sides = size if isinstance(size, list) else [size, size]
    rule = "it must be a whole number above 0"
    if len(sides) != 2 or not all(map(_is_size, sides)):
        raise InputError(f"{path} sample_size: received {size!r}; {rule}, or two of them; export the model again")
    if not _is_size(channels):
        raise InputError(f"{path} in_channels: received {channels!r}; {rule}; export the model again")
    h, w = sides
    return h, w, channels


def scheduler_config(model: str, revision: str) -> dict[str, Any]:
    """The content of ``scheduler/scheduler_config.json``; of a hub id that small file is downloaded.

    Raises:
      InputError: the file cannot be had.
    """
    return read_json(_small_file(model, revision, "scheduler/scheduler_config.json"))


def is_miniature(model: str) -> bool:
    """Whether ``model`` is the embedded miniature, or a diffusers folder of its size."""
    if model == "mini":
        return True
    try:
        return local_folder(model) is not None and max(latent_shape(model, "")[:2]) <= MINIATURE_SIDE
    except InputError:  # which ``validate`` reports
        return False


def default_clip_range(num_dims: int) -> float:
    """Half-width of the ratio's trust region for ``num_dims`` latent dimensions, on log-probs averaged over them.

    1e-4 is the usual value at 64*64*4 = 16384 dimensions; the noise of the mean scales as 1/sqrt(dimensions).
    """
    return 1e-4 * math.sqrt(16384 / num_dims)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
      InputError: in one line, why it does not: no such file, a folder, not UTF-8, not JSON, too deep, or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # with or without a byte order mark
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: it cannot be read as JSON: {one_line(error)}; restore the file") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: received a JSON {type(value).__name__}; it must be an object; restore the file")
    return value


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 1 << 16


def _small_file(model: str, revision: str, name: str) -> pathlib.Path:
    folder = local_folder(model)
    if folder is not None:
        return folder / name
    import huggingface_hub

    commit = revision or PINNED.get(model)
    try:
        return pathlib.Path(huggingface_hub.hf_hub_download(model, name, revision=commit))
    except Exception as error:  # the client and what it stands on raise many unrelated types
        what = f"model: received {model!r}; it is no local folder, and {hub_fault(model, error)}"
        raise InputError(f"{what}; or give a local diffusers folder") from error


def hub_fault(repo: str, error: Exception) -> str:
    """Why the model hub did not give a file of ``repo``, and what to do, as part of a message."""
    from huggingface_hub import errors as hub

    if isinstance(error, hub.GatedRepoError):
        return (
            f"the hub gives it only to those who accepted its licence; accept it on the page of {repo}, then log in: "
            "set HF_TOKEN, or run hf auth login"
        )
    return f"the hub gave nothing ({one_line(error)[:200]}); check the name, the network and HF_HUB_OFFLINE"
