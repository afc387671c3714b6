"""The scripts of `launch/`, in a repository or in an installed package."""

from pathlib import Path

from megagpt.errors import UserError


def find_script(name: str) -> Path:
    """The path of a script of `launch/`. Raises UserError if it is neither beside the package nor in it."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package.parent / "launch", package / "launch"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"launch/{name} is neither beside the package nor in it: install megagpt again")
