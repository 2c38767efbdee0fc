"""Measures which denoising steps decide the reward ("Selective Timestep Weighting" (anonymous), Fig. 2 and 3).

- ``x0_change``: the reward of the predicted clean image at every step, and by how much each step changes it.
- ``branch_variance``: denoise to a step, branch into many continuations with fresh noise, and take the variance of
  their final rewards, sigma_t^2. The first steps are computed once for all branches.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Array, Float
from tqdm import tqdm

from ddpo_jax import errors, sharding
from ddpo_jax.config.ready import Ready
from ddpo_jax.ops.random import Stream, generator
from ddpo_jax.prompts import make_prompts
from ddpo_jax.rewards._shared.groups import in_groups
from ddpo_jax.rollout.scoring import PendingReward, RewardError, RewardRunner, make_reward
from ddpo_jax.training.build import load_model, make_sampler
from ddpo_jax.workdir import files, show

X0, BRANCH = "x0_change", "branch_variance"
_QUEUE = 4  # batches that may wait for their reward

Table = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
      what: of ``X0`` and ``BRANCH``.
      num_prompts: prompts drawn.
      repeats: trajectories of each prompt.
      branches: M continuations of each trajectory from each step.
    """

    what: tuple[str, ...] = (X0, BRANCH)
    num_prompts: int = 16
    repeats: int = 1
    branches: int = 8


class Scorer:
    """Decodes batches of latents and collects their rewards, which host threads compute meanwhile."""

    def __init__(self, decode: Callable[[Array], Array], runner: RewardRunner, size: int, bar: tqdm):
        self._decode, self._runner, self._bar = decode, runner, bar
        self._pending: deque[tuple[np.ndarray, PendingReward]] = deque()
        self.rewards = np.full(size, np.nan)

    def submit(self, where: np.ndarray, latents: Array, prompts: list[str], metadata: list[dict[str, Any]]) -> None:
        """Scores the first ``len(where)`` of ``latents``; their rewards go to those places of ``rewards``."""
        images = np.asarray(self._decode(latents))[: len(where)]
        self._pending.append((where, self._runner.submit(images, prompts, metadata)))
        while len(self._pending) > _QUEUE:
            self._collect()

    def finish(self) -> np.ndarray:
        """Waits for what is left and returns all rewards."""
        while self._pending:
            self._collect()
        return self.rewards

    def _collect(self) -> None:
        where, pending = self._pending.popleft()
        self.rewards[where] = pending.result()[0]
        self._bar.update(len(where))


