"""Published speeds that resemble a plan, and the range that follows from them."""

from collections.abc import Iterator

from megagpt.config import Config
from megagpt.planning.calibration import ASSUMED, EVIDENCE, Calibration, Evidence
from megagpt.planning.gpus import Cluster

# The 80% range without evidence, and after a calibration with a run of one size, as factors of the prediction.
_WIDE, _CALIBRATED = (0.7, 1.3), (0.85, 1.15)
# A setting is near the rows if it lies in their range, widened by this factor; for models, whose rows lie less than this
# factor apart, and for contexts and micro-batches, which come in powers of two.
_NEAR = 1.6
# Least network, as a share of the rows'.
_NETWORK = 0.7


def find_evidence(config: Config, cluster: Cluster, calibration: Calibration) -> tuple[tuple[float, float], str]:
    """The 80% range as factors of the predicted speed, and the sentence that says what it rests on."""
    if calibration.run:
        factor = f"{calibration.factor:.2f} times the published constants' time"
        return _CALIBRATED, f"calibrated with the run {calibration.run}, which took {factor}: ±15%"
    assumed = ""
    if calibration.products_origin == ASSUMED:
        assumed = (
            f"; assumed, not measured: matrix products at {calibration.products:.0%} of this card's peak, "
            f"attention at {calibration.attention:.0%}"
        )
    engine = engine_family(config)
    rows = [row for row in EVIDENCE if (row.gpu, row.engine) == (cluster.gpu.name, engine)]
    problems = [_problem(config, cluster, row) for row in rows]
    for row, problem in zip(rows, problems, strict=True):
        if not problem:
            low, high = row.range
            return row.range, (
                f"{1 - low:.0%} less to {high - 1:.0%} more: four in five of the {row.rows} published speeds of "
                f"{row.gpu} under {engine} ({row.source}) were that near to the formulas, fitted without them; they are "
                "other people's code, and this project's own step has not been measured on a GPU"
            )
    missing = problems[0] if problems else f"{cluster.gpu.name} under {engine}"
    return _WIDE, f"±30%: no published speeds of {missing} were at hand{assumed}"


def engine_family(config: Config) -> str:
    """The engine's name, with the stage of ZeRO: "zero-3"."""
    return f"zero-{config.engine.stage}" if config.engine.name == "zero" else config.engine.name


def _problem(config: Config, cluster: Cluster, row: Evidence) -> str:
    """The first thing for which there are no rows; empty if there are."""
    return next(_problems(config, cluster, row), "")


def _problems(config: Config, cluster: Cluster, row: Evidence) -> Iterator[str]:
    model, train, engine = config.model, config.train, config.engine
    of = f" on {row.gpu} under {row.engine}"
    if train.precision == "fp32":
        yield "fp32" + of
    if train.float8 != "none":
        yield "float8 with this code" + of
    if model.attention == "banded" and model.window < model.context:
        yield "banded attention" + of
    if train.activation_checkpointing == "selective":
        yield "selective activation checkpointing" + of
    if engine.offload != "none":
        yield "offloaded state" + of
    if engine.name == "fsdp" and config.sharing_ranks(cluster.gpus) < cluster.gpus:
        yield "copies of a sharded model" + of
    near = [
        (model.stored_parameters, row.parameters, f"{model.stored_parameters / 1e9:,.2g}B parameters"),
        (cluster.gpus, row.gpus, f"{cluster.gpus:,} GPUs"),
        (model.context, row.context, f"contexts of {model.context:,}"),
        (config.micro_batch * model.context, row.tokens, f"{config.micro_batch * model.context:,} tokens a micro-batch"),
    ]
    for value, (low, high), words in near:
        if not low / _NEAR <= value <= high * _NEAR:
            yield words + of
    if cluster.nodes > 1 and cluster.network < _NETWORK * row.network:
        yield f"a network of {cluster.network:g} Gbit/s a GPU" + of
