"""The replay buffer and its rules, with rewards and advantages small enough to sort by eye."""

import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from ddpo_jax import find
from ddpo_jax.config import default_config
from ddpo_jax.config.override import override
from ddpo_jax.config.ready import make_ready
from ddpo_jax.replay.buffer import Buffer
from ddpo_jax.types import ScoredSamples
from ddpo_jax.workdir.checkpoint import Checkpointer


def samples(epoch, advantages, per_group=1):
    """Samples whose every field tells which epoch and which row they came from."""
    n, mark = len(advantages), 100.0 * epoch + np.arange(len(advantages), dtype=np.float32)
    return ScoredSamples(
        latents=np.broadcast_to(mark[:, None, None, None, None], (n, 4, 2, 2, 1)).astype(np.float32),
        log_prob=np.stack([mark, mark + 0.25, mark + 0.5], axis=1).astype(np.float32),
        weights=np.tile(np.float32([2, 0.5, 0.5]), (n, 1)),
        mask=np.tile(np.float32([0, 1, 1]), (n, 1)),
        context=np.broadcast_to(mark[:, None, None], (n, 2, 3)).astype(np.float32),
        prompt_ids=np.arange(n) // per_group + (1 << 62),  # beyond what a float or an int32 holds
        group_ids=(np.int64(epoch) << 32) + np.arange(n) // per_group,
        rewards=mark,
        advantages=np.float32(advantages),
    )


def section(name="hard", k=2, history=3, **own):
    return ConfigDict({"name": name, "k": k, "history": history, "max_gib": 1.0, **own})


def buffer(name="hard", *, k=2, history=3, whole_groups=False, num_devices=1):
    return Buffer(
        find.find("replay", name), section(name, k, history), whole_groups=whole_groups, num_devices=num_devices
    )


