"""One row of `megagpt bench`: the training steps of megagpt's engine, of `transformers` or of a plain loop, timed in a
process of their own, so that its peak memory is theirs, too."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.amp import GradScaler

from megagpt.config import Config
from megagpt.console import overheard
from megagpt.data.loader import Batch
from megagpt.engines.compilation import is_compiled
from megagpt.engines.engine import DTYPES, build_engine, build_optimizer
from megagpt.errors import UserError
from megagpt.extras import pip_install
from megagpt.hardware import device_name, peak_flops
from megagpt.measure.matrix_rate import matrix_seconds
from megagpt.measure.plain import PlainGPT, plain_loss, plain_step
from megagpt.models.presets import ModelConfig
from megagpt.process_memory import is_out_of_memory, peak_memory
from megagpt.timing import time_steps
from megagpt.world import World, join

OUT_OF_MEMORY = "out of memory"


class Row(NamedTuple):
    """One process's work."""

    implementation: str
    config: Config
    """The config of a run whose batch is that of the measured step."""
    steps: int | None
    """Measured ones; None: as many as the device needs."""
    tuned_allocator: bool
    """Whether a CPU process keeps freed memory and a GPU's segments expand, as in megagpt's own processes."""

    def __str__(self) -> str:
        return f"{self.implementation} {self.config.train.precision}"


@dataclass(frozen=True)
class Measured:
    """Findings of a process."""

    seconds: list[float]
    """Of each measured step."""
    memory: int
    """Peak in bytes."""
    compiled: bool
    """Whether the steps ran in compiled graphs."""
    matrix_seconds: float | None
    """Of a micro-batch's matrix products, each timed alone, in the row's precision. None before they are timed, if they
    do not fit in memory, and for products in float8, which are not timed."""
    peak_flops: float | None
    """FLOP/s of the device's data sheet; None if unknown."""
    device: str
    threads: int
    torch_version: str


def measure(row: Row) -> Iterator[list[str] | Measured | str]:
    """Yields the lines that the row's process printed for people, its steps, and these once more with the products'
    time; or OUT_OF_MEMORY where memory ended."""
    lines: list[str] = []
    try:
        yield from _measure(row, lines)
    except Exception as error:
        yield lines
        if not is_out_of_memory(error):
            raise
        yield OUT_OF_MEMORY


def _measure(row: Row, lines: list[str]) -> Iterator[list[str] | Measured]:
    config, train = row.config, row.config.train
    with join(train.device, tune_allocator=row.tuned_allocator) as world:
        device = world.device
        with overheard(lines.append):
            step, compiled = _step(row, world)
            seconds = time_steps(step, device, row.steps)
        found = Measured(
            seconds, peak_memory(device), compiled, None, peak_flops(device, train.precision, config.log.peak_tflops),
            device_name(device), torch.get_num_threads(), torch.__version__,
        )  # fmt: skip
        yield lines
        yield found
        if train.float8 != "none":
            return
        del step
        gc.collect()  # the products need room for their own operands
        if device.type == "cuda":
            torch.cuda.empty_cache()
        tokens = config.micro_batch * config.model.context
        yield replace(found, matrix_seconds=matrix_seconds(config.model, tokens, DTYPES[train.precision], device))


def _step(row: Row, world: World) -> tuple[Callable[[], object], bool]:
    """One optimizer step, ready to be called again and again, and whether it is compiled."""
    config, device = row.config, world.device
    generator = torch.Generator().manual_seed(0)
    shape = (config.batch_sequences, config.model.context + 1)
    rows = torch.randint(config.model.vocab_size, shape, generator=generator).to(device)
    tokens, targets = rows[:, :-1], rows[:, 1:].contiguous()
    accumulation = config.accumulation(1)
    if row.implementation == "megagpt":
        pieces = zip(tokens.chunk(accumulation), targets.chunk(accumulation), strict=True)
        batch = Batch(list(pieces), len(rows), targets.numel())
        engine = build_engine(config, world)
        return partial(engine.train_step, batch, 1e-4), engine.compiled
    if device.type == "cuda":
        # PyTorch's defaults, which users of these loops have; megagpt sums in fp32.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    build = {"plain": PlainGPT, "transformers": _transformers}[row.implementation]
    model = build(config.model).to(device)
    dtype = DTYPES[config.train.precision]
    compiled = is_compiled(config, world)
    loss_of = torch.compile(plain_loss, dynamic=False) if compiled else plain_loss
    step = partial(
        plain_step, model, build_optimizer(model, config), tokens, targets, config.optimizer.clip_norm, dtype,
        micro_batches=accumulation, loss_of=loss_of, scaler=GradScaler(device.type, enabled=dtype == torch.float16),
    )  # fmt: skip
    return step, compiled


def _transformers(config: ModelConfig) -> nn.Module:
    try:
        import transformers
    except ImportError:
        raise UserError(f"--against transformers needs it; install it: {pip_install('transformers')}") from None
    from megagpt.models.hf_layout import hf_config

    # Without the cache of keys and values, which only generation needs.
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**hf_config(config), use_cache=False)).train()
