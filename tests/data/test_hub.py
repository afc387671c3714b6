"""Data sets of the Hugging Face hub, by the true client against a small hub on this machine."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megagpt.data.prepare import prepare
from megagpt.data.shards import open_stream
from megagpt.data.sources import open_source
from megagpt.errors import UserError

pytestmark = pytest.mark.slow

REPOSITORY = "someone/small-edu"
README = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/other/*.parquet
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*.parquet
---
# A small corpus
"""
DOCUMENTS = [f"Document {i}: naïve 日本 😀 " + f"word{i} " * (i % 50) for i in range(400)]


class Hub(ThreadingHTTPServer):
    """The part of the hub that streaming a parquet data set needs."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.held = ""
        """A file of this name is not given out until `released`."""
        self.lost = ""
        """A file of this name is listed, and not to be had."""
        self.released = threading.Event()
        self.asked = threading.Event()
        """Somebody waits for the held file."""

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed does not read its answer: no noise about that."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()

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
        # A form or JSON, by version of the client.
        wanted = [
            path for path in self.entries() if path.encode() in asked or path.replace("/", "%2F").encode() in asked
        ]
        self.reply_json([self.entry(path) for path in wanted])

    def entries(self) -> list[str]:
        folders = {str(parent) for name in self.server.files for parent in Path(name).parents} - {"."}
        return sorted(folders | set(self.server.files))

    def entry(self, path: str) -> dict[str, object]:
        data = self.server.files.get(path)
        if data is None:
            return {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}
        return {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": path}

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].replace("%2F", "/")
        commit = self.server.commit
        if REPOSITORY not in path:
            self.absent("RepoNotFound")
        elif re.fullmatch(rf"/api/datasets/{REPOSITORY}(/revision/[^/]+)?", path):
            siblings = [{"rfilename": name} for name in self.server.files]
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
        data = self.server.files.get(name)
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


def parquet(documents: list[str]) -> bytes:
    """A file of two row groups, with columns beside the text."""
    table = pa.table(
        {
            "text": documents,
            "id": [f"<urn:uuid:{i}>" for i in range(len(documents))],
            "score": [i / 7 for i in range(len(documents))],
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=-(-len(documents) // 2))
    data = sink.getvalue().to_pybytes()
    assert pq.ParquetFile(pa.BufferReader(data)).num_row_groups == 2
    return data


FILES = [f"sample/10BT/{i:03d}_00000.parquet" for i in range(3)]


@pytest.fixture(scope="module")
def data_files() -> dict[str, bytes]:
    parts = (DOCUMENTS[:150], DOCUMENTS[150:160], DOCUMENTS[160:])
    return {name: parquet(part) for name, part in zip(FILES, parts, strict=True)}


@pytest.fixture
def hub(data_files: dict[str, bytes]) -> Iterator[Hub]:
    other = {"data/other/0.parquet": parquet(["not asked for", "neither"])}
    with Hub({"README.md": README.encode(), **data_files, **other}) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.release()
        server.shutdown()
        thread.join()


def shards(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.npy"))}


@pytest.fixture
def expected(tmp_path: Path, data_files: dict[str, bytes]) -> dict[str, bytes]:
    """The shards of the same text, prepared from local files."""
    local = tmp_path / "local"
    local.mkdir()
    for name, data in data_files.items():
        (local / Path(name).name).write_bytes(data)
    prepare(open_source(str(local)), tmp_path / "expected", val_fraction=0.05, shard_tokens=3000, workers=1)
    return shards(tmp_path / "expected")


# The command line with batches and a journal that suit so small a corpus.
_PROGRAM = """
import sys
from megagpt.data import prepare, sources
prepare._JOURNAL_SECONDS = -1
sources._BATCH_CHARACTERS = 2000
from megagpt.cli import main
sys.exit(main())
"""


# Reads on from every cursor, as other processes would: the cursors have been through JSON.
_CURSORS = """
import json, sys
from megagpt.data import sources
sources._BATCH_CHARACTERS = int(sys.argv[2])
source = sources.open_source(sys.argv[1], subset="sample-10BT")
batches = list(source.batches(None))
rests = []
for batch in batches:
    rest = source.batches(json.loads(json.dumps(batch.cursor)))
    rests.append([text for later in rest for text in later.documents])
