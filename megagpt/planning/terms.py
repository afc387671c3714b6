"""The numbers of a speed prediction, one by one: for `megagpt plan --explain`."""

from typing import NamedTuple

from megagpt.config import Config
from megagpt.planning.calibration import ORIGINS, Calibration
from megagpt.planning.gpus import Cluster
from megagpt.planning.work import count_work, repeated_share


class Term(NamedTuple):
    """A number that the prediction rests on."""

    name: str
    value: float
    unit: str
    formula: str
    origin: str


# Formulas of a step's parts. N: tokens of a micro-batch; M: micro-batches of a step; t: tensor ranks; P: parameters of
# a rank's part of the model; R: share of blocks that are recomputed; C, L, T, V: width, layers, context and padded
# vocabulary; a: bytes of a number in the compute precision.
_FORMULAS = {
    "matrix products": "M N/t (24 C^2 L (3 + 2/3 R) / float8 + 6 V C) (1 + half_tokens / N) / (peak x products)",
    "attention": "M N/t 4 C L T/2 (3.5 + R) / (peak x attention); a banded layer: 2 window instead of T/2",
    "other operations": "M N/t C L (3 + R)/3 other_bytes / bandwidth; selective: R = 1",
    "logits": "M N/t V logit_bytes / bandwidth",
    "weights in each micro-batch": "M P weight_bytes / bandwidth",
    "tensor exchange": (
        "M (bytes sent / (link x link_share) + calls x call + bytes reordered / bandwidth), and the same of uncut "
        "gradients, which FSDP sums once a step; nothing hides it; bytes of activations: (8 L + 3 R L + 4) N C a "
        "(t - 1)/t, and 12 N (t - 1) of the loss; selective: R = 1"
    ),
    "exchange": (
        "of weights and gradients, what computation does not hide: M (max(c, e) + overlap min(c, e) - c); c: the parts "
        "above; e: bytes sent / min(link x link_share, network x network_share x GPUs of a node / rings) + calls x hop "
        "x ranks beyond the node; rings: of the ranks of a node, those with other parts, which share its network: 1, "
        "or with tensor ranks t; of sums over copies, all GPUs of the node; DDP: with the last micro-batch only"
    ),
    "update": "P / sharing ranks x update_bytes / bandwidth",
    "offload": "bytes / pcie + P / sharing ranks x (update_bytes / host_memory [+ 24 / disk])",
    "waiting for the host": "M max(0, L (3 + R)/3 launch - c - exchange)",
}
_UNITS = {
    "half_tokens": "tokens", "other_bytes": "bytes", "logit_bytes": "bytes", "weight_bytes": "bytes",
    "update_bytes": "bytes", "call": "s", "hop": "s", "launch": "s", "pcie": "bytes/s", "host_memory": "bytes/s",
    "disk": "bytes/s",
}  # fmt: skip


def speed_terms(seconds: dict[str, float], config: Config, cluster: Cluster, c: Calibration) -> tuple[Term, ...]:
    """The parts of a step with their formulas, then what the formulas are filled with."""
    gpu, train = cluster.gpu, config.train
    origins = dict(gpu.origins)
    parts = [Term(name, value, "s", _FORMULAS[name], "computed") for name, value in seconds.items()]
    peak = "fp32" if train.precision == "fp32" else "half"
    work = count_work(config, cluster.gpus)
    counts = [
        Term("P / sharing ranks", work.updated, "parameters", "that a GPU updates", "config"),
        Term("R", repeated_share(config), "", "share of blocks that are recomputed", "config"),
        Term("t", config.engine.tensor_ranks, "", "tensor ranks", "config"),
    ]
    for sent in work.exchanges:
        when = f"in each {'micro-batch' if sent.each_micro_batch else 'step'}, among {sent.ranks} ranks"
        counts.append(Term(f"{sent.name}: sent", sent.moved, "bytes", when, "counted"))
        counts.append(Term(f"{sent.name}: calls", sent.calls, "", when, "counted"))
        if sent.copied:
            counts.append(
                Term(f"{sent.name}: reordered", sent.copied, "bytes", "to put tokens in order, and sums", "counted")
            )
    figures = [
        Term("peak", gpu.peak(train.precision), "FLOP/s", train.precision, origins.get(peak, "")),
        Term("bandwidth", gpu.bandwidth, "bytes/s", "of the GPU's memory", origins.get("bandwidth", "")),
        Term("link", gpu.link, "bytes/s", "in a node, one way", origins.get("link", "")),
        Term("network", cluster.network, "Gbit/s", "between nodes, a GPU", _network_origin(cluster)),
    ]
    shares = [
        Term("products", c.products, "of peak", "", c.products_origin),
        Term("attention share", c.attention, "of peak", "causal half", c.products_origin),
    ]
    constants = [Term(name, getattr(c, name), _UNITS.get(name, ""), "", origin) for name, origin in ORIGINS.items()]
    if c.run:
        constants.append(Term("factor", c.factor, "", "multiplies every part", f"run {c.run}"))
    return (*parts, *counts, *figures, *shares, *constants)


def _network_origin(cluster: Cluster) -> str:
    return "assumed" if cluster.network == cluster.gpu.network else "given"
