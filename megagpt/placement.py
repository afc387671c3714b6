"""The machines of a run's ranks: the tensor ranks of a group exchange activations in every block, so they share one."""

import contextlib
import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Sequence

from megagpt.config import Config
from megagpt.config_types import AUTO
from megagpt.divisors import divisors_around
from megagpt.errors import UserError


def layout(ranks: int, tensor_ranks: int) -> str:
    """A number of ranks in words, with the groups of tensor ranks that they form."""
    if tensor_ranks == 1:
        return f"{ranks} rank{'s' if ranks > 1 else ''}"
    groups = ranks // tensor_ranks
    return f"{ranks} ranks in {groups} group{'s' if groups > 1 else ''} of {tensor_ranks} tensor ranks"


def sharer(config: Config) -> str:
    """The taker of a share of every batch, in a word: each rank takes one, or each group of tensor ranks."""
    return "rank" if config.engine.tensor_ranks == 1 else "group"


def micro_batches(config: Config, ranks: int) -> str:
    """The micro-batches of a full step, in words. Raises UserError if the ranks do not divide the batch."""
    return f"{config.accumulation(ranks)} micro-batch(es) of {config.micro_batch} per step and {sharer(config)}"


def check_start(config: Config, hosts: Sequence[str]) -> None:
    """Raises UserError, with what to change, if the run cannot start on ranks on these machines: one for each rank."""
    config.shares(len(hosts))
    check_placement(config, hosts)
    config.check_ranks(len(hosts))


def check_placement(config: Config, hosts: Sequence[str]) -> None:
    """Raises UserError, with what to change, if the tensor ranks of a group would be on several machines. `hosts`: the
    machine of each rank."""
    size = config.engine.tensor_ranks
    apart = (first for first in range(0, len(hosts), size) if len(set(hosts[first : first + size])) > 1)
    if (first := next(apart, None)) is None:
        return
    last, there = first + size - 1, list(dict.fromkeys(hosts[first : first + size]))
    where = f"{', '.join(there[:-1])} and {there[-1]}"
    problem = f"engine.tensor_ranks {size}: ranks {first} to {last} are on {where}, and a group must share one machine"
    raise UserError(f"{problem}, because it exchanges activations in every block; {', or '.join(_ways(config, hosts))}")


def _ways(config: Config, hosts: Sequence[str]) -> list[str]:
    size, each = config.engine.tensor_ranks, Counter(hosts)
    neighbours = [len(list(run)) for _, run in itertools.groupby(hosts)]
    steps = []
    if any(count % size for count in each.values()):
        steps.append(f"start a multiple of {size} ranks on each machine")
    if len(neighbours) > len(each):
        steps.append("number the ranks machine by machine, as torchrun does, and srun with --distribution=block")
    near = _nearest(config, len(hosts), math.gcd(*neighbours))
    return [*([f"set {near}"] if near else []), " and ".join(steps)]


def _nearest(config: Config, ranks: int, together: int) -> str:
    """The number of tensor ranks nearest to the config's with which the run can start, as an override, and beside it
    the nearest micro-batch if the config's does not divide; empty if there is none. `together`: a divisor of all
    numbers of neighbouring ranks on one machine."""
    sizes = [size for size in config.model.ways_to_split() if together % size == 0]
    for size in sorted(sizes, key=lambda size: abs(size - config.engine.tensor_ranks)):
        other = dataclasses.replace(config, engine=dataclasses.replace(config.engine, tensor_ranks=size))
        words, mine = f"engine.tensor_ranks={size}", config.train.micro_batch
        shares = ranks // size
        if mine != AUTO and other.batch_sequences % shares == 0 and other.batch_sequences // shares % mine:
            near = divisors_around(other.batch_sequences // shares, mine)[0]
            other = dataclasses.replace(other, train=dataclasses.replace(other.train, micro_batch=near))
            words += f" train.micro_batch={near}"
        with contextlib.suppress(UserError):
            other.check_ranks(ranks)
            return words
    return ""
