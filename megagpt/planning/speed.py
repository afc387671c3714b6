"""Seconds of a training step, predicted from the config and the cluster.

The constants are fitted to published speeds of other people's code (`calibration`), so a prediction is a forecast that
this project's step is as fast as theirs."""

import collections
import math
from dataclasses import dataclass
from typing import NamedTuple

from megagpt.cards import FLOAT8_CAPABILITIES
from megagpt.config import Config
from megagpt.errors import UserError
from megagpt.planning.calibration import Calibration, calibration_of
from megagpt.planning.evidence import find_evidence
from megagpt.planning.exchange import Exchange
from megagpt.planning.gpus import Cluster, Gpu
from megagpt.planning.terms import Term, speed_terms
from megagpt.planning.work import Work, count_work

# Bytes of an optimizer's state that a host or disk moves for each parameter: three fp32 values read, three written.
_STATE_BYTES = 24
# Parts of a step that differ from engine to engine.
_OF_ENGINES = ("exchange", "update", "offload", "waiting for the host")


@dataclass(frozen=True)
class Speed:
    """One full step, as each GPU sees it."""

    seconds: dict[str, float]
    """Parts; their sum is `step`. Exchange is the part that computation does not hide; tensor exchange is whole."""
    step: float
    tokens_per_second: float
    """Of all GPUs."""
    range: tuple[float, float]
    """Tokens/s of all GPUs: 80% of measurements are expected between these."""
    mfu: float
    """Model FLOPs as a share of the peak in the run's precision, which under float8 is bf16's."""
    evidence: str
    """The sentence that says what the range rests on."""
    hidden_exchange: float
    """Seconds of exchange beside computation; part of no sum."""
    made_from: tuple[Config, Cluster, Calibration]

    @property
    def terms(self) -> tuple[Term, ...]:
        """The parts with their formulas, then every number that these are filled with."""
        return speed_terms(self.seconds, *self.made_from)


class Parts(NamedTuple):
    """Seconds of a step."""

    seconds: dict[str, float]
    hidden_exchange: float


def predict_speed(config: Config, cluster: Cluster, calibration: Calibration | None = None) -> Speed:
    """Raises UserError if the batch cannot be divided among the GPUs, or if the GPU has no products in the run's
    precision. `calibration`: constants to use instead of the GPU's own ones."""
    check_precision(config, cluster.gpu)
    found = calibration or calibration_of(cluster.gpu)
    work = count_work(config, cluster.gpus)
    parts = step_parts(work, config, cluster, found)
    step = sum(parts.seconds.values())
    rate = config.batch_sequences * config.model.context / step
    mfu = config.model.flops_per_token * rate / cluster.gpus / cluster.gpu.peak(config.train.precision)
    (low, high), sentence = find_evidence(config, cluster, found)
    spread, inputs = (low * rate, high * rate), (config, cluster, found)
    return Speed(parts.seconds, step, rate, spread, mfu, sentence, parts.hidden_exchange, inputs)


def step_seconds(
    config: Config, cluster: Cluster, calibration: Calibration | None = None, alone: bool = False
) -> float:
    """The time of a full step. Raises UserError if the batch cannot be divided among the GPUs. `alone`: without what
    differs from engine to engine: exchange of weights and gradients, the update, waiting."""
    work, found = count_work(config, cluster.gpus), calibration or calibration_of(cluster.gpu)
    seconds = step_parts(work, config, cluster, found).seconds
    return sum(taken for part, taken in seconds.items() if not (alone and part in _OF_ENGINES))


