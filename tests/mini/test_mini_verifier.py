"""The verifier: scores of hand-made detections worked by hand, targets, peaks, and the class around the network."""

import itertools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ddpo_jax.mini import scoring, verifier, world
from ddpo_jax.models.weights import read_safetensors, write_safetensors

score = jax.jit(scoring.score)
TABLES = (world.COLORS, world.SHAPES, world.TEXTURES)


def thing(color, shape, texture="plain", center=(16.0, 16.0), presence=1.0, sure=(1.0, 1.0, 1.0)):
    """A detection that gives its color, shape and texture the probabilities `sure`, the rest evenly to the others."""
    tables = []
    for table, word, p in zip(TABLES, (color, shape, texture), sure, strict=True):
        row = np.full(len(table), (1 - p) / (len(table) - 1))
        row[table.index(word)] = p
        tables.append(row)
    return presence, *tables, np.array(center)


def judge(prompt, *things, slots=8):
    things = [*things, *[thing("green", "star", presence=0.0)] * (slots - len(things))]
    found = scoring.Detections(*(jnp.asarray(np.stack(x), jnp.float32)[None] for x in zip(*things, strict=True)))
    total, parts = score(found, scoring.questions([prompt]))
    return float(total[0]), {name: float(part[0]) for name, part in parts.items() if not np.isnan(part[0])}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_one_object():
    total, parts = judge("a striped red circle", thing("red", "circle", "striped", presence=0.9, sure=(0.8, 0.7, 0.6)))
    assert parts == pytest.approx({"color": 0.72, "shape": 0.63, "texture": 0.54})
    assert total == pytest.approx((0.72 + 0.63 + 0.54) / 3)


def test_nothing_there_is_nothing():
    for prompt in ("a red circle", "a red circle above a blue star"):
        total, parts = judge(prompt)
        assert total == 0 and set(parts.values()) == {0.0}


def test_hedging_does_not_pay():
    alone, _ = judge("a red circle", thing("red", "circle"))
    _, parts = judge("a red circle", thing("red", "circle"), thing("blue", "circle", center=(6, 6)))
    assert alone == pytest.approx(1)
    assert parts == pytest.approx({"color": 0.5, "shape": 1.0, "texture": 1.0})


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_relation(order):
    pair = thing("red", "circle", center=(8, 15)), thing("blue", "square", "dotted", center=(22, 17))
    total, parts = judge("a red circle left of a dotted blue square", *(pair[i] for i in order))
    spatial = sigmoid((14 - 2) / 1.5)
    assert parts == pytest.approx({"color": 1, "shape": 1, "texture": 1, "spatial": spatial})
    assert total == pytest.approx((3 + spatial) / 4)
    for relation, lead in {"right of": -14 - 2, "above": 2 - 14, "below": -2 - 14}.items():
        _, parts = judge(f"a red circle {relation} a dotted blue square", *(pair[i] for i in order))
        assert parts["spatial"] == pytest.approx(sigmoid(lead / 1.5), abs=1e-6)
        assert parts["color"] == 1


def test_relation_vertical():
    pair = thing("red", "circle", center=(15, 8)), thing("blue", "square", center=(16, 20))
    assert judge("a red circle above a blue square", *pair)[1]["spatial"] == pytest.approx(sigmoid(11 / 1.5))
    assert judge("a blue square below a red circle", *pair)[1]["spatial"] == pytest.approx(sigmoid(11 / 1.5))


def test_relation_with_one_object_missing_or_one_too_many():
    red = thing("red", "circle", center=(8, 16))
    blue = thing("blue", "square", center=(24, 16))
    _, parts = judge("a red circle left of a blue square", red)
    assert parts == pytest.approx({"color": 0.5, "shape": 0.5, "texture": 0.5, "spatial": 0})
    _, parts = judge("a red circle left of a blue square", red, blue, thing("pink", "star", center=(16, 4)))
    assert parts["color"] == pytest.approx(2 / 3) and parts["spatial"] == pytest.approx(sigmoid(16 / 1.5))


def test_relation_with_swapped_colors():
    # Asked: red circle, blue square. There: blue circle left, red square right. Two readings match 2 of 3 attributes
    # per thing; the favourable one takes the circle first (shape right) and finds the relation right.
    pair = thing("blue", "circle", center=(8, 16)), thing("red", "square", center=(24, 16))
    _, parts = judge("a red circle left of a blue square", *pair)
    assert parts == pytest.approx(
        {"color": 0, "shape": 1, "texture": 1, "spatial": (2 / 3) ** 2 * sigmoid(16 / 1.5)}, abs=1e-6
    )


