"""Tasks of lm-evaluation-harness: their names, and their rows, from the Hugging Face libraries' cache or fetched."""

import difflib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megagpt.console import say
from megagpt.errors import UserError, first_line
from megagpt.evaluation.harness_surroundings import surroundings
from megagpt.extras import install_extra
from megagpt.files import named_path
from megagpt.world import World


class Asked(NamedTuple):
    """How the harness's exams are held."""

    names: list[str]
    """Tasks, groups, tags, patterns with *, or yaml files."""
    folders: Sequence[str] = ()
    """Folders of yaml files that declare further tasks."""
    shots: int | None = None
    """None: as many as each task says."""
    limit: int = 0
    """The first rows of each task; 0: all."""
    seed: int | None = None
    """Decides which examples are drawn; None: the harness's own seed."""
    download: bool = False


def check_installed() -> None:
    """Raises UserError, with what to do, if lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"--harness: lm-evaluation-harness is not installed; install it: {install_extra('harness')}")


def all_names(folders: Sequence[str]) -> list[str]:
    """Names of all tasks, groups and tags that the harness knows."""
    return list(_manager(folders).all_tasks)


def _manager(folders: Sequence[str], defaults: bool = True) -> Any:
    from lm_eval.tasks import TaskManager

    paths = [str(named_path(folder)) for folder in folders]
    for folder in paths:
        if not Path(folder).is_dir():
            raise UserError(f"--include-path {folder}: no such folder (of tasks' yaml files)")
    if defaults:
        say("reading the declarations of lm-evaluation-harness's tasks, 16,000 files: up to half a minute")
    return TaskManager(include_path=paths or None, include_defaults=defaults)


def load_tasks(asked: Asked, world: World) -> list[Any]:
    """Tasks and groups of the harness, with their rows. Every rank calls it; one rank of each host fetches rows first,
    so that the others find them in the cache. Raises UserError for a name that does not exist, with the nearest one,
    and for rows that cannot be had."""
    with surroundings(world, asked.download):
        manager = _manager(asked.folders, defaults=False)
        if not all(name in manager.all_subtasks or _is_file(name) for name in asked.names):
            manager = _manager(asked.folders)
        names = [found for name in asked.names for found in _matching(name, manager)]
        found: list[Any] = []

        def load() -> None:
            found.extend(_load(manager, names, asked.download))

        world.once_per_host(load, "loads the harness's tasks")  # fetching may take longer than a collective
        if not found:
            load()
        return found


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and named_path(name).is_file()


def _matching(name: str, manager: Any) -> list[str]:
    if _is_file(name):
        return [str(named_path(name))]
    if name in manager.all_tasks:
        return [name]
    if set(name) & set("*?[") and (found := manager.match_tasks([name])):
        return list(found)
    near = difflib.get_close_matches(name, manager.all_tasks, n=2, cutoff=0.6)
    way = f"did you mean {' or '.join(near)}?" if near else "see all with --harness --tasks list"
    raise UserError(f"lm-evaluation-harness has no task {name!r}: {way}")


def _load(manager: Any, names: Sequence[str], download: bool) -> list[Any]:
    found: dict[str, Any] = {}
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:
            raise _not_loaded(name, error, download) from None
        groups, tasks = loaded.get("groups", {}), loaded["tasks"]
        inside = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
        inside |= {each.name for group in groups.values() for each in group.get_all_groups()}
        found |= {key: each for key, each in {**groups, **tasks}.items() if key not in inside}
    return list(found.values())


def _not_loaded(name: str, error: Exception, download: bool) -> UserError:
    """Why a task cannot be held. The harness, `datasets` and a task's own code raise all kinds of errors."""
    if isinstance(error, ImportError):
        return UserError(f"task {name} needs another package: {first_line(error)}; install it")
    remote = ("ConnectionError", "OfflineModeIsEnabled", "DatasetNotFoundError", "LocalEntryNotFoundError")
    if type(error).__name__ in remote or "offline" in str(error).lower():
        if not download:
            way = "are not in the Hugging Face cache, and nothing is fetched without --download; add it"
            return UserError(f"task {name}: its rows {way} ({first_line(error)})")
        way = "check the network, or run this once where there is one and copy the cache (HF_HOME)"
        return UserError(f"task {name}: its rows cannot be fetched: {first_line(error)}; {way}")
    return UserError(f"task {name} cannot be loaded: {first_line(error)}; fix its yaml file or its rows")
