"""Predicted beside measured: what is compared, when, and for which devices."""

import pytest

from megagpt.config_file import load_config
from megagpt.planning.forecast import Forecast, beside, forecast, read_forecast
from megagpt.planning.memory import peak_memory
from megagpt.position import Position, position
from megagpt.training.planned import Planned

CONFIG = load_config("gpt2_124m", ["train.micro_batch=32"])
BATCH = CONFIG.train.batch_tokens


def at(step: int) -> Position:
    return position(CONFIG, step * CONFIG.batch_sequences, step)


def test_steps_of_full_batches_after_the_warm_up_count() -> None:
    planned = Planned(Forecast(1e10, 1e6, 9e5, 1.1e6, 100.0), at(20), BATCH)
    for step in range(21, 31):
        planned.step(at(step), BATCH, 100.0 if step <= 23 else 0.5, profiled=False)
    planned.step(at(30), BATCH // 2, 100.0, profiled=False)
    planned.step(at(30), BATCH, 100.0, profiled=True)
    assert [step for step in range(21, 60) if planned.is_due(at(step))] == [30]
    values, text = planned.compare(11_000_000_000)
    assert values["measured_tokens_per_second"] == pytest.approx(BATCH / 0.5)
    assert text == (
        "plan: memory 11.0 GB, 10.0% above the plan's 10.0 GB; "
        "speed 1,048,576 tok/s, 4.9% above the plan's 1,000,000 (900,000 to 1,100,000)"
    )


def test_a_cpu_has_no_plan() -> None:
    assert not Planned(None, at(0), BATCH).is_due(at(10))


def test_an_unknown_card_has_a_plan_of_its_memory_only() -> None:
    found = forecast(CONFIG, "NVIDIA RTX A1000", 8e9, 8, 8)
    assert (found.memory_bytes, found.tokens_per_second) == (peak_memory(CONFIG, 8).total, None)
    planned = Planned(found, at(0), BATCH)
    assert planned.compare(10**9)[1].startswith("plan: memory 1.0 GB, ")
    assert "speed" not in planned.compare(10**9)[1]


def test_a_known_card_has_a_plan_of_its_speed_and_time() -> None:
    found = forecast(CONFIG, "NVIDIA H100 80GB HBM3", 85e9, 8, 8)
    assert found.tokens_per_second is not None
    assert found.tokens_per_second_low is not None
    assert found.tokens_per_second_low < found.tokens_per_second
    assert found.run_seconds == pytest.approx(CONFIG.train.tokens / found.tokens_per_second, rel=0.01)
    assert read_forecast(found.as_json()) == found


@pytest.mark.parametrize("values", [None, {}, "edited", {"memory_bytes": "1"}, {"memory_bytes": True}])
def test_facts_without_a_plan_are_read(values: object) -> None:
    assert read_forecast(values) is None


def test_nothing_measured_is_shown_beside_nothing() -> None:
    assert list(beside(Forecast(1e10, 1e6), None, None)) == []