def measure(ready: Ready, plan: Plan) -> Table:
    """The table of a run's reward.

    Returns:
      What ``measure.json`` holds: ``num_steps``, ``timesteps``, how it was measured, and of what was asked for
      ``x0_reward`` [T + 1] (the last one is the final image's), ``x0_change`` [T] (by step t: ``x0_reward[t + 1] -
      x0_reward[t]``), ``x0_change_abs`` [T] (mean of its size), ``branch_variance`` [T] (unbiased, of the final reward
      given the latents before step t): each ``{"mean": [...], "standard_error": [...]}``, over prompts (over
      trajectories if there is one prompt; null if there is one of those).

    Raises:
      InputError: the config names something that cannot be had.
      RunFailure: the reward failed.
    """
    config, members = ready.config, ready.members
    reward = in_groups(make_reward(config.reward, members.reward), 1, config.reward.name)
    prompt_fn = make_prompts(config.prompts, members.prompts)
    model = load_model(config)
    sampler = make_sampler(model, config, sharding.make_mesh(config.mesh.data, config.mesh.fsdp))
    params = sharding.put_params(model.params, sampler.mesh, sampler.rules)
    key = jax.random.key(config.seed)
    steps, n = sampler.policy.transition.num_steps, plan.num_prompts * plan.repeats
    total = n * (steps + 1) * (X0 in plan.what) + n * steps * plan.branches * (BRANCH in plan.what)
    drawn, drawn_metadata = prompt_fn(generator(config.seed, 0, Stream.MEASURED_PROMPTS), plan.num_prompts)
    prompts = [prompt for prompt in drawn for _ in range(plan.repeats)]
    metadata = [entry for entry in drawn_metadata for _ in range(plan.repeats)]
    logging.info("%d trajectories of %d steps, %d images to score by %s", n, steps, total, config.reward.name)
    table: Table = {
        "num_steps": steps,
        "timesteps": np.asarray(sampler.policy.transition.timesteps).tolist(),
        **{key: config[key].name for key in ("reward", "prompts")},
        **{key: config[key] for key in ("model", "seed")},
        **{key: config.sample[key] for key in ("eta", "guidance_scale")},
        **{key: value for key, value in dataclasses.asdict(plan).items() if key != "what"},
    }
    runner = RewardRunner(reward, name=config.reward.name, wait_s=config.reward.wait_s)
    with runner, tqdm(total=total, unit="image", disable=None) as bar:

        def batches(count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            """(indices of a batch, the same filled up to the one size of all batches)."""
            devices = sampler.mesh.size
            size = min(config.sample.batch_size, math.ceil(count / devices) * devices)
            for start in range(0, count, size):
                there = np.arange(start, min(start + size, count))
                yield there, np.resize(there, size)

        def scores(count: int, latents_of: Callable[[np.ndarray], Array]) -> np.ndarray:
            """Rewards of ``count`` latents, ``count / n`` next to each other for every trajectory."""
            scorer = Scorer(sampler.decode, runner, count, bar)
            for there, rows in batches(count):
                roots = (there // (count // n)).tolist()
                scorer.submit(there, latents_of(rows), [prompts[r] for r in roots], [metadata[r] for r in roots])
            return scorer.finish()

        def named(roots: np.ndarray) -> list[str]:
            return [prompts[root] for root in roots]

        def path(rows: np.ndarray) -> np.ndarray:
            return np.asarray(sampler.trajectories(params, named(rows), rows, key)[0].latents)

        try:
            paths = np.concatenate([path(rows)[: len(there)] for there, rows in batches(n)])
            if X0 in plan.what:

                def predicted(t: int) -> np.ndarray:
                    return scores(n, lambda rows: sampler.predictions(params, named(rows), paths[rows, t], t))

                by_step = [predicted(t) for t in range(steps)]
                final = scores(n, lambda rows: sharding.put_batch(paths[rows, steps], sampler.mesh))
                table |= _x0_rows(np.stack([*by_step, final], axis=1), plan)
            if BRANCH in plan.what:

                def branched(t: int) -> np.ndarray:
                    def latents_of(rows: np.ndarray) -> Array:
                        roots = rows // plan.branches
                        ids = n + t * n * plan.branches + rows  # the first n are the trajectories'
                        return sampler.continuations(params, named(roots), ids, key, paths[roots, t], t)

                    return scores(n * plan.branches, latents_of).reshape(n, plan.branches).var(axis=1, ddof=1)

                variances = np.stack([branched(t) for t in range(steps)], axis=1)
                table["branch_variance"] = _summary(variances, plan)
        except RewardError as error:
            raise errors.RunFailure(str(error)) from error
    return table


def _x0_rows(rewards: Float[np.ndarray, "N T1"], plan: Plan) -> Table:
    change = np.diff(rewards, axis=1)
    rows = {"x0_reward": rewards, "x0_change": change, "x0_change_abs": np.abs(change)}
    return {name: _summary(values, plan) for name, values in rows.items()}


def _summary(values: Float[np.ndarray, "N S"], plan: Plan) -> dict[str, list[float | None]]:
    """Mean and standard error [S]; the trajectories of a prompt are not independent, so they count as one."""
    if plan.num_prompts > 1:
        values = values.reshape(plan.num_prompts, plan.repeats, -1).mean(axis=1)
    count = len(values)
    error = (values.std(axis=0, ddof=1) / math.sqrt(count)).tolist() if count > 1 else [None] * values.shape[1]
    return {"mean": values.mean(axis=0).tolist(), "standard_error": error}


def deviations(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """sigma_t [T], the square root of the branch variance, and its standard error (NaN if unknown)."""
    variance, error = (np.asarray(table["branch_variance"][key], np.float64) for key in ("mean", "standard_error"))
    sigma = np.sqrt(variance)
    return sigma, np.divide(error, 2 * sigma, out=np.zeros_like(sigma), where=sigma > 0)


def text(table: Table) -> str:
    """The table for a terminal: a line per step."""
    columns: dict[str, list[str]] = {
        "step": [str(t) for t in range(table["num_steps"])],
        "timestep": [str(t) for t in table["timesteps"]],
    }
    if "x0_change" in table:
        columns["x0 reward"] = [f"{value:.4g}" for value in table["x0_reward"]["mean"][:-1]]
        columns["change"] = _with_errors(*(table["x0_change"][key] for key in ("mean", "standard_error")))
        columns["|change|"] = [f"{value:.3g}" for value in table["x0_change_abs"]["mean"]]
    if "branch_variance" in table:
        variance = np.asarray(table["branch_variance"]["mean"])
        columns["sigma"] = _with_errors(*(values.tolist() for values in deviations(table)))
        columns["weight"] = [f"{value:.3g}" for value in variance / max(variance.mean(), 1e-300)]
    rows = [show.table([tuple(columns), *zip(*columns.values(), strict=True)], numbers=True)]
    if "x0_reward" in table:
        rows.append(f"reward of the final images: {table['x0_reward']['mean'][-1]:.4g}")
    return "\n".join(rows)


def _with_errors(means: Sequence[float], standard_errors: Sequence[float | None]) -> list[str]:
    known = [error is not None and math.isfinite(error) for error in standard_errors]
    return [
        f"{mean:.3g} ± {error:.2g}" if there else f"{mean:.3g}"
        for mean, error, there in zip(means, standard_errors, known, strict=True)
    ]


def plot(table: Table, path: pathlib.Path) -> None:
    """Draws the change of the predicted image's reward and sigma, per step, with standard errors."""
    panels = [name for name in ("x0_change", "branch_variance") if name in table]
    steps = np.arange(table["num_steps"])
    with show.plot(path, len(panels), (5.6, 3.8)) as every:
        for axes, name in zip(every, panels, strict=True):
            axes.set_xlabel("step (0 = noisiest)")
            if name == "x0_change":
                mean, error = (np.asarray(table[name][key], np.float64) for key in ("mean", "standard_error"))
                axes.bar(steps, mean, yerr=np.nan_to_num(error), capsize=2, color="tab:blue")
                axes.axhline(0, color="black", linewidth=0.8)
                axes.set_ylabel("change in reward of predicted $x_0$")
            else:
                sigma, error = deviations(table)
                axes.errorbar(steps, sigma, yerr=np.nan_to_num(error), capsize=2, marker="o", color="tab:orange")
                axes.set_ylim(bottom=0)
                axes.set_ylabel(r"$\sigma_t$: deviation of final reward over branches")
            axes.set_title(f"{table['reward']}, {table['num_prompts']} prompts")


def write(table: Table, out: pathlib.Path) -> None:
    """Writes ``measure.json`` and ``measure.png`` into a folder that exists."""
    files.write_json(out / "measure.json", table)
    plot(table, out / "measure.png")
