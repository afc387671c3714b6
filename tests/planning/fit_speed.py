"""Fits the constants of the speed formulas to published speeds, and tries them on rows that the fit has not seen:
`python -m tests.planning.fit_speed` prints the tables of docs/planning.md."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from megagpt.planning.calibration import Calibration, calibration_of
from megagpt.planning.speed import step_parts
from megagpt.planning.work import count_work
from tests.planning.published import Row, hardware_flops, load_rows

# Where the fit begins: shares of a data sheet that are common, and bytes counted by hand. They also pull the fit, as
# measurements with a standard deviation of _PULL in the logarithm would.
START = {
    "products a100": 0.75, "products h100": 0.7, "attention a100": 0.3, "attention h100": 0.2,
    "half_tokens": 200.0, "other_bytes": 300.0, "logit_bytes": 36.0, "weight_bytes": 18.0,
    "link_share": 0.7, "hop": 5e-6, "overlap": 0.5,
}  # fmt: skip
_PULL = 0.5
# Errors (of the logarithm) beyond which a row counts less and less: one code in ten is another generation's.
_SCALE = 0.06
_STEPS, _DIFFERENCE = 12, 1e-4
FOLDS, SEEDS = 5, (0, 1, 2)


class Rows:
    """Rows with their counts, which no constant changes."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self.works = [count_work(row.config, row.cluster.gpus) for row in rows]
        self.measured = np.log([row.tokens_per_second for row in rows])
        self.sources = np.array([row.source for row in rows])

    def predict(self, logs: np.ndarray, which: np.ndarray) -> np.ndarray:
        """Logarithm of the tokens/s of some rows."""
        values = dict(zip(START, np.exp(logs).tolist(), strict=True))
        shared = {name: value for name, value in values.items() if " " not in name}
        by_gpu = {}
        for index in which:
            gpu = self.rows[index].cluster.gpu
            if gpu.name not in by_gpu:
                chip = gpu.name.split("-")[0]
                shares = {name: values[f"{name} {chip}"] for name in ("products", "attention")}
                by_gpu[gpu.name] = dataclasses.replace(calibration_of(gpu), **shares, **shared)
        return np.array([self._log_speed(index, by_gpu[self.rows[index].cluster.gpu.name]) for index in which])

    def _log_speed(self, index: int, calibration: Calibration) -> float:
        row = self.rows[index]
        step = sum(step_parts(self.works[index], row.config, row.cluster, calibration).seconds.values())
        return float(np.log(row.config.train.batch_tokens / step))


def fit(rows: Rows, which: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    """Logarithms of the constants that minimise a Cauchy loss of the rows' errors: Gauss-Newton steps with weights,
    halved until the loss falls."""
    middle = np.log(list(START.values()))
    logs = middle if start is None else start

    def loss(logs: np.ndarray, errors: np.ndarray) -> float:
        return float(np.log1p((errors / _SCALE) ** 2).sum() + (((logs - middle) / _PULL) ** 2).sum())

    errors = rows.predict(logs, which) - rows.measured[which]
    current = loss(logs, errors)
    for _ in range(_STEPS):
        moved = [logs + _DIFFERENCE * unit for unit in np.eye(len(logs))]
        slopes = np.stack([rows.predict(m, which) - rows.measured[which] - errors for m in moved], axis=1) / _DIFFERENCE
        weights = 1 / (_SCALE**2 + errors**2)
        normal = (slopes * weights[:, None]).T @ slopes + np.eye(len(logs)) / _PULL**2
        step = np.linalg.solve(normal, -(slopes * weights[:, None]).T @ errors - (logs - middle) / _PULL**2)
        for halvings in range(6):
            tried = logs + step / 2**halvings
            tried_errors = rows.predict(tried, which) - rows.measured[which]
            if loss(tried, tried_errors) < current:
                break
        else:
            return logs
        gained = current - loss(tried, tried_errors)
        logs, errors, current = tried, tried_errors, current - gained
        if gained < 1e-4 * current:
            return logs
    return logs


def left_out(rows: Rows, groups: Sequence[np.ndarray], start: np.ndarray) -> np.ndarray:
    """Each row's predicted over its measured speed, by a fit to the rows outside its group."""
    ratios = np.full(len(rows.rows), np.nan)
    everything = np.arange(len(rows.rows))
    for group in groups:
        logs = fit(rows, np.setdiff1d(everything, group), start)
        ratios[group] = np.exp(rows.predict(logs, group) - rows.measured[group])
    return ratios


def by_source(rows: Rows) -> list[np.ndarray]:
    return [np.flatnonzero(rows.sources == source) for source in dict.fromkeys(rows.sources)]


def by_folds(rows: Rows, seed: int) -> list[np.ndarray]:
    shuffled = np.random.default_rng(seed).permutation(len(rows.rows))
    return [shuffled[fold::FOLDS] for fold in range(FOLDS)]


def constant_left_out(rows: Rows, groups: Sequence[np.ndarray]) -> np.ndarray:
    """The same ratios for one share of the peak for each GPU: the median share of the hardware FLOPs."""
    ratios = np.full(len(rows.rows), np.nan)
    peaks = np.array([row.cluster.gpus * row.cluster.gpu.half / hardware_flops(row) for row in rows.rows])
    chips = np.array([row.cluster.gpu.name.split("-")[0] for row in rows.rows])
    shares = np.exp(rows.measured) / peaks
    for group in groups:
        others = np.setdiff1d(np.arange(len(rows.rows)), group)
        for index in group:
            same = others[chips[others] == chips[index]]
            ratios[index] = np.median(shares[same]) / shares[index]
    return ratios


def errors_of(ratios: np.ndarray) -> tuple[float, float]:
    """Median and 90th percentile of the relative error."""
    errors = np.abs(ratios - 1)
    return float(np.median(errors)), float(np.quantile(errors, 0.9))


def main() -> None:
    rows = Rows(load_rows())
    everything = np.arange(len(rows.rows))
    full = fit(rows, everything)
    for name, value in zip(START, np.exp(full), strict=True):
        print(f"{name:16s} {value:.4g}")
    folds = np.mean([left_out(rows, by_folds(rows, seed), full) for seed in SEEDS], axis=0)
    sources = left_out(rows, by_source(rows), full)
    fitted = np.exp(rows.predict(full, everything) - rows.measured)
    print("\n| source | rows | fitted | by folds | by source |\n|---|---|---|---|---|")
    for name in [*dict.fromkeys(rows.sources), "all rows"]:
        of = np.full(len(rows.rows), True) if name == "all rows" else rows.sources == name
        print(f"| {name} | {of.sum()} |", " | ".join(_cell(ratios[of]) for ratios in (fitted, folds, sources)), "|")
    constant = [constant_left_out(rows, groups) for groups in (by_folds(rows, 0), by_source(rows))]
    print(f"| one share of the peak for each GPU | {len(rows.rows)} | |", " | ".join(map(_cell, constant)), "|")


def _cell(ratios: np.ndarray) -> str:
    return ", ".join(f"{error:.1%}" for error in errors_of(ratios))


if __name__ == "__main__":
    main()
