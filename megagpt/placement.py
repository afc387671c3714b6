"""The machines of a run's ranks: the tensor ranks of a group exchange activations in every block, so they share one."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Sequence

from megagpt.config import Config
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
    return [*(f"set engine.tensor_ranks={other}" for other in near), " and ".join(steps)]


def _nearest(config: Config, ranks: int, together: int) -> list[int]:
    """The number of tensor ranks nearest to the config's with which the run can start, if there is one. `together`: a
    divisor of all numbers of neighbouring ranks on one machine."""

    def works(size: int) -> bool:
        engine = dataclasses.replace(config.engine, tensor_ranks=size)
        try:
            dataclasses.replace(config, engine=engine).check_ranks(ranks)
        except UserError:
            return False
        return True

    near = sorted(config.model.ways_to_split(), key=lambda size: abs(size - config.engine.tensor_ranks))
    return [size for size in near if together % size == 0 and works(size)][:1]
