"""A Google Cloud Storage bucket in memory: as much of the JSON API as gcsfs, google-cloud-storage and TensorStore use.

A test fixture, on loopback only and without credentials. `Server.environment` points the three clients at it.
"""

import base64
import datetime
import hashlib
import http.server
import itertools
import json
import re
import sys
import threading
import urllib.parse
from collections.abc import Callable
from typing import Any, NamedTuple

_ROUTE = re.compile(
    r"(?:/(?P<service>upload|download))?/storage/v1/b/(?P<bucket>[^/]+)(?P<objects>/o(?:/(?P<name>[^/]+)"
    r"(?:/(?P<verb>compose|(?:moveTo|rewriteTo/b/(?P=bucket))/o/(?P<to>[^/]+)))?)?)?"
)
_Answer = tuple[int, dict[str, str], Any]


class Blob(NamedTuple):
    """An object: its bytes, and its resource as the API describes it."""

    data: bytes
    resource: dict[str, Any]


class _RefusedError(Exception):
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Server(http.server.ThreadingHTTPServer):
    """Listens at `url` from construction on, and answers within a `with`; `blobs` are the objects by name.

    Args:
        bucket: the only bucket.
        port: 0 picks a free one.
        before: called with each request's method and path ahead of its effect; may wait, kill the client, or raise
            ConnectionError, which drops the request.
    """

    request_queue_size = 128

    def __init__(self, bucket: str, port: int = 0, before: Callable[[str, str], None] = lambda method, path: None):
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.bucket = bucket
        self.before = before
        self.blobs: dict[str, Blob] = {}
        self.uploads: dict[str, tuple[dict[str, str], str, bytearray]] = {}  # under way: query, content type, bytes
        self.count = itertools.count(1)
        self.lock = threading.Lock()

    def __enter__(self) -> "Server":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def environment(self) -> dict[str, str]:
        """Variables for a process to start with."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,  # gcsfs, google-cloud-storage
            "FSSPEC_GCS": json.dumps({"token": "anon", "use_listings_cache": False}),
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else gcsfs asks by gRPC what kind of bucket it is
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # TensorStore
        }


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet
    disable_nagle_algorithm = True
    server: Server

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.before(self.command, self.path)
        try:
            with self.server.lock:
                status, headers, answer = self._serve(urllib.parse.urlsplit(self.path), body)
        except _RefusedError as refused:
            status, headers = refused.status, {}
            answer = {"error": {"code": status, "message": str(refused)}}
        sent = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        sent = b"" if status in (204, 304) else sent
        self.send_response(status)
        for key, value in ({"Content-Type": "application/json", "Content-Length": str(len(sent))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(sent)

    do_GET = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _serve(self, url: urllib.parse.SplitResult, body: bytes) -> _Answer:
        route = _ROUTE.fullmatch(url.path)
        if not route or route["bucket"] != self.server.bucket:
            raise _RefusedError(404 if route else 400, f"neither emulated nor in {self.server.bucket}: {self.path}")
        query, name = dict(urllib.parse.parse_qsl(url.query)), urllib.parse.unquote(route["name"] or "")
        if not route["objects"]:
            return 200, {}, {"name": self.server.bucket, "storageClass": "STANDARD"}
        if route["service"] == "upload":
            return self._upload(query, body)
        if not name:
            return 200, {}, self._list(query)
        if route["verb"] == "compose":
            parts = [self._blob(part["name"]) for part in json.loads(body)["sourceObjects"]]
            return 200, {}, self._write(name, query, b"".join(part.data for part in parts), "application/octet-stream")
        if route["verb"]:
            blob = self._blob(name)
            copy = self._write(urllib.parse.unquote(route["to"]), query, blob.data, blob.resource["contentType"])
            if route["verb"].startswith("rewriteTo"):
                return 200, {}, {"done": True, "resource": copy}
            del self.server.blobs[name]
            return 200, {}, copy
        self._check(name, query)
        blob = self._blob(name)
        if self.command == "DELETE":
            del self.server.blobs[name]
            return 204, {}, b""
        return self._read(blob) if query.get("alt") == "media" else (200, {}, blob.resource)

    def _read(self, blob: Blob) -> _Answer:
        headers = {"Content-Type": blob.resource["contentType"], "X-Goog-Generation": blob.resource["generation"]}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return 200, headers, blob.data
        first, last = asked.groups()
        size = len(blob.data)
        start = int(first) if first else max(size - int(last), 0)
        stop = min(int(last) + 1, size) if first and last else size
        if start >= size:
            raise _RefusedError(416, f"there are {size} bytes")
        return 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}, blob.data[start:stop]

    def _blob(self, name: str) -> Blob:
        if name not in self.server.blobs:
            raise _RefusedError(404, f"No such object: {name}")
        return self.server.blobs[name]

    def _check(self, name: str, query: dict[str, str]) -> None:
        generation = self.server.blobs[name].resource["generation"] if name in self.server.blobs else "0"
        if query.get("ifGenerationMatch", generation) != generation:
            raise _RefusedError(412, f"generation is {generation}")
        if query.get("ifGenerationNotMatch") == generation:
            raise _RefusedError(304 if self.command == "GET" else 412, f"generation is {generation}")

    def _write(self, name: str, query: dict[str, str], data: bytes, content_type: str) -> dict[str, Any]:
        self._check(name, query)
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        resource = {"kind": "storage#object", "bucket": self.server.bucket, "name": name, "contentType": content_type}
        resource |= {"size": str(len(data)), "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode()}
        resource |= {"generation": str(next(self.server.count)), "metageneration": "1"}
        self.server.blobs[name] = Blob(data, resource | {"updated": now, "timeCreated": now})
        return self.server.blobs[name].resource

    def _upload(self, query: dict[str, str], body: bytes) -> _Answer:
        kind = self.headers.get("Content-Type", "application/octet-stream")
        if "upload_id" in query:
            return self._continue(query["upload_id"], body)
        if query["uploadType"] == "resumable":
            key, kind = str(next(self.server.count)), self.headers.get("X-Upload-Content-Type", kind)
            self.server.uploads[key] = json.loads(body or b"{}") | query, kind, bytearray()
            return 200, {"Location": f"{self.server.url}{self.path}&upload_id={key}"}, {}
        if query["uploadType"] == "multipart":
            boundary = b"--" + re.findall(r'boundary="?([^";]+)', kind)[0].encode()
            _, about, rest = body.split(boundary, 2)
            query = json.loads(re.split(rb"\r?\n\r?\n", about, maxsplit=1)[1]) | query
            head, body = re.split(rb"\r?\n\r?\n", rest[: rest.rindex(boundary)], maxsplit=1)
            body = body.removesuffix(b"\r\n" if b"\r\n" in about else b"\n")
            kind = re.findall(rb"(?i)content-type: *([^\r\n]+)", head)[0].decode()
        return 200, {}, self._write(query["name"], query, body, kind)

    def _continue(self, key: str, body: bytes) -> _Answer:
        if key not in self.server.uploads:
            raise _RefusedError(404, f"No such upload: {key}")
        query, kind, data = self.server.uploads[key]
        start, total = re.findall(r"(\d+|\*).*/(\d+|\*)", self.headers.get("Content-Range", f"0-/{len(body)}"))[0]
        if start != "*":
            data[int(start) :] = body
        if total == "*" or len(data) < int(total):
            return 308, {"Range": f"bytes=0-{len(data) - 1}"} if data else {}, {}
        del self.server.uploads[key]
        return 200, {}, self._write(query["name"], query, bytes(data), kind)

    def _list(self, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter, end = query.get("prefix", ""), query.get("delimiter"), query.get("endOffset")
        found: dict[str, Blob | None] = {}  # None for what is cut at a delimiter
        for name in sorted(self.server.blobs):
            if name.startswith(prefix) and name >= query.get("startOffset", "") and (not end or name < end):
                head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                found[prefix + head + cut if cut else name] = None if cut else self.server.blobs[name]
        rest = [name for name in found if name > query.get("pageToken", "")]
        page = rest[: int(query.get("maxResults", 1000))]
        answer = {"items": [blob.resource for name in page if (blob := found[name])]}
        answer["prefixes"] = [name for name in page if not found[name]]
        return answer | ({"nextPageToken": page[-1]} if len(page) < len(rest) else {})
