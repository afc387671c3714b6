"""Scores of OpenAI's models in the exams, each with its convention and its source.

Two numbers can be compared if exam, text, score and shots are the same. A task's name tells exam and text, and a
convention tells the score. A number whose second source is missing is marked as unsure, and one that its sources do not
agree on is left out."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from megagpt.models.presets import PRESETS

CONVENTIONS = {
    "mean_token": "the option with the highest mean log-likelihood per token",
    "mean_byte": "the option with the highest mean log-likelihood per byte",
    "mean_char": "the option with the highest mean log-likelihood per character (acc_norm)",
    "sum": "the option with the highest log-likelihood",
    "unconditional": "the option with the highest log-likelihood, minus that of the option without its question",
    "greedy": "each token of the answer is the likeliest one",
    "last_token": "the last token of the last word is the likeliest one",
    "perplexity": "perplexity of the last word",
    "last_token_perplexity": "perplexity of the last token of the last word",
    "per_word_perplexity": "perplexity per word of the original text",
    "per_token_perplexity": "perplexity per token",
}
"""Name of a score -> how it is computed."""

_GPT2, _GPT3 = (tuple(name for name in PRESETS if name.startswith(family)) for family in ("gpt2", "gpt3"))
# Sources.
_PLOTS = "build-nanogpt, play.ipynb; llm.c, dev/vislog.ipynb"
_SCRIPT = "build-nanogpt, hellaswag.py"
_CORE = "nanochat, CORE of OpenAI's checkpoints"
_GPT2_PAPER = "Radford et al. 2019, table 3"
_GPT3_PAPER = "Brown et al. 2020, table H.1"
_HARNESS = "lm-evaluation-harness"
# Texts that differ from the task's.
_OWN_TEXT = "the paper's own prompt"
_BEGIN = "a begin-of-text token comes first"
_DETOKENISED = "the paper's own detokenised text"


@dataclass(frozen=True)
class Reference:
    """One model's score."""

    label: str
    """The model, and its shots if it saw any: "GPT-2 124M", "GPT-3 XL, 20-shot"."""
    value: float
    """An accuracy from 0 to 1, or a perplexity."""
    convention: str
    """How it was scored, for people, with what differs from the task's own text."""
    source: str
    model: str
    """The preset of the model's size."""
    shots: int
    firm: bool
    """Whether two independent sources agree on it."""
    same_text: bool
    """Whether the prompt is the task's own: only then the two numbers are comparable to the last digit."""

    @property
    def is_gpt2(self) -> bool:
        return self.model in _GPT2


@dataclass(frozen=True)
class _Row:
    """One line of a table: the scores of a family's models, smallest first; None for an unknown one."""

    task: str
    convention: str
    values: tuple[float | None, ...]
    source: str
    shots: int = 0
    firm: bool = True
    note: str = ""
    """The difference from the task's own text; empty if there is none."""

    def references(self) -> Iterator[Reference]:
        models = _GPT3 if self.source.startswith("Brown") else _GPT2
        how = CONVENTIONS[self.convention] + (f"; {self.note}" if self.note else "")
        for model, value in zip(models, self.values, strict=False):
            if value is not None:
                label = model_label(model) + (f", {self.shots}-shot" if self.shots else "")
                yield Reference(label, value, how, self.source, model, self.shots, self.firm, not self.note)


def _gpt3(task: str, convention: str, shots: int, percents: str, firm: bool = False, note: str = "") -> _Row:
    """A line of table H.1 as printed, the smallest model first; `-`: its transcriptions do not agree."""
    values = tuple(None if word == "-" else round(float(word) / 100, 4) for word in percents.split())
    return _Row(task, convention, values, _GPT3_PAPER, shots, firm, note)


def _gpt2(task: str, convention: str, numbers: str, source: str, note: str = "", shots: int = 0) -> _Row:
    """The scores of OpenAI's four checkpoints; `-`: unknown."""
    values = tuple(None if word == "-" else float(word) for word in numbers.split())
    return _Row(task, convention, values, source, shots, note=note)


