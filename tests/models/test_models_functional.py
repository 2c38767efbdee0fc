"""A module as a pure function of named parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ddpo_jax.models import functional


class Block(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])
        self.scale = nnx.Param(jnp.full(3, 2.0))

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x * self.scale[...]


@pytest.fixture
def block():
    return Block(nnx.Rngs(0))


X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
NAMES = {"layers.0.kernel", "layers.0.bias", "layers.1.kernel", "layers.1.bias", "scale"}


def test_names_are_attribute_paths(block):
    params = functional.flat_params(block)
    assert params.keys() == NAMES
    np.testing.assert_array_equal(params["layers.1.kernel"], block.layers[1].kernel[...])


def test_the_function_is_the_module(block):
    apply, trained, frozen = functional.functional(block, lambda name: name.startswith("layers.0"))
    assert trained.keys() == {"layers.0.kernel", "layers.0.bias"} and frozen.keys() == NAMES - trained.keys()
    np.testing.assert_allclose(jax.jit(apply)(trained, frozen, X), block(X), rtol=1e-6)


def test_the_function_uses_the_parameters_it_is_given(block):
    apply, trained, frozen = functional.functional(block, lambda name: name == "scale")
    np.testing.assert_allclose(apply({"scale": trained["scale"] * 3}, frozen, X), 3 * block(X), rtol=1e-6)
    doubled = {name: 2 * value for name, value in frozen.items()}
    x = X
    for i in range(2):
        x = np.tanh(x @ np.asarray(doubled[f"layers.{i}.kernel"]) + np.asarray(doubled[f"layers.{i}.bias"]))
    np.testing.assert_allclose(apply(trained, doubled, X), x * 2.0, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(block.scale[...], 2.0)  # the module itself is left alone


def test_gradients_are_those_of_the_module_by_name(block):
    apply, trained, frozen = functional.functional(block, lambda name: not name.endswith("bias"))
    grads = jax.grad(lambda params: (apply(params, frozen, X) ** 2).sum())(trained)
    whole = nnx.grad(lambda module: (module(X) ** 2).sum())(block)
    assert grads.keys() == trained.keys()
    np.testing.assert_allclose(grads["scale"], whole["scale"][...], rtol=1e-5)
    np.testing.assert_allclose(grads["layers.0.kernel"], whole["layers"][0]["kernel"][...], rtol=1e-5)


def test_put_fills_a_module(block):
    other = Block(nnx.Rngs(1))
    assert np.abs(other(X) - block(X)).max() > 0.01
    functional.put(other, functional.flat_params(block))
    np.testing.assert_array_equal(other(X), block(X))


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda params: params.pop("scale"), "scale"),
        (lambda params: params.update(extra=jnp.ones(1)), "extra"),
        (lambda params: params.update(scale=jnp.ones(4)), "scale"),
    ],
)
def test_put_refuses_other_parameters_by_name(block, change, named):
    params = functional.flat_params(block)
    change(params)
    before = np.asarray(block.layers[0].kernel[...])
    with pytest.raises(ValueError, match=f"parameters {named} are not those of the network"):
        functional.put(block, params)
    np.testing.assert_array_equal(block.layers[0].kernel[...], before)
