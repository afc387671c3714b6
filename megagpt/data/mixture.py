"""Lines that tell how a run uses its sources: passes over their tokens, and the text to validate on."""

from collections.abc import Iterator

from megagpt.config import Config
from megagpt.data.builtin import with_builtin_folder
from megagpt.data.loader import Corpus, open_corpus, refuse_same_folder, validation_corpus, validation_sequences
from megagpt.data.shards import is_prepared, unread_note


def describe(config: Config, train: Corpus, held_out: Corpus) -> Iterator[str]:
    """Lines about each source of a whole run, files of its folder that are not read, and the validation set. train,
    held_out: the splits of all the config's sources, in its order."""
    sources = config.data.sources
    for source, stream, size, held in zip(sources, train.streams, train.sizes, held_out.streams, strict=True):
        share = source.weight / sum(s.weight for s in sources)
        part = f"{share:.1%} of the batches, " if len(sources) > 1 else ""
        passes = config.total_sequences * share / size
        times = f"{passes:,.2f}" if passes >= 0.01 else "less than 0.01"
        yield f"{source.path}: {part}{times} passes over {stream.tokens:,} tokens; {held.tokens:,} more are held out"
        if note := unread_note(stream.name):
            yield note
    if config.validation.tokens:
        yield from _describe_validation(config, held_out)


def _describe_validation(config: Config, held_out: Corpus) -> Iterator[str]:
    """Lines if not all sources are validated on, or on fewer tokens than wanted."""
    used, context = validation_corpus(held_out), config.model.context
    unused = [
        f"{source.path} holds out {stream.tokens:,} tokens"
        for source, stream in zip(config.data.sources, held_out.streams, strict=True)
        if not any(stream is other for other in used.streams)
    ]
    if unused:
        least = f"at model.context {context}, a source needs {(held_out.rounding + 1) * context + 1:,}"
        problem = "validation leaves sources out" if used.streams else "no validation"
        yield f"{problem}: {', '.join(unused)}; {least} (data prepare --val-fraction)"
    tokens = validation_sequences(used, config.validation.tokens) * context
    if 0 < tokens < config.validation.tokens // context * context:
        places = zip(used.sizes, used.weights, used.streams, strict=True)
        scarce = min(places, key=lambda place: (place[0] - used.rounding) / place[1])[2]
        limit = f"{scarce.name} holds out only {scarce.tokens:,}"
        yield f"validation takes {tokens:,} tokens of validation.tokens {config.validation.tokens:,}: {limit}"


def describe_if_here(config: Config) -> Iterator[str]:
    """The same lines if all sources are on this machine; else one that says which are not. Raises UserError like
    `open_corpus`."""
    data, context, seed = with_builtin_folder(config.data), config.model.context, config.run.seed
    refuse_same_folder(data)
    places = zip(config.data.sources, data.sources, strict=True)
    if absent := [source.path for source, place in places if not is_prepared(place.path)]:
        yield f"not prepared here: {', '.join(absent)}; the number of passes over the data is not known"
        return
    yield from describe(config, *(open_corpus(data, split, context, seed) for split in ("train", "val")))
