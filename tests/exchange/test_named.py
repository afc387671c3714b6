"""Ranks agree on the model that a name means."""

import os
import platform
from pathlib import Path

import pytest

from megagpt.errors import UserError
from megagpt.exchange.named import open_model
from megagpt.world import join
from tests.processes import run_ranks


def refusals(names: list[str], hosts: list[Path]) -> list[str]:
    """On each rank, in the folder of its host: the error of each name."""
    here = hosts[int(os.environ["RANK"])]
    os.chdir(here)
    platform.node = lambda: here.name  # type: ignore[assignment]
    said = []
    with join("cpu") as world:
        for name in names:
            with pytest.raises(UserError) as error:
                open_model(name, world)
            said.append(str(error.value))
    return said


@pytest.mark.slow
def test_a_path_of_another_kind_on_another_host_is_refused(tmp_path: Path) -> None:
    """Where it is missing, it could be a name on the hub."""
    hosts = [tmp_path / "near", tmp_path / "far"]
    for host, folders in zip(hosts, (["models/mine", "runs/mine"], ["models/theirs"]), strict=True):
        for folder in folders:
            (host / folder).mkdir(parents=True)
            file = "config.json" if folder.startswith("models") else "config.yaml"
            (host / folder / file).write_text("{}")
    first, second = run_ranks(2, refusals, ["models/mine", "runs/mine", "models/theirs"], hosts)
    assert first == second
    for said, kinds in zip(
        first,
        (
            "models/mine: a transformers folder on near, but nothing on far; give all hosts the same folder",
            "runs/mine: a run on near, but nothing on far",
            "models/theirs: nothing on near, but a transformers folder on far",
        ),
        strict=True,
    ):
        assert said.startswith(kinds)
