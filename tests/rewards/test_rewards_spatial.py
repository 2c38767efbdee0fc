"""The 2D spatial rule on boxes worked out by hand, on layouts of the miniature's world, and what cannot be judged."""

import numpy as np
import pytest
import tiny_models

from ddpo_jax.errors import InputError
from ddpo_jax.mini import world
from ddpo_jax.rewards import spatial
from ddpo_jax.rewards._shared import detect as _detect
from ddpo_jax.rollout.scoring import RewardError, RewardRunner


def around(x, y, half=20):
    return (x - half, y - half, x + half, y + half)


def make(detector):
    config = spatial.default_config()
    config.detector = detector
    return spatial.make(config)


# ---- the rule ----


@pytest.mark.parametrize(
    "first, second, value",
    [
        ((0, 0), (149, 400), 1),  # |dx| < 150 is enough
        ((0, 0), (400, 149), 1),
        ((0, 0), (150, 150), 1),  # 150 / max(150, 150)
        ((0, 0), (150, 200), 0.75),  # 150 / 200
        ((300, 0), (0, 300), 0.5),  # 150 / 300, whichever side
        ((0, 0), (0, 0), 1),
    ],
)
def test_near(first, second, value):
    assert spatial.position("near", around(*first), around(*second)) == pytest.approx(value)


@pytest.mark.parametrize(
    "relation, first, second, value",
    [
        # y points down: what is above has the smaller y. The rule reads: first stands ... of second.
        ("left", (0, 0), (100, 0), 1),
        ("left", (100, 0), (0, 0), 0),
        ("right", (100, 0), (0, 0), 1),
        ("right", (0, 0), (100, 0), 0),
        ("top", (0, 0), (0, 100), 1),
        ("top", (0, 100), (0, 0), 0),
        ("bottom", (0, 100), (0, 0), 1),
        ("bottom", (0, 0), (0, 100), 0),
        # the direction must be the larger one, strictly
        ("left", (0, 0), (100, 99), 1),
        ("left", (0, 0), (100, 100), 0),
        ("left", (0, 0), (100, -101), 0),
        ("right", (100, 50), (0, 0), 1),
        ("right", (100, 101), (0, 0), 0),
        ("top", (0, 0), (99, 100), 1),
        ("top", (0, 0), (100, 100), 0),
        ("bottom", (-99, 100), (0, 0), 1),
        ("bottom", (-100, 100), (0, 0), 0),
        ("left", (0, 0), (0, 0), 0),
    ],
)
def test_directions(relation, first, second, value):
    assert spatial.position(relation, around(*first), around(*second)) == value


@pytest.mark.parametrize(
    "shift, value",
    [
        (10, 0.1 / (30 / 50)),  # 40 x 40 boxes: common 30 x 40, union 50 x 40
        (30, 0.1 / (10 / 70)),
        (32, 0.1 / (8 / 72)),  # IoU 0.111
        (33, 1),  # IoU 7 / 73 = 0.096 < 0.1
        (40, 1),  # they touch
    ],
)
def test_overlapping_boxes_count_less(shift, value):
    assert spatial.position("left", around(0, 0), around(shift, 0)) == pytest.approx(value)
    assert spatial.position("top", around(0, 0), around(0, shift)) == pytest.approx(value)
    assert spatial.position("right", around(shift, 0), around(0, 0)) == pytest.approx(value)
    assert spatial.position("bottom", around(0, shift), around(0, 0)) == pytest.approx(value)


def test_iou_of_exactly_a_tenth_gives_one():
    """Boxes of 110 and 110 that share 20: 20 / 200. The two branches of the rule meet there."""
    assert spatial.position("left", (0, 0, 11, 10), (9, 0, 20, 10)) == pytest.approx(1)
    assert _detect.overlap((0, 0, 11, 10), (9, 0, 20, 10)) == pytest.approx((0.1, 2 / 11))


def cat(score, x, y=0.0):
    return _detect.Detection("cat", score, around(x, y))


def dog(score, x, y=0.0):
    return _detect.Detection("dog", score, around(x, y))


