"""CLIP against transformers on random weights: both towers, activations, pooling rules, gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ddpo_jax.models import clip, keys

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=11,
    bos_token_id=62,
    eos_token_id=63,
    projection_dim=24,
)
VISION = dict(
    hidden_size=40,  # heads do not follow from the width: 5 heads of 8
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=5,
    image_size=24,
    patch_size=8,
    projection_dim=24,
)


def randomize(model):
    """Gives biases and norms random values too, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tensors(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


def ids(eos):
    """Rows that end early, late, and that hold a second end-of-text token as padding."""
    rng = np.random.default_rng(0)
    rows = rng.integers(3, 60, size=(3, 11)).astype(np.int32)
    rows[:, 0] = 62
    rows[0, 4:] = eos
    rows[1, 10] = eos
    rows[2, 6], rows[2, 7:] = eos, 0
    return rows


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [63, 2])
def test_text_equals_transformers(act, eos):
    config = dict(TEXT, hidden_act=act, eos_token_id=eos)
    theirs = randomize(transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)))
    ours = keys.load(clip.CLIPText, clip.CLIPTextConfig.from_dict(theirs.config.to_dict()), tensors(theirs))
    x = ids(63)
    with torch.no_grad():
        want = theirs(torch.tensor(x), output_hidden_states=True)
    got = nnx.jit(ours)(jnp.asarray(x))
    np.testing.assert_allclose(got.last_hidden_state, want.last_hidden_state.numpy(), atol=2e-5)
    np.testing.assert_allclose(got.penultimate_hidden_state, want.hidden_states[-2].numpy(), atol=2e-5)
    np.testing.assert_allclose(got.pooled, want.pooler_output.numpy(), atol=2e-5)


def test_clip_logits_and_gradients_equal_transformers():
    config = transformers.CLIPConfig(
        text_config=TEXT, vision_config=dict(VISION, hidden_act="gelu"), projection_dim=24, logit_scale_init_value=1.5
    )
    theirs = randomize(transformers.CLIPModel(config))
    ours = keys.load(clip.CLIP, clip.CLIPConfig.from_dict(config.to_dict()), tensors(theirs))
    x = ids(63)
    images = np.random.default_rng(1).normal(size=(2, 24, 24, 3)).astype(np.float32)
    weights = np.random.default_rng(2).normal(size=(2, 3)).astype(np.float32)

    out = theirs(input_ids=torch.tensor(x), pixel_values=torch.tensor(images.transpose(0, 3, 1, 2)))
    (out.logits_per_image * torch.tensor(weights)).sum().backward()
    want = {name: p.grad.numpy() for name, p in theirs.named_parameters()}

    graphdef, state = nnx.split(ours)

    def loss(state):
        logits = nnx.merge(graphdef, state)(jnp.asarray(x), jnp.asarray(images))
        return jnp.sum(logits * weights), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(state)
    np.testing.assert_allclose(logits, out.logits_per_image.detach().numpy(), atol=5e-5)
    got = keys.to_upstream(grads)
    assert set(got) == set(want)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, atol=1e-4 * max(1.0, np.abs(value).max()), err_msg=name)


def test_vision_towers_read_a_full_checkpoint():
    theirs = randomize(transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION)))
    config = clip.CLIPVisionConfig.from_dict(theirs.config.to_dict())
    images = np.random.default_rng(1).normal(size=(2, 24, 24, 3)).astype(np.float32)
    with torch.no_grad():
        want = theirs(torch.tensor(images.transpose(0, 3, 1, 2)))
        pooled = theirs.vision_model(torch.tensor(images.transpose(0, 3, 1, 2))).pooler_output
    projected = keys.load(clip.CLIPVisionProjected, config, tensors(theirs))
    np.testing.assert_allclose(nnx.jit(projected)(images), want.image_embeds.numpy(), atol=2e-5)
    tower = {name: value for name, value in tensors(theirs).items() if name.startswith("vision_model.")}
    np.testing.assert_allclose(nnx.jit(keys.load(clip.CLIPVision, config, tower))(images), pooled.numpy(), atol=2e-5)


def test_bfloat16_is_close_and_keeps_float32_parameters():
    config = clip.CLIPTextConfig(**{k: v for k, v in TEXT.items() if k != "bos_token_id"})
    full = clip.CLIPText(config, rngs=nnx.Rngs(0))
    half = keys.load(clip.CLIPText, config, keys.to_upstream(full), dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    out = nnx.jit(half)(ids(63)).last_hidden_state
    assert out.dtype == jnp.bfloat16
    want = nnx.jit(full)(ids(63)).last_hidden_state
    assert 0 < np.sqrt(np.mean((out.astype(jnp.float32) - want) ** 2)) < 0.02  # rows have unit variance


@pytest.mark.parametrize(
    ("name", "config", "count"),
    [
        (
            "L/14",
            clip.CLIPConfig(
                clip.CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
                clip.CLIPVisionConfig(
                    hidden_size=1024,
                    intermediate_size=4096,
                    num_hidden_layers=24,
                    num_attention_heads=16,
                    patch_size=14,
                ),
                projection_dim=768,
            ),
            427_616_513,
        ),
        ("B/32", clip.CLIPConfig(), 151_277_313),
        (
            "H/14",
            clip.CLIPConfig(
                clip.CLIPTextConfig(
                    hidden_size=1024,
                    intermediate_size=4096,
                    num_hidden_layers=24,
                    num_attention_heads=16,
                    hidden_act="gelu",
                ),
                clip.CLIPVisionConfig(
                    hidden_size=1280,
                    intermediate_size=5120,
                    num_hidden_layers=32,
                    num_attention_heads=16,
                    patch_size=14,
                    hidden_act="gelu",
                ),
                projection_dim=1024,
            ),
            986_109_441,
        ),
    ],
)
def test_published_sizes(name, config, count):
    shapes = keys.upstream_shapes(keys.abstract(clip.CLIP, config))
    assert sum(math.prod(shape) for shape in shapes.values()) == count, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"rotary_base": 10000}, "rotary_base"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"num_attention_heads": 5}, "multiple"),
    ],
)
def test_unsupported_options_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        clip.CLIPTextConfig.from_dict({**TEXT, **change})


def test_too_long_input_is_refused():
    model = clip.CLIPText(clip.CLIPTextConfig.from_dict(TEXT), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="length 12"):
        model(jnp.zeros((1, 12), jnp.int32))