print(json.dumps([[batch.documents for batch in batches], rests]))
"""


def environment_of(hub: Hub, home: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "no_proxy": "*", "HF_HUB_DISABLE_TELEMETRY": "1"}


def start(hub: Hub, home: Path, out: Path, *options: str, name: str = REPOSITORY) -> subprocess.Popen[str]:
    command = ["prepare", name, "--out", str(out), "--val-fraction", "0.05", "--shard-tokens", "3000"]
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, *command, "--workers", "1", *options],
        env=environment_of(hub, home),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, err = process.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, err


def kill_at(hub: Hub, name: str, home: Path, out: Path) -> int:
    """Start, kill when that file is asked for and what comes before it is journalled; the documents journalled."""
    hub.hold(name)
    process = start(hub, home, out, "--subset", "sample-10BT")
    documents = 0
    try:
        assert hub.asked.wait(60), process.poll()
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline and documents < 100:
            documents = json.loads((out / "journal.json").read_text())["documents"]
            time.sleep(0.02)
        assert process.poll() is None
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        finish(process)
        hub.release()
    return documents


def test_equals_the_same_files_read_locally(hub: Hub, tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    code, err = finish(start(hub, tmp_path / "home", out, "--subset", "sample-10BT"))
    assert (code, err) == (0, "")
    assert shards(out) == expected


def test_every_cursor(hub: Hub, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CURSORS, REPOSITORY, "4000"],
        env=environment_of(hub, tmp_path / "home"),
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    batches, rests = json.loads(done.stdout)
    assert [text for batch in batches for text in batch] == DOCUMENTS
    assert len(batches) > 10
    read = 0
    for batch, rest in zip(batches, rests, strict=True):
        read += len(batch)
        assert rest == DOCUMENTS[read:]


def test_killed_in_the_middle(hub: Hub, tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    documents = kill_at(hub, FILES[2], tmp_path / "home", out)
    assert 0 < documents < len(DOCUMENTS)
    with pytest.raises(UserError, match="not finished"):
        open_stream(out, "train")
    # A fresh home: nothing that the first start has cached is needed.
    code, err = finish(start(hub, tmp_path / "home2", out, "--subset", "sample-10BT"))
    assert (code, err) == (0, "")
    assert shards(out) == expected


def test_a_data_set_that_changes_between_two_starts(hub: Hub, tmp_path: Path, expected: dict[str, bytes]) -> None:
    """The documents of two revisions must not be mixed: go on with the first, or refuse."""
    out = tmp_path / "out"
    assert kill_at(hub, FILES[2], tmp_path / "home", out) > 0
    hub.files = hub.files | {FILES[2]: parquet([f"revised {i}" for i in range(200)])}
    code, err = finish(start(hub, tmp_path / "home", out, "--subset", "sample-10BT"))
    if code == 0:
        assert shards(out) == expected
    else:
        assert (code, len(err.splitlines())) == (2, 1)
        assert str(out) in err


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("nobody/nothing", [], ["nobody/nothing"]),
        (REPOSITORY, ["--subset", "sample-10TB"], [REPOSITORY, "sample-10TB"]),
        (REPOSITORY, ["--subset", "sample-10BT", "--split", "validation"], [REPOSITORY, "validation"]),
        (REPOSITORY, ["--subset", "sample-10BT", "--text-key", "txt"], [REPOSITORY, "'txt'", "--text-key"]),
        (REPOSITORY, ["--subset", "sample-10BT", "--text-key", "score"], [REPOSITORY, "'score'", "--text-key"]),
    ],
    ids=["repository", "subset", "split", "column", "not text"],
)
def test_what_is_not_there(hub: Hub, tmp_path: Path, name: str, options: list[str], words: list[str]) -> None:
    code, err = finish(start(hub, tmp_path / "home", tmp_path / "out", *options, name=name))
    assert code == 2, err
    assert len(err.splitlines()) == 1, err
    assert err.startswith("megagpt: error: ")
    for word in words:
        assert word in err


@pytest.mark.parametrize("broken", ["lost", "corrupt"])
def test_a_file_that_breaks_off_the_stream(hub: Hub, tmp_path: Path, broken: str) -> None:
    out, whole = tmp_path / "out", hub.files[FILES[2]]
    if broken == "lost":
        hub.lost = FILES[2]
    else:
        hub.files[FILES[2]] = whole[:100] + b"\xff" * 300 + whole[400:]
    code, err = finish(start(hub, tmp_path / "home", out, "--subset", "sample-10BT"))
    assert code == 2, err
    assert len(err.splitlines()) == 1, err
    assert REPOSITORY in err
