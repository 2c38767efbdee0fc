"""Attention implementations against float64 numpy, values and gradients; the rules of choice."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpo_jax.models import attention as attention_module
from ddpo_jax.models.attention import attention, explain, resolve


def _inputs(q_len=13, kv_len=9, heads=3, head_dim=5, batch=2, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = [(batch, q_len, heads, head_dim), (batch, kv_len, heads, head_dim), (batch, kv_len, heads, head_dim)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def _exact(q, k, v, mask, dy):
    """Value and gradients in float64, by hand."""
    q, k, v, dy = (np.asarray(x, np.float64) for x in (q, k, v, dy))
    scale = q.shape[-1] ** -0.5
    logits = np.einsum("bqhd,bkhd->bhqk", q, k) * scale
    logits = np.where(np.broadcast_to(mask, logits.shape), logits, -np.inf)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("bqhd,bkhd->bhqk", dy, v)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale
    return (
        np.einsum("bhqk,bkhd->bqhd", p, v),
        np.einsum("bhqk,bkhd->bqhd", ds, k),
        np.einsum("bhqk,bqhd->bkhd", ds, q),
        np.einsum("bhqk,bqhd->bkhd", p, dy),
    )


def _masks(q, k):
    rng = np.random.default_rng(1)
    full = rng.random((q.shape[0], 1, q.shape[1], k.shape[1])) < 0.7
    full[..., 0] = True
    rows = full[:, :, :1]
    lower = np.tril(np.ones((q.shape[1], k.shape[1]), bool))[None, None]
    return {"none": (None, False, True), "full": (full, False, full), "keys": (rows, False, rows)} | {
        "causal": (None, True, lower),
        "causal and keys": (rows, True, lower & rows),
    }


def _check(function, q, k, v, seen, atol):
    dy = jnp.asarray(np.random.default_rng(2).standard_normal(q.shape), q.dtype)

    @jax.jit
    def run(q, k, v, dy):
        out, pullback = jax.vjp(function, q, k, v)
        return out, *pullback(dy)

    for got, want in zip(run(q, k, v, dy), _exact(q, k, v, seen, dy), strict=True):
        assert got.dtype == q.dtype
        np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=atol)


@pytest.mark.parametrize("kind", ["none", "full", "keys", "causal", "causal and keys"])
@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_value_and_gradients(implementation, kind):
    q, k, v = _inputs()
    mask, causal, seen = _masks(q, k)[kind]

    def function(q, k, v):
        if implementation == "chunked":
            return attention_module.chunked(q, k, v, causal, mask, chunk=4)  # 4 chunks, 1 query in the last
        return attention(q, k, v, causal=causal, mask=mask, implementation=implementation)

    _check(function, q, k, v, seen, atol=2e-6)


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_bfloat16_logits_are_float32(implementation):
    q, k, v = _inputs(dtype=jnp.bfloat16)
    function = jax.tree_util.Partial(attention, implementation=implementation)
    _check(function, q, k, v, True, atol=4e-2)
    # Two keys with logits 256 and 257: bfloat16 cannot tell them apart, the softmax of float32 can.
    q = jnp.full((1, 1, 1, 1), 1.0, jnp.bfloat16)
    k = jnp.asarray([256.0, 258.0], jnp.bfloat16).reshape(1, 2, 1, 1)
    q = q * jnp.asarray(0.5, jnp.bfloat16)
    v = jnp.asarray([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1)
    assert float(function(q, k, v)[0, 0, 0, 0]) == pytest.approx(1 / (1 + np.exp(-1.0)), abs=2**-8)


@pytest.mark.parametrize("causal", [False, True])
def test_flash_tpu_kernel_in_interpret_mode(causal):
    tpu = pytest.importorskip("jax.experimental.pallas.tpu")
    q, k, v = _inputs(q_len=128, kv_len=256 if not causal else 128, heads=1, head_dim=40, batch=1)
    seen = np.tril(np.ones((128, 128), bool)) if causal else True
    with tpu.force_tpu_interpret_mode():
        _check(lambda q, k, v: attention_module._flash_tpu(q, k, v, causal), q, k, v, seen, atol=1e-4)


def test_chunked_gradient_does_not_hold_all_logits():
    q, k, v = _inputs(q_len=2048, kv_len=2048, heads=1, head_dim=8, batch=1)

    def temporaries(function):
        gradient = jax.grad(lambda q, k, v: jnp.sum(jnp.sin(function(q, k, v))), argnums=(0, 1, 2))
        return jax.jit(gradient).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * 2048 * 2048
    assert temporaries(lambda q, k, v: attention_module.chunked(q, k, v, False, None, chunk=128)) < logits
    assert temporaries(jax.tree_util.Partial(attention, implementation="xla")) > logits


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "q_len", "kv_len", "masked", "expected"),
    [
        ("cpu", "float32", 40, 4096, 4096, False, "chunked"),
        ("cpu", "float32", 40, 4096, 77, False, "xla"),
        ("cpu", "bfloat16", 64, 1024, 1024, False, "xla"),
        ("cuda", "bfloat16", 40, 4096, 4096, False, "cudnn"),
        ("cuda", "float16", 40, 4096, 77, False, "cudnn"),
        ("cuda", "bfloat16", 160, 256, 256, False, "xla"),
        ("cuda", "bfloat16", 512, 4096, 4096, False, "chunked"),
        ("cuda", "bfloat16", 36, 4096, 4096, False, "chunked"),
        ("cuda", "float32", 40, 4096, 4096, False, "chunked"),
        ("cuda", "bfloat16", 64, 77, 77, True, "xla"),
        ("gpu", "bfloat16", 64, 4096, 4096, False, "chunked"),
        ("tpu", "bfloat16", 40, 4096, 4096, False, "flash_tpu"),
        ("tpu", "bfloat16", 40, 4096, 4096, True, "chunked"),
        ("tpu", "bfloat16", 40, 4096, 4000, False, "chunked"),
        ("tpu", "bfloat16", 512, 4096, 4096, False, "chunked"),
        ("tpu", "bfloat16", 64, 4096, 77, False, "xla"),
    ],
)
def test_automatic_choice(platform, dtype, head_dim, q_len, kv_len, masked, expected):
    sizes = (platform, dtype, head_dim, q_len, kv_len)
    assert resolve("auto", *sizes, masked=masked) == expected
    line = explain(*sizes, masked=masked)
    assert line.startswith(f"attention {expected}: {q_len} queries, {kv_len} keys") and "not )" not in line


@pytest.mark.parametrize(
    ("implementation", "platform", "dtype", "head_dim", "q_len", "message"),
    [
        ("flash", "cpu", "float32", 40, 64, "attention='flash': must be one of auto, xla, cudnn, chunked, flash_tpu"),
        ("cudnn", "cpu", "bfloat16", 40, 64, "needs an NVIDIA GPU"),
        ("cudnn", "cuda", "float32", 40, 64, "needs bfloat16 or float16, not float32"),
        ("cudnn", "cuda", "bfloat16", 160, 64, "at most 128, not 160"),
        ("flash_tpu", "cpu", "float32", 40, 128, "needs a TPU, not cpu"),
        ("flash_tpu", "tpu", "float32", 40, 100, "multiples of 128, not 100 and 128"),
    ],
)
def test_impossible_choice_is_refused(implementation, platform, dtype, head_dim, q_len, message):
    with pytest.raises(ValueError, match=message):
        resolve(implementation, platform, dtype, head_dim, q_len, 128)


def test_choice_is_logged_once(caplog):
    q, k, v = _inputs(q_len=11, kv_len=7, heads=1, head_dim=3)
    with caplog.at_level(logging.INFO, logger="ddpo_jax.models.attention"):
        attention(q, k, v)
        attention(q, k, v)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["attention xla: 11 queries, 7 keys, head_dim 3, float32 on cpu (few logits)"]
