"""The speed formulas on published speeds that their fit has not seen."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megagpt.planning.calibration import EVIDENCE, calibrated, calibration_of
from megagpt.planning.evidence import engine_family
from megagpt.planning.gpus import Cluster, find_gpu
from megagpt.planning.speed import predict_speed
from tests.planning.fit_speed import (
    SEEDS,
    START,
    Rows,
    by_folds,
    by_source,
    constant_left_out,
    errors_of,
    fit,
    left_out,
)
from tests.planning.published import Row, load_rows

PAGE = Path(__file__).resolve().parents[2] / "docs" / "planning.md"


@dataclass(frozen=True)
class Trial:
    """Predicted over measured speed of each row."""

    rows: Rows
    constants: np.ndarray
    folds: np.ndarray
    """Two-dimensional: seeds, rows."""
    sources: np.ndarray


@pytest.fixture(scope="module")
def trial() -> Trial:
    rows = Rows(load_rows())
    constants = fit(rows, np.arange(len(rows.rows)))
    folds = np.stack([left_out(rows, by_folds(rows, seed), constants) for seed in SEEDS])
    return Trial(rows, constants, folds, left_out(rows, by_source(rows), constants))


def in_force(name: str) -> float:
    """A constant's value in the package."""
    field, _, chip = name.partition(" ")
    return float(getattr(calibration_of(find_gpu({"": "h100", "h100": "h100", "a100": "a100-80gb"}[chip])), field))


def resembles(row: Row, gpu: str, engine: str) -> bool:
    return (row.cluster.gpu.name, engine_family(row.config)) == (gpu, engine)


def test_the_rows_are_read_as_they_were_published() -> None:
    rows = load_rows()
    assert len(rows) == 188
    first = next(row for row in rows if (row.model, row.cluster.gpus) == ("MPT-70b", 512))
    assert first.tokens_per_second == 1007 * 512
    # 176 billion parameters and full recomputation: the rule of 8 P FLOPs a token, within attention's share.
    chart = next(row for row in rows if row.source == "FSDP paper" and row.config.micro_batch == 2)
    assert chart.tokens_per_second / 512 == pytest.approx(186e12 / (8 * 175.2e9), rel=0.04)


@pytest.mark.slow
def test_the_constants_in_force_are_those_of_the_fit(trial: Trial) -> None:
    for name, log in zip(START, trial.constants, strict=True):
        assert in_force(name) == pytest.approx(np.exp(log), rel=0.02), name


@pytest.mark.slow
def test_rows_that_the_fit_has_not_seen_are_met(trial: Trial) -> None:
    median, most = errors_of(trial.folds.mean(axis=0))
    assert median < 0.035
    assert most < 0.13
    constant = errors_of(constant_left_out(trial.rows, by_folds(trial.rows, 0)))
    assert median < constant[0] / 2
    assert most < constant[1] / 2


@pytest.mark.slow
def test_sources_that_the_fit_has_not_seen_are_met(trial: Trial) -> None:
    median, most = errors_of(trial.sources)
    assert median < 0.04
    assert most < 0.15
    constant = errors_of(constant_left_out(trial.rows, by_source(trial.rows)))
    assert median < constant[0] / 2
    assert most < constant[1] / 2


@pytest.mark.slow
def test_the_narrow_ranges_hold_about_four_in_five_rows(trial: Trial) -> None:
    folds = sources = rows = 0.0
    for evidence in EVIDENCE:
        of = np.array([resembles(row, evidence.gpu, evidence.engine) for row in trial.rows.rows])
        of &= np.array([row.source.startswith(("llm-foundry", "DeepSpeed Azure")) for row in trial.rows.rows])
        assert of.sum() == evidence.rows
        low, high = evidence.range
        inside = [(low <= 1 / ratios) & (1 / ratios <= high) for ratios in (trial.folds[:, of], trial.sources[of])]
        assert 0.8 <= inside[0].mean() <= 0.95, evidence
        assert inside[1].mean() >= 0.7, evidence
        folds, sources, rows = folds + inside[0].mean() * of.sum(), sources + inside[1].sum(), rows + of.sum()
    assert 0.85 <= folds / rows <= 0.95
    assert 0.75 <= sources / rows <= 0.9


