"""Learning rate and batch size as pure functions of tokens (GPT-3, appendix B)."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

from megagpt.config import Config
from megagpt.config_types import steps_of
from megagpt.console import say
from megagpt.errors import UserError

# Sizes of batches that a ramp is counted in, if it has more.
_SIZES = 4096
# First steps of an incarnation that may compile the model.
_COMPILING_STEPS = 2


def learning_rate(config: Config, tokens: int) -> float:
    """The rate of the step that brings the run to `tokens` tokens. Linear warm-up from zero; then cosine to the floor,
    or constant followed by a linear decay (warm-up-stable-decay, Hu et al. 2024), or constant."""
    schedule, peak = config.schedule, config.optimizer.lr
    if tokens < schedule.warmup_tokens:
        return peak * tokens / schedule.warmup_tokens
    if schedule.shape == "constant":
        return peak
    start = schedule.decay_start_tokens if schedule.shape == "wsd" else schedule.warmup_tokens
    done = min(1.0, max(0.0, (tokens - start) / (schedule.decay_end_tokens - start)))
    left = 1.0 - done if schedule.shape == "wsd" else 0.5 * (1.0 + math.cos(math.pi * done))
    return peak * (schedule.floor_ratio + (1.0 - schedule.floor_ratio) * left)


def batch_sequences(config: Config, sequences_seen: int) -> int:
    """Sequences in the batch that starts at `sequences_seen`: linear in tokens over the ramp, rounded."""
    train, context = config.train, config.model.context
    tokens = sequences_seen * context
    if tokens >= train.batch_ramp_tokens:
        return config.batch_sequences
    grown = (train.batch_tokens - train.batch_ramp_start) * tokens // train.batch_ramp_tokens
    return (train.batch_ramp_start + grown + context // 2) // context


class Cut(NamedTuple):
    """The micro-batches of one share of a batch, alike on all ranks."""

    micro_batches: int
    size: int
    """Sequences of each, with rows that only fill up."""

    @property
    def sequences(self) -> int:
        """Sequences that a share computes."""
        return self.micro_batches * self.size


def cut(sequences: int, shares: int, micro_batch: int, compiled: bool = False) -> Cut:
    """The micro-batches of each of the equal shares of a batch: as few as `micro_batch` sequences at a time allow, all
    of one size, no longer than the longest share needs. `compiled`: the model is compiled for each size, so there are
    at most two sizes between a power of two and its double."""
    longest = -(-sequences // shares)
    count = -(-longest // micro_batch)
    size = -(-longest // count)
    if compiled:
        grain = max(1, (1 << (size - 1).bit_length()) // 4)
        size = min(micro_batch, -(-size // grain) * grain)
    return Cut(count, size)


def sizes_ahead(config: Config, sequences_seen: int, cut_of: Callable[[int], Cut]) -> set[int]:
    """Sizes of the micro-batches of the steps from `sequences_seen` on, and perhaps some between them. `cut_of`:
    sequences of a batch -> its micro-batches."""
    sizes = range(batch_sequences(config, sequences_seen), config.batch_sequences + 1)
    return {cut_of(sequences).size for sequences in sizes}


class RampWork(NamedTuple):
    """Counts of the steps that begin during the batch ramp."""

    cuts: dict[int, tuple[int, int]]
    """Size of micro-batches -> number of steps with such ones, and of a rank's micro-batches in these steps."""
    sequences: int
    """Of all steps of the ramp."""


def ramp_work(config: Config, shares: int, compiled: bool) -> RampWork:
    """Count the steps of the ramp without a walk through all of them. `shares`, `compiled`: as for `cut`. The ramp's
    last step may pass the end of the run."""
    train, context = config.train, config.model.context
    end = min(train.batch_ramp_tokens, config.total_sequences * context)
    ramp = train.batch_ramp_start, train.batch_tokens, train.batch_ramp_tokens, context, end
    return _ramp_work(ramp, shares, config.micro_batch, compiled)


def ramp_efficiency(config: Config, shares: int, compiled: bool) -> float:
    """Share of the arithmetic of the batch ramp that counts: the sequences of its steps, divided by those that all
    shares compute, with rows that only fill up. Exact for batches of up to 4,096 sequences."""
    work = ramp_work(config, shares, compiled)
    return work.sequences / sum(shares * size * micro_batches for size, (_, micro_batches) in work.cuts.items())


@functools.lru_cache(maxsize=512)
def _ramp_work(ramp: tuple[int, int, int, int, int], shares: int, micro_batch: int, compiled: bool) -> RampWork:
    cuts: dict[int, tuple[int, int]] = {}
    batches = _ramp_batches(*ramp)
    for sequences, steps in batches:
        count, size = cut(sequences, shares, micro_batch, compiled)
        before = cuts.get(size, (0, 0))
        cuts[size] = before[0] + steps, before[1] + count * steps
    return RampWork(cuts, sum(sequences * steps for sequences, steps in batches))


@functools.lru_cache(maxsize=8)
def _ramp_batches(start: int, full: int, ramp: int, context: int, end: int) -> list[tuple[int, int]]:
    """Pairs of the sequences in a batch and the number of such steps."""
    found, tokens, growth = [], 0, full - start
    grain = 1 + full // context // _SIZES
    while tokens < end:
        size = (start + growth * tokens // ramp + context // 2) // context
        larger = (size + grain) * context - context // 2 - start
        until = min(end, -(-larger * ramp // growth)) if growth else end  # the first position with a larger batch
        steps = max(1, -(-(until - tokens) // (size * context)))
        found.append((size, steps))
        tokens += steps * size * context
    return found


def check_profile_steps(config: Config) -> None:
    """Raises UserError if the run ends before the last step that it is to profile."""
    steps, total = steps_of(config.train.profile_steps), step_count(config)
    if steps and steps[-1] > total:
        ways = "choose earlier steps, or raise train.tokens"
        raise UserError(f"train.profile_steps {config.train.profile_steps}: the run ends with step {total}; {ways}")


def steps_to_profile(text: str, taken: int, compiled: bool) -> range:
    """Of the steps that `train.profile_steps` names, those that an incarnation profiles which begins after `taken`
    steps; says which it leaves out. If the model is compiled, it leaves out its first two steps, which compile."""
    steps = steps_of(text)
    left = range(max(steps.start, taken + 1), steps.stop)
    if steps and not left:
        say(f"train.profile_steps {text} lie before step {taken}, from which this run resumes: no profile")
    first = taken + 1 + (_COMPILING_STEPS if compiled else 0)
    if not left or left.start >= first:
        return left
    kept = range(first, steps.stop)
    result = f"step {kept[0]} is the first that is profiled" if kept else "no profile"
    say(f"train.profile_steps {text}: the first two steps after a start compile the model, and are left out: {result}")
    return kept


def step_count(config: Config, tokens: int | None = None) -> int:
    """Optimizer steps until the run has seen `tokens` (default: all) of its tokens."""
    total = config.total_sequences
    target = total if tokens is None else min(total, -(-tokens // config.model.context))
    count = seen = 0
    while seen < target:
        if seen * config.model.context >= config.train.batch_ramp_tokens:
            return count - (seen - target) // config.batch_sequences  # full batches from here on, rounded up
        seen += batch_sequences(config, seen)
        count += 1
    return count
