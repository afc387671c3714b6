"""Validation losses of OpenAI's checkpoints on public corpora, and the curve of a public reproduction."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from megagpt.models.presets import PRESETS
from megagpt.references.exams import Reference, model_label

# Names of FineWeb-2, another corpus by the same makers, with other languages. In fineweb_20b, the number is of tokens.
_FINEWEB_2 = re.compile(r"fineweb[-_ ]?2(?!\.?\d|[mbt]t?(?![a-z]))")
_BATCH = 524_288
# The curve's validations: every 250 steps, and the last step.
_EVERY, _LAST = 250, 19_560
_LLM_C = (
    11.0092, 6.1710, 5.3743, 4.7097, 4.3170, 4.1296, 4.0060, 3.9189, 3.8585, 3.8237, 3.7652, 3.7334, 3.6973, 3.6745,
    3.6543, 3.6339, 3.6176, 3.6005, 3.5797, 3.5673, 3.5535, 3.5404, 3.5298, 3.5182, 3.5069, 3.4992, 3.4912, 3.4810,
    3.4726, 3.4650, 3.4566, 3.4513, 3.4431, 3.4376, 3.4289, 3.4224, 3.4159, 3.4097, 3.4026, 3.3978, 3.3924, 3.3865,
    3.3809, 3.3751, 3.3706, 3.3647, 3.3615, 3.3551, 3.3509, 3.3462, 3.3408, 3.3357, 3.3305, 3.3267, 3.3226, 3.3193,
    3.3149, 3.3112, 3.3073, 3.3038, 3.3003, 3.2969, 3.2939, 3.2914, 3.2882, 3.2863, 3.2841, 3.2821, 3.2803, 3.2785,
    3.2770, 3.2758, 3.2746, 3.2738, 3.2732, 3.2727, 3.2724, 3.2722, 3.2722, 3.2722,
)  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """The validation losses of another program's run."""

    label: str
    tokens: tuple[int, ...]
    losses: tuple[float, ...]
    tokens_per_second: float
    machines: str
    """The machines that had that speed."""
    source: str
    model: str
    """The preset of the model's size."""


@dataclass(frozen=True)
class Corpus:
    """A corpus on which losses of others are known."""

    key: str
    name: str
    """As people name it."""
    losses: tuple[Reference, ...]
    curve: Curve | None = None


def _losses(corpus: str, source: str, numbers: dict[str, float]) -> tuple[Reference, ...]:
    how = f"mean loss per token of held-out {corpus}, context 1,024"
    return tuple(
        Reference(model_label(model), loss, how, source, model, 0, firm=True, same_text=True)
        for model, loss in numbers.items()
    )


CORPORA = {
    corpus.key: corpus
    for corpus in (
        Corpus(
            "fineweb-edu", "FineWeb-Edu",
            _losses("FineWeb-Edu", "build-nanogpt, play.ipynb", {"gpt2-124m": 3.2924}),
        ),
        Corpus(
            "fineweb", "classic FineWeb",
            _losses(
                "FineWeb", "llm.c, dev/vislog.ipynb",
                {"gpt2-124m": 3.4250, "gpt2-355m": 3.0831, "gpt2-774m": 3.0006, "gpt2-1558m": 2.8313},
            ),
            Curve(
                "llm.c, 124M", tuple(step * _BATCH for step in (*range(0, _LAST, _EVERY), _LAST)), _LLM_C,
                _BATCH / 0.140, "8 H100",
                "llm.c of 13 October 2024, log kept in modded-nanogpt, records/track_1_short/2024-10-13_llmc",
                "gpt2-124m",
            ),
        ),
    )
}  # fmt: skip


def corpus_named(texts: Iterable[str]) -> Corpus | None:
    """The corpus that all these names of data sets and folders mean; None if there is a name of another one.
    FineWeb's names: HuggingFaceFW/fineweb-edu, data/fineweb_edu_10bt, edu_fineweb10B, fineweb10B."""
    found = {_key(text) for text in texts}
    return CORPORA.get(found.pop() or "") if len(found) == 1 else None


def _key(text: str) -> str | None:
    words = re.sub(r"[^a-z0-9]+", "", text.lower())
    if "fineweb" not in words or _FINEWEB_2.search(text.lower()):
        return None
    return "fineweb-edu" if "finewebedu" in words or "edufineweb" in words else "fineweb"


def nearest_preset(parameters: int, family: str) -> str:
    """The preset of a family ("gpt2" or "gpt3") whose size is nearest, as a ratio."""
    presets = {name: preset for name, preset in PRESETS.items() if name.startswith(family)}
    return min(presets, key=lambda name: max(r := presets[name].model.parameters / parameters, 1 / r))
