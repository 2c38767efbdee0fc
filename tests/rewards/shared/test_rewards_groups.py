"""Rewards that compare the images of a prompt: whole groups, in order, one call each; and where there are none."""

import numpy as np
import pytest

from ddpo_jax.errors import InputError
from ddpo_jax.rewards import weighted
from ddpo_jax.rewards._shared.check import RewardError
from ddpo_jax.rewards._shared.groups import in_groups, joined

OWN = """
import numpy as np

calls = []

def rank(images, prompts, metadata):
    calls.append((images[:, 0, 0, 0].tolist(), prompts, [entry["number"] for entry in metadata]))
    order = np.argsort(np.argsort(images.mean(axis=(1, 2, 3))))
    return order / (len(order) - 1), {"first": order == 0.0} if prompts[0] == "a" else {}

rank.groupwise = True

def level(images, prompts, metadata):
    return images.mean(axis=(1, 2, 3))
"""
LEVELS = [7, 9, 8, 100, 30, 20]
IMAGES = np.zeros((6, 2, 2, 3), np.uint8) + np.uint8(LEVELS)[:, None, None, None]
PROMPTS = ["a"] * 3 + ["b"] * 3
METADATA = [{"number": number} for number in range(6)]
RANKS = [0, 1, 0.5, 1, 0.5, 0]


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_groups.py").write_text(OWN.replace("order == 0.0", "(order == 0).astype(float)"))
    monkeypatch.syspath_prepend(str(tmp_path))
    import own_groups

    own_groups.calls.clear()
    return own_groups


def test_every_call_is_one_draw_of_a_prompt(own):
    scores, parts = in_groups(own.rank, 3, "rank")(IMAGES, PROMPTS, METADATA)
    assert own.calls == [([7, 9, 8], ["a"] * 3, [0, 1, 2]), ([100, 30, 20], ["b"] * 3, [3, 4, 5])]
    assert scores.dtype == np.float32 and scores.tolist() == RANKS
    np.testing.assert_array_equal(parts["first"], [1, 0, 0, np.nan, np.nan, np.nan])
    own.calls.clear()  # two draws of one prompt are two groups
    in_groups(own.rank, 3, "rank")(IMAGES, ["a"] * 6, METADATA)
    assert [numbers for _, _, numbers in own.calls] == [[0, 1, 2], [3, 4, 5]]


def test_other_rewards_get_whole_batches(own):
    assert in_groups(own.level, 3, "level") is own.level and in_groups(own.level, 1, "level") is own.level


def test_a_group_that_is_torn_apart_is_never_scored(own):
    fn = in_groups(own.rank, 3, "rank")
    for rows in (slice(0, 5), slice(1, 4)):
        with pytest.raises(RewardError, match=r"reward 'rank' got \[.*\], not 3 of one prompt"):
            fn(IMAGES[rows], PROMPTS[rows], METADATA[rows])


def test_single_images_are_refused(own):
    with pytest.raises(InputError, match=r"reward 'rank' compares .* needs 2 or more .*prompts.samples_per_prompt=4"):
        in_groups(own.rank, 1, "rank")


def test_a_sum_with_a_member_that_compares_is_asked_by_prompt(own):
    config = weighted.default_config()
    config.update({"rewards": "own_groups:rank=10,own_groups:level=1", "weights": "mini"})
    fn = in_groups(weighted.make(config), 3, "weighted")
    scores, parts = fn(IMAGES, PROMPTS, METADATA)
    np.testing.assert_allclose(scores, 10 * np.array(RANKS) + LEVELS)
    np.testing.assert_array_equal(parts["own_groups:rank"], RANKS)
    assert len(own.calls) == 2 and not fn.waits_for_others
    fn.close()
    config.rewards = "own_groups:level=1"
    assert not weighted.make(config).groupwise


def test_batches_are_joined_with_nan_where_a_part_is_not_known():
    first, second = np.float32([1, 2]), np.float32([3])
    scores, parts = joined([(first, {"x": first}), (second, {"y": second})])
    assert scores.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(parts["x"], [1, 2, np.nan])
    np.testing.assert_array_equal(parts["y"], [np.nan, np.nan, 3])
