"""A small Google Cloud Storage on this machine: the part of its JSON API that gcsfs, tensorstore and orbax speak.

Objects are in memory; nothing is checked of who asks. ``Bucket.clients`` is the environment in which they come here;
``GOOGLE_APPLICATION_CREDENTIALS`` must not be in it.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import http.server
import itertools
import json
import re
import threading
import urllib.parse

OBJECT = re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)")


class Refused(Exception):
    """An answer other than what was asked for; its arguments are the status and the reason."""


class Bucket:
    """One bucket and its server.

    Attributes:
      name: of the bucket.
      objects: content of every object by its name; a test may change it.
      allow: called with method and name (of the object, or the prefix of a list) before anything is done; it may raise
        ``Refused(403, "...")``, or do something else first.
      asked: method and path of every request.
    """

    def __init__(self, name: str = "bucket"):
        self.name = name
        self.objects: dict[str, bytes] = {}
        self.allow = lambda method, name: None
        self.asked: list[str] = []
        self._generations: dict[str, int] = {}
        self._next = itertools.count(1)
        self._uploads: dict[str, tuple[str, bytearray]] = {}
        self._lock = threading.RLock()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"bucket": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def reset(self) -> None:
        """Empties it and allows everything."""
        with self._lock:
            self.objects.clear()
            self.asked.clear()
            self.allow = lambda method, name: None

    def clients(self) -> dict[str, str]:
        """The environment in which gcsfs, google-cloud-storage and tensorstore ask this server, as nobody."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GCE_METADATA_ROOT": self.url.removeprefix("http://"),  # which answers 404: this is no machine of theirs
            "GCE_METADATA_HOST": self.url.removeprefix("http://"),
            "NO_GCE_CHECK": "true",
            "CLOUDSDK_CONFIG": "/nowhere",  # nor is anybody logged in
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would ask over gRPC what kind of bucket this is
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def under(self, prefix: str) -> list[str]:
        """Names of the objects that start so."""
        with self._lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    # ---- what the server does ----

    def put(self, name: str, data: bytes, query: dict[str, str]) -> dict[str, str]:
        with self._lock:
            self._check(name, query)
            self.objects[name] = bytes(data)
            self._generations[name] = next(self._next)
            return self.about(name)

    def get(self, name: str, query: dict[str, str]) -> bytes:
        with self._lock:
            self._there(name)
            self._check(name, query, unchanged=304)
            return self.objects[name]

    def remove(self, name: str, query: dict[str, str]) -> None:
        with self._lock:
            self._there(name)
            self._check(name, query)
            del self.objects[name]

    def copy(self, source: str, target: str) -> dict[str, str]:
        with self._lock:
            return self.put(target, self.get(source, {}), {})

    def about(self, name: str) -> dict[str, str]:
        with self._lock:
            self._there(name)
            data = self.objects[name]
            return {
                "kind": "storage#object",
                "name": name,
                "bucket": self.name,
                "size": str(len(data)),
                "generation": str(self._generations.setdefault(name, next(self._next))),
                "metageneration": "1",
                "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
                "updated": "2024-01-01T00:00:00.000Z",
                "timeCreated": "2024-01-01T00:00:00.000Z",
            }

    def list(self, query: dict[str, str]) -> dict[str, object]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        with self._lock:
            items, prefixes = [], []
            for name in sorted(self.objects):
                if not name.startswith(prefix) or name < query.get("startOffset", ""):
                    continue
                if "endOffset" in query and name >= query["endOffset"]:
                    continue
                rest = name[len(prefix) :]
                if delimiter and delimiter in rest:
                    folder = prefix + rest.partition(delimiter)[0] + delimiter
                    if folder not in prefixes:
                        prefixes.append(folder)
                else:
                    items.append(self.about(name))
            first, most = int(query.get("pageToken", 0)), int(query.get("maxResults", 1000))
            reply = {"kind": "storage#objects", "items": items[first : first + most]}
            if first == 0 and prefixes:
                reply["prefixes"] = prefixes
            if first + most < len(items):
                reply["nextPageToken"] = str(first + most)
            return reply

    def begin(self, name: str) -> str:
        with self._lock:
            number = str(next(self._next))
            self._uploads[number] = (name, bytearray())
            return number

    def part(self, number: str, data: bytes, span: str) -> dict[str, object] | None:
        """A chunk of a resumable upload; of the last one what was made."""
        with self._lock:
            name, content = self._uploads[number]
            content += data
            if span.endswith("/*"):
                return None
            return self.put(name, bytes(content), {})

    def _there(self, name: str) -> None:
        if name not in self.objects:
            raise Refused(404, f"No such object: {self.name}/{name}")

    def _check(self, name: str, query: dict[str, str], unchanged: int = 412) -> None:
        """Preconditions: a generation that the object must have, or must not; 0 is that of one that is not there."""
        now = self._generations.setdefault(name, next(self._next)) if name in self.objects else 0
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != now:
            raise Refused(412, "conditionNotMet")
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == now:
            raise Refused(unchanged, "not modified")


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 100

    def handle_error(self, *_: object) -> None:
        """A client that does not wait for its answer, as gcsfs does which asks for a file and a folder at once."""


