"""launch slurm, launch hosts: runs on many machines; check, node and verdict, which launch/multinode.sh calls."""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from megagpt.commands.options import Add, Parser, add_actions, add_config, config_of, count, position, split_words
from megagpt.errors import UserError

# Options of `megagpt train` without a value that are passed on to it, as --at is.
_TRAIN_OPTIONS = ("--allow-data-change", "--allow-recipe-change")


def register(add: Add) -> None:
    actions = add_actions(add("launch", _slurm, "Start runs on many machines."))

    sub = actions("slurm", _slurm, "Print the sbatch command of a run, or submit it. Refuses a run that cannot work.")
    _add_run(sub)
    sub.add_argument("--nodes", type=count, required=True, help="number of machines")
    sub.add_argument("--gpus-per-node", type=count, default=8, help="ranks on each node (8)")
    sub.add_argument("--gpu", metavar="NAME", help="kind of GPU, such as h100 or a100-40gb, whose memory is checked")
    sub.add_argument("--gpu-memory", type=count, metavar="GB", help="memory of one GPU, for kinds without a known name")
    sub.add_argument("--time", help="time limit, as sbatch takes it (24:00:00)")
    sub.add_argument("--account", help="account to charge, as sbatch takes it")
    sub.add_argument("--partition", help="partition of the cluster, as sbatch takes it")
    text = "another option of sbatch: --sbatch=--qos=high"
    sub.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help=text)
    sub.add_argument("--submit", action="store_true", help="also submit the job")

    sub = actions("hosts", _hosts, "Start a run on the hosts of a hostfile, with DeepSpeed's launcher over ssh.")
    _add_run(sub)
    sub.add_argument("--hostfile", type=Path, required=True, help="lines of the form: HOST slots=RANKS")
    sub.add_argument("--master", default="", help="address at which the other hosts reach the first one (its name)")
    sub.add_argument("--port", type=count, default=29500, help="port of the first host (29500)")
    sub.add_argument("--print", action="store_true", help="print the command, instead of running it")

    # For launch/multinode.sh, inside a Slurm job.
    _add_run(actions("check", _check))
    sub = actions("node", _node)
    sub.add_argument("folder", type=Path, help="folder for the reports")
    sub.add_argument("--port", type=count, required=True, help="port that the ranks will meet at")
    sub.add_argument("--gpu", action="store_true", help="check the GPUs, too")
    sub = actions("verdict", _verdict)
    _add_run(sub)
    sub.add_argument("--logs", type=Path, required=True, help="folder of the ranks' output")


def _add_run(sub: Parser) -> None:
    """The arguments of the `megagpt train` that is started."""
    add_config(sub)
    text = "passed on to `megagpt train`"
    for option in _TRAIN_OPTIONS:
        sub.add_argument(option, dest="options", action="append_const", const=option, default=[], help=text)
    sub.add_argument("--at", metavar="TOKENS", type=position, help=text)


