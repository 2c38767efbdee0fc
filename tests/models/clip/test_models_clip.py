"""CLIP against transformers and open_clip on random weights: towers, activations, heads, pooling rules, gradients."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import open_clip_oracle
import pytest
from flax import nnx

from ddpo_jax.errors import InputError
from ddpo_jax.models import clip, keys
from ddpo_jax.models.clip import names

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


def nchw(images):
    return torch.tensor(images.transpose(0, 3, 1, 2))


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
    projected = keys.load(clip.CLIPVisionProjected, config, tensors(theirs))
    np.testing.assert_allclose(nnx.jit(projected)(images), want.image_embeds.numpy(), atol=2e-5)


# H/14 in proportions: the exact GELU, and heads of the image tower 80 wide where open_clip's default is 64.
H14_HEADS = clip.CLIPConfig(
    text=clip.CLIPTextConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=11,
        hidden_act="gelu",
        eos_token_id=63,
    ),
    vision=clip.CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        hidden_act="gelu",
    ),
    projection_dim=24,
)


def assert_same_features(ours, ids, images, text, image):
    """Projected features of N texts and N images, to 1e-4."""
    got = nnx.jit(lambda m, ids, images: (m.text_features(ids), m.image_features(images)))(ours, ids, images)
    for mine, theirs in zip(got, (text, image), strict=True):
        assert theirs.std() > 0.1
        np.testing.assert_allclose(mine, theirs, atol=1e-4, rtol=0)


def test_h14_equals_open_clip_in_its_own_names():
    open_clip = open_clip_oracle.package()
    torch.manual_seed(0)
    theirs = randomize(
        open_clip.CLIP(
            embed_dim=24,
            vision_cfg=dict(image_size=28, layers=2, width=160, head_width=80, patch_size=14),
            text_cfg=dict(context_length=11, vocab_size=64, width=128, heads=2, layers=2),
        )
    )
    ours = keys.load(clip.CLIP, H14_HEADS, names.to_transformers(tensors(theirs)))
    images = np.random.default_rng(1).normal(size=(3, 28, 28, 3)).astype(np.float32)
    x = ids(63)
    with torch.no_grad():
        text, image = theirs.encode_text(torch.tensor(x)), theirs.encode_image(nchw(images))
    assert_same_features(ours, x, images, text.numpy(), image.numpy())
    np.testing.assert_allclose(ours.logit_scale[...], theirs.logit_scale.item(), rtol=1e-6)


def test_h14_equals_transformers_in_the_projected_features():
    """What the CI can always ask: transformers' pooler_output of `get_*_features` holds the projected features."""
    theirs = h14_of_transformers()
    ours = keys.load(clip.CLIP, clip.CLIPConfig.from_dict(theirs.config.to_dict()), tensors(theirs))
    images = np.random.default_rng(1).normal(size=(3, 28, 28, 3)).astype(np.float32)
    x = ids(63)
    with torch.no_grad():
        text = theirs.get_text_features(torch.tensor(x)).pooler_output
        image = theirs.get_image_features(nchw(images)).pooler_output
    assert_same_features(ours, x, images, text.numpy(), image.numpy())


def h14_of_transformers():
    torch.manual_seed(0)
    towers = dataclasses.asdict(H14_HEADS)
    return randomize(
        transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config=towers["text"] | {"bos_token_id": 62}, vision_config=towers["vision"], projection_dim=24
            )
        )
    )


def test_open_clip_names_are_those_of_transformers():
    want = tensors(h14_of_transformers())
    theirs = open_clip_oracle.names(want)
    assert len(theirs) == len(want) - 2 * 2 * 2 * 2  # towers, layers, weight and bias: three tensors are one
    checkpoint = {f"state_dict.{name}": value for name, value in theirs.items()} | {"optimizer.step": np.ones(1)}
    for given in (theirs, checkpoint, want):
        got = names.to_transformers(given)
        assert got.keys() == want.keys()
        for name, value in want.items():
            np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_what_is_not_of_this_network_is_named():
    theirs = open_clip_oracle.names(tensors(h14_of_transformers()))
    odd = theirs | {"visual.attn_pool.query": np.zeros(3), "visual.proj": theirs["visual.proj"][:, :20]}
    with pytest.raises(ValueError, match=r"unexpected: visual.attn_pool.query; .*visual_projection.weight \[20, 160\]"):
        keys.load(clip.CLIP, H14_HEADS, names.to_transformers(odd))
    with pytest.raises(InputError, match=r"resblocks.0.attn.in_proj_bias: received 7 rows"):
        names.to_transformers(theirs | {"transformer.resblocks.0.attn.in_proj_bias": np.zeros(7)})


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
    ("config", "count"), [(clip.L14, 427_616_513), (clip.H14, 986_109_441), (clip.B32, 151_277_313)]
)
def test_published_sizes(config, count):
    assert size(keys.abstract(clip.CLIP, config)) == count


def test_published_sizes_of_the_image_towers():
    vision = dataclasses.replace(clip.L14.vision, projection_dim=clip.L14.projection_dim)
    assert size(keys.abstract(clip.CLIPVisionProjected, vision)) == 303_966_208
    assert clip.H14.vision.hidden_size // clip.H14.vision.num_attention_heads == 80


def size(model):
    return sum(math.prod(shape) for shape in keys.upstream_shapes(model).values())


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
    with pytest.raises(InputError, match=message):
        clip.CLIPTextConfig.from_dict({**TEXT, **change})


def test_too_long_input_is_refused():
    model = clip.CLIPText(clip.CLIPTextConfig.from_dict(TEXT), rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="length 12"):
        model(jnp.zeros((1, 12), jnp.int32))
