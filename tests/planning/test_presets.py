"""Every config carries settings that fit and are fast on the cluster that its comment names."""

import pytest

from megagpt.config_file import load_config
from megagpt.planning.gpus import Cluster, find_gpu
from megagpt.planning.plan import Planner
from megagpt.planning.search import search
from tests.planning.presets import GPUS, SMALL, comment, planned
from tests.processes import REPOSITORY

CASES = [(name, gpus) for name, counts in GPUS.items() for gpus in counts]
# The fastest setting may be this much faster: some need more memory, or rest on no published speed.
SLOWER = 1.05


def test_every_config_of_a_paper_has_a_plan() -> None:
    files = {path.stem for path in (REPOSITORY / "configs").glob("*.yaml")}
    assert files - {"quickstart"} == set(GPUS)


@pytest.mark.parametrize("name", GPUS)
def test_the_comment_is_what_the_plan_says(name: str) -> None:
    """`python -m tests.planning.presets` writes the comments."""
    assert (REPOSITORY / "configs" / f"{name}.yaml").read_text().startswith(comment(name))


@pytest.mark.parametrize(("name", "gpus"), CASES)
def test_the_preset_fits_and_is_fast_there(name: str, gpus: int) -> None:
    plan = planned(name, gpus)
    assert plan.verdict == "fits"
    plans = search(load_config(name), Cluster(find_gpu("h100"), gpus), Planner(price=1.0))
    fastest = min(other.seconds for other in plans if other.verdict == "fits")
    assert plan.seconds <= SLOWER * fastest


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_a_small_preset_divides_over_one_node(name: str, ranks: int) -> None:
    load_config(name).check_ranks(ranks)
