"""Batches depend on the sequence number alone: not on ranks, restarts, micro-batches, or the size of the corpus."""

import collections
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.config import Config, DataConfig, SourceConfig
from megagpt.config_file import build_config
from megagpt.data.loader import Batch, Corpus, open_corpus, read_ahead, rounds, train_batches, validation_sequences
from megagpt.data.order import locate
from megagpt.data.shards import TokenStream
from megagpt.errors import UserError
from megagpt.training.schedule import batch_sequences

IGNORE = -100
CONTEXT = 8


def write_bin(path: Path, tokens: np.ndarray) -> None:
    """A shard as llm.c writes it: 256 int32 of header, then the tokens."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three sources without a common token: the first token of a sequence says which sequence it is."""
    made = []
    for i, counts in enumerate(([1000, 700, 1], [161], [350, 350])):
        folder = tmp_path_factory.mktemp(f"source{i}")
        first = 10_000 * i
        for j, count in enumerate(counts):
            write_bin(folder / f"x_train_{j:03d}.bin", np.arange(first, first + count))
            first += count
        write_bin(folder / "x_val_000.bin", np.arange(10_000 * i + 5000, 10_000 * i + 5000 + 100 * (i + 1)))
        made.append(folder)
    return made


def data_of(folders: list[Path], weights: tuple[float, ...] = (0.5, 0.2, 0.3)) -> DataConfig:
    return DataConfig(sources=tuple(SourceConfig(str(f), w) for f, w in zip(folders, weights, strict=False)))


@pytest.fixture(scope="module")
def corpus(folders: list[Path]) -> Corpus:
    return open_corpus(data_of(folders), "train", CONTEXT, seed=3)


def counted_rows(batches: list[Batch]) -> collections.Counter[tuple[int, ...]]:
    """The sequences that count, whole: inputs, and the last target behind them."""
    found: collections.Counter[tuple[int, ...]] = collections.Counter()
    for batch in batches:
        for tokens, targets in batch.micro_batches:
            for x, y in zip(tokens.tolist(), targets.tolist(), strict=True):
                if y != [IGNORE] * len(y):
                    assert IGNORE not in y, "a row counts as a whole or not at all"
                    assert x[1:] == y[:-1], "targets are the inputs, one further"
                    found[(*x, y[-1])] += 1
    return found


def rows_of(corpus: Corpus, numbers: np.ndarray) -> collections.Counter[tuple[int, ...]]:
    return collections.Counter(map(tuple, corpus.rows(numbers).tolist()))


def config_of(total: int, batch: int, ramp: tuple[int, int]) -> Config:
    """A run of `total` sequences in batches of `batch`, growing from ramp[0] over ramp[1] sequences."""
    return build_config(
        {
            "model": {"layers": 1, "width": 8, "heads": 1, "context": CONTEXT},
            "train": {
                "tokens": total * CONTEXT,
                "batch_tokens": batch * CONTEXT,
                "batch_ramp_start": ramp[0] * CONTEXT,
                "batch_ramp_tokens": ramp[1] * CONTEXT,
                "precision": "fp32",
            },
            "schedule": {"warmup_tokens": 1, "decay_end_tokens": total * CONTEXT + 1},
        },
        "test",
    )


def steps_of(corpus: Corpus, config: Config, start: int, rank: int, world: int, micro_batch: int) -> list[Batch]:
    def size(seen: int) -> int:
        return batch_sequences(config, seen)

    return list(train_batches(corpus, start, config.total_sequences, size, rank, world, micro_batch))


