"""megagpt checkpoint list, verify, show, bench."""

import json
from pathlib import Path

import pytest

from megagpt.checkpoints.folder import list_checkpoints
from megagpt.cli import main
from tests.checkpoints.drills import flip
from tests.conftest import Tiny
from tests.processes import megagpt


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path) -> Path:
    config = tiny(checkpoint={"every_tokens": 640, "keep_last": 9, "milestone_every_tokens": 1280})
    assert main(["train", str(config)]) == 0
    return tmp_path / "runs" / "tiny"


@pytest.mark.slow
def test_list_verify_and_show(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count("every byte as it was written") == 4
    first, second, third, fourth = (c.path for c in list_checkpoints(run))
    flip(second / "__0_0.distcp")
    flip(third / "meta.json")
    (fourth / ".metadata").unlink()

    assert main(["checkpoint", "list", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["640", "1,280", "1,920", "2,560"]
    assert ["ddp x 1" in line for line in lines] == [True, True, False, False]
    assert ["milestone" in line for line in lines] == [False, True, False, False]
    assert "incomplete" in lines[2]
    assert "meta.json" in lines[2]
    assert ".metadata is missing" in lines[3]

    assert main(["checkpoint", "verify", str(run)]) == 1
    output = capsys.readouterr().out.splitlines()
    assert len(output) == 4
    assert str(first) in output[0]
    assert "every byte" in output[0]
    for line, path in zip(output[1:], ("__0_0.distcp", "meta.json", ".metadata"), strict=True):
        assert path in line
        assert "every byte" not in line
    assert main(["checkpoint", "verify", str(first)]) == 0

    capsys.readouterr()
    assert main(["checkpoint", "show", str(first), "--tensors"]) == 0
    title, *rest = capsys.readouterr().out.splitlines()
    assert str(first) in title
    end = rest.index("}")
    meta = json.loads("\n".join(rest[: end + 1]))
    assert (meta["tokens_seen"], meta["updates"], meta["milestone"]) == (640, 5, False)
    assert meta["config"]["model"]["width"] == 32
    assert set(meta["versions"]) == {"megagpt", "torch", "deepspeed", "python"}
    assert "exp_avg.blocks.0.mlp.up.weight: 128 x 32" in rest[end + 1 :]


def test_what_is_refused_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for action in ("list", "verify", "show"):
        for name, part in (("nowhere", "nowhere"), ("empty", "checkpoint")):
            assert main(["checkpoint", action, str(tmp_path / name)]) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            assert part in error


@pytest.mark.slow
def test_bench_measures_and_leaves_nothing(tiny: Tiny, tmp_path: Path) -> None:
    config = str(tiny())
    done = megagpt("checkpoint", "bench", config, "--in", str(tmp_path / "disk"), "--rounds", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for row in ("raw write", "save ", "save in the background: stall", "raw read", "load", "of the raw read"):
        assert row in done.stdout
    assert not (tmp_path / "disk").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("kept")
    done = megagpt("checkpoint", "bench", config, "--in", str(tmp_path / "mine"), cwd=tmp_path)
    assert done.returncode == 2
    assert "is not empty" in done.stderr
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "kept"
