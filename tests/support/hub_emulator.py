"""A Hugging Face Hub in memory: as much of its HTTP API as uploads and downloads of models use.

A test fixture, on loopback only. `Server.environment` points huggingface_hub at it. Files of at least `LARGE` bytes go
through Git LFS, as on the Hub; Xet is left out.
"""

import base64
import hashlib
import http.server
import json
import re
import sys
import threading
import urllib.parse
from collections.abc import Callable
from typing import Any

import yaml

LARGE = 50_000
_NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
_ROUTES = {
    "create": re.compile(r"/api/repos/create"),
    "validate": re.compile(r"/api/validate-yaml"),
    "preupload": re.compile(rf"/api/models/{_NAME}/preupload/main"),
    "commit": re.compile(rf"/api/models/{_NAME}/commit/main"),
    "tree": re.compile(rf"/api/models/{_NAME}/tree/[^/]+"),
    "info": re.compile(rf"/api/models/{_NAME}(?:/revision/[^/]+)?"),
    "batch": re.compile(rf"/{_NAME}\.git/info/lfs/objects/batch"),
    "large": re.compile(r"/lfs/(?P<oid>[0-9a-f]{64})"),
    "verify": re.compile(r"/lfs/(?P<oid>[0-9a-f]{64})/verify"),
    "resolve": re.compile(rf"/{_NAME}/resolve/[^/]+/(?P<file>.+)"),
}
REVISION = "c" * 40


class Repository:
    """A repository: whether it is private, the files of its only revision, and the messages of its commits."""

    def __init__(self, is_private: bool):
        self.is_private, self.files, self.commits = is_private, dict[str, bytes](), list[str]()


class RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


class Server(http.server.ThreadingHTTPServer):
    """Answers within a `with`. `repositories` are by name, `requests` what was asked, in order.

    Args:
        tokens: owners that each token may write for. The environment has the first one.
        before: called with each request's method and path ahead of its effect.
    """

    def __init__(self, tokens: dict[str, set[str]], before: Callable[[str, str], None] = lambda method, path: None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.tokens, self.before = tokens, before
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.large: dict[str, bytes] = {}
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

    def environment(self, home: str) -> dict[str, str]:
        """Variables for a process to start with; `home` is a directory for its caches."""
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*"}
        return {"HF_ENDPOINT": self.url, "HF_HOME": home, "HF_TOKEN": next(iter(self.tokens)), **quiet}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet
    disable_nagle_algorithm = True
    server: Server

    def _answer(self) -> None:
        body = self._body()
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        headers: dict[str, str] = {"X-Repo-Commit": REVISION}
        try:
            self.server.before(self.command, path)
            with self.server.lock:
                status, answer = 200, self._serve(path, body)
        except RefusedError as refused:
            status, answer = refused.status, {"error": str(refused)}
            headers |= {"X-Error-Message": str(refused), "X-Error-Code": refused.code}
        sent = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        kind = "application/octet-stream" if isinstance(answer, bytes) else "application/json"
        headers |= {"Content-Type": kind, "Content-Length": str(len(sent))}
        headers["ETag"] = f'"{hashlib.sha256(sent).hexdigest()}"'
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else sent)

    do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _serve(self, path: str, body: bytes) -> Any:
        routes = ((kind, route.fullmatch(path)) for kind, route in _ROUTES.items())
        kind, found = next(((kind, found) for kind, found in routes if found), ("", None))
        if found is None:
            raise RefusedError(400, f"not emulated: {path}")
        if kind == "large":
            if hashlib.sha256(body).hexdigest() != found["oid"]:
                raise RefusedError(400, "the content is not what its name says")
            self.server.large[found["oid"]] = body
            return {}
        owners = self._owners()
        content = body if kind == "commit" else json.loads(body or b"{}")
        if kind == "validate":
            return self._validate(content["content"])
        if kind == "verify":
            return {} if found["oid"] in self.server.large else self._missing(found["oid"])
        if kind == "create":
            return self._create(content, owners)
        repository = self._repository(found["name"], owners, writes=kind in ("preupload", "commit", "batch"))
        if kind == "commit":
            return self._commit(found["name"], repository, body)
        if kind == "preupload":
            modes = [(file["path"], "lfs" if file["size"] >= LARGE else "regular") for file in content["files"]]
            return {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes]}
        if kind == "batch":
            place = lambda oid: {name: {"href": f"{self.server.url}/lfs/{oid}{end}"} for name, end in _ACTIONS.items()}
            return {"objects": [{**each, "actions": place(each["oid"])} for each in content["objects"]]}
        if kind == "resolve":
            return repository.files.get(found["file"]) or self._missing(found["file"])
        if kind == "tree":
            oids = {name: hashlib.sha1(data).hexdigest() for name, data in repository.files.items()}
            return [
                {"type": "file", "path": name, "size": len(repository.files[name]), "oid": oids[name]} for name in oids
            ]
        siblings = [{"rfilename": name} for name in repository.files]
        return {"id": found["name"], "private": repository.is_private, "sha": REVISION, "siblings": siblings}

    def _missing(self, name: str) -> Any:
        raise RefusedError(404, f"{name} not found", "EntryNotFound")

    def _owners(self) -> set[str] | None:
        """Owners that the request may write for; None without a token."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not given:
            return None
        if given not in self.server.tokens:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return self.server.tokens[given]

    def _repository(self, name: str, owners: set[str] | None, *, writes: bool) -> Repository:
        repository, is_owner = self.server.repositories.get(name), name.partition("/")[0] in (owners or ())
        if repository is None or (repository.is_private and not is_owner):
            raise RefusedError(401 if owners is None else 404, "Repository not found", "RepoNotFound")
        if writes and not is_owner:
            raise RefusedError(403, "You don't have the rights")
        return repository

    def _create(self, asked: dict[str, Any], owners: set[str] | None) -> Any:
        name = f"{asked['organization']}/{asked['name']}"
        if owners is None:
            raise RefusedError(401, "Invalid username or password.")
        if asked["organization"] not in owners:
            raise RefusedError(403, f"You don't have the rights to create a model under {asked['organization']}")
        if name in self.server.repositories:
            raise RefusedError(409, "You already created this model repo")
        self.server.repositories[name] = Repository(is_private=asked.get("visibility") == "private")
        return {"url": f"{self.server.url}/{name}", "id": "1", "name": name}

    def _validate(self, card: str) -> Any:
        found = re.match(r"---\n(.*?\n)---\n", card, re.DOTALL)
        header = yaml.safe_load(found[1]) if found else None
        if not isinstance(header, dict) or not isinstance(header.get("tags"), list):
            raise RefusedError(400, "the metadata is not valid")
        return {"errors": [], "warnings": []}

    def _commit(self, name: str, repository: Repository, body: bytes) -> Any:
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.server.large[value["oid"]]
            else:
                repository.commits.append(value["summary"])
        url = f"{self.server.url}/{name}/commit/{REVISION}"
        return {"success": True, "commitOid": REVISION, "commitUrl": url, "hookOutput": ""}


_ACTIONS = {"upload": "", "verify": "/verify"}