def judge(found, relation="left", scale=1.0):
    return spatial.judge(found, (_detect.named("a cat"), _detect.named("a dog")), relation, scale)


def test_score_by_hand():
    assert judge([cat(0.8, 0), dog(0.6, 200)]) == pytest.approx((0.25 * 0.8 + 0.25 * 0.6 + 0.5, 1, 1))
    # on the wrong side 0.35 is left, which is below a half
    assert judge([cat(0.8, 200), dog(0.6, 0)]) == (0, 1, 0)
    # two sure detections on the wrong side are exactly a half, which stays
    assert judge([cat(1, 200), dog(1, 0)]) == (0.5, 1, 0)
    # near at 150 / 200 = 0.75: 0.2 + 0.2 + 0.375
    assert judge([cat(0.8, 0), dog(0.8, 200, 200)], "near") == pytest.approx((0.775, 1, 0.75))
    # 0.1 + 0.1 + 0.5 * 150 / 600 = 0.325 is below a half
    assert judge([cat(0.4, 0), dog(0.4, 600, 600)], "near") == (0, 1, 0.25)


def test_one_thing_alone_is_never_half_of_the_answer():
    for found in ([cat(1, 0)], [dog(1, 0)], [cat(1, 0), cat(1, 200)]):
        score, share, placed = judge(found)
        assert (score, share) == (0, 0.5) and np.isnan(placed)
    score, share, placed = judge([])
    assert (score, share) == (0, 0) and np.isnan(placed)


def test_the_first_detection_of_each_counts():
    found = [cat(0.6, 300), cat(1.0, 0), dog(0.8, 100), dog(1.0, 500)]
    assert judge(found) == (0, 1, 0)  # the cat at 300 is right of the dog at 100
    assert judge(found, "right")[0] == pytest.approx(0.25 * 0.6 + 0.25 * 0.8 + 0.5)


def test_one_noun_twice_is_one_detection():
    man = _detect.Detection("person", 0.8, around(0, 0))
    woman = _detect.Detection("person", 1.0, around(300, 0))
    things, relation = spatial.asked("a man next to a woman", {})
    assert spatial.judge([man, woman], things, relation, 1.0) == pytest.approx((0.9, 1, 1))
    assert spatial.judge([man, woman], things, "left", 1.0) == (0, 1, 0)


def test_distances_are_of_an_image_of_479_on_its_shorter_side(monkeypatch):
    """A 958 x 1000 image is scaled by 0.5: 290 px are 145 there, 310 are 155."""
    images = np.zeros((2, 1000, 958, 3), np.uint8)
    monkeypatch.setattr(
        tiny_models,
        "detect",
        lambda images: [
            [("cat", 1, around(100, 100)), ("dog", 1, around(100 + step, 100 + step))] for step in (290, 310)
        ],
    )
    scores, parts = make("tiny_models:detect")(images, ["a cat near a dog"] * 2, [{}] * 2)
    np.testing.assert_allclose(scores, [1, 0.5 + 0.5 * 150 / 155], rtol=1e-6)
    np.testing.assert_allclose(parts["position"], [1, 150 / 155], rtol=1e-6)
    np.testing.assert_array_equal(parts["objects_found"], [1, 1])


# ---- what the prompt asks ----


@pytest.mark.parametrize(
    "prompt, first, second, relation",
    [
        ("a cat on the left of a dog", ("cat",), ("dog",), "left"),
        ("a cat to the right of a dog", ("cat",), ("dog",), "right"),
        ("A red traffic light on top of an old TV!", ("red", "traffic", "light"), ("old", "tv"), "top"),
        ("a vase on the bottom of a shelf", ("vase",), ("shelf",), "bottom"),
        ("a bee on side of a cup", ("bee",), ("cup",), "near"),
        ("a bee at the side of a cup", ("bee",), ("cup",), "near"),
        ("a bee on the left side of a cup", ("bee",), ("cup",), "left"),
        ("two cats next to the sofa", ("cats",), ("sofa",), "near"),
        ("a cat is near a dog", ("cat",), ("dog",), "near"),
        ("a red cross left of a green star", ("red", "cross"), ("green", "star"), "left"),
        ("a pink ring above a black cross", ("pink", "ring"), ("black", "cross"), "top"),
        ("a pink ring below a black cross", ("pink", "ring"), ("black", "cross"), "bottom"),
    ],
)
def test_things_and_relation_of_a_prompt(prompt, first, second, relation):
    things, found = spatial.asked(prompt, {})
    assert (things[0].words, things[1].words, found) == (first, second, relation)


