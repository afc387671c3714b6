"""nanoGPT's train.bin and val.bin are read as raw uint16; what cannot be such tokens is refused by name."""

from pathlib import Path

import numpy as np
import pytest

from megagpt.cli import main
from megagpt.data.shards import open_stream, verify
from tests.conftest import Refusal, write_tiny
from tests.data.folders import error_of, read_all, write_bin


def some_tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50257, count)


def write_raw(path: Path, tokens: np.ndarray, dtype: str = "<u2") -> Path:
    """As nanoGPT's data/openwebtext/prepare.py writes it: np.memmap of the bare tokens."""
    memory = np.memmap(path, dtype=dtype, mode="w+", shape=(len(tokens),))
    memory[:] = tokens
    memory.flush()
    return path


@pytest.mark.parametrize("count", [1, 7, 511, 512, 513, 100_000])
def test_files_without_a_header_are_read(tmp_path: Path, count: int) -> None:
    train, val = some_tokens(count), some_tokens(100, 1)
    write_raw(tmp_path / "train.bin", train)
    write_raw(tmp_path / "val.bin", val)
    assert read_all(tmp_path) == {"train": train.tolist(), "val": val.tolist()}
    assert verify(tmp_path) == count + 100


def test_a_run_trains_on_files_without_a_header(tmp_path: Path) -> None:
    write_raw(tmp_path / "train.bin", some_tokens(5000))
    write_raw(tmp_path / "val.bin", some_tokens(2000, 1))
    assert (
        main(["train", str(write_tiny(tmp_path, tmp_path, train={"tokens": 256}, schedule={"warmup_tokens": 0}))]) == 0
    )


def test_verify_names_shards_without_checksums(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_raw(tmp_path / "train.bin", some_tokens(5000))
    assert main(["data", "verify", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "5,000 tokens" in output
    assert "no checksums: train.bin" in output


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_a_magic_decides_before_the_name(tmp_path: Path, name: str) -> None:
    """llm.c's and Llama 3's headers begin with a number that is no token of GPT-2."""
    write_raw(tmp_path / "train.bin", some_tokens(600))
    tokens = some_tokens(300, 1)
    path = write_bin(tmp_path / name, tokens)
    assert read_all(tmp_path)[name.removesuffix(".bin")] == tokens.tolist()
    split = name.removesuffix(".bin")
    path.write_bytes(path.read_bytes()[:-2])
    assert "truncated" in error_of(lambda: open_stream(tmp_path, split))
    path.write_bytes(path.read_bytes()[:900])
    assert "truncated" in error_of(lambda: open_stream(tmp_path, split))
    write_bin(path, tokens, magic=20240801, version=7)
    assert "Llama 3" in error_of(lambda: open_stream(tmp_path, split))
    write_bin(path, tokens, magic=20240521)
    assert "magic 20240521" in error_of(lambda: open_stream(tmp_path, split))


@pytest.mark.parametrize("place", [0, 3, 511, 512, 4999])
@pytest.mark.parametrize("token", [50257, 65535])
def test_tokens_outside_the_vocabulary_are_refused(tmp_path: Path, place: int, token: int) -> None:
    tokens = some_tokens(5000)
    tokens[place] = token
    path = write_raw(tmp_path / "train.bin", tokens)
    message = error_of(lambda: verify(tmp_path))
    assert str(path) in message
    assert f"token {token}" in message


@pytest.mark.parametrize("count", [4, 100, 5000])
@pytest.mark.parametrize("dtype", ["<u4", "<i4", "<i8"])
def test_wider_numbers_are_told_from_tokens(tmp_path: Path, dtype: str, count: int) -> None:
    """GPT-2's ids, and those of a vocabulary that needs more than 16 bits."""
    for tokens in (some_tokens(count), np.random.default_rng(0).integers(0, 100_000, count)):
        write_raw(tmp_path / "train.bin", tokens, dtype)
        message = error_of(lambda: open_stream(tmp_path, "train"))
        assert str(tmp_path / "train.bin") in message
        assert "uint16" in message


@pytest.mark.parametrize("size", [0, 1, 999, 10_001])
def test_files_of_half_a_token_are_refused(tmp_path: Path, size: int) -> None:
    path = write_raw(tmp_path / "train.bin", some_tokens(6000))
    path.write_bytes(path.read_bytes()[:size])
    message = error_of(lambda: open_stream(tmp_path, "train"))
    assert str(path) in message
    assert f"{size} bytes" in message


def test_tokens_of_single_characters_are_refused(tmp_path: Path) -> None:
    """nanoGPT's shakespeare_char has meta.pkl beside the tokens."""
    path = write_raw(tmp_path / "train.bin", some_tokens(100) % 65)
    (tmp_path / "meta.pkl").write_bytes(b"\x80\x04}.")
    message = error_of(lambda: open_stream(tmp_path, "train"))
    assert str(path) in message
    assert "meta.pkl" in message


def test_another_name_is_refused_with_the_names_that_are_read(tmp_path: Path, refusal: Refusal) -> None:
    tokens = some_tokens(6000)
    path = write_raw(tmp_path / "web_train_0.bin", tokens)
    refusal(["data", "verify", str(tmp_path)], str(path), "without a header", "named train.bin and val.bin")
    path.rename(tmp_path / "train.bin")
    assert read_all(tmp_path)["train"] == tokens.tolist()
