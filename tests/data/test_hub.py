"""Data sets of the Hugging Face hub, by the real client against a small hub on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megagpt.data.prepare import prepare
from megagpt.data.shards import open_stream
from megagpt.data.sources import open_source
from megagpt.errors import UserError
from tests.data.hub import REPOSITORY, Hub
from tests.runs import PATIENCE

pytestmark = pytest.mark.slow


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
    with Hub({"README.md": README.encode(), **data_files, **other}).running() as server:
        yield server


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


# The command line with batches and a journal for a small corpus.
_PROGRAM = """
import sys
from megagpt.data import documents, prepare
prepare._JOURNAL_SECONDS = -1
documents._BATCH_CHARACTERS = 2000
from megagpt.cli import main
sys.exit(main())
"""


# Resumes at every cursor, which has been through JSON as between processes.
_CURSORS = """
import json, sys
from megagpt.data import documents, sources
documents._BATCH_CHARACTERS = int(sys.argv[2])
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
    return kept | hub.environment(home)


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
        _, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, err


def kill_at(hub: Hub, name: str, home: Path, out: Path) -> int:
    """Start, and kill when the hub is asked for file `name`; returns the documents journalled by then."""
    hub.hold(name)
    process = start(hub, home, out, "--subset", "sample-10BT")
    documents = 0
    try:
        assert hub.asked.wait(PATIENCE), process.poll()
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and not documents:
            documents = json.loads((out / "journal.json").read_text())["documents"]
            time.sleep(0.02)
        assert process.poll() is None
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        finish(process)
        hub.release()
    return documents


def test_hub_files_give_the_bytes_of_local_files(hub: Hub, tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    code, err = finish(start(hub, tmp_path / "home", out, "--subset", "sample-10BT"))
    assert (code, err) == (0, "")
    assert shards(out) == expected


def test_reading_resumes_at_every_cursor(hub: Hub, tmp_path: Path) -> None:
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


def test_a_killed_preparation_resumes(hub: Hub, tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    documents = kill_at(hub, FILES[2], tmp_path / "home", out)
    assert 0 < documents < len(DOCUMENTS)
    with pytest.raises(UserError, match="not finished"):
        open_stream(out, "train")
    # A new home: the second process needs nothing that the first has cached.
    code, err = finish(start(hub, tmp_path / "home2", out, "--subset", "sample-10BT"))
    assert (code, err) == (0, "")
    assert shards(out) == expected


def test_two_revisions_of_a_data_set_are_never_mixed(hub: Hub, tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    assert kill_at(hub, FILES[2], tmp_path / "home", out) > 0
    first = hub.commit
    hub.revise({FILES[2]: parquet([f"revised {i}" for i in range(200)])})
    code, err = finish(start(hub, tmp_path / "home", out, "--subset", "sample-10BT"))
    assert (code, len(err.splitlines())) == (2, 1)
    assert f"{out}: " in err
    assert f"--revision {first} goes on" in err
    options = ["--subset", "sample-10BT", "--revision", first]
    assert finish(start(hub, tmp_path / "home", out, *options)) == (0, "")
    assert shards(out) == expected


def test_bad_rows_are_named_and_skipped(hub: Hub, tmp_path: Path, expected: dict[str, bytes]) -> None:
    texts = pa.array([*(text.encode() for text in DOCUMENTS[150:160]), b"na\xefve", None]).view(pa.string())
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts, "id": texts, "score": [0.5] * 12}), sink)
    hub.files = hub.files | {FILES[1]: sink.getvalue().to_pybytes()}
    code, err = finish(start(hub, tmp_path / "home", tmp_path / "out", "--subset", "sample-10BT"))
    assert (code, len(err.splitlines())) == (2, 1)
    assert f"{REPOSITORY} row 161: byte 2 of 'text' is not UTF-8" in err
    options = ["--subset", "sample-10BT", "--skip-bad", "2"]
    assert finish(start(hub, tmp_path / "home", tmp_path / "out", *options)) == (0, "")
    assert shards(tmp_path / "out") == expected


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
def test_missing_names_and_columns_are_one_line(
    hub: Hub, tmp_path: Path, name: str, options: list[str], words: list[str]
) -> None:
    code, err = finish(start(hub, tmp_path / "home", tmp_path / "out", *options, name=name))
    assert code == 2, err
    assert len(err.splitlines()) == 1, err
    assert err.startswith("megagpt: error: ")
    for word in words:
        assert word in err


@pytest.mark.parametrize("broken", ["lost", "corrupt"])
def test_a_lost_or_corrupt_file_is_one_line(hub: Hub, tmp_path: Path, broken: str) -> None:
    out, whole = tmp_path / "out", hub.files[FILES[2]]
    if broken == "lost":
        hub.lost = FILES[2]
    else:
        hub.files[FILES[2]] = whole[:100] + b"\xff" * 300 + whole[400:]
    code, err = finish(start(hub, tmp_path / "home", out, "--subset", "sample-10BT"))
    assert code == 2, err
    assert len(err.splitlines()) == 1, err
    assert REPOSITORY in err
