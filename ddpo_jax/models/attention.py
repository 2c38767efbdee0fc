"""Scaled dot-product attention behind one name; every implementation gives the same result to rounding.

- ``xla``: the plain computation; keeps all logits [B, heads, Q, K] in memory.
- ``cudnn``: flash attention of NVIDIA GPUs, in half precision.
- ``chunked``: exact, over chunks of queries one after another; memory is bounded, that of the gradient too.
- ``flash_tpu``: the Pallas flash kernel of TPUs, heads padded to the 128 lanes.

Logits and softmax are float32 in all of them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ddpo_jax.errors import InputError

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "chunked", "flash_tpu")

_SMALL = 1024 * 1024  # logits per head up to which holding them all is cheap: 32x32 pixels against themselves
_CUDNN_QUERIES = 1024  # fewer queries than this do not pay for the kernel
_CHUNK_LOGITS = 2**26  # float32 logits alive at a time in ``chunked``: 256 MiB
_LANES = 128  # of a TPU vector register

_log = logging.getLogger(__name__)
_platform = ""  # of ``compiling_for``


def attention(
    q: Float[Array, "B Q heads d"],
    k: Float[Array, "B K heads d"],
    v: Float[Array, "B K heads d"],
    *,
    causal: bool = False,
    mask: Array | None = None,
    implementation: str = "auto",
) -> Float[Array, "B Q heads d"]:
    """softmax(q k^T / sqrt(d)) v, in the dtype of ``q``.

    Args:
      q: queries.
      k: keys.
      v: values.
      causal: query i sees keys 0..i.
      mask: bool, broadcastable to [B, heads, Q, K]; false entries are not seen.
      implementation: one of ``IMPLEMENTATIONS``; "auto" chooses by device, dtype and sizes (see ``resolve``).

    Raises:
      InputError: the implementation is unknown or cannot compute this here.
    """
    sizes = (jnp.dtype(q.dtype).name, q.shape[-1], q.shape[1], k.shape[1])
    chosen = resolve(implementation, current_platform(), *sizes, masked=mask is not None)
    if implementation == "auto":
        _log_choice(current_platform(), *sizes, mask is not None)
    if chosen == "chunked":
        return chunked(q, k, v, causal, mask)
    if chosen == "flash_tpu":
        return _flash_tpu(q, k, v, causal)
    if chosen == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation="cudnn")
    return _xla(q, k, v, causal, mask)


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Networks traced meanwhile are for ``platform`` ("tpu" or "gpu"), whatever the devices at hand are."""
    global _platform
    before, _platform = _platform, platform
    try:
        yield
    finally:
        _platform = before


def current_platform() -> str:
    """ "cpu", "tpu", "cuda" (a GPU whose cuDNN has flash attention: compute capability 8.0) or "gpu" (any other)."""
    if _platform:
        return _platform
    platform = jax.default_backend()
    if platform != "gpu":
        return platform
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    # ROCm reports an architecture name such as gfx90a.
    major = capability.partition(".")[0]
    return "cuda" if major.isdigit() and int(major) >= 8 else "gpu"


def resolve(
    implementation: str,
    platform: str,
    dtype: DTypeLike,
    head_dim: int,
    q_len: int,
    kv_len: int,
    *,
    masked: bool = False,
) -> str:
    """The implementation that ``attention`` uses.

    Args:
      implementation: what was asked for.
      platform: as ``current_platform`` names it.
      dtype: of the queries.
      head_dim: features of a head.
      q_len: number of queries.
      kv_len: number of keys.
      masked: a mask other than the causal one is given.

    Raises:
      InputError: unknown name, or not possible with these arguments.
    """
    if implementation not in IMPLEMENTATIONS:
        raise InputError(
            f"attention={implementation!r}: must be one of {', '.join(IMPLEMENTATIONS)}; choose one of them"
        )
    obstacles = {
        "cudnn": _cudnn_obstacle(platform, dtype, head_dim),
        "flash_tpu": _flash_tpu_obstacle(platform, head_dim, q_len, kv_len, masked),
    }
    if implementation != "auto":
        if obstacles.get(implementation):
            raise InputError(f"attention={implementation!r}: {obstacles[implementation]}; use auto")
        return implementation
    if not obstacles["cudnn"] and q_len >= _CUDNN_QUERIES:
        return "cudnn"
    if q_len * kv_len <= _SMALL:
        return "xla"
    return "chunked" if obstacles["flash_tpu"] else "flash_tpu"


def explain(platform: str, dtype: DTypeLike, head_dim: int, q_len: int, kv_len: int, *, masked: bool = False) -> str:
    """One line that says which implementation "auto" chooses, and why not a faster one. Arguments as ``resolve``."""
    chosen = resolve("auto", platform, dtype, head_dim, q_len, kv_len, masked=masked)
    name = jnp.dtype(dtype).name
    line = f"attention {chosen}: {q_len} queries, {kv_len} keys, head_dim {head_dim}, {name} on {platform}"
    if chosen == "xla":
        return f"{line} (few logits)"
    if chosen == "chunked":
        cudnn = _cudnn_obstacle(platform, dtype, head_dim)
        flash = _flash_tpu_obstacle(platform, head_dim, q_len, kv_len, masked)
        return f"{line} (not {'flash_tpu: ' + flash if platform == 'tpu' else 'cudnn: ' + cudnn})"
    return line


