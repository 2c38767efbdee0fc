"""Stand-ins for the models that rewards reach from outside: functions for ``tiny_models:NAME``, and a small server.

What they see follows from the image alone: two words by its brightness, one box in its lighter half.
"""

import base64
import http.server
import io
import json
import threading

import numpy as np
import PIL.Image

WORDS = ("a red cat", "two green dogs", "three cups", "the sky", "nothing")


def _words(image):
    return WORDS[int(image.mean()) % len(WORDS)]


def read(images):
    """A text recogniser: the text in each image."""
    return [_words(image) for image in images]


def answer(images, question):
    """A vision-language model: its answer for each image."""
    return [f"{_words(image)} {len(question)}" for image in images]


def encode(texts):
    """A text encoder: (embeddings f32[L, 4], weights f32[L]) of each text, a token a word, the last one a full stop."""
    out = []
    for text in texts:
        tokens = [*text.split(), "."]
        rows = [np.random.default_rng(list(token.encode())).normal(size=4) for token in tokens]
        out.append((np.array(rows, np.float32), np.array([1.0] * (len(tokens) - 1) + [0.0], np.float32)))
    return out


def detect(images):
    """A detector: one circle per image, in its lighter half."""
    found = []
    for image in images:
        half = image.shape[1] // 2
        left = image[:, :half].mean() >= image[:, half:].mean()
        found.append([("circle", 0.9, (0, 0, half, half) if left else (half, 0, 2 * half, half))])
    return found


class Server:
    """``with Server(reply) as server``: answers every POST to ``server.url`` with what ``reply(payload)`` returns.

    ``reply`` returns an object for JSON, bytes for a raw body, or an int for a status without one. What was asked is in
    ``asked``.
    """

    def __init__(self, reply):
        asked = self.asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):  # noqa: N802  (the name that http.server calls)
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked.append(payload)
                answer = reply(payload)
                status = answer if isinstance(answer, int) else 200
                body = b"" if isinstance(answer, int) else answer
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if isinstance(answer, bytes) else "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/look"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


def images_of(payload):
    """The images of a request."""
    return [np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(text)))) for text in payload["image"]]
