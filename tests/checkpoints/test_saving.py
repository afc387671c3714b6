"""Saves in the background: who writes what, what training waits for, and how much memory it takes."""

import ctypes
import errno
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megagpt.checkpoints import checksums, saving, storage
from megagpt.checkpoints.compatibility import Allowed
from megagpt.checkpoints.folder import list_checkpoints
from megagpt.checkpoints.loading import choose, load
from megagpt.checkpoints.saving import Saver, meta_of, share_of
from megagpt.checkpoints.storage import Writer
from megagpt.config import Config
from megagpt.config_file import build_config
from megagpt.config_occasions import CheckpointConfig
from megagpt.engines.engine import Replica, build_engine
from megagpt.engines.flat_shard import FlatShard
from megagpt.errors import UserError
from megagpt.measure.cases import ENGINE_CASES, Case
from megagpt.position import position
from megagpt.world import join
from tests.checkpoints.toy_state import ALONE, SHAPES, WHOLE, meta, save, saved_value, state_of
from tests.processes import run_ranks

# --- who writes what ---


@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=8),
    starts=st.integers(0, 5),
    replicas=st.integers(1, 6),
)
def test_equal_copies_write_every_element_once_in_equal_shares(sizes: list[int], starts: int, replicas: int) -> None:
    state = {str(i): FlatShard(torch.arange(float(n)), (n + starts,), starts) for i, n in enumerate(sizes)}
    written: dict[str, list[tuple[int, float]]] = {key: [] for key in state}
    counts = []
    for replica in range(replicas):
        share = share_of(state, Replica(replica, replicas))
        counts.append(sum(s.flat.numel() for s in share.values()))
        for key, shard in share.items():
            assert shard.shape == state[key].shape
            written[key] += [(shard.start + i, value) for i, value in enumerate(shard.flat.tolist())]
    assert max(counts) - min(counts) <= 1
    for key, shard in state.items():
        assert written[key] == [(starts + i, value) for i, value in enumerate(shard.flat.tolist())]


# --- in the background ---


class Gate:
    """Holds every save at its first byte until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.entered = threading.Event(), threading.Event()
        self.inside = self.most = 0
        write = Writer.write_data

        def gated(writer: Writer, *arguments: Any) -> Any:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.entered.set()
            assert self.opened.wait(60)
            result = write(writer, *arguments)
            self.inside -= 1
            return result

        monkeypatch.setattr(Writer, "write_data", gated)


def test_training_goes_on_while_its_state_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk gets the state as it was when the save began."""
    gate = Gate(monkeypatch)
    saver = Saver(tmp_path, CheckpointConfig(), ALONE)
    state = state_of(1)
    saver.save(state, WHOLE, meta(1))
    assert gate.entered.wait(60)
    for shard in state.values():
        shard.flat.zero_()
    assert saver.poll() is None
    assert not saver.failed
    assert list_checkpoints(tmp_path) == []
    gate.opened.set()
    saved = saver.finish()
    assert saved is not None
    assert saved.stall_seconds <= saved.save_seconds
    assert (saved.checkpoint.tokens, saved_value(saved.checkpoint)) == (4, 1.0)
    assert saver.finish() is None


