"""What each network of the miniature is, and what it learns from: the stages of ``mini.pretrain`` in their order."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from ddpo_jax.diffusion import ddim
from ddpo_jax.mini import grammar, rating, verifier, world
from ddpo_jax.mini.bpe import train_bpe
from ddpo_jax.mini.sizes import Length, Sizes
from ddpo_jax.mini.training import Stage, stream, trained, write_atomically
from ddpo_jax.models import preprocess
from ddpo_jax.models.aesthetic_head import AestheticHead, AestheticHeadConfig, score
from ddpo_jax.models.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig, normalize
from ddpo_jax.models.tokenizer import Tokenizer
from ddpo_jax.models.unet import UNet2DCondition, UNetConfig
from ddpo_jax.models.vae import AutoencoderKL, VAEConfig
from ddpo_jax.types import AnyArray

PLAIN_ENGLISH = "a photo of a picture of an image the"
EMPTY_CAPTION = 0.1  # share of training captions replaced by "", for classifier-free guidance
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
    "trained_betas": None,
}


@dataclasses.dataclass(frozen=True)
class Context:
    """Where the work lies, and the choices all stages share."""

    workdir: Path
    seed: int
    sizes: Sizes

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The trained tokenizer, trained now if it is not there (seconds)."""
        folder = self.workdir / "tokenizer"
        if not (folder / "tokenizer_config.json").exists():
            train_bpe(vocabulary_texts(self.seed), self.sizes.vocab_size, folder, self.sizes.max_length)
        return Tokenizer.from_folder(folder)


def _stage(name: str, length: Length, **rest) -> Stage:
    return Stage(name, steps=length.steps, batch_size=length.batch_size, learning_rate=length.learning_rate, **rest)


# ------------------------------------------------------------------------------------------------------------ tokenizer


def vocabulary_texts(seed: int) -> list[str]:
    """What the tokenizer learns its words from: captions, plain English around a noun, and the papers' animals."""
    captions = world.captions(world.sample_scenes(stream(seed, "tokenizer", 0), 4096))
    folder = Path(__file__).parent.parent / "prompts"
    animals = [line for file in sorted(folder.glob("animals*.txt")) for line in file.read_text().split("\n")]
    return captions + 20 * ([PLAIN_ENGLISH] + [animal for animal in animals if animal.strip()])


# ------------------------------------------------------------------------------------------------------------- verifier


def verifier_stage(context: Context) -> Stage:
    """The detector of ``mini.verifier``, on its own data and loss."""
    config = verifier.VerifierConfig(context.sizes.verifier_widths)
    return _stage(
        "verifier",
        context.sizes.verifier,
        init=lambda rngs: verifier.Detector(config, rngs=rngs),
        make_batch=verifier.make_batch,
        loss=verifier.loss,
        weight_decay=verifier.WEIGHT_DECAY,
        ema_decay=0.995,
    )


# ----------------------------------------------------------------------------------------------------------------- CLIP


def clip_config(context: Context) -> CLIPConfig:
    """Both towers in OpenAI's architecture."""
    sizes = context.sizes
    tower: dict[str, Any] = {
        "hidden_size": sizes.clip_width,
        "intermediate_size": 4 * sizes.clip_width,
        "projection_dim": sizes.projection,
        "num_hidden_layers": sizes.clip_layers,
        "num_attention_heads": sizes.clip_heads,
        "hidden_act": "quick_gelu",
    }
    text = CLIPTextConfig(
        vocab_size=context.tokenizer.vocab_size,
        max_position_embeddings=sizes.max_length,
        eos_token_id=context.tokenizer.eos_token_id,
        **tower,
    )
    vision = CLIPVisionConfig(image_size=world.IMAGE_SIZE, patch_size=4, **tower)
    return CLIPConfig(text=text, vision=vision, projection_dim=sizes.projection)


def clip_pixels(images: UInt8[AnyArray, "N H W 3"]) -> Float[Array, "N H W 3"]:
    """Pictures of the world as CLIP's input: no resizing, CLIP's mean and standard deviation."""
    return preprocess.normalize(jnp.asarray(images.astype(jnp.float32) / 255))


def neighbor(spec: grammar.Spec, rng: np.random.Generator) -> grammar.Spec:
    """A spec that differs from ``spec`` in one respect: what a contrast must not overlook."""
    choice = rng.integers(3)
    if spec.kind == "relation" and choice > 0:
        if choice == 1:
            return dataclasses.replace(spec, things=spec.things[::-1])
        return dataclasses.replace(spec, relation=_other(grammar.RELATIONS, spec.relation, rng))
    if spec.kind == "number" and choice > 0:
        number = _other(grammar.NUMBERS[1:], grammar.NUMBERS[spec.number - 1], rng)
        return dataclasses.replace(spec, number=grammar.NUMBERS.index(number) + 1)
    words = {"color": grammar.COLORS, "shape": grammar.SHAPES, "texture": grammar.TEXTURES}
    at = int(rng.integers(len(spec.things)))
    while True:
        field = list(words)[rng.integers(3)]
        thing = dataclasses.replace(
            spec.things[at], **{field: _other(words[field], getattr(spec.things[at], field), rng)}
        )
        things = tuple(thing if i == at else old for i, old in enumerate(spec.things))
        if len(set(things)) == len(things):  # the two things of a relation must stay different
            return dataclasses.replace(spec, things=things)


