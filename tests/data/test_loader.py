"""Batches depend on the sequence number alone: not on ranks, resumes, micro-batches, or the size of the corpus."""

import collections
import contextlib
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.config import Config, SkipConfig
from megagpt.config_file import build_config
from megagpt.data.loader import (
    Batch,
    Corpus,
    Share,
    open_corpus,
    train_batches,
    validation_corpus,
    validation_sequences,
)
from megagpt.data.order import locate
from megagpt.data.token_stream import TokenStream
from megagpt.evaluation.validation import validation_loss
from megagpt.schedule import batch_sequences
from megagpt.world import World
from tests.data.folders import CONTEXT, data_of, write_bin

IGNORE = -100


def counted_rows(batches: list[Batch]) -> collections.Counter[tuple[int, ...]]:
    """The sequences that count: inputs and the last target."""
    found: collections.Counter[tuple[int, ...]] = collections.Counter()
    for batch in batches:
        for tokens, targets in batch.micro_batches:
            for x, y in zip(tokens.tolist(), targets.tolist(), strict=True):
                if y != [IGNORE] * len(y):
                    assert IGNORE not in y, "a row counts as a whole or not at all"
                    assert x[1:] == y[:-1], "targets are the inputs, shifted by one"
                    found[(*x, y[-1])] += 1
    return found


def rows_of(corpus: Corpus, numbers: np.ndarray) -> collections.Counter[tuple[int, ...]]:
    return collections.Counter(map(tuple, corpus.rows(numbers).tolist()))


def config_of(total: int, batch: int, ramp: tuple[int, int]) -> Config:
    """A run of `total` sequences in batches of `batch`, growing from ramp[0] over ramp[1] sequences."""
    return build_config(
        {
            "model": {"layers": 1, "width": 8, "heads": 1, "context": CONTEXT},
            "train": {
                "tokens": total * CONTEXT,
                "batch_tokens": batch * CONTEXT,
                "batch_ramp_start": ramp[0] * CONTEXT,
                "batch_ramp_tokens": ramp[1] * CONTEXT,
                "precision": "fp32",
            },
            "schedule": {"warmup_tokens": 1, "decay_end_tokens": total * CONTEXT + 1},
        },
        "test",
    )


def steps_of(corpus: Corpus, config: Config, start: int, share: Share) -> list[Batch]:
    def size(seen: int) -> int:
        return batch_sequences(config, seen)

    return list(train_batches(corpus, start, config.total_sequences, size, share))


def shapes_of(batch: Batch) -> list[torch.Size]:
    return [tokens.shape for tokens, _ in batch.micro_batches]


def shares_of(ranks: int, micro_batch: int) -> list[Share]:
    return [Share(rank, ranks, micro_batch) for rank in range(ranks)]


# --- one rank or many ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_steps_do_not_depend_on_ranks_or_resumes(mixture: Corpus, data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 12), label="batch")
    total = data.draw(st.integers(batch, 80), label="total")
    ramp_start = data.draw(st.integers(1, batch), label="ramp start")
    ramp_sequences = data.draw(st.integers(1, 100), label="ramp")
    ramp = data.draw(st.sampled_from([(0, 0), (ramp_start, ramp_sequences)]), label="ramped")
    config = config_of(total, batch, ramp)
    alone = steps_of(mixture, config, 0, Share(0, 1, 1))
    assert sum(step.sequences for step in alone) == total
    starts = np.cumsum([0, *(step.sequences for step in alone)]).tolist()

    resumed = data.draw(st.integers(0, len(alone) - 1), label="resumed at step")
    shares = shares_of(data.draw(st.integers(1, 7), label="ranks"), data.draw(st.integers(1, 5), label="micro-batch"))
    ranks = [steps_of(mixture, config, starts[resumed], share) for share in shares]
    for number, expected in enumerate(alone[resumed:]):
        step = [batches[number] for batches in ranks]
        numbers = np.arange(starts[resumed + number], starts[resumed + number] + expected.sequences)
        assert counted_rows(step) == counted_rows([expected]) == rows_of(mixture, numbers)
        assert {(b.sequences, b.tokens) for b in step} == {(expected.sequences, expected.sequences * CONTEXT)}
        assert len({tuple(shapes_of(b)) for b in step}) == 1
    assert {len(batches) for batches in ranks} == {len(alone) - resumed}


