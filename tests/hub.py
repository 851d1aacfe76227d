"""A stand-in for the model hub on the loopback interface: what the real client asks for, over ordinary HTTP."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

FILE = re.compile(r"^/(?P<repo>(?:datasets/)?[^/]+/[^/]+)/resolve/[^/]+/(?P<name>.+)$")
API = re.compile(r"^/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)(?P<rest>/.*)?$")


@dataclass
class Hub:
    """What the stand-in holds, and what it does wrong.

    Attributes:
        repos: name (datasets begin with ``datasets/``) -> file -> bytes.
        refused: name -> HTTP status of everything in it.
        dropped: names of files whose first download ends in the middle.
        wrong: names of files that are sent with a bit flipped.
        asked: how often each file was downloaded.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    wrong: set[str] = field(default_factory=set)
    asked: Counter[str] = field(default_factory=Counter)
    url: str = ""

    def add(self, repo: str, folder: Path) -> None:
        """Hold the files of a folder."""
        self.repos[repo] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def commit(self, repo: str) -> str:
        """The digest of all that a repository holds, as the hub names a state."""
        parts = [f"{name}{hashlib.sha1(data).hexdigest()}" for name, data in sorted(self.repos[repo].items())]
        return hashlib.sha1("".join(parts).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlparse(self.path).path)
        file, api = FILE.match(path), API.match(path)
        if file:
            self._file(file["repo"], file["name"], body=body)
        elif api:
            self._about(("datasets/" if api["kind"] == "datasets" else "") + api["repo"], api["rest"] or "")
        else:
            self._fail(404, "EntryNotFound")

    def _there(self, repo: str) -> bool:
        if repo in self.hub.refused:
            self._fail(self.hub.refused[repo], "GatedRepo" if self.hub.refused[repo] == 403 else "RepoNotFound")
        elif repo not in self.hub.repos:
            self._fail(401, "RepoNotFound")  # as the hub answers who has not signed in
        else:
            return True
        return False

    def _file(self, repo: str, name: str, *, body: bool) -> None:
        if not self._there(repo):
            return
        data = self.hub.repos[repo].get(name)
        if data is None:
            self._fail(404, "EntryNotFound", commit=self.hub.commit(repo))
            return
        start = 0
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked and body:
            start = int(asked[1])
        large = name.endswith((".safetensors", ".zip", ".gguf"))
        etag = hashlib.sha256(data).hexdigest() if large else hashlib.sha1(data).hexdigest()
        sent = data
        if name in self.hub.wrong:
            sent = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response(206 if asked and body else 200)
        self.send_header("X-Repo-Commit", self.hub.commit(repo))
        self.send_header("ETag", f'"{etag}"')
        if large:
            self.send_header("X-Linked-Etag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(sent) - start))
        if asked and body:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if not body:
            return
        self.hub.asked[name] += 1
        if name in self.hub.dropped:
            self.hub.dropped.discard(name)
            self.wfile.write(sent[start : start + (len(sent) - start) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(sent[start:])

    def _about(self, repo: str, rest: str) -> None:
        if not self._there(repo):
            return
        if "/tree/" in rest:
            inside = rest.partition("/tree/")[2].partition("/")[2]
            names = [name for name in self.hub.repos[repo] if not inside or name.startswith(f"{inside}/")]
            if inside and not names:
                self._fail(404, "EntryNotFound", commit=self.hub.commit(repo))
                return
            self._json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in ((name, self.hub.repos[repo][name]) for name in names)
                ]
            )
            return
        files = [{"rfilename": name} for name in self.hub.repos[repo]]
        self._json({"id": repo, "sha": self.hub.commit(repo), "siblings": files, "private": False, "tags": []})

    def _json(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _fail(self, status: int, code: str, commit: str = "") -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def hub_at_work() -> Iterator[Hub]:
    """A hub that answers until the end of the block."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
