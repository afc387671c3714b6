"""Every engine's checkpoint under every other: what follows a resume, beside one plain process that never stopped."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from megagpt.measure.cases import ENGINE_CASES, SAVED_AT, STEPS, Case
from megagpt.measure.processes import run_cases

WORLDS = (1, 2, 4)
TOLERANCE = 5e-6  # of the loss, in fp32
Curve = list[tuple[float, float]]


class Setting(NamedTuple):
    """An engine and its number of ranks."""

    engine: str
    ranks: int

    def case(self, *runs: Path) -> Case:
        engine = dict(ENGINE_CASES[self.engine].engine)
        if "shard_ranks" in engine:  # two copies of the model, if there are ranks for two
            engine["shard_ranks"] = max(1, self.ranks // 2)
        return Case(engine, self.ranks, runs=tuple(map(str, runs)))


SETTINGS = [Setting(name, ranks) for name in ENGINE_CASES for ranks in WORLDS]
Crossing = tuple[Setting, Setting]
ALL = [(source, target) for source in SETTINGS for target in SETTINGS]
# Every pair of engines once, every pair of world sizes equally often.
PAIRS = [
    (Setting(source, WORLDS[(i + j) % 3]), Setting(target, WORLDS[(i + j // 3 + 2 * (j % 3)) % 3]))
    for i, source in enumerate(ENGINE_CASES)
    for j, target in enumerate(ENGINE_CASES)
]


class Result(NamedTuple):
    """What followed a crossing."""

    difference: float
    """Largest difference of the loss from the plain process."""
    same_bits: bool
    """Whether losses and norms are those of the source itself, had it gone on, to the last bit."""


def cross(
    crossings: Sequence[Crossing], progress: Callable[[int], object] = lambda count: None
) -> dict[Crossing, Result]:
    """Save at each source, resume at each target. Raises UserError if a rank fails."""
    (plain,) = run_cases("plain", [Case({}, 1)])
    went_on: dict[Setting, Curve] = {}
    results: dict[Crossing, Result] = {}
    with tempfile.TemporaryDirectory() as folder:

        def run(setting: Setting) -> Path:
            return Path(folder) / f"{setting.engine} {setting.ranks}".replace(" ", "-")

        for ranks in WORLDS:
            sources = sorted({source for source, _ in crossings if source.ranks == ranks})
            if sources:
                curves = run_cases("saved", [setting.case(run(setting)) for setting in sources], lambda: progress(1))
                went_on |= zip(sources, curves, strict=True)
        for ranks in WORLDS:
            targets = sorted({target for _, target in crossings if target.ranks == ranks})
            into = {target: [source for source, t in crossings if t == target] for target in targets}
            cases = [target.case(*(run(source) for source in into[target])) for target in targets]
            if not cases:
                continue
            for target, curves in zip(targets, run_cases("resumed", cases, lambda: progress(1)), strict=True):
                for source, curve in zip(into[target], curves, strict=True):
                    losses = zip(curve, plain[SAVED_AT:], strict=True)
                    largest = max(abs(ours[0] - theirs[0]) for ours, theirs in losses)
                    results[source, target] = Result(largest, curve == went_on[source][SAVED_AT:])
    return results


def crossing_table() -> tuple[Iterator[list[str]], bool]:
    """Rows for people, of all crossings, and whether all are within tolerance."""
    with tqdm(total=2 * len(SETTINGS), unit="engine", desc="crossings", disable=None) as bar:
        results = cross(ALL, bar.update)
    within = all(result.difference <= TOLERANCE for result in results.values()) and all(
        result.same_bits for (source, target), result in results.items() if source == target
    )
    return _rows(results), within


def _rows(results: dict[Crossing, Result]) -> Iterator[list[str]]:
    yield [
        f"checkpoints: largest difference of the loss from one plain process over the {STEPS} steps after a resume; "
        "rows saved it, columns resumed it, each on 1, 2 and 4 ranks (the largest of 9 crossings); = says that the "
        "same engine on the same number of ranks went on bit for bit"
    ]
    yield ["saved by", *ENGINE_CASES]
    for source in ENGINE_CASES:
        cells = []
        for target in ENGINE_CASES:
            found = {key: r for key, r in results.items() if (key[0].engine, key[1].engine) == (source, target)}
            exact = source == target and all(r.same_bits for (a, b), r in found.items() if a == b)
            cells.append(f"{max(r.difference for r in found.values()):.1e}" + (" =" if exact else ""))
        yield [source, *cells]
