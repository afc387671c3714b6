"""A small Hugging Face hub on this machine."""

import hashlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REPOSITORY = "someone/small-edu"


class Hub(ThreadingHTTPServer):
    """The part of the hub's protocol that streaming a parquet data set needs."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.past: dict[str, dict[str, bytes]] = {}
        """Files of earlier commits."""
        self.held = ""
        """The file with this name is not sent until `released`."""
        self.lost = ""
        """The file with this name is listed, but cannot be read."""
        self.released = threading.Event()
        self.asked = threading.Event()
        """Set when a client waits for the held file."""

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing about a killed client that did not read its answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()

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

    def absent(self, code: str) -> None:
        body = json.dumps({"error": f"{code}: {self.path}"}).encode()
        self.reply(404, body, {"X-Error-Code": code, "Content-Type": "application/json"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        asked = self.rfile.read(length)
        if not self.path.startswith(f"/api/datasets/{REPOSITORY}/paths-info/"):
            self.absent("RepoNotFound")
            return
        # A form or JSON, depending on the client's version.
        wanted = [
            path for path in self.entries() if path.encode() in asked or path.replace("/", "%2F").encode() in asked
        ]
        self.reply_json([self.entry(path) for path in wanted])

    @property
    def commit(self) -> str:
        """The commit that the path names, or the newest."""
        named = re.search(r"/(?:revision|tree|resolve|paths-info)/([^/?]+)", self.path)
        return named[1] if named and named[1] in self.server.past else self.server.commit

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
        return {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": path}

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].replace("%2F", "/")
        commit = self.commit
        if REPOSITORY not in path:
            self.absent("RepoNotFound")
        elif re.fullmatch(rf"/api/datasets/{REPOSITORY}(/revision/[^/]+)?", path):
            siblings = [{"rfilename": name} for name in self.files]
            known = {"id": REPOSITORY, "sha": commit, "private": False, "gated": False, "disabled": False, "tags": []}
            self.reply_json(known | {"downloads": 0, "likes": 0, "siblings": siblings})
        elif found := re.fullmatch(rf"/api/datasets/{REPOSITORY}/tree/[^/]+/?(.*)", path):
            folder, deep = found[1], "recursive=true" in self.path.lower()
            below = [p for p in self.entries() if not folder or p.startswith(folder + "/")]
            shown = [p for p in below if deep or "/" not in p[len(folder) :].lstrip("/")]
            if folder and not below:
                self.absent("EntryNotFound")
            else:
                self.reply_json([self.entry(p) for p in shown])
        elif found := re.fullmatch(rf"/datasets/{REPOSITORY}/resolve/[^/]+/(.+)", path):
            self.send_file(found[1], commit)
        else:
            self.absent("EntryNotFound")

    def send_file(self, name: str, commit: str) -> None:
        data = self.files.get(name)
        if data is None or name == self.server.lost:
            self.absent("EntryNotFound")
            return
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if name == self.server.held and self.command == "GET":
            self.server.asked.set()
            self.server.released.wait(60)
        if wanted:
            first = int(wanted[1])
            last = min(int(wanted[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self.reply(206, data[first : last + 1], headers)
        else:
            self.reply(200, data, headers)
