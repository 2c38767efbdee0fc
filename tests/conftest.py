"""Settings of every test: JAX on eight fake CPU devices, a compilation cache that outlives the run, no model hub.

The environment is set before anything imports jax, which reads it once. Arrays live on device 0 unless a test
shards them, so single-device tests run as they would with one device.
"""

import os
import pathlib
import sys

import jaxtyping
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
# Keyed by program, compiler version and flags, so a stale entry is never read. Subprocesses inherit it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

# Shapes and dtypes in the annotations of the package are checked while the tests run.
sys.path[:0] = [str(pathlib.Path(__file__).parent / "helpers"), str(pathlib.Path(__file__).parent)]
jaxtyping.install_import_hook("ddpo_jax", "array_checker.check")


@pytest.fixture
def nothing_at_home(tmp_path_factory, monkeypatch):
    """No weights in the places where they are looked for: neither in the home folder nor where DDPO_WEIGHTS says."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.delenv("DDPO_WEIGHTS", raising=False)
