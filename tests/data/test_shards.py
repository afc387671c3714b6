"""Shards read as one stream across their boundaries; corrupt and foreign files are refused by name."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import megagpt.data.prepare
from megagpt.cli import main
from megagpt.data import tokenizer
from megagpt.data.prepare import prepare
from megagpt.data.shards import open_stream, verify
from megagpt.data.sources import open_source
from megagpt.data.token_stream import BLOCK_BYTES
from megagpt.errors import UserError
from tests.data.folders import error_of, read_all

BLOCK_TOKENS = BLOCK_BYTES // 2


def make_corpus(folder: Path, documents: int, shard_tokens: int, val_fraction: float = 0.1) -> Path:
    """A folder of shards of `documents` texts of random words."""
    draw = random.Random(1)
    words = ["the", "a", "of", "to", "token", "shard", "corpus", "naïve", "42", "日本", "block,", "end."]
    rows = [{"text": " ".join(draw.choices(words, k=draw.randint(1, 60)))} for _ in range(documents)]
    text = folder / "corpus.jsonl"
    text.write_text("\n".join(json.dumps(row) for row in rows))
    prepare(open_source(str(text)), folder / "shards", val_fraction=val_fraction, shard_tokens=shard_tokens, workers=1)
    return folder / "shards"


def split_tokens(folder: Path, split: str) -> np.ndarray:
    """The split, read by numpy alone."""
    files = sorted(p for p in folder.glob(f"{split}_*.npy") if not p.name.endswith(".crc32.npy"))
    return np.concatenate([np.load(p) for p in files]) if files else np.empty(0, np.uint16)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of several blocks each, the last of them partly filled."""
    return make_corpus(tmp_path_factory.mktemp("large"), documents=7000, shard_tokens=2 * BLOCK_TOKENS + 1000)


