"""Shards read as one stream, whatever their boundaries; whatever is damaged or foreign is refused by name."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import megagpt.data.prepare
from megagpt.cli import main
from megagpt.data import tokenizer
from megagpt.data.prepare import prepare
from megagpt.data.shards import BLOCK_BYTES, TokenStream, open_stream, verify
from megagpt.data.sources import open_source
from megagpt.errors import UserError

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
    """The split as numpy reads it, without this package's code."""
    files = sorted(p for p in folder.glob(f"{split}_*.npy") if not p.name.endswith(".crc32.npy"))
    return np.concatenate([np.load(p) for p in files]) if files else np.empty(0, np.uint16)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of several blocks each, the last block of each partly filled."""
    return make_corpus(tmp_path_factory.mktemp("large"), documents=7000, shard_tokens=2 * BLOCK_TOKENS + 1000)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred tokens in a few shards: small enough to damage every byte of it."""
    return make_corpus(tmp_path_factory.mktemp("small"), documents=12, shard_tokens=200, val_fraction=0.2)


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    """The small corpus, to be damaged."""
    return Path(shutil.copytree(small, tmp_path / "copy"))


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read_all(folder: Path) -> dict[str, list[int]]:
    streams = {split: open_stream(folder, split) for split in ("train", "val")}
    return {split: stream.read(0, stream.tokens).tolist() for split, stream in streams.items()}


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
def test_reads_equal_the_concatenation(large: Path, data: st.DataObject) -> None:
    stream, expected = open_stream(large, "train"), split_tokens(large, "train")
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


def test_one_stream_many_reads(large: Path) -> None:
    """As a run does it: the same stream, forth and back."""
    stream, expected = open_stream(large, "train"), split_tokens(large, "train")
    draw = random.Random(0)
    for _ in range(200):
        start = draw.randrange(len(expected) - 1025)
        assert np.array_equal(stream.read(start, 1025), expected[start : start + 1025])
    assert np.array_equal(stream.read(0, stream.tokens), expected)
    assert np.array_equal(stream.read(stream.tokens - 1, 1), expected[-1:])


def test_fingerprint_tells_corpora_apart(small: Path, large: Path, copy: Path) -> None:
    assert open_stream(small, "train").fingerprint == open_stream(copy, "train").fingerprint
    prints = [open_stream(folder, split).fingerprint for folder in (small, large) for split in ("train", "val")]
    assert len(set(prints)) == 4


def test_a_split_that_is_absent(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path, documents=5, shard_tokens=1000, val_fraction=0.0)
    assert open_stream(folder, "val").tokens == 0
    assert open_stream(folder, "train").tokens == len(split_tokens(folder, "train")) > 0


def test_no_corpus(tmp_path: Path) -> None:
    for action in (lambda: open_stream(tmp_path / "no", "train"), lambda: verify(tmp_path / "no")):
        assert str(tmp_path / "no") in error_of(action)
    assert str(tmp_path) in error_of(lambda: open_stream(tmp_path, "train"))
    assert str(tmp_path) in error_of(lambda: verify(tmp_path))
    (tmp_path / "file").write_text("x")
    assert str(tmp_path / "file") in error_of(lambda: open_stream(tmp_path / "file", "train"))
    assert str(tmp_path / "file") in error_of(lambda: verify(tmp_path / "file"))


# --- damage ----------------------------------------------------------------------------------------------------------


