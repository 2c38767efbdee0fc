"""UNet2DCondition against PyTorch diffusers on random weights: values, input gradients, parameter gradients."""

from __future__ import annotations

import functools
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import torch_weights

from ddpo_jax.models.unet import UNet2DCondition, UNetConfig

# Published configs, and their likes in miniature. The last two are shapes nobody ships.
SD15 = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
SD21 = SD15 | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "only_cross_attention": False,
    "num_class_embeds": None,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
SMALL = {"block_out_channels": [16, 32], "norm_num_groups": 8, "sample_size": 8, "cross_attention_dim": 12}
PLAIN_LAST = {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
ATTENTION_EVERYWHERE = {
    "down_block_types": ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2,
}
CONFIGS = {
    "sd1": SD15 | SMALL | PLAIN_LAST | {"attention_head_dim": 8, "layers_per_block": 1},
    "sd2": SD21 | SMALL | PLAIN_LAST | {"attention_head_dim": [2, 4], "layers_per_block": 1},
    "miniature": SD15
    | ATTENTION_EVERYWHERE
    | {
        "block_out_channels": [48, 96],
        "norm_num_groups": 16,
        "layers_per_block": 1,
        "cross_attention_dim": 96,
        "attention_head_dim": 4,
        "sample_size": 8,
    },
    "odd": SD21
    | ATTENTION_EVERYWHERE
    | {
        "block_out_channels": [15, 30],
        "norm_num_groups": 5,
        "layers_per_block": 1,
        "cross_attention_dim": 7,
        "attention_head_dim": [3, 5],
        "in_channels": 3,
        "out_channels": 5,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    },
}


def _inputs(config, seed=0, batch=2, length=7, size=8):
    rng = np.random.default_rng(seed)
    latents = rng.standard_normal((batch, size, size, config["in_channels"])).astype(np.float32)
    context = rng.standard_normal((batch, length, config["cross_attention_dim"])).astype(np.float32)
    return latents, np.array([1, 981])[:batch], context


@functools.cache
def _reference(name):
    """PyTorch's state dict, output, and gradients of sum(sin(output)) by latents, context and every parameter."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    config = CONFIGS[name]
    model = diffusers.UNet2DConditionModel.from_config(config).eval()
    latents, timesteps, context = _inputs(config)
    x = torch.tensor(latents).permute(0, 3, 1, 2).requires_grad_()
    c = torch.tensor(context, requires_grad=True)
    out = model(x, torch.tensor(timesteps), c).sample
    out.sin().sum().backward()
    grads = {key: value.grad.numpy() for key, value in model.named_parameters()}
    nhwc = functools.partial(np.transpose, axes=(0, 2, 3, 1))
    return model.state_dict(), nhwc(out.detach().numpy()), nhwc(x.grad.numpy()), c.grad.numpy(), grads


# Three levels of two layers, as deep as the published ones but for one level; values only.
DEEP = {
    name: raw
    | SMALL
    | {
        "block_out_channels": [16, 32, 32],
        "attention_head_dim": heads,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    }
    for name, raw, heads in (("sd1", SD15, 8), ("sd2", SD21, [2, 4, 4]))
}
# One level: the least that has every kind of block.
ONE = CONFIGS["sd1"] | {
    "block_out_channels": [16],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "attention_head_dim": 2,
}


def _make(raw, **options):
    return UNet2DCondition(UNetConfig.from_dict(raw), rngs=nnx.Rngs(0), **options)


def _abstract(raw, **options):
    return nnx.eval_shape(functools.partial(_make, raw, **options))


def _run(function, *args):
    """Jitted call that compiles in half the time: these programs run once."""
    return jax.jit(function).lower(*args).compile({"xla_backend_optimization_level": 0})(*args)


def _gradients(model, raw):
    """Output, and gradients of sum(sin(output)) by parameters, latents and context."""
    graph, params = nnx.split(model)
    latents, timesteps, context = _inputs(raw)

    def loss(params, latents, context):
        out = nnx.merge(graph, params)(latents, timesteps, context)
        return jnp.sum(jnp.sin(out)), out

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, out), gradients = _run(gradient, params, latents, context)
    return out, *gradients


@pytest.mark.parametrize("name", CONFIGS)
def test_value_and_gradients(name):
    weights, expected, d_latents, d_context, d_params = _reference(name)
    model = torch_weights.build(functools.partial(_make, CONFIGS[name]), weights)
    out, params, latents, context = _gradients(model, CONFIGS[name])
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, atol=1e-4)
    np.testing.assert_allclose(latents, d_latents, atol=1e-4)
    np.testing.assert_allclose(context, d_context, atol=1e-4)
    ours = torch_weights.gradients(params)
    assert set(ours) == set(d_params)
    for key, (path, value) in ours.items():
        np.testing.assert_allclose(value, torch_weights.to_ours(path, d_params[key]), atol=1e-4, err_msg=key)


@pytest.mark.parametrize("name", DEEP)
def test_deep_value(name):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    reference = diffusers.UNet2DConditionModel.from_config(DEEP[name]).eval()
    latents, timesteps, context = _inputs(DEEP[name], size=12)
    with torch.inference_mode():
        x, c = torch.tensor(latents).permute(0, 3, 1, 2), torch.tensor(context)
        expected = reference(x, torch.tensor(timesteps), c).sample.permute(0, 2, 3, 1).numpy()
    for dtype, rms in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.03))[: 2 if name == "sd2" else 1]:
        model = torch_weights.build(functools.partial(_make, DEEP[name], dtype=dtype), reference.state_dict())
        graph, params = nnx.split(model)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
        out = _run(lambda params, graph=graph: nnx.merge(graph, params)(latents, timesteps, context), params)
        assert out.dtype == jnp.float32
        if dtype == jnp.float32:
            np.testing.assert_allclose(out, expected, atol=1e-4)
        error = float(np.sqrt(np.mean((np.asarray(out) - expected) ** 2)) / expected.std())
        assert error < rms
        assert dtype == jnp.float32 or error > 1e-4  # it does compute in bfloat16


def test_bfloat16_gradients_of_parameters_are_float32():
    graph, params = nnx.split(_abstract(ONE, dtype=jnp.bfloat16))
    inputs = _inputs(ONE)
    gradients = jax.eval_shape(jax.grad(lambda params: jnp.sum(nnx.merge(graph, params)(*inputs))), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}


def test_remat_does_not_change_the_gradient():
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32), nnx.state(_abstract(ONE))
    )
    runs = []
    for remat in ("none", "block"):
        runs.append(_gradients(nnx.merge(nnx.graphdef(_abstract(ONE, remat=remat)), params), ONE))
    for got, want in zip(jax.tree.leaves(runs[1]), jax.tree.leaves(runs[0]), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_remat_recomputes_every_resnet_and_transformer():
    def checkpoints(remat):
        graph, params = nnx.split(_abstract(CONFIGS["sd2"], remat=remat))
        inputs = _inputs(CONFIGS["sd2"])
        jaxpr = jax.make_jaxpr(lambda params: nnx.merge(graph, params)(*inputs))(params)
        return sum(equation.primitive.name in ("remat", "remat2", "checkpoint") for equation in jaxpr.eqns)

    assert checkpoints("none") == 0
    resnets, transformers = (1 + 1) + 2 + (2 + 2), 1 + 1 + 2  # down, mid, up
    assert checkpoints("block") == resnets + transformers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type: received 'timestep'; only None is supported"),
        (
            {"transformer_layers_per_block": [1, 2]},
            "transformer_layers_per_block: received [1, 2]; only 1 is supported",
        ),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim: received 256"),
        ({"new_option": 3}, "new_option: received 3; the option is unknown"),
        (
            {"down_block_types": ["DownBlock2D", "SimpleDownBlock2D"]},
            "down_block_types: received ('DownBlock2D', 'SimpleDownBlock2D')",
        ),
        (
            {"attention_head_dim": [2, 4, 4]},
            "attention_head_dim: received (2, 4, 4); it must be one number of heads or 2 of them",
        ),
        ({"attention_head_dim": 5}, "attention_head_dim: received 5; it must divide block_out_channels=(16, 32)"),
        ({"norm_num_groups": 12}, "norm_num_groups: received 12; it must divide all of block_out_channels"),
        (
            {"cross_attention_dim": [12, 12]},
            "cross_attention_dim: received [12, 12]; it must be a whole number from 1 to 65536",
        ),
        (
            {"_class_name": "AutoencoderKL"},
            "_class_name: received 'AutoencoderKL'; only 'UNet2DConditionModel' is supported",
        ),
    ],
)
def test_unsupported_config_is_refused_by_name(change, message):
    with pytest.raises(ValueError) as error:
        UNetConfig.from_dict(CONFIGS["sd1"] | change)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_every_fault_of_a_config_is_reported_at_once():
    with pytest.raises(ValueError, match="(?s)class_embed_type: .*\n.*dual_cross_attention: received True"):
        UNetConfig.from_dict(SD15 | {"class_embed_type": "timestep", "dual_cross_attention": True})


def test_the_config_diffusers_writes_today_is_read():
    diffusers = pytest.importorskip("diffusers")
    written = dict(diffusers.UNet2DConditionModel.from_config(CONFIGS["sd2"]).config)
    assert UNetConfig.from_dict(written) == UNetConfig.from_dict(CONFIGS["sd2"])


def test_wrong_arguments_are_refused():
    model = _abstract(CONFIGS["sd1"], remat="all")
    latents, timesteps, context = _inputs(CONFIGS["sd1"], size=8)
    with pytest.raises(ValueError, match="remat='all': must be one of none, block"):
        model(latents, timesteps, context)
    with pytest.raises(ValueError, match="latents=7x7: height and width must be multiples of 2"):
        model(latents[:, :7, :7], timesteps, context)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_full_size_forward(name, capsys):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    raw = {"sd15": SD15, "sd21": SD21}[name]
    with capsys.disabled():
        print(f"\n{name}:", end=" ")
    torch.manual_seed(0)
    reference = diffusers.UNet2DConditionModel.from_config(raw).eval()
    latents, timesteps, context = _inputs(raw, batch=1, length=77, size=64)
    with torch.inference_mode():
        start = time.perf_counter()
        out = reference(
            torch.tensor(latents).permute(0, 3, 1, 2), torch.tensor(timesteps), torch.tensor(context)
        ).sample
        torch_seconds = time.perf_counter() - start
    expected = out.permute(0, 2, 3, 1).numpy()
    state = reference.state_dict()
    del reference
    model = torch_weights.build(functools.partial(_make, raw), state)
    del state
    graph, params = nnx.split(model)
    forward = jax.jit(lambda params, *args: nnx.merge(graph, params)(*args)).lower(params, latents, timesteps, context)
    start = time.perf_counter()
    forward = forward.compile()
    compile_seconds = time.perf_counter() - start
    start = time.perf_counter()
    ours = np.asarray(forward(params, latents, timesteps, context))
    seconds = time.perf_counter() - start
    error, deviation = float(np.abs(ours - expected).max()), float(expected.std())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with capsys.disabled():
        print(
            f"max abs error {error:.2e} ({error / deviation:.2e} of the output's standard deviation, {deviation:.2f}), "
            f"forward {seconds:.1f} s (compile {compile_seconds:.1f} s; PyTorch {torch_seconds:.1f} s), "
            f"peak memory {peak:.1f} GiB"
        )
    assert error < 1e-4 and error / deviation < 1e-4  # random weights may give outputs of any size
    assert peak < 14
