"""Mapped files cost no descriptor, end with their last view, and serve any number of shards."""

import mmap
import resource
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from megagpt.cli import main
from megagpt.data import token_stream
from megagpt.data.mapped_file import map_file
from megagpt.data.prepare import prepare
from megagpt.data.shards import open_stream
from megagpt.data.sources import open_source
from tests.conftest import metrics, write_tiny
from tests.data.folders import write_bin
from tests.processes import Process, command

needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="maps are counted in /proc")


def maps_of(folder: Path) -> int:
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


def files_of(folder: Path) -> int:
    return sum(str(folder) in str(p.resolve()) for p in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("size", [1, mmap.PAGESIZE - 1, mmap.PAGESIZE, 3 * mmap.PAGESIZE + 7])
def test_a_mapped_file_reads_as_it_is_and_refuses_writes(tmp_path: Path, size: int) -> None:
    content = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    (tmp_path / "x").write_bytes(content.tobytes())
    mapped = map_file(tmp_path / "x")
    assert mapped.dtype == np.uint8
    assert np.array_equal(mapped, content)
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        np.frombuffer(mapped, np.uint8)[0] = 1


@needs_proc
def test_a_map_needs_no_descriptor_and_ends_with_its_last_view(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(range(100)))
    mapped = map_file(tmp_path / "x")
    assert (maps_of(tmp_path), files_of(tmp_path)) == (1, 0)
    view = np.frombuffer(mapped, "<u2", 10, 20)[5:]
    del mapped
    assert maps_of(tmp_path) == 1
    assert view[0] == 30 + 256 * 31
    del view
    assert maps_of(tmp_path) == 0


def test_files_that_cannot_be_mapped_raise_os_errors(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name in ("empty", "missing"):
        with pytest.raises(OSError, match=str(tmp_path / name)):
            map_file(tmp_path / name)


@needs_proc
def test_all_streams_of_a_process_share_one_bound_of_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_stream, "_MOST_MAPPED", 3)
    monkeypatch.setattr(token_stream, "_recent", OrderedDict())
    for i in range(10):
        write_bin(tmp_path / f"x_train_{i}.bin", np.arange(100 * i, 100 * i + 100))
    streams = [open_stream(tmp_path, "train") for _ in range(3)]
    for start in np.random.default_rng(0).integers(0, 750, 40).tolist():
        assert streams[start % 3].read(start, 250).tolist() == list(range(start, start + 250))
        assert maps_of(tmp_path) <= 3
    streams[0].read(100, 10)
    for start in (0, 200, 300):
        streams[1].read(start, 10)
        streams[0].read(100, 10)
    assert list(streams[0]._maps) == [1], "the shard in use stays mapped"


def train_with_few_files(config: Path) -> int:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    return command(["train", str(config)])


def results(run: Path) -> list[float]:
    return [*(line["loss"] for line in metrics(run)), metrics(run, "validation")[-1]["unigram_loss"]]


@pytest.mark.slow
def test_four_hundred_shards_train_with_256_open_files(tmp_path: Path, corpus: Path, inline: None) -> None:
    """The same losses as from the same text in one shard."""
    cut = tmp_path / "cut"
    prepare(open_source(str(corpus.parent / "text.jsonl")), cut, val_fraction=0.1, shard_tokens=100)
    assert len(list(cut.glob("train_*.crc32.npy"))) > 400
    assert main(["train", str(write_tiny(tmp_path, corpus, run={"name": "whole"}))]) == 0
    config, log = write_tiny(tmp_path, cut, run={"name": "cut"}), tmp_path / "cut.log"
    process = Process(train_with_few_files, config, cwd=tmp_path, stdout=log, stderr=log)
    assert process.wait(timeout=240) == 0, log.read_text()
    assert results(tmp_path / "runs" / "cut") == results(tmp_path / "runs" / "whole")
