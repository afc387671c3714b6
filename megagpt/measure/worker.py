"""What one rank of the compared runs does: curves, checkpoints, memory."""

import dataclasses
import gc
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megagpt.checkpoints.compatibility import Allowed
from megagpt.checkpoints.loading import choose, load
from megagpt.checkpoints.saving import Saver, meta_of
from megagpt.config import CheckpointConfig, Config
from megagpt.data.loader import Batch
from megagpt.engines.engine import Engine, build_engine
from megagpt.engines.flat_shard import FlatShard
from megagpt.measure.cases import LR, SAVED_AT, STEPS, Case, rows, share
from megagpt.measure.plain import plain_optimizer, plain_step
from megagpt.models.gpt import GPT
from megagpt.models.initialization import initialize
from megagpt.models.presets import ModelConfig
from megagpt.position import position
from megagpt.world import World, join

Curve = list[tuple[float, float]]


def plain(case: Case, steps: int = STEPS) -> Curve:
    """Loss and gradient norm of each step in one plain loop: the whole batch at once, all logits, PyTorch's
    cross-entropy, clipping and AdamW."""
    config = case.config()
    model = GPT(config.model)
    initialize(model, config.model, config.run.seed)
    optimizer = plain_optimizer(model, LR, (0.9, 0.95), 1e-8, config.optimizer.weight_decay)
    batches = map(rows, range(steps))
    clip_norm = config.optimizer.clip_norm
    curve = [plain_step(model, optimizer, batch[:, :-1], batch[:, 1:], clip_norm) for batch in batches]
    return [(loss.item(), norm.item()) for loss, norm in curve]


def curve(case: Case, world: World) -> Curve:
    """The same of an engine."""
    engine = build_engine(case.config(), world)
    results = [engine.train_step(share(step, world.rank, case), LR) for step in range(STEPS)]
    return [(r.loss, r.gradient_norm) for r in results]


# --- checkpoints -----------------------------------------------------------------------------------------------------


def saved(case: Case, world: World) -> Curve:
    """An engine's curve over `SAVED_AT` steps, a save in the background, and `STEPS` more."""
    engine = build_engine(case.config(), world)
    (run,) = case.runs
    saver = Saver(Path(run), CheckpointConfig(), world)
    results = []
    for step in range(SAVED_AT + STEPS):
        if step == SAVED_AT:
            at = position(engine.config, SAVED_AT * len(rows(0)), SAVED_AT)
            meta = meta_of(engine, at, [], milestone=False, skipped_updates=0)
            saver.save(engine.state(), engine.replica, meta)
        results.append(engine.train_step(share(step, world.rank, case), LR))
    saver.finish()
    return [(r.loss, r.gradient_norm) for r in results]


def resumed(case: Case, world: World) -> list[Curve]:
    """Of each run the `STEPS` that follow its checkpoint, under this engine."""
    engine = build_engine(case.config(), world)
    curves = []
    for run in case.runs:
        found = choose(Path(run), engine.config, [], Allowed(), world)
        assert found is not None
        load(found, engine)
        steps = range(SAVED_AT, SAVED_AT + STEPS)
        results = [engine.train_step(share(step, world.rank, case), LR) for step in steps]
        curves.append([(r.loss, r.gradient_norm) for r in results])
    return curves


# --- memory ----------------------------------------------------------------------------------------------------------

_CONTEXT = 32
_SEQUENCES = 8
# gloo's threads let go of what they sent a moment after the collective has ended.
_SETTLE_SECONDS = 0.3
_MEMORY_MODEL: dict[str, Any] = {"layers": 4, "width": 128, "heads": 4, "context": _CONTEXT, "vocab_size": 1000}


def memory_config(case: Case) -> Config:
    """A model large enough that its matrices outweigh everything else."""
    config = case.config()
    train = dataclasses.replace(config.train, batch_tokens=_SEQUENCES * _CONTEXT, tokens=160 * _CONTEXT)
    train = dataclasses.replace(train, micro_batch=_SEQUENCES // case.ranks // case.accumulation)
    return dataclasses.replace(config, model=ModelConfig(**_MEMORY_MODEL), train=train)


def memory(case: Case, world: World) -> dict[str, Any]:
    """Bytes that this rank's tensors hold at the fullest point of a step outside its passes, by kind; of a timed case
    also `seconds`, the median time of a step. Counted on the live tensors of the process, by storage, not on what the
    engine says it holds."""
    config = memory_config(case)
    before = set(_storages(_live_tensors()))
    engine = build_engine(config, world)
    fullest: dict[str, Any] = {}

    def look() -> None:
        nonlocal fullest
        time.sleep(_SETTLE_SECONDS)
        held = {k: v for k, v in _storages(_live_tensors()).items() if k not in before}
        if sum(held.values()) > sum(fullest.values()):
            fullest = _by_kind(engine, held)

    engine.on_micro_batch = look
    data = torch.randint(
        config.model.vocab_size, (_SEQUENCES, _CONTEXT + 1), generator=torch.Generator().manual_seed(0)
    )
    pieces = data[world.rank :: world.size].split(config.train.micro_batch)
    batch = Batch([(p[:, :-1], p[:, 1:].contiguous()) for p in pieces], _SEQUENCES, _SEQUENCES * _CONTEXT)
    for _ in range(2):  # the moments appear in the first
        engine.train_step(batch, LR)
    engine.on_micro_batch = lambda: None
    if not case.timed:
        return fullest
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        engine.train_step(batch, LR)
        seconds.append(time.perf_counter() - start)
    return {**fullest, "seconds": sorted(seconds)[3]}


def _live_tensors() -> list[Tensor]:
    gc.collect()
    found = [o for o in gc.get_objects() if isinstance(o, Tensor)]
    # Gradients hang on C++ objects that the collector does not see.
    return found + [t.grad for t in found if t.is_leaf and t.grad is not None]


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by address of each storage behind the tensors."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        if isinstance(tensor, FlatShard):
            tensor = tensor.flat
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        if local.device.type == "meta" or type(local) not in (Tensor, torch.nn.Parameter):
            continue
        storage = local.untyped_storage()
        if storage.nbytes():
            sizes[storage.data_ptr()] = storage.nbytes()
    return sizes


def _by_kind(engine: Engine, held: dict[int, int]) -> dict[str, int]:
    """Weights for the forward pass; optimizer state (under ZeRO with its fp32 weights); the rest is gradients."""
    partitions = [getattr(p, "ds_tensor", p) for p in engine.model.parameters()]
    weights = set(_storages([*engine.model.parameters(), *partitions])) & set(held)
    optimizer = (set(_storages(engine.state().values())) & set(held)) - weights
    rest = set(held) - weights - optimizer
    kinds = {"weights": weights, "gradients": rest, "optimizer": optimizer}
    return {kind: sum(held[k] for k in keys) for kind, keys in kinds.items()}


def run(kind: str, cases: Sequence[Case]) -> Iterator[Any]:
    """The cases' results, one after another; every rank calls it. `kind`: plain, curve, saved, resumed or memory."""
    torch.set_num_threads(1)  # ranks share a machine here
    function = {"curve": curve, "memory": memory, "saved": saved, "resumed": resumed}.get(kind)
    with join(cases[0].device) as world:
        for case in cases:
            yield function(case, world) if function else plain(case, SAVED_AT + STEPS)
