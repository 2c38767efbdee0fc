"""DeBERTa, the encoder of BERTScore: a post-LN transformer that attends to contents and relative positions apart.

He et al. 2021, arXiv:2006.03654. The logit of query i and key j is the sum of content to content, content to position
(c2p) and position to content (p2c), Eq. 4; the positions are embeddings of the clipped distance i - j, shared by all
layers. There are no absolute positions at the input. Attribute names are those of the transformers state dict
(``encoder.layer.3.attention.self.in_proj``), so ``models.keys`` maps them by rule. Inference only: no dropout.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ddpo_jax.config.model import read_json
from ddpo_jax.errors import InputError
from ddpo_jax.models import keys, schema, weights
from ddpo_jax.models.tokenizer import checked_merges, checked_vocabulary, read_merges, whole_vocabulary

MAX_LENGTH = 512  # tokens of a text, [CLS] and [SEP] included; the rest is cut
_CLS, _SEP, _PAD = "[CLS]", "[SEP]", "[PAD]"
# Options of the format that must have this value; what is absent has the default in the second place.
_FIXED: dict[str, tuple[Any, Any]] = {
    "model_type": ("deberta", "deberta"),
    "relative_attention": (True, False),
    "position_biased_input": (False, True),
    "type_vocab_size": (0, 0),
    "hidden_act": ("gelu", "gelu"),
    "talking_head": (False, False),
}


@dataclasses.dataclass(frozen=True)
class DebertaConfig:
    """Sizes; the defaults are those of microsoft/deberta-xlarge-mnli."""

    vocab_size: int = 50265
    hidden_size: int = 1024
    num_hidden_layers: int = 48
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    max_relative_positions: int = 512  # distances are clipped to [-this, this)
    layer_norm_eps: float = 1e-7
    pad_token_id: int = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> DebertaConfig:
        """Reads a config.json of transformers.

        Raises:
          InputError: a size is missing, or an option has a value that is not supported.
        """
        for key, (wanted, absent) in _FIXED.items():
            found = values[key] if key in values else absent
            if found != wanted:
                raise InputError(f"{where}: {key} = {found!r} is not supported; it must be {wanted!r}")
        kinds = values["pos_att_type"] if "pos_att_type" in values else ()
        kinds = kinds.split("|") if isinstance(kinds, str) else kinds or ()
        if {kind.strip().lower() for kind in kinds} != {"c2p", "p2c"}:
            raise InputError(f"{where}: pos_att_type = {kinds!r} is not supported; it must be c2p|p2c")
        names = {field.name for field in dataclasses.fields(cls)}
        sizes = {key: value for key, value in values.items() if key in names}
        missing = sorted(names - sizes.keys() - {"max_relative_positions", "pad_token_id"})
        if missing:
            raise InputError(f"{where}: {', '.join(missing)} is missing; it must be a config.json of DeBERTa")
        reach = values.get("max_relative_positions", -1)
        if reach < 1:  # then as far as a text is long
            reach = values.get("max_position_embeddings", MAX_LENGTH)
        config = cls(**sizes | {"max_relative_positions": reach})
        if config.hidden_size % config.num_attention_heads:
            raise InputError(
                f"{where}: hidden_size = {config.hidden_size} must be a multiple of "
                f"num_attention_heads = {config.num_attention_heads}"
            )
        return config


class _Dense(nnx.Module):
    """A layer, the residual, and the norm after it."""

    def __init__(self, inputs: int, config: DebertaConfig, dtype: Any, rngs: nnx.Rngs):
        self.dense = nnx.Linear(inputs, config.hidden_size, dtype=dtype, rngs=rngs)
        self.LayerNorm = _norm(config, dtype, rngs)

    def __call__(self, x: Array, residual: Array) -> Array:
        return self.LayerNorm(self.dense(x) + residual)


class _SelfAttention(nnx.Module):
    def __init__(self, config: DebertaConfig, dtype: Any, rngs: nnx.Rngs):
        width = config.hidden_size
        self.in_proj = nnx.Linear(width, 3 * width, use_bias=False, dtype=dtype, rngs=rngs)
        self.q_bias, self.v_bias = nnx.Param(jnp.zeros(width)), nnx.Param(jnp.zeros(width))
        self.pos_proj = nnx.Linear(width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.pos_q_proj = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.heads = config.num_attention_heads

    def __call__(
        self, x: Float[Array, "B L D"], there: Bool[Array, "B L"], positions: Float[Array, "R D"]
    ) -> Float[Array, "B L D"]:
        """Attends to the tokens that are there; ``positions`` embeds the distances -R/2 ... R/2 - 1."""
        length, reach = x.shape[1], len(positions) // 2
        # In the file each head's query, key and value stand together.
        q, k, v = jnp.split(self.in_proj(x).reshape(*x.shape[:2], self.heads, -1), 3, axis=-1)
        q, v = q + self.q_bias[...].reshape(self.heads, -1), v + self.v_bias[...].reshape(self.heads, -1)
        q = q / math.sqrt(3 * q.shape[-1])  # three terms
        to_position = self.pos_proj(positions).reshape(len(positions), self.heads, -1)
        of_position = self.pos_q_proj(positions).reshape(to_position.shape) / math.sqrt(3 * q.shape[-1])
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        distance = jnp.arange(length)[:, None] - jnp.arange(length)  # of query from key
        place = jnp.clip(distance + reach, 0, 2 * reach - 1)[None, None]
        logits += jnp.take_along_axis(jnp.einsum("bqhd,rhd->bhqr", q, to_position), place, axis=-1)
        place = jnp.clip(reach - distance, 0, 2 * reach - 1)[None, None]  # the same, with a row for each key
        of_keys = jnp.take_along_axis(jnp.einsum("bkhd,rhd->bhkr", k, of_position), place, axis=-1)
        logits += jnp.swapaxes(of_keys, -1, -2)
        logits = jnp.where(there[:, None, None], logits, jnp.finfo(logits.dtype).min)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits, axis=-1), v).reshape(x.shape)


class _Attention(nnx.Module):
    def __init__(self, config: DebertaConfig, dtype: Any, rngs: nnx.Rngs):
        self.self = _SelfAttention(config, dtype, rngs)
        self.output = _Dense(config.hidden_size, config, dtype, rngs)

    def __call__(self, x: Array, there: Array, positions: Array) -> Array:
        return self.output(self.self(x, there, positions), x)


class _Intermediate(nnx.Module):
    def __init__(self, config: DebertaConfig, dtype: Any, rngs: nnx.Rngs):
        self.dense = nnx.Linear(config.hidden_size, config.intermediate_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return jax.nn.gelu(self.dense(x), approximate=False)


class _Layer(nnx.Module):
    def __init__(self, config: DebertaConfig, dtype: Any, rngs: nnx.Rngs):
        self.attention = _Attention(config, dtype, rngs)
        self.intermediate = _Intermediate(config, dtype, rngs)
        self.output = _Dense(config.intermediate_size, config, dtype, rngs)

    def __call__(self, x: Array, there: Array, positions: Array) -> Array:
        x = self.attention(x, there, positions)
        return self.output(self.intermediate(x), x)


class _Embeddings(nnx.Module):
    def __init__(self, config: DebertaConfig, dtype: Any, rngs: nnx.Rngs):
        self.word_embeddings = nnx.Embed(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.LayerNorm = _norm(config, dtype, rngs)

    def __call__(self, ids: Array) -> Array:
        return self.LayerNorm(self.word_embeddings(ids))


class _Encoder(nnx.Module):
    def __init__(self, config: DebertaConfig, dtype: Any, rngs: nnx.Rngs):
        self.layer = nnx.List([_Layer(config, dtype, rngs) for _ in range(config.num_hidden_layers)])
        self.rel_embeddings = nnx.Embed(2 * config.max_relative_positions, config.hidden_size, dtype=dtype, rngs=rngs)
        self.reach, self.dtype = config.max_relative_positions, dtype

    def __call__(self, x: Array, there: Array) -> Array:
        reach = min(x.shape[1], self.reach)  # no distance is farther
        positions = self.rel_embeddings.embedding[self.reach - reach : self.reach + reach].astype(self.dtype)
        for layer in self.layer:
            x = layer(x, there, positions)
        return x


class Deberta(nnx.Module):
    """Token ids to the hidden states of the last layer of ``config``."""

    def __init__(self, config: DebertaConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = _Embeddings(config, dtype, rngs)
        self.encoder = _Encoder(config, dtype, rngs)

    def __call__(self, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Hidden states; what stands at padding means nothing and reaches no other token."""
        return self.encoder(self.embeddings(ids), ids != self.config.pad_token_id)


