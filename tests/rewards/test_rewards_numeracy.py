"""The numeracy rule on boxes worked out by hand, on pictures of the miniature's world, and the nouns of prompts."""

import numpy as np
import pytest

from ddpo_jax.errors import InputError
from ddpo_jax.mini import world
from ddpo_jax.rewards import numeracy
from ddpo_jax.rewards._shared import detect as _detect


def boxes(**counts):
    """Detections far apart: ``boxes(cat=2)`` is two cats."""
    labels = [label for label, count in counts.items() for _ in range(count)]
    return [_detect.Detection(label, 0.9, (100 * i, 0, 100 * i + 10, 10)) for i, label in enumerate(labels)]


def judge(prompt, found, metadata=None):
    return numeracy.judge(found, numeracy.asked(prompt, metadata or {}))


# ---- the rule ----


@pytest.mark.parametrize(
    "second, same",
    [
        ((0, 0, 100, 91), True),  # IoU 0.91
        ((0, 0, 100, 90), True),  # IoU 0.9 is not more than 0.9, but the second lies within the first
        ((0, 5, 100, 105), True),  # common 95, union 105: IoU 0.905; covered 0.95
        ((0, 9, 100, 109), True),  # IoU 91 / 109; covered 0.91
        ((0, 10, 100, 110), False),  # covered 0.9 is not more than 0.9
        ((0, 30, 100, 130), False),
        ((40, 40, 50, 50), True),  # wholly within
        ((95, 95, 115, 115), False),
        ((200, 0, 300, 100), False),
        ((40, 40, 40, 50), False),  # without area it is covered by nothing
    ],
)
def test_which_boxes_are_one_thing(second, same):
    first = _detect.Detection("cat", 0.9, (0, 0, 100, 100))
    other = _detect.Detection("cat", 0.8, second)
    assert numeracy.merge([first, other]) == ([first] if same else [first, other])
    assert numeracy.merge([other, first]) == ([other] if same else [other, first])  # the earlier one stays
    assert len(numeracy.merge([first, other._replace(label="dog")])) == 2  # another label is another thing


def test_merging_compares_with_what_was_kept():
    """B repeats A, C repeats B but not A: C stays, because B is gone."""
    a, b, c = (_detect.Detection("cat", 0.9, (0, y, 100, y + 100)) for y in (0, 8, 16))
    assert numeracy.merge([a, b, c]) == [a, c]


@pytest.mark.parametrize(
    "prompt, found, score",
    [
        ("two cats", boxes(cat=2), 1),
        ("two cats", boxes(cat=1), 0.5),
        ("two cats", boxes(cat=3), 0.5),
        ("two cats", boxes(dog=2), 0),
        ("two cats", [], 0),
        ("two cats", boxes(cat=2, dog=5), 1),  # what was not asked for does no harm
        ("three cats and one dog", boxes(cat=3, dog=1), 1),
        ("three cats and one dog", boxes(cat=3, dog=2), 0.75),
        ("three cats and one dog", boxes(cat=3), 0.5),
        ("three cats and one dog", boxes(dog=3), 0.25),
        ("one cat, two dogs and three cups", boxes(cat=1, dog=1), (1 + 0.5) / 3),
        ("a cat and two cats", boxes(cat=2), 0.75),  # named twice, looked for twice: detected, and once exactly
        ("an owl", boxes(owl=1), 1),
        ("eight cups", boxes(cup=8), 1),
        ("seven cups", boxes(cup=8), 0.5),
        ("two men and a girl", boxes(person=2), 0.75),  # people are persons
        ("two goldfish and one ship", boxes(fish=2, boat=1), 1),  # the benchmark's other names
        ("one television and a painting", boxes(tv=1, picture=1), 1),
    ],
)
def test_score_by_hand(prompt, found, score):
    assert judge(prompt, found)[0] == pytest.approx(score)


def test_repeated_boxes_are_counted_once():
    cat = _detect.Detection("cat", 0.9, (0, 0, 100, 100))
    again = _detect.Detection("cat", 0.5, (0, 0, 100, 99))
    other = _detect.Detection("cat", 0.7, (200, 0, 300, 100))
    assert judge("two cats", [cat, again, other]) == (1, 1, 1)
    assert judge("three cats", [cat, again, other]) == (0.5, 1, 0)


# ---- nouns ----


@pytest.mark.parametrize(
    "prompt, things",
    [
        ("three red stars and two cups", [(3, "red stars"), (2, "cups")]),
        ("A cat, an owl and One dog", [(1, "cat"), (1, "owl"), (1, "dog")]),
        ("four cars, five boats, six bikes, seven keys, eight eggs", [(4, "cars"), (5, "boats"), (6, "bikes"),
                                                                     (7, "keys"), (8, "eggs")]),
        ("two traffic lights on the street", [(2, "traffic lights")]),
        ("three dogs shared a bone", [(3, "dogs shared")]),  # "a" in mid-sentence counts nothing
        ("two boys sing in a choir", [(2, "boys sing")]),
        ("a cup near a vase", [(1, "cup"), (1, "vase")]),
        ("a red circle left of a dotted blue square", [(1, "red circle"), (1, "dotted blue square")]),
        ("two of the cats and one hat", [(1, "hat")]),
        ("two T-shirts", [(2, "t-shirts")]),
    ],
)  # fmt: skip
def test_counted_things(prompt, things):
    found = [(phrase.number, " ".join(phrase.words)) for phrase in numeracy.asked(prompt, {})]
    assert found == things


