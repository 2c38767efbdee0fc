"""The updates of an epoch, without a network: which minibatches reach the learner, and what replay keeps."""

import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from ddpo_jax import find, sharding
from ddpo_jax.replay.buffer import Buffer
from ddpo_jax.training import epoch
from ddpo_jax.training.learner import TrainState
from ddpo_jax.types import ScoredSamples, Traits

T = 3
VALUES = np.float32([0.5, 9.0, 2.0, -1.0])  # of a learned value, by the row of the sample


def samples(number, n=4):
    mark = 100.0 * number + np.arange(n, dtype=np.float32)
    return ScoredSamples(
        latents=np.zeros((n, T + 1, 2, 2, 1), np.float32) + mark[:, None, None, None, None],
        log_prob=np.zeros((n, T), np.float32),
        weights=np.tile(np.float32([2, 0.5, 0.5]), (n, 1)),
        mask=np.ones((n, T), np.float32),
        context=np.zeros((n, 2, 3), np.float32),
        prompt_ids=np.arange(n),
        group_ids=(np.int64(number) << 32) + np.arange(n),
        rewards=np.float32([1, 2, 3, 4])[:n],
        advantages=np.float64([0.1, -3, 1, 2])[:n],
    )


class Run:
    """Epochs of a run whose learner writes down the samples of its minibatches: ``(rewards, latents' mark)``."""

    def __init__(self, *, replay="hard", k=3, updates="one", batch_size=2, value=False, **config):
        section = {"name": replay, "k": k, "history": 3, "updates": updates, "max_gib": 1.0}
        self.config = ConfigDict(
            {
                "seed": 0,
                "algorithm": {},
                "weighting": {"kl": False} | config,
                "replay": section,
                "train": {
                    "batch_size": batch_size,
                    "num_inner_epochs": 1,
                    "timestep_fraction": 1.0,
                    "step_sampling": "importance",
                    "recompute_log_prob": "off",
                },
            }
        )
        self.batches = []
        self.parts = types.SimpleNamespace(
            algorithm=None,
            traits=Traits(frozenset({"log_prob"}), value_updates=1 if value else 0),
            trained_steps=np.ones(T, bool),
            learner=types.SimpleNamespace(update=self.update),
            model=types.SimpleNamespace(reference={}, frozen={}),
            uncond=None,
            mesh=sharding.make_mesh(1, 1),
            value=types.SimpleNamespace(update=self.fit, predict=self.predict) if value else None,
            replay=Buffer(find.find("replay", replay), ConfigDict(section), whole_groups=False, num_devices=1),
        )
        self.state = TrainState(params={}, opt_state=(), ema={}, behaviour={}, step=0, value=0)

    def update(self, state, reference, frozen, uncond, batch):
        self.batches.append(batch)
        return state, {"loss": np.float32(0)}

    def fit(self, value, batch):
        return value + 1, {}

    def predict(self, value, batch):
        rows = np.asarray(batch.latents[:, 0, 0, 0, 0]).astype(int) % 100
        return VALUES[rows][:, None] + np.float32([-1, 0, 1])  # differs by step; the mean is the value

    def epoch(self, number):
        """The marks of the samples that count in every minibatch of the epoch."""
        self.batches.clear()
        _, done = epoch.optimise(self.parts, self.config, self.state, samples(number), number)
        self.replayed = done.replayed
        counted = [np.asarray(b.mask).any(axis=1) for b in self.batches]
        return [
            sorted(np.asarray(b.latents)[c, 0, 0, 0, 0].astype(int).tolist())
            for b, c in zip(self.batches, counted, strict=True)
        ]


@pytest.mark.parametrize(
    "updates, k, sizes",
    [
        ("one", 3, [3]),
        ("ordinary", 3, [2, 1]),  # in updates of train.batch_size, the last one filled up with what does not count
        ("ordinary", 4, [2, 2]),
        ("one", 9, [4]),  # fewer than k are there: all of them
    ],
)
def test_replayed_images_are_trained_in_one_update_or_in_ordinary_ones(updates, k, sizes):
    run = Run(updates=updates, k=k)
    assert [len(marks) for marks in run.epoch(0)] == [2, 2] and run.replayed == 0
    second = run.epoch(1)
    assert sorted(sum(second[:2], [])) == [100, 101, 102, 103]
    assert [len(marks) for marks in second[2:]] == sizes and run.replayed == sum(sizes)
    best = [1, 3, 2, 0]  # |advantage| 3, 2, 1, 0.1
    assert sorted(sum(second[2:], [])) == sorted(best[: sum(sizes)])
    shapes = {len(batch.mask) for batch in run.batches[2:]}
    assert shapes == {k if updates == "one" else 2}  # one program for all epochs, however many are there


def test_replay_ranks_by_the_advantage_that_the_loss_trains_on():
    """DPOK's is r - V: 0.5, -7, 1, 5 by the values above, not the algorithm's 0.1, -3, 1, 2."""
    for value, kept in ((True, [-7, 5, 1, 0.5]), (False, [-3, 2, 1, 0.1])):
        run = Run(k=4, value=value)
        run.epoch(0)
        found = run.parts.replay.retrieve(samples(1), 1, np.random.default_rng(0))
        np.testing.assert_allclose(found.advantages, kept, rtol=1e-6)


def test_a_penalty_is_weighted_where_the_config_says_so():
    for weighted in (False, True):
        run = Run(replay="none", kl=weighted)
        run.parts.algorithm = types.SimpleNamespace(penalty=lambda terms, batch, config: 0.0)
        run.epoch(0)
        for batch in run.batches:
            np.testing.assert_array_equal(batch.step_weight, np.tile([2, 0.5, 0.5], (2, 1)))
            np.testing.assert_array_equal(batch.penalty_weight, batch.step_weight if weighted else np.ones((2, T)))
