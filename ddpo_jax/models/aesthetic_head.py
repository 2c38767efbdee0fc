"""The LAION aesthetic predictor: five linear layers on a CLIP image embedding, with no activation between them.

The upstream checkpoint (improved-aesthetic-predictor, "sac+logos+ava1-l14-linearMSE", Apache-2.0) has dropout, the
identity at inference, between some of them; hence the positions 0, 2, 4, 6, 7 of the layers in its tensor names.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ddpo_jax.errors import InputError
from ddpo_jax.models import schema
from ddpo_jax.types import AnyArray


@dataclasses.dataclass(frozen=True)
class AestheticHeadConfig:
    """Widths of the layers."""

    embed_dim: int = 768  # of the CLIP embedding
    widths: tuple[int, ...] = (1024, 128, 64, 16, 1)

    def __post_init__(self) -> None:
        if len(self.widths) != 5 or self.widths[-1] != 1 or min(self.embed_dim, *self.widths) < 1:
            raise InputError(
                f"aesthetic head config: embed_dim={self.embed_dim}, widths={list(self.widths)}: "
                "it has five layers, the last of width 1; see the config.json beside the published or embedded head"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AestheticHeadConfig:
        """Reads a config.json; keys that start with an underscore are notes."""
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(key for key in values if key not in names and not key.startswith("_"))
        if unknown:
            raise InputError(
                f"aesthetic head config: unknown {', '.join(unknown)}; it may hold {', '.join(sorted(names))}"
            )
        kept: dict[str, Any] = {key: value for key, value in values.items() if key in names}
        if "widths" in kept:
            kept["widths"] = tuple(kept["widths"])
        return cls(**kept)

    @classmethod
    def from_file(cls, path: Path) -> AestheticHeadConfig:
        """Reads the config.json beside a head.

        Raises:
          InputError: it is not readable, or does not describe a head.
        """
        return cls.from_dict(schema.read(path, schema.AESTHETIC_HEAD))


class _Dropout(nnx.Module):
    """Holds a place in the list of layers; at inference dropout does nothing."""

    def __call__(self, x: Array) -> Array:
        return x


class AestheticHead(nnx.Module):
    """Linear embed_dim -> 1024 -> 128 -> 64 -> 16 -> 1; parameters are named as upstream's (``layers.{0,2,4,6,7}``)."""

    def __init__(self, config: AestheticHeadConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        sizes = itertools.pairwise((config.embed_dim, *config.widths))
        first, second, third, *rest = [nnx.Linear(a, b, dtype=dtype, rngs=rngs) for a, b in sizes]
        self.layers = nnx.List([first, _Dropout(), second, _Dropout(), third, _Dropout(), *rest])

    def __call__(self, embeddings: Float[Array, "N D"]) -> Float[Array, " N"]:
        """Scores of L2-normalised CLIP image embeddings, about 1 to 10 with the published weights."""
        x = embeddings
        for layer in self.layers:
            x = layer(x)
        return x[:, 0]


def score(head: AestheticHead, embeddings: Float[AnyArray, "N D"]) -> Float[Array, " N"]:
    """The head on embeddings of any length: they are L2-normalised first."""
    with jax.default_matmul_precision("highest"):  # published values are float32; TF32 moves them in the third digit
        return head(embeddings / jnp.linalg.norm(embeddings, axis=-1, keepdims=True))
