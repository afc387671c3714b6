"""The sbatch command of a run, with the resources that its config needs."""

from collections.abc import Sequence
from pathlib import Path

from megagpt.cards import CARDS
from megagpt.config import Config
from megagpt.config_types import AUTO
from megagpt.errors import UserError, did_you_mean
from megagpt.placement import check_start, layout, micro_batches
from megagpt.planning.amounts import gigabytes
from megagpt.planning.fit import check_fit
from megagpt.planning.gpus import Gpu, find_gpu, gpu_names
from megagpt.planning.micro_batch import resolved
from megagpt.planning.speed import check_precision

# Time (s) from the signal to the time limit, besides the save's: Slurm may be a minute late, and one step comes first.
_SIGNAL_SECONDS = 120
# Pessimistic checkpoint bandwidth of a node on a shared disk, bytes/s.
_DISK_BYTES = 250e6


def check_job(
    config: Config, nodes: int, ranks_per_node: int, gpu: str | None, gpu_gb: float | None
) -> tuple[str, str]:
    """The ranks, their micro-batches and the memory of each in a sentence, and a warning if that is nearly all that a
    GPU has. Raises UserError if a GPU has less, if the ranks do not divide the batch, and if a group of tensor ranks
    would be on two nodes. `gpu`: the GPU's name; `gpu_gb`: its memory (GB), if it is not that of the name. Without
    either, only what no known GPU could hold is refused."""
    ranks = nodes * ranks_per_node
    check_start(config, [f"node {node}" for node in range(1, nodes + 1) for _ in range(ranks_per_node)])
    needs, warning = _needs(config, ranks, ranks_per_node, gpu, gpu_gb)
    return f"{layout(ranks, config.engine.tensor_ranks)}, {needs}", warning


def _needs(config: Config, ranks: int, per_node: int, gpu: str | None, gpu_gb: float | None) -> tuple[str, str]:
    if config.train.device == "cpu":
        return f"{micro_batches(resolved(config, ranks, None), ranks)}; memory is not checked on CPUs", ""
    if gpu is not None or gpu_gb is not None:
        capacity = gpu_gb * 1e9 if gpu_gb is not None else 0.0
        if gpu is not None and (gpu_gb is None or gpu in gpu_names()):
            known = _known(gpu)
            check_precision(config, known)
            capacity = capacity or known.memory
        fit = check_fit(config, ranks, capacity, gpu or "", per_node)
        return f"{micro_batches(resolved(config, ranks, capacity), ranks)}; {fit.sentence}", fit.warning
    largest = max(card.memory for card in CARDS.values()) * 1e9
    ask = "name yours with --gpu or --gpu-memory"
    memory = check_fit(config, ranks, largest, f"the largest known; {ask}", per_node).memory
    if config.train.micro_batch == AUTO:
        return f"train.micro_batch auto depends on the GPU; {ask} to see it", ""
    needs = f"{gigabytes(memory.total)} GB at the peak and {gigabytes(memory.reserve)} GB beside it"
    return f"{micro_batches(config, ranks)}; each GPU needs {needs}; {ask} to have that checked", ""


def _known(gpu: str) -> Gpu:
    """The GPU of that name. Raises UserError if it is unknown."""
    try:
        return find_gpu(gpu)
    except UserError:
        near = did_you_mean(gpu, gpu_names())
        raise UserError(
            f"--gpu {gpu!r} is unknown: {near}; of any other GPU, give the memory with --gpu-memory"
        ) from None


def sbatch_command(
    config: Config, script: Path, arguments: Sequence[str], nodes: int, gpus_per_node: int, options: Sequence[str]
) -> list[str]:
    """The command as words. `options` are sbatch's own; they come last, so that they override the others."""
    ahead = max(300, _SIGNAL_SECONDS + int(config.model.checkpoint_bytes / (nodes * _DISK_BYTES)))
    return [
        "sbatch", f"--job-name={config.run.name}",
        # Two jobs of one run would supersede each other: the second waits for the first.
        "--dependency=singleton",
        f"--nodes={nodes}", f"--gpus-per-node={gpus_per_node}", f"--signal=USR1@{ahead}",
        *options, str(script), *arguments,
    ]  # fmt: skip
