"""Evaluation in training: paired differences by hand, the same set whatever the run, and what a run writes of it."""

import math
import statistics
import threading

import numpy as np
import pytest

from ddpo_jax.errors import RunFailure
from ddpo_jax.training import evaluation
from ddpo_jax.training.evaluation import Evaluation


class Painter:
    """In place of the image sampler: an image's brightness is its number plus the policy's shift."""

    def __init__(self):
        self.asked = []

    def images(self, params, prompts, ids, key, batch_size):
        self.asked.append((tuple(prompts), ids.tolist(), batch_size))
        return np.stack([np.full((2, 2, 3), int(i) + params, np.uint8) for i in ids])


def prompts(rng, n):
    return [f"prompt {i} {rng.integers(1000)}" for i in range(n)], [{"index": i} for i in range(n)]


def brightness(images, prompts, metadata):
    return images.mean(axis=(1, 2, 3)), {"even": [math.nan if m["index"] % 2 else 1.0 for m in metadata]}


def darkness(images, prompts, metadata):
    return -images.mean(axis=(1, 2, 3))


def made(num_images=8, **rewards):
    painter = Painter()
    return Evaluation(painter, prompts, {"reward": brightness} | rewards, num_images, batch_size=4), painter


def test_the_set_is_fixed_and_in_whole_groups():
    one, painter = made(num_images=6)
    assert one.num_images == 8  # two groups of four
    one.scores(0), one.scores(3), made(num_images=8)[0]
    assert painter.asked[0] == painter.asked[1]
    (names, ids, size) = painter.asked[0]
    assert names == tuple(sorted(names)) and len(set(names)) == 2 and ids == list(range(8)) and size == 4
    other, second = made(num_images=8)
    other.scores(1)
    assert second.asked[0] == painter.asked[0]


def test_differences_by_hand():
    """Prompt 0 rises by 2 on average, prompt 1 by 4: mean 3, deviation sqrt(2), standard error 1."""
    one, _ = made()
    before = np.zeros(8, np.float32)
    now = np.array([1, 3, 2, 2, 4, 4, 3, 5], np.float32)
    difference = one.difference(now, before)
    assert difference.mean == 3.0 and difference.standard_error == pytest.approx(1.0)
    assert difference.rises and not difference.falls
    now[:4] = np.nan  # a part that says nothing of prompt 0
    assert one.difference(now, before).mean == 4.0


def test_diversity_by_hand():
    """Images of 0, 0, 3 and 3 levels: each is 0 from one and 3 from two of the others: sqrt((0 + 9 + 9) / 3)."""
    images = np.stack([np.full((2, 2, 3), level, np.uint8) for level in (0, 0, 3, 3)])
    np.testing.assert_allclose(evaluation.diversity(images), np.sqrt(6.0), rtol=1e-6)


def test_the_row():
    one, _ = made(other=darkness)
    untrained, now = one.scores(10), one.scores(12)
    row = one.row(now, untrained, evaluations=3)
    assert row["eval/queries"] == 24
    assert row["eval/reward/mean"] == 12 + 3.5 and row["eval/reward/difference"] == 2.0
    assert row["eval/reward/standard_error"] == 0.0 and row["eval/other/difference"] == -2.0
    assert row["eval/reward/even/mean"] == 1.0 and row["eval/diversity/difference"] == 0.0
    assert row["eval/reward/deviations"] == pytest.approx(2 / statistics.pstdev(untrained["reward"].tolist()))
    assert math.isnan(row["eval/reward/even/deviations"])  # 1.0 for every image: there is no unit


def test_a_reward_that_fails_or_hangs_on_the_untrained_model_ends_the_run_in_one_line():
    def broken(images, prompts, metadata):
        raise OSError("no weights")

    with pytest.raises(RunFailure, match="untrained model: reward 'other' raised OSError: no weights"):
        made(other=broken)[0].start(0)
    go = threading.Event()
    hanging = Evaluation(Painter(), prompts, {"reward": lambda *batch: go.wait(20)}, 8, batch_size=4, wait_s=0.2)
    with pytest.raises(RunFailure, match="has not returned from call 1 .* after 0.2 s, which is reward.wait_s"):
        hanging.start(0)
    go.set()


def test_no_thread_is_left_and_the_reward_stays_open():
    class Reward:
        def __call__(self, images, prompts, metadata):
            return np.zeros(len(images))

        def close(self):
            raise AssertionError("training still needs it")

    before = set(threading.enumerate())  # other tests may have left one that hangs
    made(other=Reward())[0].scores(0)
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive()


def test_a_part_that_comes_later_has_no_difference():
    one, _ = made()
    now = one.scores(12)
    row = one.row(now | {"reward/late": np.ones(8, np.float32)}, now, evaluations=2)
    assert row["eval/reward/late/mean"] == 1 and math.isnan(row["eval/reward/late/difference"])


def test_a_reward_that_rises_while_another_falls_is_said(caplog):
    one, _ = made(clip_score=darkness)
    rng = np.random.default_rng(0)
    untrained = {name: rng.normal(size=8).astype(np.float32) for name in ("reward", "clip_score", "diversity")}
    shift = np.array([1.0, 1.1, 0.9, 1.0, 1.2, 1.0, 1.1, 0.9], np.float32)
    now = {"reward": untrained["reward"] + shift, "clip_score": untrained["clip_score"] - shift}
    line = one.warn(now | {"diversity": untrained["diversity"]}, untrained)
    assert line.startswith("the reward rises (+1.0") and "clip_score -1.0" in line and "diversity" not in line
    assert "algorithm=dpok" in line
    again = one.warn(now | {"diversity": untrained["diversity"]}, untrained)
    assert "clip_score -1.0" in again and "dpok" not in again  # the remedies are told once
    now["clip_score"] = untrained["clip_score"] + shift
    assert one.warn(now | {"diversity": untrained["diversity"]}, untrained) == ""
    assert one.warn(untrained | {"clip_score": untrained["clip_score"] - shift}, untrained) == ""  # nothing rises
