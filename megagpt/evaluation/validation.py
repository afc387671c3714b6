"""Validation loss, and the unigram cross-entropy to compare it with."""

from collections.abc import Callable

import numpy as np
import torch

from megagpt.data.loader import Corpus
from megagpt.engines.engine import Engine

# Training tokens on which the unigram frequencies are counted; the estimate is stable long before that many.
_UNIGRAM_TOKENS = 2**24


def validation_loss(
    engine: Engine, corpus: Corpus, sequences: int, interrupted: Callable[[], bool] = lambda: False
) -> float | None:
    """Mean loss in nats over the first `sequences` sequences of the validation split, the same on any number of ranks.
    None if `interrupted`, which must answer the same on every rank, becomes true before the end."""
    world = engine.world
    share = engine.share
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    size = share.cut(sequences).size
    chunk = share.count * size
    with engine.evaluation() as model:
        for first in range(0, sequences, chunk):
            if interrupted():
                return None
            batch = corpus.batch(range(first, min(first + chunk, sequences)), share, size)
            for tokens, targets in batch.micro_batches:
                total += model(tokens.to(world.device), targets.to(world.device))
    # Tensor ranks of one group have the same sums.
    return world.sum(float(total)) * share.count / world.size / (sequences * corpus.context)


def unigram_loss(train: Corpus, validation: Corpus, sequences: int) -> float:
    """Cross-entropy in nats of the validation targets under the training split's token frequencies, add-one smoothed:
    the loss of a model that knows only how common each token is."""
    vocab = train.streams[0].vocab_size
    frequencies = np.ones(vocab)
    total = sum(train.weights)
    for stream, weight in zip(train.streams, train.weights, strict=True):
        taken = min(stream.tokens, _UNIGRAM_TOKENS * weight // total)
        for start in range(0, taken, 2**20):
            frequencies += np.bincount(stream.read(start, min(2**20, taken - start)), minlength=vocab)
    log_probability = np.log(frequencies / frequencies.sum())
    targets = [validation.rows(np.arange(i, min(sequences, i + 256)))[:, 1:] for i in range(0, sequences, 256)]
    return -sum(float(log_probability[t].sum()) for t in targets) / (sequences * validation.context)