@pytest.fixture(scope="module")
def large_tokens(large: Path) -> np.ndarray:
    """The large corpus's training tokens, read by numpy."""
    return split_tokens(large, "train")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred tokens in a few shards: small enough to corrupt every byte."""
    return make_corpus(tmp_path_factory.mktemp("small"), documents=12, shard_tokens=200, val_fraction=0.2)


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    """A copy of the small corpus, for a test to corrupt."""
    return Path(shutil.copytree(small, tmp_path / "copy"))


# --- reading ---------------------------------------------------------------------------------------------------------


def test_shards_are_plain_npy_files(large: Path) -> None:
    manifest = json.loads((large / "manifest.json").read_text())
    for split in ("train", "val"):
        entries = manifest["splits"][split]["shards"]
        loaded = [np.load(large / entry["file"]) for entry in entries]
        assert [len(shard) for shard in loaded] == [entry["tokens"] for entry in entries]
        assert all(shard.dtype == np.uint16 and shard.ndim == 1 for shard in loaded)
        assert sum(map(len, loaded)) == manifest["splits"][split]["tokens"]
    assert len(manifest["splits"]["train"]["shards"]) >= 3


@given(data=st.data())
@settings(max_examples=200, deadline=None)
@pytest.mark.slow
def test_reads_equal_the_concatenation(large: Path, large_tokens: np.ndarray, data: st.DataObject) -> None:
    stream, expected = open_stream(large, "train"), large_tokens
    assert stream.tokens == len(expected)
    shard = 2 * BLOCK_TOKENS + 1000
    edges = [e + b for e in range(0, len(expected), shard) for b in (0, BLOCK_TOKENS, 2 * BLOCK_TOKENS)]
    near_edge = st.builds(
        lambda e, d: min(len(expected) - 1, max(0, e + d)), st.sampled_from(edges), st.integers(-3, 3)
    )
    start = data.draw(st.one_of(st.integers(0, len(expected) - 1), near_edge))
    end = data.draw(st.one_of(st.integers(start, len(expected)), near_edge.map(lambda e: max(e, start))))
    assume(end > start)
    result = stream.read(start, end - start)
    assert result.dtype == np.int64
    assert np.array_equal(result, expected[start:end])


def test_one_stream_serves_many_reads(large: Path, large_tokens: np.ndarray) -> None:
    """As in a run: the same stream, back and forth."""
    stream, expected = open_stream(large, "train"), large_tokens
    draw = random.Random(0)
    for _ in range(200):
        start = draw.randrange(len(expected) - 1025)
        assert np.array_equal(stream.read(start, 1025), expected[start : start + 1025])
    assert np.array_equal(stream.read(0, stream.tokens), expected)
    assert np.array_equal(stream.read(stream.tokens - 1, 1), expected[-1:])


def test_fingerprints_tell_corpora_and_splits_apart(small: Path, large: Path, copy: Path) -> None:
    assert open_stream(small, "train").fingerprint == open_stream(copy, "train").fingerprint
    prints = [open_stream(folder, split).fingerprint for folder in (small, large) for split in ("train", "val")]
    assert len(set(prints)) == 4


def test_an_absent_validation_split_has_no_tokens(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path, documents=5, shard_tokens=1000, val_fraction=0.0)
    assert open_stream(folder, "val").tokens == 0
    assert open_stream(folder, "train").tokens == len(split_tokens(folder, "train")) > 0


def test_folders_without_shards_are_refused_by_name(tmp_path: Path) -> None:
    for action in (lambda: open_stream(tmp_path / "no", "train"), lambda: verify(tmp_path / "no")):
        assert str(tmp_path / "no") in error_of(action)
    assert str(tmp_path) in error_of(lambda: open_stream(tmp_path, "train"))
    assert str(tmp_path) in error_of(lambda: verify(tmp_path))
    (tmp_path / "file").write_text("x")
    assert str(tmp_path / "file") in error_of(lambda: open_stream(tmp_path / "file", "train"))
    assert str(tmp_path / "file") in error_of(lambda: verify(tmp_path / "file"))


# --- corrupt files ---------------------------------------------------------------------------------------------------


def test_verify_counts_every_token(small: Path, large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (small, large):
        assert verify(folder) == len(split_tokens(folder, "train")) + len(split_tokens(folder, "val"))
    assert main(["verify", str(small)]) == 0
    assert f"{verify(small):,} tokens" in capsys.readouterr().out


def test_verify_of_a_corrupt_folder_exits_with_two(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = copy / "train_00001.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    assert main(["verify", str(copy)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert str(shard) in lines[0]


@pytest.mark.parametrize("name", ["train_00000.npy", "train_00001.npy", "val_00000.npy"])
@pytest.mark.parametrize("change", [-1, -2, -300, 1, 2, "empty", "gone"])
def test_a_shard_of_the_wrong_size_is_refused(copy: Path, name: str, change: int | str) -> None:
    path = copy / name
    data = path.read_bytes()
    if change == "gone":
        path.unlink()
    elif change == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(data[:change] if int(change) < 0 else data + b"\0" * int(change))
    assert str(path) in error_of(lambda: open_stream(copy, name[: name.index("_")]))
    assert str(path) in error_of(lambda: verify(copy))


@pytest.mark.parametrize("change", ["cut", "empty", "gone", "zeros", "other shard's", "longer"])
def test_a_corrupt_checksum_file_is_refused(copy: Path, change: str) -> None:
    path = copy / "train_00001.crc32.npy"
    data = path.read_bytes()
    others = (copy / "train_00000.crc32.npy").read_bytes()
    path.write_bytes(
        {"cut": data[:-1], "empty": b"", "zeros": b"\0" * len(data), "longer": data + data}.get(change, others)
    )
    if change == "gone":
        path.unlink()
    # The message may name the shard or its checksum file.
    assert str(copy / "train_00001") in error_of(lambda: verify(copy))
    assert str(copy / "train_00001") in error_of(lambda: open_stream(copy, "train").read(0, 300))


def test_every_read_checks_what_it_touches(large: Path, tmp_path: Path) -> None:
    """Tokens of other blocks can still be read; tokens of the block with the flipped bit cannot."""
    folder = Path(shutil.copytree(large, tmp_path / "copy"))
    path = folder / "train_00001.npy"
    data = bytearray(path.read_bytes())
    in_shard = BLOCK_TOKENS + 17
    data[128 + 2 * in_shard] ^= 1
    path.write_bytes(data)
    stream = open_stream(folder, "train")
    shard_start = 2 * BLOCK_TOKENS + 1000
    expected = split_tokens(large, "train")
    for start, count in ((0, shard_start + BLOCK_TOKENS), (shard_start + 2 * BLOCK_TOKENS, 5000)):
        assert np.array_equal(stream.read(start, count), expected[start : start + count])
    for start, count in (
        (shard_start + BLOCK_TOKENS, 1),
        (shard_start + in_shard, 1),
        (shard_start + 2 * BLOCK_TOKENS - 1, 2),
        (0, stream.tokens),
    ):
        assert str(path) in error_of(lambda start=start, count=count: stream.read(start, count))  # type: ignore[misc]


# Of the bytes of a file, the quick suite corrupts every fifth one, the slow suite each one.
EVERY = [5, pytest.param(1, marks=pytest.mark.slow)]


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("name", ["train_00001.npy", "val_00000.npy", "train_00001.crc32.npy", "manifest.json"])
def test_verify_finds_a_flipped_bit_anywhere(copy: Path, name: str, every: int) -> None:
    path = copy / name
    data = path.read_bytes()
    draw = random.Random(0)
    missed: list[tuple[int, int, bytes]] = []
    unnamed: list[str] = []
    for place in range(0, len(data), every):
        bit = draw.randrange(8)
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
        try:
            verify(copy)
        except UserError as error:
            unnamed += [str(error)] if str(copy) not in str(error) else []
        else:
            missed.append((place, bit, data[max(0, place - 20) : place + 20]))
    assert not missed
    assert not unnamed


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("name", ["train_00001.npy", "train_00001.crc32.npy", "manifest.json"])
def test_reading_after_a_flipped_bit_is_right_or_refused(small: Path, copy: Path, name: str, every: int) -> None:
    """Without `verify`: the same tokens or a UserError, nothing else."""
    expected = read_all(small)
    path = copy / name
    data = path.read_bytes()
    draw = random.Random(0)
    refused = 0
    for place in range(0, len(data), every):
        bit = draw.randrange(8)
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
        try:
            assert read_all(copy) == expected, (place, bit)
        except UserError:
            refused += 1
    assert refused


@pytest.mark.parametrize("every", EVERY)
def test_verify_finds_a_flipped_bit_in_a_checksum_header(copy: Path, every: int) -> None:
    path = copy / "train_00001.crc32.npy"
    data = path.read_bytes()
    for place in range(0, 128, every):
        for bit in (0, 2, 5):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
            assert str(copy / "train_00001") in error_of(lambda: verify(copy))


# --- the manifest ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [("NAME", "gpt2-de"), ("RANKS_SHA256", "0" * 64)])
def test_shards_of_another_tokenizer_are_refused(tmp_path: Path, name: str, value: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, name, value)
        folder = make_corpus(tmp_path, documents=5, shard_tokens=1000)
    for action in (lambda: open_stream(folder, "train"), lambda: verify(folder)):
        message = error_of(action)
        assert str(folder / "manifest.json") in message
        assert "tokenizer" in message


def test_shards_of_another_format_are_refused(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megagpt.data.prepare, "FORMAT", "megagpt-shards-99")
        folder = make_corpus(tmp_path, documents=5, shard_tokens=1000)
    message = error_of(lambda: open_stream(folder, "train"))
    assert str(folder / "manifest.json") in message
    assert "megagpt-shards-99" in message


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"x"', "{}", '{"format": "megagpt-shards-1"}', "\udcff"], ids=repr
)
def test_an_unreadable_manifest_is_refused(copy: Path, text: str) -> None:
    path = copy / "manifest.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert str(path) in error_of(lambda: open_stream(copy, "train"))
    assert str(path) in error_of(lambda: verify(copy))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "megagpt-shards-2"),
        ("tokenizer", None),
        ("tokenizer", "gpt2"),
        ("dtype", "<u3"),
        ("dtype", None),
        ("splits", None),
        ("splits", {"train": {"shards": []}}),
        ("splits", {"train": {"shards": [{}]}, "val": {"shards": []}}),
        ("splits", {"train": {"shards": [{"file": "train_00000.npy"}]}, "val": {"shards": []}}),
    ],
)
def test_a_manifest_with_a_wrong_value_is_refused(copy: Path, key: str, value: object) -> None:
    path = copy / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert str(copy) in error_of(lambda: open_stream(copy, "train"))
    assert str(copy) in error_of(lambda: verify(copy))


def test_checksum_files_are_never_taken_for_tokens(copy: Path) -> None:
    """Even if the manifest is lost."""
    expected = split_tokens(copy, "train").tolist()
    (copy / "manifest.json").unlink()
    try:
        found, complaint = read_all(copy)["train"], ""
    except UserError as error:
        found, complaint = expected, str(error)
    assert found == expected
    assert "another tokenizer" not in complaint
