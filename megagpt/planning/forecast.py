"""The plan of a run that starts: its memory and speed as its incarnation records them, beside which the measured ones
are shown."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from megagpt.config import Config
from megagpt.errors import UserError
from megagpt.planning.amounts import gigabytes
from megagpt.planning.gpus import Cluster, gpu_of_device
from megagpt.planning.memory import peak_memory
from megagpt.planning.plan import make_plan


@dataclass(frozen=True)
class Forecast:
    """Predictions for one incarnation. Speeds are None for a GPU whose figures are unknown."""

    memory_bytes: float
    """Peak of a GPU's tensors."""
    tokens_per_second: float | None = None
    """Of all GPUs, in a step of a full batch."""
    tokens_per_second_low: float | None = None
    tokens_per_second_high: float | None = None
    """80% of measurements are expected between the two."""
    run_seconds: float | None = None
    """Of all steps of the run, from its first token to its last, without saves, validations, exams and samples."""
    evidence: str = ""
    """The sentence that says how sure the range is, and why."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def forecast(config: Config, device: str, capacity: float, ranks: int, per_node: int) -> Forecast:
    """The plan of a run on `ranks` GPUs, of which a node has `per_node`; `device`: a GPU's name by its driver.
    `capacity`: bytes of its memory. The network is the usual one of such GPUs' servers: nobody knows the real one."""
    memory = peak_memory(config, ranks).total
    gpu = gpu_of_device(device, capacity)
    if gpu is None:
        return Forecast(memory)
    try:
        plan = make_plan(config, Cluster(gpu, ranks, per_node))
    except UserError:  # such as a precision that the data sheet does not have
        return Forecast(memory)
    speed = plan.speed
    return Forecast(memory, speed.tokens_per_second, *speed.range, plan.seconds, speed.evidence)


def read_forecast(values: Any) -> Forecast | None:
    """A forecast from the facts of an incarnation; None if there is none, or a person has edited it."""
    if not isinstance(values, dict) or not _is_number(values.get("memory_bytes")):
        return None
    numbers = {name: value for name, value in values.items() if name in _NUMBERS and _is_number(value)}
    return Forecast(**numbers, evidence=str(values.get("evidence", "")))


_NUMBERS = [name for name in Forecast.__dataclass_fields__ if name != "evidence"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def beside(planned: Forecast, memory: float | None, tokens_per_second: float | None) -> Iterator[str]:
    """Predicted beside measured, one text for memory and one for speed, as far as both are known."""
    if memory:
        off = _off(memory, planned.memory_bytes)
        yield f"memory {gigabytes(memory)} GB, {off} the plan's {gigabytes(planned.memory_bytes)} GB"
    if tokens_per_second and planned.tokens_per_second:
        low, high = planned.tokens_per_second_low, planned.tokens_per_second_high
        text = f"speed {tokens_per_second:,.0f} tok/s, {_off(tokens_per_second, planned.tokens_per_second)} the plan's"
        yield f"{text} {planned.tokens_per_second:,.0f}" + (f" ({low:,.0f} to {high:,.0f})" if low and high else "")


def _off(measured: float, planned: float) -> str:
    """ "3.2% above"."""
    share = measured / planned - 1
    return f"{abs(share):.1%} {'above' if share > 0 else 'below'}"
