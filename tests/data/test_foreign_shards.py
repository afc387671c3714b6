"""Shards of llm.c and build-nanogpt are read as they are; foreign and corrupt files are refused by name."""

from pathlib import Path

import numpy as np
import pytest

from megagpt.data.shards import open_stream, verify
from megagpt.data.token_stream import TokenStream
from tests.data.folders import error_of, read_all, write_bin


def some_tokens(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50257, count)


def test_llm_c_shards_are_read(tmp_path: Path) -> None:
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
def test_build_nanogpt_shards_are_read(tmp_path: Path, dtype: type[np.generic], version: tuple[int, int]) -> None:
    parts = [some_tokens(count, i).astype(dtype) for i, count in enumerate((1000, 1, 700))]
    for i, part in enumerate(parts):
        with (tmp_path / f"edufineweb_train_{i:06d}.npy").open("wb") as file:
            np.lib.format.write_array(file, part, version=version)
    assert open_stream(tmp_path, "train").read(0, 1701).tolist() == np.concatenate(parts).tolist()
    assert open_stream(tmp_path, "val").tokens == 0
    assert verify(tmp_path) == 1701


def test_letters_of_a_name_do_not_make_it_validation(tmp_path: Path) -> None:
    """`medieval` contains `val`."""
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
def test_another_magic_or_version_is_refused(tmp_path: Path, magic: int, version: int) -> None:
    path = write_bin(tmp_path / "x_train_0.bin", some_tokens(100, 0), magic=magic, version=version)
    message = error_of(lambda: open_stream(tmp_path, "train"))
    assert str(path) in message
    assert str(magic) in message


@pytest.mark.parametrize("left", [0, 3, 1023, 1024, 1025, 1223])
def test_a_truncated_bin_is_refused(tmp_path: Path, left: int) -> None:
    path = write_bin(tmp_path / "x_train_0.bin", some_tokens(100, 0))
    path.write_bytes(path.read_bytes()[:left])
    for action in (lambda: open_stream(tmp_path, "train"), lambda: verify(tmp_path)):
        message = error_of(action)
        assert str(path) in message
        assert "truncated" in message


@pytest.mark.parametrize("count", [99, 101, 0, -100, 2**31 - 1])
def test_a_bin_with_a_wrong_count_is_refused(tmp_path: Path, count: int) -> None:
    path = write_bin(tmp_path / "x_train_0.bin", some_tokens(100, 0), count=count)
    assert str(path) in error_of(lambda: open_stream(tmp_path, "train"))


def test_a_file_that_is_no_token_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x_train_0.npy"
    np.save(path, some_tokens(100, 0).astype(np.uint16))
    data = path.read_bytes()
    for corrupt in (
        data[:-1],
        data + b"\0",
        data[:100],
        data[:5],
        b"",
        b"PK\x03\x04" + data,
        data.replace(b"'", b"(", 1),
    ):
        path.write_bytes(corrupt)
        assert str(path) in error_of(lambda: open_stream(tmp_path, "train"))
    for array in (np.zeros((3, 4), np.uint16), np.zeros(5, np.float32), np.zeros((), np.uint16), np.zeros(3, "U2")):
        np.save(path, array)
        assert str(path) in error_of(lambda: open_stream(tmp_path, "train"))


@pytest.mark.parametrize("token", [50257, 65535])
def test_bin_tokens_outside_the_vocabulary_are_refused(tmp_path: Path, token: int) -> None:
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
def test_npy_tokens_outside_the_vocabulary_are_refused(tmp_path: Path, token: int, dtype: type[np.generic]) -> None:
    tokens = (some_tokens(100, 0) % 30000).astype(dtype)
    tokens[63] = dtype(token)
    np.save(tmp_path / "x_train_0.npy", tokens)
    for action in (lambda: open_stream(tmp_path, "train").read(60, 10), lambda: verify(tmp_path)):
        assert str(tmp_path) in error_of(action)


def test_a_folder_without_training_tokens_is_refused(tmp_path: Path) -> None:
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
