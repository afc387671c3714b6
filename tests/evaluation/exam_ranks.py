"""Functions that ranks of tests call. This module imports no `transformers`, whose imports would take each rank two
seconds."""

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

from megagpt.evaluation.exam import Settings, prepare
from megagpt.evaluation.examinee import opened
from megagpt.evaluation.results import Scores
from megagpt.evaluation.tasks import find_tasks
from megagpt.exchange.named import open_model
from megagpt.world import join
from tests.processes import command

TASKS = ["hellaswag", "winogrande", "arc_easy", "lambada", "copa"]


def of_a_rank(folder: str, data: str, engines: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """For each engine and precision: the digest of all scores, the calls of the model, the values."""
    with join("cpu") as world:
        found, results = open_model(folder, world), []
        for engine, precision in engines:
            with opened(found, world, engine, precision) as model:
                calls = 0

                def counted(*arguments: Any, model: Any = model, **named: Any) -> Any:
                    nonlocal calls
                    calls += 1
                    return model(*arguments, **named)

                every: list[Scores] = []
                values: list[str] = []
                for task in find_tasks(TASKS):
                    shots = 2 if task.name == "copa" else 0
                    held = prepare(task, Settings(data, shots=shots), found.config.context, world).hold(
                        counted, world, batch_tokens=150
                    )
                    assert held is not None
                    values += [value.text for value in held[0].values]
                    every.append(held[1])
            digest = hashlib.sha256(repr(every).encode()).hexdigest()
            results.append({"digest": digest, "calls": calls, "values": values})
        return results


def evaluate(model: str, hosts: list[str], folder: Path) -> int:
    """On each rank, with rows in its host's folder."""
    platform.node = lambda: hosts[int(os.environ["RANK"])]  # type: ignore[assignment]
    os.chdir(folder / platform.node())
    return command(["evaluate", model, "--data", "rows"])
