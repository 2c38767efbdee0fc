"""The LAION aesthetic predictor: five linear layers on a CLIP image embedding, with no activation between them.

The upstream checkpoint interleaves the linear layers with dropout, hence the indices 0, 2, 4, 6, 7 in its state dict
(improved-aesthetic-predictor, "sac+logos+ava1-l14-linearMSE", Apache-2.0). Dropout is the identity at inference.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

LAYERS = (0, 2, 4, 6, 7)  # positions of the linear layers in the upstream nn.Sequential
WIDTHS = (1024, 128, 64, 16, 1)


def tensor_shapes(embed_dim: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes (torch layout, [out, in]) of the head's tensors for CLIP embeddings of width ``embed_dim``."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, (size_in, size_out) in zip(LAYERS, itertools.pairwise((embed_dim, *WIDTHS)), strict=True):
        shapes[f"layers.{layer}.weight"] = (size_out, size_in)
        shapes[f"layers.{layer}.bias"] = (size_out,)
    return shapes


class AestheticHead(nnx.Module):
    """Linear embed_dim -> 1024 -> 128 -> 64 -> 16 -> 1."""

    def __init__(self, embed_dim: int, *, rngs: nnx.Rngs):
        sizes = itertools.pairwise((embed_dim, *WIDTHS))
        self.layers = nnx.List([nnx.Linear(size_in, size_out, rngs=rngs) for size_in, size_out in sizes])

    def __call__(self, embeddings: Float[Array, "N D"]) -> Float[Array, " N"]:
        """Scores of L2-normalised CLIP image embeddings, about 1 to 10 with the published weights."""
        x = embeddings
        for layer in self.layers:
            x = layer(x)
        return x[:, 0]

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray], embed_dim: int, *, source: str) -> AestheticHead:
        """The head with the given float tensors.

        Args:
          tensors: ``layers.{0,2,4,6,7}.{weight,bias}`` in torch layout, no other names.
          embed_dim: width of the CLIP embedding the head reads.
          source: where the tensors came from, for the error.
        Raises:
          ValueError: names or shapes differ from the head of this width.
        """
        wanted = tensor_shapes(embed_dim)
        faults = [f"missing {name}" for name in wanted if name not in tensors]
        faults += [f"unexpected {name}" for name in tensors if name not in wanted]
        faults += [
            f"{name} is {tuple(tensors[name].shape)}, needs {shape}"
            for name, shape in wanted.items()
            if name in tensors and tuple(tensors[name].shape) != shape
        ]
        if faults:
            raise ValueError(
                f"aesthetic head {source}: {'; '.join(faults)}. "
                f"A head for CLIP embeddings of width {embed_dim} holds layers.{{0,2,4,6,7}}.{{weight,bias}}; "
                "give the head trained on this CLIP"
            )
        head = nnx.eval_shape(lambda: cls(embed_dim, rngs=nnx.Rngs(0)))
        for layer, index in zip(head.layers, LAYERS, strict=True):
            layer.kernel.set_value(jnp.asarray(np.asarray(tensors[f"layers.{index}.weight"], np.float32).T))
            layer.bias.set_value(jnp.asarray(np.asarray(tensors[f"layers.{index}.bias"], np.float32)))
        return head


def score(head: AestheticHead, embeddings: Float[Array, "N D"]) -> Float[Array, " N"]:
    """``head`` of the embeddings scaled to unit length, in full float32 (published values were computed so)."""
    with jax.default_matmul_precision("highest"):
        return head(embeddings / jnp.linalg.norm(embeddings, axis=-1, keepdims=True))