@given(
    first=st.integers(0, 10**6),
    sequences=st.integers(1, 60),
    ranks=st.integers(1, 9),
    micro_batch=st.integers(1, 12),
)
@settings(max_examples=100, deadline=None)
def test_shapes_are_alike_and_as_small_as_the_longest_share(
    mixture: Corpus, first: int, sequences: int, ranks: int, micro_batch: int
) -> None:
    counted, shapes = [], set()
    for share in shares_of(ranks, micro_batch):
        batch = mixture.batch(range(first, first + sequences), share)
        shapes.add(tuple(shapes_of(batch)))
        for tokens, targets in batch.micro_batches:
            assert tokens.shape == targets.shape
            assert tokens.dtype == targets.dtype == torch.int64
            assert tokens.min() >= 0, "padding must still be a token that has an embedding"
            assert tokens.max() < 50257
            assert targets.is_contiguous()
        counted.append(sum(counted_rows([batch]).values()))
    assert sum(counted) == sequences
    assert max(counted) - min(counted) <= 1
    ((shape, *others),) = shapes
    assert set(others) <= {shape}
    count, rows = len(others) + 1, (len(others) + 1) * shape[0]
    assert shape[0] <= micro_batch
    assert (count - 1) * micro_batch < max(counted) <= rows < max(counted) + count
    if sequences % (ranks * micro_batch) == 0:
        assert shape == (micro_batch, CONTEXT), "full micro-batches stay whole"


def test_sixteen_sequences_on_128_shares_are_one_row_each(mixture: Corpus) -> None:
    """Of GPT-3 175B's first batch, with a micro-batch of 12: 128 rows are computed, not 1,536."""
    batches = [mixture.batch(range(16), share) for share in shares_of(128, 12)]
    assert [shapes_of(batch) for batch in batches] == [[(1, CONTEXT)]] * 128
    assert counted_rows(batches[:16]) == counted_rows(batches) == rows_of(mixture, np.arange(16))


def test_a_last_batch_has_the_shapes_of_those_before(mixture: Corpus) -> None:
    """So that a compiled model is not compiled again for it."""
    for compiled in (False, True):
        shapes = list(map(shapes_of, steps_of(mixture, config_of(53, 16, (0, 0)), 0, Share(0, 2, 4, compiled))))
        assert shapes == [[(4, CONTEXT)] * count for count in (2, 2, 2, 1)]


def test_rows_are_the_numbered_sequences_of_the_files(mixture: Corpus, folders: list[Path]) -> None:
    """Against the files' own tokens: a sequence is context + 1 tokens at a multiple of the context of one source."""
    whole = [np.arange(0, 1701), np.arange(10_000, 10_161), np.arange(20_000, 20_700)]
    valid = {tuple(w[i : i + CONTEXT + 1]) for w in whole for i in range(0, len(w) - CONTEXT, CONTEXT)}
    assert mixture.sizes == [212, 20, 87]
    found = collections.Counter(map(tuple, mixture.rows(np.arange(400)).tolist()))
    assert set(found) <= valid
    assert sum(row[0] < 10_000 for row in found.elements()) == 200
    first_source = collections.Counter(r for r in map(tuple, mixture.rows(np.arange(424)).tolist()) if r[0] < 10_000)
    assert set(first_source.values()) == {1}, "212 sequences of the first source, each once"
    assert len(first_source) == 212


def test_a_batch_may_be_larger_than_the_corpus(folders: list[Path]) -> None:
    corpus = open_corpus(data_of(folders[1:2]), "train", CONTEXT, seed=0)
    (size,) = corpus.sizes
    rows = counted_rows([corpus.batch(range(3 * size), Share(0, 1, 3 * size))])
    assert len(rows) == size
    assert set(rows.values()) == {3}


def test_the_seed_alone_decides_the_order(folders: list[Path]) -> None:
    rows = [open_corpus(data_of(folders), "train", CONTEXT, seed).rows(np.arange(100)).tolist() for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]


# --- validation ------------------------------------------------------------------------------------------------------


def check_validation(sizes: list[int], weights: list[int], tokens: int) -> None:
    corpus = Corpus([OfSize(str(s), [], "", size=size) for s, size in enumerate(sizes)], weights, CONTEXT, 0)
    count = validation_sequences(corpus, tokens)
    assert 0 <= count <= tokens // CONTEXT
    source, index = locate(np.arange(count), corpus.sizes, weights, 0) if count else ([], [])
    assert len(set(zip(source, index, strict=True))) == count
    # As many as wanted, or some source is used up, but for the sequences that rounding may leave.
    total, error = sum(weights), (len(sizes) - 1).bit_length()
    assert count == tokens // CONTEXT or any(
        size - count * weight / total <= error + weight / total + 1
        for size, weight in zip(corpus.sizes, weights, strict=True)
    )
    if len(sizes) == 1:
        assert count == min(tokens // CONTEXT, corpus.sizes[0])


@given(
    pairs=st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 1000)), min_size=1, max_size=7),
    tokens=st.one_of(st.integers(0, 30_000), st.just(10**12)),
)
@settings(max_examples=100, deadline=None)
def test_validation_never_repeats_a_sequence(pairs: list[tuple[int, int]], tokens: int) -> None:
    check_validation([size for size, _ in pairs], [weight for _, weight in pairs], tokens)


