"""BERTScore on token embeddings (Zhang et al. 2020, arXiv:1904.09675), without importance weights or rescaling."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ddpo_jax.types import AnyArray


def recall(
    candidate: Float[AnyArray, "N L D"],
    present: Bool[AnyArray, "N L"],
    reference: Float[AnyArray, "N M D"],
    weight: Float[AnyArray, "N M"],
) -> Float[Array, " N"]:
    """How much of each reference its candidate says: R_BERT of section 3, in [-1, 1].

    Every token of the reference is matched with the token of the candidate whose embedding has the largest cosine with
    its own; the recall is the mean of these cosines, weighted.

    Args:
      candidate: embeddings of the candidates' tokens; of any length, but not zero where ``present``.
      present: where a candidate has a token; all of them may be matched, [CLS] and [SEP] too. At least one each.
      reference: embeddings of the references' tokens.
      weight: of the references' tokens, 0 for padding, [CLS] and [SEP]; not all of a reference are 0.
    """
    cosine = jnp.einsum("nld,nmd->nlm", _unit(candidate), _unit(reference), precision="highest")
    best = jnp.max(jnp.where(present[:, :, None], cosine, -jnp.inf), axis=1)
    return jnp.sum(jnp.where(weight != 0, best, 0) * weight, axis=1) / jnp.sum(weight, axis=1)


def _unit(embeddings: AnyArray) -> Array:
    vectors = jnp.asarray(embeddings, jnp.float32)
    length = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / jnp.where(length == 0, 1, length)  # padding may be zero