# --- one rank or many ------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_steps_are_the_same_on_any_number_of_ranks_and_after_any_restart(corpus: Corpus, data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 12), label="batch")
    total = data.draw(st.integers(batch, 80), label="total")
    ramp_start = data.draw(st.integers(1, batch), label="ramp start")
    ramp_sequences = data.draw(st.integers(1, 100), label="ramp")
    ramp = data.draw(st.sampled_from([(0, 0), (ramp_start, ramp_sequences)]), label="ramped")
    config = config_of(total, batch, ramp)
    alone = steps_of(corpus, config, 0, 0, 1, micro_batch=1)
    assert sum(step.sequences for step in alone) == total
    starts = np.cumsum([0, *(step.sequences for step in alone)]).tolist()

    restart = data.draw(st.integers(0, len(alone) - 1), label="restart")
    world = data.draw(st.integers(1, 7), label="world")
    micro_batch = data.draw(st.integers(1, 5), label="micro-batch")
    ranks = [steps_of(corpus, config, starts[restart], rank, world, micro_batch) for rank in range(world)]
    for number, expected in enumerate(alone[restart:]):
        step = [batches[number] for batches in ranks]
        numbers = np.arange(starts[restart + number], starts[restart + number] + expected.sequences)
        assert counted_rows(step) == counted_rows([expected]) == rows_of(corpus, numbers)
        assert {(b.sequences, b.tokens, len(b.micro_batches)) for b in step} == {
            (expected.sequences, expected.sequences * CONTEXT, rounds(expected.sequences, world, micro_batch))
        }
    assert {len(batches) for batches in ranks} == {len(alone) - restart}


@given(
    first=st.integers(0, 10**6),
    sequences=st.integers(1, 40),
    world=st.integers(1, 9),
    micro_batch=st.integers(1, 6),
)
@settings(max_examples=100, deadline=None)
def test_shapes_and_padding(corpus: Corpus, first: int, sequences: int, world: int, micro_batch: int) -> None:
    accumulation = rounds(sequences, world, micro_batch)
    assert (accumulation - 1) * world * micro_batch < sequences <= accumulation * world * micro_batch
    counted = []
    for rank in range(world):
        batch = corpus.batch(first, sequences, rank, world, micro_batch, accumulation)
        assert len(batch.micro_batches) == accumulation
        for tokens, targets in batch.micro_batches:
            assert tokens.shape == targets.shape == (micro_batch, CONTEXT)
            assert tokens.dtype == targets.dtype == torch.int64
            assert tokens.min() >= 0, "padding must still be a token that has an embedding"
            assert tokens.max() < 50257
            assert targets.is_contiguous()
        counted.append(sum(counted_rows([batch]).values()))
    assert sum(counted) == sequences
    assert max(counted) - min(counted) <= 1


def test_batches_are_the_numbered_sequences(corpus: Corpus, folders: list[Path]) -> None:
    """Against the files read by hand: a sequence is context + 1 tokens at a multiple of the context of one source."""
    whole = [np.arange(0, 1701), np.arange(10_000, 10_161), np.arange(20_000, 20_700)]
    valid = {tuple(w[i : i + CONTEXT + 1]) for w in whole for i in range(0, len(w) - CONTEXT, CONTEXT)}
    assert corpus.sizes == [212, 20, 87]
    found = collections.Counter(map(tuple, corpus.rows(np.arange(400)).tolist()))
    assert set(found) <= valid
    assert sum(row[0] < 10_000 for row in found.elements()) == 200
    first_source = collections.Counter(r for r in map(tuple, corpus.rows(np.arange(424)).tolist()) if r[0] < 10_000)
    assert set(first_source.values()) == {1}, "212 sequences of the first source, each once"
    assert len(first_source) == 212


def test_a_batch_across_epochs_and_one_larger_than_the_corpus(folders: list[Path]) -> None:
    corpus = open_corpus(data_of(folders[1:2]), "train", CONTEXT, seed=0)
    (size,) = corpus.sizes
    rows = counted_rows([corpus.batch(0, 3 * size, 0, 1, 3 * size, 1)])
    assert len(rows) == size
    assert set(rows.values()) == {3}


def test_the_seed_decides_the_order(folders: list[Path]) -> None:
    rows = [open_corpus(data_of(folders), "train", CONTEXT, seed).rows(np.arange(100)).tolist() for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]


# --- validation ------------------------------------------------------------------------------------------------------


