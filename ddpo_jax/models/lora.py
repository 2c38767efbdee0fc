"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on linear layers: ``y = W x + (alpha / r) B A x``.

B starts at zero, so an adapted network equals the base; with every adapter parameter set to zero it is the base
again, which is how the reference policy is had without a second copy of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

DOWN, UP = "lora_down", "lora_up"  # names of A^T [in, r] and B^T [r, out]


class LoRALinear(nnx.Module):
    """A linear layer with an adapter; its own parameters keep their names (``kernel``, ``bias``)."""

    def __init__(self, base: nnx.Linear, rank: int, alpha: float, rngs: nnx.Rngs):
        self.kernel, self.bias, self.dtype, self.scale = base.kernel, base.bias, base.dtype, alpha / rank
        bound = base.in_features**-0.5  # uniform with variance 1 / (3 in), as PEFT starts its adapters
        self.lora_down = nnx.Param(
            jax.random.uniform(rngs.params(), (base.in_features, rank), jnp.float32, -bound, bound)
        )
        self.lora_up = nnx.Param(jnp.zeros((rank, base.out_features), jnp.float32))

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        kernel, down, up = [p[...].astype(self.dtype) for p in (self.kernel, self.lora_down, self.lora_up)]
        x = x.astype(self.dtype)
        y = x @ kernel + (x @ down) @ up * self.scale
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def is_lora(name: str) -> bool:
    """Whether a dotted parameter name belongs to an adapter."""
    return name.rpartition(".")[2] in (DOWN, UP)


def add(module: nnx.Module, rank: int, targets: Sequence[str], rngs: nnx.Rngs, alpha: float | None = None) -> list[str]:
    """Puts an adapter on every linear layer whose dotted name ends in one of ``targets``, in place.

    Args:
      module: the network.
      rank: r >= 1.
      targets: such as ``("to_q", "to_k", "to_v", "to_out.0")``.
      rngs: of the initial A; each layer draws in the order of the names.
      alpha: scale; defaults to ``rank`` (scale 1).

    Returns:
      The names adapted.

    Raises:
      ValueError: nothing matches a target.
    """
    found: list[tuple[str, Any, Any, nnx.Linear]] = []
    for path, node in nnx.iter_modules(module):
        name = ".".join(map(str, path))
        if isinstance(node, nnx.Linear) and any(f".{name}".endswith(f".{target}") for target in targets):
            found.append((name, path[:-1], path[-1], node))
    unmatched = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name, *_ in found)]
    if unmatched:
        raise ValueError(
            f"train.lora_targets: received {list(targets)}; {unmatched} name no linear layer of the network; "
            "use names such as to_q, to_k, to_v, to_out.0"
        )
    for _, parents, key, node in sorted(found, key=lambda entry: entry[0]):
        owner: Any = module
        for part in parents:
            owner = owner[part] if isinstance(part, int) else getattr(owner, part)
        layer = LoRALinear(node, rank, float(alpha or rank), rngs)
        if isinstance(key, int):
            owner[key] = layer
        else:
            setattr(owner, key, layer)
    return sorted(name for name, *_ in found)
