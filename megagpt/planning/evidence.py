"""Published speeds that resemble a plan, and the range that follows from them."""

from collections.abc import Iterator

from megagpt.config import Config
from megagpt.planning.calibration import ASSUMED, EVIDENCE, Calibration, Evidence
from megagpt.planning.gpus import CPU, Cluster

# The 80% range without evidence, and after a calibration with a run of one size, as factors of the prediction.
_WIDE, _CALIBRATED = (0.7, 1.3), (0.85, 1.15)
# What the latter rests on: each speed predicted with constants that were calibrated with each other one.
_GPU_PAIRS = "pairs of published speeds of one code on one GPU were that near (4% at the median, 51% at most)"
_CPU_PAIRS = "pairs of 12 shapes on one CPU were that near (6% at the median, 21% at most)"
# A setting is near the rows if it lies in their range, widened by this factor: neighbouring models of the rows differ
# by about its square, so each model in the range is as near to one of them.
_NEAR = 1.5
# Least network, as a share of the rows'.
_NETWORK = 0.7
_OTHERS = "they are of other people's code; this project's own step has not been measured on a GPU"


def find_evidence(config: Config, cluster: Cluster, calibration: Calibration) -> tuple[tuple[float, float], str]:
    """The 80% range as factors of the predicted speed, and the sentence that says what the range rests on."""
    if calibration.run:
        factor = f"{calibration.factor:.2f} times the constants' time"
        if config.engine.tensor_ranks > 1:
            none = "but no pair of speeds shows how near that is with tensor ranks"
            return _WIDE, f"±30%: calibrated with the run {calibration.run}, which took {factor}; {none}"
        pairs = _CPU_PAIRS if cluster.gpu.name == CPU else _GPU_PAIRS
        return _CALIBRATED, f"±15%: calibrated with the run {calibration.run}, which took {factor}; nine in ten {pairs}"
    assumed = ""
    if calibration.products_origin.startswith(ASSUMED):
        share = f"matrix products at {calibration.products:.0%} of this GPU's peak"
        assumed = f"; assumed, not measured: {share}, attention at {calibration.attention:.0%}"
    engine = engine_family(config)
    rows = [row for row in EVIDENCE if (row.gpu, row.engine) == (cluster.gpu.name, engine)]
    problems = [_problem(config, cluster, row) for row in rows]
    for row, problem in zip(rows, problems, strict=True):
        if not problem:
            low, high = row.range
            of = f"of {row.rows} published speeds of {row.gpu} under {engine} ({row.source})"
            near = "were that near to the formulas, fitted without them"
            return row.range, f"{low - 1:+.0%} to {high - 1:+.0%}: four in five {of} {near}; {_OTHERS}"
    missing = problems[0] if problems else f"{cluster.gpu.name} under {engine}"
    return _WIDE, f"±30%: there is no published speed of {missing}{assumed}"


def engine_family(config: Config) -> str:
    """The engine's name, with the stage of ZeRO: "zero-3"."""
    return f"zero-{config.engine.stage}" if config.engine.name == "zero" else config.engine.name


def _problem(config: Config, cluster: Cluster, row: Evidence) -> str:
    """The first thing for which there are no rows; empty if there are."""
    return next(_problems(config, cluster, row), "")


def _problems(config: Config, cluster: Cluster, row: Evidence) -> Iterator[str]:
    model, train, engine = config.model, config.train, config.engine
    origins = dict(cluster.gpu.origins)
    of = f" on {row.gpu} under {row.engine}"
    if "given" in (origins.get(figure) for figure in ("half", "bandwidth", "link")):
        yield f"a {row.gpu} with these figures"
    if train.precision == "fp32":
        yield "fp32" + of
    if train.float8 != "none":
        yield "float8 with this code" + of
    if model.attention == "banded" and model.window < model.context:
        yield "banded attention" + of
    if model.dropout:
        yield "dropout" + of
    if train.activation_checkpointing == "selective":
        yield "selective activation checkpointing" + of
    if engine.tensor_ranks > 1:
        yield "tensor ranks" + of
    if engine.offload != "none":
        yield "offloaded state" + of
    if engine.name == "fsdp" and config.sharing_ranks(cluster.gpus) < cluster.gpus:
        yield "copies of a sharded model" + of
    near = [
        (model.stored_parameters, row.parameters, "parameters"),
        (cluster.gpus, row.gpus, "GPUs"),
        (model.context, row.context, "tokens in a sequence"),
        (config.micro_batch * model.context, row.tokens, "tokens in a micro-batch"),
    ]
    for value, (low, high), words in near:
        if not low / _NEAR <= value <= high * _NEAR:
            yield (f"{value:,}" if value < 1e6 else f"{value / 1e9:,.3g}B") + f" {words}{of}"
    if cluster.nodes > 1 and cluster.network < _NETWORK * row.network:
        yield f"a network of {cluster.network:g} Gbit/s a GPU" + of
