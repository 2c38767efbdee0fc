"""Safetensors files in and out: single, sharded or a folder's. Arrays are read-only memory maps until they are used."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ddpo_jax.config.model import read_json
from ddpo_jax.errors import InputError, one_line
from ddpo_jax.models import schema
from ddpo_jax.models.weights.merge import listed
from ddpo_jax.models.weights.torch_zip import read_pickle_tensors
from ddpo_jax.workdir import files

PathLike = str | os.PathLike[str]

_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")

_MAX_HEADER = 100 << 20  # bytes; the limit of the format
_MAX_DIMENSIONS = 32  # of numpy 1
_AGAIN = "download it again"


def read_safetensors(path: PathLike) -> dict[str, np.ndarray]:
    """Reads a file, or the weights of a model folder, as memory-mapped arrays.

    In a folder the full-precision file is preferred to the `fp16` variant, and each may be split into shards listed by
    an index file.

    Raises:
      InputError: nothing to read there, or a file that is damaged.
    """
    path = Path(path)
    if os.path.isdir(path):
        path = _choose(path, safetensors_only=True)
    if path.suffix == ".json":
        return _read_shards(path)
    return _read_one(path)


def read_folder(path: PathLike) -> dict[str, np.ndarray]:
    """Reads the weights of a model folder: safetensors as `read_safetensors`, or else PyTorch's `.bin`."""
    chosen = _choose(Path(path), safetensors_only=False)
    return read_pickle_tensors(chosen) if chosen.suffix == ".bin" else read_safetensors(chosen)


def read_metadata(path: PathLike) -> dict[str, str]:
    """The texts in a file's header, without its tensors.

    Raises:
      InputError: it is no safetensors file, or they are no texts.
    """
    header, _ = _read_header(Path(path))
    texts = header["__metadata__"] if "__metadata__" in header else {}
    if not isinstance(texts, dict) or not all(isinstance(value, str) for value in texts.values()):
        raise InputError(
            f"{path} __metadata__: received {schema.shown(texts)}; it must be an object of texts; {_AGAIN}"
        )
    return texts


def shard_names(index: Path) -> list[str]:
    """The files that an index lists.

    Raises:
      InputError: the index does not map names of tensors to names of files beside it.
    """
    return sorted(set(_weight_map(index).values()))


def _choose(folder: Path, safetensors_only: bool) -> Path:
    patterns = [
        "{}.safetensors",
        "{}.safetensors.index.json",
        "{}.fp16.safetensors",
        "{}.safetensors.index.fp16.json",
        "{}.fp16.safetensors.index.json",
    ]
    if not safetensors_only:
        patterns += ["{}.bin", "{}.fp16.bin"]
    for pattern in patterns:
        for stem in _STEMS:
            if os.path.lexists(folder / pattern.format(stem)):  # a broken link too: reading it says what is wrong
                return folder / pattern.format(stem)
    raise InputError(f"{folder}: no weights here; expected {_STEMS[0]}.safetensors or {_STEMS[1]}.safetensors")


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    files = content["weight_map"] if "weight_map" in content else None
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        rule = "it must be an object of tensors and the files that hold them"
        raise InputError(f"{index} weight_map: received {schema.shown(files)}; {rule}; {_AGAIN}")
    for name in files.values():
        if name in ("", "..") or Path(name).name != name:
            raise InputError(f"{index}: shard {schema.shown(name)} must be a file name, not a path; {_AGAIN}")
    return files


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    files = _weight_map(index)
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(files.values())):
        if not os.path.lexists(index.parent / name):
            raise InputError(f"{index}: shard {name!r} is missing; download the folder again")
        tensors |= _read_one(index.parent / name)
    absent = [name for name in files if name not in tensors]
    if absent:
        raise InputError(f"{index}: tensors listed here are in no shard: {listed(absent)}; {_AGAIN}")
    return tensors


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header and the position of the first tensor's first byte."""
    if not os.path.lexists(path):
        raise InputError(f"{path}: no such file; give the path of a safetensors file")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            if length > min(size - 8, _MAX_HEADER):
                raise InputError(f"{path}: not a safetensors file, or cut short ({size} bytes); {_AGAIN}")
            header = json.loads(file.read(length))
    except OSError as error:  # a folder, a circle of links, no permission
        raise InputError(f"{path}: it cannot be read: {one_line(error)}; give a file you can read") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not a safetensors file ({one_line(error)}); {_AGAIN}") from error
    if not isinstance(header, dict):
        raise InputError(f"{path}: not a safetensors file (its header is no object); {_AGAIN}")
    return header, 8 + length


def _read_one(path: Path) -> dict[str, np.ndarray]:
    header, start = _read_header(path)
    size = path.stat().st_size
    data = np.memmap(path, np.uint8, mode="r", offset=start) if size > start else np.zeros(0, np.uint8)
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            tensors[name] = _tensor(f"{path}: tensor {schema.shown(name)}", entry, data)
    return tensors


def _tensor(where: str, entry: Any, data: np.ndarray) -> np.ndarray:
    """The array that an entry of the header describes, as a view of the file's data."""
    kinds = {"dtype": str, "shape": list, "data_offsets": list}
    if not isinstance(entry, dict) or any(not isinstance(entry.get(key), kind) for key, kind in kinds.items()):
        raise InputError(f"{where} is described by {schema.shown(entry)}, not by dtype, shape and offsets; {_AGAIN}")
    if entry["dtype"] not in _SAFETENSORS_DTYPES:
        raise InputError(f"{where} has type {schema.shown(entry['dtype'])}, which is not supported; save it as F32")
    dtype, shape, offsets = np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]]), entry["shape"], entry["data_offsets"]
    numbers = all(schema.is_whole(number, 0, 1 << 62) for number in (*shape, *offsets))
    if not numbers or len(offsets) != 2 or len(shape) > _MAX_DIMENSIONS:
        raise InputError(f"{where} has shape {schema.shown(shape)} at {schema.shown(offsets)}; {_AGAIN}")
    begin, end = offsets
    if not begin <= end <= len(data) or end - begin != dtype.itemsize * math.prod(shape):
        raise InputError(f"{where} does not fit the file; it is damaged or cut short; {_AGAIN}")
    try:
        return data[begin:end].view(dtype).reshape(shape)
    except ValueError as error:  # a size of 0 beside sizes that no array can have
        raise InputError(f"{where} has shape {schema.shown(shape)}; {_AGAIN}") from error


def write_safetensors(
    path: PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes one file, marked as PyTorch-compatible (what diffusers and transformers ask for); replaces it at once.

    Args:
      path: of the file; folders are made.
      tensors: by name.
      metadata: further texts for the file's header.

    Raises:
      OSError: it cannot be written; a file that was there is left as it is.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    header = {"format": "pt", **(metadata or {})}
    with files.replacing(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode  # as the umask has it; save_file leaves a file that only its owner can read
        try:
            save_file({name: np.asarray(value, order="C") for name, value in tensors.items()}, partial, header)
        except SafetensorError as error:  # of a full disk as well
            raise OSError(str(error)) from error
        os.chmod(partial, mode)
