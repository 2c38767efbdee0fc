"""What the CLIP rewards share: finding and reading a CLIP, its image processor, and the cosine."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8
from ml_collections import ConfigDict

import ddpo_jax
from ddpo_jax.errors import InputError, one_line
from ddpo_jax.models import clip, keys, preprocess, schema, weights
from ddpo_jax.models.clip import names
from ddpo_jax.models.tokenizer import Tokenizer
from ddpo_jax.rewards._shared.batches import in_batches

ASSETS = Path(ddpo_jax.__file__).parent / "mini" / "assets"
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SMALL_FILES = ["*.json", "merges.txt"]
_FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class Published(NamedTuple):
    """A CLIP in the catalogue of published weights, and what it looks like."""

    entry: str  # its name in models/weights/catalogue.toml
    config: clip.CLIPConfig

    @property
    def file(self) -> str:
        """Name of the file of weights."""
        return weights.entry(self.entry).file

    @property
    def repo(self) -> str:
        """Its repository on the model hub."""
        return weights.entry(self.entry).repo


B32, L14 = Published("clip_b32", clip.B32), Published("clip_l14", clip.L14)


# --- options ----------------------------------------------------------------------------------------------------------


def check(key: str, value: str, allowed: Collection[str]) -> None:
    """Refuses a value that is not allowed.

    Raises:
      InputError: naming the key, the value and what it may be.
    """
    if value not in allowed:
        *most, last = allowed
        auto = "; auto follows the model" if key == "reward.weights" else ""
        raise InputError(f"{key}={value!r}: must be {', '.join(most)} or {last}{auto}")


def compute_type(config: ConfigDict) -> Any:
    """The dtype that the option ``dtype`` names: that of a network's products; its parameters stay float32.

    Raises:
      InputError: there is no such choice.
    """
    check("reward.dtype", config.dtype, _DTYPES)
    return _DTYPES[config.dtype]


# --- finding ----------------------------------------------------------------------------------------------------------


def embedded(name: str, key: str, value: str) -> Path:
    """The folder ``name`` of the embedded assets.

    Args:
      name: of the folder.
      key: the config key that asked for it, for the message.
      value: what that key holds.
    Raises:
      InputError: it is not there.
    """
    folder = ASSETS / name
    if not folder.is_dir():
        raise InputError(
            f"{key}={value!r}: the miniature's {name!r} weights are not in this installation ({folder}); "
            "make them with ddpo_jax pretrain, or install a released version"
        )
    return folder


def find(config: ConfigDict, published: Published) -> Path:
    """Where the CLIP of a reward is: a model folder, with a config.json, or one file of weights.

    Args:
      config: ``clip`` names a folder, a file or a hub id; empty, ``weights`` decides: "mini" is the miniature's, and
        else the published file is looked for in ``weights_dir`` and so on, or downloaded, and verified.
      published: the CLIP of all ``weights`` but "mini".

    Raises:
      InputError: nothing is there, or the hub does not give it; says which file of which repository to get.
    """
    given, wanted = config.clip, f"{published.file} of the hub repository {published.repo}"
    if not given and config.weights == "mini":
        return embedded("clip", "reward.weights", "mini")
    if not given:
        return weights.find_weights(published.entry, config.weights_dir)
    path = Path(given).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        if not _HUB_ID.fullmatch(given) or given.startswith("."):
            raise InputError(f"reward.clip={given!r}: no such folder or file; give {wanted}, its folder, or a hub id")
        path = _download(given)
    if (path / "config.json").is_file():
        return path
    if (path / published.file).is_file():
        return path / published.file
    raise InputError(
        f"reward.clip={given!r}: no config.json there and no {published.file}; "
        f"give {wanted}, or a folder that CLIPModel.save_pretrained wrote"
    )


def _download(repo: str) -> Path:
    """The folder of a hub id in the hub's cache: at the catalogue's commit and verified if it is in there."""
    import huggingface_hub

    revision = next((entry.revision for entry in weights.entries().values() if entry.repo == repo), "") or None
    try:
        folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=_SMALL_FILES))
        for file in _FOLDER_WEIGHTS:
            huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=[file])
            if (folder / file).is_file():
                break
    except Exception as error:  # no network, no such repository, no access: the hub's client has many errors
        raise InputError(
            f"reward.clip={repo!r}: no such folder or file, and the hub does not give it ({one_line(error)[:300]}); "
            "download the repository where there is a network and give its folder"
        ) from error
    weights.verify_snapshot(folder, repo)
    return folder


# --- reading ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def blamed(key: str, path: Path) -> Iterator[None]:
    """Around the reading of files that the user named: what is wrong with them is the fault of ``key``, in one line."""
    try:
        yield
    except ValueError as error:  # of our readers: wrong names or shapes, damaged files, broken JSON
        raise InputError(f"{key}={str(path)!r}: {' '.join(str(error).split())}") from error


@dataclasses.dataclass(frozen=True)
class Processor:
    """uint8 images of any size to the input of a vision tower: ``crop`` on the host, the rest on the device."""

    size: int
    mean: tuple[float, ...] = preprocess.CLIP_MEAN
    std: tuple[float, ...] = preprocess.CLIP_STD

    @classmethod
    def from_folder(cls, folder: Path, image_size: int) -> Processor:
        """Reads preprocessor_config.json; where there is none, CLIP's own constants hold.

        Raises:
          InputError: it asks for anything but shortest side, bicubic, centre crop to ``image_size``, normalise.
        """
        file = folder / "preprocessor_config.json"
        if not file.exists():
            return cls(image_size)
        values = schema.read(file, schema.CLIP_IMAGES)
        wanted = {
            "size": (image_size, {"shortest_edge": image_size}, {"height": image_size, "width": image_size}),
            "crop_size": (image_size, {"height": image_size, "width": image_size}),
            "resample": (3,),
            **{f"do_{step}": (True,) for step in ("resize", "center_crop", "rescale", "normalize")},
        }
        for key, allowed in wanted.items():
            if key in values and values[key] not in allowed:
                raise InputError(f"{file}: {key} = {values[key]!r} is not supported; it must be {allowed[0]!r}")
        mean, std = (
            tuple(values.get(key, default)) for key, default in (("image_mean", cls.mean), ("image_std", cls.std))
        )
        return cls(image_size, mean, std)

    def crop(self, images: UInt8[np.ndarray, "N H W 3"]) -> UInt8[np.ndarray, "N size size 3"]:
        """Shortest side to ``size`` by Pillow, centre crop."""
        return preprocess.clip_crop(images, self.size)

    def __call__(self, images: UInt8[Array, "N size size 3"]) -> Float[Array, "N size size 3"]:
        """Levels to floats of about unit variance."""
        return preprocess.normalize(images.astype(jnp.float32) / 255.0, self.mean, self.std)


def read_config(path: Path, published: Published, exact: bool = False) -> clip.CLIPConfig:
    """The folder's config.json; a file of weights is the published network, and with ``exact`` so must a folder be."""
    if path.is_file():
        return published.config
    config = clip.CLIPConfig.from_dict(schema.read(path / "config.json", schema.CLIP))
    found, wanted = _architecture(config), _architecture(published.config)
    if exact and found != wanted:
        faults = [
            f"{name} = {found[name]!r} instead of {wanted[name]!r}" for name in wanted if found[name] != wanted[name]
        ]
        raise InputError(f"another network than that of {published.repo}: {', '.join(faults)}; give that one's weights")
    return config


