"""The HTTP server: limits, token, foreign pages, faults of handlers, ports, and how it ends."""

import socket
import sys
import threading
import time

import http_tools
import pytest
from http_tools import ask

from ddpo_jax.errors import InputError
from ddpo_jax.serving.server import Refusal, Reply, Server, is_loopback, json_reply


def fails(request):
    raise KeyError("two\nlines")


def refuses(request):
    raise Refusal(418, "no coffee", {"X-Why": "tea"})


ROUTES = {
    "GET /": lambda request: Reply(b"<p>page</p>", "text/html"),
    "GET /echo": lambda request: json_reply(request.query),
    "POST /echo": lambda request: json_reply(request.json()),
    "GET /files/": lambda request: json_reply(request.path),
    "GET /fails": fails,
    "GET /refuses": refuses,
}


def start(**options):
    return Server(ROUTES, **{"host": "127.0.0.1", "port": 0, "max_bytes": 1000, "public": ("GET /",)} | options)


@pytest.fixture(scope="module")
def server():
    server = start()
    yield server
    server.close()


def test_routes(server):
    assert ask(f"{server.url}/")[2] == b"<p>page</p>"
    assert ask(f"{server.url}/echo?a=1&b=%C3%A4&a=2")[2] == {"a": "2", "b": "ä"}
    status, headers, body = ask(f"{server.url}/echo", "POST", {"x": [1, None, "ä"]})
    assert (status, body, headers["Cache-Control"]) == (200, {"x": [1, None, "ä"]}, "no-store")
    assert ask(f"{server.url}/files/a/../b%20c")[2] == "/files/a/../b c"


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "message"),
    [
        ("GET", "/nowhere", None, {}, 404, "there is no '/nowhere' here; there is GET /, "),
        ("GET", "/echo/", None, {}, 404, "there is no '/echo/'"),
        ("DELETE", "/echo", None, {}, 405, "/echo takes GET, POST; received DELETE"),
        ("POST", "/echo", b"{", {"Content-Type": "application/json"}, 400, "the body is not JSON"),
        ("POST", "/echo", b"\xff{}", {"Content-Type": "application/json"}, 400, "the body is not JSON"),
        ("POST", "/echo", b"[" * 999, {"Content-Type": "application/json"}, 400, "the body is not JSON"),
        ("POST", "/echo", b"{}", {"Content-Type": "text/plain"}, 415, "the Content-Type is text/plain"),
        ("POST", "/echo", b"{}", {}, 415, "the Content-Type is missing"),
        ("POST", "/echo", b" " * 1001, {"Content-Type": "application/json"}, 413, "1001 bytes; at most 1000"),
        ("GET", "/echo", None, {"Host": "evil.example:80"}, 403, "the Host is 'evil.example:80'"),
        ("GET", "/fails", None, {}, 500, r"KeyError: 'two\nlines'"),
        ("GET", "/refuses", None, {}, 418, "no coffee"),
    ],
)
def test_faults_are_json_in_one_line_and_the_server_goes_on(server, method, path, body, headers, status, message):
    received, _, reply = ask(f"{server.url}{path}", method, body, headers)
    assert received == status and message in reply["error"] and "\n" not in reply["error"]
    assert ask(f"{server.url}/echo?still=here")[0] == 200


def test_a_refusal_carries_its_headers(server):
    assert ask(f"{server.url}/refuses")[1]["X-Why"] == "tea"
    assert ask(f"{server.url}/echo", "PUT")[1]["Allow"] == "GET, POST"


def test_this_machine_by_any_of_its_names(server):
    for host in ("localhost:1", "127.0.0.1", "[::1]:80"):
        assert ask(f"{server.url}/echo", headers={"Host": host})[0] == 200
    assert [is_loopback(host) for host in ("127.0.0.9", "::1", "localhost", "0.0.0.0", "::", "10.1.2.3", "a.b")] == [
        *(True, True, True, False, False, False, False)
    ]


def test_with_a_token_nothing_but_the_page_is_given_without_it(monkeypatch):
    monkeypatch.setenv("DDPO_TOKEN", "from-the-environment")
    for options, token in (({"token": "secret", "host": "0.0.0.0"}, "secret"), ({}, "from-the-environment")):
        server = start(**options)
        url = f"http://127.0.0.1:{server.port}"
        assert ask(f"{url}/")[0] == 200
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": token}):
            status, headers, reply = ask(f"{url}/echo", headers=given)
            assert (status, headers["WWW-Authenticate"]) == (401, "Bearer") and "token" in reply["error"]
        given = {"Authorization": f"Bearer {token}", "Host": "reward.example"}
        assert ask(f"{url}/echo", headers=given)[0] == 200
        server.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, r"reward.host: received '0.0.0.0' without a token; .*reward.token=\S{10,}, or"),
        ({"host": "999.1.1.1", "token": "t"}, "reward.host: received '999.1.1.1'; cannot listen there"),
        ({"host": "192.0.2.1", "token": "t"}, "reward.host: received '192.0.2.1'; cannot listen there"),
        ({"port": 70000}, "reward.port: received 70000; it must be from 0"),
        ({"port": -1}, "reward.port: received -1"),
        ({"token": "two words"}, "reward.token: received a token with spaces"),
        ({"token": "zwölf"}, "reward.token: received a token with spaces or unusual"),
    ],
)
def test_what_cannot_be_had_is_one_line(options, message):
    with pytest.raises(InputError, match=message) as caught:
        start(flag="reward.", **options)
    assert "\n" not in str(caught.value)


def test_a_port_in_use_is_one_line(server):
    with pytest.raises(
        InputError, match=rf"--port: received {server.port}; another program .* --port={server.port + 1}"
    ):
        start(port=server.port)


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "waitress", None)
    with pytest.raises(InputError, match=r"waitress, which is not installed; pip install 'ddpo_jax\[serve\]'"):
        start()


def test_closing_waits_for_what_runs_refuses_the_rest_and_frees_the_port():
    entered, go = threading.Event(), threading.Event()

    def slow(request):
        entered.set()
        go.wait(10)
        return json_reply("done")

    server = Server({"GET /slow": slow, "GET /quick": lambda request: json_reply(1)}, host="127.0.0.1", port=0)
    results = []
    asking = threading.Thread(target=lambda: results.append(ask(f"{server.url}/slow")[::2]))
    asking.start()
    assert entered.wait(10)
    closing = threading.Thread(target=server.close)
    closing.start()
    time.sleep(0.1)
    assert closing.is_alive() and results == []  # it waits for the request
    go.set()
    closing.join(10)
    asking.join(10)
    assert results == [(200, "done")]
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", server.port), timeout=1)
    again = start(port=server.port)
    assert ask(f"{again.url}/echo")[0] == 200
    again.close()
    server.close()  # twice does nothing


def test_servers_come_and_go():
    """The end of a server's thread and of its files do not get into each other's way."""
    for _ in range(50):
        start().close()


def test_closing_does_not_wait_for_ever():
    entered, go = threading.Event(), threading.Event()

    def hangs(request):
        entered.set()
        go.wait(30)
        return json_reply(1)

    server = Server({"GET /": hangs}, host="127.0.0.1", port=0)
    asking = threading.Thread(target=lambda: pytest.raises(OSError, http_tools.ask, server.url), daemon=True)
    asking.start()
    assert entered.wait(10)
    start_time = time.monotonic()
    server.close(grace_s=0.2)
    assert time.monotonic() - start_time < 5
    go.set()
