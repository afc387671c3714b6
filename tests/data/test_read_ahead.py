"""Batches read ahead by a thread are the same batches, with errors in their place."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from megagpt.data.loader import Batch, Corpus, Share, placed, read_ahead, train_batches
from megagpt.errors import UserError


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_read_ahead_yields_the_same_batches(mixture: Corpus) -> None:
    def batches() -> Iterator[Batch]:
        return train_batches(mixture, 0, 40, lambda seen: 6, Share(0, 1, 2))

    plain, ahead = list(batches()), list(read_ahead(batches()))
    assert len(ahead) == len(plain) == 7
    for one, other in zip(plain, ahead, strict=True):
        for (x, y), (u, v) in zip(one.micro_batches, other.micro_batches, strict=True):
            assert torch.equal(x, u)
            assert torch.equal(y, v)
    assert not reader_threads()


def numbered(count: int, made: list[int], fail_at: int = -1) -> Iterator[Batch]:
    for i in range(count):
        if i == fail_at:
            raise UserError(f"shard {i} is corrupt")
        made.append(i)
        yield Batch([], i, 0)


@pytest.mark.parametrize("fail_at", [0, 1, 5])
def test_read_ahead_raises_its_threads_errors_in_their_place(fail_at: int) -> None:
    seen = []
    with pytest.raises(UserError, match=f"shard {fail_at} is corrupt"):  # noqa: PT012
        for batch in read_ahead(numbered(10, [], fail_at)):
            seen.append(batch.sequences)
    assert seen == list(range(fail_at))
    assert not reader_threads()


def test_read_ahead_stays_a_few_batches_ahead() -> None:
    made: list[int] = []
    batches = read_ahead(numbered(1000, made))
    assert next(batches).sequences == 0
    deadline = time.monotonic() + 10
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) >= 3, "it must work while the consumer waits"
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


def test_batches_for_a_gpu_are_pinned_by_the_thread_that_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a GPU: each thread has a current one, and page-locked memory is of that one."""
    current = threading.local()
    in_thread: list[tuple[str, object]] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        in_thread.append((threading.current_thread().name, current.device))
        return tensor + 100

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(current, "device", device))
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batches = [Batch([(torch.tensor([i]), torch.tensor([-i]))], i, 1) for i in range(3)]
    device = torch.device("cuda", 5)
    for i, batch in enumerate(read_ahead(placed(iter(batches), device))):
        assert batch.sequences == i
        assert [tensor.item() for tensor in batch.micro_batches[0]] == [i + 100, 100 - i]
    assert list(placed(iter(batches), torch.device("cpu"))) == batches
    assert len(in_thread) == 6
    assert all(name.startswith("read-ahead") and found == device for name, found in in_thread)
