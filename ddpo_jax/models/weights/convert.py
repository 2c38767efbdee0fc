"""Any file of tensors by its content, and pickles converted once to safetensors, which are mapped and not parsed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from absl import logging

from ddpo_jax.errors import InputError, RunFailure, one_line
from ddpo_jax.models.weights.catalogue import cache_folder
from ddpo_jax.models.weights.safetensors import read_metadata, read_safetensors, write_safetensors
from ddpo_jax.models.weights.torch_zip import read_pickle_tensors

PathLike = str | os.PathLike[str]

_SOURCE = "converted_from"  # in the header: size and time of change of the pickle


def read_file(path: PathLike) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file or of one that ``torch.save`` wrote, whatever it is called.

    Raises:
      InputError: it is neither, damaged, or not to be trusted.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"
    except OSError as error:
        raise InputError(f"{path}: it cannot be read: {one_line(error)}; give a file of weights") from error
    return read_pickle_tensors(path) if zipped else read_safetensors(path)


def as_safetensors(path: PathLike) -> Path:
    """A safetensors file of a pickle's tensors: beside it or, where nothing can be written, in the cache folder.

    It is made at the first call and again when the pickle has changed. Where there is no room for it anywhere, the
    pickle itself is returned, which ``read_file`` reads as well.

    Raises:
      InputError: as ``read_pickle_tensors``.
    """
    path = Path(path)
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    name = f"{path.name}.safetensors"
    targets = [path.with_name(name), cache_folder() / "converted" / place / name]
    status = path.stat()
    wanted = {_SOURCE: f"{status.st_size} bytes, {status.st_mtime_ns} ns"}
    targets = [target for target in targets if not os.path.lexists(target) or _SOURCE in _header(target)]  # not others'
    for target in targets:
        if _header(target) == wanted:
            return target
    tensors = read_pickle_tensors(path)
    for target in targets:
        try:
            write_safetensors(target, tensors, wanted)
            return target
        except (OSError, RunFailure) as error:  # no permission, no room
            logging.info("%s: cannot be written (%s)", target, one_line(error))
    return path


def _header(path: Path) -> dict[str, str]:
    """The texts in its header but for its format; none of what cannot be read."""
    try:
        return {key: text for key, text in read_metadata(path).items() if key != "format"}
    except InputError:
        return {}
