"""The sbatch command of a run, with the resources that its config needs."""

from collections.abc import Sequence
from pathlib import Path

from megagpt.config import Config
from megagpt.errors import UserError
from megagpt.hardware import LARGEST_GPU_GB
from megagpt.planning.state import state_bytes

# Time (s) from the signal to the time limit, besides the save's: Slurm may be a minute late, and one step comes first.
_SIGNAL_SECONDS = 120
# Pessimistic checkpoint bandwidth of a node on a shared disk, bytes/s.
_DISK_BYTES = 250e6


def check_fits(config: Config, ranks: int, gpu_gb: float | None) -> str:
    """A sentence about the memory that each rank needs. Raises UserError if a GPU has less, and if the run cannot be
    divided among the ranks. `gpu_gb`: memory of a GPU (GB); None: that of the largest known GPU."""
    config.check_ranks(ranks)
    state = state_bytes(config, ranks)
    on_host = {"none": 0.0, "optimizer": state.optimizer, "all": state.total}[config.engine.offload]
    held = (state.total - on_host) / 1e9
    limit = gpu_gb or LARGEST_GPU_GB
    sentence = f"weights, gradients and optimizer take {held:.1f} GB of each GPU; activations come on top"
    if held <= limit:
        return sentence
    of = f"{limit:g} GB" if gpu_gb else f"{limit:g} GB, which the largest known GPU has (set --gpu-memory for others)"
    raise UserError(f"{config.run.name} does not fit on {ranks} GPU(s): {sentence}, of {of}; {_way_out(config, ranks)}")


def _way_out(config: Config, ranks: int) -> str:
    if config.engine.name == "ddp":
        return "shard it: engine.name=fsdp, or engine.name=zero engine.stage=3"
    if config.engine.name == "zero" and config.engine.stage < 3:
        return "shard more of it with engine.stage=3, or take more nodes"
    if config.engine.name == "fsdp" and config.sharing_ranks(ranks) < ranks:
        return "let more ranks share a copy (engine.shard_ranks), or take more nodes"
    return "take more nodes, or engine.offload"


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
