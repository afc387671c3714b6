"""One step of a run on pretend ranks: its peak memory on a GPU, counted on any machine, in seconds.

The engine is the trainer's own, built by `build_engine`, and takes one step of two micro-batches. Its tensors are fake:
they have shapes and no memory. Its ranks are fake, too: collectives return at once. PyTorch's fake tensors can be on a
GPU only if PyTorch was built for one, so they are on a CPU here, and `_gpu_paths` takes a GPU's ways in the few places
where the model asks for the device. Of DDP, one process without PyTorch's wrapper is traced; the wrapper's buckets are
the gradients."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from megagpt.config import Config, compiles
from megagpt.data.loader import Batch
from megagpt.engines import activation_checkpointing, native
from megagpt.engines.engine import Engine, build_engine, moments_of
from megagpt.errors import UserError
from megagpt.models import gpt, loss, tensor_softmax
from megagpt.models.chunks import SOFTMAX_ROWS
from megagpt.planning.trace_compiled import PretendCompiler
from megagpt.planning.trace_counter import Counter
from megagpt.world import World

_aten = torch.ops.aten


@dataclass(frozen=True)
class Trace:
    """Bytes of one rank's tensors in a step, counted."""

    peak: float
    """Most bytes at a time."""
    state: float
    """Bytes of weights and optimizer, and of gradients between the step's micro-batches."""
    moment: str
    """The operator at the peak."""
    seconds: float
    """Time that the trace took."""


def trace(config: Config, ranks: int) -> Trace:
    """One step of the run on that many ranks. Raises UserError if the run cannot be divided among them, and for what
    cannot be traced."""
    config.check_ranks(ranks)
    check_trace(config)
    start = time.perf_counter()
    on = "selective" if config.train.activation_checkpointing == "selective" else None
    keep = activation_checkpointing.selective_policy(config.model, config.engine.tensor_ranks) if on else None
    # Fake tensors are on a CPU, where `auto` would mean no.
    train = replace(config.train, device="cpu", compile=compiles(config.train.compile, "cuda"))
    config = replace(config, train=train)
    counter, fake = Counter(), FakeTensorMode(allow_non_fake_inputs=True)
    with _ranks(config, ranks) as world, _gpu_paths(PretendCompiler(counter, keep)), _empty_inside(fake, counter):
        engine = build_engine(config, world, initialized=False)
        with fake, counter.counting(), _HostReads():
            _make_state(engine, counter, buckets=ranks > 1 and config.engine.name == "ddp")
            between: list[float] = []
            engine.on_micro_batch = lambda: between.append(counter.now)
            engine.train_step(_batch(config, ranks), lr=1e-4)
    return Trace(counter.peak, between[0], counter.moment, time.perf_counter() - start)


def check_trace(config: Config) -> None:
    """Raises UserError for what cannot be traced."""
    advice = "; without --trace, the plan has its formula"
    if config.engine.name == "zero":
        raise UserError(f"engine.name zero cannot be traced: DeepSpeed needs ranks that exist{advice}")
    if config.engine.offload != "none":
        raise UserError(f"engine.offload {config.engine.offload} cannot be traced: all fake memory is alike{advice}")
    if config.train.float8 != "none":
        raise UserError(f"train.float8 {config.train.float8} cannot be traced: its products need a GPU{advice}")


@contextlib.contextmanager
def _ranks(config: Config, ranks: int) -> Iterator[World]:
    """This process as rank 0 of as many pretend ranks."""
    alone = config.engine.name == "ddp"
    size = 1 if alone else ranks
    if not alone:  # FSDP takes a process group even on one rank
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield World(0, size, 0, torch.device("cpu"))
    finally:
        if not alone:
            dist.destroy_process_group()


@contextlib.contextmanager
def _empty_inside(fake: FakeTensorMode, counter: Counter) -> Iterator[None]:
    """Weights become fake where an engine allocates them. The engine is built outside: sharding a fake tensor makes one
    for each rank."""

    def to_empty(model: nn.Module, *, device: Any) -> nn.Module:
        with fake, counter.counting():
            return nn.Module.to_empty(model, device=device)

    with mock.patch.object(gpt.GPT, "to_empty", to_empty, create=True):
        yield


@contextlib.contextmanager
def _gpu_paths(compiler: PretendCompiler) -> Iterator[None]:
    """The ways that a GPU takes in the model and the step."""

    def squares(tensors: list[Tensor]) -> Tensor:
        return torch.stack(torch._foreach_norm(tensors)).double().square().sum()

    def dropout(x: Tensor, p: float, training: bool, inplace: bool = False) -> Tensor:
        return _aten.native_dropout(x, p, True)[0] if p and training else x

    def compiled_softmax(logits: Tensor, *_: Any) -> Tensor:  # writes into the logits
        return logits.new_zeros((), dtype=torch.float32)

    def compile_(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
        softmax = function.__module__ in (loss.__name__, tensor_softmax.__name__)
        return compiled_softmax if softmax else compiler.compile(function, **settings)

    with contextlib.ExitStack() as patches:
        for owner, name, value in (
            (torch, "compile", compile_),
            (F, "scaled_dot_product_attention", _attention),
            (F, "dropout", dropout),
            (gpt, "_look_up", F.embedding),
            (native, "sum_of_squares", squares),
            (loss, "CHUNK", {"cpu": loss.CHUNK["cuda"]}),
            *((module, "SOFTMAX_ROWS", {"cpu": SOFTMAX_ROWS["cuda"]}) for module in (loss, tensor_softmax)),
            (loss, "_sums_in_fp32", lambda weight: True),
            (loss, "_product", lambda a, b, out: torch.mm(a, b, out=out)),
            (loss, "_add_product_", lambda *_, **__: None),
        ):
            patches.enter_context(mock.patch.object(owner, name, value))
        yield


class _HostReads(TorchFunctionMode):
    """Answers the host's reads of values, which fake tensors do not have."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.tolist:
            return [0.0] * args[0].numel()
        if function in (Tensor.__float__, Tensor.item):
            return 0.0
        return function(*args, **kwargs)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False
) -> Tensor:
    """The kernel that a GPU takes: flash, or the memory-efficient one in fp32 and with a mask, which becomes a bias."""
    if attn_mask is None and q.dtype != torch.float32:
        return _aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
    bias = None
    if attn_mask is not None:
        bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(attn_mask.logical_not(), -torch.inf)
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return _aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, dropout_p, is_causal)[0]


def _make_state(engine: Engine, counter: Counter, buckets: bool) -> None:
    """Adam's moments, which a run has from its second step on, and DDP's buckets, which become the gradients."""
    for parameter in engine.model.parameters():
        with counter.paused():
            moments = moments_of(engine.optimizer, parameter)
            if buckets:
                parameter.grad = torch.zeros_like(parameter)
        for tensor in (*moments.values(), *([parameter.grad] if parameter.grad is not None else [])):
            counter.add(tensor, "state")


def _batch(config: Config, ranks: int) -> Batch:
    """One rank's share of a step: at most two micro-batches, because all further ones are like the second."""
    shape = (config.micro_batch, config.model.context)
    pieces = [
        (torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.int64))
        for _ in range(min(2, config.accumulation(ranks)))
    ]
    return Batch(pieces, config.batch_sequences, config.train.batch_tokens)
