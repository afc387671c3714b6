"""A run's own speed, and the constants for the next plan that follow from it: `megagpt plan --calibrate RUN`."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from megagpt.config import Config
from megagpt.config_file import load_run
from megagpt.errors import UserError
from megagpt.incarnations import list_incarnations
from megagpt.planning.calibration import Calibration, calibrated, calibration_of
from megagpt.planning.gpus import CPU, Cluster, Gpu, gpu_of_device
from megagpt.planning.micro_batch import resolved, with_micro_batch
from megagpt.planning.speed import predict_speed
from megagpt.run_log import Event, read

# Steps after a start that are left out, because they compile and warm up, and the fewest that a median may come from.
_WARMUP, _FEWEST = 3, 5
# Figures of a CPU as fast as one core of 2023 in fp32 (FLOP/s, bytes/s). A run's factor replaces their level: only the
# ratio counts, 5.3 FLOPs a byte.
_CPU_FLOPS, _CPU_BANDWIDTH, _CPU_LINK = 8e10, 1.5e10, 2e9
# Shares and bytes of a CPU's step, from the CPU time of the 12 shapes of tests/planning/test_measured.py.
_CPU_CONSTANTS = Calibration(
    products=1.0, attention=1.0, products_origin="12 shapes on a CPU", half_tokens=80, other_bytes=2800,
    fp32_values=1.6, logit_bytes=70, weight_bytes=10, update_bytes=20, launch=0, overlap=1.0, hop=0,
)  # fmt: skip


@dataclass(frozen=True)
class RunSpeed:
    """Measured speed of a run's last incarnation."""

    name: str
    config: Config
    """The run's, with the micro-batch that the incarnation used."""
    device: str
    """The device's own name, "cpu" for a CPU."""
    ranks: int
    per_node: int
    tokens_per_second: float
    """Of all ranks: the median of the steps of full batches, without the first ones."""


@dataclass(frozen=True)
class Own:
    """The constants for plans on the device that a run used."""

    gpu: Gpu
    calibration: Calibration
    run: RunSpeed

    def check(self, config: Config, cluster: Cluster) -> None:
        """Raises UserError for a plan about which the run says nothing."""
        run, wanted = self.run, config.train.precision
        name = f"--calibrate {run.name}"
        if cluster.gpu.name != self.gpu.name:
            way = f"plan for --gpu {self.gpu.name}, or calibrate with a run on {cluster.gpu.name}"
            raise UserError(f"{name} ran on {self.gpu.name}, whose speed says nothing about {cluster.gpu.name}: {way}")
        if run.config.train.precision != wanted:
            way = f"set train.precision={run.config.train.precision}, or calibrate with a run in {wanted}"
            raise UserError(f"{name} ran in {run.config.train.precision}, and the plan is for {wanted}: {way}")
        if self.gpu.name == CPU and cluster.gpus != run.ranks:
            way = f"plan for --gpus {run.ranks}, or calibrate with a run on {cluster.gpus} rank(s)"
            raise UserError(f"{name} ran on {run.ranks} rank(s) of a CPU, which share its cores: {way}")


def read_speed(run: Path) -> RunSpeed:
    """The speed of a run, from its log. Raises UserError if the folder is no run's, or has too few steps."""
    config = load_run(run)
    starts = [incarnation.start() for incarnation in list_incarnations(run)]
    start = starts[-1] if starts else {}
    ranks, device = start.get("world_size"), start.get("device")
    if not isinstance(ranks, int) or not isinstance(device, str):
        raise UserError(f"{run}: its devices are not on record: it never began, or is of an older version")
    size, hosts = start.get("micro_batch"), start.get("hosts")
    config = with_micro_batch(config, size) if isinstance(size, int) else resolved(config, ranks, None)
    first = start.get("from_tokens", 0) + _WARMUP * config.train.batch_tokens
    speeds = [
        speed
        for line in read(run)
        if line["event"] == Event.STEP and line["tokens_seen"] > first and not line.get("profiled")
        and line.get("batch_tokens") == config.train.batch_tokens
        and (speed := _number(line.get("tokens_per_second")))
    ]  # fmt: skip
    if len(speeds) < _FEWEST:
        need = f"{_FEWEST} steps of full batches after the first {_WARMUP} of its last start"
        raise UserError(
            f"{run}: has {len(speeds)} of the {need} that a plan needs; let it run longer, or name a longer run"
        )
    per_node = max(hosts.values()) if isinstance(hosts, dict) and hosts else ranks
    return RunSpeed(config.run.name, config, device, ranks, per_node, statistics.median(speeds))


def own_constants(run: Path, gpu: Gpu | None = None, network: float = 0) -> Own:
    """The constants that a run's own measurement gives. `gpu`: figures of the run's GPU, if they are not known by its
    name; `network`: Gbit/s a GPU of the run's cluster (that of the GPU's usual servers). Raises UserError."""
    found = read_speed(run)
    if found.device == CPU:
        gpu, constants = _cpu(found.ranks), _CPU_CONSTANTS
    else:
        known = gpu_of_device(found.device)
        if known and not (gpu and gpu.name == known.name):
            gpu = known
        if gpu is None:
            way = "give its figures, and a name, with --gpu and --gpu-memory, --gpu-tflops, --gpu-bandwidth, --gpu-link"
            raise UserError(f"--calibrate {run}: it ran on {found.device!r}, whose figures are unknown: {way}")
        constants = calibration_of(gpu)
    cluster = Cluster(gpu, found.ranks, found.per_node, network)
    predicted = predict_speed(found.config, cluster, constants).tokens_per_second
    return Own(gpu, calibrated(constants, predicted / found.tokens_per_second, found.name), found)


def _cpu(ranks: int) -> Gpu:
    """A CPU as a device of a plan, with this host's memory shared by its ranks."""
    memory = psutil.virtual_memory().total / ranks
    return Gpu(CPU, memory, _CPU_FLOPS, _CPU_FLOPS, _CPU_BANDWIDTH, _CPU_LINK, watts=0, network=0.1)


def _number(value: Any) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
    return float(value) if usable else None
