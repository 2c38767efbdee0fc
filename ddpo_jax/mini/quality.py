"""The quality table of the miniature: every network is measured on pictures it was not trained on.

Reads the asset folders as any user of the package does, so that what is measured is what ships.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import UInt8
from PIL import Image

from ddpo_jax.config.model import read_json
from ddpo_jax.diffusion import sampler, transition
from ddpo_jax.diffusion.policy import Policy
from ddpo_jax.mini import grammar, rating, scoring, verifier, world
from ddpo_jax.mini.assemble import write_json
from ddpo_jax.mini.stages import clip_pixels, neighbor
from ddpo_jax.models import keys, pipeline, weights
from ddpo_jax.models.aesthetic_head import AestheticHead, AestheticHeadConfig, score
from ddpo_jax.models.clip import CLIP, CLIPConfig, normalize
from ddpo_jax.models.functional import functional
from ddpo_jax.models.pipeline import Pipeline
from ddpo_jax.models.tokenizer import Tokenizer
from ddpo_jax.types import Params
from ddpo_jax.workdir import grid

STEPS = 20
MANY = 64  # pictures sampled or encoded at once


class Sampler:
    """Pictures for prompts, by the scan that reinforcement learning samples with; compiled once.

    A small sampler of its own: the miniature is trained below the rooms that know devices and rollouts, on one device.
    """

    def __init__(self, pipe: Pipeline, *, guidance: float, steps: int = STEPS, eta: float = 1.0):
        network, self._params, _ = functional(pipe.unet, lambda name: True)
        self._pipe = pipe
        policy = Policy(transition.make(pipe.scheduler_config, steps, eta), network, guidance)

        def denoise(params: Params, keys: jax.Array, context: jax.Array, uncond: jax.Array) -> jax.Array:
            return sampler.sample(policy, params, {}, keys, context, uncond, pipe.latent_shape).latents[:, -1]

        self._denoise = jax.jit(denoise)

    def __call__(self, prompts: Sequence[str], seed: int) -> UInt8[np.ndarray, "N H W 3"]:
        """One picture for each prompt; every chunk has the same size, so that one program serves all."""
        uncond = self._pipe.embed([""])[0]
        chunks = -(-len(prompts) // MANY)
        rng_keys = jax.random.split(jax.random.key(seed), (chunks, MANY))
        images = []
        for index in range(chunks):
            chunk = list(prompts[index * MANY : (index + 1) * MANY])
            context = self._pipe.embed(chunk + [""] * (MANY - len(chunk)))
            latents = self._denoise(self._params, rng_keys[index], context, uncond)
            images.append(np.asarray(self._pipe.decode(latents))[: len(chunk)])
        return np.concatenate(images)


def sheet(images: UInt8[np.ndarray, "N H W 3"], captions: Sequence[str], path: Path, title: str) -> None:
    """A captioned contact sheet as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture: Image.Image = grid.captioned(images, captions, title)
    picture.save(path)


