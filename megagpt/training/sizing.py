"""Sizes a run to its devices before it begins: the check of its memory, and the micro-batch that
`train.micro_batch: auto` means, which on a GPU a trial step confirms."""

import gc
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from megagpt.config import Config
from megagpt.config_types import AUTO
from megagpt.console import say
from megagpt.data.loader import Batch
from megagpt.engines.engine import Engine, build_engine
from megagpt.errors import UserError
from megagpt.hardware import device_name
from megagpt.placement import check_start, micro_batches
from megagpt.planning.amounts import gigabytes
from megagpt.planning.fit import check_fit
from megagpt.planning.forecast import Forecast, forecast
from megagpt.planning.memory import peak_memory
from megagpt.planning.micro_batch import largest_micro_batch, micro_batch_choices, with_micro_batch
from megagpt.planning.state import state_bytes
from megagpt.planning.way_out import way_out
from megagpt.process_memory import free_memory, gpu_memory, is_out_of_memory, says_out_of_memory
from megagpt.world import World

# Micro-batches in a trial step: the second one meets the gradients of the first.
_TRIED = 2
# Share of a GPU that a trial leaves free, so that ranks with other programs' leavings run out in the same place.
_LEFT_FREE = 0.01
# Longest difference between two ranks' times for one trial, compiling included (s), and the time between two looks.
_PATIENCE_SECONDS, _LOOK_SECONDS = 300.0, 0.2


@dataclass(frozen=True)
class Sizing:
    """A run that its devices can hold, as far as the plan tells."""

    config: Config
    """The run's config with a number for the micro-batch."""
    choices: tuple[int, ...] = ()
    """Micro-batches to try, the config's own first, then smaller ones; empty: nothing is to be tried."""
    capacity: float | None = None
    """Bytes of the GPU that has least; None on a CPU."""


def size_run(config: Config, world: World, last: dict[str, Any] | None = None) -> Sizing:
    """Check the run against the memory of its GPUs, and decide the micro-batch if it is auto. Every rank calls it, and
    all get the same answer. On a CPU nothing is refused, because a host's memory is shared and may be swapped. `last`:
    facts of the run's last incarnation, with `ended`. Raises UserError, with a way out."""
    # Ranks need not tell each other their machines if no group of them must share one.
    check_start(config, world.hosts() if config.engine.tensor_ranks > 1 else [""] * world.size)
    own = gpu_memory(world.device)
    if own is None:
        _warn_of_host(config, world)
        if config.train.micro_batch == AUTO:
            config = with_micro_batch(config, largest_micro_batch(config, world.size, None))
            say(f"{_auto(config, world)}, the largest of at most 4,096 tokens that divides the batch")
        return Sizing(config)
    (capacity,) = world.min_of([own])
    fit = check_fit(config, world.size, capacity, device_name(world.device), _together(world))
    if config.train.micro_batch != AUTO:
        say(f"memory by the plan: {fit.sentence}")
        if fit.warning:
            say(f"warning: {fit.warning}")
        return Sizing(config, capacity=capacity)
    choices = micro_batch_choices(config, world.size, capacity)
    known = _known(config, world, last or {})
    if known and not says_out_of_memory(str((last or {}).get("ended", {}).get("reason"))):
        config = with_micro_batch(config, known)
        say(f"{_auto(config, world)}, as in this run's last incarnation")
        return Sizing(config, capacity=capacity)
    if known:
        say(f"the last incarnation ran out of memory with micro-batches of {known}: trying smaller ones")
        choices = [size for size in choices if size < known] or choices[-1:]
    config = with_micro_batch(config, choices[0])
    say(f"{_auto(config, world)}, by the plan: {fit.sentence}")
    if fit.warning:
        say(f"warning: {fit.warning}")
    return Sizing(config, tuple(choices), capacity)


def _together(world: World) -> int:
    """Ranks of each machine, or if these differ, a number that divides them. Every rank calls it."""
    return math.gcd(*Counter(world.hosts()).values())


def _auto(config: Config, world: World) -> str:
    return f"train.micro_batch auto: {micro_batches(config, world.size)}"


def _warn_of_host(config: Config, world: World) -> None:
    """Say if weights, gradients and moments alone exceed the memory that is free."""
    here = world.hosts().count(world.host)
    needed, free = here * state_bytes(config, world.size).total, float(free_memory())
    if needed > free:
        problem = f"weights, gradients and moments take {gigabytes(needed)} GB of this host's memory"
        say(f"warning: {problem}, and {gigabytes(free)} GB are free")


