"""Fault drills: real processes, really killed, on disks that really fail; each ends with the uninterrupted curve.

The tests run them in their short form. The long form prints a report:

    python -m tests.checkpoints.drills --kills 24
"""

import argparse
import contextlib
import io
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from megagpt.checkpoints.folder import list_checkpoints
from megagpt.cli import main as command_line
from megagpt.errors import ExitCode
from tests.conftest import make_corpus, metrics, write_tiny
from tests.minicluster.processes import wait_until
from tests.processes import Process, end_all, start_ranks
from tests.runs import PATIENCE, logs, losses, wait_for_steps

# Steps of a drill are a multiple of this: then the uninterrupted run holds its validations and samples where a shorter
# run holds its last ones.
EVERY = 15
ENGINES = {
    "ddp": ["engine.name=ddp"],
    "fsdp": ["engine.name=fsdp"],
    "fsdp, tensor ranks": ["engine.name=fsdp", "engine.tensor_ranks=2"],
    "zero-1": ["engine.name=zero", "engine.stage=1"],
    "zero-3": ["engine.name=zero", "engine.stage=3"],
}
Ranks = list[Process]


def drill_config(folder: Path, corpus: Path, steps: int) -> Path:
    """A run for two ranks that saves after every step."""
    return write_tiny(
        folder, corpus, train={"tokens": 128 * steps, "micro_batch": 2},
        checkpoint={"every_tokens": 128, "keep_last": 2},
        validation={"every_tokens": 384, "tokens": 256}, sampling={"every_tokens": 640, "max_tokens": 2},
    )  # fmt: skip


def uninterrupted(folder: Path, corpus: Path, steps: int) -> Path:
    """The run of every drill, as it is without faults. The learning rate does not depend on the number of steps, so
    that the runs of all drills are prefixes of it."""
    config = drill_config(folder, corpus, steps)
    ranks = start_ranks(2, [str(config), "run.name=whole", "checkpoint.every_tokens=0"], folder)
    assert [rank.wait(PATIENCE) for rank in ranks] == [0, 0], logs(folder)
    assert len(losses(folder / "runs" / "whole")) == steps
    return folder / "runs" / "whole"


