"""A Stable Diffusion pipeline as one object: read from and written to an ordinary diffusers folder.

The folder is the interface: `model_index.json`, `unet/`, `vae/`, `text_encoder/`, `tokenizer/`, `scheduler/`. The
embedded miniature is such a folder too.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, UInt8

from ddpo_jax import sharding
from ddpo_jax.config.model import PINNED, hub_fault, local_folder, read_json
from ddpo_jax.errors import InputError
from ddpo_jax.models import keys, schema, weights
from ddpo_jax.models.clip import CLIPText, CLIPTextConfig
from ddpo_jax.models.tokenizer import Tokenizer
from ddpo_jax.models.unet import UNet2DCondition, UNetConfig
from ddpo_jax.models.vae import AutoencoderKL, VAEConfig

_MODULES = ("unet", "vae", "text_encoder")
_CLASSES: dict[str, tuple[str, ...]] = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
_LIBRARIES = {
    "unet": "diffusers",
    "vae": "diffusers",
    "scheduler": "diffusers",
    "text_encoder": "transformers",
    "tokenizer": "transformers",
}
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker")
_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
_SMALL_FILES = [
    "model_index.json",
    *(f"{name}/config.json" for name in _MODULES),
    *(f"{name}/*.index*.json" for name in _MODULES),
    *(f"tokenizer/{name}" for name in ("*.json", "merges.txt")),
    "scheduler/scheduler_config.json",
]
_CACHE_SIZE = 2048  # distinct prompts; 236 kB each for Stable Diffusion 1.x
_EMBED_BATCH = 32
DECODE_PIXELS = 4 * 512 * 512  # decoded at once on each device


def decode_slice(latent_shape: Sequence[int], factor: int) -> int:
    """Images a device decodes at once, of latents [h, w, ...] whose sides the VAE makes ``factor`` times larger."""
    return max(1, DECODE_PIXELS // (latent_shape[0] * latent_shape[1] * factor**2))


class Pipeline:
    """UNet, VAE, text encoder and tokenizer with their configs.

    Attributes:
      unet, vae, text_encoder: NNX modules. `decode` and `embed` take the VAE and the text encoder as they are at their
        first use.
      tokenizer: see `models.tokenizer`.
      configs: the contents of the folder's JSON files by part: unet, vae, text_encoder, scheduler.
      revision: the hub commit the files came from, or None.
    """

    def __init__(
        self,
        *,
        unet: UNet2DCondition,
        vae: AutoencoderKL,
        text_encoder: CLIPText,
        tokenizer: Tokenizer,
        configs: Mapping[str, Mapping[str, Any]],
        revision: str | None = None,
        cache_size: int = _CACHE_SIZE,
    ):
        """Checks that the parts belong together.

        Raises:
          InputError: they do not; the message names the two numbers that differ.
        """
        self.unet, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        self.configs = {name: dict(config) for name, config in configs.items()}
        self.revision = revision
        text = text_encoder.config
        _equal(
            "unet cross_attention_dim", unet.config.cross_attention_dim, "text_encoder hidden_size", text.hidden_size
        )
        _equal("unet in_channels", unet.config.in_channels, "vae latent_channels", vae.config.latent_channels)
        _equal("unet out_channels", unet.config.out_channels, "unet in_channels", unet.config.in_channels)
        if tokenizer.max_length > text.max_position_embeddings or tokenizer.vocab_size > text.vocab_size:
            raise InputError(
                f"the tokenizer gives {tokenizer.max_length} of {tokenizer.vocab_size} token ids, but the text encoder "
                f"takes at most {text.max_position_embeddings} of {text.vocab_size}; use the tokenizer of this model"
            )
        self._cache: OrderedDict[str, np.ndarray] = OrderedDict()
        self._cache_size = cache_size
        self._encode: Callable[[np.ndarray], Array] | None = None
        self._decoders: dict[Any, tuple[Callable[..., Array], Any]] = {}

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """The content of `scheduler/scheduler_config.json`."""
        return self.configs["scheduler"]

    @property
    def vae_scaling_factor(self) -> float:
        """Latents of the UNet = latents of the VAE * this."""
        return self.vae.config.scaling_factor

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of one sample."""
        size = self.unet.config.sample_size
        if size is None:
            raise InputError("unet/config.json has no sample_size, so the size of an image is unknown; add it")
        h, w = (size, size) if isinstance(size, int) else size
        return h, w, self.unet.config.in_channels

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of one image in pixels."""
        h, w, _ = self.latent_shape
        return h * self.vae.config.factor, w * self.vae.config.factor

    def embed(self, prompts: Sequence[str]) -> Float[np.ndarray, "N L D"]:
        """Text embeddings on the host; each distinct prompt is encoded once while it stays among the recent ones."""
        distinct = dict.fromkeys(prompts)
        found = {prompt: self._cache[prompt] for prompt in distinct if prompt in self._cache}
        for prompt in found:
            self._cache.move_to_end(prompt)
        absent = [prompt for prompt in distinct if prompt not in found]
        for start in range(0, len(absent), _EMBED_BATCH):
            chunk = absent[start : start + _EMBED_BATCH]
            found.update(zip(chunk, self._embed_chunk(chunk), strict=True))
        for prompt in absent:
            self._cache[prompt] = found[prompt]
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        if not prompts:
            return np.zeros((0, self.tokenizer.max_length, self.text_encoder.config.hidden_size), np.float32)
        return np.stack([found[prompt] for prompt in prompts])

    def _embed_chunk(self, prompts: list[str]) -> list[np.ndarray]:
        if self._encode is None:
            graphdef, state = nnx.split(self.text_encoder)
            compiled = jax.jit(lambda s, ids: nnx.merge(graphdef, s)(ids).last_hidden_state.astype(jnp.float32))
            self._encode = lambda ids: compiled(state, ids)
        size = _EMBED_BATCH  # one shape: one compilation, and the same bits whatever is encoded beside a prompt
        ids = self.tokenizer([*prompts, *[""] * (size - len(prompts))])
        # Copies: a view would keep its whole chunk alive for as long as one prompt is cached.
        return [row.copy() for row in np.asarray(self._encode(ids))[: len(prompts)]]

    def decode(self, latents: Float[Array, "N h w c"]) -> UInt8[Array, "N H W 3"]:
        """Images of the UNet's latents: round(255 * clip(x / 2 + 0.5, 0, 1)).

        Latents that are sharded over a mesh along N are decoded where they are; in any case no device decodes more
        images at once than fit. Works for host arrays too.
        """
        mesh, axes = None, None
        if isinstance(latents, jax.Array) and isinstance(latents.sharding, NamedSharding):
            mesh = latents.sharding.mesh
            axes = next(iter(latents.sharding.spec), None)
        if (mesh, axes) not in self._decoders:
            self._decoders[mesh, axes] = self._make_decoder(mesh, axes)
        decoder, state = self._decoders[mesh, axes]
        return decoder(state, latents)

    def _make_decoder(self, mesh: Any, axes: Any) -> tuple[Callable[..., Array], Any]:
        graphdef, state = nnx.split(self.vae)
        factor, scaling = self.vae.config.factor, self.vae_scaling_factor

        def decode(state: Any, latents: Array) -> Array:
            slice_size = decode_slice(latents.shape[1:], factor)
            images = nnx.merge(graphdef, state).decode(latents.astype(jnp.float32) / scaling, slice_size=slice_size)
            return jnp.round(255 * jnp.clip(images / 2 + 0.5, 0, 1)).astype(jnp.uint8)

        if mesh is None:
            return jax.jit(decode), state
        sharded = jax.shard_map(decode, mesh=mesh, in_specs=(P(), P(axes)), out_specs=P(axes), check_vma=False)
        return jax.jit(sharded), sharding.replicate(state, mesh)


def load(
    source: str,
    *,
    dtype: Any = jnp.float32,
    revision: str | None = None,
    cache_size: int = _CACHE_SIZE,
    frozen_on_host: bool = False,
) -> Pipeline:
    """Reads a pipeline.

    Args:
      source: "mini" (the embedded miniature), a local diffusers folder, or a hub id.
      dtype: compute type of all networks; parameters are float32.
      revision: commit, tag or branch of a hub id.
      cache_size: number of prompts whose embeddings are kept.
      frozen_on_host: keep the text encoder and the VAE in host memory, copied to the device while they run.

    Raises:
      InputError: no such folder, no access to the hub, unsupported or inconsistent parts, tensors that do not fit.
    """
    folder, commit = _find(source, revision)
    # Every config and the header of every file of weights is read before the first tensor: mistakes show at once.
    index, files = folder / "model_index.json", {name: folder / name / "config.json" for name in _MODULES}
    _check_index(read_json(index), index)
    files["scheduler"] = folder / "scheduler" / "scheduler_config.json"
    configs = {name: read_json(file) for name, file in files.items()}
    unet_config = UNetConfig.from_dict(configs["unet"], str(files["unet"]))
    vae_config = VAEConfig.from_dict(configs["vae"], str(files["vae"]))
    text_config = _text_config(configs["text_encoder"], str(files["text_encoder"]))
    schema.check(str(files["scheduler"]), configs["scheduler"], schema.SCHEDULER)
    tokenizer = Tokenizer.from_folder(folder / "tokenizer")

    tensors = {name: weights.read_folder(folder / name) for name in _MODULES}

    def module(cls: Any, name: str, config: Any, on_host: bool) -> Any:
        return keys.load(cls, config, tensors.pop(name), dtype=dtype, where=str(folder / name), on_host=on_host)

    return Pipeline(
        unet=module(UNet2DCondition, "unet", unet_config, False),
        vae=module(AutoencoderKL, "vae", vae_config, frozen_on_host),
        text_encoder=module(CLIPText, "text_encoder", text_config, frozen_on_host),
        tokenizer=tokenizer,
        configs=configs,
        revision=commit,
        cache_size=cache_size,
    )


def save(pipeline: Pipeline, folder: str | os.PathLike[str]) -> None:
    """Writes a diffusers folder that PyTorch diffusers and `load` read; existing files of the same names are replaced.

    Raises:
      InputError: a module holds parameters that its config does not describe (an adapter that was not merged).
    """
    folder = Path(folder)
    modules: dict[str, Any] = {"unet": pipeline.unet, "vae": pipeline.vae, "text_encoder": pipeline.text_encoder}
    tensors = {name: keys.to_upstream(module) for name, module in modules.items()}
    for name, module in modules.items():
        wanted = keys.upstream_shapes(keys.abstract(type(module), module.config))
        if wanted != {key: value.shape for key, value in tensors[name].items()}:
            extra = sorted(set(tensors[name]) - set(wanted))[:3]
            raise InputError(f"{name}: parameters {extra} ... are not of the model; merge the adapter before saving")
    for name in modules:
        weights.write_safetensors(folder / name / f"{_STEMS[name]}.safetensors", tensors[name])
        config = dict(pipeline.configs[name])
        if _LIBRARIES[name] == "diffusers":
            config = {"_class_name": _CLASSES[name][0], **config}
        else:
            config = {"architectures": [_CLASSES[name][0]], "model_type": "clip_text_model", **config}
        _write_json(folder / name / "config.json", config)
    scheduler = pipeline.scheduler_config
    if "_class_name" not in scheduler:
        raise InputError("scheduler config: _class_name is missing; diffusers needs it, for example 'DDIMScheduler'")
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    pipeline.tokenizer.save(folder / "tokenizer")
    classes = {name: names[0] for name, names in _CLASSES.items()} | {"scheduler": scheduler["_class_name"]}
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.40.0"}
    index |= {name: [_LIBRARIES[name], classes[name]] for name in sorted(classes)}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    _write_json(folder / "model_index.json", index)


# --- finding a folder -------------------------------------------------------------------------------------------------


def _find(source: str, revision: str | None) -> tuple[Path, str | None]:
    folder = local_folder(source)
    if folder is not None:
        return folder, None
    return _download(source, revision)


def _download(repo: str, revision: str | None) -> tuple[Path, str]:
    """The files of a hub repository that a pipeline needs, resumed and cached by huggingface_hub."""
    import huggingface_hub

    if revision is None and repo in PINNED:
        revision = PINNED[repo]

    def snapshot(patterns: list[str]) -> Path:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))

    try:
        folder = snapshot(_SMALL_FILES)
        for name in _MODULES:
            _download_weights(folder / name, _STEMS[name], snapshot)
    except InputError as error:
        raise InputError(f"model: received {repo!r}; {error}") from error
    except Exception as error:  # the client and what it stands on raise many unrelated types
        cause = hub_fault(repo, error)
        raise InputError(
            f"model: received {repo!r}; it is no local folder, and {cause}; or give a local diffusers folder"
        ) from error
    weights.verify_snapshot(folder, repo)
    logging.info("model %s at commit %s", repo, folder.name)
    return folder, folder.name


def _download_weights(folder: Path, stem: str, snapshot: Callable[[list[str]], Any]) -> None:
    """Asks for one set of weights after the other, best first, until one is there: a repository may hold them all."""
    for index in sorted(folder.glob(f"{stem}*.index*.json")):
        if "fp16" not in index.name and "non_ema" not in index.name:
            snapshot([f"{folder.name}/{shard}" for shard in weights.shard_names(index)])
            return
    legacy = "pytorch_model" if stem == "model" else stem
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors", f"{legacy}.bin", f"{legacy}.fp16.bin"):
        snapshot([f"{folder.name}/{name}"])
        if (folder / name).is_file():
            return
    raise InputError(f"its {folder.name}/ holds no {stem}.safetensors; use a model that has one")


def _check_index(index: Mapping[str, Any], path: Path) -> None:
    absent = [name for name in schema.MODEL_INDEX if name not in index]
    if absent:
        raise InputError(f"{path}: it lacks {', '.join(absent)}; give a whole diffusers folder")
    schema.check(str(path), index, schema.MODEL_INDEX, "give a Stable Diffusion 1.x or 2.x folder")
    for name, entry in index.items():
        if name in _CLASSES and entry[1] not in _CLASSES[name]:
            rule = f"the class must be {' or '.join(_CLASSES[name])}"
        elif name not in (*_CLASSES, "scheduler", *_UNUSED) and not name.startswith("_"):
            rule = f"it may hold {', '.join(_CLASSES)} and scheduler"
        else:
            continue
        raise InputError(
            f"{path} {name}: received {schema.shown(entry)}; {rule}; use a Stable Diffusion 1.x or 2.x model"
        )


def _text_config(raw: Mapping[str, Any], where: str) -> CLIPTextConfig:
    schema.check(where, raw, schema.CLIP_TEXT)
    try:
        return CLIPTextConfig.from_dict(raw)
    except InputError as error:  # which does not say where it is from
        schema.refuse(where, str(error).splitlines())
        raise


def _equal(name: str, value: int, other: str, wanted: int) -> None:
    if value != wanted:
        raise InputError(f"{name} = {value} must equal {other} = {wanted}; the parts belong to different models")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
