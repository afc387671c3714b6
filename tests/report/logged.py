"""Runs by what they leave in their folders, without any training."""

import datetime
import json
from pathlib import Path
from typing import Any

from megagpt.config_file import load_config, to_yaml

BEGAN = datetime.datetime(2026, 11, 20, 10, tzinfo=datetime.UTC)
STEP_TOKENS = 524_288
H100 = "NVIDIA H100 80GB HBM3"


class Logged:
    """A run's folder, filled line by line."""

    def __init__(self, folder: Path, name: str, *overrides: str, config: str = "gpt2_124m") -> None:
        self.config = load_config(config, [f"run.name={name}", f"run.folder={folder}", *overrides])
        self.folder = folder / name
        (self.folder / "incarnations").mkdir(parents=True)
        (self.folder / "config.yaml").write_text(to_yaml(self.config))
        self.lines: list[dict[str, Any]] = []

    def write(self, event: str, step: int, **values: Any) -> None:
        """A line of the log; `save` puts it on the disk."""
        self.lines.append({"event": event, "step": step, "tokens_seen": step * STEP_TOKENS, **values})

    def steps(self, last: int, seconds: float = 0.25, first: int = 1, **values: Any) -> None:
        for step in range(first, last + 1):
            speed = STEP_TOKENS / seconds
            usual = {"loss": 3 + 8 / step, "gradient_norm": 0.5, "lr": 6e-4, "mfu": 0.4, "peak_memory_bytes": 2**35}
            usual |= {"tokens_per_second": speed, "step_seconds": seconds, "data_wait_seconds": seconds / 100}
            self.write("step", step, **{**usual, **values})

    def validation(self, step: int, loss: float | str) -> None:
        self.write("validation", step, validation_loss=loss, unigram_loss=7.6)

    def exam(
        self, step: int, task: str, value: float, error: float | None = None, items: int = 10_042, **more: Any
    ) -> None:
        score = {"value": value, "standard_error": error, "items": items, "shots": 0, "published": True, **more}
        self.write("exam", step, exams={task: score})

    def exam_of_before(self, step: int, task: str, value: float, error: float, items: int) -> None:
        """As early logs have it."""
        values = {f"exam/{task}": value, f"exam/{task}_stderr": error, f"exam/{task}_items": items}
        self.write("exam", step, **values)

    def save(self) -> "Logged":
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        (self.folder / "metrics.jsonl").write_text(text, encoding="utf-8")
        return self

    def incarnation(
        self, number: int, begins: float, ends: float | None = None, outcome: str = "", reason: str = "", **facts: Any
    ) -> None:
        """Hours after BEGAN; without `ends` it leaves no record of its end."""
        began, ended = (
            None if hours is None else (BEGAN + datetime.timedelta(hours=hours)).isoformat() for hours in (begins, ends)
        )
        usual = {"started": began, "host": "n1", "hosts": {"n1": 8}, "device": H100, "world_size": 8}
        usual |= {"engine": f"ddp on 8 x {H100}", "megagpt": "0.2.0", "torch": "2.13.0", "from_tokens": 0}
        path = self.folder / "incarnations" / f"{number:06d}"
        path.with_suffix(".json").write_text(json.dumps({"incarnation": number, **usual, **facts}))
        if ended:
            end = {"outcome": outcome, "reason": reason, "tokens_seen": facts.get("reached", 0), "ended": ended}
            path.with_suffix(".end.json").write_text(json.dumps(end))


def hours(count: float) -> str:
    """The time this number of hours after BEGAN."""
    return (BEGAN + datetime.timedelta(hours=count)).isoformat()