def step_parts(work: Work, config: Config, cluster: Cluster, c: Calibration) -> Parts:
    """Seconds of a full step by part, from its counts."""
    train, engine, gpu = config.train, config.engine, cluster.gpu
    peak = gpu.peak(train.precision)
    fill = (1 + c.half_tokens / work.tokens) / (peak * c.products)
    compute = {
        "matrix products": (work.block_flops / _float8_gain(train.float8, c) + work.head_flops) * fill,
        "attention": work.attention_flops / (peak * c.attention),
        "other operations": work.values * _value_bytes(config, c) / gpu.bandwidth,
        "logits": work.logits * c.logit_bytes / gpu.bandwidth,
        "weights in each micro-batch": work.parameters * c.weight_bytes / gpu.bandwidth,
    }
    streaming = work.streamed / c.pcie
    taken = collections.defaultdict[tuple[bool, bool], float](float)
    for exchange in work.exchanges:
        taken[exchange.between_products, exchange.each_micro_batch] += _seconds(exchange, cluster, c)
    each, once, between = taken[False, True], taken[False, False], taken[True, True]
    computing = sum(compute.values()) + between
    exposed = c.zero_overlap if engine.name == "zero" else c.overlap
    middle, last = _together(computing, each, exposed), _together(computing, each + once, exposed)
    count, launching = work.micro_batches, work.launches * c.launch
    idle = (count - 1) * max(0.0, launching - middle - streaming) + max(0.0, launching - last - streaming)
    exchanging = (count - 1) * (middle - computing) + last - computing
    on_host = engine.offload != "none"
    seconds = {name: count * value for name, value in compute.items()}
    if engine.tensor_ranks > 1:
        seconds["tensor exchange"] = count * between + taken[True, False]
    seconds["exchange"] = exchanging
    seconds["update"] = 0.0 if on_host else work.updated * c.update_bytes / gpu.bandwidth
    if on_host:
        seconds["offload"] = count * streaming + _host_update(work, config, c)
    if idle:
        seconds["waiting for the host"] = idle
    seconds = {name: c.factor * value for name, value in seconds.items()}
    return Parts(seconds, c.factor * max(0.0, count * each + once - exchanging))


def _together(one: float, other: float, exposed: float) -> float:
    """Time of two that run side by side, if the longer one does not hide a share of the shorter one."""
    return max(one, other) + exposed * min(one, other)


def _seconds(exchange: Exchange, cluster: Cluster, c: Calibration) -> float:
    """Of an exchange, alone. Between nodes, a ring passes each node's network once, with all of the node's GPUs; rings
    that run side by side share it. Each gather or scatter passes all ranks, one after the other; a sum, two trees."""
    inside = c.link_share * cluster.gpu.link
    beside = exchange.copied / cluster.gpu.bandwidth + (exchange.calls * c.call if exchange.between_products else 0.0)
    if exchange.ranks * exchange.rings <= cluster.per_node:
        return exchange.moved / inside + beside
    rings = min(exchange.rings, cluster.per_node)
    between = c.network_share * cluster.network * 1e9 / 8 * cluster.per_node / rings
    hops = exchange.ranks - cluster.per_node / rings
    if exchange.is_sum:
        hops = 2 * math.log2(exchange.ranks * rings / cluster.per_node)
    return exchange.moved / min(inside, between) + exchange.calls * c.hop * max(0.0, hops) + beside


def _value_bytes(config: Config, c: Calibration) -> float:
    train = config.train
    moved = c.other_bytes * (c.dropout if config.model.dropout else 1)
    if train.precision == "fp32":
        return moved * c.fp32_values
    return moved * (c.bf16_residual if train.residual == "bf16" else 1)


def _float8_gain(scaling: str, c: Calibration) -> float:
    return {"none": 1.0, "tensorwise": c.float8, "rowwise": (1 + c.float8) / 2}[scaling]


def _host_update(work: Work, config: Config, c: Calibration) -> float:
    """Seconds of the update on the host: gradients down and weights up, unless they are there, and AdamW in its
    memory or through its disks."""
    value = 4 if config.train.precision == "fp32" else 2
    moved = 0 if config.engine.offload == "all" else (4 + value) * work.updated / c.pcie
    disk = _STATE_BYTES * work.updated / c.disk if config.engine.nvme_path else 0.0
    return moved + c.update_bytes * work.updated / c.host_memory + disk


def check_precision(config: Config, gpu: Gpu) -> None:
    """Raises UserError if the GPU lacks products in the precision of the config."""
    train = config.train
    if train.precision == "bf16" and not gpu.has_bf16:
        raise UserError(f"{gpu.name} has no products in bf16: set train.precision=fp16")
    least = FLOAT8_CAPABILITIES.get(train.float8)
    if least and gpu.capability and gpu.capability < least:
        has, needs = (".".join(map(str, capability)) for capability in (gpu.capability, least))
        problem = f"{gpu.name} has compute capability {has}, and it needs {needs} or higher"
        raise UserError(f"train.float8 {train.float8}: {problem}; use train.float8=none, or another GPU")