@functools.cache
def _log_choice(platform: str, dtype: str, head_dim: int, q_len: int, kv_len: int, masked: bool) -> None:
    _log.info(explain(platform, dtype, head_dim, q_len, kv_len, masked=masked))


def _cudnn_obstacle(platform: str, dtype: DTypeLike, head_dim: int) -> str:
    """Why cuDNN's kernel is not possible, or an empty string."""
    if platform != "cuda":
        return f"needs an NVIDIA GPU of compute capability 8.0 or later, not {platform}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, not {jnp.dtype(dtype).name}"
    if head_dim % 8 or head_dim > 128:
        return f"needs a head_dim that is a multiple of 8 and at most 128, not {head_dim}"
    return ""


def _flash_tpu_obstacle(platform: str, head_dim: int, q_len: int, kv_len: int, masked: bool) -> str:
    """Why the TPU kernel is not possible, or an empty string."""
    if platform != "tpu":
        return f"needs a TPU, not {platform}"
    if masked:
        return "takes no mask but the causal one"
    if q_len % _LANES or kv_len % _LANES:
        return f"needs numbers of queries and keys that are multiples of {_LANES}, not {q_len} and {kv_len}"
    if head_dim > 2 * _LANES:
        return f"needs a head_dim of at most {2 * _LANES}, not {head_dim}"
    return ""


def _xla(q: Array, k: Array, v: Array, causal: bool, mask: Array | None) -> Array:
    dtype = q.dtype
    if current_platform() == "cpu" and dtype.itemsize < 4:
        # XLA for CPU lacks, in loops, the half-precision product that jax.nn asks for; it has no fast one anyway.
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation="xla").astype(dtype)


def chunked(q: Array, k: Array, v: Array, causal: bool, mask: Array | None, chunk: int | None = None) -> Array:
    """Attention over ``chunk`` queries at a time; the backward pass recomputes a chunk's logits from its inputs."""
    batch, q_len, heads, _ = q.shape
    kv_len = k.shape[1]
    if chunk is None:
        chunk = max(_LANES, _CHUNK_LOGITS // (batch * heads * kv_len))
    chunk = min(chunk, q_len)
    count = -(-q_len // chunk)
    # The queries that fill the last chunk see real keys and are cut off; their cotangents are zero.
    filled = jnp.pad(q, ((0, 0), (0, count * chunk - q_len), (0, 0), (0, 0)))
    chunks = jnp.moveaxis(filled.reshape(batch, count, chunk, *q.shape[2:]), 1, 0)
    columns = jnp.arange(kv_len)
    masks = None
    if mask is not None:
        mask = jnp.broadcast_to(mask, (1,) * (4 - mask.ndim) + mask.shape)
        if mask.shape[2] > 1:
            rows = jnp.pad(mask, ((0, 0), (0, 0), (0, count * chunk - q_len), (0, 0)), constant_values=True)
            masks = jnp.moveaxis(rows.reshape(*mask.shape[:2], count, chunk, mask.shape[3]), 2, 0)

    @jax.checkpoint
    def one(inputs: tuple[Array, Array, Array | None]) -> Array:
        index, queries, rows = inputs
        seen = mask if rows is None else rows
        if causal:
            lower = columns <= (index * chunk + jnp.arange(chunk))[:, None]
            seen = lower[None, None] if seen is None else seen & lower
        return _xla(queries, k, v, False, seen)

    out = lax.map(one, (jnp.arange(count), chunks, masks))
    return jnp.moveaxis(out, 0, 1).reshape(batch, count * chunk, *q.shape[2:])[:, :q_len]


def _flash_tpu(q: Array, k: Array, v: Array, causal: bool) -> Array:
    from jax.experimental.pallas.ops.tpu import flash_attention as kernel  # only where a TPU asks for it

    head_dim = q.shape[-1]
    extra = -head_dim % _LANES

    def prepare(x: Array) -> Array:
        return jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, 0), (0, extra)))

    queries, keys = (next(b for b in (512, 256, _LANES) if length % b == 0) for length in (q.shape[1], k.shape[1]))
    sizes = kernel.BlockSizes(
        block_b=1,
        block_q=queries,
        block_k_major=keys,
        block_k=keys,
        block_q_major_dkv=queries,
        block_k_major_dkv=keys,
        block_q_dkv=queries,
        block_k_dkv=keys,
        block_q_dq=queries,
        block_k_major_dq=keys,
        block_k_dq=keys,
    )
    out = kernel.flash_attention(
        prepare(q), prepare(k), prepare(v), causal=causal, sm_scale=head_dim**-0.5, block_sizes=sizes
    )
    return out.transpose(0, 2, 1, 3)[..., :head_dim].astype(q.dtype)
