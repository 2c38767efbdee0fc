"""A small HTTP server for JSON: routes to functions, limits, a token, a clean end. It runs in threads of its own.

The library is waitress (pure Python, no dependencies, the extra ``serve``): it reads requests, spools large ones to
disk, and calls ``Server`` on one of a few threads.
"""

from __future__ import annotations

import errno
import hmac
import ipaddress
import json
import logging as std_logging
import os
import secrets
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from absl import logging

from ddpo_jax.errors import InputError

TOKEN_VARIABLE = "DDPO_TOKEN"
MEGABYTE = 10**6
_CONNECTIONS = 64  # open at the same time, browsers' idle ones included


class Refusal(Exception):
    """A request is answered with a fault.

    Args:
      status: of HTTP, 400 or more.
      message: one line.
      headers: further headers of the reply.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})


@dataclass(frozen=True)
class Request:
    """What a handler needs to know of a request.

    Attributes:
      path: without the query.
      query: the last value of each key.
      body: the bytes that came with it.
      gone: says whether the client has hung up meanwhile.
    """

    path: str
    query: dict[str, str]
    body: bytes
    gone: Callable[[], bool]

    def json(self) -> Any:
        """The body as JSON. Raises ``Refusal`` if it is none."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
            cause = " ".join(str(error).split())
            raise Refusal(400, f"the body is not JSON: {cause}") from error


@dataclass(frozen=True)
class Reply:
    """What a handler answers."""

    body: bytes
    content_type: str
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


Handler = Callable[[Request], Reply]


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """A reply that says ``value``."""
    return Reply(json.dumps(value, allow_nan=False).encode(), "application/json", status, dict(headers or {}))


