"""A run on a cluster, planned: memory, speed, days, GPU-hours, cost and energy."""

from dataclasses import dataclass

from megagpt.config import Config, compiles
from megagpt.planning.gpus import CPU, Cluster
from megagpt.planning.memory import Memory, Verdict, peak_memory
from megagpt.planning.micro_batch import resolved
from megagpt.planning.setting import vary
from megagpt.planning.speed import Calibration, Speed, predict_speed, step_seconds
from megagpt.schedule import ramp_work

_DAY, _HOUR = 86_400.0, 3600.0
# Joules in a kilowatt-hour.
_KWH = 3.6e6


@dataclass(frozen=True)
class Plan:
    """One setting of a run on one cluster."""

    config: Config
    cluster: Cluster
    memory: Memory
    speed: Speed
    seconds: float
    """Time of all steps to the token budget; validations, exams, samples and saves come on top."""
    ramp_seconds: float
    """Part of it that the batch ramp costs: a token of its small batches takes longer than one of a full batch."""
    price: float | None = None
    """Dollars for an hour of one GPU."""

    @property
    def verdict(self) -> Verdict:
        return self.memory.verdict(self.cluster.gpu.memory)

    @property
    def spare(self) -> float:
        """Bytes of a GPU beside peak and reserve; negative if they exceed it."""
        return self.memory.spare(self.cluster.gpu.memory)

    @property
    def accumulation(self) -> int:
        """Micro-batches of a rank in a full step."""
        return self.config.accumulation(self.cluster.gpus)

    @property
    def days(self) -> float:
        return self.seconds / _DAY

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.cluster.gpus / _HOUR

    @property
    def cost(self) -> float | None:
        """Dollars; None without a price."""
        return None if self.price is None else self.gpu_hours * self.price

    @property
    def energy(self) -> float | None:
        """Kilowatt-hours of the GPUs at full power, without hosts and cooling; None if the power is unknown."""
        if not self.cluster.gpu.watts:
            return None
        return self.seconds * self.cluster.gpus * self.cluster.gpu.watts / _KWH

    @property
    def range(self) -> tuple[float, float]:
        """The 80% range of time, GPU-hours, cost and energy, as factors of them: the low end first."""
        low, high = self.speed.range
        return self.speed.tokens_per_second / high, self.speed.tokens_per_second / low


@dataclass(frozen=True)
class Planner:
    """Plans runs at one price, by one GPU's constants."""

    price: float | None = None
    """Dollars for an hour of one GPU."""
    calibration: Calibration | None = None
    """Constants to use instead of the GPU's own ones."""

    def plan(self, config: Config, cluster: Cluster) -> Plan:
        """Plan the run as its config says."""
        return make_plan(config, cluster, self.price, self.calibration)

    def least_seconds(self, config: Config, cluster: Cluster, alone: bool = False) -> float:
        """Time of all steps if each were one of a full batch, whether the run fits or not. `alone`: without what
        differs from engine to engine."""
        step = step_seconds(config, cluster, self.calibration, alone)
        return step * config.total_sequences / config.batch_sequences


def make_plan(
    config: Config, cluster: Cluster, price: float | None = None, calibration: Calibration | None = None
) -> Plan:
    """Plan the run as its config says. Raises UserError if it cannot be divided among the GPUs."""
    config.check_ranks(cluster.gpus)
    config = resolved(config, cluster.gpus, None if cluster.gpu.name == CPU else cluster.gpu.memory)
    speed = predict_speed(config, cluster, calibration)
    seconds, ramp = _run_seconds(config, cluster, speed, calibration)
    return Plan(config, cluster, peak_memory(config, cluster.gpus), speed, seconds, ramp, price)


def _run_seconds(
    config: Config, cluster: Cluster, speed: Speed, calibration: Calibration | None
) -> tuple[float, float]:
    """Time of all steps, and the part of it that the batch ramp costs."""
    shares = config.shares(cluster.gpus)
    work = ramp_work(config, shares, compiles(config.train.compile, "cpu" if cluster.gpu.name == CPU else "cuda"))
    of_full, ramp = speed.step / config.batch_sequences, 0.0
    for size, (steps, micro_batches) in work.cuts.items():
        one, two = (
            step_seconds(_with_batch(config, size, count * size * shares), cluster, calibration) for count in (1, 2)
        )
        # From the second micro-batch on, each one adds the same time.
        ramp += steps * one + (micro_batches - steps) * (two - one)
    return ramp + max(0, config.total_sequences - work.sequences) * of_full, ramp - work.sequences * of_full


def _with_batch(config: Config, micro_batch: int, sequences: int) -> Config:
    """The run with batches of that many sequences."""
    return vary(config, train={"micro_batch": micro_batch, "batch_tokens": sequences * config.model.context})
