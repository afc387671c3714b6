"""The model that is examined, on the ranks that examine it: whole on each of them, or sharded by an engine."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megagpt.checkpoints.folder import checkpoints_folder, find_checkpoint, is_checkpoint
from megagpt.checkpoints.loading import load_model, read_weights, saved_config
from megagpt.config import Config, EngineConfig, TrainConfig
from megagpt.data.tokenizer import VOCAB_SIZE
from megagpt.engines.engine import DTYPES, Engine, build_engine
from megagpt.engines.gathering import full_precision
from megagpt.errors import UserError
from megagpt.evaluation.scoring import Model
from megagpt.files import named_path
from megagpt.models.huggingface import Pretrained, is_pretrained, parameter_shapes
from megagpt.models.presets import ModelConfig
from megagpt.world import World

ENGINE_NAMES = ("ddp", "fsdp", "zero")
"""ddp: the whole model on each rank. fsdp, zero: sharded by FSDP, and by ZeRO at stage 3."""


class Examinee(NamedTuple):
    """A model that was found; its weights are still on the disk."""

    label: str
    """The name for people and for results."""
    config: ModelConfig
    folder: Path


def find_model(name: str, world: World) -> Examinee:
    """The model of that name: a run, one of its checkpoints, or a `transformers` GPT-2 folder. Every rank calls it.
    Raises UserError if there is none."""
    path = named_path(name)
    if not path.is_dir():
        raise UserError(f"{name}: {'a file, not a folder' if path.exists() else 'no such folder'}; name a model's")
    if is_pretrained(path):
        found = Examinee(name, Pretrained(path).config, path)
    elif is_checkpoint(path) or checkpoints_folder(path).is_dir():
        # File systems may show ranks different states of a run that goes on.
        checkpoint = world.from_main(lambda: find_checkpoint(path))
        label = name if is_checkpoint(path) else f"{name} at {checkpoint.meta.tokens_seen:,} tokens"
        found = Examinee(label, saved_config(checkpoint).model, checkpoint.path)
    else:
        kinds = "config.json (a transformers folder) nor checkpoints/ (a run), and is no checkpoint of a run"
        raise UserError(f"{name}: a folder without a model: it has neither {kinds}")
    if found.config.vocab_size < VOCAB_SIZE:
        raise UserError(f"{name}: its vocabulary of {found.config.vocab_size} is not GPT-2's {VOCAB_SIZE}")
    return found


@contextlib.contextmanager
def opened(found: Examinee, world: World, engine: str, precision: str) -> Iterator[Model]:
    """The model, ready to be called on every rank, without gradients. `engine`: one of ENGINE_NAMES. `precision`: fp32
    or bf16, of matrix products."""
    with exact_products():
        if engine == "ddp":
            model = load_model(found.folder).to(world.device).eval()
            dtype = DTYPES[precision]
            with torch.no_grad(), torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
                yield model
            return
        with filled(found, world, engine, precision).evaluation(any_shape=True) as sharded:
            yield sharded


def filled(found: Examinee, world: World, engine: str, precision: str) -> Engine:
    """An engine at its first step, with the model's weights."""
    context = found.config.context
    train = TrainConfig(
        tokens=context * world.size, batch_tokens=context * world.size, micro_batch=1,
        precision=precision, compile=False,  # type: ignore[arg-type]
    )  # fmt: skip
    settings = EngineConfig(name="fsdp") if engine == "fsdp" else EngineConfig(name="zero", stage=3)
    model = dataclasses.replace(found.config, dropout=0.0)
    built = build_engine(Config(model=model, train=train, engine=settings), world)
    weights = {key.removeprefix("model."): v for key, v in built.state().items() if key.startswith("model.")}
    read = _reader(found)
    for name, shard in weights.items():
        start = shard.start
        shard.flat.copy_(read(name).flatten()[start : start + shard.flat.numel()])
    built.state_loaded(built.scalars())
    return built


@contextlib.contextmanager
def examined(engine: Engine) -> Iterator[Model]:
    """The model of a run that trains, in the precision of `evaluation.precision`, without gradients. Every rank enters,
    and calls the model equally often."""
    train, precision = engine.config.train, engine.config.evaluation.precision
    with exact_products():
        if train.precision == precision == "fp32":  # then its residual stream and its linear layers are fp32, too
            with engine.evaluation(any_shape=True) as model:
                yield model
        else:
            with full_precision(engine, DTYPES[precision]) as model:
                yield model


def _reader(found: Examinee) -> Callable[[str], Tensor]:
    """Reads one parameter by our name, fp32 on the CPU."""
    if is_pretrained(found.folder):
        return Pretrained(found.folder).read
    checkpoint, shapes = find_checkpoint(found.folder), parameter_shapes(found.config)
    return lambda name: read_weights(checkpoint, {name: shapes[name]})[name]


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Inside, fp32 products are computed in fp32, whatever the environment says about TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
