"""An exam's declaration, and its parts: the source of its rows, its items, and its scores."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from megagpt.evaluation.rows import Row, Source, unknown_schema

LAST_TOKEN = ("last_token", "last_token_perplexity")
"""Scores of the last token alone; the tokens before it are context."""


class Item(NamedTuple):
    """One row of an exam."""

    pairs: tuple[tuple[str, str], ...]
    """Context and continuation of each option; one pair if there are no options."""
    gold: int = 0
    """Index of the right option."""

    @property
    def solved(self) -> str:
        """The row with its right answer, as an example for others."""
        return "".join(self.pairs[self.gold])


def options(context: str, texts: list[str], gold: int) -> Item:
    """A question: each option continues the context, after one space."""
    return Item(tuple((context, f" {text}") for text in texts), gold)


@dataclass(frozen=True)
class Task:
    """One exam."""

    name: str
    source: Source
    schemas: dict[tuple[str, ...], Callable[[Row], Item]]
    """Keys that a row must have -> how such a row is read. The first that fits is taken."""
    scores: tuple[str, ...]
    """Keys of `references.exams.CONVENTIONS`; the first is the headline."""
    text: str
    """The text that the model reads, for people."""
    paper_shots: int = 0
    """Examples in GPT-3's few-shot setting; 0: the paper names none."""
    shot_schemas: dict[tuple[str, ...], Callable[[Row], Item]] = field(default_factory=dict)
    """How rows are read if there are shots; empty: in the same way."""
    shot_text: str = ""
    """The same with shots, if that differs."""
    instruction: str = ""
    """Text before the first example, or before the row if there is none."""
    separator: str = "\n\n"
    """Text between two examples."""
    unconditional: str = "Answer:"
    """The context of an option without its question."""
    published: str = ""
    """A key that only rows with the published text have, by which references are scored; empty: all rows have it."""

    def items(self, rows: list[Row], shots: int = 0) -> list[Item]:
        """The items of rows. Raises UserError for one that cannot be read, with its place."""
        found = [self._read(row, shots) for row in rows]
        for row, item in zip(rows, found, strict=True):
            for number, (_, continuation) in enumerate(item.pairs, start=1):
                if not continuation.strip():
                    what = f"option {number} of {len(item.pairs)}" if len(item.pairs) > 1 else "the answer"
                    raise row.problem(f"{what} is empty")
        return found

    def pool(self, rows: list[Row], shots: int) -> list[Item]:
        """The items that can be examples: those whose right answer is not empty. Published training rows have a few
        empty options. Raises UserError as `items` does for whatever else cannot be read."""
        found = [self._read(row, shots) for row in rows]
        return [item for item in found if item.pairs[item.gold][1].strip()]

    def fits(self, row: Row) -> bool:
        """Whether the row has the keys that the task reads."""
        return any(row.values.keys() >= set(keys) for keys in self.schemas)

    def _read(self, row: Row, shots: int) -> Item:
        schemas = self.shot_schemas if shots and self.shot_schemas else self.schemas
        for keys, read in schemas.items():
            if row.values.keys() >= set(keys):
                return read(row)
        raise unknown_schema(row, list(schemas))


@dataclass(frozen=True)
class TextTask:
    """The perplexity of a text."""

    name: str
    source: Source
    detokenized: Callable[[str], str]
    detokenizer: str
    """Its name, for people."""
    by_document: bool = False
    """Whether each row is a text of its own; otherwise all rows are one text."""
    columns: tuple[str, ...] = ("text",)
    """Keys that may hold the text."""
    paper_shots: int = 0

    def fits(self, row: Row) -> bool:
        """Whether the row has a text."""
        return any(key in row.values for key in self.columns)

    def documents(self, rows: list[Row]) -> list[str]:
        """The texts as they are in the files, before they are detokenized."""
        texts = []
        for row in rows:
            key = next((key for key in self.columns if key in row.values), None)
            if key is None:
                raise unknown_schema(row, [(key,) for key in self.columns])
            text = row.text(key)
            texts.append(f" {text.strip()} \n" if key == "sentence" else text)  # as in the files of lines
        return texts if self.by_document else ["".join(texts)]
