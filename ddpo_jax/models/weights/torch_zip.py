"""PyTorch's zip format (``torch.save``) read without PyTorch and without executing pickle code."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ddpo_jax.errors import InputError

PathLike = str | os.PathLike[str]
Shape = tuple[int, ...]

_TORCH_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class _Storage(NamedTuple):
    data: np.ndarray  # 1-D


class _TensorUnpickler(pickle.Unpickler):
    """Knows tensors and containers only. Any other name in the stream is refused, so nothing foreign is ever called."""

    def __init__(self, file: Any, path: Path, storage: Callable[[str, Any], np.ndarray]):
        super().__init__(file)
        self._path, self._storage = path, storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _TORCH_STORAGES:
            return np.dtype(_TORCH_STORAGES[name])
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if (module, name) not in known:
            raise InputError(f"{self._path}: refused: the file asks for {module}.{name}; only tensors are read")
        return known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count = pid
        data = self._storage(key, dtype) if kind == "storage" and isinstance(dtype, np.dtype) else np.zeros(0)
        if kind != "storage" or len(data) < count:
            raise InputError(f"{self._path}: storage {key!r} is damaged or cut short")
        return _Storage(data)


def _rebuild_tensor(storage: _Storage, offset: int, size: Shape, stride: Shape, *_: Any) -> np.ndarray:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if offset < 0 or min((*size, *stride, 0)) < 0 or (0 not in size and last >= len(storage.data)):
        raise InputError("a tensor lies outside its storage; the file is damaged")
    item = storage.data.itemsize
    strides = tuple(step * item for step in stride)
    return np.lib.stride_tricks.as_strided(storage.data[offset:], size, strides, writeable=False)


def _rebuild_parameter(data: np.ndarray, *_: Any) -> np.ndarray:
    return data


def read_pickle_tensors(path: PathLike) -> dict[str, np.ndarray]:
    """Reads the tensors of a `torch.save` file (zip format) without PyTorch and without executing pickle code.

    Nested dictionaries are flattened with dots (`state_dict.visual.proj`); what is not a tensor is left out.

    Raises:
      InputError: not such a file, damaged, or it refers to anything but tensors and containers.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path}: not a zip-format torch file (before PyTorch 1.6?); convert it to safetensors")
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise InputError(f"{path}: expected one data.pkl in the archive, found {len(pickles)}")
        root = pickles[0].removesuffix("data.pkl")
        if root + "byteorder" in archive.namelist() and archive.read(root + "byteorder") != b"little":
            raise InputError(f"{path}: only little-endian files are supported")

        def storage(key: str, dtype: np.dtype) -> np.ndarray:
            try:
                raw = _entry(path, archive, f"{root}data/{key}")
            except KeyError:
                raise InputError(f"{path}: storage {key!r} is missing; the file is damaged") from None
            return raw[: len(raw) // dtype.itemsize * dtype.itemsize].view(dtype)

        with archive.open(pickles[0]) as file:
            try:
                tree = _TensorUnpickler(file, path, storage).load()
            except (pickle.UnpicklingError, EOFError, TypeError, AttributeError, IndexError, KeyError) as error:
                raise InputError(f"{path}: refused: not a plain file of tensors ({error})") from None
    tensors = dict(_leaves("", tree))
    if not tensors:
        raise InputError(f"{path}: holds no named tensors")
    return tensors


def _entry(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """The bytes of one archive member: mapped where it is stored, read where it is compressed."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or not info.file_size:
        return np.frombuffer(archive.read(name), np.uint8)
    with path.open("rb") as file:
        file.seek(info.header_offset)
        name_length, extra_length = struct.unpack("<26x2H", file.read(30))
    offset = info.header_offset + 30 + name_length + extra_length
    return np.memmap(path, np.uint8, mode="r", offset=offset, shape=(info.file_size,))


def _leaves(prefix: str, tree: Any) -> Iterable[tuple[str, np.ndarray]]:
    if isinstance(tree, np.ndarray):
        yield prefix, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), value)
