"""Files of tensors: safetensors, PyTorch's zip format read without executing it, strict merging, published files."""

from ddpo_jax.models.weights.catalogue import entries, entry, sha256, verify
from ddpo_jax.models.weights.convert import as_safetensors, read_file
from ddpo_jax.models.weights.fetch import find_weights, verify_snapshot
from ddpo_jax.models.weights.merge import KeyMap, Shape, merge
from ddpo_jax.models.weights.safetensors import (
    read_folder,
    read_metadata,
    read_safetensors,
    shard_names,
    write_safetensors,
)
from ddpo_jax.models.weights.torch_zip import read_pickle_tensors

__all__ = [
    "KeyMap",
    "Shape",
    "as_safetensors",
    "entries",
    "entry",
    "find_weights",
    "merge",
    "read_file",
    "read_folder",
    "read_metadata",
    "read_pickle_tensors",
    "read_safetensors",
    "sha256",
    "shard_names",
    "verify",
    "verify_snapshot",
    "write_safetensors",
]
