"""What the BLIP rewards share: finding and reading their files, and what goes into the networks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from ddpo_jax.errors import InputError
from ddpo_jax.models import preprocess, weights
from ddpo_jax.models.blip import checkpoint
from ddpo_jax.models.blip.wordpiece import WordPiece

M = TypeVar("M", bound=nnx.Module)

MAX_TOKENS = 35  # of a caption or a question
VOCABULARY = "bert_vocabulary"  # in the catalogue of weights
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def load(cls: type[M], config: ConfigDict, names: Sequence[str], published: str) -> tuple[M, WordPiece, int]:
    """The network and the tokenizer that the options ``blip``, ``weights_dir`` and ``dtype`` describe.

    Args:
      cls: one of ``ddpo_jax.models.blip.networks``.
      config: ``blip`` is a folder, or a file whose folder holds the vocabulary as well; empty, the published files are
        looked for in ``weights_dir`` and so on, or downloaded, and verified.
      names: of the files looked for in a folder, the first one found is read.
      published: name of the file of weights in the catalogue.

    Returns:
      The network, its tokenizer, and the side in pixels of the images it reads.

    Raises:
      InputError: an option is wrong; a file is missing, damaged, or of another model.
    """
    if config.dtype not in DTYPES:
        raise InputError(f"reward.dtype: received {config.dtype!r}; it must be float32 or bfloat16; use float32")
    if config.blip:
        where, file = f"reward.blip: received {config.blip!r}", _given(config.blip, names, published)
        vocabulary = file.parent
    else:
        where, file = f"weights {published}", weights.find_weights(published, config.weights_dir)
        vocabulary = weights.find_weights(VOCABULARY, config.weights_dir).parent
    try:
        tensors = weights.read_file(file)
        tokenizer = WordPiece.from_folder(vocabulary, max_length=MAX_TOKENS)
    except ValueError as error:
        raise InputError(f"{where}; {error}") from error
    model, sizes = checkpoint.load(cls, tensors, dtype=DTYPES[config.dtype], where=f"{where}; {file.name}")
    if tokenizer.vocab_size != sizes.text.vocab_size:
        raise InputError(
            f"{where}; its vocabulary has {tokenizer.vocab_size} tokens with [DEC] and [ENC], its network "
            f"{sizes.text.vocab_size}; put {_called(VOCABULARY)} there"
        )
    return model, tokenizer, sizes.vision.image_size


def _given(text: str, names: Sequence[str], published: str) -> Path:
    """The file of weights that ``reward.blip`` names, or the one in the folder that it names."""
    path = Path(text).expanduser()
    for file in [path, *(path / name for name in names)]:
        if file.is_file():
            return file
    raise InputError(
        f"reward.blip: received {text!r}; it must be a folder with {names[0]}; put {_called(published)} and "
        f"{_called(VOCABULARY)} there"
    )


def _called(entry: str) -> str:
    """A file of the catalogue in words."""
    found = weights.entry(entry)
    return f"{found.file} of {found.repo}"


def shortest_side(images: UInt8[np.ndarray, "N H W 3"], size: int) -> UInt8[np.ndarray, "N size size 3"]:
    """The shorter side to ``size`` by Pillow's bicubic filter, then the central square, as torchvision cuts it."""
    height, width = preprocess.shortest_side(images.shape[1], images.shape[2], size)
    # Python's rounding of halves to the even number is torchvision's; the CLIP processor rounds them down.
    top, left = round((height - size) / 2), round((width - size) / 2)
    return preprocess.resize_pil(images, height, width)[:, top : top + size, left : left + size]


def pixels(images: UInt8[Array, "N H W 3"]) -> Float[Array, "N H W 3"]:
    """The input of the network: values in [0, 1] less CLIP's mean over CLIP's standard deviation."""
    return preprocess.normalize(images.astype(jnp.float32) / 255.0)


def check_captions(prompts: Sequence[str]) -> None:
    """Raises InputError where a prompt has no text."""
    for index, prompt in enumerate(prompts):
        if not prompt.strip():
            raise InputError(f"prompt: received {prompt!r} for image {index}; the caption is empty; write what to draw")