def _norm(config: DebertaConfig, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    width, epsilon = config.hidden_size, config.layer_norm_eps
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, dtype=dtype, rngs=rngs)


class Tokenizer:
    """Byte-level BPE of a DeBERTa folder: ``[CLS] text [SEP]``, at most ``MAX_LENGTH`` tokens.

    Attributes:
      pad_id: of padding.
      special: ids of [CLS] and [SEP].
    """

    def __init__(self, core: tokenizers.Tokenizer, where: str):
        known = {name: core.token_to_id(name) for name in (_CLS, _SEP, _PAD)}
        ids = {name: number for name, number in known.items() if number is not None}
        if len(ids) < len(known):
            missing = ", ".join(known.keys() - ids.keys())
            raise InputError(f"{where}: the vocabulary has no {missing}; it must be that of DeBERTa")
        core.enable_truncation(MAX_LENGTH)
        core.no_padding()
        self._core, self.pad_id, self.special = core, ids[_PAD], [ids[_CLS], ids[_SEP]]

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Reads tokenizer.json, or else vocab.json and merges.txt.

        Of tokenizer.json only the vocabulary and the merges are used: how a text is cut is the same in every DeBERTa,
        and the library panics on a file that contradicts itself.

        Raises:
          InputError: the folder has neither, or they do not hold a vocabulary with its merges.
        """
        whole, file, merged = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
        if os.path.lexists(whole):
            wanted, kind = {"type": "BPE"}, "DeBERTa's byte-level BPE tokenizer"
            vocab, merges = whole_vocabulary(whole, read_json(whole), wanted, kind, schema.MAX_TOKENS)
        elif os.path.lexists(file) and os.path.lexists(merged):
            vocab = checked_vocabulary(file, read_json(file), schema.MAX_TOKENS)
            merges = checked_merges(merged, read_merges(merged), vocab)
        else:
            raise InputError(f"{folder}: no tokenizer.json, and no vocab.json with merges.txt; copy them there")
        core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
        core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        known = [name for name in (_PAD, _CLS, _SEP, "[UNK]", "[MASK]") if core.token_to_id(name) is not None]
        core.add_special_tokens(known)
        ends = [(name, core.token_to_id(name)) for name in (_CLS, _SEP) if name in known]
        if len(ends) == 2:
            core.post_processor = tokenizers.processors.TemplateProcessing(
                single=f"{_CLS} $A {_SEP}", special_tokens=ends
            )
        return cls(core, str(folder))

    def __call__(self, texts: Sequence[str], multiple: int = 1) -> Int[np.ndarray, "N L"]:
        """Ids of the texts, padded to the length of the longest one, rounded up to a multiple."""
        rows = [encoding.ids for encoding in self._core.encode_batch(list(texts))]
        length = -(-max(map(len, rows)) // multiple) * multiple
        return np.array([row + [self.pad_id] * (length - len(row)) for row in rows], np.int32)


def load(folder: Path, layer: int) -> tuple[Deberta, Tokenizer]:
    """The encoder up to and including a layer, and its tokenizer.

    Args:
      folder: of transformers: config.json, the tokenizer's files, model.safetensors or pytorch_model.bin.
      layer: 1 is the first of the encoder's layers; the ones after it are not built.

    Raises:
      InputError: the folder is not that of a DeBERTa (version 1), or it has fewer layers.
    """
    file = folder / "config.json"
    if not os.path.lexists(file):
        raise InputError(f"{folder}: no config.json there; give the folder of microsoft/deberta-xlarge-mnli")
    config = DebertaConfig.from_dict(schema.read(file, schema.DEBERTA), str(file))
    if not 1 <= layer <= config.num_hidden_layers:
        raise InputError(f"{folder}: layer {layer} was asked for; it has layers 1 to {config.num_hidden_layers}")
    tokenizer = Tokenizer.from_folder(folder)
    config = dataclasses.replace(config, num_hidden_layers=layer, pad_token_id=tokenizer.pad_id)
    tensors = {name.removeprefix("deberta."): value for name, value in weights.read_folder(folder).items()}
    tensors = {name: value for name, value in tensors.items() if _used(name.split("."), layer)}
    return keys.load(Deberta, config, tensors, where=str(folder)), tokenizer


def _used(name: list[str], layer: int) -> bool:
    """Whether a tensor is of the encoder up to ``layer``: not of a head, and not the absolute positions."""
    if name[:2] == ["encoder", "layer"]:
        return int(name[2]) < layer
    return name[0] in ("embeddings", "encoder") and name[1] != "position_embeddings"
