"""Exams of lm-evaluation-harness: its tasks, held by it with our model, as results like those of our own exams."""

import contextlib
import difflib
import importlib
import importlib.util
import logging
import os
import random
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from megagpt.console import say
from megagpt.errors import ExpectedError, UserError, first_line
from megagpt.evaluation.known import known_scores
from megagpt.evaluation.results import Result, Value
from megagpt.files import named_path
from megagpt.models.presets import ModelConfig
from megagpt.world import World

# Draws of a bootstrap, which gives standard errors of what is no mean: good to about 2%. Each goes over all rows.
_BOOTSTRAPS = 1000
# Our scores of the same answers, under which references are kept.
_OURS = {"acc": "sum", "acc_norm": "mean_char", "perplexity": "perplexity"}
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
# The same where it has been read already, at the import.
_SWITCHES = [
    ("huggingface_hub.constants", "HF_HUB_OFFLINE"), ("datasets.config", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_DATASETS_OFFLINE"), ("evaluate.config", "HF_EVALUATE_OFFLINE"),
]  # fmt: skip


class Asked(NamedTuple):
    """How the harness's exams are held."""

    names: list[str]
    """Tasks, groups, tags, patterns with *, or yaml files."""
    folders: list[str] = []
    """Folders of yaml files that declare further tasks."""
    shots: int | None = None
    """None: as many as each task says."""
    limit: int = 0
    """The first rows of each task; 0: all."""
    seed: int | None = None
    """Decides which examples are drawn; None: the harness's own seed."""
    download: bool = False


class Held(NamedTuple):
    """What came out."""

    results: list[Result]
    whole: dict[str, Any]
    """All that the harness says, without the rows, as values that JSON has."""
    rows: list[dict[str, Any]]


def check_installed() -> None:
    """Raises UserError, with what to do, if lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--harness: lm-evaluation-harness is not installed; install it: pip install 'megagpt[harness]'")


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
    """Tasks and groups of the harness, with their rows. Every rank calls it; the main rank fetches rows first, so that
    the others find them in the cache. Raises UserError for a name that does not exist, with the nearest one, and for
    rows that cannot be had."""
    with _network(asked.download):
        manager = _manager(asked.folders, defaults=False)
        if not all(name in manager.all_subtasks or _is_file(name) for name in asked.names):
            manager = _manager(asked.folders)
        names = [found for name in asked.names for found in _matching(name, manager)]
        found: list[Any] = []

        def load() -> None:
            found.extend(_load(manager, names, asked.download))

        world.from_main(load)
        if not world.is_main:
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
            way = "are not in the Hugging Face cache of this machine, and nothing is fetched unless asked; add --download"
            return UserError(f"task {name}: its rows {way} ({first_line(error)})")
        way = "check the network, or run this once where there is one and copy the cache (HF_HOME)"
        return UserError(f"task {name}: its rows cannot be fetched: {first_line(error)}; {way}")
    return UserError(f"task {name} cannot be loaded: {first_line(error)}; fix its yaml file or its rows")


def hold(
    tasks: list[Any], asked: Asked, model: nn.Module, config: ModelConfig, world: World, sharded: bool, batch_tokens: int
) -> Held | None:
    """Hold the exams. Every rank calls it; the main rank gets what came out, the others None. The state of the random
    generators, which the harness seeds, is as before. Raises UserError for what the harness refuses."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from megagpt.evaluation.harness import HarnessModel

    asks = HarnessModel(model, config, world, sharded, batch_tokens)
    options: dict[str, Any] = {} if asked.seed is None else {"fewshot_random_seed": asked.seed}
    with _network(asked.download), _same_random_state(world), _quiet(world):
        try:
            whole = simple_evaluate(
                model=asks, tasks=tasks, task_manager=TaskManager(include_defaults=False), num_fewshot=asked.shots,
                limit=asked.limit or None, bootstrap_iters=_BOOTSTRAPS if world.is_main else 0, **options,
            )  # fmt: skip
        except ExpectedError:
            raise
        except Exception as error:
            if _is_ours(error):
                raise
            raise UserError(f"lm-evaluation-harness: {_refusal(error)}") from None
    if not world.is_main:
        return None
    samples = whole.pop("samples")
    results = [
        _result(name, whole, samples.get(name, []), len({row for task, row in asks.cut if task == name}))
        for name in whole["results"]
    ]
    rows = [{"task": name, **plain(sample)} for name, found in samples.items() for sample in found]
    return Held(results, plain(whole), rows)


def _result(name: str, whole: dict[str, Any], samples: list[dict[str, Any]], cut_rows: int) -> Result:
    """A task's or a group's values, in the form of our own results."""
    metrics, version = whole["results"][name], whole["lm_eval_version"]
    shots = int(whole["n-shot"].get(name) or 0)
    values = []
    for key, value in metrics.items():
        metric, _, kind = key.partition(",")
        number = plain(value)
        if not kind or metric.endswith("_stderr") or isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        error = plain(metrics.get(f"{metric}_stderr,{kind}"))
        label = metric if kind == "none" else f"{metric},{kind}"
        references = known_scores(f"{name}:harness", _OURS.get(metric, metric), shots)
        values.append(
            Value(label, f"{label} of lm-evaluation-harness", float(number), error if isinstance(error, float) else None,
                  references)
        )  # fmt: skip
    counts = whole["n-samples"].get(name, {})
    items = int(counts.get("effective", metrics.get("sample_len", 0)))
    text = f"lm-evaluation-harness {version}, version {whole['versions'].get(name)} of the task"
    if shots and samples and _shares_rows(whole["configs"][name]):
        text += "; its shots are drawn from the rows that are asked, so that a row may show its own answer"
    details = {"lm_eval": version, "first_prompt": str(samples[0]["arguments"][0][0])} if samples else {"lm_eval": version}
    return Result(name, values, items, int(counts.get("original", items)), shots, text, cut_rows, details=details)


def _shares_rows(config: dict[str, Any]) -> bool:
    """Whether shots come from the split that is asked, without the row itself being left out, as the harness does it
    in a test split only."""
    split = config.get("fewshot_split") or config.get("training_split") or config.get("validation_split")
    return not config.get("test_split") and split == config.get("validation_split")


def plain(value: Any) -> Any:
    """The value in types that JSON has: NumPy's numbers as numbers, other objects as their text."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(each) for each in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _is_ours(error: Exception) -> bool:
    """Whether the error came out of this package's code, which the harness called."""
    frames = traceback.walk_tb(error.__traceback__)
    next(frames)  # the caller's own
    return any(str(frame.f_globals.get("__name__")).startswith("megagpt.") for frame, _ in frames)


def _refusal(error: Exception) -> str:
    text = first_line(error)
    if "unsafe" in text:
        way = "export the model and use the harness's own command in a sandbox"
        return f"{text.partition(' Set ')[0]} It runs code that the model has written; {way}"
    if "population" in text or "fewshot samples" in text or "no documents available" in text:
        return f"{text}: the task has fewer rows to draw examples from than --shots asks for; lower it"
    return f"{text}; fix the task's yaml file or its rows"


@contextlib.contextmanager
def _network(download: bool) -> Iterator[None]:
    """Inside, the Hugging Face libraries use only what is in their cache, unless `download`."""
    before = {name: os.environ.get(name) for name in _OFFLINE}
    set_here: list[tuple[Any, str, Any]] = []
    if not download:
        os.environ.update(dict.fromkeys(_OFFLINE, "1"))  # read by what is imported from here on
        for name, key in _SWITCHES:
            module = importlib.import_module(name)
            set_here.append((module, key, getattr(module, key)))
            setattr(module, key, True)
    try:
        yield
    finally:
        for module, key, value in set_here:
            setattr(module, key, value)
        for name, old in before.items():
            os.environ.pop(name, None)
            if old is not None:
                os.environ[name] = old


@contextlib.contextmanager
def _same_random_state(world: World) -> Iterator[None]:
    """The harness seeds all generators; afterwards they go on as if it had not."""
    devices = [world.device] if world.device.type == "cuda" else []
    pythons, numpys = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(pythons)
        np.random.set_state(numpys)


@contextlib.contextmanager
def _quiet(world: World) -> Iterator[None]:
    """Inside, the main rank prints to stderr, without the harness's remarks below an error; the others nothing."""
    from lm_eval.utils import setup_logging

    setup_logging(logging.ERROR)
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"  # the bootstrap would fork this process, with its threads and peers
    try:
        with contextlib.ExitStack() as stack:
            out: Any = sys.stderr
            if not world.is_main:
                out = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123
                stack.enter_context(contextlib.redirect_stderr(out))
            stack.enter_context(contextlib.redirect_stdout(out))
            yield
    finally:
        os.environ.pop("DISABLE_MULTIPROC")
        if before is not None:
            os.environ["DISABLE_MULTIPROC"] = before
