"""PyTorch's zip format (``torch.save``) read without PyTorch and without executing pickle code.

A pickle is a program. Three walls stand around it: only the opcodes that tensors in dictionaries need are let through;
the few names it may ask for are replaced by stand-ins of ours, which have no attributes and do nothing but describe a
tensor; and the tree that comes out is walked with limits. No module is imported and no class looked up by the file.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ddpo_jax.errors import InputError, one_line

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
# What torch.save writes for tensors, numbers and texts in dictionaries, lists and tuples.
_OPCODES = frozenset(
    """
    PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS EMPTY_SET
    ADDITEMS PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID
    """.split()
)
_MAX_PROGRAM = 64 << 20  # bytes of the pickle, which holds names and shapes but no numbers of a tensor
_MAX_MEMO = 1 << 24
_MAX_DEPTH = 16
_MAX_LEAVES = 1 << 20
_MAX_REPEATED = 1 << 20  # numbers of a tensor that its storage does not hold, because a stride is 0


class _Storage(NamedTuple):
    data: np.ndarray  # 1-D


class _Tensor(NamedTuple):
    data: np.ndarray


class _Tree(dict[Any, Any]):
    """Stands in for ``collections.OrderedDict``; what a state dict's ``_metadata`` says of versions is dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Name:
    """Stands in for a class or function of the file's; it has no attribute that the file could set."""

    __slots__ = ("_call",)
    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]):
        object.__setattr__(self, "_call", call)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name} cannot be set")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Tensor:
    """``torch._utils._rebuild_tensor_v2``: a view of the storage."""
    numbers = [offset, *size, *stride]
    if not isinstance(storage, _Storage) or len(size) != len(stride) or any(type(n) is not int for n in numbers):
        raise InputError("a tensor is not described by a storage and numbers")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min(numbers) < 0 or (0 not in size and last >= len(storage.data)):
        raise InputError("a tensor lies outside its storage")
    if math.prod(size) > len(storage.data) + _MAX_REPEATED:
        raise InputError("a tensor repeats a few numbers more often than any network does")
    if 0 in size:
        return _Tensor(np.zeros(size, storage.data.dtype))
    strides = tuple(step * storage.data.itemsize for step in stride)
    return _Tensor(np.lib.stride_tricks.as_strided(storage.data[offset:], size, strides, writeable=False))


def _parameter(data: Any, *_: Any) -> Any:
    """``torch._utils._rebuild_parameter``: the tensor in it."""
    return data


def _tree(items: Any = ()) -> _Tree:
    return _Tree(items)


_NAMES: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _Name(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Name(_parameter),
    ("collections", "OrderedDict"): _Name(_tree),
    **{("torch", name): name for name in _TORCH_STORAGES},
}


class _TensorUnpickler(pickle.Unpickler):
    """Knows the names above only. Any other in the stream is refused, so nothing foreign is ever called."""

    def __init__(self, file: Any, storage: Callable[[str, np.dtype], np.ndarray]):
        super().__init__(file)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise InputError(f"the file asks for {module}.{name}; only tensors are read")
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count = pid
        if kind != "storage" or dtype not in _TORCH_STORAGES or not isinstance(key, str):
            raise InputError("it refers to something that is no storage of numbers")
        data = self._storage(key, np.dtype(_TORCH_STORAGES[dtype]))
        if len(data) < count:
            raise InputError(f"storage {key!r} is cut short")
        return _Storage(data)


def read_pickle_tensors(path: PathLike) -> dict[str, np.ndarray]:
    """Reads the tensors of a `torch.save` file (zip format) without PyTorch and without executing pickle code.

    Nested dictionaries are flattened with dots (`state_dict.visual.proj`); what is not a tensor is left out.

    Raises:
      InputError: not such a file, damaged, or it refers to anything but tensors and containers.
    """
    path = Path(path)
    if not os.path.lexists(path):
        raise InputError(f"{path}: no such file; give the path of a file that torch.save wrote")
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise InputError("not a zip-format torch file (PyTorch before 1.6 wrote another)")
        with zipfile.ZipFile(path) as archive:
            tensors = dict(_leaves(_load(path, archive)))
    except InputError as error:
        raise InputError(f"{path}: refused: {error}; give a file that torch.save wrote, or safetensors") from error
    except OSError as error:  # a folder, a circle of links, no permission
        raise InputError(f"{path}: it cannot be read: {one_line(error)}; give a file you can read") from error
    except Exception as error:  # a hostile stream can raise anything: wrong kinds, endless recursion, too much memory
        raise InputError(f"{path}: refused: not a plain file of tensors ({one_line(error)[:200]})") from error
    if not tensors:
        raise InputError(f"{path}: holds no named tensors; give the file of a model's weights")
    return tensors


def _load(path: Path, archive: zipfile.ZipFile) -> Any:
    """The tree of containers, tensors and other values in the archive."""
    names = archive.namelist()
    programs = [name for name in names if name.endswith("/data.pkl")]
    if len(programs) != 1:
        raise InputError(f"expected one data.pkl in the archive, found {len(programs)}")
    root = programs[0].removesuffix("data.pkl")
    if root + "byteorder" in names and _entry(path, archive, root + "byteorder").tobytes() != b"little":
        raise InputError("only little-endian files are supported")

    def storage(key: str, dtype: np.dtype) -> np.ndarray:
        if f"{root}data/{key}" not in names:
            raise InputError(f"storage {key!r} is missing")
        raw = _entry(path, archive, f"{root}data/{key}")
        return raw[: len(raw) // dtype.itemsize * dtype.itemsize].view(dtype)

    program = _entry(path, archive, programs[0])
    if len(program) > _MAX_PROGRAM:
        raise InputError(f"its pickle has {len(program)} bytes, which no list of tensors needs")
    stream = program.tobytes()
    _check_opcodes(stream)
    return _TensorUnpickler(io.BytesIO(stream), storage).load()


def _check_opcodes(stream: bytes) -> None:
    """Refuses a pickle that does more than describe tensors, or whose memo would fill the memory."""
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name not in _OPCODES:
            raise InputError(f"its pickle has the opcode {opcode.name}; only tensors are read")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > _MAX_MEMO:
            raise InputError(f"its pickle numbers a value {argument}, which no list of tensors needs")


def _entry(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """The bytes of one archive member, mapped; torch stores them uncompressed."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise InputError(f"{name} is compressed or encrypted, which torch.save never does")
    if not info.file_size:
        return np.zeros(0, np.uint8)
    with path.open("rb") as file:
        file.seek(info.header_offset)
        name_length, extra_length = struct.unpack("<26x2H", file.read(30))
    offset = info.header_offset + 30 + name_length + extra_length
    return np.memmap(path, np.uint8, mode="r", offset=offset, shape=(info.file_size,))


def _leaves(tree: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors with their dotted names; a tree that contains itself, or shares without end, is refused."""
    visited = 0
    todo: list[tuple[str, Any, int]] = [("", tree, 0)]
    while todo:
        prefix, node, depth = todo.pop()
        visited += 1
        if depth > _MAX_DEPTH or visited + len(todo) > _MAX_LEAVES:
            raise InputError("its dictionaries are too deep or too many for a list of tensors")
        if isinstance(node, _Tensor):
            yield prefix, node.data
        elif isinstance(node, Mapping):
            children = [(f"{prefix}.{key}" if prefix else str(key), value, depth + 1) for key, value in node.items()]
            todo.extend(reversed(children))
