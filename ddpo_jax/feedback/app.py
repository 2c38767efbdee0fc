"""The web page on which people rate images, and what it talks to.

``GET /`` is the page, one file that loads nothing from elsewhere; ``GET /next``, ``GET /images/NAME.png``,
``POST /answer`` and ``POST /undo`` are its questions and answers in JSON.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

from ddpo_jax.feedback import answers
from ddpo_jax.feedback.queue import Queue
from ddpo_jax.serving.server import Refusal, Reply, Request, Server, json_reply

PAGE = pathlib.Path(__file__).with_name("page.html")
# The browser itself then refuses to load anything from elsewhere.
_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src blob: data:; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_MAX_NAME = 80  # characters of a person's or a page's name


def serve(queue: Queue, *, host: str, port: int, token: str, flag: str) -> Server:
    """Serves the page of a queue; ``host``, ``port``, ``token`` and ``flag`` are those of ``Server``.

    Raises:
      InputError: the port cannot be had, or the host needs a token.
    """
    html = Reply(PAGE.read_bytes(), "text/html; charset=utf-8", headers={"Content-Security-Policy": _POLICY})
    routes = {
        "GET /": lambda request: html,
        "GET /next": lambda request: json_reply(queue.next(_text(request.query, "page"))),
        "GET /images/": lambda request: _image(queue, request),
        "POST /answer": lambda request: _answer(queue, request),
        "POST /undo": lambda request: _undo(queue, request),
    }
    return Server(routes, host=host, port=port, token=token, flag=flag, public=("GET /",), threads=8)


def address(server: Server) -> str:
    """What a person opens; a token stands behind the "#", which browsers send to nobody."""
    return f"{server.url}/#token={server.token}" if server.token else server.url


def _image(queue: Queue, request: Request) -> Reply:
    name = request.path.removeprefix("/images/")
    path = queue.folder / answers.IMAGES / name
    if not re.fullmatch(r"[0-9a-f]{64}\.png", name) or not path.is_file():
        raise Refusal(404, "there is no such image")
    return Reply(path.read_bytes(), "image/png", headers={"Cache-Control": "private, max-age=3600"})


def _answer(queue: Queue, request: Request) -> Reply:
    body = _object(request)
    page, rater, key = (_text(body, name) for name in ("page", "rater", "id"))
    if "value" not in body:
        raise Refusal(400, "'value' is missing")
    try:
        return json_reply(queue.answer(page, rater, key, body["value"]))
    except OSError as error:
        raise _not_saved(queue, error) from error


def _undo(queue: Queue, request: Request) -> Reply:
    try:
        return json_reply(queue.undo(_text(_object(request), "page")))
    except OSError as error:
        raise _not_saved(queue, error) from error


def _not_saved(queue: Queue, error: OSError) -> Refusal:
    return Refusal(507, f"the answer cannot be saved in {queue.folder}: {error.strerror or error}")


def _object(request: Request) -> dict[str, Any]:
    body = request.json()
    if not isinstance(body, dict):
        raise Refusal(400, "the body must be a JSON object")
    return body


def _text(body: dict[str, Any], key: str) -> str:
    value = body.get(key)
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_NAME or not value.isprintable():
        raise Refusal(400, f"{key!r} must be text of 1 to {_MAX_NAME} characters")
    return value
