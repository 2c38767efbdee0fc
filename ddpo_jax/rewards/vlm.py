"""How well a vision-language model's description of an image says what the prompt says.

Black et al. 2023, arXiv:2305.13301, section 5. The model answers "Answer concisely: what is going on in this image?".
The score is the BERTScore recall (Zhang et al. 2020, arXiv:1904.09675) of "The image contains {prompt}" in that answer:
the embeddings of microsoft/deberta-xlarge-mnli after layer 40, no importance weights, no rescaling, [CLS] and [SEP]
with weight 0. At most 1; an empty answer gives 0.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.errors import InputError
from ddpo_jax.find import find
from ddpo_jax.models import deberta
from ddpo_jax.ops import bertscore
from ddpo_jax.rewards._shared import plug as _plug
from ddpo_jax.rewards._shared.batches import in_batches
from ddpo_jax.rewards._shared.check import RewardError

REFERENCE = "The image contains {prompt}"
BUCKET = 32  # lengths are padded to multiples of it, so that few programs are compiled
Tokens = tuple[np.ndarray, np.ndarray]  # embeddings f32[L, D] and weights f32[L] of a text's tokens
Encode = Callable[[list[str]], Sequence[Tokens]]


def default_config() -> ConfigDict:
    """Options."""
    config = ConfigDict()
    config.answerer = ""  # package.module:function (images, question=...) -> answers, or the URL of a server
    config.question = "Answer concisely: what is going on in this image?"  # asked of every image
    config.timeout_s = 120.0  # seconds that one answer of a remote model may take
    config.patience_s = 600.0  # seconds during which a failed request to it is repeated before the run gives up
    config.encoder = ""  # folder of microsoft/deberta-xlarge-mnli, or package.module:function (texts -> tokens)
    config.layer = 40  # encoder layer whose output is compared, of a folder
    config.batch_size = 8  # texts per call of the encoder, of a folder
    config.device = "mesh"  # mesh = the devices of the policy share every batch; host = this machine's processors
    return config


def make(config: ConfigDict) -> _plug.Closable:
    """The reward; no parts.

    An ``encoder`` that is a function takes a list of texts and returns for each of them (embeddings [L, D], weights
    [L]) of its tokens; what has the weight 0 may be matched but is not looked for.

    Raises:
      InputError: there is no such model or encoder.
    """
    look = _plug.connect(config.answerer, "reward.answerer", "answers", config.timeout_s, config.patience_s)
    encode = _encoder(config)
    question = config.question

    def reward(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]):
        del metadata
        answers = [text.strip() for text in _plug.texts(look(images, question=question), "reward.answerer")]
        references = [REFERENCE.replace("{prompt}", prompt) for prompt in prompts]
        distinct = sorted({*references, *filter(None, answers)})
        tokens = dict(zip(distinct, _checked(encode(distinct), distinct), strict=True))
        scores = np.zeros(len(prompts), np.float32)
        rows = [row for row, answer in enumerate(answers) if answer]
        if rows:
            scores[rows] = recalls([tokens[answers[row]] for row in rows], [tokens[references[row]] for row in rows])
        return scores, {}

    return _plug.Closable(reward, look.close, look.waits_for_others)


def recalls(candidates: Sequence[Tokens], references: Sequence[Tokens]) -> np.ndarray:
    """BERTScore recall f32[N] of N references in N candidates of any lengths."""
    candidate, _, present = _stack(candidates)
    reference, weight, _ = _stack(references)
    return np.asarray(_recall(candidate, present, reference, weight))


_recall = jax.jit(bertscore.recall)


def _stack(texts: Sequence[Tokens]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings f32[N, L, D], weights f32[N, L] and presence bool[N, L], zero where a text is shorter."""
    length = -(-max(len(weights) for _, weights in texts) // BUCKET) * BUCKET
    embeddings = np.zeros((len(texts), length, texts[0][0].shape[1]), np.float32)
    weight, present = np.zeros((len(texts), length), np.float32), np.zeros((len(texts), length), bool)
    for row, (values, weights) in enumerate(texts):
        embeddings[row, : len(values)], weight[row, : len(values)], present[row, : len(values)] = values, weights, True
    return embeddings, weight, present


def _checked(found: Sequence[Any], texts: list[str]) -> list[Tokens]:
    rule = "it must give (embeddings [L, D], weights [L], not all 0) for each text, with one D"
    if not isinstance(found, list | tuple) or len(found) != len(texts):
        raise RewardError(f"reward.encoder gave a {type(found).__name__} for {len(texts)} texts; {rule}")
    tokens: list[Tokens] = []
    for text, item in zip(texts, found, strict=True):
        try:
            values, weights = (np.asarray(part, np.float32) for part in item)
        except (TypeError, ValueError) as error:
            raise RewardError(f"reward.encoder gave a {type(item).__name__} for {text!r:.80}; {rule}") from error
        wide = values.ndim == 2 and values.shape[1:] == (tokens[0][0] if tokens else values).shape[1:]
        if not (wide and weights.shape == values.shape[:1] and weights.any()):
            raise RewardError(f"reward.encoder gave {values.shape} and {weights.shape} for {text!r:.80}; {rule}")
        tokens.append((values, weights))
    return tokens


def _encoder(config: ConfigDict) -> Encode:
    folder = pathlib.Path(config.encoder).expanduser()
    if config.encoder and folder.is_dir():
        return _folder_encoder(folder, config)
    if ":" not in config.encoder:
        raise InputError(
            f"reward.encoder: received {config.encoder!r}; it must be the folder of microsoft/deberta-xlarge-mnli or a "
            "function; download the model there, or write package.module:function"
        )
    try:
        return find("rewards", config.encoder)
    except ValueError as error:
        raise InputError(f"reward.encoder: received {config.encoder!r}; {error}") from error


def _folder_encoder(folder: pathlib.Path, config: ConfigDict) -> Encode:
    model, tokenizer = deberta.load(folder, config.layer)
    embed = in_batches(model, lambda m, ids: m(ids), config)

    def encode(texts: list[str]) -> list[Tokens]:
        ids = tokenizer(texts, BUCKET)
        counted = np.isin(ids, tokenizer.special, invert=True).astype(np.float32)
        there = (ids != tokenizer.pad_id).sum(1)
        return [(values[:n], weights[:n]) for values, weights, n in zip(embed(ids), counted, there, strict=True)]

    return encode
