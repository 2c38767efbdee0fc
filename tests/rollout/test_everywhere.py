"""Rewards in several processes, which are threads here: who scores what, and that all learn all of it."""

import time

import numpy as np
import pretend
import pytest

from ddpo_jax.hosts import rows
from ddpo_jax.rollout import everywhere
from ddpo_jax.rollout.scoring import RewardError, RewardRunner

PROMPTS = [f"prompt {number}" for number in range(8)]
METADATA = [{"number": number} for number in range(8)]
IMAGES = np.arange(8, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)


class Reward:
    """The image's value; fails or is slow where it is told to. Its part is there for odd batches of prompts only."""

    def __init__(self, alone=False, fault=None, slow=0.0):
        self.waits_for_others, self.fault, self.slow, self.seen = alone, fault, slow, []

    def __call__(self, images, prompts, metadata):
        time.sleep(self.slow)
        if self.fault:
            raise OSError(self.fault)
        assert [f"prompt {entry['number']}" for entry in metadata] == prompts
        self.seen += [entry["number"] for entry in metadata]
        parts = {"twice": images[:, 0, 0, 0] * 2.0} if metadata[0]["number"] else {}
        return images[:, 0, 0, 0].astype(np.float32), parts


def collected(rank, reward):
    """The scores of two batches of four samples, of which each of two processes draws two."""
    with RewardRunner(reward) as runner:
        pending, batches = [], rows.batches(8, 4)
        for ids in batches:
            mine = ids[rows.own(4)] if not reward.waits_for_others else ids
            if rank == 0 or not reward.waits_for_others:
                submitted = IMAGES[mine], [PROMPTS[i] for i in mine], [METADATA[i] for i in mine]
                pending.append(runner.submit(*submitted))
            else:
                pending.append(None)
        return everywhere.collected(pending, batches)


@pytest.mark.parametrize("alone", [False, True])
def test_all_learn_all_scores(monkeypatch, alone):
    rewards = [Reward(alone) for _ in range(2)]
    found = pretend.processes(monkeypatch, 2, lambda rank: collected(rank, rewards[rank]))
    for scores, parts in found:
        assert scores.tolist() == list(range(8)) and scores.dtype == np.float32
        missing = [0, 1, 4, 5] if alone else [0, 1]  # the batch, or the part of it, that begins with sample 0
        np.testing.assert_array_equal(parts["twice"], np.where(np.isin(np.arange(8), missing), np.nan, 2.0 * scores))
    seen = [sorted(reward.seen) for reward in rewards]
    assert seen == ([list(range(8)), []] if alone else [[0, 1, 2, 3], [4, 5, 6, 7]])


def test_who_is_early_meets_the_others_until_they_have_theirs(monkeypatch):
    monkeypatch.setattr(everywhere, "MEET_S", 0.05)
    rewards = [Reward(), Reward(slow=0.2)]
    for scores, _ in pretend.processes(monkeypatch, 2, lambda rank: collected(rank, rewards[rank])):
        assert scores.tolist() == list(range(8))


def test_a_fault_of_one_is_one_of_all(monkeypatch):
    rewards = [Reward(), Reward(fault="no service")]
    for error in pretend.processes(monkeypatch, 2, lambda rank: collected(rank, rewards[rank])):
        assert isinstance(error, RewardError) and "process 1: reward 'reward' raised OSError: no service" in str(error)


@pytest.mark.parametrize("count, alone", [(1, False), (2, False), (3, False), (2, True)])
def test_images_that_all_have_are_scored_once(monkeypatch, count, alone):
    rewards = [Reward(alone) for _ in range(count)]

    def score(rank):
        return everywhere.score(rewards[rank], IMAGES, PROMPTS, METADATA, "reward")

    for scores, _ in pretend.processes(monkeypatch, count, score):
        assert scores.tolist() == list(range(8))
    assert sorted(number for reward in rewards for number in reward.seen) == list(range(8))
    assert not alone or rewards[1].seen == []
