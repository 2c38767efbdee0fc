"""BLIP against transformers on random weights: both towers, the networks, names, padding, the published sizes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_blip
from flax import nnx

from ddpo_jax import errors
from ddpo_jax.models import weights
from ddpo_jax.models.blip import checkpoint, networks, text, vision

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

START = 3
answer = nnx.jit(lambda model, *inputs: model(*inputs, START))
run = nnx.jit(lambda model, *inputs: model(*inputs))


def images(count, size=32):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def pixels(torch_images):
    return jnp.asarray(torch_images.numpy().transpose(0, 2, 3, 1))


def same(tensors, others):
    assert sorted(tensors) == sorted(others)
    for name, value in tensors.items():
        np.testing.assert_array_equal(value, others[name], err_msg=name)


def token_ids(*shape, seed=1):
    return np.random.default_rng(seed).integers(5, tiny_blip.TEXT["vocab_size"], shape).astype(np.int32)


@pytest.fixture(scope="module")
def image_reward():
    """ViT wider than BERT, as in the published one."""
    return tiny_blip.image_reward(tiny_blip.VISION | {"hidden_size": 192, "num_attention_heads": 3})


@pytest.fixture(scope="module")
def our_image_reward(image_reward):
    return checkpoint.load(networks.ImageReward, tiny_blip.tensors(image_reward), where="test")[0]


@pytest.fixture(scope="module")
def vqa():
    return tiny_blip.vqa()


@pytest.fixture(scope="module")
def our_vqa(vqa):
    return checkpoint.load(networks.VisualQuestionAnswering, tiny_blip.tensors(vqa), where="test")[0]


def test_vision_tokens_equal_transformers(image_reward, our_image_reward):
    theirs = image_reward["vision_model"]
    x = tiny_blip.nchw(images(3))
    with torch.no_grad():
        want = theirs(x).last_hidden_state.numpy()
    assert want.shape == (3, 17, 192)
    np.testing.assert_allclose(run(our_image_reward.vision_model, pixels(x)), want, atol=1e-4)


def test_the_original_names_of_the_published_file_are_read(image_reward, tmp_path):
    """With what inference does not use: the projections of the pre-training and the position ids."""
    tiny_blip.write_image_reward(tmp_path, image_reward)
    named = weights.read_pickle_tensors(tmp_path / "ImageReward.pt")
    assert {"blip.visual_encoder.blocks.1.attn.qkv.bias", "mlp.layers.7.weight", "blip.text_proj.bias"} < set(named)
    renamed = checkpoint.canonical(named)
    renamed.pop("text_encoder.embeddings.position_ids")  # as keys.load does
    same(renamed, tiny_blip.tensors(image_reward))
    config = checkpoint.sizes(renamed, "test")
    assert config.vision == vision.BlipVisionConfig(32, 8, 192, 160, 2, 3)
    assert config.text == text.BlipTextConfig(tiny_blip.TEXT["vocab_size"], 128, 192, 96, 2, 2, 48)


def test_image_reward_equals_transformers_padded_captions_included(image_reward, our_image_reward):
    x, ids = tiny_blip.nchw(images(4)), token_ids(4, 12)
    mask = np.arange(12) < np.array([[12], [7], [3], [11]])
    want = tiny_blip.image_reward_scores(image_reward, x, torch.tensor(ids), torch.tensor(mask).long())
    assert np.ptp(want) > 0.5
    got = run(our_image_reward, pixels(x), ids, mask)
    np.testing.assert_allclose(got, want, atol=1e-4)
    other = np.where(mask, ids, token_ids(4, 12, seed=2))  # what is under the padding does not matter
    np.testing.assert_array_equal(run(our_image_reward, pixels(x), other, mask), got)


def test_answers_equal_transformers(vqa, our_vqa):
    x, ids = tiny_blip.nchw(images(2)), token_ids(2, 2, 9)
    want = np.stack(
        [tiny_blip.vqa_logits(vqa, x, torch.tensor(ids[:, question]), START) for question in range(2)], axis=1
    )
    assert want.std() > 0.5
    got = answer(our_vqa, pixels(x), ids, np.ones(ids.shape, bool))
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_padded_questions_are_answered_as_unpadded_ones(our_vqa):
    """transformers lets the decoder look at padding, so it is no oracle for this."""
    x, ids = pixels(tiny_blip.nchw(images(2))), token_ids(2, 2, 9)
    full = answer(our_vqa, x, ids, np.ones(ids.shape, bool))
    padded = answer(our_vqa, x, ids, np.arange(9) < np.array([[9, 4], [4, 9]])[..., None])
    short = answer(our_vqa, x, ids[..., :4], np.ones((2, 2, 4), bool))
    np.testing.assert_allclose(padded, np.where(np.eye(2, dtype=bool)[..., None], full, short), atol=2e-5)
    assert np.abs(full - short).max() > 0.1  # the padding would have mattered


def test_decoder_sees_no_later_token_and_equals_transformers(vqa, our_vqa):
    context = np.random.default_rng(3).normal(size=(2, 5, 128)).astype(np.float32)
    ids = token_ids(2, 7)
    with torch.no_grad():
        want = vqa.text_decoder(torch.tensor(ids), encoder_hidden_states=torch.tensor(context)).logits.numpy()
    np.testing.assert_allclose(run(our_vqa.text_decoder, ids, context), want, atol=1e-4)


def test_a_shared_tensor_may_be_stored_once(vqa):
    tensors = tiny_blip.tensors(vqa)
    head = "text_decoder.cls.predictions."
    whole = checkpoint.canonical(tensors)
    assert {head + "decoder.weight", head + "decoder.bias"} < set(whole) and head + "bias" not in whole
    for absent in (["decoder.weight", "decoder.bias"], ["bias"]):
        fewer = {name: value for name, value in tensors.items() if name not in [head + last for last in absent]}
        assert len(fewer) < len(tensors)
        same(checkpoint.canonical(fewer), whole)


def test_a_checkpoint_of_the_original_code_is_read(vqa):
    tensors = tiny_blip.tensors(vqa)
    named = {f"model.{name}": value for name, value in tiny_blip.original(tensors).items()}
    assert "model.visual_encoder.blocks.0.attn.proj.weight" in named
    same(checkpoint.canonical(named), checkpoint.canonical(tensors))


def test_bfloat16_is_close_and_scores_in_float32(image_reward, our_image_reward):
    half, _ = checkpoint.load(networks.ImageReward, tiny_blip.tensors(image_reward), dtype=jnp.bfloat16, where="test")
    x, ids = pixels(tiny_blip.nchw(images(4))), token_ids(4, 12)
    mask = np.ones(ids.shape, bool)
    assert nnx.eval_shape(run, half.vision_model, x).dtype == jnp.bfloat16
    got, want = run(half, x, ids, mask), run(our_image_reward, x, ids, mask)
    assert got.dtype == jnp.float32
    assert 0 < np.abs(got - want).max() < 0.1 * want.std()


def test_published_sizes():
    """Those of transformers' defaults, which are the base sizes, but for the number of heads of the text part."""
    want, got = transformers.BlipTextConfig(), networks.VQA.text
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"):
        assert getattr(got, key) == getattr(want, key)
    assert (want.num_attention_heads, got.num_attention_heads) == (8, 12)
    assert (want.layer_norm_eps, text.LAYER_NORM_EPS) == (1e-12, 1e-12)
    want, got = transformers.BlipVisionConfig(image_size=480), networks.VQA.vision
    for field in dataclasses.fields(got):
        assert getattr(got, field.name) == getattr(want, field.name)
    assert (want.layer_norm_eps, vision.LAYER_NORM_EPS) == (1e-5, 1e-6)
    assert networks.IMAGE_REWARD.vision == vision.BlipVisionConfig(224, 16, 1024, 4096, 24, 16)
    assert networks.IMAGE_REWARD.text == dataclasses.replace(networks.VQA.text, context_size=1024)