def test_metadata_goes_first():
    things, relation = spatial.asked("whatever", {"objects": ["a Cat", "traffic lights"], "relation": "to the left of"})
    assert (things[0].words, things[1].words, relation) == (("cat",), ("traffic", "lights"), "left")
    assert spatial.asked("a cat near a dog", {"relation": "top"})[1] == "top"


@pytest.mark.parametrize(
    "prompt, metadata, why",
    [
        (
            "a cat and a dog",
            {},
            r"prompt 'a cat and a dog' names no relation; it must say near, .*; use prompts of two",
        ),
        ("a leftover near-miss", {}, r"names no relation"),
        ("a cat near a dog", {"relation": "inside"}, r"metadata relation 'inside' names no relation"),
        ("near the", {}, r"prompt 'near the' names no thing"),
        ("a cat near a dog", {"objects": ["cat"]}, r"metadata objects: received \['cat'\]; it must be two names"),
        ("a cat near a dog", {"objects": "cat,dog"}, r"metadata objects: received 'cat,dog'"),
        ("a cat near a dog", {"objects": ["cat", "the"]}, r"metadata objects: received 'the'; it names nothing"),
    ],
)
def test_prompts_that_ask_for_no_relation(prompt, metadata, why):
    with pytest.raises(InputError, match=why):
        spatial.asked(prompt, metadata)


# ---- the miniature, end to end ----