@pytest.mark.parametrize(
    "label, phrase, same",
    [
        ("cat", "cats", True),
        ("Cat", "a cat", True),
        ("star", "red stars", True),
        ("knife", "knives", True),
        ("wolf", "wolves", True),
        ("butterfly", "butterflies", True),
        ("watch", "watches", True),
        ("tomato", "tomatoes", True),
        ("mouse", "mice", True),
        ("sheep", "sheep", True),
        ("glasses", "glasses", True),
        ("person", "people", True),
        ("person", "women", True),
        ("man", "person", False),
        ("woman", "man", False),
        ("traffic_light", "two traffic lights", True),
        ("cat", "cats sleeping", True),  # a verb may follow
        ("traffic light", "light", False),
        ("car", "cart", False),
        ("cat", "dog", False),
        ("glas", "glass", False),
        ("", "cat", False),
    ],
)
def test_labels_and_nouns(label, phrase, same):
    assert _detect.matches(label, _detect.named(phrase), numeracy.ALIASES) is same


@pytest.mark.parametrize(
    "prompt, found, score",
    [
        ("one man", boxes(person=1, man=1), 1),  # the benchmark's detector calls a man a person
        ("one man", boxes(man=1), 1),
        ("one man", boxes(woman=1), 0),
        ("three phones", boxes(**{"cell phone": 3}), 1),
        ("two tables", boxes(**{"dining table": 3}), 0.5),
        ("two tables", boxes(**{"dining table": 3, "table": 2}), 1),  # a label that is the thing goes first
    ],
)
def test_by_which_name_a_thing_is_found(prompt, found, score):
    assert judge(prompt, found)[0] == pytest.approx(score)


def test_metadata_goes_first():
    things = numeracy.asked("whatever", {"objects": ["cat", "traffic light"], "count": [2, 1]})
    assert [(thing.words, thing.number) for thing in things] == [(("cat",), 2), (("traffic", "light"), 1)]
    (thing,) = numeracy.asked("whatever", {"objects": ["cat"], "count": 3})
    assert (thing.words, thing.number) == (("cat",), 3)


@pytest.mark.parametrize(
    "prompt, metadata, why",
    [
        ("the cats", {}, r"prompt 'the cats' counts nothing; it must name things after a, an, one, two, .*eight; use"),
        ("nine cats", {}, r"counts nothing"),
        (
            "x",
            {"objects": ["cat"]},
            r"metadata objects: received \['cat'\] with count None; each object needs its number",
        ),
        ("x", {"objects": ["cat", "dog"], "count": 2}, r"each object needs its number"),
        ("x", {"objects": [], "count": []}, r"each object needs its number"),
        ("x", {"objects": ["cat"], "count": [0]}, r"metadata count: received \[0\]; it must be whole numbers from 1"),
        ("x", {"objects": ["cat"], "count": [1.5]}, r"metadata count: received \[1.5\]"),
        ("x", {"objects": ["the"], "count": 1}, r"metadata objects: received 'the'; it names nothing"),
    ],
)
def test_prompts_that_count_nothing(prompt, metadata, why):
    with pytest.raises(InputError, match=why):
        numeracy.asked(prompt, metadata)


# ---- the miniature, end to end ----


def test_pictures_of_the_miniature_are_counted():
    prompts = world.prompts("numeracy", "novel")
    specs = [world.parse(prompt) for prompt in prompts]
    images = world.render_all(world.scenes_for(specs, np.random.default_rng(0)))
    config = numeracy.default_config()
    config.detector = "mini"
    reward = numeracy.make(config)
    scores, parts = reward(images, prompts, [{}] * len(prompts))
    assert scores.mean() > 0.97 and scores.dtype == np.float32
    np.testing.assert_allclose(scores, 0.5 * parts["objects_found"] + 0.5 * parts["counts_exact"])
    other = [world.describe(world.Spec(spec.things, None, 2 + spec.number % 3)) for spec in specs]  # another number
    scores, parts = reward(images, other, [{}] * len(prompts))
    assert parts["objects_found"].mean() > 0.97 and parts["counts_exact"].mean() < 0.03
    elsewhere = [f"{spec.number} x" for spec in specs]
    metadata = [{"objects": [spec.things[0].shape], "count": spec.number} for spec in specs]
    assert reward(images, elsewhere, metadata)[0].mean() > 0.97


def test_a_mixed_picture():
    """Two circles and a star, of which the prompt asks for three circles and one star."""
    places = (("circle", (8.0, 8.0)), ("circle", (24.0, 8.0)), ("star", (16.0, 24.0)))
    objects = tuple(world.Object("red", shape, "plain", center, 10.0) for shape, center in places)
    spec = world.Spec((world.Thing("red", "circle"),), None, 3)
    image = world.render(world.Scene(spec, objects, (230.0, 0.0, 0.0, 0.0)))[None]
    config = numeracy.default_config()
    config.detector = "mini"
    scores, parts = numeracy.make(config)(image, ["three circles and one star"], [{}])
    np.testing.assert_array_equal(scores, [0.5 * 0.5 + 0.5 * 1])
    np.testing.assert_array_equal(parts["counts_exact"], [0.5])
