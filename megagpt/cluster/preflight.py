"""Checks a job's nodes before its ranks start: head node's name and port, folder, clocks, versions, GPUs, network."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megagpt.console import say
from megagpt.errors import TransientError, UserError, first_line
from megagpt.launchers import slurm_nodes

# Time (s) until a node's first answer: Python starts, and imports torch from a file system that all nodes load at once.
_ANSWER_SECONDS = 300.0
_COLLECTIVE_SECONDS = 120.0
# Largest tolerated clock skew (s): a smaller difference may be the delay of the message.
_CLOCK_SECONDS = 5.0
# Memory (MiB) that drivers and monitors may use on an idle GPU.
_IDLE_MIB = 1024
_SHARE = "run.folder must be shared by all nodes"


class UnfitError(TransientError):
    """Some nodes cannot take part."""


def preflight(nodes: Sequence[str], gpus: int, folder: Path, port: int, answer_seconds: float = 0) -> None:
    """Ask each node of the job for its report, through srun. `gpus`: number that each must have, 0 on CPUs. Raises
    UnfitError with every unfit node and the reason, and UserError if there is no srun."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preflight").write_text("head")
    command = [
        "srun", "--label", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1",
        "--cpu-bind=none", "--wait=0", "--kill-on-bad-exit=0", sys.executable, "-m", "megagpt", "launch", "node",
        str(folder), "--port", str(port), *(["--gpu"] if gpus else []),
    ]  # fmt: skip
    facts, collectives, said = _ask(command, len(nodes), answer_seconds or _ANSWER_SECONDS)
    problems = find_problems(nodes, gpus, port, facts, collectives)
    for node in nodes:
        mark = folder / f"preflight.{node}"
        if node in facts and not facts[node]["folder"] and not mark.exists():
            problems[node] = f"{mark} was written there and is missing here: {_SHARE}"
        mark.unlink(missing_ok=True)
    (folder / "preflight").unlink(missing_ok=True)
    for index, node in enumerate(nodes):
        if node not in facts and index in said:
            problems[node] += f"; the last line of its stderr: {said[index]}"
    if problems:
        lines = "".join(f"\n  {node}: {problem}" for node, problem in sorted(problems.items()))
        hint = f"\nsrun said: {said[-1]}" if -1 in said and len(facts) < len(nodes) else ""
        ways = "fix them, or leave them out with sbatch --exclude"
        raise UnfitError(f"{len(problems)} of {len(nodes)} node(s) are not fit for this run:{lines}{hint}\n{ways}")
    speeds = [c["bytes"] / c["seconds"] / 1e9 for c in collectives.values()]
    one = "one GPU of each (the others are not tried)" if gpus > 1 else "all of them"
    speed = f"; an all-reduce over {one} moves {min(speeds):.2f} GB/s" if speeds else ""
    say(f"{len(nodes)} node(s) are fit: {', '.join(nodes[:8])}{', ...' if len(nodes) > 8 else ''}{speed}")


def _ask(command: list[str], count: int, seconds: float) -> tuple[dict[str, Any], dict[str, Any], dict[int, str]]:
    """Facts and collectives of the nodes that answered in time, by node; and the last line of each task's stderr, by
    its index; srun's own line has the index -1."""
    try:
        asking = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    except FileNotFoundError:
        raise UserError("no srun here: run this inside a Slurm job") from None

    lines: queue.Queue[tuple[float, str]] = queue.Queue()
    complaints: list[str] = []

    def read() -> None:
        for line in asking.stdout or ():
            lines.put((time.time(), line))
        lines.put((0.0, ""))  # the end

    threading.Thread(target=read, daemon=True).start()
    complainer = threading.Thread(target=lambda: complaints.extend(asking.stderr or ()), daemon=True)
    complainer.start()
    facts: dict[str, Any] = {}
    collectives: dict[str, Any] = {}
    deadline = time.monotonic() + seconds
    with contextlib.suppress(queue.Empty):
        while len(collectives) < count:
            arrived, text = lines.get(timeout=max(0.0, deadline - time.monotonic()))
            if not text:
                break
            with contextlib.suppress(ValueError, TypeError, KeyError):  # printed by another program
                line = json.loads(text.partition(": ")[2])
                if "facts" in line:
                    facts[line["node"]] = {**line["facts"], "arrived": arrived}
                    if len(facts) == count:
                        deadline = time.monotonic() + _COLLECTIVE_SECONDS
                else:
                    collectives[line["node"]] = line["collective"]
    asking.terminate()
    try:
        asking.wait(10)
    except subprocess.TimeoutExpired:
        asking.kill()
    complainer.join(5)
    said: dict[int, str] = {}
    for text in complaints:
        label, _, words = text.partition(": ")
        if label.strip().isdigit() and words.strip():
            said[int(label)] = words.strip()
        elif "srun: error" in text:
            said.setdefault(-1, text.strip())
    return facts, collectives, said


def find_problems(
    nodes: Sequence[str], gpus: int, port: int, facts: dict[str, Any], collectives: dict[str, Any]
) -> dict[str, str]:
    """Node -> the first problem found with it."""
    problems: dict[str, str] = {}
    versions = [json.dumps(facts[node]["versions"]) for node in nodes if node in facts]
    usual = json.loads(max(versions, key=versions.count)) if versions else {}
    for node in nodes:
        found = facts.get(node)
        if found is None:
            problems[node] = "no answer"
            continue
        late = found["time"] - found["arrived"]
        differing = [f"{k} {v} and other nodes have {usual[k]}" for k, v in found["versions"].items() if v != usual[k]]
        seen = found["gpus"] or {"count": 0, "used": []}
        busy = [f"{i} ({used} MiB in use)" for i, used in enumerate(seen["used"]) if used > _IDLE_MIB]
        order = "ahead of" if late > 0 else "behind"
        checks = [
            (found["head"], f"does not know the head node's name {nodes[0]} ({found['head']}): fix DNS or /etc/hosts"),
            (found["port"], f"port {port} is taken there ({found['port']}): set MASTER_PORT"),
            (found["folder"], f"cannot use the run's folder ({found['folder']}): {_SHARE}"),
            (abs(late) > _CLOCK_SECONDS, f"its clock is {abs(late):.0f} s {order} the head node's"),
            (differing, "; ".join(differing)),
            (seen.get("error"), f"a GPU does not answer: {seen.get('error')}"),
            (seen["count"] < gpus, f"PyTorch sees {seen['count']} GPU(s) there, the job has {gpus}"),
            (busy, f"in use by other processes: GPU {', '.join(busy)}"),
        ]
        if texts := [text for wrong, text in checks if wrong]:
            problems[node] = texts[0]
    if not problems and len(nodes) > 1:
        failed = {node: collectives.get(node, {"error": "did not end"}) for node in nodes}
        problems = {n: f"the all-reduce failed: {c['error']}" for n, c in failed.items() if "error" in c}
    return problems


def job_nodes() -> list[str]:
    """The nodes of this Slurm job, in Slurm's order. Raises UserError outside of a job."""
    if not (node_list := slurm_nodes(os.environ)):
        raise UserError("not inside a Slurm job: submit launch/multinode.sh with sbatch")
    command = ["scontrol", "show", "hostnames", node_list]
    try:
        return subprocess.check_output(command, stderr=subprocess.PIPE, text=True).split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"scontrol cannot name the nodes of this job ({node_list}): {first_line(error)}") from None
