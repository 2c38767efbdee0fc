"""The noisiest steps count most: a Gaussian over the step's position.

It is the best of the three Gaussians in "Selective Timestep Weighting" (anonymous), Fig. 7c.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from ddpo_jax.weighting import _gaussian
from ddpo_jax.weighting._gaussian import check, weights

__all__ = ["check", "default_config", "weights"]


def default_config() -> ConfigDict:
    """The options are ``centre`` and ``width``."""
    return _gaussian.options(centre=0.0)