def _architecture(config: clip.CLIPConfig) -> dict[str, Any]:
    """What decides the shapes and the arithmetic, as ``vision.hidden_size`` and so on."""
    values = dataclasses.asdict(config)
    unread = ("eos_token_id", "projection_dim")  # old files name another end token; a tower's own projection is unused
    towers = {f"{t}.{key}": x for t in ("text", "vision") for key, x in values[t].items() if key not in unread}
    return {"projection_dim": config.projection_dim, **towers}


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a model folder or a file of weights, by transformers' names."""
    return names.to_transformers(weights.read_folder(path) if path.is_dir() else weights.read_file(path))


def load_vision(config: ConfigDict, published: Published) -> tuple[clip.CLIPVisionProjected, Processor]:
    """The vision tower with its projection, and the image processor; the text tower is not read.

    Args:
      config: see ``find`` and ``compute_type``.
      published: what a file of weights is.

    Raises:
      InputError: files that are missing, damaged, or those of another network.
    """
    dtype, path = compute_type(config), find(config, published)
    with blamed("reward.clip", path):
        shape = read_config(path, published)
        vision = dataclasses.replace(shape.vision, projection_dim=shape.projection_dim)
        tensors = keys.select(read_tensors(path), "vision_model", "visual_projection")
        model = keys.load(clip.CLIPVisionProjected, vision, tensors, dtype=dtype)
        return model, Processor.from_folder(path, vision.image_size)


