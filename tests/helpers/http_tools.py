"""Real servers and clients on this machine, for the tests of rewards over HTTP."""

import base64
import contextlib
import http.client
import io
import json
import threading
import time
import urllib.parse

import numpy as np
from PIL import Image

from ddpo_jax.serving.compute import Compute
from ddpo_jax.serving.server import Server


def ask(url, method="GET", body=None, headers=None, timeout=30):
    """(status, headers, body: of JSON what it says, else bytes). A body that is not bytes is sent as JSON."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)
    headers = dict(headers or {})
    if body is not None and not isinstance(body, bytes):
        body, headers = json.dumps(body).encode(), {"Content-Type": "application/json"} | headers
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    connection.request(method, target, body, headers)
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    is_json = reply.headers.get_content_type() == "application/json"
    return reply.status, reply.headers, json.loads(content) if is_json else content


def png(image, mode="RGB", form="PNG"):
    """An image as base64 text, written by Pillow's own means."""
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, format=form)
    return base64.b64encode(buffer.getvalue()).decode()


@contextlib.contextmanager
def served(score, *, port=0, queue=4, token="", max_bytes=10**6, name="test"):
    """A ``Server`` that computes ``score(images, prompts, metadata) -> (scores, parts)``."""
    compute = Compute(score, name, queue)
    server = Server(
        compute.routes(), host="127.0.0.1", port=port, token=token, threads=compute.threads, max_bytes=max_bytes
    )
    try:
        yield server
    finally:
        server.close()


class Rater(threading.Thread):
    """A person in a browser: asks for a question, looks at its images, answers; until ``limit`` answers or ``stop``.

    Args:
      address: of the page.
      value: (question as the server tells it, its images) -> the answer.
      name: of the person.
      limit: answers given.
    """

    def __init__(self, address, value, name="robot", limit=None):
        super().__init__(daemon=True)
        self.address, self.value, self.rater, self.limit = address.rstrip("/"), value, name, limit
        self.asked, self.given, self.faults = [], 0, []
        self._stop_asking = threading.Event()
        self.start()

    def run(self):
        while not self._stop_asking.is_set() and (self.limit is None or self.given < self.limit):
            try:
                _, _, state = ask(f"{self.address}/next?page={self.rater}")
                if state["task"] is None:
                    time.sleep(0.01)
                    continue
                task = state["task"]
                images = [read_png(ask(f"{self.address}/images/{name}.png")[2]) for name in task["images"]]
                self.asked.append(task)
                body = {"page": self.rater, "rater": self.rater, "id": task["id"], "value": self.value(task, images)}
                status, _, reply = ask(f"{self.address}/answer", "POST", body)
                if status == 200:
                    self.given += 1
                else:
                    self.faults.append(reply)
            except OSError:  # the run has ended
                time.sleep(0.02)

    def stop(self):
        self._stop_asking.set()
        self.join(10)


@contextlib.contextmanager
def rated(address, value, count=1, limit=None):
    """``count`` people give ``limit`` answers each while the body runs; gives the list of them."""
    raters = [Rater(address, value, f"robot-{i}", limit) for i in range(count)]
    try:
        yield raters
    finally:
        for rater in raters:
            rater.stop()


def read_png(data):
    """u8[H,W,3] of a PNG."""
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"))


def stars(task, images):
    """1 to 5, which a person might give for contrast."""
    return 1 + int(images[0].std() * 4) % 5
