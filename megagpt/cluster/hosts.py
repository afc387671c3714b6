"""Ranks on hosts that ssh reaches: DeepSpeed's launcher, its hostfile, and the environment for the other hosts."""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megagpt.errors import UserError

_LINE = re.compile(r"(?P<host>\S+)\s+slots=(?P<slots>\d+)\s*(#.*)?")
# Variables, by their first letters, that decide how ranks find each other and what they compute with. The launcher
# passes on only NCCL_*, PYTHON* and the content of a .deepspeed_env file.
_PASSED_ON = (
    "CUDA_DEVICE_MAX_CONNECTIONS", "DS_ACCELERATOR", "FI_", "GLOO_", "HF_DATASETS_", "HF_HOME", "HF_HUB_CACHE",
    "LD_LIBRARY_PATH", "LD_PRELOAD", "MKL_", "NCCL_", "OMP_", "TORCH", "TRITON_", "UCX_", "XDG_CACHE_HOME",
)  # fmt: skip


def read_hostfile(path: Path) -> dict[str, int]:
    """Host -> number of ranks on it. Raises UserError naming the malformed line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if not found or int(found["slots"]) < 1:
            raise UserError(f"{path} line {number}: {line!r} is not of the form `HOST slots=RANKS`")
        if found["host"] in hosts:
            raise UserError(f"{path} line {number}: {found['host']} is named twice")
        hosts[found["host"]] = int(found["slots"])
    if not hosts:
        raise UserError(f"{path}: names no host")
    return hosts


def passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that ranks on other hosts need too. No secrets: they are written to a file."""
    wanted = [n for n in sorted(environment) if n.startswith(_PASSED_ON) and not n.startswith("TORCHELASTIC_")]
    return {name: environment[name] for name in wanted if "\n" not in environment[name]}


def deepspeed_command(
    hostfile: Path, hosts: Mapping[str, int], master: str, port: int, script: Path, arguments: Sequence[str]
) -> list[str]:
    """DeepSpeed's launcher over pdsh and ssh. Without `--force_multi`, the ranks of a single host would start here."""
    beside = Path(sys.executable).parent / "deepspeed"
    return [
        str(beside) if beside.exists() else "deepspeed", f"--hostfile={hostfile}", "--force_multi",
        f"--master_addr={master or next(iter(hosts))}", f"--master_port={port}", str(script), *arguments,
    ]  # fmt: skip