def test_other_weights_are_refused_in_one_line(image_reward, vqa):
    right = tiny_blip.tensors(image_reward)
    table = "vision_model.embeddings.position_embedding"
    clip = {"vision_model.embeddings.patch_embedding.weight": np.zeros((64, 3, 8, 8), np.float32)}
    for tensors, cls, message in [
        ({}, networks.ImageReward, r"patch_embedding.weight is missing\); they must be a BLIP's"),
        (clip, networks.ImageReward, r"received weights of another model \(.*position_embedding is missing\)"),
        (right | {table: np.zeros((17, 192))}, networks.ImageReward, r"position_embedding has the shape \[17, 192\]"),
        (right | {table: np.zeros((1, 18, 192))}, networks.ImageReward, "received 18 image positions"),
        (tiny_blip.tensors(vqa), networks.ImageReward, "10 missing: mlp.layers.0.bias.*unexpected: text_decoder"),
        (right, networks.VisualQuestionAnswering, "missing: text_decoder.*unexpected: mlp.layers.0.weight"),
    ]:
        with pytest.raises(errors.InputError, match=f"reward.blip: received 'x'; .*{message}") as caught:
            checkpoint.load(cls, tensors, where="reward.blip: received 'x'; file")
        assert "\n" not in str(caught.value)


