"""The numbers of `megagpt bench`: lines as they come, a table, and a JSON file with every measured value."""

import json
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megagpt import __version__
from megagpt.console import warn
from megagpt.errors import UserError
from megagpt.files import named_path, now, write_atomic
from megagpt.measure.matrix_rate import matrix_flops
from megagpt.measure.steps import Measured, Row
from megagpt.timing import statistic, typical

_LEFT_ALIGNED = 2  # columns of the table


@dataclass
class Entry:
    """A row of the table, and what its processes have found so far."""

    row: Row
    setting: str = ""
    """In a sweep, the values of its axes."""
    setting_overrides: Sequence[str] = ()
    """The same as overrides of a config."""
    rounds: list[Measured] = field(default_factory=list)
    failure: str = ""
    """Why there are no more rounds."""
    heard: list[str] = field(default_factory=list)
    """Lines that its processes printed for people."""

    def __str__(self) -> str:
        return f"{self.row}, {self.setting}" if self.setting else str(self.row)

    @property
    def seconds(self) -> list[float]:
        return [s for measured in self.rounds for s in measured.seconds]

    @property
    def matrix_seconds(self) -> list[float]:
        """Of a step's matrix products, for each round in which they were timed."""
        found = [measured.matrix_seconds for measured in self.rounds]
        return [self.row.config.accumulation(1) * seconds for seconds in found if seconds is not None]

    @property
    def compiled(self) -> bool | None:
        """Whether its steps ran in compiled graphs. Before any has run: as its config says, None for auto."""
        if self.rounds:
            return self.rounds[0].compiled
        wanted = self.row.config.train.compile
        return wanted if isinstance(wanted, bool) else None

    def hear(self, lines: Sequence[str]) -> None:
        """Print lines of its processes, each of them once."""
        for line in lines:
            if line not in self.heard:
                self.heard.append(line)
                warn(f"  {line}")