@given(weights=st.lists(st.integers(1, 60), min_size=2, max_size=9), parts=st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_validation_stops_before_any_of_several_sources_repeats(weights: list[int], parts: int) -> None:
    """Sizes in proportion to the weights: one sequence too many of any source would be a repeated one."""
    check_validation([max(2, parts * weight * CONTEXT // 4) for weight in weights], weights, 10**12)


class OfSize(TokenStream):
    """A stream with a size but no tokens."""

    def __init__(self, *arguments: Any, size: int) -> None:
        super().__init__(*arguments)
        self._starts = [0, size]


def test_validation_is_the_same_on_any_number_of_ranks(folders: list[Path]) -> None:
    corpus = open_corpus(data_of(folders), "val", CONTEXT, seed=0)
    count = validation_sequences(corpus, 10**9)
    assert count > 10
    expected = counted_rows([corpus.batch(range(count), Share(0, 1, count))])
    assert set(expected.values()) == {1}
    for ranks, micro_batch in ((2, 3), (3, 1), (5, 4), (count + 1, 2)):
        batches = [corpus.batch(range(count), share) for share in shares_of(ranks, micro_batch)]
        assert counted_rows(batches) == expected


@pytest.mark.parametrize(
    ("sequences", "compiled", "size", "count"),
    [(12, False, 12, 1), (5, False, 5, 1), (5, True, 6, 1), (25, False, 9, 3), (24, False, 12, 2), (25, True, 12, 3)],
)
def test_validation_is_cut_into_micro_batches_of_one_shape(
    mixture: Corpus, sequences: int, compiled: bool, size: int, count: int
) -> None:
    """With a micro-batch of 12, beside a model whose loss is 1 for each token that counts."""
    shapes = []

    def model(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        shapes.append(tokens.shape)
        return (targets != IGNORE).sum()

    share, evaluation = Share(0, 1, 12, compiled), contextlib.nullcontext
    engine: Any = SimpleNamespace(world=World.alone(), share=share, evaluation=lambda: evaluation(model))
    assert validation_loss(engine, mixture, sequences) == 1
    assert shapes == [(size, CONTEXT)] * count


def test_sources_without_held_out_text_leave_validation_to_the_others(folders: list[Path], tmp_path: Path) -> None:
    """None, less than a sequence, and no more than rounding may take."""
    for name, held_out in (("none", 0), ("short", CONTEXT), ("one", CONTEXT + 1)):
        (tmp_path / name).mkdir()
        write_bin(tmp_path / name / "x_train_0.bin", np.arange(100) + len(name))
        if held_out:
            write_bin(tmp_path / name / "x_val_0.bin", np.arange(held_out))
        corpus = open_corpus(data_of([tmp_path / name, folders[0]]), "val", CONTEXT, seed=0)
        usable = validation_corpus(corpus)
        count = validation_sequences(usable, 10**9)
        assert count == 12  # 100 tokens of the other source
        assert set(usable.rows(np.arange(count)).ravel().tolist()) <= set(range(5000, 5100))
        nothing = validation_corpus(open_corpus(data_of([tmp_path / name]), "val", CONTEXT, seed=0))
        assert validation_sequences(nothing, 10**9) == (1 if name == "one" else 0)


def test_sources_with_held_out_text_are_all_validated_on(folders: list[Path]) -> None:
    """So the validation set of such a run is what it was before some could be left out."""
    corpus = open_corpus(data_of(folders), "val", CONTEXT, seed=0)
    assert validation_corpus(corpus) == corpus


def test_stretches_that_a_run_leaves_out_shift_what_follows(folders: list[Path]) -> None:
    """Two sequences at position 3, and one more at position 5: the numbers 3, 4 and 7."""
    stretches = (SkipConfig(3 * CONTEXT - 1, 2 * CONTEXT), SkipConfig(5 * CONTEXT, 1))
    plain = data_of(folders[:1])
    data = dataclasses.replace(plain, skip=stretches)
    corpus = open_corpus(data, "train", CONTEXT, 0)
    assert corpus.numbers_at(np.arange(8)).tolist() == [0, 1, 2, 5, 6, 8, 9, 10]
    whole, share = open_corpus(plain, "train", CONTEXT, 0), Share(0, 1, 2)
    (left_out, _), (usual, _), (later, _) = (
        c.batch(numbers, share).micro_batches[0]
        for c, numbers in ((corpus, range(3, 5)), (whole, range(3, 5)), (whole, range(5, 7)))
    )
    assert torch.equal(left_out, later)
    assert not torch.equal(left_out, usual)
    assert open_corpus(data, "val", CONTEXT, 0).skips == ()
