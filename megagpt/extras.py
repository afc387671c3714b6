"""Libraries that only some users need: the extras of pyproject.toml, and the commands that install them."""

import contextlib
import importlib.metadata
import shlex
import sys
from pathlib import Path

# The folder of a checkout; of an installed copy, the environment's packages.
_ABOVE = Path(__file__).resolve().parent.parent


def install_extra(extra: str) -> str:
    """A command line that installs an extra into the environment of this process: from the checkout if megagpt runs
    from one, else the extra's libraries by name. The index of packages has no megagpt of ours."""
    if (_ABOVE / "pyproject.toml").is_file():
        return pip_install("-e", f"{_ABOVE}[{extra}]")
    required: list[str] = []
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        required = importlib.metadata.requires("megagpt") or []
    parts = (requirement.partition(";") for requirement in required)
    names = [name.strip() for name, _, mark in parts if mark.split() == ["extra", "==", f'"{extra}"']]
    return pip_install(*names) if names else f"pip install -e '.[{extra}]' in the folder of megagpt's sources"


def pip_install(*what: str) -> str:
    """A command line that installs packages into the environment of this process."""
    return shlex.join([sys.executable, "-m", "pip", "install", *what])