def picked(result):
    """(epoch, row) of each retrieved sample, after checking that all of its fields travelled together."""
    if result is None:
        return None
    for field in (result.latents[:, 0, 0, 0, 0], result.context[:, 1, 2], result.log_prob[:, 0]):
        np.testing.assert_array_equal(field, result.rewards)
    np.testing.assert_array_equal(result.mask, np.tile([0, 1, 1], (len(result), 1)))
    np.testing.assert_array_equal(result.group_ids >> 32, result.rewards // 100)
    return [divmod(int(reward), 100) for reward in result.rewards]


def rng(seed=0):
    return np.random.default_rng(seed)


def test_hard_takes_the_largest_absolute_advantages_of_earlier_epochs():
    ours = buffer(k=3)
    first, second, third = (samples(e, a) for e, a in enumerate([[0.1, -3, 1], [2, -0.2, 0.5], [9, 9, 9]]))
    assert ours.retrieve(first, 0, rng()) is None  # nothing is there yet, and the current epoch does not count
    ours.add(first, 0)
    assert picked(ours.retrieve(second, 1, rng())) == [(0, 1), (0, 2), (0, 0)]
    ours.add(second, 1)
    assert picked(ours.retrieve(third, 2, rng())) == [(0, 1), (1, 0), (0, 2)]
    np.testing.assert_array_equal(ours.retrieve(third, 2, rng()).advantages, np.float32([-3, 2, 1]))


def test_equal_advantages_keep_their_order():
    ours = buffer(k=3)
    ours.add(samples(0, [1, -1, 1, -1]), 0)
    assert picked(ours.retrieve(samples(1, [0]), 1, rng())) == [(0, 0), (0, 1), (0, 2)]


def test_history_is_how_many_earlier_epochs_can_come_back():
    ours = buffer(k=1, history=2)
    for epoch, advantage in enumerate([9, 5, 4, 3]):
        ours.add(samples(epoch, [advantage, 0.1]), epoch)
    assert len(ours) == 4  # epochs 2 and 3
    assert picked(ours.retrieve(samples(4, [7]), 4, rng())) == [(2, 0)]


def test_an_epoch_that_kept_nothing_still_ages_the_others():
    ours = buffer(k=1, history=1)
    ours.add(samples(0, [9.0, 1.0]), 0)
    ours.add(samples(1, []), 1)
    assert len(ours) == 0
    assert ours.retrieve(samples(2, [1.0]), 2, rng()) is None


def test_k_is_per_device_and_fewer_come_back_all():
    """Algorithm 1 of "Selective Timestep Weighting": if the buffer is not empty, retrieve the top k from it."""
    ours = buffer(k=2, num_devices=3)
    assert ours.count == 6
    assert ours.retrieve(samples(0, [1.0]), 0, rng()) is None
    ours.add(samples(0, np.arange(5.0)), 0)
    assert picked(ours.retrieve(samples(1, [1.0]), 1, rng())) == [(0, 4), (0, 3), (0, 2), (0, 1), (0, 0)]
    ours.add(samples(1, [0.5]), 1)
    assert picked(ours.retrieve(samples(2, [1.0]), 2, rng())) == [(0, 4), (0, 3), (0, 2), (0, 1), (1, 0), (0, 0)]


def test_whole_groups_come_by_their_best_member():
    ours = buffer(k=2, num_devices=2, whole_groups=True)
    ours.add(samples(0, [0.1, -0.2, 4.0, 0.0, 1.0, 1.5], per_group=2), 0)
    ours.add(samples(1, [-2.0, 0.3, 0.2, 0.2], per_group=2), 1)
    assert picked(ours.retrieve(samples(2, [0.0]), 2, rng())) == [(0, 2), (0, 3), (1, 0), (1, 1)]


def test_fewer_whole_groups_than_k_come_back_all():
    ours = buffer(k=6, whole_groups=True)
    ours.add(samples(0, [0.1, -0.2, 4.0, 0.0], per_group=2), 0)
    assert picked(ours.retrieve(samples(1, [0.0]), 1, rng())) == [(0, 2), (0, 3), (0, 0), (0, 1)]


def test_whole_groups_that_do_not_fit_k_are_refused():
    ours = buffer(k=3, whole_groups=True)
    ours.add(samples(0, np.arange(8.0), per_group=2), 0)
    with pytest.raises(ValueError, match=r"replay\.k: received 3.*multiple of 2"):
        ours.retrieve(samples(1, [0.0]), 1, rng())


def test_random_draws_uniformly_from_the_past_without_repeats():
    ours = buffer("random", k=2)
    ours.add(samples(0, [9, 0, 0]), 0)
    ours.add(samples(1, [9, 0, 0]), 1)
    counts = dict.fromkeys([(e, i) for e in range(2) for i in range(3)], 0)
    for seed in range(600):
        chosen = picked(ours.retrieve(samples(2, [9.0]), 2, rng(seed)))
        assert len(set(chosen)) == 2
        for entry in chosen:
            counts[entry] += 1
    # Each is in a draw with probability 1/3: mean 200, deviation sqrt(600 * 1/3 * 2/3) = 11.5; five of them is 58.
    assert all(142 < count < 258 for count in counts.values()), counts
    again = [picked(ours.retrieve(samples(2, [9.0]), 2, rng(7))) for _ in range(2)]
    assert again[0] == again[1]


def test_current_epoch_draws_from_the_epoch_just_sampled_and_stores_nothing():
    ours = buffer("current_epoch", k=2)
    first = samples(0, [0, 0, 9, 0])
    drawn = {entry for seed in range(40) for entry in picked(ours.retrieve(first, 0, rng(seed)))}
    assert drawn == {(0, i) for i in range(4)}  # at random, not by advantage; already in the first epoch
    ours.add(first, 0)
    assert len(ours) == ours.nbytes == 0
    assert picked(ours.retrieve(samples(1, [1.0]), 1, rng())) == [(1, 0)]  # all there is


def test_none_retrieves_and_stores_nothing():
    ours = buffer("none", k=1)
    ours.add(samples(0, [1.0, 2.0]), 0)
    assert ours.retrieve(samples(1, [3.0]), 1, rng()) is None
    assert ours.nbytes == 0


def test_bytes_are_those_of_the_arrays():
    ours = buffer(history=1)
    ours.add(samples(0, [1.0, 2.0]), 0)
    # latents 4*2*2*1, log_prob + weights + mask 3 * 3, context 2*3, reward and advantage as f32; two ids of 8 bytes
    assert ours.nbytes == 2 * (4 * (16 + 9 + 6 + 2) + 16)


def test_the_oldest_epochs_leave_a_full_buffer_first():
    sample = 4 * (16 + 9 + 6 + 2) + 16  # bytes, as above
    options = section("hard", k=9, history=9, max_gib=7 * sample / 2**30)
    ours = Buffer(find.find("replay", "hard"), options, whole_groups=False, num_devices=1)
    for epoch, count in enumerate([2, 2, 3]):  # seven samples fill it
        ours.add(samples(epoch, np.arange(1.0, count + 1)), epoch)
    assert len(ours) == 7 and ours.nbytes == 7 * sample
    ours.add(samples(3, [9.0]), 3)  # one more: epoch 0 leaves whole, and the largest advantages do not matter
    assert picked(ours.retrieve(samples(4, [0.0]), 4, rng())) == [(3, 0), (2, 2), (1, 1), (2, 1), (1, 0), (2, 0)]
    ours.add(samples(4, np.ones(7)), 4)
    assert len(ours) == 7 and ours.nbytes == 7 * sample
    with pytest.raises(ValueError, match=r"replay\.max_gib: received .*the samples of one epoch take .*; allow more"):
        ours.add(samples(5, np.ones(8)), 5)


def own_rule(priority, **fields):
    return types.SimpleNamespace(priority=priority, **fields)


def test_a_rule_sees_rewards_advantages_ages_and_its_options():
    seen = {}

    def youngest(rewards, advantages, age, generator, config):
        seen.update(rewards=rewards, advantages=advantages, age=age, option=config.option)
        return np.where(rewards == 100, -np.inf, -age)

    rule = own_rule(youngest, SOURCE="past")
    ours = Buffer(rule, section("mine.rule", k=2, option=5), whole_groups=False, num_devices=1)
    ours.add(samples(0, [1.0, 2.0]), 0)
    ours.add(samples(1, [3.0, 4.0]), 1)
    assert picked(ours.retrieve(samples(2, [0.0]), 2, rng())) == [(1, 1), (0, 0)]  # minus infinity: never
    np.testing.assert_array_equal(seen["age"], [2, 2, 1, 1])
    np.testing.assert_array_equal(seen["rewards"], [0, 1, 100, 101])
    np.testing.assert_array_equal(seen["advantages"], [1, 2, 3, 4])
    assert seen["option"] == 5


@pytest.mark.parametrize(
    "priority, fields, message",
    [
        (lambda r, *_: r, {}, "mine.rule.*SOURCE is None.*must be one of past, current, nothing"),
        (lambda r, *_: r, {"SOURCE": "yesterday"}, "SOURCE is 'yesterday'"),
        (lambda r, *_: r[:1], {"SOURCE": "past"}, r"returned shape \[1\].*must return 2 numbers"),
        (lambda r, *_: r * np.nan, {"SOURCE": "past"}, "returned NaN"),
    ],
)
def test_a_wrong_rule_is_one_line(priority, fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        ours = Buffer(own_rule(priority, **fields), section("mine.rule", k=1), whole_groups=False, num_devices=1)
        ours.add(samples(0, [1.0, 2.0]), 0)
        ours.retrieve(samples(1, [0.0]), 1, rng())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("epochs", [0, 2])
def test_a_checkpoint_brings_back_exactly_the_same_buffer(tmp_path, epochs):
    ours, current = buffer(k=2, history=2), samples(5, [0.5, 0.1])
    for epoch in range(3, 3 + epochs):
        ours.add(samples(epoch, rng(epoch).normal(size=4 + epoch), per_group=2), epoch)
    with Checkpointer(tmp_path) as saver:
        saver.save(5, {"replay": ours.state_dict(), "step": np.int64(5)}, 0.0)
        restored = buffer(k=2, history=2)
        restored.add(samples(0, [1.0]), 0)  # is replaced
        _, arrays = saver.restore({"replay": buffer().state_dict(), "step": np.int64(0)})
    restored.load_state_dict(arrays["replay"])
    for mine, theirs in ((ours, restored), (restored, ours)):
        state = mine.state_dict()
        assert state.keys() == theirs.state_dict().keys()
        for name, value in theirs.state_dict().items():
            np.testing.assert_array_equal(state[name], value, strict=True)
    for epoch in (5, 6):  # and it goes on in the same way, eviction included
        assert picked(ours.retrieve(current, epoch, rng())) == picked(restored.retrieve(current, epoch, rng()))
        for b in (ours, restored):
            b.add(samples(epoch, [0.3, -0.7]), epoch)
        assert len(ours) == len(restored)


# ---- what a config may ask for ----


def faults(num_devices=1, **overrides):
    config = default_config()
    given = {"model": "mini", "sample.batch_size": 8, "sample.num_batches_per_epoch": 2, "replay.name": "hard"}
    override(config, [(key, str(value)) for key, value in (given | overrides).items()])
    try:
        make_ready(config, "cpu", num_devices)
    except ValueError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize(
    "num_devices, overrides, message",
    [
        (1, {}, None),
        (1, {"replay.k": 48}, None),
        (1, {"replay.k": 49}, "replay.k: received 49; 49 images are more than the 48 that replay 'hard' chooses from"),
        (1, {"replay.name": "current_epoch", "replay.k": 17}, "17 images are more than the 16"),
        (8, {"replay.k": 7}, "7 x 8 devices = 56 images are more than the 48"),
        (1, {"algorithm.name": "prdp", "replay.k": 6}, "whole groups of prompts.samples_per_prompt=4 images"),
        (2, {"algorithm.name": "prdp", "replay.k": 6}, None),
        (1, {"algorithm.name": "ddpo", "replay.k": 6}, None),
        (1, {"algorithm.name": "loop", "replay.k": 6}, None),  # its baseline is in the advantages already
        (1, {"algorithm.name": "grpo", "replay.k": 6}, None),
        (1, {"algorithm.name": "prdp", "replay.name": "none", "replay.k": 6}, None),
        (1, {"replay.updates": "two"}, "replay.updates: received 'two'; it must be one of one, ordinary"),
        (1, {"algorithm.name": "reinforce"}, "replay.name: received 'hard'"),
    ],
)
def test_validation(num_devices, overrides, message):
    found = faults(num_devices, **overrides)
    if message is None:
        assert found == []
    else:
        (line,) = found
        assert message in line and "; use " in line