class Drill:
    """A run on two ranks that saves after every step, and the run that it must be in the end."""

    def __init__(self, folder: Path, corpus: Path, whole: Path, steps: int, tolerance: float = 0.0) -> None:
        assert steps % EVERY == 0
        self.folder, self.whole, self.steps, self.tolerance = folder, whole, steps, tolerance
        self.done: Counter[str] = Counter()
        """Faults of this drill, by kind."""
        self.differing = 0
        """Steps whose loss was not that of the uninterrupted run."""
        self.config = drill_config(folder, corpus, steps)

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def losses(self, name: str) -> list[float]:
        assert [line["step"] for line in metrics(self.run(name))] == list(range(1, self.steps + 1))
        return losses(self.run(name))

    def compare(self, name: str) -> None:
        """Count the steps of a finished run that differ from the uninterrupted one's; none may, nor any validation or
        sample: a stop or a kill loses none of them."""
        pairs = zip(self.losses(name), losses(self.whole)[: self.steps], strict=True)
        differing = sum(abs(a - b) > self.tolerance for a, b in pairs)
        self.differing += differing
        assert differing == 0, f"{name}: {differing} steps differ"
        for event, key in (("validation", "validation_loss"), ("samples", "samples")):
            found = metrics(self.run(name), event)
            whole = [line for line in metrics(self.whole, event) if line["tokens_seen"] <= 128 * self.steps]
            places = [[line["tokens_seen"] for line in lines] for lines in (found, whole)]
            assert places[0] == places[1], f"{name}: {event} at {places[0]} instead of {places[1]}"
            if event == "validation":
                assert all(abs(a[key] - b[key]) <= self.tolerance for a, b in zip(found, whole, strict=True))
            elif not self.tolerance:
                assert [line[key] for line in found] == [line[key] for line in whole]

    def start(self, name: str, *overrides: str) -> Ranks:
        """Start the run on two ranks, or resume it."""
        run = self.run(name)
        if (run / "config.yaml").exists():
            return start_ranks(2, ["--resume", str(run), *overrides], self.folder)
        return start_ranks(2, [str(self.config), f"run.name={name}", *overrides], self.folder)

    def wait(self, ranks: Ranks, codes: Sequence[int] | None = None) -> None:
        """Until all have ended, each with its code if given."""
        try:
            found = [rank.wait(PATIENCE) for rank in ranks]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"a rank hangs:\n{self.log()}") from None
        finally:
            end_all()
        assert codes is None or found == list(codes), f"exit codes {found}:\n{self.log()}"

    def log(self) -> str:
        return logs(self.folder)

    # --- what is done to runs ---

    def kill(
        self, kills: int, moments: random.Random, setups: Sequence[str] = ("ddp",), one_of_all: float = 0.5
    ) -> None:
        """SIGKILL one rank, with that probability, or all, at random moments, most of them inside a save."""
        name = "killed"
        for kill in range(kills):
            ranks = self.start(name, *ENGINES[moments.choice(setups)])
            wait_for_steps(self.run(name), 3, ranks, kill + 1)
            time.sleep(moments.random() * 0.4)
            saving = any((self.run(name) / "checkpoints").glob("*.saving-*"))
            one = moments.random() < one_of_all
            victims = [moments.choice(ranks)] if one else ranks
            for rank in victims:
                rank.kill()
            self.wait(ranks)
            self.done[
                f"SIGKILL of {'one rank' if one else 'all ranks'}, {'inside' if saving else 'outside'} a save"
            ] += 1
        self.wait(self.start(name, *ENGINES["ddp"]), [0, 0])
        self.compare(name)

    def signals(self) -> None:
        """Each signal, sent to one rank only: all of them save and end with the code for it."""
        name = "stopped"
        for i, number in enumerate((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)):
            ranks = self.start(name, "checkpoint.every_tokens=0")
            wait_for_steps(self.run(name), 3, ranks, i + 1)
            ranks[1].send_signal(number)
            if number != signal.SIGINT:  # schedulers send them more than once
                time.sleep(0.005)
                ranks[1].send_signal(number)
            self.wait(ranks, [ExitCode.STOPPED] * 2)
            newest = list_checkpoints(self.run(name))[-1]
            assert newest.verify() == []
            assert newest.tokens == metrics(self.run(name))[-1]["tokens_seen"]
            assert len(metrics(self.run(name), "stopped")) == i + 1
            assert "Traceback" not in self.log()
            assert re.search(rf"resume with: megagpt train --resume \S*{name}\n", self.log()), self.log()
            self.done[signal.Signals(number).name] += 1
        self.wait(self.start(name, "checkpoint.every_tokens=0"), [0, 0])
        self.compare(name)

    def full_disk(self) -> None:
        """A file system that takes two checkpoints of 20 MB and not the third."""
        disk = self.folder / "runs"
        with mounted(["-t", "tmpfs", "-o", "size=50m", "tmpfs"], disk):
            ranks = self.start("full", "checkpoint.keep_last=9")
            self.wait(ranks, [2, 2])
            self._assert_one_error("disk full")
            assert [c.verify() for c in list_checkpoints(self.run("full"))] == [[], []]
            subprocess.run(["mount", "-o", "remount,size=4000m", str(disk)], check=True)
            self.wait(self.start("full", "checkpoint.keep_last=1"), [0, 0])
            self.compare("full")
        self.done["full disk"] += 1

    def read_only(self) -> None:
        """The checkpoints' folder becomes read-only while the run saves."""
        ranks = self.start("read-only")
        wait_for_steps(self.run("read-only"), 3, ranks)
        folder = self.run("read-only") / "checkpoints"
        with mounted(["--bind", str(folder)], folder):
            # Busy while the run has a file open there, which may be written for as long as a save takes.
            remount = ["mount", "-o", "remount,bind,ro", str(folder)]
            wait_until(lambda: subprocess.run(remount, capture_output=True).returncode == 0, "still busy")
            self.wait(ranks, [2, 2])
        self._assert_one_error("Read-only file system")
        assert list_checkpoints(self.run("read-only"))[-1].verify() == []
        self.wait(self.start("read-only"), [0, 0])
        self.compare("read-only")
        self.done["read-only folder"] += 1

    def _assert_one_error(self, text: str) -> None:
        errors = [line for line in self.log().splitlines() if "megagpt: error:" in line]
        assert len(errors) == 1, self.log()
        assert text in errors[0], errors[0]
        assert "Traceback" not in self.log()

    def damage(self) -> None:
        """A flipped byte, a lost end and a lost file, in every kind of file of the newest checkpoint."""
        # Two saves, and one at the end, a step after the second.
        ranks = self.start("sound", f"checkpoint.every_tokens={128 * (self.steps // 2)}", "checkpoint.keep_last=9")
        self.wait(ranks, [0, 0])
        last = list_checkpoints(self.run("sound"))[-1].path.name
        kinds = ["__0_0.distcp", "__1_0.distcp", ".metadata", "meta.json", "COMPLETE"]
        harms: dict[str, Callable[[Path], None]] = {
            "flipped byte": flip, "truncated file": truncate, "missing file": Path.unlink,
        }  # fmt: skip
        for harm, apply in harms.items():
            for kind in kinds:
                self._resume_corrupt("sound", last, kind, apply)
                self.done[f"{harm}: {kind.replace('1', '0')}"] += 1
        self._resume_corrupt("sound", last, ".metadata", lambda path: empty_but_for(path.parent, "COMPLETE"))
        self.done["marker without data"] += 1

        self._all_corrupt("sound")

    def _all_corrupt(self, source: str) -> None:
        """Nothing is started, neither the first time nor later: a run of days would begin from its first token."""
        run = self.run("corrupt")
        shutil.copytree(self.run(source), run)
        before = (run / "metrics.jsonl").read_text()
        for checkpoint in list_checkpoints(run):
            flip(checkpoint.path / "__0_0.distcp")
        for _ in range(2):
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
                assert command_line(["train", "--resume", str(run)]) == 2
            assert "no checkpoint of this run is complete" in errors.getvalue()
        assert (run / "metrics.jsonl").read_text() == before
        shutil.rmtree(run)
        self.done["every checkpoint corrupt"] += 1

    def _resume_corrupt(self, source: str, checkpoint: str, kind: str, apply: Callable[[Path], None]) -> None:
        run = self.run("corrupt")
        shutil.copytree(self.run(source), run)
        apply(run / "checkpoints" / checkpoint / kind)
        output = resume_here(run)
        (line,) = (line for line in output.splitlines() if f"quarantined as {checkpoint}.corrupt" in line)
        assert str(run / "checkpoints" / checkpoint) in line
        assert kind in line or ".distcp" in line
        assert (run / "checkpoints" / f"{checkpoint}.corrupt").is_dir()
        self.compare("corrupt")
        shutil.rmtree(run)