class Server:
    """Listens on a socket and hands requests to functions.

    Args:
      routes: ``"GET /health"`` -> function. A path that ends in "/" stands for all that begin with it, but "/" itself.
      host: address to listen on. Any but this machine's own (127.0.0.1, ::1, localhost) needs a token.
      port: 0 takes a free one.
      token: what clients must send as ``Authorization: Bearer <token>``; empty = what the environment variable
        ``DDPO_TOKEN`` says; if that is empty too, none is asked for.
      flag: what ``host``, ``port`` and ``token`` are called in messages comes after this: "--" or "reward.".
      public: routes that need no token.
      max_bytes: of a request's body; a larger one is refused.
      threads: requests that are handled at the same time.

    Raises:
      InputError: one of them cannot be had.
    """

    def __init__(
        self,
        routes: Mapping[str, Handler],
        *,
        host: str,
        port: int,
        token: str = "",
        flag: str = "--",
        public: Iterable[str] = (),
        max_bytes: int = MEGABYTE,
        threads: int = 4,
    ):
        waitress, self._wasyncore = _library()
        self._routes, self._public, self._max_bytes = dict(routes), frozenset(public), max_bytes
        self._token = token_or_environment(token, f"{flag}token")
        if not self._token and not is_loopback(host):
            raise InputError(
                f"{flag}host: received {host!r} without a token; whoever reaches this machine could use the server; "
                f"give one, such as {flag}token={secrets.token_urlsafe(12)}, or {flag}host=127.0.0.1"
            )
        listening = _listen(host, port, flag)
        self.port: int = listening.getsockname()[1]
        self._host = host
        self._map: dict[int, Any] = {}
        # A body a little above our limit is read and answered in JSON; waitress itself refuses larger ones. All are on
        # disk before a token is looked at.
        limits = {"max_request_body_size": max_bytes + MEGABYTE, "connection_limit": _CONNECTIONS}
        self._server = waitress.create_server(
            self._application,
            map=self._map,
            sockets=[listening],
            threads=threads,
            channel_request_lookahead=1,  # so that a client that hangs up is noticed
            log_socket_errors=False,
            ident=None,
            **limits,
        )
        self._closing, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name="http", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where it can be reached; a server on every address is named by this machine's name."""
        host = socket.gethostname() if self._host in ("0.0.0.0", "::", "") else self._host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def token(self) -> str:
        """What clients must send; empty if nothing."""
        return self._token

    def close(self, grace_s: float = 10.0) -> None:
        """Refuses new requests, waits at most ``grace_s`` seconds for those that run, and frees the port."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._server.task_dispatcher.shutdown(timeout=grace_s)
        self._stop.set()
        self._server.pull_trigger()  # writes to a pipe of the map, which is therefore closed here and not by the loop
        self._thread.join()
        self._wasyncore.close_all(self._map, ignore_all=True)

    def _loop(self) -> None:
        while not self._stop.is_set():
            self._wasyncore.loop(timeout=1.0, use_poll=True, map=self._map, count=1)

    def _application(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        """The WSGI application: whatever happens becomes a reply."""
        try:
            reply = self._answer(environ)
        except Refusal as refusal:
            reply = json_reply({"error": str(refusal)}, refusal.status, refusal.headers)
        except Exception as error:  # a defect of a handler must not end the server
            logging.exception("%s %s failed", environ["REQUEST_METHOD"], environ["PATH_INFO"])
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            reply = json_reply({"error": cause}, 500)
        headers = {
            "Content-Type": reply.content_type,
            "Content-Length": str(len(reply.body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            **reply.headers,
        }
        start_response(f"{reply.status} {HTTPStatus(reply.status).phrase}", list(headers.items()))
        return [reply.body]

    def _answer(self, environ: dict[str, Any]) -> Reply:
        if self._closing.is_set():
            raise Refusal(503, "the server is shutting down", {"Connection": "close"})
        # WSGI hands the bytes of the path over as latin-1.
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"].encode("latin-1").decode("utf-8", "replace")
        route = self._route(method, path)
        if route not in self._public:
            self._check_caller(environ)
        length = int(environ.get("CONTENT_LENGTH") or 0)
        if length > self._max_bytes:
            raise Refusal(413, f"the body has {length} bytes; at most {self._max_bytes} are taken; send fewer images")
        kind = environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json":
            # Browsers let a page of any site post other types here without asking.
            raise Refusal(415, f"the Content-Type is {kind or 'missing'}; it must be application/json")
        query = dict(urllib.parse.parse_qsl(environ.get("QUERY_STRING", ""), keep_blank_values=True))
        gone = environ.get("waitress.client_disconnected", lambda: False)
        return self._routes[route](Request(path, query, environ["wsgi.input"].read(length), gone))

    def _route(self, method: str, path: str) -> str:
        names = [name for name in self._routes if _matches(name.partition(" ")[2], path)]
        for name in names:
            if name.startswith(f"{method} "):
                return name
        if not names:
            raise Refusal(404, f"there is no {path!r} here; there is {', '.join(self._routes)}")
        allowed = ", ".join(name.partition(" ")[0] for name in names)
        raise Refusal(405, f"{path} takes {allowed}; received {method}", {"Allow": allowed})

    def _check_caller(self, environ: dict[str, Any]) -> None:
        if self._token:
            scheme, _, given = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
            known = hmac.compare_digest(given.strip().encode("latin-1", "replace"), self._token.encode())
            if scheme.lower() != "bearer" or not known:
                raise Refusal(401, "the token is missing or wrong", {"WWW-Authenticate": "Bearer"})
        elif not is_loopback(urllib.parse.urlsplit(f"//{environ.get('HTTP_HOST', '')}").hostname or ""):
            # A page elsewhere may have its own name point at 127.0.0.1: the browser then takes us for its own.
            raise Refusal(403, f"the Host is {environ.get('HTTP_HOST')!r}; without a token only localhost is answered")


def token_or_environment(token: str, key: str) -> str:
    """``token``, or if that is empty what the environment variable ``DDPO_TOKEN`` says, in which nobody reads it.

    Raises:
      InputError: a header of HTTP cannot hold it; ``key`` is what the token is called.
    """
    key, token = (key, token) if token else (TOKEN_VARIABLE, os.environ.get(TOKEN_VARIABLE, ""))
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise InputError(f"{key}: received a token with spaces or unusual characters; use letters and digits")
    return token


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine's own address, which others cannot reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _matches(pattern: str, path: str) -> bool:
    return path == pattern or (pattern.endswith("/") and pattern != "/" and path.startswith(pattern))


def _library() -> tuple[Any, Any]:
    try:
        import waitress  # here: an extra
        from waitress import wasyncore
    except ImportError as error:
        raise InputError(
            "serving over HTTP needs the library waitress, which is not installed; pip install 'ddpo_jax[serve]'"
        ) from error
    for name in ("waitress", "waitress.queue"):
        std_logging.getLogger(name).setLevel(std_logging.ERROR)  # that requests queue up is our business
    return waitress, wasyncore


def _listen(host: str, port: int, flag: str) -> socket.socket:
    if not 0 <= port < 65536:
        raise InputError(f"{flag}port: received {port}; it must be from 0 (any free one) to 65535; use 8000")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            free = port + 1 if port < 65535 else 0
            raise InputError(
                f"{flag}port: received {port}; another program on this machine listens there; "
                f"stop it or use another, such as {flag}port={free}"
            ) from error
        if error.errno == errno.EACCES:
            raise InputError(f"{flag}port: received {port}; it is reserved for the system; use 8000") from error
        cause = error.strerror or str(error)
        raise InputError(f"{flag}host: received {host!r}; cannot listen there: {cause}; use 127.0.0.1") from error
