"""The summary of a run that `megagpt config` prints."""

import pytest

from megagpt.cli import main


@pytest.mark.parametrize(
    ("override", "counted"),
    [("train.compile=false", "82.6%"), ("train.compile=true", "77.0%"), ("train.compile=auto", "77.0%")],
)
def test_config_command_shows_the_arithmetic_of_the_ramp(
    override: str, counted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPT-3 175B's, from 16 to 1,536 sequences; a compiled model has fewer sizes of micro-batches."""
    assert main(["config", "gpt3_175b", "--ranks", "1024", override]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "batch ramp" in line]
    assert line.startswith("# batch ramp: 32,768 to 3,145,728 tokens over 17,599 steps; ")
    assert line.endswith(f"; {counted} of its arithmetic counts on 128 group(s)")
