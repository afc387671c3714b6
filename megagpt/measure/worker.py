"""The work of one rank in a comparison: curves, checkpoints, memory."""

import gc
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megagpt.checkpoints.compatibility import Allowed
from megagpt.checkpoints.loading import choose, load
from megagpt.checkpoints.saving import Saver, meta_of
from megagpt.config import Config
from megagpt.config_occasions import CheckpointConfig
from megagpt.engines.engine import Engine, build_engine
from megagpt.engines.flat_shard import FlatShard
from megagpt.measure.cases import LR, Case, Curve, rows, share, share_of
from megagpt.measure.plain import plain_optimizer, plain_step
from megagpt.models.gpt import GPT
from megagpt.models.initialization import initialize
from megagpt.models.presets import ModelConfig
from megagpt.position import position
from megagpt.world import World, join


def plain(case: Case, steps: int | None = None) -> Curve:
    """Loss and gradient norm of each step in one plain loop: the whole batch at once, all logits, PyTorch's
    cross-entropy, clipping and AdamW. `steps`: the case's if None."""
    config = case.config()
    model = GPT(config.model)
    initialize(model, config.model, config.run.seed)
    optimizer = plain_optimizer(model, LR, (0.9, 0.95), 1e-8, config.optimizer.weight_decay)
    clip_norm = config.optimizer.clip_norm
    curve = [
        plain_step(model, optimizer, b[:, :-1], b[:, 1:], clip_norm) for b in map(rows, range(steps or case.steps))
    ]
    return [(loss.item(), norm.item()) for loss, norm in curve]


def curve(case: Case, world: World) -> Curve:
    """The same of an engine."""
    return _train(build_engine(case.config(), world), case, range(case.steps))


def _train(engine: Engine, case: Case, steps: Iterable[int]) -> Curve:
    results = [engine.train_step(share(step, engine.world.rank, case), LR) for step in steps]
    return [(r.loss, r.gradient_norm) for r in results]


def saved(case: Case, world: World) -> Curve:
    """An engine's curve over `case.saved_at` steps, a save in the background, and the case's steps after it."""
    engine = build_engine(case.config(), world)
    (run,) = case.runs
    saver = Saver(Path(run), CheckpointConfig(), world)
    before = _train(engine, case, range(case.saved_at))
    save(saver, engine, case.saved_at)
    after = _train(engine, case, range(case.saved_at, case.saved_at + case.steps))
    saver.finish()
    return before + after


def resumed(case: Case, world: World) -> list[Curve]:
    """Of each run the case's steps that follow its checkpoint, under this engine."""
    engine = build_engine(case.config(), world)
    curves = []
    for run in case.runs:
        resume(Path(run), engine)
        curves.append(_train(engine, case, range(case.saved_at, case.saved_at + case.steps)))
    return curves


def save(saver: Saver, engine: Engine, step: int) -> None:
    """Save the engine's state after a number of steps; returns once the saver does."""
    at = position(engine.config, step * engine.config.batch_sequences, step)
    meta = meta_of(engine, at, [], milestone=False, skipped_updates=0)
    saver.save(engine.state(), engine.replica, meta)


def resume(run: Path, engine: Engine) -> None:
    """Load the checkpoint of a run, which has one."""
    found = choose(run, engine.config, [], Allowed(), engine.world)
    assert found is not None
    load(found, engine)


# --- memory ----------------------------------------------------------------------------------------------------------

_CONTEXT = 32
_SEQUENCES = 8
# Pause (s) before memory is counted: gloo's threads free what they sent a moment after the collective has ended.
_SETTLE_SECONDS = 0.3
_MEMORY_MODEL: dict[str, Any] = {"layers": 4, "width": 128, "heads": 4, "context": _CONTEXT, "vocab_size": 1000}


def memory_config(case: Case) -> Config:
    """A model large enough that its matrices outweigh everything else."""
    config = case.config()
    micro_batch = _SEQUENCES // case.shares // case.accumulation
    train = replace(config.train, tokens=160 * _CONTEXT, batch_tokens=_SEQUENCES * _CONTEXT, micro_batch=micro_batch)
    return replace(config, model=ModelConfig(**_MEMORY_MODEL), train=train)


def memory(case: Case, world: World) -> dict[str, Any]:
    """Bytes by kind that this rank's tensors hold at the fullest point of the second step outside its passes; for a
    timed case also `seconds`, the median time of a step. Counts the storages of all live tensors of the process, not
    what the engine says it holds."""
    before = _live_storages()
    gc.freeze()  # what lives now is never looked at again: it takes half a second
    config = memory_config(case)
    engine = build_engine(config, world)
    fullest: dict[str, Any] = {}

    def look() -> None:
        nonlocal fullest
        time.sleep(_SETTLE_SECONDS)
        held = {address: size for address, size in _live_storages().items() if address not in before}
        if sum(held.values()) > sum(fullest.values()):
            fullest = _by_kind(engine, held)

    generator = torch.Generator().manual_seed(0)
    data = torch.randint(config.model.vocab_size, (_SEQUENCES, _CONTEXT + 1), generator=generator)
    batch = share_of(data, world.rank, case)
    engine.train_step(batch, LR)  # creates Adam's moments
    engine.on_micro_batch = look
    engine.train_step(batch, LR)
    engine.on_micro_batch = lambda: None
    if not case.timed:
        return fullest
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        engine.train_step(batch, LR)
        seconds.append(time.perf_counter() - start)
    return {**fullest, "seconds": statistics.median(seconds)}


def _live_storages() -> dict[int, int]:
    gc.collect()
    found = [o for o in gc.get_objects() if isinstance(o, Tensor)]
    # Gradients belong to C++ objects that the collector does not see.
    return _storages(found + [t.grad for t in found if t.is_leaf and t.grad is not None])


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by address of each storage behind the tensors."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        tensor = tensor.flat if isinstance(tensor, FlatShard) else tensor
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        if local.device.type != "meta" and type(local) in (Tensor, torch.nn.Parameter):
            storage = local.untyped_storage()
            if storage.nbytes():
                sizes[storage.data_ptr()] = storage.nbytes()
    return sizes


def _by_kind(engine: Engine, held: dict[int, int]) -> dict[str, int]:
    """Weights for the forward pass; optimizer state (under ZeRO with its fp32 weights); the rest is gradients."""
    parameters = list(engine.model.parameters())
    weights = held.keys() & _storages(parameters + [getattr(p, "ds_tensor", p) for p in parameters])
    optimizer = (held.keys() & _storages(engine.state().values())) - weights
    kinds = {"weights": weights, "gradients": held.keys() - weights - optimizer, "optimizer": optimizer}
    return {kind: sum(held[address] for address in addresses) for kind, addresses in kinds.items()}


def run(kind: str, cases: Sequence[Case]) -> Iterator[Any]:
    """The cases' results, one after another; every rank calls it. `kind`: plain, curve, saved, resumed or memory."""
    torch.set_num_threads(1)  # ranks share a machine here
    function = {"curve": curve, "memory": memory, "saved": saved, "resumed": resumed}.get(kind)
    with join(cases[0].device) as world:
        for case in cases:
            yield function(case, world) if function else plain(case, case.saved_at + case.steps)
