"""Seconds of a training step, predicted from the config and the cluster."""

from dataclasses import dataclass
from typing import NamedTuple

from megagpt.config import Config
from megagpt.planning.gpus import Cluster
from megagpt.schedule import batch_sequences


class Term(NamedTuple):
    """A number that the prediction rests on."""

    name: str
    value: float
    unit: str
    formula: str
    origin: str


@dataclass(frozen=True)
class Calibration:
    """Constants of the speed formulas."""

    products: float = 0.705
    attention: float = 0.18
    other_bytes: float = 363.0
    logit_bytes: float = 36.0
    link: float = 0.52
    network: float = 1.7
    nodes_power: float = 0.41
    overlap: float = 0.52
    overlap_zero3: float = 1.0


@dataclass(frozen=True)
class Speed:
    """One full step, as each GPU sees it."""

    seconds: dict[str, float]
    """Parts; their sum is `step`. Exchange is the part that computation does not hide."""
    step: float
    tokens_per_second: float
    """Of all GPUs."""
    range: tuple[float, float]
    """Tokens/s of all GPUs: 80% of measurements are expected between these."""
    mfu: float
    evidence: str
    """The sentence that says what the range rests on."""
    hidden_exchange: float = 0.0
    """Seconds of exchange beside computation; part of no sum."""
    terms: tuple[Term, ...] = ()


_A100 = Calibration(products=0.81, attention=0.32)
_H100 = Calibration()


def predict_speed(config: Config, cluster: Cluster, calibration: Calibration | None = None) -> Speed:
    """Raises UserError if the batch cannot be divided among the GPUs."""
    accumulation = config.accumulation(cluster.gpus)
    found = calibration or (_A100 if cluster.gpu.name.startswith("a100") else _H100)
    parts, hidden = _step(config, cluster, found, accumulation)
    step = sum(parts.values())
    rate = config.train.batch_tokens / step
    mfu = config.model.flops_per_token * rate / cluster.gpus / cluster.gpu.peak(config.train.precision)
    return Speed(parts, step, rate, (0.7 * rate, 1.3 * rate), mfu, "no evidence yet", hidden)


def run_seconds(config: Config, cluster: Cluster, calibration: Calibration | None = None) -> float:
    """Time of all steps to the token budget, with the batch ramp; without saves, validation and samples."""
    full = predict_speed(config, cluster, calibration).step
    accumulation = config.accumulation(cluster.gpus)
    unit = cluster.gpus * config.micro_batch
    seen = total = 0.0
    while seen < config.total_sequences:
        if seen * config.model.context >= config.train.batch_ramp_tokens:
            return total + full * (config.total_sequences - seen) / config.batch_sequences
        batch = batch_sequences(config, int(seen))
        total += full / accumulation * -(-batch // unit)
        seen += batch
    return total


def _step(config: Config, cluster: Cluster, c: Calibration, accumulation: int) -> tuple[dict[str, float], float]:
    model, train, gpu = config.model, config.train, cluster.gpu
    width, layers, context = model.width, model.layers, model.context
    peak, ranks = gpu.peak(train.precision), cluster.gpus
    tokens = config.micro_batch * context
    again = {"full": 1.0, "none": 0.0, "selective": 0.0}.get(str(train.activation_checkpointing))
    if isinstance(train.activation_checkpointing, dict):
        again = -(-layers // train.activation_checkpointing["every"]) / layers
    assert again is not None
    other_again = 1.0 if train.activation_checkpointing == "selective" else again
    products = (24 * width**2 * layers * (3 + again) + 6 * model.padded_vocab_size * width) / (peak * c.products)
    attention = 2 * layers * width * context * (3.5 + again) / (peak * c.attention)
    other = c.other_bytes * layers * width * (3 + other_again) / 3 / gpu.bandwidth
    logits = c.logit_bytes * model.padded_vocab_size / gpu.bandwidth
    computing = tokens * (products + attention + other + logits)
    engine, parameters = config.engine, model.stored_parameters
    each_micro_batch = engine.name == "fsdp" or (engine.name == "zero" and engine.stage == 3)
    moved = 8.0 * parameters if each_micro_batch or engine.name == "ddp" else 6.0 * parameters
    bandwidth = c.link * gpu.link
    if cluster.nodes > 1:
        bandwidth = min(
            bandwidth, c.network * cluster.per_node * cluster.network * 1e9 / 8 * cluster.nodes**-c.nodes_power
        )
    exchange = moved * (ranks - 1) / ranks / bandwidth
    overlap = c.overlap_zero3 if engine.name == "zero" and engine.stage == 3 else c.overlap
    last = max(computing, exchange) + overlap * min(computing, exchange)
    exposed = last - computing
    count = accumulation if each_micro_batch else 1
    sharing = config.sharing_ranks(ranks) if engine.name == "fsdp" else ranks if engine.name == "zero" else 1
    update = 30 * parameters / sharing / gpu.bandwidth
    scale = accumulation * tokens
    parts = {
        "matrix products": scale * products,
        "attention": scale * attention,
        "other operations": scale * other,
        "logits": scale * logits,
        "exchange": count * exposed,
        "update": update,
    }
    return parts, count * (exchange - exposed) if exposed < exchange else 0.0