def measure(
    folder: Path, seed: int, n: int, guidances: Sequence[float], log: Callable[[str], None] = print
) -> dict[str, Any]:
    """All numbers of the table, and a sheet of samples, ``samples.png``.

    Args:
      folder: the assets.
      seed: of the pictures; no training stream uses the same.
      n: pictures per number.
      guidances: guidance scales of the samples; the last one's are shown on the sheet.
      log: receives a line before each part.
    """
    rng = np.random.default_rng([seed, 0x51A1])
    judge = verifier.Verifier.from_folder(folder / "verifier")
    table: dict[str, Any] = {"pictures": n, "seed": seed, "steps": STEPS}

    log("quality: verifier on fresh renderings")
    table["verifier"] = verifier.evaluate(judge.model, rng, 4 * n)

    log("quality: reconstructions")
    pipe = pipeline.load(str(folder / "stable-diffusion-mini"))
    scenes = world.sample_scenes(rng, 2 * n)
    images, captions = world.render_all(scenes), world.captions(scenes)
    rebuilt = reconstruct(pipe, images)
    table["reconstruction"] = {
        "mean absolute error, levels of 255": float(np.abs(images.astype(float) - rebuilt).mean()),
        **{f"{part}: same answer": share for part, share in kept(judge, images, rebuilt, scenes).items()},
        **{f"score, {part}": value for part, value in by_part(judge, rebuilt, captions).items()},
    }

    log("quality: CLIP and aesthetic head")
    table["clip"], table["aesthetic"] = clip_and_head(folder, rng, 2 * n)

    for guidance, split in itertools.product(guidances, grammar.SPLITS):
        if split == grammar.SPLITS[0]:
            draw = Sampler(pipe, guidance=guidance)
        log(f"quality: samples with guidance {guidance:g} for {split} prompts")
        prompts = {category: pick(grammar.prompts(category, split), n // 4, rng) for category in grammar.CATEGORIES}
        prompts["single"] = pick(single_objects(split), n // 4, rng)
        everything = [prompt for group in prompts.values() for prompt in group]
        _, parts = judge(draw(everything, seed), everything)
        group = np.repeat(list(prompts), [len(group) for group in prompts.values()])
        table[f"samples, guidance {guidance:g}, {split} prompts"] = {
            "single object: color": float(parts["color"][group == "single"].mean()),
            "single object: shape": float(parts["shape"][group == "single"].mean()),
            **{name: float(parts[name][group == name].mean()) for name in grammar.CATEGORIES},
        }
    pictured = pictured_prompts()
    sheet(draw(pictured, seed), pictured, folder / "samples.png", f"The miniature, guidance {guidances[-1]:g}")
    return table


def pictured_prompts() -> list[str]:
    """24 of the training prompts, eight of each kind."""
    return grammar.training_prompts()[::2]


def single_objects(split: str) -> list[str]:
    """Every prompt of one plain object of a split."""
    things = [grammar.Thing(*pair) for pair in itertools.product(grammar.COLORS, grammar.SHAPES)]
    specs = [grammar.Spec((thing,)) for thing in things]
    return [grammar.describe(spec) for spec in specs if grammar.is_novel(spec) == (split == "novel")]


def pick(prompts: Sequence[str], n: int, rng: np.random.Generator) -> list[str]:
    """N of the prompts, with repetition only where there are fewer."""
    rows = np.concatenate([rng.permutation(len(prompts)) for _ in range(-(-n // len(prompts)))])[:n]
    return [prompts[i] for i in rows]


def reconstruct(pipe: Pipeline, images: UInt8[np.ndarray, "N H W 3"]) -> UInt8[np.ndarray, "N H W 3"]:
    """Through the autoencoder and back."""
    graphdef, state = nnx.split(pipe.vae)
    encode = jax.jit(lambda state, x: nnx.merge(graphdef, state).encode(x.astype(jnp.float32) / 127.5 - 1)[0])
    chunks = [
        np.asarray(pipe.decode(encode(state, images[i : i + MANY]) * pipe.vae_scaling_factor))
        for i in range(0, len(images), MANY)
    ]
    return np.concatenate(chunks)


def by_part(judge: verifier.Verifier, images: np.ndarray, prompts: Sequence[str]) -> dict[str, float]:
    """Mean score in total and per part, over the prompts that say something of it."""
    total, parts = judge(images, prompts)
    means = {name: float(np.nanmean(values)) for name, values in parts.items() if not np.all(np.isnan(values))}
    return {"total": float(total.mean()), **means}


def kept(judge: verifier.Verifier, images: np.ndarray, rebuilt: np.ndarray, scenes: world.Scenes) -> dict[str, float]:
    """How often the verifier is right of the reconstruction where it was right of the picture, per part."""
    before = scoring.answers(judge.detections(images), scenes)
    after = scoring.answers(judge.detections(rebuilt), scenes)
    shares = {}
    for part, (right, applies) in before.items():
        asked = applies & right.astype(bool)
        shares[part] = float(after[part][0][asked].mean()) if asked.any() else float("nan")
    return shares


def clip_and_head(folder: Path, rng: np.random.Generator, n: int) -> tuple[dict[str, float], dict[str, float]]:
    """Retrieval of the caption of each of N renderings, and how the head agrees with the rating it learned."""
    config = CLIPConfig.from_dict(read_json(folder / "clip" / "config.json"))
    clip = keys.load(CLIP, config, weights.read_folder(folder / "clip"), where="clip")
    tokenizer = Tokenizer.from_folder(folder / "clip")
    shape = AestheticHeadConfig.from_file(folder / "aesthetic" / "config.json")
    tensors = weights.read_safetensors(folder / "aesthetic" / "head.safetensors")
    head = keys.load(AestheticHead, shape, tensors, where="aesthetic")

    scenes = world.sample_scenes(rng, n)
    captions = world.captions(scenes)
    neighbors = [grammar.describe(neighbor(grammar.parse(caption), rng)) for caption in captions]
    texts, others = (_embed(clip, "text_features", tokenizer(list(prompts))) for prompts in (captions, neighbors))
    images = _embed(clip, "image_features", np.asarray(clip_pixels(world.render_all(scenes))))
    similarity = images @ texts.T
    # Of 32 captions: the picture's own and 31 drawn at random.
    rivals = np.stack([similarity[i, rng.integers(n, size=31)] for i in range(n)])
    own = np.diag(similarity)
    rated, said = rating.rate(scenes), np.asarray(score(head, images))
    return (
        {
            "own caption first of 32": float((own[:, None] >= rivals).all(1).mean()),
            "own caption before its neighbor": float((own > (images * others).sum(1)).mean()),
            "cosine of own caption": float(own.mean()),
            "cosine of another caption": float(similarity[~np.eye(n, dtype=bool)].mean()),
        },
        {
            "correlation with the rating": float(np.corrcoef(rated, said)[0, 1]),
            "mean absolute error": float(np.abs(rated - said).mean()),
            "standard deviation of the rating": float(rated.std()),
        },
    )


def _embed(clip: CLIP, method: str, inputs: np.ndarray) -> np.ndarray:
    graphdef, state = nnx.split(clip)
    embed = jax.jit(lambda state, x: normalize(getattr(nnx.merge(graphdef, state), method)(x)))
    return np.concatenate([np.asarray(embed(state, inputs[i : i + MANY])) for i in range(0, len(inputs), MANY)])


# Rows that the table's goals speak of: (section prefix, row, goal).
GOALS = (
    ("verifier", "single/color", ">= 0.97"),
    ("verifier", "single/shape", ">= 0.97"),
    ("reconstruction", "color: same answer", ">= 0.95"),
    ("reconstruction", "shape: same answer", ">= 0.95"),
    ("samples", "single object: color", ">= 0.9"),
    ("samples", "single object: shape", "0.6 to 0.95"),
)


def markdown(table: dict[str, Any]) -> str:
    """The table as text."""
    lines = [
        "# Quality of the miniature",
        "",
        "Written by `ddpo_jax pretrain`; `ddpo_jax/mini/quality.py` says how each number is taken.",
        f"Samples: {table['steps']} DDIM steps, eta 1, judged by the verifier (0 to 1), {table['pictures'] // 4} per "
        f"row. Other sections: {2 * table['pictures']} fresh renderings, the verifier's {4 * table['pictures']}.",
    ]
    if "note" in table:
        lines += ["", table["note"]]
    for section, rows in table.items():
        if not isinstance(rows, dict):
            continue
        lines += ["", f"## {section}", "", "| | value | goal |", "|---|---|---|"]
        for row, value in rows.items():
            goal = next((g for prefix, name, g in GOALS if section.startswith(prefix) and name == row), "")
            lines.append(f"| {row} | {value:.3f} | {goal} |")
    return "\n".join(lines) + "\n"


def write(table: dict[str, Any], folder: Path) -> None:
    """``quality.json`` and ``QUALITY.md`` beside the assets."""
    write_json(folder / "quality.json", table)
    (folder / "QUALITY.md").write_text(markdown(table), encoding="utf-8")
