"""launch slurm, hosts: runs on many machines; check, node, verdict: what launch/multinode.sh asks on the way."""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.commands.options import Add, count
from megagpt.errors import UserError

if TYPE_CHECKING:
    from megagpt.config import Config


# Options of `megagpt train` that are passed on to it.
_TRAIN_OPTIONS = ("--allow-data-change", "--allow-recipe-change")


def register(add: Add) -> None:
    parser = add("launch", _slurm, "Start runs on many machines.")
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")

    sub = _of_config(actions, "slurm", "Write the sbatch command of a run, or submit it; refuses what cannot work.")
    sub.add_argument("--nodes", type=count, required=True)
    sub.add_argument("--gpus-per-node", type=count, default=8, help="ranks on each node (8)")
    sub.add_argument("--gpu-memory", type=count, metavar="GB", help="of one GPU (unknown: the largest that there is)")
    sub.add_argument("--time", help="time limit, as sbatch takes it (24:00:00)")
    sub.add_argument("--account")
    sub.add_argument("--partition")
    sub.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="another option of sbatch: --sbatch=--qos=high"
    )
    sub.add_argument("--submit", action="store_true", help="submit it, instead of printing it")
    sub.set_defaults(command=_slurm)

    sub = _of_config(actions, "hosts", "Start a run on the hosts of a hostfile, with DeepSpeed's launcher over ssh.")
    sub.add_argument("--hostfile", type=Path, required=True, help="lines of the form: HOST slots=RANKS")
    sub.add_argument("--master", default="", help="address of the first host that the others reach (its name)")
    sub.add_argument("--port", type=count, default=29500, help="port of the first host (29500)")
    sub.add_argument("--print", action="store_true", help="print the command, instead of running it")
    sub.set_defaults(command=_hosts)

    sub = _of_config(actions, "check", "Inside a Slurm job: check config and nodes; prints the run's folder.")
    sub.set_defaults(command=_check)

    sub = actions.add_parser("node", help="Inside a Slurm job, on each node: say whether it is fit.")
    sub.add_argument("folder", type=Path)
    sub.add_argument("--port", type=count, required=True)
    sub.add_argument("--gpu", action="store_true")
    sub.set_defaults(command=_node)

    sub = _of_config(actions, "verdict", "Inside a Slurm job, after it: say what failed first, and whether to go on.")
    sub.add_argument("--logs", type=Path, required=True)
    sub.set_defaults(command=_verdict)


def _of_config(
    actions: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, text: str
) -> argparse.ArgumentParser:
    sub = actions.add_parser(name, help=text, description=text)
    sub.add_argument("arguments", nargs="+", metavar="CONFIG | section.key=value", help="as of `megagpt train`")
    for option in _TRAIN_OPTIONS:
        sub.add_argument(option, dest="options", action="append_const", const=option, default=[], help="the same")
    return sub


def _config(arguments: list[str]) -> "Config":
    from megagpt.config_file import load_config

    names = [a for a in arguments if "=" not in a]
    if len(names) != 1:
        raise UserError(f"name one config, such as gpt3_xl.yaml (got {names})")
    return load_config(names[0], [a for a in arguments if "=" in a])


def _slurm(arguments: argparse.Namespace) -> int:
    from megagpt.cluster.scripts import find_script
    from megagpt.cluster.slurm import check_fits, sbatch_command

    config = _config(arguments.arguments)
    ranks = arguments.nodes * arguments.gpus_per_node
    fits = check_fits(config, ranks, arguments.gpu_memory)
    options = [f"--{n}={v}" for n in ("time", "account", "partition") if (v := getattr(arguments, n)) is not None]
    options += arguments.sbatch
    script = find_script("multinode.sh")
    passed_on = [*arguments.arguments, *arguments.options]
    command = sbatch_command(config, script, passed_on, arguments.nodes, arguments.gpus_per_node, options)
    accumulation = config.accumulation(ranks)
    print(f"# {ranks} ranks, {accumulation} micro-batch(es) of {config.train.micro_batch} a step and rank; {fits}")
    print(shlex.join(command), flush=True)
    if not arguments.submit:
        return 0
    if not shutil.which("sbatch"):
        raise UserError("no sbatch here: run the command above on a machine of the cluster")
    environment = {**os.environ, "PYTHON": os.environ.get("PYTHON", sys.executable)}
    return subprocess.run(command, env=environment, check=False).returncode