@pytest.mark.parametrize(
    ("presences", "number", "expected"),
    [
        ((1, 1), "two", 1.0),
        ((1, 1, 1), "four", 0.5 * 0.75),
        ((1, 1, 1), "two", 0.5 * 0.5),
        ((1, 1, 1, 1), "two", 0.0),
        ((0.5, 0.5), "two", 0.5 * (0.5 * 0.5 + 0.25) + 0.5 * 0.25),  # P(0, 1, 2) = 1/4, 1/2, 1/4
        ((), "three", 0.0),
    ],
)
def test_number(presences, number, expected):
    things = [thing("red", "star", presence=p, center=(4 + 8 * i, 8)) for i, p in enumerate(presences)]
    _, parts = judge(f"{number} red stars", *things)
    assert parts["numeracy"] == pytest.approx(expected, abs=1e-6)
    assert set(parts) == {"color", "shape", "texture", "numeracy"}


def test_number_against_enumeration():
    presence, number = np.array([0.9, 0.3, 0.6, 0.05, 0.5]), 3
    expected = 0.0
    for outcome in itertools.product((0, 1), repeat=5):
        weight = np.prod(np.where(outcome, presence, 1 - presence))
        count = sum(outcome)
        expected += weight * (max(0, 1 - abs(count - number) / number) + (count == number)) / 2
    assert float(scoring.numeracy(jnp.asarray(presence)[None], jnp.array([number]))[0]) == pytest.approx(expected, 1e-5)


def test_scores_are_bounded_and_graded():
    rng = np.random.default_rng(0)
    prompts = [world.captions(world.sample_scenes(rng, 256))[i] for i in range(256)]
    found = scoring.Detections(
        jnp.asarray(rng.random((256, 8)) ** 3, jnp.float32),
        *(jax.nn.softmax(jnp.asarray(4 * rng.normal(size=(256, 8, n)), jnp.float32)) for n in (8, 8, 3)),
        jnp.asarray(rng.uniform(-2, 34, (256, 8, 2)), jnp.float32),
    )
    total, parts = score(found, scoring.questions(prompts))
    for x in (total, *parts.values()):
        x = x[~np.isnan(x)]
        assert len(x) and (x >= 0).all() and (x <= 1).all()
    assert total.shape == (256,) and not np.isnan(total).any() and len(set(np.asarray(total).tolist())) > 250
    applies = Counter(world.parse(p).kind for p in prompts)
    assert (~np.isnan(parts["spatial"])).sum() == applies["relation"]
    assert (~np.isnan(parts["numeracy"])).sum() == applies["number"]


def test_unknown_prompt():
    with pytest.raises(ValueError, match="'a cat'"):
        scoring.questions(["a cat"])


# --- the detector


def test_targets_by_hand():
    spec = world.Spec((world.Thing("blue", "ring", "dotted"),))
    scene = world.Scene(spec, (world.Object("blue", "ring", "dotted", (13.0, 22.4), 12.0),), (230.0, 0, 0, 0))
    target = {k: v[0] for k, v in verifier.targets(world.stack([scene])).items()}
    # Cells are 4 px: column 13 // 4 = 3 (middle 14), row 22.4 // 4 = 5 (middle 22).
    assert np.argwhere(target["presence"]).tolist() == [[5, 3]]
    np.testing.assert_allclose(target["offset"][5, 3], [-0.25, 0.1], atol=1e-6)
    assert target["attributes"][5, 3].tolist() == [4, 5, 2]
    # |x - 13| < 3.5: middles 10 and 14; |y - 22.4| < 3.5: only middle 22.
    assert np.argwhere(target["weight"]).tolist() == [[5, 2], [5, 3]]
    assert np.argwhere(target["counted"] == 0).tolist() == [[5, 2]]


def test_every_object_of_a_batch_has_its_cell():
    scenes = world.sample_scenes(np.random.default_rng(0), 300)
    target = verifier.targets(scenes)
    np.testing.assert_array_equal(target["presence"].sum((1, 2)), scenes.count)
    batch = verifier.make_batch(np.random.default_rng(0), 300)
    assert {k: v.shape[0] for k, v in batch.items()} == dict.fromkeys(batch, 300)
    assert (batch["presence"].sum((1, 2)) == 0).any(), "empty pictures are part of the training"


