"""The run-time checker of the tests notices a wrong shape, and lets pass what is not an array."""

import jax.numpy as jnp
import numpy as np
import pytest
from array_checker import check
from jaxtyping import Array, Float, Int, jaxtyped

import ddpo_jax.types


@jaxtyped(typechecker=check)
def scale(
    x: Float[Array, "N T"], weight: Float[Array, " N"] | None, ids: Int[Array, " N"] | int = 0
) -> Float[Array, " N"]:
    return x.sum(1) if weight is None else x


def test_shapes_and_dtypes():
    assert scale(jnp.ones((2, 3)), None).shape == (2,)
    assert scale(np.ones((2, 3)), None, 7).shape == (2,)
    for arguments in [
        (jnp.ones(2), None),  # a missing axis
        (jnp.ones((2, 3)), jnp.ones(3)),  # N is 2 and 3
        (jnp.ones((2, 3), int), None),  # dtype
        (jnp.ones((2, 3)), None, jnp.ones(2)),
        (jnp.ones((2, 3)), jnp.ones(2)),  # what is returned
    ]:
        with pytest.raises(TypeError):
            scale(*arguments)


def test_it_is_switched_on_for_the_package():
    with pytest.raises(TypeError):
        ddpo_jax.types.Trajectory(latents=jnp.zeros((2, 5, 4, 4, 3)), log_prob=jnp.zeros((3, 4)))
