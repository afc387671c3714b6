"""The model that is examined, on the ranks that examine it: whole on each of them, or sharded by an engine."""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch

from megagpt.config import Config, EngineConfig, TrainConfig
from megagpt.engines.engine import DTYPES, Engine, build_engine
from megagpt.engines.gathering import full_precision
from megagpt.evaluation.scoring import Model
from megagpt.exchange.named import NamedModel
from megagpt.models.huggingface import parameter_shapes
from megagpt.world import World

ENGINE_NAMES = ("ddp", "fsdp", "zero")
"""ddp: the whole model on each rank. fsdp, zero: sharded by FSDP, and by ZeRO at stage 3."""


@contextlib.contextmanager
def opened(found: NamedModel, world: World, engine: str, precision: str) -> Iterator[Model]:
    """The model, ready to be called on every rank, without gradients. `engine`: one of ENGINE_NAMES. `precision`: fp32
    or bf16, of matrix products."""
    with exact_products():
        if engine == "ddp":
            model = found.load().to(world.device).eval()
            dtype = DTYPES[precision]
            with torch.no_grad(), torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
                yield model
            return
        with _called(filled(found, world, engine), precision) as sharded:
            yield sharded


def filled(found: NamedModel, world: World, engine: str) -> Engine:
    """An engine in fp32 at its first step, with the model's weights."""
    context = found.config.context
    train = TrainConfig(
        tokens=context * world.size, batch_tokens=context * world.size, micro_batch=1, precision="fp32", compile=False,
    )  # fmt: skip
    settings = EngineConfig(name="fsdp") if engine == "fsdp" else EngineConfig(name="zero", stage=3)
    model = dataclasses.replace(found.config, dropout=0.0)
    built = build_engine(Config(model=model, train=train, engine=settings), world)
    weights = {key.removeprefix("model."): v for key, v in built.state().items() if key.startswith("model.")}
    for name, shape in parameter_shapes(found.config).items():
        shard, whole = weights[name], found.read({name: shape})[name]
        for box, piece in shard.pieces():
            piece.copy_(whole[box.place])
    built.state_loaded(built.scalars())
    return built


@contextlib.contextmanager
def examined(engine: Engine) -> Iterator[Model]:
    """The model of a run that trains, in the precision of `evaluation.precision`, without gradients. Every rank enters,
    and calls the model equally often."""
    with exact_products(), _called(engine, engine.config.evaluation.precision) as model:
        yield model


@contextlib.contextmanager
def _called(engine: Engine, precision: str) -> Iterator[Model]:
    """The engine's model with fp32 weights, and matrix products in `precision`: the same bits under every engine."""
    # Each rank scores sequences of its own, which ranks that share products cannot.
    alone = engine.ranks.size == 1
    if alone and engine.config.train.precision == precision == "fp32":  # residual stream and linear layers, too
        with engine.evaluation(any_shape=True) as model:
            yield model
    else:  # in bf16, FSDP and ZeRO would round whole weights, those of norms and embeddings, too
        with full_precision(engine, DTYPES[precision]) as model:
            yield model


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Inside, fp32 products are computed in fp32, whatever the environment says about TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
