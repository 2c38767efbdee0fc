"""The middle steps count most: a Gaussian over the step's position.

It stands between early and late in "Selective Timestep Weighting" (anonymous), Fig. 7c.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from ddpo_jax.weighting import _gaussian
from ddpo_jax.weighting._gaussian import check, weights

__all__ = ["check", "default_config", "weights"]


def default_config() -> ConfigDict:
    """The options are ``centre`` and ``width``."""
    return _gaussian.options(centre=0.5)
