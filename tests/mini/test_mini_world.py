"""The miniature's world: grammar, prompt sets, geometry, pixels, rating. Oracles: hand-worked numbers, geometry."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from ddpo_jax.mini import rating, world
from ddpo_jax.mini.world import Object, Scene, Spec, Thing


def one(color="red", shape="circle", texture="plain", center=(16.0, 16.0), size=16.0, background=(230.0, 0, 0, 0)):
    return Scene(Spec((Thing(color, shape, texture),)), (Object(color, shape, texture, center, size),), background)


def test_same_seed_same_pictures_whatever_the_batch():
    a, words = world.batch(np.random.default_rng(3), 40)
    b, again = world.batch(np.random.default_rng(3), 40)
    other, _ = world.batch(np.random.default_rng(4), 40)
    np.testing.assert_array_equal(a, b)
    assert words == again and (a != other).any()
    assert a.shape == (40, 32, 32, 3) and a.dtype == np.uint8

    scenes = world.sample_scenes(np.random.default_rng(3), 40)
    for i in range(40):
        np.testing.assert_array_equal(world.render(scenes[i]), a[i])
        assert world.caption(scenes[i]) == words[i]


def test_captions_say_what_is_drawn():
    scenes = world.sample_scenes(np.random.default_rng(0), 500)
    for i, caption in enumerate(world.captions(scenes)):
        scene, spec = scenes[i], world.parse(caption)
        assert spec == scene.spec
        drawn = Counter(Thing(o.color, o.shape, o.texture) for o in scene.objects)
        assert drawn == (Counter(spec.things) if spec.relation else {spec.things[0]: spec.number})
    assert {scene.spec.kind for scene in (scenes[i] for i in range(500))} == {"single", "relation", "number"}


def test_parse_inverts_describe():
    things = [Thing(*t) for t in itertools.product(world.COLORS, world.SHAPES, world.TEXTURES)]
    specs = [Spec((t,), None, n) for t in things for n in (1, 2, 3, 4)]
    pairs = list(itertools.permutations(things, 2))
    specs += [Spec(pair, r) for pair in pairs[::401] for r in world.RELATIONS]
    captions = [world.describe(spec) for spec in specs]
    assert [world.parse(caption) for caption in captions] == specs
    assert len(set(captions)) == len(captions)
    assert len(things) * 4 + len(pairs) * 4 > 100_000


def test_examples_of_the_grammar():
    assert world.parse("an orange star") == Spec((Thing("orange", "star"),))
    assert world.parse("two dotted blue crosses") == Spec((Thing("blue", "cross", "dotted"),), None, 2)
    assert world.parse("a striped red circle left of a black ring") == Spec(
        (Thing("red", "circle", "striped"), Thing("black", "ring")), "left of"
    )


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "red circle",
        "a orange circle",
        "an red circle",
        "a plain red circle",
        "a red circles",
        "two red circle",
        "one red circle",
        "five red circles",
        "a red striped circle",
        "a Red circle",
        "a red  circle",
        "a red circle ",
        "a red circle left of a red circle",
        "a red circle beside a blue square",
        "two red circles left of a blue square",
        "a red circle left of a blue square above a green star",
    ],
)
def test_outside_the_grammar(caption):
    with pytest.raises(ValueError, match="cannot draw") as error:
        world.parse(caption)
    assert repr(caption) in str(error.value) and "\n" not in str(error.value)


def shows_held_out(caption):  # on the words alone
    words = [w if w in world.SHAPES else w[:-2] if w == "crosses" else w[:-1] for w in caption.split()]
    return any((color, words[i + 1]) in world.HELD_OUT for i, color in enumerate(caption.split()[:-1]))


def test_held_out_pairs_never_appear_in_training():
    assert sorted(c for c, _ in world.HELD_OUT) == sorted(world.COLORS)
    assert sorted(s for _, s in world.HELD_OUT) == sorted(world.SHAPES)
    for category in world.CATEGORIES:
        train, novel = world.prompts(category, "train"), world.prompts(category, "novel")
        assert not any(map(shows_held_out, train)) and all(map(shows_held_out, novel))
        assert len(set(train)) == len(train) and len(set(novel)) == len(novel)
        assert len(train) <= 700 and len(novel) <= 300
    assert not any(map(shows_held_out, world.training_prompts()))
    assert all(map(shows_held_out, world.novel_prompts()))


def test_large_prompts():
    large = world.large_prompts()
    everything = list(large)
    # 8 colors x 8 shapes less 8 held-out pairs, x 3 textures = 168 things
    assert len(everything) == len(large) == 168 * 4 + 168 * 167 * 4 > 100_000
    assert len(set(everything)) == len(everything)
    assert not any(map(shows_held_out, everything[::997]))
    assert large[-1] == everything[-1] and large[5:8] == everything[5:8]
    with pytest.raises(IndexError):
        large[len(large)]


@pytest.mark.parametrize("make", [world.training_prompts, world.novel_prompts])
def test_default_sets_are_balanced(make):
    prompts = make()
    words = Counter(w for p in prompts for w in p.replace("crosses", "cross").replace("cross", "crosS").split())
    words = Counter({w.rstrip("s").replace("S", "s"): 0 for w in words}) + Counter(
        w.rstrip("s").replace("S", "s") for w in words.elements()
    )
    assert len(set(prompts)) == 48
    assert {words[c] for c in world.COLORS} == {8} and {words[s] for s in world.SHAPES} == {8}
    assert {r: sum(r in p for p in prompts) for r in world.RELATIONS} == dict.fromkeys(world.RELATIONS, 4)
    assert (words["striped"], words["dotted"]) == (8, 8)
    for spec in map(world.parse, prompts):
        if spec.relation:
            assert spec.things[0].color != spec.things[1].color and spec.things[0].shape != spec.things[1].shape


def test_categories_test_what_they_say():
    for spec in map(world.parse, world.prompts("color")):
        assert spec.things[0].color != spec.things[1].color and spec.things[0].shape == spec.things[1].shape
    for spec in map(world.parse, world.prompts("shape")):
        assert spec.things[0].color == spec.things[1].color and spec.things[0].shape != spec.things[1].shape
    assert {world.parse(p).kind for p in world.prompts("texture")} == {"single"}
    assert Counter(world.parse(p).relation for p in world.prompts("spatial")).keys() == set(world.RELATIONS)
    assert Counter(world.parse(p).number for p in world.prompts("numeracy")) == {2: 56, 3: 56, 4: 56}
    with pytest.raises(ValueError, match="prompts.category: received 'colour'"):
        world.prompts("colour")
    with pytest.raises(ValueError, match="prompts.split: received 'test'"):
        world.prompts("color", "test")


def test_places_agree_with_the_caption():
    scenes = world.sample_scenes(np.random.default_rng(1), 1000)
    for i in range(len(scenes)):
        scene = scenes[i]
        boxes = [(o.center[0], o.center[1], o.size / 2) for o in scene.objects]
        assert all(h <= x <= 32 - h and h <= y <= 32 - h for x, y, h in boxes)
        for (ax, ay, ah), (bx, by, bh) in itertools.combinations(boxes, 2):
            assert max(abs(ax - bx), abs(ay - by)) > ah + bh, "objects overlap"
        if scene.spec.relation:
            dx, dy = boxes[0][0] - boxes[1][0], boxes[0][1] - boxes[1][1]
            along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[scene.spec.relation]
            across = abs(dy) if "of" in scene.spec.relation else abs(dx)
            assert along > 1.9 * across
    assert Counter(len(scenes[i].objects) for i in range(1000) if scenes[i].spec.kind == "number").keys() == {2, 3, 4}


AREAS = {  # in units of the half size squared
    "circle": math.pi * 0.96**2,
    "square": 1.68**2,
    "triangle": 2.04 * 1.84 / 2,
    "diamond": 2.16 * 1.64 / 2,
    "cross": 2 * 1.96 * 0.72 - 0.72**2,
    "ring": math.pi * (1 - 0.48**2),
    "star": 10 * 0.5 * 1.12 * 0.5 * math.sin(math.pi / 5),
}


@pytest.mark.parametrize("shape", AREAS)
@pytest.mark.parametrize("size", [9.0, 18.0])
def test_areas(shape, size):
    cover = world.coverage(np.array([world.SHAPES.index(shape)]), np.array([[15.3, 16.8]]), np.array([size]))[0]
    assert cover.sum() == pytest.approx(AREAS[shape] * (size / 2) ** 2, rel=0.08 if size < 10 else 0.02)
    rows, columns = np.nonzero(cover > 0.5)
    assert (
        abs(columns.mean() + 0.5 - 15.3) < 0.5 and abs(rows.mean() + 0.5 - 16.8) < 0.15 * size
    )  # a triangle is heavy below


@pytest.mark.parametrize("color", world.COLORS)
def test_colors_under_the_center(color):
    main, second = world.TONES[world.COLORS.index(color)].astype(int)
    for shape in ("circle", "square", "triangle", "diamond", "cross", "star"):
        image = world.render(one(color, shape))
        np.testing.assert_array_equal(image[16, 16], main)
        np.testing.assert_array_equal(image[0, 0], (230, 230, 230))
    for shape in ("ring", "crescent"):  # hollow in the middle, colored at the left
        image = world.render(one(color, shape))
        np.testing.assert_array_equal(image[16, 17], (230, 230, 230))
        np.testing.assert_array_equal(image[16, 10], main)
    assert np.abs(main - second).sum() > 120, "the pattern would be invisible"


def test_patterns_are_anchored_to_the_image():
    for center in ((16.0, 16.0), (14.3, 17.6)):
        striped = world.render(one("blue", "square", "striped", center, 20))
        dotted = world.render(one("blue", "square", "dotted", center, 20))
        main, second = world.TONES[world.COLORS.index("blue")].astype(int)
        for y, x in itertools.product(range(11, 21), range(11, 21)):
            np.testing.assert_array_equal(striped[y, x], second if y % 4 in (2, 3) else main)
            np.testing.assert_array_equal(dotted[y, x], second if y % 4 in (2, 3) and x % 4 in (2, 3) else main)


def test_shapes_and_textures_can_be_told_apart_when_small():
    pictures = {
        (shape, texture): world.render(one("purple", shape, texture, size=9.0)).astype(float)
        for shape, texture in itertools.product(world.SHAPES, world.TEXTURES)
    }
    for a, b in itertools.combinations(pictures, 2):
        assert np.abs(pictures[a] - pictures[b]).sum() / (3 * 255) > 1.5, f"{a} looks like {b}"  # in full pixels


def test_background():
    image = world.render(one(background=(220.0, 5.0, 32.0, 0.0)))
    np.testing.assert_array_equal(image[1, 0], np.round([220 + 5 - 15.5, 220 - 15.5 + 0.01, 220 - 5 - 15.5]))
    assert image[1, 31, 1] - image[1, 0, 1] == 31  # 32 gray levels per 32 px


def test_rating_by_hand():
    best = one("orange", "square", "dotted", size=22.0, background=(246.0, 0, 0, 0))
    assert rating.rating(best) == pytest.approx(10, abs=0.02)
    # size: a square of 10 px covers 8.4^2 = 70.56 of 1024 px, of 28 %: 0.246; background half way; 5 px off: half;
    # blue 0.3; plain 0: 1 + 3 * 0.246 + 2 * 0.5 + 1.5 * 0.5 + 1.5 * 0.3
    middling = one("blue", "square", "plain", (19.0, 20.0), 10.0, (226.0, 0, 0, 0))
    assert rating.rating(middling) == pytest.approx(3.938, abs=0.02)
    ratings = rating.rate(world.sample_scenes(np.random.default_rng(0), 2000))
    assert ratings.min() >= 1 and ratings.max() <= 10 and ratings.std() > 0.8
