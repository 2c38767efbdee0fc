"""Tensor files in and out: safetensors, PyTorch's zip format without executing pickle code, strict merging, checksums.

Arrays are read as read-only memory maps: nothing is copied until it is used. Published files are pinned in
`third_party/weights.toml`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pickle
import struct
import tomllib
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

PathLike = str | os.PathLike[str]
Shape = tuple[int, ...]
KeyMap = Callable[[str, Shape], tuple[str, tuple[int, ...]]]

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
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_MAX_HEADER = 100 << 20  # bytes; the limit of the format
_MAX_LISTED = 8


# --- safetensors ------------------------------------------------------------------------------------------------------


def read_safetensors(path: PathLike) -> dict[str, np.ndarray]:
    """Reads a file, or the weights of a model folder, as memory-mapped arrays.

    In a folder the full-precision file is preferred to the `fp16` variant, and each may be split into shards listed by
    an index file.

    Raises:
      ValueError: nothing to read there, or a file that is damaged.
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
    raise ValueError(f"{folder}: no weights here; expected {_STEMS[0]}.safetensors or {_STEMS[1]}.safetensors")


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise ValueError(f"{index}: shard {name!r} must be a file name, not a path")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index}: shard {name!r} is missing; download the folder again")
        tensors |= _read_one(index.parent / name)
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise ValueError(f"{index}: tensors listed here are in no shard: {_listed(absent)}")
    return tensors


def _read_one(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(size - 8, _MAX_HEADER):
            raise ValueError(f"{path}: not a safetensors file, or cut short ({size} bytes)")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path}: not a safetensors file ({error})") from None
    start, tensors = 8 + length, {}
    data = np.memmap(path, np.uint8, mode="r", offset=start) if size > start else np.zeros(0, np.uint8)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise ValueError(f"{path}: tensor {name!r} has type {entry['dtype']}, which is not supported")
        dtype, (begin, end) = np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]]), entry["data_offsets"]
        if not 0 <= begin <= end <= len(data) or end - begin != dtype.itemsize * math.prod(entry["shape"]):
            raise ValueError(f"{path}: tensor {name!r} does not fit the file; it is damaged or cut short")
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
    from safetensors.numpy import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    header = {"format": "pt", **(metadata or {})}
    partial.touch()
    mode = partial.stat().st_mode  # as the umask has it; save_file leaves a file that only its owner can read
    save_file({name: np.asarray(value, order="C") for name, value in tensors.items()}, partial, header)
    os.chmod(partial, mode)
    os.replace(partial, path)


# --- PyTorch's zip format ---------------------------------------------------------------------------------------------


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
            raise ValueError(f"{self._path}: refused: the file asks for {module}.{name}; only tensors are read")
        return known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count = pid
        data = self._storage(key, dtype) if kind == "storage" and isinstance(dtype, np.dtype) else np.zeros(0)
        if kind != "storage" or len(data) < count:
            raise ValueError(f"{self._path}: storage {key!r} is damaged or cut short")
        return _Storage(data)


def _rebuild_tensor(storage: _Storage, offset: int, size: Shape, stride: Shape, *_: Any) -> np.ndarray:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if offset < 0 or min((*size, *stride, 0)) < 0 or (0 not in size and last >= len(storage.data)):
        raise ValueError("a tensor lies outside its storage; the file is damaged")
    item = storage.data.itemsize
    strides = tuple(step * item for step in stride)
    return np.lib.stride_tricks.as_strided(storage.data[offset:], size, strides, writeable=False)


def _rebuild_parameter(data: np.ndarray, *_: Any) -> np.ndarray:
    return data


