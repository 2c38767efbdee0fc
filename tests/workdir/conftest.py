"""What several tests of a run's folder stand on."""

import types

import fake_gcs
import pytest


@pytest.fixture
def bucket(monkeypatch):
    """An empty bucket that the clients find; a test sets what it allows and sees what it holds."""
    bucket = fake_gcs.bucket()
    bucket.reset()
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    for name, value in bucket.clients().items():
        monkeypatch.setenv(name, value)
    return bucket


@pytest.fixture
def log(monkeypatch):
    """Warnings of checkpoints."""
    lines = []
    stand_in = types.SimpleNamespace(warning=lambda text, *args: lines.append(text % args))
    monkeypatch.setattr("ddpo_jax.workdir.checkpoint.logging", stand_in)
    return lines
