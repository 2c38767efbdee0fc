"""Safetensors files in and out: single, sharded or a folder's. Arrays are read-only memory maps until they are used."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from ddpo_jax.errors import InputError
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


def read_safetensors(path: PathLike) -> dict[str, np.ndarray]:
    """Reads a file, or the weights of a model folder, as memory-mapped arrays.

    In a folder the full-precision file is preferred to the `fp16` variant, and each may be split into shards listed by
    an index file.

    Raises:
      InputError: nothing to read there, or a file that is damaged.
    """
    path = Path(path)
    if path.is_dir():
        path = _choose(path, safetensors_only=True)
    if path.suffix == ".json":
        return _read_shards(path)
    return _read_one(path)


def read_folder(path: PathLike) -> dict[str, np.ndarray]:
    """Reads the weights of a model folder: safetensors as `read_safetensors`, or else PyTorch's `.bin`."""
    chosen = _choose(Path(path), safetensors_only=False)
    return read_pickle_tensors(chosen) if chosen.suffix == ".bin" else read_safetensors(chosen)


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
            if (folder / pattern.format(stem)).is_file():
                return folder / pattern.format(stem)
    raise InputError(f"{folder}: no weights here; expected {_STEMS[0]}.safetensors or {_STEMS[1]}.safetensors")


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise InputError(f"{index}: shard {name!r} must be a file name, not a path")
        if not (index.parent / name).is_file():
            raise InputError(f"{index}: shard {name!r} is missing; download the folder again")
        tensors |= _read_one(index.parent / name)
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise InputError(f"{index}: tensors listed here are in no shard: {listed(absent)}")
    return tensors


def _read_one(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(size - 8, _MAX_HEADER):
            raise InputError(f"{path}: not a safetensors file, or cut short ({size} bytes)")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise InputError(f"{path}: not a safetensors file ({error})") from None
    start, tensors = 8 + length, {}
    data = np.memmap(path, np.uint8, mode="r", offset=start) if size > start else np.zeros(0, np.uint8)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise InputError(f"{path}: tensor {name!r} has type {entry['dtype']}, which is not supported")
        dtype, (begin, end) = np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]]), entry["data_offsets"]
        if not 0 <= begin <= end <= len(data) or end - begin != dtype.itemsize * math.prod(entry["shape"]):
            raise InputError(f"{path}: tensor {name!r} does not fit the file; it is damaged or cut short")
        tensors[name] = data[begin:end].view(dtype).reshape(entry["shape"])
    return tensors


def write_safetensors(
    path: PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes one file, marked as PyTorch-compatible (what diffusers and transformers ask for); replaces it at once.

    Args:
      path: of the file; folders are made.
      tensors: by name.
      metadata: further texts for the file's header.
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
