"""All processes of a run are waited for, and whoever is missing is named. The processes are threads."""

import socket
import threading
import time

import pytest
from processes import free_pair

from ddpo_jax.errors import RunFailure
from ddpo_jax.hosts.roll_call import SAID_S, RollCall


@pytest.fixture
def address():
    return f"127.0.0.1:{free_pair()}"


def meet(address, ranks, count, wait_s, late=None):
    """What each of the processes that are there comes to: its roll call or its failure."""
    found = {}

    def come(rank):
        time.sleep((late or {}).get(rank, 0))
        try:
            found[rank] = RollCall(address, count, rank, wait_s, 10)
        except RunFailure as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("late", [0, 2])
def test_all_are_there(address, late):
    found = meet(address, range(3), 3, 20, {late: 0.5})
    for roll in found.values():
        assert isinstance(roll, RollCall) and roll.lost == ""
        roll.leave()


def test_who_is_missing_is_named_everywhere(address):
    found = meet(address, [0, 2], 4, 0.6)
    for rank, text in found.items():
        assert text.startswith(f"process {rank} of 4: waited 0.6 s (DDPO_WAIT_S) for process 1, 3; ")
        assert "127.0.0.1 on the ports" in text and "\n" not in text


def test_the_first_is_missing(address):
    found = meet(address, [1], 2, 0.6)
    assert found[1].startswith("process 1 of 2: waited 0.6 s (DDPO_WAIT_S) for process 0; ")


def test_whatever_else_connects_is_left_alone(address):
    host, _, port = address.partition(":")

    def stray():
        time.sleep(0.2)
        with socket.create_connection((host, int(port) + 1), timeout=5) as other:
            other.sendall(b"GET / HTTP/1.1")

    thread = threading.Thread(target=stray)
    thread.start()
    found = meet(address, range(2), 2, 20, {1: 0.6})
    thread.join()
    for roll in found.values():
        assert isinstance(roll, RollCall)
        roll.leave()


def test_a_process_that_is_sent_away_comes_again(address, monkeypatch):
    """It was held up between connecting and saying its number."""
    host, _, port = address.partition(":")
    connect = socket.create_connection

    class HeldUp:
        def __init__(self, peer):
            self.peer = peer

        def sendall(self, data):
            time.sleep(SAID_S + 0.5)
            self.peer.sendall(data)

        def __getattr__(self, name):
            return getattr(self.peer, name)

    places = []

    def first_held_up(place, timeout):
        peer = connect(place, timeout)
        places.append(place)
        return HeldUp(peer) if len(places) == 1 else peer

    monkeypatch.setattr(socket, "create_connection", first_held_up)
    found = meet(address, range(2), 2, 20, {1: 0.2})
    assert places == [(host, int(port) + 1)] * 2
    for roll in found.values():
        assert isinstance(roll, RollCall)
        roll.leave()


def test_a_process_that_meets_itself_comes_again(address, monkeypatch):
    """TCP connects a socket to itself where it is given the port that it calls, and nobody listens there."""
    connect, own = socket.create_connection, socket.socket()
    own.bind(("127.0.0.1", 0))
    own.connect(own.getsockname())
    calls = []

    def itself_first(place, timeout):
        calls.append(place)
        return own if len(calls) == 1 else connect(place, timeout)

    monkeypatch.setattr(socket, "create_connection", itself_first)
    found = meet(address, range(2), 2, 20)
    assert len(calls) > 1
    for roll in found.values():
        assert isinstance(roll, RollCall)
        roll.leave()
