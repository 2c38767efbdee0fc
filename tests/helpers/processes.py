"""Runs in processes of their own that start within a second: forked from one that has imported everything.

``python tests/helpers/processes.py`` is that one. It reads requests, a JSON object a line, and answers each with one.
Importing takes most of a process of the tiny model; JAX has no threads before its first use, so a fork of it is as good
as a new process.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import random
import resource
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Sequence

HELPERS = pathlib.Path(__file__).resolve().parent


def free_pair() -> int:
    """A free port whose next one is free too, below those that systems give to whatever connects meanwhile."""
    while True:
        port = random.SystemRandom().randrange(10000, 32000, 2)
        with contextlib.suppress(OSError), socket.create_server(("", port)), socket.create_server(("", port + 1)):
            return port


class Run:
    """One process of ``python -m ddpo_jax.main``."""

    def __init__(self, starter: Starter, pid: int, output: pathlib.Path):
        self._starter, self.pid, self._output = starter, pid, output
        self.code: int | None = None  # once it has ended; negative: the signal that killed it

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._output.read_text(errors="replace")

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        if self.code is None:
            self.code = self._starter.ask({"poll": self.pid})["code"]
        return self.code

    def wait(self, seconds: float = 300) -> int:
        """Its exit code; the test fails if it takes longer."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                self.signal(signal.SIGKILL)
                raise AssertionError(f"still running after {seconds} s:\n{self.output}")
            time.sleep(0.02)
        return self.code

    def wait_for(self, text: str, seconds: float = 300) -> None:
        """Returns when it has printed ``text``."""
        end = time.monotonic() + seconds
        while text not in self.output:
            if self.poll() is not None or time.monotonic() > end:
                self.signal(signal.SIGKILL)
                raise AssertionError(f"ended with {self.code} without {text!r}:\n{self.output}")
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        """Sends a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def lines(self) -> list[str]:
        """The lines of its output that tell a user what is wrong; none of them may be a traceback's."""
        assert "Traceback" not in self.output, self.output
        return [line for line in self.output.splitlines() if line.startswith("error: ")]


class Starter:
    """Starts runs; as a context manager it ends them all."""

    def __init__(self, folder: pathlib.Path):
        """``folder`` gets their output."""
        self._folder, self._count = folder, 0

    def __enter__(self) -> Starter:
        path = os.pathsep.join([str(HELPERS), str(HELPERS.parents[1]), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | {"PYTHONPATH": path, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()

    def ask(self, request: dict) -> dict:
        """The answer to one request."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, argv: Sequence[str], max_file: int = 0, terminal: str = "", **environment: str) -> Run:
        """Starts ``python -m ddpo_jax.main argv``.

        Args:
          argv: arguments.
          max_file: bytes that a file may have (``ulimit -f``); 0 = as many as it likes.
          terminal: device of the terminal it is started from, which gets its output; empty = none.
          environment: further variables.
        """
        self._count += 1
        output = self._folder / f"{self._count}.txt"
        output.touch()
        request = {"argv": list(argv), "output": terminal or str(output), "terminal": bool(terminal)}
        request |= {"max_file": max_file, "environment": environment}
        return Run(self, self.ask(request)["pid"], output)


def serve() -> None:
    """Answers requests until there are no more; returns in every child."""
    alive: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            alive.discard(pid)
            answer = {"code": os.waitstatus_to_exitcode(status) if pid else None}
        else:
            pid = os.fork()
            if not pid:
                return become(**request)
            alive.add(pid)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)


def become(argv: list[str], output: str, terminal: bool, max_file: int, environment: dict[str, str]) -> None:
    """Makes this child what the request asks for; its ``sys.argv`` are the arguments of the run."""
    os.setsid()
    file = os.open(output, os.O_RDWR | os.O_APPEND)
    if terminal:
        fcntl.ioctl(file, termios.TIOCSCTTY, 0)
    for number in (0, 1, 2):
        os.dup2(file, number)
    os.environ.update(environment)
    sys.argv[1:] = argv
    if max_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file, max_file))


if __name__ == "__main__":
    import matplotlib.figure  # noqa: F401  # all that a run imports, at once

    import ddpo_jax.rewards.jpeg_compressibility  # noqa: F401
    import ddpo_jax.training.loop  # noqa: F401
    from ddpo_jax import main
    from ddpo_jax.commands import _cli

    sys.argv[1:] = []
    serve()
    if sys.argv[1:]:
        _cli.leave(main.main())
