"""Rank, node and Slurm job of this process, from launchers' environment variables. Only this module reads these."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megagpt.errors import UserError


@dataclass(frozen=True)
class RankInfo:
    """This process's place among the ranks, as its launcher set it."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int
    variables: str = "RANK and WORLD_SIZE"
    """Names of the variables that hold `rank` and `size`."""


_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")


def find_rank(environment: Mapping[str, str]) -> RankInfo:
    """This process's rank. torchrun and the deepspeed launcher set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT; the tasks of an `srun` have SLURM_*; with neither, this process is alone. Raises UserError naming the
    variable that is missing, not a number, or out of range."""
    if "RANK" in environment or "WORLD_SIZE" in environment:
        names, hint = _LAUNCHER, "start with torchrun or deepspeed, or set them all"
    elif "SLURM_STEP_ID" in environment and environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        # The tasks of an srun. In a batch script itself there is no step: a process there is alone.
        names, hint = _SLURM, "start with srun or torchrun"
    else:
        return RankInfo(0, 1, 0, "localhost", 0)
    if missing := [name for name in names if not environment.get(name)]:
        found = ", ".join(name for name in names if name not in missing) or "none"
        raise UserError(f"looked for {', '.join(names)}; found {found}, not {', '.join(missing)}: {hint}")

    def number(name: str) -> int:
        # int() would read 1_0 and the digits of other scripts, too.
        if not re.fullmatch(r"\s*-?[0-9]+\s*", environment[name]):
            raise UserError(f"{name}={environment[name]!r} is not a whole number: {hint}")
        return int(environment[name])

    def port_number() -> int:
        if not 0 < (port := number("MASTER_PORT")) < 2**16:
            way = "set it to a free port of rank 0's machine, 1024 to 65535"
            raise UserError(f"MASTER_PORT={port} is not a port: {way}")
        return port

    rank, size, local_rank = (number(name) for name in names[:3])
    for name, value in ((names[0], rank), (names[2], local_rank)):
        if not 0 <= value < size:
            raise UserError(f"{name}={value} is not below {names[1]}={size}: {hint}")
    if names is _LAUNCHER:
        return RankInfo(rank, size, local_rank, environment["MASTER_ADDR"].strip(), port_number())
    # One port per step, so that steps of one job, and jobs that share a node, rarely choose the same.
    port = 20_000 + (number("SLURM_JOB_ID") * 31 + number("SLURM_STEP_ID")) % 20_000
    address = environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"])
    port = port_number() if environment.get("MASTER_PORT") else port
    return RankInfo(rank, size, local_rank, address, port, "SLURM_PROCID and SLURM_NTASKS")


def speaks(environment: Mapping[str, str]) -> bool:
    """Whether this process speaks for its job before it has joined: it is alone, or rank 0."""
    try:
        return find_rank(environment).rank == 0
    except UserError:
        return True


def sees_one_gpu(environment: Mapping[str, str]) -> bool:
    """Whether the launcher shows this process a single GPU, as `srun --gpus-per-task=1` does: each task of a node has
    another one, and calls it device 0."""
    names = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
    return any(environment.get(name) and "," not in environment[name] for name in names)


def slurm_job(environment: Mapping[str, str]) -> str | None:
    """The Slurm job and how often it was requeued, such as 4711.2; None outside of Slurm."""
    job = environment.get("SLURM_JOB_ID")
    return f"{job}.{environment.get('SLURM_RESTART_COUNT', '0')}" if job else None


def torchrun_name(environment: Mapping[str, str], host: str, agent: int) -> str:
    """A name of the torchrun that started this rank, the same after each of its restarts; empty if none did. `agent`:
    the number of its process on `host`, which tells apart those that were given no --rdzv-id."""
    name = environment.get("TORCHELASTIC_RUN_ID", "")
    return f"{host} {agent}" if name == "none" else name


def job_number(job: object) -> str:
    """The Slurm job without its restarts: 4711 of 4711.2."""
    return str(job).partition(".")[0]


@dataclass(frozen=True)
class SlurmNode:
    """One node of a Slurm job, as a task sees it that runs once on each node."""

    name: str
    index: int
    nodes: int
    head: str
    """Name of the job's first node."""


def slurm_node(environment: Mapping[str, str]) -> SlurmNode:
    """This task's node. Raises UserError outside of launch/multinode.sh."""
    try:
        name, index = environment["SLURMD_NODENAME"], int(environment["SLURM_NODEID"])
        return SlurmNode(name, index, int(environment["SLURM_NNODES"]), environment["MASTER_ADDR"])
    except (KeyError, ValueError) as error:
        raise UserError(f"launch/multinode.sh runs this on each node of a Slurm job ({error!r})") from None


def slurm_nodes(environment: Mapping[str, str]) -> str:
    """The job's nodes in Slurm's short form, such as n[1-4]; empty outside of a job."""
    return environment.get("SLURM_JOB_NODELIST", "")


def slurm_gpus(environment: Mapping[str, str]) -> int:
    """GPUs that the job has on this node. Raises UserError if Slurm has set no number."""
    found = environment.get("SLURM_GPUS_ON_NODE") or "0"
    if not found.isdecimal():
        raise UserError(f"SLURM_GPUS_ON_NODE is {found!r}, not a number: Slurm sets it in a job; unset it elsewhere")
    return int(found)


def job_setting(environment: Mapping[str, str], name: str) -> int:
    """A number that launch/multinode.sh sets, such as RANKS_PER_NODE. Raises UserError if it is not set."""
    try:
        return int(environment[name])
    except (KeyError, ValueError):
        found = environment.get(name, "nothing")
        raise UserError(f"{name} is {found!r}, not a number: launch/multinode.sh sets it") from None


def torchrun_passes_sigterm_on(environment: Mapping[str, str]) -> bool:
    """Whether torchrun started this rank and handles SIGTERM: it passes the signal on, and kills the rank later."""
    handled = environment.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM")
    return started_by_torchrun(environment) and "SIGTERM" in handled


def torchrun_waits_longer() -> bool:
    """Whether this PyTorch's torchrun has --shutdown-timeout, which 2.11 lacks."""
    from torch.distributed.run import get_args_parser

    return "--shutdown-timeout" in get_args_parser().format_help()


def started_by_torchrun(environment: Mapping[str, str]) -> bool:
    return "TORCHELASTIC_RUN_ID" in environment


def agent_holds_store(environment: Mapping[str, str]) -> bool:
    """Whether torchrun's agent, not rank 0, holds the store in which the ranks meet."""
    return environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def torchrun_attempt(environment: Mapping[str, str]) -> str | None:
    """The number of torchrun's start of the ranks, from 0, if its agent holds one store for all of them. None if each
    start has a store of its own, as under an elastic torchrun, whose agents count their starts differently."""
    return environment.get("TORCHELASTIC_RESTART_COUNT") if agent_holds_store(environment) else None


def error_file(environment: Mapping[str, str]) -> str:
    """The file in which torchrun reads why this rank failed; empty if it names none."""
    return environment.get("TORCHELASTIC_ERROR_FILE", "")


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: n007 of `n[007-012,020]-ib,login`."""
    first = re.match(r"(\[[^\]]*\]|[^,])*", nodes)
    assert first is not None  # it may be empty
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])