def read_pickle_tensors(path: PathLike) -> dict[str, np.ndarray]:
    """Reads the tensors of a `torch.save` file (zip format) without PyTorch and without executing pickle code.

    Nested dictionaries are flattened with dots (`state_dict.visual.proj`); what is not a tensor is left out.

    Raises:
      ValueError: not such a file, damaged, or it refers to anything but tensors and containers.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not a zip-format torch file (before PyTorch 1.6?); convert it to safetensors")
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"{path}: expected one data.pkl in the archive, found {len(pickles)}")
        root = pickles[0].removesuffix("data.pkl")
        if root + "byteorder" in archive.namelist() and archive.read(root + "byteorder") != b"little":
            raise ValueError(f"{path}: only little-endian files are supported")

        def storage(key: str, dtype: np.dtype) -> np.ndarray:
            try:
                raw = _entry(path, archive, f"{root}data/{key}")
            except KeyError:
                raise ValueError(f"{path}: storage {key!r} is missing; the file is damaged") from None
            return raw[: len(raw) // dtype.itemsize * dtype.itemsize].view(dtype)

        with archive.open(pickles[0]) as file:
            try:
                tree = _TensorUnpickler(file, path, storage).load()
            except (pickle.UnpicklingError, EOFError, TypeError, AttributeError, IndexError, KeyError) as error:
                raise ValueError(f"{path}: refused: not a plain file of tensors ({error})") from None
    tensors = dict(_leaves("", tree))
    if not tensors:
        raise ValueError(f"{path}: holds no named tensors")
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


# --- merging ----------------------------------------------------------------------------------------------------------


def merge(
    target_shapes: Mapping[str, Shape], tensors: Mapping[str, np.ndarray], keymap: KeyMap, *, where: str
) -> dict[str, np.ndarray]:
    """Gives every parameter its tensor, and every tensor its parameter, or says what does not fit.

    Args:
      target_shapes: our parameter name -> its shape.
      tensors: upstream tensor name -> array.
      keymap: (our name, our shape) -> (upstream name, permutation that takes upstream axes to ours).
      where: what is being loaded, for the message.

    Returns:
      our name -> f32 array of our shape (a view of the memory map where nothing had to be converted).

    Raises:
      ValueError: listing missing, unexpected and wrongly shaped tensors by name.
    """
    found: dict[str, np.ndarray] = {}
    missing, misshapen, used = [], [], set()
    for ours, shape in target_shapes.items():
        name, axes = keymap(ours, shape)
        if name in used:
            raise ValueError(f"{where}: two parameters map to the tensor {name!r}")
        used.add(name)
        if name not in tensors:
            missing.append(name)
            continue
        value = tensors[name]
        wanted = tuple(shape[axes.index(i)] for i in range(len(axes)))
        if value.shape != wanted:
            misshapen.append(f"{name} {list(value.shape)} instead of {list(wanted)}")
            continue
        found[ours] = value.transpose(axes).astype(np.float32, copy=False)
    faults = {"missing": missing, "unexpected": [n for n in tensors if n not in used], "of wrong shape": misshapen}
    if any(faults.values()):
        text = "; ".join(f"{len(names)} {fault}: {_listed(names)}" for fault, names in faults.items() if names)
        raise ValueError(f"{where}: the tensors do not fit the model: {text}")
    return found


def _listed(names: list[str]) -> str:
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f", and {more} more" if more > 0 else "")


# --- pinned files -----------------------------------------------------------------------------------------------------

REGISTRY = Path(__file__).resolve().parent.parent / "third_party" / "weights.toml"


@dataclasses.dataclass(frozen=True)
class Pinned:
    """One entry of `third_party/weights.toml`."""

    name: str
    repo: str
    revision: str
    file: str
    sha256: str
    bytes: int
    format: str
    licence: str
    terms: str


def pinned(name: str, registry: PathLike = REGISTRY) -> Pinned:
    """The registry's entry `name`.

    Raises:
      ValueError: there is none; the message lists what there is.
    """
    if not Path(registry).is_file():
        raise ValueError(f"{registry}: no such file; pinned weights are listed in the source checkout's third_party/")
    entries = tomllib.loads(Path(registry).read_text(encoding="utf-8"))
    if name not in entries:
        raise ValueError(f"weights {name!r} are not in {Path(registry).name}; it holds {', '.join(sorted(entries))}")
    return Pinned(name=name, **entries[name])


def sha256(path: PathLike) -> str:
    """Hexadecimal SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: PathLike, name: str, registry: PathLike = REGISTRY) -> Path:
    """Returns `path` if it is the pinned file `name`, byte for byte.

    Raises:
      ValueError: no such file, or size or SHA-256 differ from the registry.
    """
    path, entry = Path(path), pinned(name, registry)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; get {entry.file} from {entry.repo} at revision {entry.revision}")
    if path.stat().st_size != entry.bytes:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, but {name} has {entry.bytes}; download it again")
    digest = sha256(path)
    if digest != entry.sha256:
        raise ValueError(f"{path}: sha256 {digest}, but {name} is pinned to {entry.sha256}; download it again")
    return path