class _Handler(http.server.BaseHTTPRequestHandler):
    bucket: Bucket
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        self.bucket.asked.append(f"{self.command} {self.path}")
        try:
            self._do(url.path, query, body)
        except Refused as refusal:
            status, reason = refusal.args
            error = {"error": {"code": status, "message": reason, "errors": [{"reason": reason, "message": reason}]}}
            self._send(status, json.dumps(error).encode() if status != 304 else b"")

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _answer

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline().split(b";")[0], 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def _send(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode())

    def _do(self, path: str, query: dict[str, str], body: bytes) -> None:
        path = path.removeprefix("/download")
        if path == f"/storage/v1/b/{self.bucket.name}":
            self.bucket.allow("BUCKET", "")
            return self._json({"kind": "storage#bucket", "name": self.bucket.name, "location": "HERE"})
        if path == f"/storage/v1/b/{self.bucket.name}/o":
            self.bucket.allow("LIST", query.get("prefix", ""))
            return self._json(self.bucket.list(query))
        if path == f"/upload/storage/v1/b/{self.bucket.name}/o":
            return self._upload(query, body)
        found = OBJECT.match(path)
        if not found or urllib.parse.unquote(found[1]) != self.bucket.name:
            raise Refused(404, f"Not found: {path}")
        name, rest = urllib.parse.unquote(found[2]), path[found.end() :]
        self.bucket.allow("PUT" if rest else self.command, name)
        if to := re.match(r"/rewriteTo/b/[^/]+/o/([^/]+)$", rest):
            made = self.bucket.copy(name, urllib.parse.unquote(to[1]))
            return self._json({"kind": "storage#rewriteResponse", "done": True, "resource": made})
        if to := re.match(r"/moveTo/o/([^/]+)$", rest):
            made = self.bucket.copy(name, urllib.parse.unquote(to[1]))
            self.bucket.remove(name, {})
            return self._json(made)
        if self.command == "DELETE":
            self.bucket.remove(name, query)
            return self._send(204)
        if query.get("alt") != "media":
            return self._json(self.bucket.about(name))
        data = self.bucket.get(name, query)
        about = self.bucket.about(name)
        headers = {"X-Goog-Generation": about["generation"], "Content-Type": "application/octet-stream"}
        if span := re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("Range", "")):
            first, last = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
            if first > last:
                raise Refused(416, "Requested range not satisfiable")
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self._send(206, data[first : last + 1], **headers)
        return self._send(200, data, **headers)

    def _upload(self, query: dict[str, str], body: bytes) -> None:
        if "upload_id" in query:
            made = self.bucket.part(query["upload_id"], body, self.headers.get("Content-Range", ""))
            return self._json(made) if made else self._send(308)
        if query["uploadType"] == "resumable":
            self.bucket.allow("PUT", query["name"])
            number = self.bucket.begin(query["name"])
            where = f"{self.bucket.url}/upload/storage/v1/b/{self.bucket.name}/o?uploadType=resumable"
            return self._send(200, Location=f"{where}&upload_id={number}")
        self.bucket.allow("PUT", query["name"])
        return self._json(self.bucket.put(query["name"], body, query))


@functools.cache
def bucket() -> Bucket:
    """The one of this process: the clients keep connections to it."""
    return Bucket()