def find_script(name: str) -> Path:
    """The path of a script of `launch/`. Raises UserError if it is neither beside the package nor in it."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package.parent / "launch", package / "launch"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"launch/{name} is neither next to the package nor in it: install megagpt again")


def _train_arguments(arguments: argparse.Namespace) -> list[str]:
    names, overrides = split_words(arguments)
    at = [] if arguments.at is None else [f"--at={arguments.at}"]
    return [*names, *overrides, *arguments.options, *at]


def _slurm(arguments: argparse.Namespace) -> int:
    from megagpt.cluster.slurm import check_job, sbatch_command
    from megagpt.console import warn

    config = config_of(arguments)
    nodes, gpus = arguments.nodes, arguments.gpus_per_node
    job, warning = check_job(config, nodes, gpus, arguments.gpu, arguments.gpu_memory)
    if warning:
        warn(f"warning: {warning}")
    options = [f"--{n}={v}" for n in ("time", "account", "partition") if (v := getattr(arguments, n)) is not None]
    options += arguments.sbatch
    script, words = find_script("multinode.sh"), _train_arguments(arguments)
    command = sbatch_command(config, script, words, nodes, gpus, options)
    print(f"# {job}")
    print(shlex.join(command), flush=True)
    if not arguments.submit:
        return 0
    if not shutil.which("sbatch"):
        raise UserError("no sbatch here: run the command above on a machine of the cluster")
    return subprocess.call(command, env={"PYTHON": sys.executable, **os.environ})


def _hosts(arguments: argparse.Namespace) -> int:
    from megagpt.cluster.hosts import deepspeed_command, passed_on, read_hostfile
    from megagpt.placement import check_start
    from megagpt.training.run_folder import run_folder

    config = config_of(arguments)
    hosts = read_hostfile(arguments.hostfile)
    check_start(config, [host for host, slots in hosts.items() for _ in range(slots)])
    hostfile, script = arguments.hostfile.resolve(), find_script("train.py")
    words = [*_train_arguments(arguments), "--auto-resume"]
    command = deepspeed_command(hostfile, hosts, arguments.master, arguments.port, script, words)
    variables = "".join(f"{name}={value}\n" for name, value in passed_on(os.environ).items())
    # The launcher reads one file: the user's own is copied into it.
    for folder in (Path.home(), Path()):
        own = folder / os.environ.get("DS_ENV_FILE", ".deepspeed_env")
        if own.is_file():
            variables += own.read_text(encoding="utf-8").rstrip("\n") + "\n"
    if arguments.print:
        print(f"# on all hosts:\n{variables}{shlex.join(command)}")
        return 0
    if not shutil.which("pdsh"):
        raise UserError("no pdsh here, with which DeepSpeed's launcher reaches the hosts: install it")
    logs = run_folder(config) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    file = logs / "deepspeed_env"
    file.touch(mode=0o600)
    file.write_text(variables)
    os.execvpe(command[0], command, {**os.environ, "DS_ENV_FILE": str(file.resolve())})


def _check(arguments: argparse.Namespace) -> int:
    """Check config and nodes before the ranks start. Prints the run's folder, or nothing if the run is finished."""
    from megagpt.cluster.preflight import UnfitError, job_nodes, preflight
    from megagpt.cluster.verdict import Cause, decide_after_failure, is_finished
    from megagpt.console import say, voice
    from megagpt.failures import failure
    from megagpt.launchers import job_setting, slurm_gpus, slurm_job
    from megagpt.placement import check_start
    from megagpt.training.run_folder import run_folder, went_back

    config, nodes = config_of(arguments), job_nodes()
    ranks, port = job_setting(os.environ, "RANKS_PER_NODE"), job_setting(os.environ, "MASTER_PORT")
    run, job = run_folder(config), slurm_job(os.environ) or ""
    check_start(config, [node for node in nodes for _ in range(ranks)])
    with voice(to_stderr=True, prefix="== "):
        goes_back = arguments.at is not None and not went_back(run, arguments.at)
        if is_finished(run, config) and not goes_back:
            say(f"{run}: finished already, at {config.train.tokens:,} tokens")
            return 0
        on_gpu = config.train.device == "cuda" or (config.train.device == "auto" and slurm_gpus(os.environ) > 0)
        logs = run / "logs" / job
        try:
            preflight(nodes, ranks if on_gpu else 0, logs, port)
        except UnfitError as error:
            if job.endswith(".0"):
                raise
            # After a requeue, nobody watches the job, and the problem may pass: a retry may succeed.
            return decide_after_failure(run, job, Cause(failure(error, rank=None)), logs)
    print(run)
    return 0


def _node(arguments: argparse.Namespace) -> int:
    from megagpt.cluster.node_report import print_report

    print_report(arguments.folder, arguments.port, arguments.gpu)
    return 0


def _verdict(arguments: argparse.Namespace) -> int:
    """After the ranks have ended: print what failed first, and exit with the code that decides about a requeue."""
    from megagpt.cluster.verdict import decide
    from megagpt.console import voice
    from megagpt.launchers import slurm_job
    from megagpt.training.run_folder import run_folder

    config, job = config_of(arguments), slurm_job(os.environ)
    if job is None:
        raise UserError("not inside a Slurm job: launch/multinode.sh runs this after its ranks have ended")
    with voice(prefix="== "):
        return decide(run_folder(config), config, job, arguments.logs)
