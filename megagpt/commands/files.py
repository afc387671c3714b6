"""Files that commands write, checked before any work is done for them."""

import importlib.util
from pathlib import Path

from megagpt.errors import UserError, first_line
from megagpt.extras import install_extra


def check_drawing(command: str) -> None:
    """Raises UserError if the libraries that draw are not installed."""
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{command} needs {' and '.join(missing)}: install it: {install_extra('report')}")


def picture_kind(target: Path, option: str) -> str:
    """ "png" or "svg", by the file's name. Raises UserError for another one."""
    kind = target.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise UserError(f"{option} {target}: the picture is a .png or an .svg file; give it such a name")
    return kind


def target_file(name: str, option: str) -> Path:
    """The file to write. Raises UserError before any work if it cannot be one."""
    from megagpt.files import named_path

    target = named_path(name)
    if target.is_dir():
        raise UserError(f"{target}: cannot be written: it is a folder; name a file with {option}")
    if not target.parent.is_dir():
        raise UserError(f"{target}: cannot be written: there is no folder {target.parent}; make it, or change {option}")
    return target


def write_file(target: Path, data: bytes, option: str) -> None:
    """Write the file. Raises UserError if that is not possible."""
    from megagpt.files import write_atomic

    try:
        write_atomic(target, data)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({first_line(error)}); name another file with {option}") from None