def test_one_save_is_in_flight_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    saver = Saver(tmp_path, CheckpointConfig(keep_last=9), ALONE)
    save(saver, 1)
    assert gate.entered.wait(60)
    second = threading.Thread(target=save, args=(saver, 2))
    second.start()
    second.join(0.2)
    assert second.is_alive(), "the second save did not wait for the first"
    gate.opened.set()
    second.join(60)
    save(saver, 3)
    saver.finish()
    assert gate.most == 1
    assert [saved_value(c) for c in list_checkpoints(tmp_path)] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_error_is_reported_and_the_last_checkpoint_stays(
    asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(tmp_path, CheckpointConfig(asynchronous=asynchronous, keep_last=1), ALONE)
    save(saver, 1)
    saver.finish()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write_data", full)
        save(saver, 2)
        with pytest.raises(UserError, match=f"{tmp_path}.*disk full; free some space"):
            saver.finish()
    assert [c.verify() for c in list_checkpoints(tmp_path)] == [[]]
    save(saver, 3)
    saver.proved(12)
    saver.finish()
    assert [c.tokens for c in list_checkpoints(tmp_path)] == [12]
    assert not list((tmp_path / "checkpoints").glob("*.saving-*"))


def test_training_waits_for_saves_if_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(saving, "free_memory", lambda: 10)
    saver = Saver(tmp_path, CheckpointConfig(), ALONE)
    for step in (1, 2):
        save(saver, step)
        assert list_checkpoints(tmp_path)[-1].tokens == 4 * step, "it did not wait"
    saved = saver.finish()
    assert saved is not None
    assert saved.stall_seconds >= saved.save_seconds
    assert capsys.readouterr().out.count("training waits for its saves") == 1


def test_a_folder_without_write_access_is_found_early(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match="checkpoints cannot be written there"):
        Saver(tmp_path, CheckpointConfig(), ALONE).probe(1000)


def test_a_loaded_state_lives_until_the_engine_has_it(tmp_path: Path) -> None:
    """An engine with its state on a disk writes back the copies that are still in use, and no others."""
    saver = Saver(tmp_path, CheckpointConfig(), ALONE)
    save(saver, 1)
    saver.finish()
    handed_out: list[weakref.ref[FlatShard]] = []

    class Swapped:
        world = ALONE

        def state(self) -> dict[str, FlatShard]:
            state = state_of(0)
            handed_out.extend(map(weakref.ref, state.values()))
            return state

        def state_loaded(self, scalars: dict[str, Any]) -> None:
            self.values = [float(shard.flat[0]) for ref in handed_out if (shard := ref()) is not None]

    engine = Swapped()
    load(list_checkpoints(tmp_path)[0].open(), engine)  # type: ignore[arg-type]
    assert engine.values == [1.0] * len(SHAPES)


# --- memory ---

LAYERS, WIDTH = 7, 512
LARGEST = 4 * WIDTH * 4 * WIDTH  # bytes of an MLP's matrix in fp32
BUFFERS = checksums._KEPT_BLOCKS * checksums.BLOCK_BYTES + storage._AHEAD_BYTES  # of a reader, whatever it reads


def large_config(name: str) -> Config:
    case = Case(ENGINE_CASES[name].engine, 2)
    model = {"layers": LAYERS, "width": WIDTH, "heads": 8, "context": 32, "vocab_size": 500}
    tree = {
        "model": model,
        "engine": case.engine,
        "train": {"precision": "fp32", "batch_tokens": 512, "micro_batch": 1},
    }
    return build_config(tree, "test")


def growth(function: Any) -> int:
    """Bytes by which this process's memory grows while the function runs, at its highest point."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    before = int(status["VmRSS"].split()[0])
    function()
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * (int(status["VmHWM"].split()[0]) - before)


def save_and_load(folder: str, names: list[str]) -> dict[str, tuple[int, int]]:
    """Growth of this rank's memory in a save that training waits for, and in a load."""
    grown = {}
    with join("cpu", tune_allocator=False) as world:
        for name in names:
            engine = build_engine(large_config(name), world)
            saver = Saver(Path(folder) / name, CheckpointConfig(asynchronous=False), world)
            state = engine.state()
            description = meta_of(engine, position(engine.config, 1, 1), [], milestone=False, skipped_updates=0)
            written = growth(lambda: saver.save(state, engine.replica, description))  # noqa: B023
            assert saver.finish() is not None
            # What ZeRO does with what was read, it does after every step: it gathers the weights.
            engine.state_loaded = lambda scalars: None  # type: ignore[method-assign]
            found = choose(Path(folder) / name, engine.config, [], Allowed(), world)
            assert found is not None
            read = growth(lambda: load(found, engine))  # noqa: B023
            grown[name] = written, read
    return grown


@pytest.mark.slow
def test_memory_grows_by_a_few_of_the_largest_parameters(tmp_path: Path) -> None:
    """Not by a rank's share of the state, which is more than 30 of them here, nor by the whole model."""
    names = ["ddp", "fsdp", "zero-2", "zero-3"]  # zero-1 has the state of zero-2
    share = large_config("ddp").model.checkpoint_bytes // 2
    assert share > 30 * LARGEST
    for grown in run_ranks(2, save_and_load, str(tmp_path), names):
        for name, (written, read) in grown.items():
            print(f"{name}: {written / LARGEST:.1f} of the largest in a save, {read / LARGEST:.1f} in a load")
            assert written <= 4 * LARGEST, name
            assert read <= BUFFERS + 10 * LARGEST, name
