"""Resumes every engine's checkpoint under every engine, and compares with a plain process that never stopped."""

import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from megagpt.measure.cases import ENGINE_CASES, SAVED_AT, STEPS, Case, Curve, difference
from megagpt.measure.processes import run_cases

WORLDS = (1, 2, 4)
TOLERANCE = 5e-6  # of the loss, in fp32


class Setting(NamedTuple):
    """An engine and its number of ranks."""

    engine: str
    ranks: int

    def case(self, steps: int, saved_at: int, *runs: Path) -> Case:
        engine = dict(ENGINE_CASES[self.engine].engine)
        if "shard_ranks" in engine:  # two copies of the model, if there are ranks for two
            engine["shard_ranks"] = max(1, self.ranks // 2)
        return Case(engine, self.ranks, runs=tuple(map(str, runs)), steps=steps, saved_at=saved_at)


SETTINGS = [
    Setting(name, ranks) for name, case in ENGINE_CASES.items() for ranks in ((case.ranks,) if case.fixed else WORLDS)
]
Crossing = tuple[Setting, Setting]


class Result(NamedTuple):
    """The steps after a crossing, compared."""

    difference: float
    """Largest difference of the loss from the plain process."""
    same_bits: bool
    """Whether losses and norms equal, bit for bit, those of the source if it continues without a stop."""


def cross(
    crossings: Sequence[Crossing],
    progress: Callable[[], object] = lambda: None,
    steps: int = STEPS,
    saved_at: int = SAVED_AT,
) -> dict[Crossing, Result]:
    """Save at each source after `saved_at` steps, resume at each target, and take `steps` there. Raises UserError if a
    rank fails."""
    (plain,) = run_cases("plain", [Case({}, 1, steps=steps, saved_at=saved_at)])
    sources, targets = (sorted(set(side), key=lambda s: (s.ranks, s.engine)) for side in zip(*crossings, strict=True))
    into = {target: [source for source, t in crossings if t == target] for target in targets}
    with tempfile.TemporaryDirectory() as folder:
        runs = {s: Path(folder, f"{s.engine} {s.ranks}".replace(" ", "-")) for s in sources}
        curves = run_cases("saved", [source.case(steps, saved_at, runs[source]) for source in sources], progress)
        went_on: dict[Setting, Curve] = dict(zip(sources, curves, strict=True))
        loads = [target.case(steps, saved_at, *(runs[source] for source in into[target])) for target in targets]
        resumed = run_cases("resumed", loads, progress)
    results = {}
    for target, curves in zip(targets, resumed, strict=True):
        for source, curve in zip(into[target], curves, strict=True):
            largest, _ = difference(curve, plain[saved_at:])
            results[source, target] = Result(largest, curve == went_on[source][saved_at:])
    return results


def kind_of(setting: Setting) -> str:
    """The table's row of a setting: its engine; one for all layouts of tensor ranks."""
    case = ENGINE_CASES[setting.engine]
    return f"{case.engine['name']} tensor" if case.fixed else case.name


def crossing_table() -> tuple[list[list[str]], bool]:
    """Title and rows for people, of all crossings, and whether all are within tolerance."""
    with tqdm(total=2 * len(SETTINGS), unit="engine", desc="crossings", disable=None) as bar:
        results = cross(list(itertools.product(SETTINGS, SETTINGS)), bar.update)
    title = (
        f"checkpoints: largest difference of the loss from one plain process over the {STEPS} steps after a resume; "
        "row: the engine that saved; column: the engine that resumed, each on 1, 2 and 4 ranks, or in each of its "
        "layouts of tensor ranks; = means that the same engine on the same ranks resumed bit for bit"
    )
    kinds = list(dict.fromkeys(map(kind_of, SETTINGS)))
    table = [[title], ["saved by", *kinds]]
    for source in kinds:
        table.append([source])
        for target in kinds:
            found = {key: r for key, r in results.items() if (kind_of(key[0]), kind_of(key[1])) == (source, target)}
            exact = source == target and all(r.same_bits for (a, b), r in found.items() if a == b)
            table[-1].append(f"{max(r.difference for r in found.values()):.1e}" + (" =" if exact else ""))
    within = all(r.difference <= TOLERANCE and (r.same_bits or a != b) for (a, b), r in results.items())
    return table, within
