"""Named ranges that a trace of the training step has, so that its operators can be told apart by where they come from.
They are put around an engine from outside, and only while it is profiled: compiled code does not change."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch.profiler import record_function

from megagpt.data.loader import WAITING_FOR_DATA
from megagpt.engines.engine import Engine

DATA = WAITING_FOR_DATA
MICRO_BATCH = "megagpt: micro-batch"
FORWARD = "megagpt: forward"
BLOCK = "megagpt: block"
UPDATE = "megagpt: update"


@contextlib.contextmanager
def marked(engine: Engine) -> Iterator[None]:
    """While open, a trace shows the engine's micro-batches, forward passes, blocks and updates."""
    model: Any = engine.model
    places = [(engine, "_accumulate", MICRO_BATCH), (engine, "_update", UPDATE), (model, "forward", FORWARD)]
    with contextlib.ExitStack() as stack:
        for owner, method, name in [*places, *((block, "forward", BLOCK) for block in model.blocks)]:
            stack.callback(_replace(owner, method, _ranged(getattr(owner, method), name)))
        yield


def _replace(owner: Any, method: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Replace a method on the instance; returns the function that puts back what was there."""
    own = vars(owner).get(method)
    setattr(owner, method, function)
    return lambda: delattr(owner, method) if own is None else setattr(owner, method, own)


def _ranged(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def ranged(*arguments: Any, **options: Any) -> Any:
        with record_function(name):
            return function(*arguments, **options)

    return ranged
