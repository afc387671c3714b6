"""A summary of what follows from a config: steps, micro-batches, memory."""

import json
from collections.abc import Iterator

from megagpt.config import Config, compiles
from megagpt.config_types import AUTO
from megagpt.engines.zero_config import deepspeed_config
from megagpt.placement import layout, micro_batches, sharer
from megagpt.planning.gpus import find_gpu
from megagpt.planning.micro_batch import largest_micro_batch, resolved
from megagpt.planning.state import state_bytes
from megagpt.schedule import check_profile_steps, learning_rate, ramp_efficiency, step_count

# GPUs for which an automatic micro-batch is shown: bytes of their memory.
_EXAMPLES = {"an H100": find_gpu("h100").memory, "a 40 GB A100": find_gpu("a100-40gb").memory}


def summarize(config: Config, ranks: int) -> Iterator[str]:
    """Lines for people about a run on `ranks` ranks. Raises UserError if it cannot start on them, or if its engine
    settings are impossible."""
    config.check_ranks(ranks)
    check_profile_steps(config)
    model, train, context = config.model, config.train, config.model.context
    on_gpu = train.device != "cpu"
    capacity = _EXAMPLES["an H100"] if on_gpu else None
    padding = model.padded_vocab_size - model.vocab_size
    yield f"parameters: {model.parameters:,} ({padding} padding rows of the vocabulary not counted)"
    yield f"FLOPs: {model.flops_per_token:.3e} per token, {model.flops_per_token * train.tokens:.3e} in all"
    shared = layout(ranks, config.engine.tensor_ranks)
    yield f"batch: {config.batch_sequences} sequences of {context} on {shared} = {_micro_batches(config, ranks)}"
    yield f"steps: {step_count(config):,}, {step_count(config, config.schedule.warmup_tokens):,} of them warm-up"
    final = learning_rate(config, train.tokens)
    yield f"learning rate: {config.optimizer.lr:.2e} at its peak, {final:.2e} at the end"
    if train.batch_ramp_tokens:
        steps = step_count(config, train.batch_ramp_tokens)
        sized, shares = resolved(config, ranks, capacity), config.shares(ranks)
        counts = ramp_efficiency(sized, shares, compiles(train.compile, "cuda" if on_gpu else "cpu"))
        of = f" in micro-batches of up to {sized.micro_batch}" if train.micro_batch == AUTO else ""
        grown = f"{train.batch_ramp_start:,} to {train.batch_tokens:,} tokens over {steps:,} steps"
        yield f"batch ramp: {grown}; {counts:.1%} of its arithmetic counts on {shares:,} {sharer(config)}(s){of}"
    held = state_bytes(config, ranks)
    parts = {"weights": held.weights, "gradients": held.gradients, "optimizer": held.optimizer}
    if held.copies:
        parts[f"{train.precision} copies of weights"] = held.copies
    parts["total"] = held.total
    listed = ", ".join(f"{name} {count / 2**30:.2f} GiB" for name, count in parts.items())
    yield f"memory on each rank: {listed}; without activations"
    if config.engine.name == "zero":
        config = resolved(config, ranks, capacity)
        of = f" for micro-batches of {config.micro_batch}" if train.micro_batch == AUTO else ""
        yield f"DeepSpeed config{of}:"
        yield from json.dumps(deepspeed_config(config, ranks, on_gpu), indent=2).splitlines()


def _micro_batches(config: Config, ranks: int) -> str:
    if config.train.micro_batch != AUTO:
        return micro_batches(config, ranks)
    places = {"a CPU": None} if config.train.device == "cpu" else {**_EXAMPLES, "a CPU": None}
    sizes = [f"{largest_micro_batch(config, ranks, memory)} on {place}" for place, memory in places.items()]
    each = config.sequences_of_a_rank(ranks)
    return f"{each} per step and {sharer(config)}, in micro-batches of {', '.join(sizes)} (train.micro_batch auto)"