def _other(words: tuple[str, ...], word: str | None, rng: np.random.Generator) -> str:
    return [other for other in words if other != word][rng.integers(len(words) - 1)]


def clip_stage(context: Context) -> Stage:
    """Both towers by contrast (Radford et al. 2021, Fig. 3); half of a batch are neighbors of the other half."""
    config = clip_config(context)

    def make_batch(rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
        specs = [grammar.parse(caption) for caption in world.captions(world.sample_scenes(rng, n - n // 2))]
        specs += [neighbor(spec, rng) for spec in specs[: n // 2]]
        images = world.render_all(world.scenes_for(specs, rng))
        return {"images": images, "ids": context.tokenizer([grammar.describe(spec) for spec in specs])}

    def loss(clip: CLIP, batch: dict[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        # Light noise: CLIP scores decoded pictures, which are not perfectly clean.
        images = clip_pixels(batch["images"])
        logits = clip(batch["ids"], images + 0.05 * jax.random.normal(key, images.shape))
        same = jnp.all(batch["ids"][:, None] == batch["ids"][None], -1)  # equal captions are no negatives
        logits = jnp.where(same & ~jnp.eye(len(same), dtype=bool), -1e9, logits)
        rows, columns = (jnp.diag(jax.nn.log_softmax(logits, axis)) for axis in (1, 0))
        accuracy = jnp.mean(jnp.argmax(logits, 1) == jnp.arange(len(same)))
        return -jnp.mean(rows + columns) / 2, {"accuracy": accuracy, "scale": jnp.exp(clip.logit_scale[...])}

    return _stage(
        "clip",
        context.sizes.clip,
        init=lambda rngs: CLIP(config, rngs=rngs),
        make_batch=make_batch,
        loss=loss,
        weight_decay=0.02,
        ema_decay=0.995,
    )


# ------------------------------------------------------------------------------------------------------- aesthetic head


def aesthetic_stage(context: Context) -> Stage:
    """The head of the LAION predictor's layers on frozen CLIP embeddings of renderings; target: ``mini.rating``."""
    config = AestheticHeadConfig(embed_dim=context.sizes.projection, widths=context.sizes.head_widths)

    @functools.cache
    def bank() -> tuple[np.ndarray, np.ndarray]:
        clip = trained(clip_stage(context), context.workdir, context.seed)
        graphdef, state = nnx.split(clip)
        embed = jax.jit(lambda state, images: normalize(nnx.merge(graphdef, state).image_features(clip_pixels(images))))
        embeddings, ratings = [], []
        for index, size in enumerate(_chunks(context.sizes.head_bank)):
            scenes = world.sample_scenes(stream(context.seed, "aesthetic bank", index), size)
            embeddings.append(np.asarray(embed(state, world.render_all(scenes))))
            ratings.append(rating.rate(scenes))
        return np.concatenate(embeddings), np.concatenate(ratings)

    def make_batch(rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
        embeddings, ratings = bank()
        rows = rng.integers(len(ratings), size=n)
        return {"embeddings": embeddings[rows], "ratings": ratings[rows]}

    def loss(head: AestheticHead, batch: dict[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        del key
        error = jnp.mean((score(head, batch["embeddings"]) - batch["ratings"]) ** 2)
        return error, {"rmse": jnp.sqrt(error)}

    return _stage(
        "aesthetic",
        context.sizes.aesthetic,
        init=lambda rngs: AestheticHead(config, rngs=rngs),
        make_batch=make_batch,
        loss=loss,
        ema_decay=0.99,
        chunk=100,
        checkpoint_every=1000,
    )


def _chunks(total: int, largest: int = 256) -> list[int]:
    """``total`` as sizes of at most ``largest``."""
    return [min(largest, total - start) for start in range(0, total, largest)]


# ------------------------------------------------------------------------------------------------------------------ VAE


def vae_config(context: Context, scaling_factor: float = 1.0) -> VAEConfig:
    """Three resolutions: 32x32 pixels to 8x8 latents of 4 channels."""
    channels = context.sizes.vae_channels
    return VAEConfig(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=context.sizes.vae_groups,
        scaling_factor=scaling_factor,
    )


def reconstruction_loss(images: Float[Array, "N H W 3"], target: Float[Array, "N H W 3"]) -> Float[Array, ""]:
    """L1 of pixels, plus L1 of the differences to the neighbors one and two pixels away: edges and textures count."""
    error = images - target
    total = jnp.mean(jnp.abs(error))
    for axis, distance in itertools.product((1, 2), (1, 2)):
        ahead = jax.lax.slice_in_dim(error, distance, None, axis=axis)
        behind = jax.lax.slice_in_dim(error, 0, -distance, axis=axis)
        total = total + 0.25 * jnp.mean(jnp.abs(ahead - behind))
    return total


def vae_stage(context: Context) -> Stage:
    """The autoencoder; a small KL term keeps the latents smooth and near unit scale."""
    config = vae_config(context)

    def make_batch(rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
        return {"images": world.render_all(world.sample_scenes(rng, n))}

    def loss(vae: AutoencoderKL, batch: dict[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        target = batch["images"].astype(jnp.float32) / 127.5 - 1
        mean, logvar = vae.encode(target)
        latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        images = vae.decode(latents)
        reconstruction = reconstruction_loss(images, target)
        kl = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar)
        return reconstruction + 5e-4 * kl, {"l1": jnp.mean(jnp.abs(images - target)), "kl": kl}

    return _stage(
        "vae",
        context.sizes.vae,
        init=lambda rngs: AutoencoderKL(config, rngs=rngs),
        make_batch=make_batch,
        loss=loss,
        ema_decay=0.998,
    )


# ----------------------------------------------------------------------------------------------------------------- UNet


def unet_config(context: Context) -> UNetConfig:
    """Two resolutions, cross-attention at both."""
    sizes = context.sizes
    levels = len(sizes.unet_channels)
    return UNetConfig(
        sample_size=world.IMAGE_SIZE // 4,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        block_out_channels=sizes.unet_channels,
        layers_per_block=sizes.unet_layers,
        cross_attention_dim=sizes.clip_width,
        attention_head_dim=sizes.unet_heads,
        norm_num_groups=sizes.unet_groups,
    )


def encode_bank(context: Context) -> dict[str, np.ndarray]:
    """Latents f16[bank, 8, 8, 4] of unit variance with their token ids, and the scaling factor that makes it so.

    Made once and kept in the work directory.
    """
    path = context.workdir / "vae" / "bank.npz"
    if path.exists():
        with np.load(path) as arrays:
            return dict(arrays)
    vae = trained(vae_stage(context), context.workdir, context.seed)
    graphdef, state = nnx.split(vae)
    encode = jax.jit(lambda state, images: nnx.merge(graphdef, state).encode(images.astype(jnp.float32) / 127.5 - 1)[0])
    latents, ids = [], []
    for index, size in enumerate(_chunks(context.sizes.bank)):
        images, captions = world.batch(stream(context.seed, "bank", index), size)
        latents.append(np.asarray(encode(state, images)))
        ids.append(context.tokenizer(captions).astype(np.int16))
    values = np.concatenate(latents)
    factor = np.asarray(1 / values.std(), np.float32)
    scaled = (values * factor).astype(np.float16)
    bank: dict[str, np.ndarray] = {"latents": scaled, "ids": np.concatenate(ids), "scaling_factor": factor}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, bank)
    return bank


def unet_stage(context: Context) -> Stage:
    """The noise predictor on the latents of the bank, conditioned on the frozen text tower as in Stable Diffusion."""
    config = unet_config(context)
    process = ddim.make(SCHEDULER, 1, 1.0)

    @functools.cache
    def bank() -> dict[str, np.ndarray]:
        return encode_bank(context)

    @functools.cache
    def text_tower():
        return nnx.split(trained(clip_stage(context), context.workdir, context.seed).text_model)

    empty = context.tokenizer([""])

    def make_batch(rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
        rows = rng.integers(len(bank()["ids"]), size=n)
        ids = np.where(rng.random((n, 1)) < EMPTY_CAPTION, empty, bank()["ids"][rows].astype(np.int32))
        # Stratified: every batch covers the whole range of timesteps, which makes the loss less noisy.
        timesteps = ((np.arange(n) + rng.random(n)) * 1000 / n).astype(np.int32)
        return {"latents": bank()["latents"][rows].astype(np.float32), "ids": ids, "timesteps": timesteps}

    def loss(unet: UNet2DCondition, batch: dict[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        context_states = nnx.merge(*text_tower())(batch["ids"]).last_hidden_state
        noise = jax.random.normal(key, batch["latents"].shape)
        noised, target = process.add_noise(batch["latents"], noise, batch["timesteps"])
        output = unet(noised, batch["timesteps"], context_states)
        error = jnp.mean((output - target) ** 2, axis=(1, 2, 3))
        alpha = process.alphas_cumprod[batch["timesteps"]]
        weight = jnp.minimum(1.0, 5.0 * (1 - alpha) / alpha)  # min-SNR-5 (Hang et al. 2023, arXiv:2303.09556)
        return jnp.mean(weight * error), {"mse": jnp.mean(error)}

    return _stage(
        "unet",
        context.sizes.unet,
        init=lambda rngs: UNet2DCondition(config, rngs=rngs),
        make_batch=make_batch,
        loss=loss,
        ema_decay=0.999,
        warmup=200,
    )


STAGES = {
    "verifier": verifier_stage,
    "clip": clip_stage,
    "aesthetic": aesthetic_stage,
    "vae": vae_stage,
    "unet": unet_stage,
}
