"""The patient JSON client, against servers that refuse, stumble, lie, dawdle and die."""

import contextlib
import email.utils
import http.server
import json
import socket
import threading
import time
import types

import pytest

from ddpo_jax.errors import InputError
from ddpo_jax.rewards._shared import http as _http
from ddpo_jax.rewards._shared.http import HttpError, JsonClient, Retry

JSON = {"Content-Type": "application/json"}


class Clock:
    """Time that passes only in ``sleep``, and at every look."""

    def __init__(self, per_look=0.0):
        self.now, self.per_look, self.slept = 100.0, per_look, []

    def __call__(self):
        self.now += self.per_look
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


@contextlib.contextmanager
def scripted(*replies):
    """A server of the standard library that gives these (status, headers, body) in turn, the last one for ever.

    A function in their place gets the handler. ``requests`` of what is yielded are (method, path, headers, body).
    """
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            seen.append((self.command, self.path, self.headers, body))
            reply = replies[min(len(seen), len(replies)) - 1]
            if callable(reply):
                reply(self)
                return
            status, headers, content = reply
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for key, value in {"Content-Length": len(content), **headers}.items():
                self.send_header(key, str(value))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = answer

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield types.SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", requests=seen)
    finally:
        server.shutdown()
        server.server_close()


def client(url, clock=None, **options):
    clock = clock or Clock()
    settings = {"key": "reward.url", "timeout_s": 5.0, "patience_s": 60.0} | options
    return JsonClient(url, clock=clock, sleep=clock.sleep, **settings)


def same(body):
    return body


@pytest.fixture
def log(monkeypatch):
    lines = []

    def note(text, *args):
        lines.append(text % args)

    monkeypatch.setattr(_http, "logging", types.SimpleNamespace(info=note, warning=note))
    return lines


def test_what_is_sent():
    with scripted((200, JSON, {"ok": 1})) as server:
        assert client(f"{server.url}/base/", token="secret").post("/compute", {"a": ["ä"]}, same) == {"ok": 1}
        assert client(server.url).get("/health") == {"ok": 1}
        (method, path, headers, body), (second, health, bare, _) = server.requests
        assert (method, path, json.loads(body)) == ("POST", "/base/compute", {"a": ["ä"]})
        assert (headers["Content-Type"], headers["Authorization"]) == ("application/json", "Bearer secret")
        assert (second, health, bare["Authorization"]) == ("GET", "/health", None)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 599])
def test_passing_faults_are_repeated_after_times_that_double(status, log):
    clock = Clock()
    fault = (status, JSON, {"error": "busy\nnow"})
    with scripted(*[fault] * 7, (200, JSON, [1])) as server:
        assert client(server.url, clock).post("/x", {}, same) == [1]
    assert clock.slept == [0.5, 1, 2, 4, 8, 16, 28.5]
    assert log[0] == (
        f"waiting for {server.url}, which answered {status}: busy now; next try in 0.5 s, giving up in 60 s"
    )
    assert log[-1] == f"{server.url} answers again, after 60 s"


def test_patience_bounds_all_tries_together():
    clock = Clock()
    with scripted((503, JSON, {"error": "busy"})) as server:
        with pytest.raises(HttpError) as caught:
            client(server.url, clock, patience_s=100.0).post("/x", {}, same)
        assert clock.slept == [0.5, 1, 2, 4, 8, 16, 30, 30, 8.5]  # the last try begins when patience is over
        assert len(server.requests) == 10
    assert str(caught.value) == f"{server.url} answered 503: busy; tried 10 times in 100 s"


def test_no_patience_is_one_try():
    with scripted((500, JSON, {"error": "no"})) as server:
        with pytest.raises(HttpError, match="answered 500: no; tried once in 0 s"):
            client(server.url, patience_s=0.0).post("/x", {}, same)
        with pytest.raises(HttpError, match="answered 500: no$"):
            client(server.url).get("/health")  # is never repeated
        assert len(server.requests) == 2


def test_retry_after_is_honoured_within_patience():
    clock = Clock()
    at = email.utils.formatdate(time.time() + 20, usegmt=True)
    replies = [(429, JSON | {"Retry-After": value}, {"error": "x"}) for value in ("7", at, "soon", "0")]
    with scripted(*replies, (200, JSON, 1)) as server:
        assert client(server.url, clock).post("/x", {}, same) == 1
    assert clock.slept[0] == 7 and 15 < clock.slept[1] <= 20 and clock.slept[2:] == [2, 4]
    with scripted((429, JSON | {"Retry-After": "3600"}, {"error": "x"})) as server:
        with pytest.raises(HttpError, match="asks to wait 3600 s, longer than the 60 s left"):
            client(server.url).post("/x", {}, same)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((400, JSON, {"error": "image 0 is not base64"}), r"answered 400: image 0 is not base64$"),
        ((401, JSON, {"error": "the token is missing or wrong"}), "answered 401: the token"),
        ((404, {"Content-Type": "text/html"}, b"<h1>Not\nfound</h1>"), "answered 404: <h1>Not found</h1>"),
        ((413, {"Content-Type": "text/plain"}, b""), "answered 413$"),
        ((302, {"Location": "https://x.example/"}, b""), "answered 302 and points to https://x.example/"),
        ((400, JSON, {"error": "x" * 500}), "answered 400: " + "x" * 200 + r"\.\.\.$"),
        ((400, {}, bytes(range(1, 60))), r"answered 400: [\x21-\x7e ]+$"),
    ],
)
def test_lasting_faults_are_told_at_once(reply, message):
    with scripted(reply) as server:
        with pytest.raises(HttpError, match=message) as caught:
            client(server.url).post("/x", {}, same)
        assert str(caught.value).startswith(server.url) and "\n" not in str(caught.value)
        assert len(server.requests) == 1