def two(relation, first, second):
    """A scene of the world with a circle and a star at the given centers."""
    things = (world.Thing("red", "circle"), world.Thing("blue", "star"))
    objects = tuple(
        world.Object(thing.color, thing.shape, "plain", center, 10.0)
        for thing, center in zip(things, (first, second), strict=True)
    )
    return world.Scene(world.Spec(things, relation), objects, (230.0, 0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def mini():
    return make("mini")


def test_layouts_of_the_miniature(mini):
    """16 px are 239 of the 479, 20 px are 299."""
    layouts = [
        two("left of", (8.0, 16.0), (24.0, 16.0)),
        two("right of", (24.0, 16.0), (8.0, 16.0)),
        two("above", (16.0, 8.0), (16.0, 24.0)),
        two("below", (16.0, 24.0), (16.0, 8.0)),
        two("left of", (6.0, 6.0), (26.0, 26.0)),
    ]
    asked = [*world.RELATIONS, "near"]
    images = np.stack([world.render(scene) for scene in layouts for _ in asked])
    scores, parts = mini(images, [f"a red circle {relation} a blue star" for relation in asked] * 5, [{}] * 25)
    scores, placed = scores.reshape(5, 5), parts["position"].reshape(5, 5)
    np.testing.assert_array_equal(placed[:4, :4], np.eye(4))
    np.testing.assert_array_equal(placed[:4, 4], 1)  # along one axis they are 0 apart
    np.testing.assert_allclose(placed[4, 4], 150 / (20 * 479 / 32), rtol=0.06)
    assert (np.diag(scores)[:4] > 0.97).all()
    assert (scores[:4, :4][~np.eye(4, dtype=bool)] <= 0.5).all()


def test_pictures_of_the_miniature_agree_with_their_captions(mini):
    specs = [world.parse(prompt) for prompt in world.prompts("spatial", "novel")[:96:3]]
    images = world.render_all(world.scenes_for(specs, np.random.default_rng(0)))
    right = mini(images, [world.describe(spec) for spec in specs], [{}] * 32)[0]
    turned = [world.Spec(spec.things[::-1], spec.relation) for spec in specs]
    wrong = mini(images, [world.describe(spec) for spec in turned], [{}] * 32)[0]
    assert np.mean(right > 0.9) > 0.95
    assert np.mean(wrong) < 0.1


def test_the_miniatures_detector_finds_the_centers():
    scenes = world.sample_scenes(np.random.default_rng(3), 64)
    found = _detect.make_detector("mini", 1.0, 0.0)(world.render_all(scenes))
    errors, labels = [], []
    for row, detections in enumerate(found):
        truth = scenes[row].objects
        assert len(detections) == len(truth)
        for thing in truth:
            centers = [((d.box[0] + d.box[2]) / 2, (d.box[1] + d.box[3]) / 2) for d in detections]
            away = [np.hypot(x - thing.center[0], y - thing.center[1]) for x, y in centers]
            nearest = detections[int(np.argmin(away))]
            errors.append(min(away))
            labels.append(nearest.label == thing.shape)
            assert nearest.box[2] - nearest.box[0] == pytest.approx(8) == nearest.box[3] - nearest.box[1]
            assert 0 < nearest.score <= 1
    assert np.mean(errors) < 1 and np.mean(labels) > 0.95


# ---- detectors ----


def test_a_detector_on_a_server():
    def reply(payload):
        images = tiny_models.images_of(payload)
        names = ("label", "score", "box")
        return {
            "detections": [[dict(zip(names, item, strict=True)) for item in row] for row in tiny_models.detect(images)]
        }

    images = np.zeros((2, 16, 16, 3), np.uint8)
    images[0, :, :8] = images[1, :, 8:] = 255
    with tiny_models.Server(reply) as server:
        found = _detect.make_detector(server.url, 5.0, 0.0)(images)
    assert found == [
        [_detect.Detection("circle", 0.9, (0, 0, 8, 8))],
        [_detect.Detection("circle", 0.9, (8, 0, 16, 8))],
    ]
    assert found == _detect.make_detector("tiny_models:detect", 5.0, 0.0)(images)


@pytest.mark.parametrize(
    "item",
    [
        ("cat", 0.5),
        ("cat", 0.5, (0, 0, 1)),
        ("cat", 1.5, (0, 0, 1, 1)),
        ("cat", -0.1, (0, 0, 1, 1)),
        ("cat", float("nan"), (0, 0, 1, 1)),
        ("cat", 0.5, (1, 0, 0, 1)),
        ("cat", 0.5, (0, 1, 1, 0)),
        ("cat", 0.5, (0, 0, float("inf"), 1)),
        ("cat", 0.5, (0, float("nan"), 1, 1)),
        (3, 0.5, (0, 0, 1, 1)),
        ("cat", "sure", (0, 0, 1, 1)),
        {"label": "cat", "score": 0.5},
        None,
    ],
)
def test_detections_that_are_none(item, monkeypatch):
    monkeypatch.setattr(tiny_models, "detect", lambda images: [[item]])
    with RewardRunner(make("tiny_models:detect"), name="spatial") as runner:
        with pytest.raises(RewardError, match=r"reward.detector gave .*; it must be \(label, score in") as error:
            runner.submit(np.zeros((1, 8, 8, 3), np.uint8), ["a cat near a dog"], [{}]).result()
    assert "\n" not in str(error.value)


def test_a_detector_must_give_lists(monkeypatch):
    monkeypatch.setattr(tiny_models, "detect", lambda images: [{}])
    with pytest.raises(RewardError, match=r"reward.detector gave a dict for an image; it must give a list"):
        make("tiny_models:detect")(np.zeros((1, 8, 8, 3), np.uint8), ["a cat near a dog"], [{}])


def test_detectors_that_are_not_there():
    for name in ("", "auto"):
        with pytest.raises(InputError, match=r"^reward.detector: received '.*'; this reward needs an object detector"):
            make(name)
    with pytest.raises(InputError, match=r"^reward.detector: received 'yolo'; it must name a model"):
        make("yolo")
    with pytest.raises(InputError, match=r"received 'mini'; it sees pictures of 32 x 32, these are 64 x 48"):
        make("mini")(np.zeros((1, 48, 64, 3), np.uint8), ["a cat near a dog"], [{}])
