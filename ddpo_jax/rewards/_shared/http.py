"""Asks an HTTP server for JSON, patiently: for rewards that are computed elsewhere.

A request that finds no server, no answer in time, one of the statuses 408, 429 and 5xx, or an answer that cannot be
right is repeated after 0.5 s, 1 s, 2 s, ... and at most every 30 s, or after the time that the server asks for
(``Retry-After``). That goes on for ``patience_s`` seconds; then, or where another fault says that repeating is useless
(a wrong token, no such path), ``HttpError`` says in one line what was wrong. What it waits for is logged, so that a run
that stands still says why. Nothing but JSON is read from the network, and no more than ``MAX_REPLY_BYTES`` of it.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import math
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable
from typing import Any, TypeVar

from absl import logging

from ddpo_jax.errors import InputError

FIRST_WAIT_S, MAX_WAIT_S = 0.5, 30.0  # between two tries
FIRST_NOTICE_S = 10.0  # an answer that takes longer is mentioned in the log; then after twice that, and so on
MAX_REPLY_BYTES = 16 * 10**6
T = TypeVar("T")


class HttpError(Exception):
    """The server gave no usable answer; the message is one line."""


class Retry(Exception):
    """An answer that may be right the next time.

    Args:
      why: what was wrong, in one line: "answered ...".
      wait_s: how long the server asks us to wait.
    """

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s = wait_s


class JsonClient:
    """Talks to one server.

    Args:
      url: ``http://host:port`` or ``https://...``; paths are appended.
      key: what ``url`` is called in messages, such as "reward.url".
      timeout_s: seconds until a whole answer must be there.
      patience_s: seconds during which a request is repeated; a last try begins when they are over. 0 tries once.
      token: sent as ``Authorization: Bearer <token>``; empty = nothing is sent.
      clock, sleep: for tests; None sleeps until ``close``.

    Raises:
      InputError: the URL is none.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str,
        timeout_s: float,
        patience_s: float,
        token: str = "",
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ):
        self.url = url.rstrip("/")
        self._address = _address(url, key)
        self._timeout_s, self._patience_s = timeout_s, patience_s
        self._token = token
        self._closed = threading.Event()
        self._clock, self._sleep = clock, sleep or self._closed.wait

    def close(self) -> None:
        """Lets go of whatever is waited for, within a second: ``post`` then raises ``HttpError``."""
        self._closed.set()

    def get(self, path: str) -> Any:
        """What the server answers to ``GET path``, asked once. Raises ``HttpError``."""
        try:
            return self._once("GET", path, None)
        except Retry as error:
            raise HttpError(f"{self.url} {error}") from error

    def post(self, path: str, body: Any, read: Callable[[Any], T]) -> T:
        """Posts ``body`` and returns what ``read`` makes of the answer.

        Args:
          path: appended to the URL.
          body: anything that JSON can say.
          read: checks the answer; it raises ``Retry`` if that cannot be right.

        Raises:
          HttpError: there was no usable answer within ``patience_s``, or there will be none.
        """
        payload = json.dumps(body).encode()
        start, wait, tries = self._clock(), FIRST_WAIT_S, 0
        last = self._patience_s <= 0
        while True:
            tries += 1
            try:
                answer = read(self._once("POST", path, payload))
            except Retry as error:
                spent = self._clock() - start
                left = self._patience_s - spent
                if self._closed.is_set():
                    raise HttpError(f"{self.url} {error}; no longer waited for") from error
                if last or left <= 0:
                    raise HttpError(f"{self.url} {error}; tried {_times(tries)} in {spent:.0f} s") from error
                if error.wait_s > left:
                    raise HttpError(
                        f"{self.url} {error}; it asks to wait {error.wait_s:.0f} s, longer than the {left:.0f} s left"
                    ) from error
                pause = min(max(wait, error.wait_s), left)
                logging.warning(
                    "waiting for %s, which %s; next try in %.3g s, giving up in %.0f s", self.url, error, pause, left
                )
                self._sleep(pause)
                wait, last = min(2 * wait, MAX_WAIT_S), pause == left
                continue
            if tries > 1:
                logging.info("%s answers again, after %.0f s", self.url, self._clock() - start)
            return answer

    def _once(self, method: str, path: str, payload: bytes | None) -> Any:
        scheme, host, port, base = self._address
        kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
        connection = kind(host, port, timeout=self._timeout_s)
        headers = {"Accept": "application/json"}
        if payload is not None:
            headers["Content-Type"] = "application/json"
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        with _Watch(f"{self.url}{path}", self._timeout_s, self._closed) as watch:
            try:
                connection.connect()
                watch.hold(connection.sock)
                try:
                    connection.request(method, base + path, payload, headers)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # refused before it was all sent; the answer may say why
                response = connection.getresponse()
                content = response.read(MAX_REPLY_BYTES + 1)
                if watch.expired or (response.length and len(content) <= MAX_REPLY_BYTES):
                    raise http.client.IncompleteRead(content, response.length)
            except (OSError, http.client.HTTPException) as error:
                if watch.expired or isinstance(error, TimeoutError):
                    raise Retry(f"gave no answer within {self._timeout_s:g} s") from error
                raise Retry(f"cannot be reached: {_reason(error)}") from error
            finally:
                connection.close()
        return _read(self.url, response, content)