# The first convention of a task is its headline, except for these.
_NO_HEADLINES = ("per_word_perplexity",)
_ROWS = (
    _gpt2("hellaswag", "mean_token", ".2945 .3752 .4320 .4889", _PLOTS),
    _gpt2("hellaswag", "sum", ".2859 - - .3842", _SCRIPT),
    _gpt3("hellaswag", "mean_token", 0, "33.7 43.6 51.0 54.7 62.8 67.4 70.9 78.9", True, _OWN_TEXT),
    _gpt3("hellaswag", "mean_token", 20, "33.5 43.1 51.3 54.9 62.9 67.3 71.3 79.3", True, _OWN_TEXT),
    _gpt3("hellaswag:gpt3", "mean_token", 0, "33.7 43.6 51.0 54.7 62.8 67.4 70.9 78.9", True),
    _gpt3("hellaswag:gpt3", "mean_token", 1, "33.0 42.9 50.5 53.5 61.9 66.5 70.0 78.1"),
    _gpt3("hellaswag:gpt3", "mean_token", 20, "33.5 43.1 51.3 54.9 62.9 67.3 71.3 79.3", True),
    _gpt2("hellaswag:harness", "mean_char", ".3114 - - .5089", _HARNESS),
    _gpt2("hellaswag:harness", "sum", ".2892 - - .4004", _HARNESS),
    _gpt2("lambada", "greedy", ".3256 - - -", f"{_HARNESS}, issues 911 and 2159"),
    _gpt2("lambada", "greedy", ".323 .426 .488 .523", _CORE, _BEGIN),
    _gpt3("lambada", "greedy", 0, "42.7 54.3 60.4 63.6 67.1 70.3 72.5 76.2", True, _OWN_TEXT),
    _gpt3("lambada", "greedy", 1, "22.0 47.1 - 58.3 - 65.4 69.0 72.5", note=_OWN_TEXT),
    _gpt3("lambada", "greedy", 15, "22.0 40.4 63.2 57.0 78.1 79.1 81.3 86.4", note=_OWN_TEXT),
    _gpt2("lambada", "perplexity", "40.06 - - 10.63", f"{_HARNESS}, issues 911 and 2159"),
    _Row("lambada", "perplexity", (18.6, 9.09, 6.53, 5.44, 4.60, 4.00, 3.56, 3.00), _GPT3_PAPER, note=_OWN_TEXT),
    _gpt2("lambada:last_token", "last_token", ".4599 .5548 .6012 .6324", _GPT2_PAPER, _DETOKENISED),
    _gpt2("lambada:last_token", "last_token_perplexity", "35.13 15.60 10.87 8.63", _GPT2_PAPER, _DETOKENISED),
    _gpt2("piqa", "mean_token", ".623 .670 .698 .725", _CORE, _BEGIN, 10),
    _gpt3("piqa", "mean_token", 0, "64.6 70.2 72.9 75.1 75.6 78.0 78.5 -"),
    _gpt3("piqa", "mean_token", 1, "64.3 69.3 71.8 74.4 74.3 76.3 77.8 80.5"),
    _gpt3("piqa", "mean_token", 50, "64.3 69.4 72.0 74.3 75.4 77.8 79.9 82.3", True),
    _gpt3("arc_easy", "unconditional", 0, "43.6 46.5 53.0 53.8 58.2 60.2 - 68.8"),
    _gpt3("arc_easy", "unconditional", 50, "42.7 51.0 58.1 59.1 62.1 65.8 69.1 70.1", True),
    _gpt2("arc_easy", "mean_token", ".412 .480 .535 .595", _CORE, _BEGIN, 10),
    _gpt3("arc_challenge", "unconditional", 0, "26.6 29.5 31.8 35.5 38.0 41.4 43.7 51.4"),
    _gpt3("arc_challenge", "unconditional", 50, "- 28.4 32.3 36.7 39.5 - - 51.5"),
    _gpt2("arc_challenge", "mean_token", ".222 .262 .264 .299", _CORE, _BEGIN, 10),
    _gpt3("winogrande", "sum", 0, "52.0 52.1 57.4 58.7 62.3 64.5 67.9 70.2"),
    _gpt3("winogrande", "sum", 50, "51.3 52.6 57.5 - 62.6 67.4 70.0 77.7"),
    _gpt3("wsc273", "sum", 0, "66.3 72.9 74.7 76.9 82.4 85.7 87.9 88.3"),
    _gpt3("openbookqa", "unconditional", 0, "35.6 43.2 45.2 46.8 - 50.4 55.6 57.6"),
    _gpt3("openbookqa", "unconditional", 100, "37.0 43.6 48.0 50.6 55.6 55.2 - 65.4"),
    _gpt3("copa", "mean_token", 0, "66 68 73 77 76 80 84 91"),
    _gpt3("copa", "mean_token", 32, "67 64 72 77 83 83 86 92"),
    _gpt3("boolq", "sum", 0, "49.7 60.3 58.9 62.4 67.1 65.4 66.2 60.5"),
    _gpt3("arithmetic_2da", "greedy", 50, "2.0 4.1 3.5 4.5 8.9 11.9 55.5 100"),
    _gpt3("arithmetic_2ds", "greedy", 50, "1.15 1.45 2.25 2.7 7.35 13.6 - 98.9"),
    _gpt2("wikitext2", "per_token_perplexity", "29.41 - - -", _GPT2_PAPER, f"{_DETOKENISED}; printed as per word"),
    _gpt2("wikitext103", "per_word_perplexity", "37.50 - - -", _GPT2_PAPER, _DETOKENISED),
    _gpt2("ptb", "per_word_perplexity", "65.85 - - -", _GPT2_PAPER, _DETOKENISED),
)  # fmt: skip