LIES = [
    ((200, {"Content-Type": "text/html; charset=utf-8"}, b"<!doctype html>\n<title>Welcome</title>"),
     "answered text/html instead of application/json: <!doctype html> <title>Welcome</title>"),
    ((200, {}, b"{}"), "answered no Content-Type instead of application/json"),
    ((200, JSON, b'{"rewards": [1'), r"answered what is not JSON: {\"rewards\": \[1"),
    ((200, JSON, b"[" * 100000), r"answered what is not JSON: \["),
    ((200, JSON, b"\xff\xfe"), "answered what is not JSON"),
    ((200, JSON, b" " * 1001), "answered more than 1000 bytes"),
    ((200, JSON | {"Content-Length": 50}, b"{}"), "cannot be reached: its answer broke off"),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "message"), LIES)
def test_an_answer_that_cannot_be_right_is_asked_for_again_and_then_told(reply, message, monkeypatch, log):
    monkeypatch.setattr(_http, "MAX_REPLY_BYTES", 1000 if b" " * 1001 in reply else _http.MAX_REPLY_BYTES)
    clock = Clock()
    with scripted(reply, reply, (200, JSON, 1)) as server:
        assert client(server.url, clock).post("/x", {}, same) == 1
        assert clock.slept == [0.5, 1]
    with scripted(reply) as server:
        with pytest.raises(HttpError, match=f"{message}.*; tried 2 times in 0 s") as caught:
            client(server.url, Clock(), patience_s=0.3).post("/x", {}, same)
        assert "\n" not in str(caught.value)


def test_what_the_caller_does_not_believe_is_asked_for_again():
    def read(body):
        if body != [2]:
            raise Retry(f"answered {body}")
        return "two"

    with scripted((200, JSON, [0]), (200, JSON, [1]), (200, JSON, [2])) as server:
        assert client(server.url).post("/x", {}, read) == "two"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def hang_up(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)


def speak_no_http(handler):
    handler.wfile.write(b"SSH-2.0-OpenSSH\r\n\r\n")


@pytest.mark.parametrize(
    ("server", "message"),
    [
        (None, "cannot be reached: Connection refused"),
        (hang_up, "cannot be reached: (its answer broke off|Connection reset)"),
        (speak_no_http, "cannot be reached: its answer broke off or is not HTTP"),
    ],
)
def test_no_server_and_servers_that_die(server, message):
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(scripted(server)).url if server else f"http://127.0.0.1:{free_port()}"
        with pytest.raises(HttpError, match=message):
            client(url, patience_s=2.0).post("/x", {}, same)


def test_a_server_that_is_slow_is_mentioned_and_then_given_up(monkeypatch, log):
    monkeypatch.setattr(_http, "FIRST_NOTICE_S", 0.1)
    go = threading.Event()
    with scripted(lambda handler: go.wait(20)) as server:
        start = time.monotonic()
        with pytest.raises(HttpError, match="gave no answer within 0.6 s; tried once"):
            client(server.url, timeout_s=0.6, patience_s=0.0).post("/x", {}, same)
        assert 0.5 < time.monotonic() - start < 5
        go.set()
    waits = [float(line.split(" after ")[1].split()[0]) for line in log]
    assert [line.split(":")[0] for line in log] == ["waiting for http"] * len(log)
    assert len(waits) == 3 and waits[0] >= 0.1 and waits[1] >= 0.2 and waits[2] >= 0.4


def test_a_server_that_trickles_is_given_up_as_well():
    """A byte every now and then resets the time-out of a socket, but not ours."""

    def trickle(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(200):
                handler.wfile.write(b" ")
                handler.wfile.flush()
                time.sleep(0.05)

    with scripted(trickle) as server:
        start = time.monotonic()
        with pytest.raises(HttpError, match="gave no answer within 0.5 s"):
            client(server.url, timeout_s=0.5, patience_s=0.0).post("/x", {}, same)
        assert time.monotonic() - start < 5


@pytest.mark.parametrize("where", ["sleep", "answer"])
def test_close_lets_go_of_what_is_waited_for(where):
    go = threading.Event()
    reply = (503, JSON, {}) if where == "sleep" else lambda handler: go.wait(20)
    with scripted(reply) as server:
        patient = JsonClient(server.url, key="url", timeout_s=30, patience_s=1000)
        raised = []

        def ask():
            with pytest.raises(HttpError) as caught:
                patient.post("/x", {}, same)
            raised.append(str(caught.value))

        asking = threading.Thread(target=ask)
        asking.start()
        while not server.requests:
            time.sleep(0.01)
        patient.close()
        asking.join(10)
        go.set()
        assert len(raised) == 1 and "no longer waited for" in raised[0]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "it must be the address of a server, http:// or https://; use http://127.0.0.1:8000"),
        ("ftp://x/", "it must be the address"),
        ("http://", "it must be the address"),
        ("", "it must be the address"),
        ("http://a b/", "it must be the address"),
        ("http://x:99999", "Port out of range"),
        ("http://[::1", "Invalid IPv6"),
        ("http://a..b/", "label"),
        ("http://me:pw@x/y", "without user, '\\?' and '#'; use reward.url=http://x:80/y"),
        ("http://x/?a=1", "without user"),
    ],
)
def test_addresses_that_are_none(url, message):
    with pytest.raises(InputError, match=message) as caught:
        client(url)
    assert str(caught.value).startswith("reward.url: received ") and "\n" not in str(caught.value)