def _known(config: Config, world: World, last: dict[str, Any]) -> int | None:
    """The micro-batch of the last incarnation, if it ran the same setting on as many of the same devices."""
    size = last.get("micro_batch")
    same = last.get("world_size") == world.size and last.get("device") == device_name(world.device)
    if not same or not isinstance(size, int) or config.sequences_of_a_rank(world.size) % size:
        return None
    memory = peak_memory(with_micro_batch(config, size), world.size).total
    return size if (last.get("plan") or {}).get("memory_bytes") == memory else None


def plan_of(sizing: Sizing, config: Config, world: World) -> Forecast | None:
    """The plan beside which the run's numbers are shown; None on a CPU. Every rank calls it. `config`: with the
    micro-batch that was decided."""
    if sizing.capacity is None:
        return None
    per_node = max(Counter(world.hosts()).values())
    return forecast(config, device_name(world.device), sizing.capacity, world.size, per_node)


def build_sized(
    sizing: Sizing, world: World, build: Callable[[Config, World], Engine] | None = None
) -> tuple[Config, Engine]:
    """Build the engine with the first of the choices that a trial step confirms; its weights are undefined, as before
    `initialize`. Raises UserError if memory runs out with all of them."""
    build = build or (lambda config, world: build_engine(config, world, initialized=False))
    config = sizing.config
    if not sizing.choices:
        return config, build(config, world)
    for turn, size in enumerate(sizing.choices):
        config = with_micro_batch(config, size)
        compiled = ", which compiles the model" if turn == 0 else ""
        say(f"trial step with micro-batches of {size}{compiled}")
        engine = _tried(config, world, build, turn)
        if engine is not None:
            return config, engine
        say(f"a trial step with micro-batches of {size} runs out of memory")
    found = way_out(config, world.size, 0.9 * peak_memory(config, world.size).total, _together(world))
    problem = f"memory runs out with micro-batches of {config.micro_batch}, although the plan says that they fit"
    raise UserError(f"{config.run.name}: {problem}; {found or 'take GPUs with more memory'}")


def _tried(config: Config, world: World, build: Callable[[Config, World], Engine], turn: int) -> Engine | None:
    """An engine that has taken a step; None, on every rank, if memory ran out."""
    on_gpu = world.device.type == "cuda"
    if on_gpu:
        _limit(world)
    engine: Engine | None = None
    failed = False
    try:
        engine = build(config, world)
        engine.initialize()  # a library may refuse the gradients of undefined weights
        scale = replace(engine.loss_scale)
        engine.train_step(_batch(config, world), 0.0)
        engine.loss_scale = scale
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failed = True
    failed = _some_failed(config, world, turn, failed)
    if failed:
        engine = None
        gc.collect()
    if on_gpu:
        torch.cuda.set_per_process_memory_fraction(1.0, world.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(world.device)
    return engine


def _limit(world: World) -> None:
    """Let PyTorch take the same part of each GPU: then every rank runs out at the same allocation, or none does."""
    free, total = torch.cuda.mem_get_info(world.device)
    (share,) = world.min_of([(free + torch.cuda.memory_reserved(world.device)) / total])
    torch.cuda.set_per_process_memory_fraction(max(0.0, share - _LEFT_FREE), world.device)


def _batch(config: Config, world: World) -> Batch:
    """A step's share of random tokens."""
    count = min(_TRIED, config.accumulation(world.size))
    shape = (config.micro_batch, config.model.context)
    shares = config.shares(world.size)
    generator = torch.Generator().manual_seed(world.rank * shares // world.size)  # tensor ranks take the same tokens
    drawn = [torch.randint(config.model.vocab_size, shape, generator=generator) for _ in range(2 * count)]
    sequences = shares * count * config.micro_batch
    return Batch(list(zip(drawn[::2], drawn[1::2], strict=True)), sequences, sequences * config.model.context)


def _some_failed(config: Config, world: World, turn: int, failed: bool) -> bool:
    """Whether memory ran out on the ranks, all of which must agree. They tell each other through the store: a rank that
    ran out alone has left its peers waiting in a collective. It then raises UserError, which ends them all."""
    if world.size == 1:
        return failed
    assert world.store is not None, "a world of several ranks has been joined"
    key = f"megagpt/trial/{turn}"
    world.store.add(f"{key}/{failed}", 1)
    began = time.monotonic()
    while sum(counts := [world.store.add(f"{key}/{word}", 0) for word in (True, False)]) < world.size:
        if time.monotonic() - began > _PATIENCE_SECONDS:
            text = f"{counts[0]} of {world.size} ranks ran out of memory in the trial of train.micro_batch: auto"
            smaller = max(1, config.micro_batch // 2)
            raise UserError(f"{text}, with {config.micro_batch} sequences; set train.micro_batch={smaller}")
        time.sleep(_LOOK_SECONDS)
    return counts[0] > 0
