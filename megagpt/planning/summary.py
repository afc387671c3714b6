"""What follows from a config: steps, micro-batches, memory."""

from collections.abc import Iterator

from megagpt.config import Config
from megagpt.training.schedule import learning_rate, step_count

# Bytes of fp32 weight, fp32 gradient and both fp32 Adam moments.
_STATE_BYTES = 4 + 4 + 4 + 4


def summarize(config: Config, ranks: int) -> Iterator[str]:
    """Lines for people about a run on `ranks` ranks. Raises UserError where the batch does not divide over them."""
    model, train, context = config.model, config.train, config.model.context
    dead = model.padded_vocab_size - model.vocab_size
    yield f"parameters: {model.parameters:,} ({dead} dead rows of the vocabulary not counted)"
    yield f"FLOPs: {model.flops_per_token:.3e} a token, {model.flops_per_token * train.tokens:.3e} in all"
    accumulation = config.accumulation(ranks)
    yield (
        f"batch: {config.batch_samples} sequences of {context} on {ranks} rank(s) = "
        f"{accumulation} micro-batch(es) of {train.micro_batch} a step and rank"
    )
    yield f"steps: {step_count(config):,}, {step_count(config, config.schedule.warmup_tokens):,} of them warm-up"
    final = learning_rate(config, train.tokens)
    yield f"learning rate: {config.optimizer.lr:.2e} at its peak, {final:.2e} at the end"
    if train.batch_ramp_tokens:
        yield (
            f"batch ramp: {train.batch_ramp_start:,} to {train.batch_tokens:,} tokens over "
            f"{step_count(config, train.batch_ramp_tokens):,} steps"
        )
    held = (model.parameters + dead * model.width) * _STATE_BYTES
    yield f"memory for weights, gradients and optimizer on each rank: {held / 2**30:.2f} GiB, activations aside"