# Accuracy of a guess, of exams whose rows all have equally many options.
CHANCE = {
    "hellaswag": 1 / 4, "piqa": 1 / 2, "winogrande": 1 / 2, "wsc273": 1 / 2, "openbookqa": 1 / 4, "copa": 1 / 2,
    "boolq": 1 / 2,
}  # fmt: skip


def model_label(preset: str) -> str:
    """The model as people name it: GPT-2 124M, GPT-3 XL."""
    family, _, size = preset.partition("-")
    return f"{family.upper().replace('GPT', 'GPT-')} {size.upper()}"


def chance(task: str) -> float | None:
    """The accuracy of a guess; None if the task has no fixed number of options. `task`: also one with another text,
    `hellaswag:harness`."""
    return CHANCE.get(task.partition(":")[0])


@functools.cache
def _all() -> tuple[tuple[_Row, Reference], ...]:
    return tuple((row, reference) for row in _ROWS for reference in row.references())


def tasks() -> list[str]:
    """The tasks that have references."""
    return list(dict.fromkeys(row.task for row in _ROWS))


def headline(task: str) -> str | None:
    """The convention of the score that a run's log has; None for a task without such references."""
    rows = (row for row in _ROWS if row.task == task and row.convention not in _NO_HEADLINES)
    return next((row.convention for row in rows), None)


def references(task: str, convention: str | None = None, shots: int | None = None) -> list[Reference]:
    """The known scores of a task, firm and unsure ones: OpenAI's GPT-2 first, each family from small to large; an empty
    list for a task or a convention without any. `convention`: a key of CONVENTIONS; None: the headline. `shots`: 0, 1,
    or any other number for few-shot scores; None: all."""
    wanted = convention or headline(task)
    found = [r for row, r in _all() if row.task == task and row.convention == wanted]
    if shots is not None:
        found = [r for r in found if min(r.shots, 2) == min(shots, 2)]
    return sorted(found, key=lambda r: not r.is_gpt2)
