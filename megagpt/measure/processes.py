"""Starts the ranks of compared runs on this machine."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from megagpt.errors import UserError
from megagpt.measure.cases import Case


def run_cases(kind: str, cases: Sequence[Case], progress: Callable[[], object] = lambda: None) -> list[Any]:
    """The results of the cases, which share a number of ranks, in order. Raises UserError where a rank fails."""
    (ranks,) = {case.ranks for case in cases}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    text = json.dumps([dataclasses.asdict(case) for case in cases])
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        command = [sys.executable, "-m", "megagpt.measure.worker", kind]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, env={**environment, **place}, text=True, **pipes))  # type: ignore[call-overload]
    errors: list[str] = [""] * ranks

    def drain(rank: int) -> None:
        errors[rank] = processes[rank].stderr.read()

    readers = [threading.Thread(target=drain, args=(rank,), daemon=True) for rank in range(ranks)]
    for reader, process in zip(readers, processes, strict=True):
        reader.start()
        process.stdin.write(text)
        process.stdin.close()
    results = []
    try:
        for line in processes[0].stdout:
            if line.startswith(("[", "{")):
                results.append(json.loads(line))
                progress()
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for reader in readers:
        reader.join()
    if any(codes) or len(results) != len(cases):
        said = [text for text in errors if text.strip()]
        reason = [line for text in said for line in text.splitlines() if line.startswith("megagpt: error:")]
        last = reason[0] if reason else (said[0].strip().splitlines()[-1] if said else f"exit codes {codes}")
        raise UserError(f"{kind} {cases[min(len(results), len(cases) - 1)]}: {last}")
    return results
