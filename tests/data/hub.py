"""A small Hugging Face hub on this machine, with the troubles that a real one and a network may have."""

import hashlib
import json
import re
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

REPOSITORY = "someone/small-edu"
Fault = Literal["cut", "reset", "stalled", "corrupt", "busy", "silent"]
# Files that the hub keeps apart from git: their ETag is a SHA-256, and a request for them is redirected.
_LARGE = (".safetensors", ".bin")


class Hub(ThreadingHTTPServer):
    """The part of the hub's protocol that streaming a parquet data set and fetching single files need."""

    daemon_threads = True

    def __init__(
        self,
        files: dict[str, bytes],
        repository: str = REPOSITORY,
        kind: Literal["dataset", "model"] = "dataset",
        commit: str = "",
    ) -> None:
        """One repository. `commit`: of its files, which then never change; by default, a hash of them."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.repository, self.place = repository, f"{kind}s/{repository}"
        self.fixed = commit
        self.past: dict[str, dict[str, bytes]] = {}
        """Files of earlier commits."""
        self.branch = "main"
        """The only one."""
        self.held = ""
        """The file with this name is not sent until `released`."""
        self.lost = ""
        """The file with this name is listed, but cannot be read."""
        self.released = threading.Event()
        self.asked = threading.Event()
        """Set when a client waits for the held file."""
        self.faults: dict[str, list[Fault]] = {}
        """File -> what goes wrong with the next requests for it; after those, nothing does."""
        self.gated = ""
        """The hub's words to those who have no access."""
        self.down = False
        """Whether the hub answers 503 to everything."""
        self.requests: list[str] = []
        """Method and path of each, with the first byte of a part."""

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing about a killed client that did not read its answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    @property
    def commit(self) -> str:
        return self.fixed or hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()

    def revise(self, files: dict[str, bytes]) -> None:
        """Make a commit that changes these files."""
        self.past[self.commit] = self.files
        self.files = self.files | files

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def hold(self, name: str) -> None:
        self.held = name
        self.released.clear()
        self.asked.clear()

    def release(self) -> None:
        self.held = ""
        self.released.set()

    @contextmanager
    def running(self) -> Iterator["Hub"]:
        """Serves in a thread, until the end of the block."""
        thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.release()
            self.shutdown()
            thread.join()
            self.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables that lead the client here, with its cache below `home`."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "no_proxy": "*", "HF_HUB_DISABLE_TELEMETRY": "1"}


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reply_json(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, code: str, status: int = 404, message: str = "") -> None:
        body = json.dumps({"error": message or f"{code}: {self.path}"}).encode()
        headers = {"X-Error-Code": code, "Content-Type": "application/json"}
        self.reply(status, body, headers | ({"X-Error-Message": message} if message else {}))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        asked = self.rfile.read(length)
        if not self.path.startswith(f"/api/{self.server.place}/paths-info/"):
            self.refuse("RepoNotFound")
            return
        # A form or JSON, depending on the client's version.
        wanted = [
            path for path in self.entries() if path.encode() in asked or path.replace("/", "%2F").encode() in asked
        ]
        self.reply_json([self.entry(path) for path in wanted])

    @property
    def revision(self) -> str:
        named = re.search(r"/(?:revision|tree|resolve|paths-info|stored)/([^/?]+)", self.path)
        return unquote(named[1]) if named else "main"

    @property
    def commit(self) -> str:
        """The commit that the path names, or the newest."""
        return self.revision if self.revision in self.server.past else self.server.commit

    @property
    def files(self) -> dict[str, bytes]:
        return self.server.past.get(self.commit, self.server.files)

    def entries(self) -> list[str]:
        folders = {str(parent) for name in self.files for parent in Path(name).parents} - {"."}
        return sorted(folders | set(self.files))

    def entry(self, path: str) -> dict[str, object]:
        data = self.files.get(path)
        if data is None:
            return {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}
        return {"type": "file", "oid": etag("", data), "size": len(data), "path": path}

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].replace("%2F", "/")
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.server.requests.append(f"{self.command} {path}" + (f" from {start[1]}" if start else ""))
        place, commit = self.server.place, self.commit
        # The web address of a model does not begin with its kind.
        files = re.escape(place.removeprefix("models/"))
        if self.server.down:
            self.reply(503, b"")
        elif self.server.repository not in path:
            self.refuse("RepoNotFound")
        elif self.server.gated:
            self.refuse("GatedRepo", 403 if "Authorization" in self.headers else 401, self.server.gated)
        elif self.revision not in (self.server.branch, self.server.commit, *self.server.past):
            self.refuse("RevisionNotFound")
        elif re.fullmatch(rf"/api/{place}(/revision/.+)?", path):
            siblings = [{"rfilename": name} for name in self.files]
            known = {"id": self.server.repository, "sha": commit, "private": False, "gated": False, "disabled": False}
            self.reply_json(known | {"tags": [], "downloads": 0, "likes": 0, "siblings": siblings})
        elif found := re.fullmatch(rf"/api/{place}/tree/[^/]+/?(.*)", path):
            folder, deep = found[1], "recursive=true" in self.path.lower()
            below = [p for p in self.entries() if not folder or p.startswith(folder + "/")]
            shown = [p for p in below if deep or "/" not in p[len(folder) :].lstrip("/")]
            if folder and not below:
                self.refuse("EntryNotFound")
            else:
                self.reply_json([self.entry(p) for p in shown])
        elif found := re.fullmatch(rf"/{files}/(resolve|stored)/[^/]+/(.+)", path):
            self.send_file(found[2], commit, stored=found[1] == "stored")
        else:
            self.refuse("EntryNotFound")

    def send_file(self, name: str, commit: str, stored: bool) -> None:
        data = self.files.get(name)
        if data is None or name == self.server.lost:
            self.refuse("EntryNotFound")
            return
        headers = {"ETag": f'"{etag(name, data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if name == self.server.held and self.command == "GET":
            self.server.asked.set()
            self.server.released.wait(60)
        faults = self.server.faults.get(name, [])
        # Some troubles are those of the first question, the others those of the content.
        first_question = self.command == "HEAD"
        fault = faults.pop(0) if faults and (faults[0] in ("busy", "silent")) == first_question else ""
        if fault == "busy":
            self.reply(503, b"")
            return
        if fault == "silent":
            self.server.released.wait(60)
        if name.endswith(_LARGE) and not stored:
            linked = {"X-Linked-ETag": headers.pop("ETag"), "X-Linked-Size": str(len(data))}
            place = self.server.url + self.path.replace("resolve", "stored")
            self.reply(302, b"", headers | linked | {"Location": place})
            return
        if fault == "corrupt":
            data = data[:-9] + bytes(255 - byte for byte in data[-9:])
        status = 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first = int(wanted[1])
            last = min(int(wanted[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            status, data = 206, data[first : last + 1]
        if fault in ("cut", "reset", "stalled"):
            self.reply(status, data[: len(data) // 2], headers | {"Content-Length": str(len(data))})
            self.close_connection = True
            if fault == "stalled":
                self.server.released.wait(60)
            if fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.rfile.close()  # it holds the connection open
                self.connection.close()
            return
        self.reply(status, data, headers)


def etag(name: str, data: bytes) -> str:
    """The SHA-256 of a large file, else the SHA-1 by which git names it."""
    if name.endswith(_LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
