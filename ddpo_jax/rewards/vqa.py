"""BLIP-VQA of T2I-CompBench (Huang et al. 2023, arXiv:2307.06350): does the image show what the prompt names?

Every noun chunk of the prompt but "top", "the side", "the left" and "the right", the first 8 of them, becomes the
question "<chunk>?". The score is the product over the chunks of P(yes) / (P(yes) + P(no)), from the logits of the first
token of the answer: 1 is best, 0 worst. Network: BLIP's ViT-B/16 at 480 pixels with BERT-base as encoder of the
question and as decoder of the answer (Salesforce/blip-vqa-capfilt-large). Preprocessing: both sides to 480 by Pillow's
bicubic filter, CLIP's mean and standard deviation; the question in lower case without .!"()*#:;~, 35 tokens, [ENC]
(30523) first; the answer begins with [DEC] (30522); yes is 2748, no is 2053.

Anchors: Stable Diffusion 1.4 averages 0.3765, 0.3576 and 0.4156 on the benchmark's color, shape and texture prompts.
They hold for chunks by spaCy (``chunker``, or metadata ``{"chunks": [...]}`` that the prompts bring). The default
chunker is a set of rules that finds the same chunks in most prompts of this kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from ddpo_jax.errors import InputError
from ddpo_jax.models.blip.networks import VisualQuestionAnswering
from ddpo_jax.models.preprocess import resize_pil
from ddpo_jax.rewards._shared import blip as _blip
from ddpo_jax.rewards._shared.batches import in_batches
from ddpo_jax.rewards._shared.chunks import noun_chunks

FILES = ("model.safetensors", "pytorch_model.bin", "model_base_vqa_capfilt_large.pth")
PUBLISHED = "blip_vqa"  # in the catalogue of weights
NOT_ASKED = frozenset({"top", "the side", "the left", "the right"})
MAX_CHUNKS = 8


def default_config() -> ConfigDict:
    """Options."""
    config = ConfigDict()
    config.blip = ""  # folder with model.safetensors and vocab.txt, or such a file there; empty = the published files
    config.weights_dir = ""  # folder with the published files; empty = $DDPO_WEIGHTS, the caches, then the hub
    config.chunker = "rules"  # finds the noun chunks: rules = ours; or an installed spaCy model, such as en_core_web_sm
    config.dtype = "float32"  # of the network's products: float32, as published, or bfloat16: faster, less exact
    config.batch_size = 16  # images per call of the network; each with all its questions
    config.device = "mesh"  # mesh = the devices of the policy share every batch; host = this machine's processors
    return config


def make(config: ConfigDict) -> Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]]:
    """The reward; part ``chunk_1`` is that of every prompt's first chunk, and so on; NaN for prompts with fewer.

    Raises:
      InputError: the weights are missing, damaged or of another model, or there is no such chunker. When called: an
        empty prompt, or one without a noun chunk; metadata whose chunks are not texts.
    """
    chunker = _chunker(config.chunker)
    model, tokenizer, size = _blip.load(VisualQuestionAnswering, config, FILES, PUBLISHED)
    yes, no = tokenizer.id("yes"), tokenizer.id("no")

    def probability(model: VisualQuestionAnswering, images: Array, ids: Array, mask: Array) -> Array:
        logits = model(_blip.pixels(images), ids, mask, tokenizer.decode_id).astype(jnp.float32)
        return jax.nn.sigmoid(logits[..., yes] - logits[..., no])  # P(yes) / (P(yes) + P(no)), whatever the rest

    run = in_batches(model, probability, config, lambda images: resize_pil(images, size, size))

    def reward(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]):
        _blip.check_captions(prompts)
        questions = [_questions(*pair, chunker) for pair in zip(prompts, metadata, strict=True)]
        longest = max(map(len, questions))
        width = 1 << (longest - 1).bit_length()  # a power of two: at most four programs are ever compiled
        asked = np.arange(width) < np.array([len(own) for own in questions])[:, None]
        ids, mask = tokenizer([question for own in questions for question in own + own[:1] * (width - len(own))])
        ids[:, 0] = tokenizer.encode_id
        shape = (len(prompts), width, -1)
        probabilities = run(images, ids.reshape(shape), mask.reshape(shape))
        parts = np.where(asked, probabilities, np.nan)
        return np.nanprod(parts, axis=1), {f"chunk_{i + 1}": parts[:, i] for i in range(longest)}

    return reward


def _questions(prompt: str, metadata: dict[str, Any], chunker: Callable[[str], Iterable[str]]) -> list[str]:
    """The questions of a prompt, at least one and at most ``MAX_CHUNKS``."""
    chunks = metadata["chunks"] if "chunks" in metadata else list(chunker(prompt))
    if not isinstance(chunks, list | tuple) or not all(isinstance(chunk, str) for chunk in chunks):
        raise InputError(f"chunks: received {chunks!r} for prompt {prompt!r}; they must be a list of texts")
    asked = [chunk for chunk in chunks if chunk.strip() and chunk not in NOT_ASKED][:MAX_CHUNKS]
    if not asked:
        raise InputError(
            f"prompt: received {prompt!r}, in which no noun chunk to ask for was found; name a thing in it, or give "
            "its chunks as metadata"
        )
    return [re.sub(r'[.!"()*#:;~]', "", f"{chunk}?".lower()) for chunk in asked]


def _chunker(name: str) -> Callable[[str], Iterable[str]]:
    if name == "rules":
        return noun_chunks
    fault = f"reward.chunker: received {name!r}; it must be rules or an installed spaCy model"
    try:
        import spacy
    except ImportError as error:
        raise InputError(f"{fault}, and spaCy is not installed; pip install spacy, or use rules") from error
    try:
        parse = spacy.load(name)
    except (OSError, ValueError) as error:  # no such model; a model of another spaCy
        cause = " ".join(str(error).split())
        raise InputError(f"{fault} ({cause}); python -m spacy download {name}, or use rules") from error
    return lambda prompt: [chunk.text for chunk in parse(prompt).noun_chunks]
