"""`megagpt status` names commands, and they work: of a finished, a killed and a running run."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from megagpt.cli import main
from megagpt.errors import ExitCode
from tests.conftest import Tiny
from tests.processes import megagpt, start_train
from tests.runs import PATIENCE, wait_for_steps

Capture = pytest.CaptureFixture[str]


@pytest.mark.slow
def test_a_finished_run_and_its_next_steps(tiny: Tiny, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "runs" / "tiny"
    assert main(["train", str(tiny(sampling={"samples": 0}))]) == 0
    capsys.readouterr()
    assert main(["status", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{folder}: finished (the last token)"
    assert re.fullmatch(
        r"progress     100\.0% of 2,560 tokens, step 20, loss \d+\.\d{4}, validation loss \d+\.\d{4}", lines[1]
    )
    checkpoint = folder / "checkpoints" / "000000000002560"
    assert re.fullmatch(rf"checkpoint   2,560 tokens, saved \d\d:\d\d ago: {re.escape(str(checkpoint))}", lines[3])
    assert lines[4] == "incarnations 1"
    advice = {line[:13].strip(): shlex.split(line[13:]) for line in lines[-4:]}
    assert list(advice) == ["sample with", "export with", "show with", "watch with"]
    assert advice["watch with"] == ["tensorboard", "--logdir", str(folder.parent)]
    for command in ("sample with", "export with", "show with"):
        assert main(advice[command][1:]) == 0

    # A newest checkpoint that no later step proved, and one that a kill left incomplete.
    (checkpoint / "UNPROVEN").touch()
    (checkpoint.parent / "000000000002688").mkdir()
    capsys.readouterr()
    assert main(["status", str(folder)]) == 0
    printed = capsys.readouterr()
    assert f" ago, unproven (no later step was finite yet): {checkpoint}\n" in printed.out
    assert printed.err.count("skipping 000000000002688") == 1
    assert main(["status", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"]["proven"] is False


@pytest.mark.slow
def test_a_killed_and_a_running_run_take_the_printed_steps(tiny: Tiny, tmp_path: Path) -> None:
    folder, config = tmp_path / "runs" / "tiny", str(tiny(train={"tokens": 128 * 100_000}, sampling={"samples": 0}))
    rank = start_train([config, "checkpoint.every_tokens=640"], tmp_path, tmp_path / "1.log")
    wait_for_steps(folder, 12, [rank])
    rank.kill()
    rank.wait(PATIENCE)
    dead = json.loads(megagpt("status", "--json", str(folder), cwd=tmp_path).stdout)
    assert dead["state"] == "dead"
    words = shlex.split(dead["next"]["resume with"])
    assert words[:2] == ["megagpt", "train"]
    rank = start_train(words[2:], tmp_path, tmp_path / "2.log")
    wait_for_steps(folder, 2, [rank], incarnation=2)
    running = json.loads(megagpt("status", "--json", str(folder), cwd=tmp_path).stdout)
    assert running["state"] == "running"
    subprocess.run(shlex.split(running["next"]["stop with"]), check=True)
    assert rank.wait(PATIENCE) == ExitCode.STOPPED
    log = (tmp_path / "2.log").read_text()
    assert "SIGINT: stopping; the steps taken so far are saved first; Ctrl-C again ends at once" in log
    assert "stopped by SIGINT; resume with: megagpt train --resume runs/tiny" in log
