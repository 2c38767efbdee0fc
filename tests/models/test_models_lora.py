"""Adapters: the base at the start and when off, to the bit; gradients; merging; the file that PEFT reads."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from safetensors import safe_open

from ddpo_jax.models import keys, lora
from ddpo_jax.models.functional import flat_params, functional, put
from ddpo_jax.models.layers import Linear
from ddpo_jax.models.unet import UNet2DCondition

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
RANK = 2


def unet():
    return tiny.random_module(UNet2DCondition, tiny.UNET, np.random.default_rng(0))


def abstract():
    return keys.abstract(UNet2DCondition, tiny.UNET)


def inputs():
    rng = np.random.default_rng(1)
    latents, context = rng.normal(size=(2, 8, 8, 4)), rng.normal(size=(2, 6, 16))
    return latents.astype(np.float32), np.array([801, 3]), context.astype(np.float32)


@pytest.fixture(scope="module")
def adapted():
    """(network, adapters at their start, frozen, compiled network, output of the base)."""
    base = unet()
    want = nnx.jit(lambda module, *x: module(*x))(base, *inputs())
    lora.add(base, RANK, TARGETS, nnx.Rngs(0))
    network, params, frozen = functional(base, lora.is_lora)
    return network, params, frozen, jax.jit(network), np.asarray(want)


def moved(params):
    """Adapters after some training."""
    rng = np.random.default_rng(2)
    return {name: (0.3 * rng.normal(size=value.shape)).astype(np.float32) for name, value in params.items()}


def test_one_layer_by_hand():
    layer = Linear(2, 3, rngs=nnx.Rngs(0))
    kernel, bias = np.array([[1.0, 2, 3], [4, 5, 6]], np.float32), np.array([0.5, 0, -0.5], np.float32)
    layer.kernel.set_value(jnp.asarray(kernel))
    layer.bias.set_value(jnp.asarray(bias))
    with_adapter = lora.LoRALinear(layer, 1, 3.0, nnx.Rngs(0))
    with_adapter.lora_down.set_value(jnp.array([[1.0], [-2.0]]))
    with_adapter.lora_up.set_value(jnp.array([[10.0, 0.0, 1.0]]))
    # x = (1, 1): W x + b = (5.5, 7, 8.5); A x = -1; alpha / r = 3; 3 * -1 * B = (-30, 0, -3)
    np.testing.assert_allclose(with_adapter(jnp.ones((1, 2))), [[-24.5, 7.0, 5.5]])


def test_every_attention_projection_is_adapted_and_nothing_else(adapted):
    _, params, frozen, *_ = adapted
    layers = {name.rpartition(".")[0] for name in params}
    assert len(params) == 2 * len(layers)
    assert layers == {n.rpartition(".")[0] for n in frozen if ".attn" in n and n.endswith("kernel")}
    assert set(frozen) == set(keys.flat(abstract()))


def test_at_the_start_and_switched_off_the_output_is_that_of_the_base_to_the_bit(adapted):
    _, params, frozen, compiled, want = adapted
    np.testing.assert_array_equal(compiled(params, frozen, *inputs()), want)
    off = jax.tree.map(jnp.zeros_like, params)
    np.testing.assert_array_equal(compiled(off, frozen, *inputs()), want)
    assert np.abs(np.asarray(compiled(moved(params), frozen, *inputs())) - want).max() > 0.05


def test_the_first_gradient_is_that_of_b_alone_and_every_b_has_one(adapted):
    network, params, frozen, *_ = adapted
    grads = jax.jit(jax.grad(lambda p: jnp.square(network(p, frozen, *inputs())).mean()))(params)
    assert set(grads) == set(params)
    for name, value in grads.items():
        norm = float(jnp.abs(value).max())
        assert (norm == 0) == name.endswith(lora.DOWN), name  # dL/dA = B^T ... = 0 while B = 0


def test_merged_weights_give_the_adapted_output(adapted):
    _, params, frozen, compiled, want = adapted
    params = moved(params)
    plain = unet()
    put(plain, lora.merge({**frozen, **params}))
    got = nnx.jit(lambda module, *x: module(*x))(plain, *inputs())
    np.testing.assert_allclose(got, compiled(params, frozen, *inputs()), atol=2e-5)
    assert np.abs(got - want).max() > 0.05
    off = lora.merge({**frozen, **jax.tree.map(np.zeros_like, params)})
    assert all(np.array_equal(off[name], frozen[name]) for name in frozen)


def test_parameters_of_another_network_are_refused():
    module = unet()
    params = dict(flat_params(module))
    params["conv_in.kernel"] = params["conv_in.kernel"][..., :4]
    with pytest.raises(ValueError, match="conv_in.kernel are not those of the network"):
        put(module, params)


def test_targets_are_ends_of_names():
    names = lora.add(abstract(), RANK, ("attn2.to_k", "ff.net.2"), nnx.Rngs(0))
    assert names and all(name.endswith(("attn2.to_k", "ff.net.2")) for name in names)
    with pytest.raises(ValueError, match=r"lora_targets.*\['o_q'\] name no linear layer"):
        lora.add(abstract(), RANK, ("to_k", "o_q"), nnx.Rngs(0))


def test_the_file_has_the_names_layouts_and_scale_of_peft(adapted, tmp_path):
    params = moved(adapted[1])
    lora.save(tmp_path / "f.safetensors", params)
    with safe_open(tmp_path / "f.safetensors", "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        described = json.loads(file.metadata()["lora_adapter_metadata"])
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    np.testing.assert_array_equal(tensors[f"unet.{layer}.lora_A.weight"], params[f"{layer}.lora_down"].T)
    np.testing.assert_array_equal(tensors[f"unet.{layer}.lora_B.weight"], params[f"{layer}.lora_up"].T)
    assert tensors[f"unet.{layer}.lora_A.weight"].shape == (RANK, 16)  # of the text's width, 16
    assert len(tensors) == len(params)
    assert described["unet.r"] == described["unet.lora_alpha"] == RANK
    assert set(described["unet.target_modules"]) == {name.rpartition(".")[0] for name in params}


def test_a_file_is_read_back_for_a_scale_of_1(adapted, tmp_path):
    params = moved(adapted[1])
    for alpha, scale in ((None, 1), (3.0 * RANK, 3), (0.5, 0.25)):
        lora.save(tmp_path / "f.safetensors", params, alpha)
        back = lora.load(tmp_path / "f.safetensors")
        assert set(back) == set(params)
        for name, value in back.items():
            want = params[name] * np.float32(scale if name.endswith(lora.UP) else 1)
            np.testing.assert_array_equal(value, want, err_msg=name)
