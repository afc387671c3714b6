"""Data sets of the Hugging Face hub, streamed."""

import sys
from collections.abc import Iterator

from megagpt.data.documents import Batch, Cursor, DocumentBatch, Source
from megagpt.data.hub_files import asked
from megagpt.data.tables import as_row, texts_of
from megagpt.errors import ExpectedError, UserError, first_line


def hub_source(name: str, text_key: str, subset: str | None, split: str, revision: str | None = None) -> Source:
    """One split of a data set, at one commit: `revision`, or the newest. Raises UserError if it cannot be read."""
    import datasets
    import huggingface_hub

    datasets.utils.logging.set_verbosity_error()
    # The library would import PyTorch, which takes seconds, to serve a training loop's workers.
    datasets.config.TORCH_AVAILABLE = "torch" in sys.modules

    def newest() -> str | None:
        return huggingface_hub.HfApi().dataset_info(name, revision=revision or "main").sha

    try:
        # One commit for the whole preparation, even if the data set changes during an interruption.
        commit = asked(name, "its commit", revision or "main", "dataset", (), newest)
    except ExpectedError as error:
        raise type(error)(f"no file or folder {name} here; on the Hugging Face hub: {error}") from None
    try:
        stream = datasets.load_dataset(name, subset, split=split, streaming=True, revision=commit)
    except Exception as error:
        place = f"the Hugging Face hub (subset {subset!r}, split {split!r})"
        raise UserError(f"{name}: not readable from {place}: {first_line(error)}") from None

    def batches(cursor: Cursor | None) -> Iterator[DocumentBatch]:
        batch = Batch()
        row = cursor.get("row", 0) if cursor else 0
        try:
            # Arrow tables of one row: a string that is not UTF-8 is an error of its row alone.
            dataset = stream.select_columns([text_key]).with_format("arrow")
            if cursor:
                dataset.load_state_dict(cursor.get("state", cursor))
            for entry in dataset:
                row += 1
                (text,) = texts_of(entry.column(text_key))
                if batch.add(as_row(text, f"{name} row {row}", text_key, remedy="")):
                    yield batch.take({"row": row, "state": dataset.state_dict()}, None)
            yield batch.take({"row": row, "state": dataset.state_dict()}, 1.0)
        except UserError:
            raise
        except Exception as error:  # from the hub, its client, or a corrupt file
            problem = f"reading {text_key!r} (--text-key) failed after row {row}: {first_line(error)}"
            raise UserError(f"{name}: {problem}") from None

    identity = {"hub": name, "subset": subset, "split": split, "text_key": text_key, "revision": commit}
    return Source(name, batches, identity)