def load_clip(
    config: ConfigDict, published: Published, *, exact: bool = False
) -> tuple[clip.CLIP, Tokenizer, Processor]:
    """Both towers, the tokenizer and the image processor of a reward's options.

    Args:
      config: see ``find`` and ``compute_type``.
      published: what a file of weights is, and with ``exact`` a folder too.
      exact: refuse the folder of another network.

    Raises:
      InputError: files that are missing, damaged, or those of another network, or no tokenizer that fits it.
    """
    dtype, path = compute_type(config), find(config, published)
    with blamed("reward.clip", path):
        shape = read_config(path, published, exact)
        tensors, tokenizer = read_tensors(path), tokenizer_of(path, shape.text, config.weights_dir)
        model = keys.load(clip.CLIP, shape, tensors, dtype=dtype)
        return model, tokenizer, Processor.from_folder(path, shape.vision.image_size)


def tokenizer_of(path: Path, config: clip.CLIPTextConfig, weights_dir: str) -> Tokenizer:
    """The folder's, or the one beside a file of weights, or else OpenAI's, which all published CLIPs share."""
    folder = path if path.is_dir() else path.parent
    if path.is_file() and not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        folder = weights.find_weights("clip_tokenizer", weights_dir).parent
    tokenizer = Tokenizer.from_folder(folder)
    ends = (tokenizer.eos_token_id, clip.LEGACY_EOS_TOKEN_ID)
    if tokenizer.vocab_size > config.vocab_size or config.eos_token_id not in ends:
        raise InputError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens and ends a text with {ends[0]}, the network "
            f"knows {config.vocab_size} and looks for {config.eos_token_id}; give the model's own tokenizer"
        )
    return tokenizer


# --- running ----------------------------------------------------------------------------------------------------------


def unit(features: Float[Array, "N P"]) -> Float32[Array, "N P"]:
    """Rows of length 1, in float32 whatever the network computes in."""
    return clip.normalize(features.astype(jnp.float32))


def cosine(
    model: clip.CLIP,
    tokenizer: Tokenizer,
    config: ConfigDict,
    pixels: Callable[[Array], Array],
    prepare: Callable[[np.ndarray], np.ndarray] = lambda images: images,
) -> Callable[[np.ndarray, list[str]], np.ndarray]:
    """The cosine of each image's and its own prompt's embedding: (u8[N,H,W,3], N prompts) to f32[N].

    Args:
      model: both towers.
      tokenizer: prompts that are longer than its rows are cut.
      config: ``batch_size`` images, and prompts, per call of the network, on ``device``.
      pixels: images to the vision tower's input, on the device.
      prepare: what happens to the images before that, on the host.
    """
    embed_images = in_batches(model, lambda m, x: unit(m.image_features(pixels(x))), config, prepare)
    embed_texts = in_batches(model, lambda m, ids: unit(m.text_features(ids)), config)

    def run(images: np.ndarray, prompts: list[str]) -> np.ndarray:
        distinct = sorted(set(prompts))  # samples of a prompt share its embedding
        rows = np.searchsorted(distinct, prompts)
        return np.sum(embed_images(images) * embed_texts(tokenizer(distinct))[rows], axis=-1)

    return run