def check_validation(sizes: list[int], weights: list[int], tokens: int) -> None:
    corpus = Corpus([OfSize(str(s), [], "", size=size) for s, size in enumerate(sizes)], weights, CONTEXT, 0)
    count = validation_sequences(corpus, tokens)
    assert 0 <= count <= tokens // CONTEXT
    source, place = locate(np.arange(count), corpus.sizes, weights, 0) if count else ([], [])
    assert len(set(zip(source, place, strict=True))) == count
    # All that was asked for, or some source is used up to what rounding may take.
    total, error = sum(weights), (len(sizes) - 1).bit_length()
    assert count == tokens // CONTEXT or any(
        size - count * weight / total <= error + weight / total + 1
        for size, weight in zip(corpus.sizes, weights, strict=True)
    )
    if len(sizes) == 1:
        assert count == min(tokens // CONTEXT, corpus.sizes[0])


@given(
    pairs=st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 1000)), min_size=1, max_size=7),
    tokens=st.one_of(st.integers(0, 30_000), st.just(10**12)),
)
@settings(max_examples=100, deadline=None)
def test_validation_never_repeats_a_sequence(pairs: list[tuple[int, int]], tokens: int) -> None:
    check_validation([size for size, _ in pairs], [weight for _, weight in pairs], tokens)


