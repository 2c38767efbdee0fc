"""An NNX module as a pure function of flat, named parameters: ``{"down_blocks.0.resnets.0.conv1.kernel": array}``.

Flat names are what checkpoints, LoRA, key maps and logs agree on; the split into trained and frozen parameters is by
name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from ddpo_jax.errors import InputError
from ddpo_jax.types import Params


def flat_params(module: nnx.Module) -> Params:
    """The module's parameters by dotted name."""
    return {".".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(nnx.state(module))}


def functional(
    module: nnx.Module, trainable: Callable[[str], bool], *, release: bool = False
) -> tuple[Callable[..., Array], Params, Params]:
    """Splits a module into a pure function and its parameters.

    Args:
      module: any NNX module whose state is parameters only.
      trainable: says by dotted name whether a parameter is trained.
      release: leave shapes in the module, so that the arrays live only as long as what is returned.

    Returns:
      ``apply(trained, frozen, *inputs)``, the trained parameters, the frozen parameters.
    """
    graphdef, state = nnx.split(module)
    paths = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
    trained = {name: variable.get_value() for name, (_, variable) in paths.items() if trainable(name)}
    frozen = {name: variable.get_value() for name, (_, variable) in paths.items() if name not in trained}
    empty = {name: (path, variable.replace(_shape(variable.get_value()))) for name, (path, variable) in paths.items()}
    if release:
        nnx.update(module, nnx.from_flat_state(list(empty.values())))

    def apply(trained: Params, frozen: Params, *inputs: Array) -> Array:
        values = {**frozen, **trained}
        flat = [(path, variable.replace(values[name])) for name, (path, variable) in empty.items()]
        return nnx.merge(graphdef, nnx.from_flat_state(flat))(*inputs)

    return apply, trained, frozen


def _shape(value: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


def put(module: nnx.Module, params: Mapping[str, Any]) -> None:
    """Gives every parameter of ``module`` the value of its name.

    Raises:
      InputError: names or shapes differ from the module's.
    """
    paths = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(nnx.state(module))}
    ours = {name: variable.get_value().shape for name, (_, variable) in paths.items()}
    check_shapes(ours, {name: value.shape for name, value in params.items()})
    filled = [(path, variable.replace(jnp.asarray(params[name]))) for name, (path, variable) in paths.items()]
    nnx.update(module, nnx.from_flat_state(filled))


def check_shapes(ours: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> None:
    """Raises InputError that names parameters whose presence or shape differs."""
    wrong = sorted(name for name in ours.keys() | given.keys() if ours.get(name) != given.get(name))
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(
            f"parameters {', '.join(wrong[:3])}{more} are not those of the network; they must come from a run on the "
            "same model; give that model back"
        )
