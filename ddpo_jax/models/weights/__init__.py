"""Files of tensors: safetensors, PyTorch's zip format read without executing it, strict merging, pinned checksums."""

from ddpo_jax.models.weights.merge import KeyMap, Shape, merge
from ddpo_jax.models.weights.pinned import pinned, sha256, verify
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
    "merge",
    "pinned",
    "read_folder",
    "read_metadata",
    "read_pickle_tensors",
    "read_safetensors",
    "sha256",
    "shard_names",
    "verify",
    "write_safetensors",
]