@dataclass
class Report:
    """All rows, and where their numbers go."""

    device_type: str
    json: str
    """Path of the JSON file, "-" for stdout; empty: none."""
    sweeps: bool
    """Whether the rows differ in batch, compilation and activation checkpointing."""
    compile_by_default: bool
    overrides: Sequence[str]
    """Those of the command: every row of megagpt has them."""
    entries: list[Entry] = field(default_factory=list)

    def show(self, entry: Entry) -> None:
        """A row as it comes, in the table's own numbers, so that an interruption leaves what was measured."""
        cells = self._cells(entry)
        line = ", ".join(f"{name} {cell}" for name, cell in list(cells.items())[_LEFT_ALIGNED:] if cell)
        ratios = [
            f"megagpt is {against[entry.row.implementation]:.2f}x as fast"
            for other in self.entries
            if entry.row.implementation in (against := self._against(other)) and other.row.config == entry.row.config
        ]
        warn("  " + (entry.failure or ", ".join([line, *ratios])))
        if self.json and self.json != "-":
            write_atomic(named_path(self.json), self._json())

    def print(self) -> None:
        """The table, and the JSON if it goes to stdout."""
        out: Callable[[str], object] = warn if self.json == "-" else print
        for line in (*self._title(), *self._table()):
            out(line)
        if self.sweeps:
            best = self._best()
            out(f"best: {self.tokens_per_second(best):,.0f} tok/s with {' '.join(best.setting_overrides)}")
        if self.json == "-":
            sys.stdout.write(self._json().decode())

    def typical(self, entry: Entry) -> float:
        """Seconds of the step that counts: the best one on a CPU, the median on a GPU."""
        return typical(entry.seconds, self.device_type)

    def tokens_per_second(self, entry: Entry) -> float:
        return entry.row.config.train.batch_tokens / self.typical(entry)

    def numbers(self, entry: Entry) -> dict[str, Any]:
        """A row of the JSON file, with None for what was not measured."""
        row, rounds = entry.row, entry.rounds
        config, train = row.config, row.config.train
        own = row.implementation == "megagpt"
        values: dict[str, Any] = {
            "implementation": row.implementation,
            "engine": config.engine.name if own else None,
            "precision": train.precision,
            "residual": train.residual if own else "fp32",
            "float8": train.float8 if own else "none",
            "compile": entry.compiled,
            "activation_checkpointing": train.activation_checkpointing if own else "none",
            "tuned_allocator": row.tuned_allocator,
            "micro_batch": config.micro_batch,
            "accumulation": config.accumulation(1),
            "tokens_per_step": train.batch_tokens,
            "flops_per_step": train.batch_tokens * config.model.flops_per_token,
            "matrix_flops_per_step": matrix_flops(config.model, train.batch_tokens),
            "overrides": [*self.overrides, *entry.setting_overrides],
            "failure": entry.failure or None,
            "seconds": [measured.seconds for measured in rounds],
            "matrix_seconds": entry.matrix_seconds,
            **dict.fromkeys(_DERIVED),
        }
        if rounds:
            seconds = self.typical(entry)
            rate = values["flops_per_step"] / seconds
            peak = rounds[0].peak_flops
            against = self._against(entry)
            values |= {
                "best_seconds": min(entry.seconds),
                "median_seconds": statistics.median(entry.seconds),
                "tokens_per_second": train.batch_tokens / seconds,
                "flops_per_second": rate,
                "peak_flops_per_second": peak,
                "mfu": rate / peak if peak else None,
                "peak_memory_bytes": max(measured.memory for measured in rounds),
                "against": against or None,
                "vs_best_other": min(against.values(), default=None),
            }
            if entry.matrix_seconds:
                products = typical(entry.matrix_seconds, self.device_type)
                matrix_rate = values["matrix_flops_per_step"] / products
                values["products_share"] = products / seconds
                values["matrix_flops_per_second"] = matrix_rate
                values["of_matrix_rate"] = rate / matrix_rate
        return values

    def _against(self, entry: Entry) -> dict[str, float]:
        """For a row of megagpt, how many times as fast it is as each other row on the same work."""
        if entry.row.implementation != "megagpt" or not entry.rounds:
            return {}
        return {
            other.row.implementation: self.typical(other) / self.typical(entry)
            for other in self.entries
            if other.rounds and other is not entry and other.row.config == entry.row.config
        }

    def _cells(self, entry: Entry) -> dict[str, str]:
        n = self.numbers(entry)
        cells = {"implementation": n["implementation"], "precision": n["precision"]}
        if self.sweeps:
            accumulated = f"{n['accumulation']} x " if n["accumulation"] > 1 else ""
            cells["batch"] = f"{accumulated}{n['micro_batch']}"
        if self.sweeps or len(self._compiled()) > 1:
            cells["compile"] = _SWITCH[n["compile"]]
        if self.sweeps:
            cells["activation checkpointing"] = str(n["activation_checkpointing"])
        if not entry.rounds:
            return {**cells, "best s": entry.failure}
        return {
            **cells,
            "best s": f"{n['best_seconds']:.4f}",
            "median s": f"{n['median_seconds']:.4f}",
            "tok/s": f"{n['tokens_per_second']:,.0f}",
            "TFLOP/s": f"{n['flops_per_second'] / 1e12:.3f}",
            "MFU": f"{n['mfu']:.1%}" if n["mfu"] else "n/a",
            "products' share": f"{n['products_share']:.1%}" if n["products_share"] else "n/a",
            "peak GiB": f"{n['peak_memory_bytes'] / 2**30:.2f}",
            "vs best other": f"{n['vs_best_other']:.2f}x" if n["vs_best_other"] else "",
        }

    def _best(self) -> Entry:
        return max((entry for entry in self.entries if entry.rounds), key=self.tokens_per_second)

    def _compiled(self) -> set[bool | None]:
        return {entry.compiled for entry in self.entries if entry.rounds}

    def _title(self) -> list[str]:
        config = self.entries[0].row.config
        measured = next(measured for entry in self.entries for measured in entry.rounds)
        model, accumulation = config.model, config.accumulation(1)
        accumulated = f"{accumulation} x " if accumulation > 1 else ""
        batch = "" if self.sweeps else f"{accumulated}{config.micro_batch} x {model.context} tokens a step, "
        where = f"one rank, {measured.device}, {measured.threads} threads, torch {measured.torch_version}"
        compiled = ""
        if not self.sweeps and len(self._compiled()) == 1:
            default = " (the default here)" if self.compile_by_default else ""
            compiled = f", compile {_SWITCH[measured.compiled]}{default}"
        overrides = f", with {' '.join(self.overrides)}" if self.overrides else ""
        counted = f"speeds, shares and ratios are those of the {statistic(self.device_type)} step"
        reason = ", because a GPU is faster in its first seconds than its power limit allows for long"
        return [
            f"{model.preset}: {model.parameters:,} parameters, {batch}{where}{compiled}{overrides}",
            counted + (reason if self.device_type == "cuda" else ""),
        ]

    def _table(self) -> list[str]:
        rows = [self._cells(entry) for entry in self.entries]
        heads = next(list(row) for entry, row in zip(self.entries, rows, strict=True) if entry.rounds)
        if not any(row.get("vs best other") for row in rows):
            heads.remove("vs best other")
        failed = [not entry.rounds for entry in self.entries]
        later = [f"  then {entry.failure}" if entry.rounds and entry.failure else "" for entry in self.entries]
        lines = [heads, *([row.get(head, "") for head in heads] for row in rows)]
        # A failure may be a long sentence, and has its line to itself.
        full = [line for line, fails in zip(lines, (False, *failed), strict=True) if not fails]
        widths = [max(len(line[i]) for line in full) for i in range(len(heads))]
        return [
            "  ".join(
                cell.ljust(width) if i < _LEFT_ALIGNED else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            + failure
            for line, failure in zip(lines, ("", *later), strict=True)
        ]

    def _json(self) -> bytes:
        config = self.entries[0].row.config
        measured = next((measured for entry in self.entries for measured in entry.rounds), None)
        tree = {
            "date": now(),
            "command": shlex.join(sys.argv),
            "megagpt": __version__,
            "torch": measured.torch_version if measured else None,
            "device": measured.device if measured else None,
            "threads": measured.threads if measured else None,
            "statistic": statistic(self.device_type),
            "model": {
                **asdict(config.model),
                "parameters": config.model.parameters,
                "flops_per_token": config.model.flops_per_token,
            },
            "rows": [self.numbers(entry) for entry in self.entries],
            "best_overrides": list(self._best().setting_overrides) if self.sweeps and measured else None,
        }
        return (json.dumps(tree, indent=1) + "\n").encode()


# Keys of the JSON file's rows that follow from the measured ones.
_DERIVED = (
    "best_seconds", "median_seconds", "tokens_per_second", "flops_per_second", "peak_flops_per_second", "mfu",
    "products_share", "matrix_flops_per_second", "of_matrix_rate", "peak_memory_bytes", "against", "vs_best_other",
)  # fmt: skip
_SWITCH = {True: "on", False: "off", None: ""}


def check_json(name: str) -> None:
    """Raises UserError if the report cannot be written to a file of that name."""
    if not name or name == "-":
        return
    path = named_path(name)
    if not path.parent.is_dir():
        raise UserError(f"--json {name}: there is no folder {str(path.parent)!r}; make it, or name another file")
    if path.exists() and not path.is_file():
        raise UserError(f"--json {name}: is not a file; name a file, or - for stdout")