def test_verify_counts_what_is_whole(small: Path, large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (small, large):
        assert verify(folder) == len(split_tokens(folder, "train")) + len(split_tokens(folder, "val"))
    assert main(["verify", str(small)]) == 0
    assert f"{verify(small):,} tokens" in capsys.readouterr().out


def test_verify_of_a_damaged_folder_exits_with_two(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = copy / "train_00001.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    assert main(["verify", str(copy)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert str(shard) in lines[0]


@pytest.mark.parametrize("name", ["train_00000.npy", "train_00001.npy", "val_00000.npy"])
@pytest.mark.parametrize("change", [-1, -2, -300, 1, 2, "empty", "gone"])
def test_wrong_size(copy: Path, name: str, change: int | str) -> None:
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
def test_damaged_checksum_file(copy: Path, change: str) -> None:
    path = copy / "train_00001.crc32.npy"
    data = path.read_bytes()
    others = (copy / "train_00000.crc32.npy").read_bytes()
    path.write_bytes(
        {"cut": data[:-1], "empty": b"", "zeros": b"\0" * len(data), "longer": data + data}.get(change, others)
    )
    if change == "gone":
        path.unlink()
    # The shard cannot be trusted any more; either file's name leads to it.
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


@pytest.mark.parametrize("name", ["train_00001.npy", "val_00000.npy", "train_00001.crc32.npy", "manifest.json"])
def test_verify_finds_a_flipped_bit_anywhere(copy: Path, name: str) -> None:
    path = copy / name
    data = path.read_bytes()
    draw = random.Random(0)
    missed: list[tuple[int, int, bytes]] = []
    unnamed: list[str] = []
    for place in range(len(data)):
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


@pytest.mark.parametrize("name", ["train_00001.npy", "train_00001.crc32.npy", "manifest.json"])
def test_reading_after_a_flipped_bit_is_right_or_refused(small: Path, copy: Path, name: str) -> None:
    """Without `verify`: no other tokens, and no other exception, than there would be."""
    expected = read_all(small)
    path = copy / name
    data = path.read_bytes()
    draw = random.Random(0)
    refused = 0
    for place in range(0, len(data), 2):
        bit = draw.randrange(8)
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
        try:
            assert read_all(copy) == expected, (place, bit)
        except UserError:
            refused += 1
    assert refused


def test_headers_of_checksum_files(copy: Path) -> None:
    path = copy / "train_00001.crc32.npy"
    data = path.read_bytes()
    for place in range(128):
        for bit in (0, 2, 5):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
            assert str(copy / "train_00001") in error_of(lambda: verify(copy))


# --- the manifest ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [("NAME", "gpt2-de"), ("RANKS_SHA256", "0" * 64)])
def test_shards_of_another_tokenizer(tmp_path: Path, name: str, value: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, name, value)
        folder = make_corpus(tmp_path, documents=5, shard_tokens=1000)
    for action in (lambda: open_stream(folder, "train"), lambda: verify(folder)):
        message = error_of(action)
        assert str(folder / "manifest.json") in message
        assert "tokenizer" in message


def test_shards_of_another_format(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megagpt.data.prepare, "FORMAT", "megagpt-shards-99")
        folder = make_corpus(tmp_path, documents=5, shard_tokens=1000)
    message = error_of(lambda: open_stream(folder, "train"))
    assert str(folder / "manifest.json") in message
    assert "megagpt-shards-99" in message


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"x"', "{}", '{"format": "megagpt-shards-1"}', "\udcff"], ids=repr
)
def test_manifest_that_cannot_be_read(copy: Path, text: str) -> None:
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
def test_manifest_with_a_wrong_value(copy: Path, key: str, value: object) -> None:
    path = copy / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert str(copy) in error_of(lambda: open_stream(copy, "train"))
    assert str(copy) in error_of(lambda: verify(copy))


def test_a_lost_manifest_is_not_a_foreign_corpus(copy: Path) -> None:
    """Without it, checksum files must not be taken for tokens."""
    expected = split_tokens(copy, "train").tolist()
    (copy / "manifest.json").unlink()
    try:
        found, complaint = read_all(copy)["train"], ""
    except UserError as error:
        found, complaint = expected, str(error)
    assert found == expected
    assert "another tokenizer" not in complaint


# --- shards of others ------------------------------------------------------------------------------------------------


def write_bin(
    path: Path, tokens: np.ndarray, magic: int = 20240520, version: int = 1, count: int | None = None
) -> Path:
    """As llm.c's data scripts write it: 256 int32 of header, then the tokens."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    return path


def some_tokens(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50257, count)


def test_llm_c_shards(tmp_path: Path) -> None:
    parts = [some_tokens(count, i) for i, count in enumerate((1000, 1, 700))]
    for i, part in enumerate(parts):
        write_bin(tmp_path / f"fineweb_train_{i:06d}.bin", part)
    val = some_tokens(300, 9)
    write_bin(tmp_path / "fineweb_val_000000.bin", val)
    assert read_all(tmp_path) == {"train": np.concatenate(parts).tolist(), "val": val.tolist()}
    assert open_stream(tmp_path, "train").read(998, 5).tolist() == np.concatenate(parts)[998:1003].tolist()
    assert verify(tmp_path) == 2001


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.uint32])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_build_nanogpt_shards(tmp_path: Path, dtype: type[np.generic], version: tuple[int, int]) -> None:
    parts = [some_tokens(count, i).astype(dtype) for i, count in enumerate((1000, 1, 700))]
    for i, part in enumerate(parts):
        with (tmp_path / f"edufineweb_train_{i:06d}.npy").open("wb") as file:
            np.lib.format.write_array(file, part, version=version)
    assert open_stream(tmp_path, "train").read(0, 1701).tolist() == np.concatenate(parts).tolist()
    assert open_stream(tmp_path, "val").tokens == 0
    assert verify(tmp_path) == 1701


def test_a_train_shard_is_never_validation(tmp_path: Path) -> None:
    """Whatever letters its name holds besides."""
    train, val = some_tokens(100, 0), some_tokens(50, 1)
    write_bin(tmp_path / "medieval_train_000000.bin", train)
    write_bin(tmp_path / "medieval_val_000000.bin", val)
    assert read_all(tmp_path) == {"train": train.tolist(), "val": val.tolist()}


def test_llama_shards_are_refused(tmp_path: Path) -> None:
    path = write_bin(tmp_path / "x_train_0.bin", some_tokens(100, 0), magic=20240801, version=7)
    for action in (lambda: open_stream(tmp_path, "train"), lambda: verify(tmp_path)):
        message = error_of(action)
        assert str(path) in message
        assert "Llama 3" in message


@pytest.mark.parametrize(("magic", "version"), [(20240521, 1), (20240520, 2), (0, 0), (-1, 1)])
def test_wrong_magic(tmp_path: Path, magic: int, version: int) -> None:
    path = write_bin(tmp_path / "x_train_0.bin", some_tokens(100, 0), magic=magic, version=version)
    message = error_of(lambda: open_stream(tmp_path, "train"))
    assert str(path) in message
    assert str(magic) in message


@pytest.mark.parametrize("left", [0, 3, 1023, 1024, 1025, 1223])
def test_truncated_bin(tmp_path: Path, left: int) -> None:
    path = write_bin(tmp_path / "x_train_0.bin", some_tokens(100, 0))
    path.write_bytes(path.read_bytes()[:left])
    for action in (lambda: open_stream(tmp_path, "train"), lambda: verify(tmp_path)):
        message = error_of(action)
        assert str(path) in message
        assert "truncated" in message


@pytest.mark.parametrize("count", [99, 101, 0, -100, 2**31 - 1])
def test_bin_whose_count_is_wrong(tmp_path: Path, count: int) -> None:
    path = write_bin(tmp_path / "x_train_0.bin", some_tokens(100, 0), count=count)
    assert str(path) in error_of(lambda: open_stream(tmp_path, "train"))


def test_npy_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "x_train_0.npy"
    np.save(path, some_tokens(100, 0).astype(np.uint16))
    data = path.read_bytes()
    for damaged in (
        data[:-1],
        data + b"\0",
        data[:100],
        data[:5],
        b"",
        b"PK\x03\x04" + data,
        data.replace(b"'", b"(", 1),
    ):
        path.write_bytes(damaged)
        assert str(path) in error_of(lambda: open_stream(tmp_path, "train"))
    for array in (np.zeros((3, 4), np.uint16), np.zeros(5, np.float32), np.zeros((), np.uint16), np.zeros(3, "U2")):
        np.save(path, array)
        assert str(path) in error_of(lambda: open_stream(tmp_path, "train"))


@pytest.mark.parametrize("token", [50257, 65535])
def test_bin_tokens_outside_the_vocabulary(tmp_path: Path, token: int) -> None:
    tokens = some_tokens(100, 0)
    tokens[63] = token
    write_bin(tmp_path / "x_train_0.bin", tokens)
    stream = open_stream(tmp_path, "train")
    assert stream.read(0, 63).tolist() == tokens[:63].tolist()
    for action in (lambda: stream.read(60, 10), lambda: verify(tmp_path)):
        message = error_of(action)
        assert str(tmp_path) in message
        assert str(token) in message


@pytest.mark.parametrize(
    ("token", "dtype"),
    [(-1, np.int16), (-100, np.int32), (50257, np.int32), (2**32 - 1, np.uint32), (2**63, np.uint64)],
)
def test_npy_tokens_outside_the_vocabulary(tmp_path: Path, token: int, dtype: type[np.generic]) -> None:
    tokens = (some_tokens(100, 0) % 30000).astype(dtype)
    tokens[63] = dtype(token)
    np.save(tmp_path / "x_train_0.npy", tokens)
    for action in (lambda: open_stream(tmp_path, "train").read(60, 10), lambda: verify(tmp_path)):
        assert str(tmp_path) in error_of(action)


def test_foreign_splits_that_are_absent(tmp_path: Path) -> None:
    write_bin(tmp_path / "x_val_0.bin", some_tokens(10, 0))
    message = error_of(lambda: open_stream(tmp_path, "train"))
    assert str(tmp_path) in message
    assert "x_val_0.bin" in message
    write_bin(tmp_path / "x_train_0.bin", some_tokens(0, 0))
    assert "empty" in error_of(lambda: open_stream(tmp_path, "train"))
    write_bin(tmp_path / "x_train_1.bin", some_tokens(7, 0))
    stream = open_stream(tmp_path, "train")
    assert isinstance(stream, TokenStream)
    assert stream.read(0, 7).tolist() == some_tokens(7, 0).tolist()
