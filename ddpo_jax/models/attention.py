"""Scaled dot-product attention behind one name."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float


def attention(
    q: Float[Array, "B Q heads d"],
    k: Float[Array, "B K heads d"],
    v: Float[Array, "B K heads d"],
    *,
    causal: bool = False,
    mask: Array | None = None,
    implementation: str = "auto",
) -> Float[Array, "B Q heads d"]:
    """softmax(q k^T / sqrt(d)) v."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation="xla")
