"""The text reward: which text is wanted, the edit distance against its recursion, and the whole chain."""

import functools
import random

import numpy as np
import pytest
import tiny_models

from ddpo_jax.errors import InputError
from ddpo_jax.rewards import ocr
from ddpo_jax.rollout.scoring import RewardError, RewardRunner


def recursion(first, second):
    """Levenshtein's definition, word for word."""

    @functools.cache
    def distance(i, j):
        if not i or not j:
            return i + j
        same = first[i - 1] == second[j - 1]
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (not same))

    return distance(len(first), len(second))


def test_distance_is_the_recursion():
    rng = random.Random(0)
    words = ["".join(rng.choices("abc", k=rng.randrange(9))) for _ in range(120)]
    for first, second in zip(words, words[1:], strict=False):
        longest = max(len(first), len(second), 1)
        assert ocr.similarity(first, second) == pytest.approx(1 - recursion(first, second) / longest)


@pytest.mark.parametrize(
    "first, second, score",
    [
        ("kitten", "sitting", 1 - 3 / 7),  # k -> s, e -> i, + g
        ("OPEN", "open", 1),
        ("open  late\n", " Open late", 1),
        ("OPEN", "", 0),
        ("OPEN", "CLOSED", 1 - 4 / 6),  # + C, + L, P -> S, N -> D; O and E stay
        ("Straße", "STRASSE", 1),  # case-folding, not lower case
        ("日本", "日木", 0.5),
        ("", "", 1),
    ],
)
def test_similarity_by_hand(first, second, score):
    assert ocr.similarity(first, second) == pytest.approx(score)
    assert ocr.similarity(second, first) == pytest.approx(score)


@pytest.mark.parametrize(
    "prompt, text",
    [
        ('a sign that says "OPEN  LATE"', "OPEN LATE"),
        ("a sign that says “OPEN”", "OPEN"),
        ("ein Schild mit «OFFEN»", "OFFEN"),
        ('a page with "one", then "two"', "one two"),
        ("a sign that says 'don't stop'", "don't stop"),
        ("a sign that says ‘it’s me’, twice", "it’s me"),
        ("a dog's sign: 'STOP'", "STOP"),
        ("""the dog's "STOP" and 'GO'""", "STOP"),
        ("the dogs' and cats' bowls", ""),
        ('an empty sign: ""', ""),
        ("a sign", ""),
    ],
)
def test_quotations(prompt, text):
    assert ocr.quoted(prompt) == text


def test_what_is_wanted():
    assert ocr.wanted('a sign "A"', {"text": "B"}) == "B"
    with pytest.raises(InputError, match=r"^ocr: prompt 'a sign' quotes no text; .* in quotes, .*metadata text$"):
        ocr.wanted("a sign", {})
    for wrong in ("", " ", 7, None):
        with pytest.raises(InputError, match=r"^ocr: metadata text: received .*; it must be the text"):
            ocr.wanted('a sign "A"', {"text": wrong})


def make(recogniser):
    config = ocr.default_config()
    config.recogniser = recogniser
    return ocr.make(config)


def test_whole_chain_with_a_function_and_with_a_server():
    images = np.stack([np.full((8, 8, 3), level, np.uint8) for level in (1, 2, 4)])
    prompts = ['a wall with "Two Green Dogs"', 'a wall with "three caps"', 'a wall with "x"']
    assert tiny_models.read(images) == ["two green dogs", "three cups", "nothing"]
    scores, parts = make("tiny_models:read")(images, prompts, [{}] * 3)
    np.testing.assert_allclose(scores, [1, 0.9, 0], rtol=1e-6)
    np.testing.assert_array_equal(parts["exact"], [1, 0, 0])
    assert scores.dtype == parts["exact"].dtype == np.float32
    with tiny_models.Server(lambda payload: {"texts": tiny_models.read(tiny_models.images_of(payload))}) as server:
        np.testing.assert_array_equal(make(server.url)(images, prompts, [{}] * 3)[0], scores)


def test_a_prompt_without_text_ends_the_reward_in_one_line():
    with RewardRunner(make("tiny_models:read"), name="ocr") as runner:
        with pytest.raises(RewardError, match=r"prompt 'a cat' quotes no text; the text to draw must stand in quotes"):
            runner.submit(np.zeros((1, 8, 8, 3), np.uint8), ["a cat"], [{}]).result()
