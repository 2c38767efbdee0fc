"""Copies PyTorch weights into our modules by the naming rule, independent of the package's own key maps."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx

NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def to_ours(path: tuple, array: np.ndarray) -> np.ndarray:
    """A PyTorch array in the layout of the parameter at ``path``."""
    if path[-1] != "kernel":
        return array
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def torch_name(path: tuple) -> str:
    """State-dict name of the parameter at ``path``."""
    return ".".join([*map(str, path[:-1]), NAMES[path[-1]]])


def build(make: Callable[[], nnx.Module], state_dict: dict) -> nnx.Module:
    """The module with PyTorch's weights, never initialised; every tensor must be used exactly once and fit."""
    module = nnx.eval_shape(make)
    tensors = {name: tensor.detach().numpy() for name, tensor in state_dict.items()}
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        value = to_ours(path, tensors.pop(torch_name(path)))
        if value.shape != variable.get_value().shape:
            raise AssertionError(f"{torch_name(path)}: {value.shape} against {variable.get_value().shape}")
        variable.set_value(jnp.asarray(value))
    if tensors:
        raise AssertionError(f"unused: {sorted(tensors)}")
    return module


def gradients(grads: nnx.State) -> dict[str, tuple[tuple, np.ndarray]]:
    """PyTorch name -> (path, gradient) of our parameter gradients, in our layout."""
    return {torch_name(path): (path, np.asarray(value.get_value())) for path, value in nnx.to_flat_state(grads)}