def test_wrong_inputs_are_refused(our_image_reward):
    with pytest.raises(ValueError, match=r"BLIP images must be \[B, 32, 32, 3\]; received \[1, 24, 24, 3\]"):
        our_image_reward.vision_model(jnp.zeros((1, 24, 24, 3)))
    with pytest.raises(ValueError, match="length 49, more than the 48 positions"):
        our_image_reward.text_encoder(jnp.zeros((1, 49), jnp.int32), None, jnp.zeros((1, 2, 192)))


@pytest.mark.slow
def test_image_reward_at_full_size_equals_transformers():
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    theirs = tiny_blip.image_reward(
        {"image_size": 224, "layer_norm_eps": 1e-6, **wide},
        {"num_attention_heads": 12, "encoder_hidden_size": 1024, "is_decoder": True, "hidden_size": 768},
    )
    ours, config = checkpoint.load(networks.ImageReward, tiny_blip.tensors(theirs), where="test")
    assert config == networks.IMAGE_REWARD
    x = tiny_blip.nchw(images(2, 224))
    ids = np.random.default_rng(1).integers(1000, 30000, (2, 35)).astype(np.int32)
    mask = np.arange(35) < np.array([[35], [9]])
    want = tiny_blip.image_reward_scores(theirs, x, torch.tensor(ids), torch.tensor(mask).long())
    got = np.asarray(run(ours, pixels(x), ids, mask))
    print("image_reward at full size: max abs error", np.abs(got - want).max(), "of scores", want)
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.slow
def test_answers_at_full_size_equal_transformers():
    theirs = tiny_blip.vqa(
        {"image_size": 480, "layer_norm_eps": 1e-6}, {"num_attention_heads": 12, "encoder_hidden_size": 768}
    )
    ours, config = checkpoint.load(networks.VisualQuestionAnswering, tiny_blip.tensors(theirs), where="test")
    assert config == networks.VQA
    x = tiny_blip.nchw(images(1, 480))
    ids = np.random.default_rng(1).integers(1000, 30000, (1, 1, 8)).astype(np.int32)
    want = tiny_blip.vqa_logits(theirs, x, torch.tensor(ids[:, 0]), 30522)
    full = nnx.jit(lambda model, *inputs: model(*inputs, 30522))
    got = np.asarray(full(ours, pixels(x), ids, np.ones(ids.shape, bool)))[:, 0]
    print("vqa at full size: max abs error", np.abs(got - want).max(), "of logits of deviation", want.std())
    np.testing.assert_allclose(got, want, atol=1e-4)
