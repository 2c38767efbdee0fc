"""Draws the picture of docs/how-it-works.md with the embedded miniature: python docs/make_pictures.py

The upper row is what the image would be if denoising stopped at each step (the clean image that the network predicts),
the lower one how much the step counts under the weighting by the squared latent change.
"""

import pathlib

import jax
import numpy as np
from matplotlib.figure import Figure

from ddpo_jax import sharding
from ddpo_jax.config import choose, default_config
from ddpo_jax.config.ready import make_ready
from ddpo_jax.ops.steps import normalise
from ddpo_jax.training.build import load_model, make_sampler
from ddpo_jax.weighting import latent_change_squared

PROMPT = "a striped red star"
OUT = pathlib.Path(__file__).parent / "img" / "how_it_works.png"


def main() -> None:
    """Samples one trajectory and draws it."""
    config = default_config()
    config.model = "mini"
    choose(config, "weighting", "latent_change_squared")
    ready = make_ready(config, "cpu", 1)
    config, model = ready.config, load_model(ready.config)
    sampler = make_sampler(model, config, sharding.make_mesh(1, 1))
    key, ids = jax.random.key(1), np.arange(1)
    trajectory, _ = sampler.trajectories(model.params, [PROMPT], ids, key)
    latents = np.asarray(trajectory.latents)
    steps = latents.shape[1] - 1
    clean = [sampler.predictions(model.params, [PROMPT], latents[:, t], t) for t in range(steps)]
    images = [np.asarray(sampler.decode(x))[0] for x in clean]
    images.append(np.asarray(sampler.decode(trajectory.latents[:, -1]))[0])
    trained = np.asarray(sampler.policy.transition.trainable)
    raw = latent_change_squared.weights(trajectory.latents, sampler.policy.transition, config.weighting)
    weights = normalise(np.asarray(raw), trained)[0]

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    grid = figure.add_gridspec(2, steps + 1, height_ratios=[1.1, 1])
    for t, image in enumerate(images):
        axes = figure.add_subplot(grid[0, t])
        axes.imshow(image, interpolation="nearest")
        axes.set_title("image" if t == steps else f"step {t}", fontsize=9)
        axes.set_axis_off()
    bars = figure.add_subplot(grid[1, :steps])
    bars.bar(range(steps), weights, color="tab:orange", width=0.6)
    bars.axhline(1, color="gray", linewidth=0.8, linestyle=":")
    bars.set_xlim(-0.5, steps - 0.5)
    bars.set_xticks(range(steps))
    bars.set_xlabel("denoising step (0 = noisiest)")
    bars.set_ylabel("weight (mean 1)")
    text = figure.add_subplot(grid[1, steps])
    text.set_axis_off()
    text.text(0.5, 0.55, "score\n↓\nadvantage A\n↓\nA × weight\nper step", ha="center", va="center", fontsize=10)
    figure.suptitle(f'"{PROMPT}": the clean image predicted at each step', fontsize=11)
    figure.savefig(OUT, dpi=110)


if __name__ == "__main__":
    main()