def resume_here(run: Path) -> str:
    """Resume a two-rank run in this process, as a world of one; what it prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = command_line(["train", "--resume", str(run)])
    assert code == 0, output.getvalue()
    return output.getvalue()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty_but_for(folder: Path, kept: str) -> None:
    for path in folder.iterdir():
        if path.name != kept:
            path.unlink()


@contextlib.contextmanager
def mounted(options: list[str], folder: Path) -> Iterator[None]:
    """A mount for a while. Raises PermissionError where this machine does not let us."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], check=False, capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(f"mount {' '.join(options)}: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def main() -> int:
    """The long form: every drill, kills under engines that change from start to start, and the report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began, moments, done, differing = time.monotonic(), random.Random(arguments.seed), Counter[str](), 0
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder))
        longest = EVERY * (4 + arguments.kills)
        whole = uninterrupted(Path(folder), corpus, longest)
        parts: list[tuple[str, int, float, Callable[[Drill], None]]] = [
            ("kills", longest, 5e-6, lambda d: d.kill(arguments.kills, moments, list(ENGINES))),
            ("signals", 60, 0.0, Drill.signals),
            ("full disk", 15, 0.0, Drill.full_disk),
            ("read-only folder", 45, 0.0, Drill.read_only),
            ("damage", 15, 5e-6, Drill.damage),
        ]
        for name, steps, tolerance, part in parts:
            print(f"{name} ...", file=sys.stderr, flush=True)
            (Path(folder) / name).mkdir()
            drill = Drill(Path(folder) / name, corpus, whole, steps, tolerance)
            part(drill)
            done += drill.done
            differing += drill.differing
    width = max(map(len, done))
    for kind, count in sorted(done.items()):
        print(f"{kind:{width}} {count:4}")
    print(f"{'together':{width}} {done.total():4} in {time.monotonic() - began:.0f} s")
    print(
        f"lost: {'nothing' if not differing else f'{differing} steps'}; every run ended with the uninterrupted losses"
    )
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