@pytest.mark.slow
def test_the_wide_range_holds_most_sources(trial: Trial) -> None:
    medians = [np.median(1 / trial.sources[group]) for group in by_source(trial.rows)]
    assert np.mean([0.7 <= median <= 1.3 for median in medians]) >= 0.7
    assert np.mean(np.abs(1 / trial.sources - 1) <= 0.3) > 0.9


@pytest.mark.slow
def test_a_row_calibrates_the_others_of_its_code_and_gpu(trial: Trial) -> None:
    """By constants that have seen none of that code's rows. The plan says how near all pairs are."""
    kinds = np.array([f"{row.source}, {row.cluster.gpu.name}" for row in trial.rows.rows])
    errors = []
    for kind in set(kinds):
        ratios = trial.sources[kinds == kind]
        pairs = np.abs(ratios[:, None] / ratios[None, :] - 1)
        errors.extend(pairs[~np.eye(len(ratios), dtype=bool)])
    assert np.quantile(errors, 0.9) < 0.15
    config, gpu = trial.rows.rows[0].config, find_gpu("h100")
    plan = predict_speed(config, Cluster(gpu, 128), calibrated(calibration_of(gpu), 1.1, "mine"))
    said = f"nine in ten pairs of published speeds of one code on one GPU were that near ({np.median(errors):.0%} at"
    assert f"{said} the median, {max(errors):.0%} at most)" in plan.evidence


def test_the_evidence_table_says_what_the_rows_say() -> None:
    rows = [row for row in load_rows() if row.source.startswith(("llm-foundry", "DeepSpeed Azure"))]
    assert {(row.cluster.gpu.name, engine_family(row.config)) for row in rows} == {e[:2] for e in EVIDENCE}
    for evidence in EVIDENCE:
        same = [row for row in rows if resembles(row, evidence.gpu, evidence.engine)]
        counts = {
            "parameters": [row.config.model.stored_parameters for row in same],
            "gpus": [row.cluster.gpus for row in same],
            "context": [row.config.model.context for row in same],
            "tokens": [row.config.model.context * row.config.micro_batch for row in same],
        }
        for name, values in counts.items():
            assert getattr(evidence, name) == pytest.approx((min(values), max(values)), rel=0.05)
        assert {row.cluster.network for row in same} == {evidence.network}
        for row in same:
            speed = predict_speed(row.config, row.cluster)
            assert speed.range == pytest.approx([bound * speed.tokens_per_second for bound in evidence.range])


def test_speeds_in_float8_are_met() -> None:
    rows = load_rows(float8=True)
    assert len(rows) == 5
    ratios = [predict_speed(row.config, row.cluster).tokens_per_second / row.tokens_per_second for row in rows]
    assert np.abs(np.array(ratios) - 1).max() < 0.06


def test_speeds_with_tensor_ranks_are_missed_as_the_page_says() -> None:
    text = PAGE.read_text(encoding="utf-8").partition("### Tensor ranks")[2]
    shown = re.findall(r"^\| ([^|]+) \| ([^|]+) \| (\d+) \| (\d+) \| ([\d,]+) \| ([+-]\d+)% \|$", text, re.MULTILINE)
    rows = load_rows(tensor=True)
    assert len(shown) == len(rows)
    for cells, row in zip(shown, rows, strict=True):
        speed, gpus = predict_speed(row.config, row.cluster), row.cluster.gpus
        assert cells[:4] == (row.source, row.model, str(gpus), str(row.config.engine.tensor_ranks))
        assert row.tokens_per_second / gpus == pytest.approx(float(cells[4].replace(",", "")), abs=0.6)
        assert 100 * (speed.tokens_per_second / row.tokens_per_second - 1) == pytest.approx(float(cells[5]), abs=0.6)
        assert [bound / speed.tokens_per_second for bound in speed.range] == pytest.approx([0.7, 1.3])


@pytest.mark.slow
def test_the_page_shows_the_numbers_of_this_fit(trial: Trial) -> None:
    text = PAGE.read_text(encoding="utf-8")
    shown = {
        "all rows": np.ones(len(trial.rows.rows), dtype=bool),
        **{f"{source}": trial.rows.sources == source for source in dict.fromkeys(trial.rows.sources)},
    }
    for name, of in shown.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        numbers = [float(number) / 100 for number in re.findall(r"(\d+\.\d)%", line)]
        computed = [*errors_of(trial.folds.mean(axis=0)[of]), *errors_of(trial.sources[of])]
        assert numbers[-4:] == pytest.approx(computed, abs=0.006), name
