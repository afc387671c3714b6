"""The surroundings of lm-evaluation-harness while it is called: network, random generators, output."""

import contextlib
import importlib
import logging
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from megagpt.world import World

_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
# The same, of modules that have read it already, at their import.
_SWITCHES = [
    ("huggingface_hub.constants", "HF_HUB_OFFLINE"), ("datasets.config", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_DATASETS_OFFLINE"), ("evaluate.config", "HF_EVALUATE_OFFLINE"),
]  # fmt: skip


@contextlib.contextmanager
def surroundings(world: World, download: bool) -> Iterator[None]:
    """For each call of the harness. Nothing is fetched unless `download`; afterwards the random generators are as
    before; ranks other than the main one print nothing."""
    with _network(download), _same_random_state(world), _quiet(world):
        yield


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
    """Inside, the main rank prints no remarks of the harness, but its errors; the others print nothing."""
    import datasets
    import lm_eval.utils

    bars = datasets.are_progress_bars_disabled()
    if not (world.is_main and sys.stderr.isatty()):
        datasets.disable_progress_bars()
    lm_eval.utils.setup_logging(logging.ERROR)
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"  # the bootstrap would fork this process, with its threads and peers
    try:
        with contextlib.ExitStack() as stack:
            if not world.is_main:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield
    finally:
        if not bars:
            datasets.enable_progress_bars()
        os.environ.pop("DISABLE_MULTIPROC")
        if before is not None:
            os.environ["DISABLE_MULTIPROC"] = before