def _hosts(arguments: argparse.Namespace) -> int:
    from megagpt.cluster.hosts import carried, deepspeed_command, read_hostfile
    from megagpt.cluster.scripts import find_script
    from megagpt.training.run_folder import run_folder

    config = _config(arguments.arguments)
    hosts = read_hostfile(arguments.hostfile)
    config.accumulation(sum(hosts.values()))
    command = deepspeed_command(
        arguments.hostfile.resolve(), hosts, arguments.master, arguments.port, find_script("train.py"),
        [*arguments.arguments, *arguments.options, "--auto-resume"],
    )  # fmt: skip
    variables = "".join(f"{name}={value}\n" for name, value in carried(os.environ).items())
    # The file that takes the place of the user's own.
    for folder in (Path.home(), Path()):
        own = folder / os.environ.get("DS_ENV_FILE", ".deepspeed_env")
        if own.is_file():
            variables += own.read_text(encoding="utf-8").rstrip("\n") + "\n"
    if arguments.print:
        print(f"# on all hosts:\n{variables}{shlex.join(command)}")
        return 0
    if not shutil.which("pdsh"):
        raise UserError("no pdsh here, by which DeepSpeed's launcher reaches the hosts: install it")
    logs = run_folder(config) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    carry = logs / "deepspeed_env"
    carry.touch(mode=0o600)
    carry.write_text(variables)
    os.execvpe(command[0], command, {**os.environ, "DS_ENV_FILE": str(carry.resolve())})


def _check(arguments: argparse.Namespace) -> int:
    from megagpt.cluster.preflight import UnfitError, job_nodes, preflight
    from megagpt.cluster.verdict import Failure, decide, is_finished
    from megagpt.launchers import slurm_job
    from megagpt.training.run_folder import run_folder

    def say(text: str) -> None:
        print(f"== {text}", file=sys.stderr, flush=True)

    config, nodes = _config(arguments.arguments), job_nodes()
    ranks, port = _number("RANKS_PER_NODE"), _number("MASTER_PORT")
    run, job = run_folder(config), slurm_job(os.environ) or ""
    config.accumulation(len(nodes) * ranks)
    if is_finished(run, config):
        say(f"{run}: finished already, at {config.train.tokens:,} tokens")
        return 0
    allocated = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    on_gpu = config.train.device == "cuda" or (config.train.device == "auto" and allocated > 0)
    try:
        preflight(nodes, ranks if on_gpu else 0, run / "logs" / job, port, say)
    except UnfitError as error:
        if job.endswith(".0"):
            raise
        # Who submitted it has long gone, and what is wrong may pass.
        return decide(run, job, Failure(str(error), "pre-flight"), run / "logs" / job, say)
    print(run)
    return 0


def _number(variable: str) -> int:
    try:
        return int(os.environ[variable])
    except (KeyError, ValueError):
        found = os.environ.get(variable, "nothing")
        raise UserError(f"{variable} is {found!r}, not a number: launch/multinode.sh sets it") from None


def _node(arguments: argparse.Namespace) -> int:
    from megagpt.cluster.facts import report

    report(arguments.folder, arguments.port, arguments.gpu)
    return 0


def _verdict(arguments: argparse.Namespace) -> int:
    from megagpt.cluster.verdict import judge
    from megagpt.launchers import slurm_job
    from megagpt.training.run_folder import run_folder

    config, job = _config(arguments.arguments), slurm_job(os.environ)
    if job is None:
        raise UserError("not inside a Slurm job: launch/multinode.sh asks this when its ranks have ended")

    def say(text: str) -> None:
        print(f"== {text}", flush=True)

    return judge(run_folder(config), config, job, arguments.logs, say)