class _Watch:
    """Ends a connection that has taken too long, in whatever it waits; until then says in the log that it waits.

    The time-out of a socket alone is that of a single read: a server that sends a byte now and then would hold us for
    ever.
    """

    def __init__(self, what: str, timeout_s: float, closed: threading.Event):
        self.expired = False
        self._what, self._timeout_s, self._closed = what, timeout_s, closed
        self._sock: socket.socket | None = None  # while it connects, its own time-out is enough
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="http-watch", daemon=True)

    def hold(self, sock: socket.socket) -> None:
        """Says which socket is to be ended."""
        self._sock = sock
        if self.expired:
            self._end()

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        start, notice, elapsed = time.monotonic(), FIRST_NOTICE_S, 0.0
        while not self._done.wait(max(0.0, min(1.0, notice - elapsed, self._timeout_s - elapsed))):
            elapsed = time.monotonic() - start
            self.expired = elapsed >= self._timeout_s
            if self.expired or self._closed.is_set():
                self._end()
                return
            if elapsed >= notice:
                limit = self._timeout_s
                logging.info("waiting for %s: no answer after %.3g s of at most %.3g s", self._what, elapsed, limit)
                notice *= 2

    def _end(self) -> None:
        if self._sock is not None:
            try:
                socket.socket.shutdown(self._sock, socket.SHUT_RDWR)  # not SSLSocket's, which is for one thread
            except OSError:
                pass  # closed by now


def _address(url: str, key: str) -> tuple[str, str, int, str]:
    """(scheme, host, port, path) of a URL."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        host.encode("idna")  # as it will be looked up
    except ValueError as error:
        raise InputError(f"{key}: received {url!r}; {error}; use http://127.0.0.1:8000") from error
    if parts.scheme not in ("http", "https") or not host or not url.isascii() or " " in url:
        raise InputError(
            f"{key}: received {url!r}; it must be the address of a server, http:// or https://; "
            "use http://127.0.0.1:8000"
        )
    if parts.username is not None or parts.query or parts.fragment:
        raise InputError(
            f"{key}: received {url!r}; it must be an address without user, '?' and '#'; use {key}=http://"
            f"{host}:{port}{parts.path}"
        )
    return parts.scheme, host, port, parts.path.rstrip("/")


def _read(url: str, response: http.client.HTTPResponse, content: bytes) -> Any:
    status = response.status
    if 300 <= status < 400:
        raise HttpError(f"{url} answered {status} and points to {response.headers.get('Location')}; use that address")
    if status in (408, 429) or status >= 500:
        raise Retry(f"answered {status}{_detail(content)}", _retry_after(response.headers.get("Retry-After")))
    if status >= 400:
        raise HttpError(f"{url} answered {status}{_detail(content)}")
    if len(content) > MAX_REPLY_BYTES:
        raise Retry(f"answered more than {MAX_REPLY_BYTES} bytes")
    kind = response.headers.get_content_type() if "Content-Type" in response.headers else "no Content-Type"
    if kind != "application/json":
        raise Retry(f"answered {kind} instead of application/json{_detail(content)}")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Retry(f"answered what is not JSON{_detail(content)}") from error


def _detail(content: bytes) -> str:
    """What a server says of its fault: ``{"error": "..."}``, or how its answer begins."""
    try:
        text = json.loads(content)["error"]
    except (ValueError, TypeError, KeyError, RecursionError):
        text = content[:400].decode("utf-8", "replace")
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return f": {line[:200]}{'...' * (len(line) > 200)}" if line else ""


def _retry_after(value: str | None) -> float:
    """Seconds of a ``Retry-After`` header, which holds seconds or a date; 0 if it is absent or neither."""
    try:
        seconds = float(value or 0)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(str(value)).timestamp() - time.time()
        except ValueError:
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, http.client.HTTPException):  # ended within an answer, or what came is not HTTP
        return f"its answer broke off or is not HTTP ({type(error).__name__})"
    return " ".join(str(error).split()) or type(error).__name__


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
