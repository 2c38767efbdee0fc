"""Measures which denoising steps decide the reward: Fig. 2 and Fig. 3 of the paper on selective timestep weighting.

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
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float
from ml_collections import ConfigDict
from tqdm import tqdm

from ddpo_jax import errors, sharding
from ddpo_jax.config.ready import Ready
from ddpo_jax.diffusion import ddim, sampler, schedule
from ddpo_jax.diffusion.policy import Policy, per_sample_normal
from ddpo_jax.prompts import make_prompts
from ddpo_jax.rollout.collector import generator
from ddpo_jax.rollout.scoring import PendingReward, RewardError, RewardRunner, make_reward
from ddpo_jax.training.build import Model, load_model
from ddpo_jax.types import Params
from ddpo_jax.workdir import files

X0, BRANCH = "x0_change", "branch_variance"
_PROMPTS = 2  # stream of the host generator (0 and 1 are a run's)
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


class Programs:
    """The device programs: whole trajectories, predicted clean latents, and continuations from a step."""

    def __init__(self, config: ConfigDict, model: Model):
        pipe = model.pipeline
        self.mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
        self.schedule = schedule.make(pipe.scheduler_config, config.sample.num_steps, config.sample.eta)
        self._policy = Policy(schedule=self.schedule, guidance_scale=config.sample.guidance_scale)
        self._network, self._latent_shape, self._seed = model.network, pipe.latent_shape, config.seed
        self._params = sharding.put_params((model.params, model.frozen), self.mesh)
        self._uncond = sharding.replicate(jnp.asarray(pipe.embed([""])[0]), self.mesh)
        self.trajectories = self._compiled(self._trajectories)
        self.predictions = self._compiled(self._predictions)
        self.continuations = self._compiled(self._continuations)

    def _compiled(self, function: Callable[..., Array]) -> Callable[..., Array]:
        """``function(policy, params, uncond, start, *samples)`` with the first three given, samples split by device."""

        def local(trained: Params, frozen: Params, uncond: Array, start: Array, *samples: Array) -> Array:
            return function(self._policy.bind(self._network, frozen), trained, uncond, start, *samples)

        @jax.jit
        def program(trained: Params, frozen: Params, uncond: Array, start: Array, *samples: Array) -> Array:
            specs = (P(), P(), *[sharding.BATCH] * len(samples))
            call = sharding.per_device(local, self.mesh, 2, specs, sharding.BATCH)
            return call(trained, frozen, uncond, start, *samples)

        return lambda start, *samples: program(
            *self._params, self._uncond, np.int32(start), *sharding.put_batch(samples, self.mesh)
        )

    def _keys(self, ids: Array) -> Array:
        return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(self._seed), i))(ids)

    def _trajectories(
        self, policy: Policy, params: Params, uncond: Array, start: Array, context: Array, ids: Array
    ) -> Float[Array, "N T1 h w c"]:
        return sampler.sample(policy, params, self._keys(ids), context, uncond, self._latent_shape).latents

    def _predictions(
        self, policy: Policy, params: Params, uncond: Array, start: Array, context: Array, latents: Array
    ) -> Float[Array, "N h w c"]:
        """The clean latents that the network predicts from ``latents`` at step ``start``."""
        steps = jnp.full(len(latents), start)
        output = policy.model_output(params, latents, self.schedule.timesteps[steps], context, uncond)
        return ddim.predictions(self.schedule, output, latents, self.schedule.alpha[steps])[0]

    def _continuations(
        self, policy: Policy, params: Params, uncond: Array, start: Array, context: Array, latents: Array, ids: Array
    ) -> Float[Array, "N h w c"]:
        """The final latents of ``latents`` at step ``start``, with the noise of each one's id."""
        keys = self._keys(ids)

        def denoise(index: Array, latents: Array) -> Array:
            mean, std, _ = policy.step(params, latents, jnp.full(len(latents), index), context, uncond)
            noise = per_sample_normal(jax.vmap(jax.random.fold_in, (0, None))(keys, index), self._latent_shape)
            return mean + std[:, None, None, None] * noise

        return jax.lax.fori_loop(start, self.schedule.num_steps, denoise, latents)


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
    reward = make_reward(config.reward, members.reward)
    prompt_fn = make_prompts(config.prompts, members.prompts)
    model = load_model(config)
    programs = Programs(config, model)
    steps, n = programs.schedule.num_steps, plan.num_prompts * plan.repeats
    total = n * (steps + 1) * (X0 in plan.what) + n * steps * plan.branches * (BRANCH in plan.what)
    drawn, drawn_metadata = prompt_fn(generator(config.seed, 0, _PROMPTS), plan.num_prompts)
    prompts = [prompt for prompt in drawn for _ in range(plan.repeats)]
    metadata = [entry for entry in drawn_metadata for _ in range(plan.repeats)]
    logging.info("%d trajectories of %d steps, %d images to score by %s", n, steps, total, config.reward.name)
    context = model.pipeline.embed(prompts)
    table: Table = {
        "num_steps": steps,
        "timesteps": np.asarray(programs.schedule.timesteps).tolist(),
        **{key: config[key].name for key in ("reward", "prompts")},
        **{key: config[key] for key in ("model", "seed")},
        **{key: config.sample[key] for key in ("eta", "guidance_scale")},
        **{key: value for key, value in dataclasses.asdict(plan).items() if key != "what"},
    }
    runner = RewardRunner(reward, name=config.reward.name, wait_s=config.reward.wait_s)
    with runner, tqdm(total=total, unit="image", disable=None) as bar:

        def batches(count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            """(indices of a batch, the same filled up to the one size of all batches)."""
            devices = programs.mesh.size
            size = min(config.sample.batch_size, math.ceil(count / devices) * devices)
            for start in range(0, count, size):
                there = np.arange(start, min(start + size, count))
                yield there, np.resize(there, size)

        def scores(count: int, latents_of: Callable[[np.ndarray], Array]) -> np.ndarray:
            """Rewards of ``count`` latents, ``count / n`` next to each other for every trajectory."""
            scorer = Scorer(model.pipeline.decode, runner, count, bar)
            for there, rows in batches(count):
                roots = (there // (count // n)).tolist()
                scorer.submit(there, latents_of(rows), [prompts[r] for r in roots], [metadata[r] for r in roots])
            return scorer.finish()

        try:
            paths = np.concatenate(
                [
                    np.asarray(programs.trajectories(0, context[rows], rows.astype(np.int32)))[: len(there)]
                    for there, rows in batches(n)
                ]
            )
            if X0 in plan.what:

                def predicted(t: int) -> np.ndarray:
                    return scores(n, lambda rows: programs.predictions(t, context[rows], paths[rows, t]))

                by_step = [predicted(t) for t in range(steps)]
                final = scores(n, lambda rows: sharding.put_batch(paths[rows, steps], programs.mesh))
                table |= _x0_rows(np.stack([*by_step, final], axis=1), plan)
            if BRANCH in plan.what:

                def branched(t: int) -> np.ndarray:
                    def latents_of(rows: np.ndarray) -> Array:
                        roots = rows // plan.branches
                        ids = (n + t * n * plan.branches + rows).astype(np.int32)  # the first n are the trajectories'
                        return programs.continuations(t, context[roots], paths[roots, t], ids)

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
    widths = [max(map(len, [name, *values])) for name, values in columns.items()]
    lines = [columns.keys(), *zip(*columns.values(), strict=True)]
    rows = ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines]
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
    from matplotlib.figure import Figure  # here because it takes 0.5 s

    panels = [name for name in ("x0_change", "branch_variance") if name in table]
    figure = Figure(figsize=(5.6 * len(panels), 3.8), layout="constrained")
    steps = np.arange(table["num_steps"])
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
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
        axes.grid(alpha=0.3)
    with files.replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def write(table: Table, out: pathlib.Path) -> None:
    """Writes ``measure.json`` and ``measure.png`` into a folder that exists."""
    files.write_json(out / "measure.json", table)
    plot(table, out / "measure.png")
