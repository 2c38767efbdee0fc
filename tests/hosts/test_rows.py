"""Which process has which rows, and what arrives where; processes are threads."""

import jax
import numpy as np
import pretend
import pytest

from ddpo_jax.hosts import rows
from ddpo_jax.types import Spread

COUNTS = [1, 2, 4]


@pytest.mark.parametrize("count", COUNTS)
def test_batches_give_each_process_a_contiguous_block(monkeypatch, count):
    found = pretend.processes(monkeypatch, count, lambda rank: [b[rows.own(len(b))] for b in rows.batches(24, 8)])
    assert [len(batch) for batches in found for batch in batches] == [8 // count] * 3 * count
    assert [np.concatenate(batches).tolist() for batches in found] == np.arange(24).reshape(count, -1).tolist()


def test_batches_of_one_process_are_in_order_and_the_last_may_be_smaller():
    assert [batch.tolist() for batch in rows.batches(5, 2)] == [[0, 1], [2, 3], [4]]


@pytest.fixture(params=["blocks", "one has all", "random", "all the other way round"])
def owner(request):
    """Who has each of 8 rows, of 4 processes."""
    return {
        "blocks": np.arange(8) // 2,
        "one has all": np.full(8, 2),
        "random": np.array([3, 0, 3, 1, 3, 3, 0, 2]),
        "all the other way round": 3 - np.arange(8) // 2,
    }[request.param]


TABLE = np.random.default_rng(0).standard_normal((8, 2, 3)).astype(np.float32)


def spread(owner, rank):
    held = np.full(len(owner), None)
    for row in np.flatnonzero(owner == rank):
        held[row] = TABLE[row]
    return Spread(owner, held, TABLE.shape[1:], TABLE.dtype)


def test_every_row_arrives_where_its_device_is(monkeypatch, owner):
    numbers = np.arange(8)
    found = pretend.processes(monkeypatch, 4, lambda rank: rows.home({"x": spread(owner, rank), "n": numbers}))
    np.testing.assert_array_equal([part["x"] for part in found], TABLE.reshape(4, 2, 2, 3))
    np.testing.assert_array_equal([part["n"] for part in found], numbers.reshape(4, 2))


def test_settled_samples_stay_where_they_are_as_far_as_there_is_room(monkeypatch, owner):
    found = pretend.processes(monkeypatch, 4, lambda rank: rows.settled({"x": spread(owner, rank), "n": np.arange(8)}))
    order = found[0]["n"]
    assert sorted(order) == list(range(8))
    for part in found:
        np.testing.assert_array_equal(part["n"], order)
        np.testing.assert_array_equal(part["x"].owner, owner[order])
    moved = int((owner[order] != np.arange(8) // 2).sum())
    assert moved == sum(max(0, (owner == process).sum() - 2) for process in range(4))


def test_a_spread_array_is_indexed_and_joined_like_one_of_numpy(monkeypatch, owner):
    picked, mask = np.array([5, 0, 0, 7]), TABLE[:, 0, 0] > 0

    def use(rank):
        x = spread(owner, rank)
        joined = rows.concatenate([x[picked], x[2:5], x[mask]])
        assert (len(joined), joined.shape, joined.nbytes) == (len(joined.owner), expected.shape, expected.nbytes)
        return rows.whole(joined)

    expected = np.concatenate([TABLE[picked], TABLE[2:5], TABLE[mask]])
    for found in pretend.processes(monkeypatch, 4, use):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("size", [8, 5, 1])
def test_what_all_have_read_each_keeps_a_part_of(monkeypatch, size):
    def claim(rank):
        mine = rows.claim(TABLE[:size])
        return [row is not None for row in mine.rows], rows.whole(mine)

    found = pretend.processes(monkeypatch, 4, claim)
    np.testing.assert_array_equal(np.sum([held for held, _ in found], axis=0), np.ones(size))
    for _, everything in found:
        np.testing.assert_array_equal(everything, TABLE[:size])


def test_a_checkpoint_holds_the_rows_of_one_process_after_those_of_another(monkeypatch):
    owner = np.array([1, 0, 1, 1])
    found = pretend.processes(monkeypatch, 2, lambda rank: rows.shelf(spread(owner, rank)))
    for order in found:
        assert order.tolist() == [1, -1, -1, 0, 2, 3]


def test_one_process_keeps_plain_arrays():
    for made in (rows.spread(TABLE), rows.claim(TABLE), rows.home(TABLE), rows.settled(TABLE), rows.whole(TABLE)):
        assert made is TABLE
    assert TABLE[rows.shelf(TABLE)].base is TABLE
    assert jax.tree.leaves(spread(np.zeros(8, int), 0))[0].shape == TABLE.shape  # one leaf of a tree
