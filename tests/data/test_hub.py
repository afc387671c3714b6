"""Data sets of the Hugging Face hub, by the real client against a small hub on this machine."""

import json
import os
import shutil
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
from tests.data.hub_preparations import arguments, prepared, start
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
- config_name: lost
  data_files:
  - split: train
    path: [sample/10BT/000_00000.parquet, broken/lost.parquet]
- config_name: corrupt
  data_files:
  - split: train
    path: [sample/10BT/000_00000.parquet, broken/corrupt.parquet]
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


SUBSET = ["--subset", "sample-10BT"]
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
assert "torch" not in sys.modules, "imported, for seconds, though nothing needs it"
print(json.dumps([[batch.documents for batch in batches], rests]))
"""


def environment_of(hub: Hub, home: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return kept | hub.environment(home)


def kill_at(hub: Hub, name: str, home: Path, out: Path) -> int:
    """Start, and kill when the hub is asked for file `name`; returns the documents journalled by then."""
    hub.hold(name)
    process = start(hub, home, arguments(out, *SUBSET))
    documents = 0
    try:
        assert hub.asked.wait(PATIENCE), process.poll()
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and not documents:
            documents = json.loads((out / "journal.json").read_text())["documents"]
            time.sleep(0.02)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
        hub.release()
    return documents


def test_hub_files_give_the_bytes_of_local_files(hub: Hub, tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    ((code, _, err),) = prepared(hub, tmp_path / "home", arguments(out, *SUBSET))
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


def test_killed_preparations_resume_at_their_revision(hub: Hub, tmp_path: Path, expected: dict[str, bytes]) -> None:
    """Two revisions of a data set are never mixed."""
    out, copy = tmp_path / "out", tmp_path / "copy"
    documents = kill_at(hub, FILES[2], tmp_path / "home", out)
    assert 0 < documents < len(DOCUMENTS)
    with pytest.raises(UserError, match="not finished"):
        open_stream(out, "train")
    shutil.copytree(out, copy)
    # A new home: the second process needs nothing that the first has cached.
    ((code, _, err),) = prepared(hub, tmp_path / "home2", arguments(copy, *SUBSET))
    assert (code, err) == (0, "")
    assert shards(copy) == expected
    first = hub.commit
    hub.revise({FILES[2]: parquet([f"revised {i}" for i in range(200)])})
    commands = [arguments(out, *SUBSET), arguments(out, *SUBSET, "--revision", first)]
    (code, _, err), resumed = prepared(hub, tmp_path / "home", *commands)
    assert (code, len(err.splitlines())) == (2, 1)
    assert f"{out}: " in err
    assert f"--revision {first} goes on" in err
    assert (resumed[0], resumed[2]) == (0, "")
    assert shards(out) == expected


def test_bad_rows_are_named_and_skipped(hub: Hub, tmp_path: Path, expected: dict[str, bytes]) -> None:
    texts = pa.array([*(text.encode() for text in DOCUMENTS[150:160]), b"na\xefve", None]).view(pa.string())
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts, "id": texts, "score": [0.5] * 12}), sink)
    hub.files = hub.files | {FILES[1]: sink.getvalue().to_pybytes()}
    out = tmp_path / "out"
    commands = [arguments(out, *SUBSET), arguments(out, *SUBSET, "--skip-bad", "2")]
    (code, _, err), skipped = prepared(hub, tmp_path / "home", *commands)
    assert (code, len(err.splitlines())) == (2, 1)
    assert f"{REPOSITORY} row 161: byte 2 of 'text' is not UTF-8" in err
    assert (skipped[0], skipped[2]) == (0, "")
    assert shards(out) == expected


def test_missing_and_broken_parts_are_one_line(hub: Hub, tmp_path: Path) -> None:
    """Each of a repository, a subset, a split, a column, and a file that is listed."""
    whole = hub.files[FILES[2]]
    hub.lost = "broken/lost.parquet"
    hub.files |= {hub.lost: whole, "broken/corrupt.parquet": whole[:100] + b"\xff" * 300 + whole[400:]}
    cases: list[tuple[str, list[str], list[str]]] = [
        ("nobody/nothing", [], ["nobody/nothing"]),
        (REPOSITORY, ["--subset", "sample-10TB"], ["sample-10TB"]),
        (REPOSITORY, [*SUBSET, "--split", "validation"], ["validation"]),
        (REPOSITORY, [*SUBSET, "--text-key", "txt"], ["'txt'", "--text-key"]),
        (REPOSITORY, [*SUBSET, "--text-key", "score"], ["'score'", "--text-key"]),
        (REPOSITORY, ["--subset", "lost"], ["reading 'text'"]),
        (REPOSITORY, ["--subset", "corrupt"], ["reading 'text'"]),
    ]
    commands = [arguments(tmp_path / str(i), *options, name=name) for i, (name, options, _) in enumerate(cases)]
    done = prepared(hub, tmp_path / "home", *commands)
    for (name, _, words), (code, _, err) in zip(cases, done, strict=True):
        assert (code, len(err.splitlines())) == (2, 1), err
        assert err.startswith("megagpt: error: ")
        assert all(word in err for word in [name, *words]), err
