"""The newest start of a run writes; an older one cannot, whatever it was about to do."""

import threading
from pathlib import Path

import pytest

from megagpt.checkpoints.checkpoint import Checkpoint
from megagpt.checkpoints.folder import list_checkpoints
from megagpt.checkpoints.saving import Saver
from megagpt.config_occasions import CheckpointConfig
from megagpt.incarnations import Incarnation, Superseded, claim, list_incarnations
from megagpt.world import World
from tests.checkpoints.toy_state import WHOLE, is_complete, meta, saved_value, state_of
from tests.conftest import metrics, write_tiny
from tests.processes import start_train
from tests.runs import PATIENCE, wait_for_steps

ALONE = World.alone()


def saver(run: Path, incarnation: Incarnation) -> Saver:
    return Saver(run, CheckpointConfig(keep_last=1), ALONE, incarnation)


def save(by: Saver, value: float, step: int) -> None:
    by.save(state_of(value), WHOLE, meta(step))
    by.finish()


def test_each_incarnation_supersedes_all_before(tmp_path: Path) -> None:
    starts = [claim(tmp_path, {"host": f"h{i}"}) for i in range(3)]
    assert [start.number for start in starts] == [1, 2, 3]
    assert [start.is_superseded() for start in starts] == [True, True, False]
    starts[2].check()
    for old in starts[:2]:
        with pytest.raises(Superseded, match=r"incarnation 3 \(h2 .*incarnation [12] ends and writes nothing more"):
            old.check()


def test_incarnations_that_begin_together_get_different_numbers(tmp_path: Path) -> None:
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(claim(tmp_path, {}).number)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(1, 17))


def test_the_first_record_of_an_end_stays_unless_corrected(tmp_path: Path) -> None:
    start = claim(tmp_path, {})
    assert start.ended() == {}
    start.end("failed", "rank 3", 7)
    start.end("failed", "rank 4, because of rank 3", 8)
    assert (start.ended()["reason"], start.ended()["tokens_seen"]) == ("rank 3", 7)
    start.correct_end("failed", "rank 2", 6)
    assert start.ended()["reason"] == "rank 2"


def test_a_record_that_a_death_cut_off_is_read_as_empty(tmp_path: Path) -> None:
    start = claim(tmp_path, {})
    (tmp_path / "incarnations" / "000001.json").write_text('{"host": ')
    (tmp_path / "incarnations" / "000001.end.json").write_text("")
    assert (start.start(), start.ended()) == ({}, {})
    assert claim(tmp_path, {}).number == 2


def test_an_older_incarnation_saves_nothing(tmp_path: Path) -> None:
    old = saver(tmp_path, claim(tmp_path, {}))
    save(old, 1.0, 1)
    claim(tmp_path, {})
    with pytest.raises(Superseded):
        save(old, 2.0, 2)
    (left,) = list_checkpoints(tmp_path)
    assert saved_value(left) == 1.0
    assert not list((tmp_path / "checkpoints").glob("*.saving-*"))


def test_a_save_in_flight_leaves_a_newer_ones_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both save the same position. The older one is halted when all of its files are written."""
    old = saver(tmp_path, claim(tmp_path, {}))
    reached, go_on = threading.Event(), threading.Event()
    complete = Checkpoint.complete

    def late(*arguments: object) -> None:
        if threading.current_thread().name == "save" and not reached.is_set():
            reached.set()
            go_on.wait(30)
        complete(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Checkpoint, "complete", late)
    old.save(state_of(1.0), WHOLE, meta(1))
    assert reached.wait(30)
    new = saver(tmp_path, claim(tmp_path, {}))
    save(new, 2.0, 1)
    go_on.set()
    with pytest.raises(Superseded):
        old.finish()
    (left,) = list_checkpoints(tmp_path)
    assert saved_value(left) == 2.0
    assert left.verify() == []


def test_a_stale_rank_cannot_write_into_a_newer_save(tmp_path: Path) -> None:
    """It knows only the name of its own folder, and a new start clears the old one's away, not the reverse."""
    first, second = claim(tmp_path, {}), claim(tmp_path, {})
    folders = [tmp_path / "checkpoints" / f"000000000000004.saving-{i.number}" for i in (first, second)]
    for folder in folders:
        folder.mkdir(parents=True)
    with pytest.raises(Superseded):
        saver(tmp_path, first).probe(100)
    assert all(folder.exists() for folder in folders)
    saver(tmp_path, claim(tmp_path, {})).probe(100)
    assert not any(folder.exists() for folder in folders)


def test_the_list_is_in_order_of_numbers(tmp_path: Path) -> None:
    for _ in range(12):
        claim(tmp_path, {}).end("stopped", "SIGTERM", 0)
    assert [i.number for i in list_incarnations(tmp_path)] == list(range(1, 13))


@pytest.mark.slow
def test_of_two_running_incarnations_the_older_one_ends(tmp_path: Path, corpus: Path) -> None:
    """Real processes of one run at the same time, both healthy, as if a scheduler had lost contact with the first."""
    config = write_tiny(
        tmp_path, corpus, train={"tokens": 128 * 100_000}, checkpoint={"every_tokens": 640, "keep_last": 3}
    )
    run = tmp_path / "runs" / "tiny"
    arguments, log = [str(config), "--auto-resume"], tmp_path / "old.log"
    old = start_train(arguments, tmp_path, log)
    wait_for_steps(run, 20, [old])
    new = start_train(arguments, tmp_path, tmp_path / "new.log")
    assert old.wait(PATIENCE) == 2
    assert "taken this run over" in log.read_text()
    assert "Traceback" not in log.read_text()
    wait_for_steps(run, 20, [new], incarnation=2)
    new.kill()
    new.wait()
    steps_seen = [line["step"] for line in metrics(run)]
    assert steps_seen == list(range(1, len(steps_seen) + 1))
    whole = [c for c in list_checkpoints(run) if is_complete(c)]
    assert whole
    assert [problem for c in whole for problem in c.verify()] == []
