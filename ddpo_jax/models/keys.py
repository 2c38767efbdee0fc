"""Names and shapes: upstream state dicts (diffusers, transformers) <-> our parameters.

Our modules have upstream's attribute names, so the map is a rule on the last part of the name:

| ours      | upstream | axes                                              |
|-----------|----------|---------------------------------------------------|
| kernel    | weight   | convolution HWIO <-> OIHW, linear [in, out] <-> [out, in] |
| scale     | weight   | unchanged                                         |
| embedding | weight   | unchanged                                         |
| others    | the same | unchanged                                         |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ddpo_jax.errors import InputError
from ddpo_jax.models import weights

M = TypeVar("M", bound=nnx.Module)

_CONV = (2, 3, 1, 0)  # OIHW -> HWIO
_LINEAR = (1, 0)
_OLD_VAE_ATTENTION = re.compile(r"((?:encoder|decoder)\.mid_block\.attentions\.\d+)\.(query|key|value|proj_attn)\.")
_NEW_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class _OneKey:
    """Stands in for `nnx.Rngs` where no random number is ever drawn: every stream gives the same key.

    `nnx.Rngs` counts its keys, and counting under a trace takes time quadratic in their number: 18 s instead of 1.6 s
    for Stable Diffusion's UNet.
    """

    def __init__(self) -> None:
        self._key = jax.random.key(0)

    def __getattr__(self, name: str) -> Callable[[], jax.Array]:
        return lambda: self._key


def abstract(cls: type[M], config: Any, *, dtype: Any = jnp.float32) -> M:
    """`cls(config)` with shapes in place of arrays: costs no memory and draws no random numbers."""
    make = cast(Callable[..., M], cls)
    rngs = _OneKey()
    return nnx.eval_shape(lambda: make(config, dtype=dtype, rngs=rngs))


def rule(name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Our parameter -> (upstream's name, the permutation that takes upstream's axes to ours)."""
    path, dot, leaf = name.rpartition(".")
    axes = tuple(range(len(shape)))
    if leaf == "kernel":
        axes = _CONV if len(shape) == 4 else _LINEAR
    upstream = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
    return path + dot + upstream, axes


def flat(tree: nnx.Module | nnx.State) -> dict[str, Any]:
    """Parameters of a module, or of a state (of parameters, gradients, shapes) by dotted name."""
    state = nnx.state(tree, nnx.Param) if isinstance(tree, nnx.Module) else tree
    return {
        ".".join(map(str, path)): leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        for path, leaf in nnx.to_flat_state(state)
    }


def upstream_shapes(tree: nnx.Module | nnx.State) -> dict[str, tuple[int, ...]]:
    """Upstream's names and shapes of the parameters; works on `nnx.eval_shape` results."""
    shapes = {}
    for ours, leaf in _shapes(tree).items():
        name, axes = rule(ours, leaf)
        shapes[name] = tuple(leaf[axes.index(i)] for i in range(len(axes)))
    return shapes


def to_upstream(tree: nnx.Module | nnx.State) -> dict[str, np.ndarray]:
    """Parameters (or their gradients) as host arrays with upstream's names and layouts."""
    tensors = {}
    for ours, value in flat(tree).items():
        name, axes = rule(ours, value.shape)
        tensors[name] = np.asarray(value).transpose([axes.index(i) for i in range(len(axes))])
    return tensors


def canonical(tensors: Mapping[str, np.ndarray], names: Iterable[str]) -> dict[str, np.ndarray]:
    """Renames what other versions of upstream called differently, towards `names` (upstream's present ones).

    * `position_ids` buffers (transformers < 4.31) are dropped: they hold 0, 1, 2, ...
    * the VAE's mid-block attention was `query/key/value/proj_attn` (diffusers < 0.15);
    * transformers 5 omits the `text_model.` or `vision_model.` prefix of a single tower.
    """
    renamed = {}
    for name, value in tensors.items():
        if name.rpartition(".")[2] == "position_ids":
            continue
        renamed[_OLD_VAE_ATTENTION.sub(lambda m: f"{m[1]}.{_NEW_VAE_ATTENTION[m[2]]}.", name)] = value
    roots = {name.partition(".")[0] for name in names}
    for root in ("text_model", "vision_model"):
        if roots == {root} and not any(name.startswith(f"{root}.") for name in renamed):
            renamed = {f"{root}.{name}": value for name, value in renamed.items()}
    return renamed


def select(tensors: Mapping[str, np.ndarray], *roots: str) -> dict[str, np.ndarray]:
    """The tensors below the given first name parts, e.g. one tower of a whole CLIP."""
    return {name: value for name, value in tensors.items() if name.partition(".")[0] in roots}


def load(
    cls: type[M],
    config: Any,
    tensors: Mapping[str, np.ndarray],
    *,
    dtype: Any = jnp.float32,
    where: str | None = None,
    on_host: bool = False,
) -> M:
    """Builds `cls(config)` around the tensors, without initialising anything at random.

    Args:
      cls: one of our module classes.
      config: its config.
      tensors: upstream's tensors, see `canonical` for the accepted variations.
      dtype: the compute type; parameters are float32.
      where: what is being loaded, for error messages.
      on_host: leave the parameters in host memory; a jitted call then copies them to the device for its own duration.

    Raises:
      InputError: missing, unexpected or wrongly shaped tensors, by name.
    """
    model = abstract(cls, config, dtype=dtype)
    shapes = _shapes(model)
    tensors = canonical(tensors, [rule(name, shape)[0] for name, shape in shapes.items()])
    found = weights.merge(shapes, tensors, rule, where=where if where is not None else cls.__name__)
    state = nnx.state(model, nnx.Param)

    def place(value: np.ndarray) -> Any:
        if on_host:
            return np.asarray(value, order="C")
        # A copy, as a device array on a CPU may alias it, and the memory map's file may be replaced while the model
        # lives. Not jnp.array, which compiles a program for every shape.
        return jax.device_put(np.array(value, order="C"))

    filled = [(path, leaf.replace(place(found[".".join(map(str, path))]))) for path, leaf in nnx.to_flat_state(state)]
    nnx.update(model, nnx.from_flat_state(filled))
    rest = [x for x in jax.tree.leaves(nnx.state(model)) if isinstance(x, jax.ShapeDtypeStruct)]
    if rest:
        raise InputError(f"{cls.__name__}: {len(rest)} variables are not parameters and cannot be loaded")
    return model


def _shapes(tree: nnx.Module | nnx.State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in flat(tree).items()}
