"""A checkpoint's checksums: they cover every byte, and no byte that differs is handed out."""

import io
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.checkpoints import checksums
from megagpt.checkpoints.checksums import CheckedReader, CorruptError, FileSum, HashingWriter, sum_bytes
from megagpt.checkpoints.storage import Reader
from megagpt.engines.flat_shard import FlatShard

BLOCK = 16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "BLOCK_BYTES", BLOCK)


def reference(data: bytes) -> FileSum:
    return FileSum(len(data), [xxhash.xxh3_64(data[i : i + BLOCK]).hexdigest() for i in range(0, len(data), BLOCK)])


def write(path: Path, pieces: list[bytes]) -> FileSum:
    result = FileSum()
    with path.open("wb") as file, HashingWriter(file, result) as writer:
        for piece in pieces:
            position = writer.tell()
            assert writer.write(piece) == len(piece)
            assert writer.tell() == position + len(piece)
    return result


pieces_of_bytes = st.lists(st.binary(max_size=3 * BLOCK), max_size=6)


@given(pieces=pieces_of_bytes)
def test_checksums_do_not_depend_on_how_bytes_are_written(
    pieces: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("sums") / "file"
    data = b"".join(pieces)
    assert write(path, pieces) == reference(data) == sum_bytes(data)
    assert path.read_bytes() == data


@given(data=st.data(), pieces=pieces_of_bytes)
@settings(max_examples=50)
def test_reads_are_those_of_a_plain_file(
    data: st.DataObject, pieces: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("reads") / "file"
    expected = write(path, pieces)
    plain = io.BytesIO(b"".join(pieces))
    with CheckedReader(path, expected) as reader:
        for _ in range(8):
            whence = data.draw(st.sampled_from([0, 1, 2]))
            base = {0: 0, 1: plain.tell(), 2: expected.size}[whence]
            target = data.draw(st.integers(0, expected.size + 3))
            count = data.draw(st.integers(0, 3 * BLOCK))
            assert reader.seek(target - base, whence) == plain.seek(target - base, whence)
            assert reader.read(count) == plain.read(count)
            assert reader.tell() == plain.tell()


@given(pieces=pieces_of_bytes.filter(lambda p: any(p)), data=st.data())
@settings(max_examples=50)
def test_a_flipped_bit_is_found_by_each_reader_of_its_block(
    pieces: list[bytes], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("flips") / "file"
    expected = write(path, pieces)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with CheckedReader(path, expected) as reader:
        for start in range(0, len(content), BLOCK):
            reader.seek(start)
            if start <= place < start + BLOCK:
                with pytest.raises(CorruptError, match=f"{path.name} is corrupt between its bytes {start} and"):
                    reader.read(1)
            else:
                assert reader.read(BLOCK) == bytes(content[start : start + BLOCK])


def test_missing_short_and_long_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    expected = write(path, [b"x" * 40])
    path.write_bytes(b"x" * 39)
    with pytest.raises(CorruptError, match="file has 39 bytes instead of 40"):
        CheckedReader(path, expected)
    path.write_bytes(b"x" * 41)
    with pytest.raises(CorruptError, match="file has 41 bytes instead of 40"):
        CheckedReader(path, expected)
    path.unlink()
    with pytest.raises(CorruptError, match="file is missing"):
        CheckedReader(path, expected)


def test_tensors_of_any_layout_are_read_into_any_layout(tmp_path: Path) -> None:
    """Equal shapes in several dtypes and orders, written by PyTorch's own writer; the second one of each kind too."""
    numbers = [torch.arange(first, first + 6.0) for first in range(8)]
    state = {
        **{f"rows {i}": numbers[i].view(2, 3) for i in range(3)},
        **{f"columns {i}": numbers[i].view(3, 2).t() for i in range(3, 6)},
        **{f"double {i}": numbers[i].view(2, 3).double() for i in range(6, 8)},
    }
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    sums = {path.name: sum_bytes(path.read_bytes()) for path in tmp_path.iterdir()}
    for place in (torch.zeros(2, 3), torch.zeros(3, 2).t(), torch.zeros(4, 6)[::2, ::2]):
        loaded = {key: place.clone(memory_format=torch.preserve_format) for key in state}
        dcp.load(loaded, storage_reader=Reader(tmp_path, sums), no_dist=True)
        assert all(torch.equal(loaded[key], state[key].float()) for key in state)
    for start, stop in ((3, 6), (0, 3), (1, 5)):
        parts = {key: FlatShard(torch.zeros(stop - start), (2, 3), start) for key in state}
        dcp.load(dict(parts), storage_reader=Reader(tmp_path, sums), no_dist=True)
        for key, part in parts.items():
            assert torch.equal(part.flat, state[key].float().flatten()[start:stop]), (key, start)
