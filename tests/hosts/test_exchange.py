"""What processes tell each other, with threads as processes."""

import numpy as np
import pretend
import pytest

from ddpo_jax.errors import InputError, RunFailure
from ddpo_jax.hosts import exchange


def test_gathered_values_keep_their_bits_and_their_order(monkeypatch):
    def value(rank):
        return {"id": np.int64(2**62 + rank), "name": "é" * (1 + 100 * rank), "x": np.full(rank, 0.1)}

    for found in pretend.processes(monkeypatch, 3, lambda rank: exchange.gather(value(rank))):
        for rank, entry in enumerate(found):
            assert entry["id"] == 2**62 + rank and entry["name"] == value(rank)["name"]
            assert entry["x"].dtype == np.float64 and entry["x"].tolist() == [0.1] * rank


def failing(rank, culprit, error):
    with exchange.together(InputError, RunFailure):
        if rank == culprit:
            raise error
    return "on"


@pytest.mark.parametrize("culprit", [0, 2])
def test_what_one_fails_at_all_raise(monkeypatch, culprit):
    found = pretend.processes(monkeypatch, 3, lambda rank: failing(rank, culprit, RunFailure("the disk is full")))
    text = "the disk is full" if culprit == 0 else "process 2: the disk is full"
    assert [(type(error), str(error)) for error in found] == [(RunFailure, text)] * 3


def test_where_none_fails_all_go_on(monkeypatch):
    assert pretend.processes(monkeypatch, 3, lambda rank: failing(rank, None, None)) == ["on"] * 3


def test_one_process_raises_what_was_raised():
    error = InputError("as it is")
    with pytest.raises(InputError) as raised:
        failing(0, 0, error)
    assert raised.value is error


def test_other_arguments_are_named(monkeypatch):
    configs = ['{\n "seed": 0,\n "eta": 1\n}', '{\n "seed": 0,\n "eta": 1\n}', '{\n "seed": 7,\n "eta": 1\n}']
    for error in pretend.processes(monkeypatch, 3, lambda rank: exchange.require_same("config", configs[rank])):
        assert isinstance(error, InputError)
        assert 'config: process 2 was started with another than process 0: "seed": 0, "seed": 7;' in str(error)
    assert pretend.processes(monkeypatch, 3, lambda rank: exchange.require_same("config", configs[0])) == [None] * 3
