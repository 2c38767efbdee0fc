"""The random streams: their values are part of what a seed means."""

import jax
import jax.numpy as jnp
import numpy as np

from ddpo_jax.ops import random
from ddpo_jax.ops.random import Stream


def test_streams_are_independent_repeatable_and_never_renumbered():
    names = ["PROMPTS", "SHUFFLE", "FIXED_PROMPTS", "EVALUATION"]
    assert [(stream.name, int(stream)) for stream in Stream] == [*zip(names, range(4), strict=True)]
    assert Stream.MEASURED_PROMPTS == 2
    chosen = [(0, 0, Stream.PROMPTS), (1, 0, Stream.PROMPTS), (0, 1, Stream.PROMPTS), (0, 1, Stream.SHUFFLE)]
    draws = {key: random.generator(*key).random() for key in chosen}
    assert len(set(draws.values())) == 4
    assert draws[0, 1, Stream.SHUFFLE] == np.random.default_rng([0, 1, 1]).random()


def test_the_noise_of_a_sample_follows_from_its_number():
    """Written down without the batch: one key folded after the other."""
    key = random.epoch_key(5, 2)
    keys = random.sample_keys(key, jnp.array([3, 7]))
    found = random.normal(random.step_keys(keys, 4), (2, 3))
    for row, number in enumerate((3, 7)):
        own = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 2), number), 4)
        np.testing.assert_array_equal(found[row], jax.random.normal(own, (2, 3)))
