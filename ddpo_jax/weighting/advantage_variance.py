"""Steps count by the variance of their advantage, from a table that ``ddpo_jax measure`` wrote.

Theory ("Selective Timestep Weighting" (anonymous), section 4.1.2 and appendix A.4): given the advantage of the whole
trajectory, the expected share of step k in it is ``sigma_k^2 / sum sigma_i^2``. ``sigma_k`` is estimated (their section
4.1.3) by denoising to step k, branching into many continuations and taking the variance of the final reward.

That variance is what *all* steps from k on contribute together, so it can only fall with k. The paper takes it for
sigma_k^2 itself: ``form = "branch"``. By the law of total variance, the share of step k alone is what the variance
falls by at that step: ``form = "increment"``.
"""

from __future__ import annotations

import json
import math
import pathlib

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from ddpo_jax.diffusion.transition import Transition
from ddpo_jax.errors import InputError

FORMS = ("branch", "increment")


def default_config() -> ConfigDict:
    """Options of this weighting."""
    return ConfigDict(
        {
            "table": "",  # path of the measure.json, measured with as many steps as the run has
            "form": "branch",  # branch = the variance from the step on (the paper's); increment = of the step alone
        }
    )


def check(config: ConfigDict, num_steps: int) -> None:
    """Reads the table.

    Raises:
      InputError: there is none, it is not one, or it is of another number of steps.
    """
    _row(config, num_steps)


def weights(latents: Float[Array, "N T1 h w c"], transition: Transition, config: ConfigDict) -> Float[Array, "N T"]:
    """The table's row, for each of the N trajectories."""
    return jnp.tile(jnp.asarray(_row(config, transition.num_steps)), (latents.shape[0], 1))


def _row(config: ConfigDict, num_steps: int) -> Float[np.ndarray, " T"]:
    if config.form not in FORMS:
        raise InputError(f"weighting.form: received {config.form!r}; it must be one of {', '.join(FORMS)}; use branch")
    received = f"weighting.table: received {config.table!r}"
    how = f"write one with ddpo_jax measure --config.sample.num_steps={num_steps}"
    if not config.table:
        raise InputError(f"{received}; it must be the path of a measure.json; {how}")
    try:
        table = json.loads(pathlib.Path(config.table).expanduser().read_text(encoding="utf-8"))
        variance = np.asarray(table["branch_variance"]["mean"], np.float64)
    except OSError as error:
        raise InputError(f"{received}; it cannot be read: {error.strerror}; {how}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{received}; it holds no row branch_variance.mean of numbers; {how}") from error
    if variance.shape != (num_steps,):
        raise InputError(
            f"{received}; the table has T={variance.size} but sample.num_steps={num_steps}; they must be equal; {how}"
        )
    if config.form == "increment":  # the variance after the last step is 0; noise may make an increment negative
        variance = np.maximum(variance - np.append(variance[1:], 0.0), 0.0)
    if not (np.isfinite(variance).all() and (variance >= 0).all() and math.fsum(variance) > 0):
        raise InputError(f"{received}; its variances must be finite, 0 or more, and not all 0; {how}")
    return variance.astype(np.float32)
