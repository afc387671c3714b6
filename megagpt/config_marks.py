"""Marks on the config's fields: whether a resume may change a key, which engine it is for, which values it takes.

    lr: Recipe[float] = Field(default=6.0e-4, gt=0)

Every field has exactly one of the marks of `Change`."""

import enum
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic.fields import FieldInfo

T = TypeVar("T")


class Change(enum.Enum):
    """Whether a resume may use another value than the checkpoint's."""

    FREE = "a resume may change it"
    RECIPE = "a resume needs --allow-recipe-change to change it"
    DATA = "a resume needs --allow-data-change to change it"
    SHAPE = "no resume may change it"


@dataclass(frozen=True)
class For:
    """The only engines that a key is for; the others refuse a value that is not the default."""

    engines: tuple[str, ...]


@dataclass(frozen=True)
class Was:
    """A key's former name. Files, command lines and checkpoints that use it are still read."""

    name: str


@dataclass(frozen=True)
class Values:
    """The values that a key takes, in words, if its type does not say it."""

    text: str


Free = Annotated[T, Change.FREE]
Recipe = Annotated[T, Change.RECIPE]
Data = Annotated[T, Change.DATA]
Shape = Annotated[T, Change.SHAPE]
ForFSDP = Annotated[T, Change.FREE, For(("fsdp",))]
ForZero = Annotated[T, Change.FREE, For(("zero",))]
ForSharded = Annotated[T, Change.FREE, For(("fsdp", "zero"))]


def fields_of(section: Any) -> dict[str, FieldInfo]:
    """The fields of a section by name, with type, default, docstring and marks."""
    return section.__pydantic_fields__


def mark_of(field: FieldInfo, kind: type[T]) -> T | None:
    """A field's mark of that kind. Raises ValueError if it has several."""
    marks = [mark for mark in field.metadata if isinstance(mark, kind)]
    if len(marks) > 1:
        raise ValueError(f"{marks} contradict each other")
    return marks[0] if marks else None
