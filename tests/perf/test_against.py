"""Epochs in turns with a peer's."""

import math
import stat

import pytest

from ddpo_jax.commands import _cli as cli
from ddpo_jax.commands import benchmark as command
from ddpo_jax.perf import against


def test_the_ratio_is_taken_turn_by_turn():
    """A machine that is twice as slow in every second turn slows both."""
    ratio, low, high = against.faster([10, 20, 10, 20], [5, 10, 5, 10])
    assert (ratio, low, high) == pytest.approx((2.0, 2.0, 2.0))
    # log2 of the ratios 1, 2 and 4: mean 1, deviation 1 with n - 1; t at 0.975 with 2 degrees of freedom is 4.3027
    ratio, low, high = against.faster([1, 2, 4], [1, 1, 1])
    assert ratio == pytest.approx(2.0) and low == pytest.approx(2 ** (1 - 4.3027 / math.sqrt(3)), rel=1e-4)
    assert high == pytest.approx(2 ** (1 + 4.3027 / math.sqrt(3)), rel=1e-4)


def test_the_table_compares_each_of_ours_with_the_peer():
    found = {what: value for what, value, _ in against.rows({"trl": [4.0, 4.0], "all": [2.0, 2.0], "some": [1.0, 1.0]})}
    assert found["trl: an epoch"] == 4.0 and found["all: faster than trl"] == 2.0
    assert found["some: faster than trl"] == 4.0 and found["some: 95 % interval, low"] == 4.0


def test_a_peer_that_is_not_installed_is_one_line(tmp_path, monkeypatch, capsys):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'trl'\" >&2\nexit 1\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(against.sys, "executable", str(python))
    assert cli.run(command.main, ["--against=trl"]) == 2
    said = capsys.readouterr().err
    assert "--against: received 'trl', which did not start: ModuleNotFoundError: No module named 'trl'; install" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_trl_itself(capsys):
    pytest.importorskip("trl")
    assert cli.run(command.main, ["--against=trl", "--repeats=1"]) == 0
    assert "all steps: faster than trl" in capsys.readouterr().out