def perfect(target):
    """A network that says exactly the targets."""
    sizes = {"color": 8, "shape": 8, "texture": 3}
    out = {name: 20 * jax.nn.one_hot(target["attributes"][..., k], n) for k, (name, n) in enumerate(sizes.items())}
    out["presence"] = 20.0 * (2 * target["presence"][..., None] - 1)
    out["offset"] = jnp.asarray(target["offset"])
    return lambda images: out


def test_a_perfect_network_has_no_loss_and_is_right_about_everything():
    rng = np.random.default_rng(2)
    scenes = world.sample_scenes(rng, 64)
    target = verifier.targets(scenes)
    batch = {"images": world.render_all(scenes), **target}
    loss = jax.jit(lambda target, batch, key: verifier.loss(perfect(target), batch, key))
    total, parts = loss(target, batch, jax.random.key(0))
    assert float(total) < 1e-4 and set(parts) == {"presence", "color", "shape", "texture", "offset"}
    wrong = {**target, "attributes": (target["attributes"] + 1) % 3}
    assert float(loss(wrong, {**batch, **target}, jax.random.key(0))[0]) > 10

    found = verifier.detect(perfect(target), jnp.zeros((64, 32, 32, 3)))
    for part, (right, applies) in scoring.answers(found, scenes).items():
        assert right[applies].all(), part
    total, _ = score(found, scoring.questions(world.captions(scenes)))
    assert (np.asarray(total) > 0.97).all()
    other, _ = score(found, scoring.questions(world.captions(scenes)[1:] + world.captions(scenes)[:1]))
    assert np.asarray(other).mean() < 0.6


def test_only_local_maxima_are_detections():
    heat = np.full((1, 8, 8, 1), -20.0, np.float32)
    heat[0, 2, 3], heat[0, 2, 4], heat[0, 6, 1] = 2.0, 1.0, 0.0  # the second touches the first
    out = {"presence": heat, "offset": np.full((1, 8, 8, 2), 0.25, np.float32)}
    out |= {name: np.zeros((1, 8, 8, n), np.float32) for name, n in (("color", 8), ("shape", 8), ("texture", 3))}
    found = verifier.detect(lambda images: jax.tree.map(jnp.asarray, out), jnp.zeros((1, 32, 32, 3)))
    np.testing.assert_allclose(found.presence[0, :3], [sigmoid(2), sigmoid(0), 0], atol=1e-6)
    np.testing.assert_allclose(found.center[0, :2], [[15, 11], [7, 27]])  # (3.5 + 0.25) * 4, (2.5 + 0.25) * 4


def test_augmentation_keeps_range_and_changes_pictures():
    images = jnp.asarray(world.batch(np.random.default_rng(0), 16)[0], jnp.float32) / 255
    seen = jax.jit(verifier.augment)(images, jax.random.key(0))
    assert seen.shape == images.shape and float(seen.min()) >= 0 and float(seen.max()) <= 1
    change = np.abs(seen - images).mean((1, 2, 3))
    assert (change > 0.003).all() and (change < 0.2).all()


@pytest.fixture(scope="module")
def untrained():
    return verifier.Verifier(verifier.init(nnx.Rngs(0)))


def test_scores_do_not_depend_on_the_batch(untrained, tmp_path):
    images, prompts = world.batch(np.random.default_rng(0), 7)
    total, parts = untrained(images, prompts)
    few, few_parts = untrained(images[:3], prompts[:3])
    assert total.shape == (7,) and total.dtype == np.float32 and set(parts) == set(scoring.PARTS)
    np.testing.assert_allclose(few, total[:3], atol=1e-5)
    for name in parts:
        np.testing.assert_allclose(few_parts[name], parts[name][:3], atol=1e-5)

    untrained.save(tmp_path)
    again, _ = verifier.Verifier.from_folder(tmp_path)(images, prompts)
    np.testing.assert_array_equal(again, total)

    tensors = dict(read_safetensors(tmp_path / "model.safetensors"))
    tensors["head.kernl"] = tensors.pop("head.kernel")
    (tmp_path / "broken").mkdir()
    write_safetensors(tmp_path / "broken" / "model.safetensors", tensors)
    (tmp_path / "broken" / "config.json").write_text((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match=r"head\.kernel"):
        verifier.Verifier.from_folder(tmp_path / "broken")


def test_bad_input(untrained):
    images, prompts = world.batch(np.random.default_rng(0), 2)
    with pytest.raises(ValueError, match="uint8"):
        untrained(images.astype(np.float32), prompts)
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        untrained(images, prompts[:1])
    assert untrained(images[:0], [])[0].shape == (0,)
