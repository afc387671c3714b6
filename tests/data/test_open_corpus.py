"""Opening a corpus refuses unusable folders, and costs the same for any size."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megagpt.data import token_stream
from megagpt.data.loader import open_corpus
from tests.data.folders import CONTEXT, data_of, error_of, write_bin


def test_unusable_folders_are_refused_by_name(tmp_path: Path, folders: list[Path]) -> None:
    missing, empty, none, short = (tmp_path / name for name in ("missing", "empty", "none", "short"))
    for folder in (empty, none, short):
        folder.mkdir()
    write_bin(none / "x_train_0.bin", np.arange(0))
    write_bin(short / "x_train_0.bin", np.arange(CONTEXT))
    for folder, words in (
        (missing, ["megagpt data prepare"]),
        (empty, ["megagpt data prepare"]),
        (none, ["empty"]),
        (short, [f"{CONTEXT} tokens", "model.context"]),
    ):
        for among in ([folder], [folders[0], folder]):
            message = error_of(lambda among=among: open_corpus(data_of(among), "train", CONTEXT, 0))  # type: ignore[misc]
            for word in [str(folder), *words]:
                assert word in message
    write_bin(short / "x_train_0.bin", np.arange(CONTEXT + 1))
    assert open_corpus(data_of([short]), "train", CONTEXT, 0).sizes == [1]


# --- the cost does not grow with the corpus --------------------------------------------------------------------------

_MEASURE = """
import json, resource, sys, tracemalloc
from pathlib import Path
import numpy as np
from megagpt.config import DataConfig, SourceConfig
from megagpt.data.loader import Share, open_corpus

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

def batch_of(corpus, first):
    return corpus.batch(range(first, first + 64), Share(0, 1, 8))

warm_up, *folders = sys.argv[1:]
batch_of(open_corpus(DataConfig((SourceConfig(warm_up),)), "train", 1024, 0), 0)
for folder in folders:
    before = resident()
    tracemalloc.start()
    corpus = open_corpus(DataConfig((SourceConfig(folder),)), "train", 1024, 0)
    batch = batch_of(corpus, 10**6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    maps = sum(folder in line for line in Path("/proc/self/maps").read_text().splitlines())
    files = sum(folder in str(p.resolve()) for p in Path("/proc/self/fd").iterdir())
    (stream,) = corpus.streams
    print(json.dumps({"tokens": stream.tokens, "peak": peak, "grown": resident() - before, "maps": maps,
                      "files": files, "rows": sum(len(x) for x, _ in batch.micro_batches)}))
"""


def measure(*folders: Path) -> list[dict[str, int]]:
    """The cost of opening each folder and reading a batch of it; the first folder pays for everything once."""
    command = [sys.executable, "-c", _MEASURE, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def sparse_corpus(folder: Path, shards: int, tokens: int) -> Path:
    """Shards as long as their headers say, that occupy next to nothing."""
    folder.mkdir()
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, tokens
    for i in range(shards):
        with (folder / f"x_train_{i:06d}.bin").open("wb") as file:
            file.write(header.tobytes())
            file.truncate(1024 + 2 * tokens)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_300_billion_tokens_cost_no_more_than_a_million(tmp_path: Path) -> None:
    warm_up = sparse_corpus(tmp_path / "warm_up", 1, 200_000)
    million = sparse_corpus(tmp_path / "small", 1, 1_000_000)
    billions = sparse_corpus(tmp_path / "large", 300, 1_000_000_000)
    small, large = measure(warm_up, million, billions)
    assert small["tokens"] == 10**6
    assert large["tokens"] == 3 * 10**11
    assert small["rows"] == large["rows"] == 64
    # Bytes: 64 sequences of 1025 int64 are half a megabyte; a shard would be two thousand megabytes.
    assert large["peak"] < small["peak"] + 2**20
    assert large["grown"] < small["grown"] + 8 * 2**20
    # 64 sequences touch at most 128 shards; only those are mapped, and no file stays open.
    assert small["maps"] == 1
    assert 1 < large["maps"] <= 128
    assert small["files"] == large["files"] == 0


def test_only_touched_shards_are_mapped(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    original = token_stream.map_file

    def spy(path: Path) -> np.ndarray:
        opened.append(path.name)
        return original(path)

    monkeypatch.setattr(token_stream, "map_file", spy)
    corpus = open_corpus(data_of(folders[:1]), "train", CONTEXT, seed=0)
    assert opened == []
    corpus.streams[0].read(1100, 9)
    corpus.streams[0].read(1200, 9)
    assert opened == ["x_train_001.bin"], "mapped once, when first touched"
