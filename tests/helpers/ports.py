"""Ports for processes that are to find each other."""

import contextlib
import random
import socket


def free_pair() -> int:
    """A free port whose next one is free too, below those that systems give to whatever connects meanwhile."""
    while True:
        port = random.SystemRandom().randrange(10000, 32000, 2)
        with contextlib.suppress(OSError), socket.create_server(("", port)), socket.create_server(("", port + 1)):
            return port