@given(weights=st.lists(st.integers(1, 60), min_size=2, max_size=9), parts=st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_validation_never_repeats_a_sample_where_all_sources_end_together(weights: list[int], parts: int) -> None:
    """Sizes in proportion to the weights, where one sequence too many of any source is a repeated one."""
    check_validation([max(2, parts * weight * CONTEXT // 4) for weight in weights], weights, 10**12)


class OfSize(TokenStream):
    """A stream that has a size and no tokens."""

    def __init__(self, *arguments: Any, size: int) -> None:
        super().__init__(*arguments)
        self._starts = [0, size]


def test_validation_is_the_same_on_every_world_size(folders: list[Path]) -> None:
    corpus = open_corpus(data_of(folders), "val", CONTEXT, seed=0)
    count = validation_sequences(corpus, 10**9)
    assert count > 10
    expected = counted_rows([corpus.batch(0, count, 0, 1, count, 1)])
    assert set(expected.values()) == {1}
    for world, micro_batch in ((2, 3), (3, 1), (5, 4), (count + 1, 2)):
        shares = [
            corpus.batch(0, count, r, world, micro_batch, rounds(count, world, micro_batch)) for r in range(world)
        ]
        assert counted_rows(shares) == expected


def test_validation_of_a_source_without_held_out_text(folders: list[Path], tmp_path: Path) -> None:
    write_bin(tmp_path / "x_train_0.bin", np.arange(100))
    corpus = open_corpus(data_of([folders[0], tmp_path]), "val", CONTEXT, seed=0)
    assert validation_sequences(corpus, 10**9) == 0


# --- read_ahead ------------------------------------------------------------------------------------------------------


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def test_read_ahead_yields_the_same_batches(corpus: Corpus) -> None:
    config = config_of(total=40, batch=6, ramp=(0, 0))
    plain = steps_of(corpus, config, 0, 0, 1, 2)
    ahead = list(read_ahead(train_batches(corpus, 0, 40, lambda seen: 6, 0, 1, 2)))
    assert len(ahead) == len(plain) == 7
    for one, other in zip(plain, ahead, strict=True):
        for (x, y), (u, v) in zip(one.micro_batches, other.micro_batches, strict=True):
            assert torch.equal(x, u)
            assert torch.equal(y, v)
    assert not reader_threads()


def numbered(count: int, made: list[int], fail_at: int = -1) -> Iterator[Batch]:
    for i in range(count):
        if i == fail_at:
            raise UserError(f"shard {i} is damaged")
        made.append(i)
        yield Batch([], i, 0)


@pytest.mark.parametrize("fail_at", [0, 1, 5])
def test_read_ahead_raises_the_errors_of_its_thread_in_their_place(fail_at: int) -> None:
    seen = []
    with pytest.raises(UserError, match=f"shard {fail_at} is damaged"):  # noqa: PT012
        for batch in read_ahead(numbered(10, [], fail_at)):
            seen.append(batch.sequences)
    assert seen == list(range(fail_at))
    assert not reader_threads()


def test_read_ahead_runs_ahead_but_not_far() -> None:
    made: list[int] = []
    batches = read_ahead(numbered(1000, made))
    assert next(batches).sequences == 0
    deadline = time.monotonic() + 10
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) >= 3, "it must work while the consumer does"
    time.sleep(0.3)
    assert len(made) <= 6, "it must not fill the memory"
    batches.close()  # type: ignore[attr-defined]
    assert not reader_threads()
    at_close = len(made)
    time.sleep(0.3)
    assert len(made) == at_close


def test_read_ahead_ends_with_its_consumer() -> None:
    with pytest.raises(ZeroDivisionError):
        consume_and_fail()
    assert not reader_threads()
    unstarted = read_ahead(numbered(10, []))
    unstarted.close()  # type: ignore[attr-defined]
    assert not reader_threads()
    assert list(read_ahead(iter(()))) == []
    assert not reader_threads()


def consume_and_fail() -> None:
    batches = read_ahead(numbered(1000, []))
    try:
        next(batches)
        raise ZeroDivisionError
    finally:
        batches.close()  # type: ignore[attr-defined]


# --- open_corpus -----------------------------------------------------------------------------------------------------


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_open_corpus_errors(tmp_path: Path, folders: list[Path]) -> None:
    missing, empty, none, short = (tmp_path / name for name in ("missing", "empty", "none", "short"))
    for folder in (empty, none, short):
        folder.mkdir()
    write_bin(none / "x_train_0.bin", np.arange(0))
    write_bin(short / "x_train_0.bin", np.arange(CONTEXT))
    for folder, words in (
        (missing, ["megagpt prepare"]),
        (empty, ["megagpt prepare"]),
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
from megagpt.data.loader import open_corpus

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

def batch_of(corpus, first):
    return corpus.batch(first, 64, 0, 1, 8, 8)

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
    """What opening each of them and reading a batch costs, after the first of them has paid for everything once."""
    command = [sys.executable, "-c", _MEASURE, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def sparse_corpus(folder: Path, shards: int, tokens: int) -> Path:
    """Headed shards that are as long as they say and occupy next to nothing."""
    folder.mkdir()
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, tokens
    for i in range(shards):
        with (folder / f"x_train_{i:06d}.bin").open("wb") as file:
            file.write(header.tobytes())
            file.truncate(1024 + 2 * tokens)
    return folder


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_300_billion_tokens_open_like_a_million(tmp_path: Path) -> None:
    warm_up = sparse_corpus(tmp_path / "warm_up", 1, 200_000)
    million = sparse_corpus(tmp_path / "small", 1, 1_000_000)
    billions = sparse_corpus(tmp_path / "large", 300, 1_000_000_000)
    small, large = measure(warm_up, million, billions)
    assert small["tokens"] == 10**6
    assert large["tokens"] == 3 * 10**11
    assert small["rows"] == large["rows"] == 64
    # 64 sequences of 1025 int64 are half a megabyte; a shard would be two thousand.
    assert large["peak"] < small["peak"] + 2**20
    assert large["grown"] < small["grown"] + 8 * 2**20
    # Only what a sequence touches is mapped: 64 sequences touch 128 shards at the most; no file stays open otherwise.
    assert small["maps"] == 1
    assert 1 < large["maps"] <= 128
    assert large["files"] <= large["maps"]


def test_only_the_shards_of_a_batch_are_opened(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from megagpt.data import shards

    opened: list[str] = []
    original = shards._map_shard

    def spy(shard: shards.Shard) -> tuple[np.ndarray, np.ndarray | None]:
        opened.append(shard.path.name)
        return original(shard)

    monkeypatch.setattr(shards, "_map_shard", spy)
    corpus = open_corpus(data_of(folders[:1]), "train", CONTEXT, seed=0)
    assert opened == []
    corpus.streams[0].read(1100, 9)
    corpus.streams[0].read(1200, 9)
    assert opened == ["x_train_001.bin"], "mapped once, when first touched"
