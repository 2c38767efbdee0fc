"""Evaluation in training: the policy of now and the untrained one draw the same prompts from the same noise.

Training curves compare different prompts and different noise at every point, so they cannot tell a small gain. Here
the prompts and the noise are fixed, the same for every run, seed and method, and every difference is paired. Nothing of
it is trained on, so these images are no reward queries; they are counted apart as ``eval/queries``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Float, UInt8

from ddpo_jax.errors import SAVED, RunFailure
from ddpo_jax.ops import random
from ddpo_jax.ops.random import Stream
from ddpo_jax.rewards._shared.check import RewardError, RewardFn
from ddpo_jax.rewards._shared.groups import in_groups
from ddpo_jax.rollout import everywhere
from ddpo_jax.rollout.sampler import ImageSampler
from ddpo_jax.types import Params

PER_PROMPT = 4  # images of each prompt: enough to see whether they differ
SEED = 0  # not the run's: all runs are evaluated on the same prompts and noise
CLEAR = 2.0  # standard errors from which a difference is taken for real
TRAINED = "reward"  # the reward that is trained on, in the names of metrics
REMEDY = (
    "the policy may be exploiting the reward; look at samples/, take an earlier checkpoint (--epoch), lower "
    "train.learning_rate, or penalise the distance to the pretrained model (algorithm=dpok)"
)
Scores = dict[str, Float[np.ndarray, " N"]]


@dataclasses.dataclass(frozen=True)
class Difference:
    """Trained minus untrained, on the same prompts and noise: mean and standard error over prompts."""

    mean: float
    standard_error: float

    @property
    def rises(self) -> bool:
        """Whether it is clearly above 0."""
        return self.mean > CLEAR * self.standard_error

    @property
    def falls(self) -> bool:
        """Whether it is clearly below 0."""
        return self.mean < -CLEAR * self.standard_error


class Evaluation:
    """A fixed set of prompts and noise, drawn by the sampler that training uses and scored by some rewards."""

    def __init__(
        self,
        sampler: ImageSampler,
        prompt_fn: Callable[[np.random.Generator, int], tuple[list[str], list[dict[str, Any]]]],
        rewards: Mapping[str, RewardFn],
        num_images: int,
        batch_size: int,
        every: int = 1,
        wait_s: float = math.inf,
    ):
        """Args:
        sampler: as of training, so that no other program is compiled.
        prompt_fn: draws the prompts, once.
        rewards: functions by name; ``reward`` is the trained one.
        num_images: N, in groups of ``PER_PROMPT`` of the same prompt; rounded up to whole groups.
        batch_size: images of one device program, as of training.
        every: epochs between evaluations.
        wait_s: seconds that a reward may take (``reward.wait_s``).
        """
        self._every, self._wait_s, self._untrained, self._warned = every, wait_s, Scores(), False
        self._sampler, self._batch_size = sampler, batch_size
        self._rewards = {name: in_groups(fn, PER_PROMPT, name) for name, fn in rewards.items()}
        self._count = math.ceil(num_images / PER_PROMPT)
        prompts, metadata = prompt_fn(random.generator(SEED, 0, Stream.EVALUATION), self._count)
        self._prompts = [prompt for prompt in prompts for _ in range(PER_PROMPT)]
        self._metadata = [entry for entry in metadata for _ in range(PER_PROMPT)]

    @property
    def num_images(self) -> int:
        """N, scored at every evaluation."""
        return len(self._prompts)

    def start(self, params: Params) -> None:
        """Scores the untrained policy, with which all later ones are compared. A resumed run does it again.

        Raises:
          RunFailure: a reward failed.
        """
        try:
            self._untrained = self.scores(params)
        except RewardError as error:
            raise RunFailure(f"evaluation of the untrained model: {error}; {SAVED}") from error

    def after(self, epochs: int, num_epochs: int, params: Params) -> dict[str, float]:
        """The metrics of the policy after ``epochs`` of ``num_epochs`` epochs; empty where it is not its turn.

        Raises:
          RunFailure: a reward failed.
        """
        if epochs % self._every and epochs != num_epochs:
            return {}
        try:
            now = self.scores(params)
        except RewardError as error:
            raise RunFailure(f"evaluation after epoch {epochs - 1}: {error}; {SAVED}") from error
        self.warn(now, self._untrained)
        return self.row(now, self._untrained, 1 + math.ceil(epochs / self._every))

    def scores(self, params: Params) -> Scores:
        """Every reward, its parts as ``name/part``, and the diversity of the images of each prompt, of a policy.

        Args:
          params: of the policy, on the mesh.

        Returns:
          f32[N] by name; ``diversity`` is the root mean square distance of an image to the others of its prompt, in
          levels of 255.

        Raises:
          RewardError: a reward failed.
        """
        ids = np.arange(self.num_images, dtype=np.int32)
        images = self._sampler.images(params, self._prompts, ids, jax.random.key(SEED), self._batch_size)
        found: Scores = {}
        for name, reward in self._rewards.items():
            values, parts = everywhere.score(
                reward, images, self._prompts, self._metadata, name, PER_PROMPT, self._wait_s
            )
            found |= {name: values} | {f"{name}/{part}": numbers for part, numbers in parts.items()}
        return found | {"diversity": diversity(images)}

    def difference(self, now: Float[np.ndarray, " N"], before: Float[np.ndarray, " N"]) -> Difference:
        """The paired difference; the images of a prompt are averaged first, because they are not independent."""
        by_prompt = (now - before).reshape(self._count, PER_PROMPT).astype(np.float64)
        known = by_prompt[~np.isnan(by_prompt).any(axis=1)].mean(axis=1)  # a part may say nothing of a prompt
        if not len(known):
            return Difference(math.nan, math.nan)
        spread = float(known.std(ddof=1)) if len(known) > 1 else math.nan
        return Difference(float(known.mean()), spread / math.sqrt(len(known)))

    def row(self, now: Scores, untrained: Scores, evaluations: int) -> dict[str, float]:
        """What goes to ``metrics.jsonl``.

        Args:
          now: scores of the trained policy.
          untrained: scores of the untrained policy.
          evaluations: how many policies were evaluated so far, the untrained one included.
        """
        row: dict[str, float] = {"eval/queries": evaluations * self.num_images}
        for name, values in now.items():
            before = untrained.get(name, np.full_like(values, np.nan))  # a part may come later
            difference = self.difference(values, before)
            row[f"eval/{name}/mean"] = float(np.nanmean(values)) if not np.isnan(values).all() else math.nan
            row[f"eval/{name}/difference"] = difference.mean
            row[f"eval/{name}/standard_error"] = difference.standard_error
            row[f"eval/{name}/deviations"] = difference.mean / deviation(before)
        return row

    def warn(self, now: Scores, untrained: Scores) -> str:
        """One line if the reward rises while something else falls, else an empty text; also logged.

        What can be done about it is said the first time only.
        """
        gain = self.difference(now[TRAINED], untrained[TRAINED])
        others = {name: self.difference(now[name], untrained[name]) for name in (*self._rewards, "diversity")}
        fallen = [f"{name} {d.mean:+.3g} ± {d.standard_error:.2g}" for name, d in others.items() if d.falls]
        if not gain.rises or not fallen:
            return ""
        line = (
            f"the reward rises ({gain.mean:+.3g} ± {gain.standard_error:.2g} against the untrained model) while "
            f"{', '.join(fallen)}"
        )
        if not self._warned:
            line += f": {REMEDY}"
        self._warned = True
        logging.warning("%s", line)
        return line


def deviation(values: Float[np.ndarray, " N"]) -> float:
    """Standard deviation of what is not NaN, as a unit: NaN where it is 0 or nothing is known."""
    known = values[~np.isnan(values)].astype(np.float64)
    return (float(known.std()) if known.size else 0.0) or math.nan


def diversity(images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, " N"]:
    """Root mean square distance of each image to the others of its prompt (``PER_PROMPT`` each), in levels of 255."""
    groups = images.reshape(-1, PER_PROMPT, images[0].size).astype(np.float32)
    square = ((groups[:, :, None] - groups[:, None, :]) ** 2).mean(axis=-1)  # [P, K, K]
    return np.sqrt(square.sum(axis=2) / (PER_PROMPT - 1)).reshape(-1).astype(np.float32)
