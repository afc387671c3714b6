"""The reference lines of a picture: which numbers of others belong beside these runs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from megagpt.errors import UserError, did_you_mean
from megagpt.evaluation.task import Task
from megagpt.evaluation.tasks import TASKS
from megagpt.models.presets import PRESETS
from megagpt.references.exams import Reference, chance, references
from megagpt.references.losses import CORPORA, Corpus, Curve, corpus_named, nearest_preset
from megagpt.report.amounts import score
from megagpt.report.record import Axis, Record
from megagpt.report.texts import all_names_of

AUTO, NONE = "auto", "none"


@dataclass(frozen=True)
class Level:
    """A horizontal line."""

    label: str
    value: float


@dataclass(frozen=True)
class ReferenceCurve:
    """Another program's curve, along the picture's axis."""

    label: str
    places: list[float]
    values: tuple[float, ...]


def corpus_of(record: Record, wanted: str) -> Corpus | None:
    """The corpus whose numbers belong beside the run's losses. `wanted`: a key of CORPORA, "none", or "auto", which
    goes by the names of all the run's texts. Raises UserError for another word."""
    if wanted == NONE:
        return None
    if wanted == AUTO:
        return corpus_named(all_names_of(record))
    if wanted not in CORPORA:
        raise UserError(f"--references {wanted!r} does not exist: {did_you_mean(wanted, [AUTO, NONE, *CORPORA])}")
    return CORPORA[wanted]


def loss_references(record: Record, corpus: Corpus | None) -> list[Reference]:
    """OpenAI's checkpoint of the nearest size among those whose loss on the corpus is known."""
    if corpus is None:
        return []
    return _nearest(record, list(corpus.losses))


def loss_levels(records: Sequence[Record], wanted: str) -> list[Level]:
    """The lines beside validation losses."""
    found = [(c, r) for record in records if (c := corpus_of(record, wanted)) for r in loss_references(record, c)]
    return _unique(Level(f"OpenAI's {r.label} on {c.name}: {r.value:.4f}", r.value) for c, r in found)


def loss_curves(records: Sequence[Record], wanted: str, axis: Axis) -> list[ReferenceCurve]:
    """The curves beside validation losses: of a corpus on which one of the runs of that size is trained."""
    found = {}
    for record in records:
        corpus = corpus_of(record, wanted)
        if corpus and (curve := corpus.curve) and _size(record, "gpt2") == curve.model:
            machines = f" on {curve.machines}" if axis == "hours" else ""
            found[curve.label] = ReferenceCurve(
                f"{curve.label}, on {corpus.name}{machines}: {curve.losses[-1]:.4f} at the end",
                _along(curve, axis), curve.losses,
            )  # fmt: skip
    return list(found.values())


def exam_references(record: Record, task: str) -> list[Reference]:
    """Scores of the task by the run's own score, with as many shots: firm and unsure ones of the GPT-2 and the GPT-3
    whose sizes are nearest. A score of another text is left out if there is one of the task's own; if the run's rows
    do not have the published text, all are of another."""
    found: list[Reference] = []
    for gpt2 in (True, False):
        nearest = _nearest(record, [r for r in all_exam_references(record, task) if r.is_gpt2 is gpt2])
        found += [r for r in nearest if r.same_text] or nearest
    return found


def all_exam_references(record: Record, task: str, shots: bool = True) -> list[Reference]:
    """The same of models of all sizes; without `shots`, also those with other numbers of shots."""
    known = references(task, record.newest[task].score, shots_of(record, task) if shots else None)
    return known if has_published_text(record, task) else [replace(r, same_text=False) for r in known]


def shots_of(record: Record, task: str) -> int:
    """Examples in front of each row in the run's last exam of that name; logs of before 0.2 do not tell."""
    shots = record.newest[task].shots
    return record.config.evaluation.shots if shots is None else shots


def has_published_text(record: Record, task: str) -> bool:
    """Whether the rows of the run's last exam of that name had the text of the published scores. Logs of before 0.2 do
    not tell; then only the hub's rows are sure to have it."""
    told, known = record.newest[task].published, TASKS.get(task)
    doubtful = isinstance(known, Task) and known.published and record.config.evaluation.data
    return not doubtful if told is None else told


def exam_levels(records: Sequence[Record], task: str) -> list[Level]:
    """The lines beside a task's scores: firm numbers only, of runs whose rows have the published text, and a guess's
    accuracy."""
    taken = [record for record in records if task in record.newest and has_published_text(record, task)]
    found = [r for record in taken for r in exam_references(record, task) if r.firm]
    notes = {r: "" if r.same_text else " (other text)" for r in found}
    levels = [Level(f"OpenAI's {r.label}{notes[r]}: {score(r.value)}", r.value) for r in found]
    guess = chance(task)
    return _unique([*levels, *([Level(f"a guess: {guess:.0%}", guess)] if guess else [])])


def _nearest(record: Record, known: list[Reference]) -> list[Reference]:
    """Those of the model whose size is nearest to the run's."""
    if not known:
        return []
    size = record.config.model.parameters

    def distance(reference: Reference) -> float:
        ratio = PRESETS[reference.model].model.parameters / size
        return max(ratio, 1 / ratio)

    least = min(map(distance, known))
    return [r for r in known if distance(r) == least]


def _size(record: Record, family: str) -> str:
    return nearest_preset(record.config.model.parameters, family)


def _along(curve: Curve, axis: Axis) -> list[float]:
    if axis == "flops":
        return [tokens * float(PRESETS[curve.model].model.flops_per_token) for tokens in curve.tokens]
    if axis == "hours":
        return [tokens / curve.tokens_per_second / 3600 for tokens in curve.tokens]
    return [float(tokens) for tokens in curve.tokens]


def _unique(levels: Iterable[Level]) -> list[Level]:
    return list(dict.fromkeys(levels))
