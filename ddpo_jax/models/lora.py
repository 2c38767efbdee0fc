"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on linear layers: ``y = W x + (alpha / r) B A x``.

B starts at zero, so an adapted network equals the base; with every adapter parameter set to zero it is the base
again, which is how the reference policy is had without a second copy of the weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ddpo_jax.errors import InputError
from ddpo_jax.models import schema, weights

DOWN, UP = "lora_down", "lora_up"  # names of A^T [in, r] and B^T [r, out]
_PEFT = {DOWN: "lora_A.weight", UP: "lora_B.weight"}  # [r, in] and [out, r]
_METADATA = "lora_adapter_metadata"  # entry of the file's header: options as JSON
_RULES = {"r": schema.SIZE, "lora_alpha": schema.between(0, 1e6)}


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
      InputError: nothing matches a target.
    """
    found: list[tuple[str, Any, Any, nnx.Linear]] = []
    for path, node in nnx.iter_modules(module):
        name = ".".join(map(str, path))
        if isinstance(node, nnx.Linear) and any(f".{name}".endswith(f".{target}") for target in targets):
            found.append((name, path[:-1], path[-1], node))
    unmatched = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name, *_ in found)]
    if unmatched:
        raise InputError(
            f"train.lora_targets: received {list(targets)}; {unmatched} name no linear layer of the network; "
            "use names such as to_q, to_k, to_v, to_out.0"
        )
    for _, parents, key, node in sorted(found, key=lambda entry: entry[0]):
        owner: Any = module
        for part in parents:
            owner = owner[part] if isinstance(part, int) else getattr(owner, part)
        layer = LoRALinear(node, rank, rank if alpha is None else alpha, rngs)
        if isinstance(key, int):
            owner[key] = layer
        else:
            setattr(owner, key, layer)
    return sorted(name for name, *_ in found)


def merge(params: Mapping[str, np.ndarray], scale: float = 1.0) -> dict[str, np.ndarray]:
    """The adapted network without adapters: every adapted ``kernel`` becomes ``kernel + scale * down @ up``.

    Args:
      params: all parameters of the network by dotted name, adapters included; float32.
      scale: alpha / r.
    """
    merged = {name: np.asarray(value) for name, value in params.items() if not is_lora(name)}
    for name in sorted(params):
        layer, _, last = name.rpartition(".")
        if last == DOWN:
            update = np.asarray(params[name]) @ np.asarray(params[f"{layer}.{UP}"])
            merged[f"{layer}.kernel"] = merged[f"{layer}.kernel"] + np.float32(scale) * update
    return merged


def save(
    path: str | os.PathLike[str], params: Mapping[str, np.ndarray], alpha: float | None = None, prefix: str = "unet"
) -> None:
    """Writes adapters as PEFT and diffusers name them: what ``StableDiffusionPipeline.load_lora_weights`` reads.

    Args:
      path: of the safetensors file.
      params: the adapters' parameters by dotted name.
      alpha: the scale is alpha / r; defaults to r.
      prefix: the part of the pipeline that they adapt.
    """
    tensors, ranks = {}, set()
    for name, value in params.items():
        layer, _, last = name.rpartition(".")
        tensors[f"{prefix}.{layer}.{_PEFT[last]}"] = np.asarray(value).T
        ranks.add(value.shape[1 if last == DOWN else 0])
    (rank,) = ranks  # ``add`` gives every layer the same
    options = {
        "r": rank,
        "lora_alpha": rank if alpha is None else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "peft_type": "LORA",
        "target_modules": sorted({name.rpartition(".")[0] for name in params}),
    }
    described = json.dumps({f"{prefix}.{key}": value for key, value in options.items()}, indent=2, sort_keys=True)
    weights.write_safetensors(path, tensors, {_METADATA: described})


def load(path: str | os.PathLike[str], prefix: str = "unet") -> dict[str, np.ndarray]:
    """Reads adapters that ``save``, a diffusers pipeline or one network of it has written.

    Args:
      path: of the safetensors file.
      prefix: the part of the pipeline that they adapt; the file of a single network does not name it.

    Returns:
      The adapters' parameters by dotted name, float32, for a scale of 1: another scale is multiplied into B.

    Raises:
      InputError: the file holds anything but plain adapters of ``prefix``, of one rank and scale.
    """
    tensors = weights.read_safetensors(path)
    options = _options(path, prefix)
    unknown = [key for key in ("alpha_pattern", "use_dora", "use_rslora") if options.get(key)]
    start = f"{prefix}." if any(name.startswith(f"{prefix}.") for name in tensors) else ""
    ours, params = {theirs: name for name, theirs in _PEFT.items()}, {}
    for name, value in tensors.items():
        layer, _, last = name.removeprefix(start).rpartition(".lora_")
        kind_is_right = value.ndim == 2 and 0 not in value.shape and value.dtype.kind not in "iub"
        if not name.startswith(start) or not layer or f"lora_{last}" not in ours or not kind_is_right:
            unknown.append(name)
        else:
            params[f"{layer}.{ours[f'lora_{last}']}"] = value.T.astype(np.float32)
    layers = sorted({name.rpartition(".")[0] for name in params})
    unknown += [f"half of {layer}" for layer in layers if any(f"{layer}.{part}" not in params for part in _PEFT)]
    if unknown or not params:
        raise InputError(
            f"{path}: received {', '.join(map(_short, unknown[:3])) or 'no tensors'}; it must hold pairs of lora_A and "
            f"lora_B of linear layers of the {prefix}, of one scale; use a file of such"
        )
    _check_ranks(path, params, layers, options)
    infinite = [name for name, value in params.items() if not np.isfinite(value).all()]
    if infinite:
        raise InputError(f"{path}: {_short(infinite[0])} is not finite everywhere; use a file without NaN")
    for layer in layers:
        rank = params[f"{layer}.{UP}"].shape[0]
        params[f"{layer}.{UP}"] *= np.float32((options["lora_alpha"] if "lora_alpha" in options else rank) / rank)
    return params


def _options(path: str | os.PathLike[str], prefix: str) -> dict[str, Any]:
    """What the header says of the adapters of ``prefix``; a file need not say it."""
    texts = weights.read_metadata(path)
    text = texts[_METADATA] if _METADATA in texts else "{}"
    try:
        described = json.loads(text)
    except (ValueError, RecursionError):
        described = text
    rule = "it must be an object in JSON"
    if not isinstance(described, dict):
        raise InputError(f"{path} {_METADATA}: received {schema.shown(described)}; {rule}; export the adapters again")
    options = {key.removeprefix(f"{prefix}."): value for key, value in described.items()}
    schema.check(f"{path} {_METADATA}", options, _RULES, "export the adapters again")
    return options


def _check_ranks(
    path: str | os.PathLike[str], params: Mapping[str, np.ndarray], layers: Sequence[str], options: Mapping[str, Any]
) -> None:
    """Refuses halves that do not fit each other, and ranks that the header does not state."""
    for layer in layers:
        down, up = params[f"{layer}.{DOWN}"].shape[1], params[f"{layer}.{UP}"].shape[0]
        stated = options["r"] if "r" in options and not options.get("rank_pattern") else down
        if not down == up == stated:
            found = f"{_short(layer)} has lora_A of rank {down} and lora_B of rank {up}"
            raise InputError(f"{path}: {found}; both must be of rank {stated}; export the adapters again")


def _short(name: str) -> str:
    return name if len(name) <= 100 else f"{name[:97]}..."
