"""What every file of ``ddpo_jax/replay`` must do; a new one is found and tried without an edit here."""

import numpy as np
import pytest

from ddpo_jax import find


@pytest.mark.parametrize("name", find.available("replay"))
def test_a_replay_rule_conforms(name):
    """One number per sample, from the generator and its arguments alone, which it leaves as they are."""
    rule = find.find("replay", name)
    config = rule.default_config()
    assert rule.SOURCE in ("past", "current", "nothing")
    if rule.SOURCE == "nothing":
        return
    values = np.linspace(-1, 2, 6, dtype=np.float32), np.float32([3, -2, 1, 0, -1, 0.5]), np.array([1, 1, 2, 2, 3, 3])
    for value in values:
        value.flags.writeable = False
    got = rule.priority(*values, np.random.default_rng(0), config)
    assert np.shape(got) == (6,) and not np.isnan(got).any() and np.max(got) > -np.inf
    np.testing.assert_array_equal(got, rule.priority(*values, np.random.default_rng(0), config))
    assert np.shape(rule.priority(*(value[:1] for value in values), np.random.default_rng(0), config)) == (1,)
