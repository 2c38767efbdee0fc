"""Who of a run is there: at the start all are waited for, later it is noticed when one is gone.

JAX aborts a process that misses another one, with a page of C++. So before JAX is asked, every process connects to
process 0, on the port after the coordinator's, and says its number; the connections then stay open. The system closes
those of a process that ends, however it ends, and process 0 tells the others who it was.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import sys
import threading
import time

from ddpo_jax.errors import RunFailure

GRACE_S = 5.0  # seconds that process 0 has to notice by itself that it computes with one that is gone, and to tidy up
RETRY_S = 0.2
SAID_S = 2.0  # seconds that a process which has connected has to say its number


class RollCall:
    """The connections of one process.

    Args:
      address: host and port of JAX's coordinator, in process 0.
      processes: how many take part.
      rank: the number of this one.
      wait_s: seconds that all are waited for.
      silence_s: seconds after which a host that the network does not reach any more is given up.

    Raises:
      RunFailure: not all were there in time; it says who was not.
    """

    def __init__(self, address: str, processes: int, rank: int, wait_s: float, silence_s: int):
        host, _, port = address.rpartition(":")
        self._place, self._rank, self._count = (host.strip("[]"), int(port) + 1), rank, processes
        self._end, self._wait_s = time.monotonic() + wait_s, wait_s
        self._peers: dict[int, socket.socket] = {}
        self._left = False
        self.lost = ""  # who is gone, in words
        self._meet_all() if rank == 0 else self._meet_first()
        for peer in self._peers.values():
            peer.settimeout(None)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in (("TCP_KEEPIDLE", silence_s // 2), ("TCP_KEEPINTVL", max(silence_s // 10, 1))):
                if hasattr(socket, option):
                    peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), max(value, 1))
        threading.Thread(target=self._watch, name="roll call", daemon=True).start()

    def leave(self) -> None:
        """From now on others may go."""
        self._left = True

    def _meet_all(self) -> None:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        dual = family == socket.AF_INET6
        port = self._place[1]
        try:
            server = socket.create_server(("", port), family=family, backlog=self._count, dualstack_ipv6=dual)
        except OSError as error:
            raise RunFailure(f"{self._who()}: port {port} cannot be used: {error.strerror}; set another") from error
        with server:
            while len(self._peers) < self._count - 1 and (left := self._end - time.monotonic()) > 0:
                server.settimeout(left)
                with contextlib.suppress(OSError):  # too late
                    self._welcome(server.accept()[0])
        absent = [str(rank) for rank in range(1, self._count) if rank not in self._peers]
        answer = f"absent {', '.join(absent)}\n" if absent else "all\n"
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.sendall(answer.encode())
        if absent:
            raise RunFailure(self._absent(", ".join(absent)))

    def _welcome(self, peer: socket.socket) -> None:
        """Takes up a process that says its number at once; any other is sent away and may come again."""
        peer.settimeout(SAID_S)
        try:
            self._peers[int(peer.recv(16).decode())] = peer
        except (OSError, ValueError):
            peer.close()

    def _meet_first(self) -> None:
        answer = ""
        while not answer:  # process 0 is not there yet, or its name is not known yet, or it sent us away
            left = self._end - time.monotonic()
            if left <= 0:
                raise RunFailure(self._absent("0"))
            with contextlib.suppress(OSError, UnicodeDecodeError):
                peer = socket.create_connection(self._place, timeout=left)
                if peer.getsockname() == peer.getpeername():  # where nobody listens yet, TCP can meet itself
                    peer.close()
                else:
                    peer.sendall(str(self._rank).encode())
                    peer.settimeout(left + SAID_S)
                    answer = peer.recv(1000).decode().strip()
            if not answer:
                time.sleep(RETRY_S)
        if answer != "all":
            raise RunFailure(self._absent(answer.removeprefix("absent ")))
        self._peers[0] = peer

    def _watch(self) -> None:
        """Until one is gone: says so to the others, and ends this process if it does not end by itself."""
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            key, _ = selector.select()[0]
        try:
            said = self._peers[key.data].recv(100).decode().strip()
        except OSError:
            said = ""
        if self._left:
            return
        gone = said or str(key.data)
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.sendall(f"{gone}\n".encode())
        self.lost = f"process {gone} of {self._count} is gone or cannot be reached"
        if self._rank == 0:  # JAX aborts the others as soon as this one ends: they must be faster
            time.sleep(GRACE_S)
        if not self._left:
            with contextlib.suppress(OSError):
                print(f"error: {ended(self.lost)}", file=sys.stderr, flush=True)
            os._exit(1)

    def _who(self) -> str:
        return f"process {self._rank} of {self._count}"

    def _absent(self, ranks: str) -> str:
        host, port = self._place
        return (
            f"{self._who()}: waited {self._wait_s:g} s (DDPO_WAIT_S) for process {ranks}; see that every host is "
            f"started and reaches {host} on the ports {port - 1} and {port}"
        )


def ended(who: str) -> str:
    """The line of a run that one process has left."""
    return f"{who}: see what it printed; the same command in all processes goes on from the last saved epoch"
