"""Measures training steps: megagpt's engine against `transformers` and a plain loop, on equal work. Each row of the
result runs in a process of its own, so that its peak memory is its own. The rows alternate, so that a machine that is
slower for a while is slower for all of them. The best step counts; the median shows how steady the machine is."""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from megagpt.config import Config
from megagpt.config_file import build_config, override
from megagpt.console import warn
from megagpt.data.loader import Batch
from megagpt.engines.engine import build_engine, build_optimizer
from megagpt.errors import UserError
from megagpt.hardware import device_name, peak_flops
from megagpt.measure.plain import PlainGPT, plain_step
from megagpt.measure.processes import run_ranks
from megagpt.models.presets import ModelConfig
from megagpt.process_memory import peak_memory
from megagpt.world import join

IMPLEMENTATIONS = ("megagpt", "plain", "transformers")
# Config keys that bench's own arguments decide -> these arguments.
_ARGUMENTS = {
    "model.preset": "PRESET",
    "model.context": "--context",
    "train.tokens": "--batch and --accumulation",
    "train.batch_tokens": "--batch and --accumulation",
    "train.micro_batch": "--batch",
    "train.precision": "--precision",
    "train.compile": "--compile",
    "train.device": "--device",
    "engine.name": "--engine",
}
# Steps before the measured ones, and measured steps, by device: a GPU's clock falls in the first seconds of full load.
_WARMUP_STEPS, _STEPS = {"cpu": 2, "cuda": 10}, {"cpu": 5, "cuda": 50}


class Row(NamedTuple):
    """One process's work."""

    implementation: str
    config: Config
    """The config of a run whose batch is that of the measured step."""
    steps: int | None
    """Measured ones; None: as many as the device needs."""
    tuned_allocator: bool
    """Whether a CPU process keeps freed memory, as megagpt's own processes always do."""

    def __str__(self) -> str:
        return f"{self.implementation} {self.config.train.precision}"


def bench(arguments: argparse.Namespace) -> int:
    """Print a table of the rows. Raises UserError for an impossible model, batch or implementation, and for an override
    of a key that an argument decides."""
    against = [name for name in arguments.against.split(",") if name]
    for name in against:
        if name not in IMPLEMENTATIONS[1:]:
            raise UserError(f"--against {name!r}: valid: {', '.join(IMPLEMENTATIONS[1:])}")
    configs = [_config(arguments, precision) for precision in arguments.precision or ("fp32", "bf16")]
    rows = [
        Row(name, config, arguments.steps, name == "megagpt" or arguments.same_allocator)
        for config in configs
        for name in ("megagpt", *against)
    ]
    results: list[list[dict[str, Any]]] = [[] for _ in rows]
    for turn in range(arguments.rounds):
        for row, found in zip(rows, results, strict=True):
            warn(f"round {turn + 1} of {arguments.rounds}: {row} ...")
            try:
                found += run_ranks(1, _measure, row, method="spawn")
            except UserError as error:
                raise UserError(f"{row}: {error}") from None
            best, middle = min(found[-1]["seconds"]), statistics.median(found[-1]["seconds"])
            speed = row.config.train.batch_tokens / best
            warn(f"  {best:.3f} s/step, median {middle:.3f}, {speed:,.0f} tok/s, {found[-1]['memory'] / 2**30:.2f} GiB")
    model, first = configs[0].model, results[0][0]
    tokens = configs[0].train.batch_tokens
    accumulated = f"{arguments.accumulation} x " if arguments.accumulation > 1 else ""
    print(
        f"{arguments.model}: {model.parameters:,} parameters, {accumulated}{arguments.batch} x {model.context} tokens "
        f"a step, {first['device']}, {first['threads']} threads, torch {first['torch']}, compile {arguments.compile}"
    )
    print("implementation  precision   s/step    median     tok/s  TFLOP/s    MFU  peak GiB  vs best other")
    best_of = [min(s for r in found for s in r["seconds"]) for found in results]
    for row, seconds, found in zip(rows, best_of, results, strict=True):
        precision = row.config.train.precision
        others = [
            s for s, r in zip(best_of, rows, strict=True) if r.implementation in against and r.config == row.config
        ]
        ratio = f"{min(others) / seconds:.2f}x" if others and row.implementation == "megagpt" else ""
        middle = statistics.median(s for r in found for s in r["seconds"])
        speed = tokens / seconds
        peak = found[0]["peak_flops"]
        mfu = f"{speed * model.flops_per_token / peak:.1%}" if peak else "n/a"
        memory = max(r["memory"] for r in found) / 2**30
        print(
            f"{row.implementation:15}{precision:>10}{seconds:9.3f}{middle:10.3f}{speed:10,.0f}"
            f"{speed * model.flops_per_token / 1e12:9.3f}{mfu:>7}{memory:10.2f}{ratio:>15}"
        )
    return 0


def _config(arguments: argparse.Namespace, precision: str) -> Config:
    for text in arguments.overrides:
        for section, values in override({}, text).items():
            for key in (f"{section}.{name}" for name in (values if isinstance(values, dict) else ())):
                if key in _ARGUMENTS:
                    raise UserError(f"bench takes {key} from {_ARGUMENTS[key]}: leave out the override {text}")
    context = [f"model.context={arguments.context}"] if arguments.context else []
    tree: dict[str, Any] = {"model": {"preset": arguments.model}, "engine": {"name": arguments.engine}}
    for text in [*context, *(t for t in arguments.overrides if t.startswith("model."))]:
        tree = override(tree, text)
    tokens = arguments.accumulation * arguments.batch * build_config(tree, "bench").model.context
    train = {"tokens": tokens, "batch_tokens": tokens, "micro_batch": arguments.batch, "precision": precision}
    tree["train"] = {**train, "compile": arguments.compile, "device": arguments.device}
    for text in arguments.overrides:
        tree = override(tree, text)
    return build_config(tree, "bench")


def _measure(row: Row) -> Iterator[dict[str, Any]]:
    config = row.config
    with join(config.train.device, tune_allocator=row.tuned_allocator) as world:
        device = world.device
        generator = torch.Generator().manual_seed(0)
        shape = (config.batch_sequences, config.model.context + 1)
        rows = torch.randint(config.model.vocab_size, shape, generator=generator).to(device)
        tokens, targets = rows[:, :-1], rows[:, 1:].contiguous()
        accumulation = config.accumulation(1)
        step: Callable[[], object]
        if row.implementation == "megagpt":
            pieces = zip(tokens.chunk(accumulation), targets.chunk(accumulation), strict=True)
            batch = Batch(list(pieces), len(rows), targets.numel())
            step = partial(build_engine(config, world).train_step, batch, 1e-4)
        else:
            build = {"plain": PlainGPT, "transformers": _transformers}[row.implementation]
            model = build(config.model).to(device)
            optimizer = build_optimizer(model, config)
            if config.train.compile:
                model.compile()
            bf16 = config.train.precision == "bf16"
            step = partial(
                plain_step, model, optimizer, tokens, targets, config.optimizer.clip_norm, bf16,
                micro_batches=accumulation,
            )  # fmt: skip
        seconds = _time(step, device, row.steps)
        yield {
            "seconds": seconds,
            "memory": peak_memory(device),
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "peak_flops": peak_flops(device, config.train.precision, config.log.peak_tflops),
        }


def _time(step: Callable[[], object], device: torch.device, steps: int | None) -> list[float]:
    """Seconds of each measured step."""
    seconds = []
    for _ in range(_WARMUP_STEPS[device.type] + (steps or _STEPS[device.type])):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[_WARMUP_STEPS[device.type] :]


def _transformers(config: ModelConfig) -> nn.Module:
    try:
        import transformers
    except ImportError:
        raise UserError("--against transformers needs it installed: pip install transformers") from None
    from megagpt.models.hf_layout import hf_config

    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**hf_config(config))).train()
