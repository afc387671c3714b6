"""Exams: rows from files become groups of token sequences, and the groups' scores become an exam's values."""

import contextlib
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megagpt.config import Config
from megagpt.data.located import place_from
from megagpt.data.tokenizer import encode
from megagpt.errors import NonFiniteError, UserError
from megagpt.evaluation.known import known_scores
from megagpt.evaluation.report import ShownProgress
from megagpt.evaluation.results import Result, Scores, Value, accuracy, perplexity, values_of
from megagpt.evaluation.rows import Files, find_files, is_rows, is_there, read_rows, read_text, same_files
from megagpt.evaluation.scoring import Model, Progress, score
from megagpt.evaluation.sequences import Group, fitted, pair
from megagpt.evaluation.shots import Prompt, draw, prompt
from megagpt.evaluation.task import Item, Task, TextTask
from megagpt.evaluation.tasks import TEXT, find_tasks
from megagpt.evaluation.texts import text_values, windows
from megagpt.files import named_path
from megagpt.references.exams import CONVENTIONS
from megagpt.world import World


@dataclass(frozen=True)
class Settings:
    """How exams are held."""

    data: str = ""
    """Folder of exam rows; empty: the Hugging Face hub."""
    shots: int = 0
    """Examples in front of each row; -1: as many as in GPT-3's few-shot setting."""
    shots_from: str = ""
    """File of rows that examples are drawn from; empty: the task's training rows."""
    limit: int = 0
    """Rows of each task, drawn by a constant seed; of a text, its first windows. 0: all."""
    seed: int = 0
    """Decides which examples are drawn."""
    stride: int = 0
    """Tokens that each window of a text scores after the first; 0: as many as the model has positions."""


@dataclass(frozen=True)
class Exam:
    """A task that is ready to be held: everything about it but the model's answers."""

    name: str
    items: int
    """Rows, or windows of a text."""
    groups: list[Group]
    """Those of the items, then what is scored besides: options without their question."""
    result: Callable[[Scores], Result]
    rows: Callable[[Scores], Iterator[dict[str, Any]]]
    """Of each row: texts, log-likelihoods, right answer."""

    def hold(
        self, model: Model, world: World, progress: Progress | None = None, batch_tokens: int = 0
    ) -> tuple[Result, Scores] | None:
        """The result and the scores behind it, on every rank; None if it was interrupted. Raises NonFiniteError."""
        try:
            found = score(model, self.groups, world, batch_tokens, progress)
        except NonFiniteError as error:
            raise NonFiniteError(f"{self.name}: {error}") from None
        return None if found is None else (self.result(found), found)


def prepare(task: Task | TextTask, settings: Settings, positions: int, world: World) -> Exam:
    """Read a task's rows for a model of that many positions. Every rank calls it. Raises UserError for files that are
    missing or damaged, and for settings that do not fit them."""
    if isinstance(task, TextTask):
        return _prepare_text(task, settings, positions, world)
    return _prepare_task(task, settings, positions, world)


def exams_of(config: Config, world: World, starts: Sequence[Path] = ()) -> list[Exam]:
    """The exams that a run is to hold, of `evaluation` in its config. `starts`: the folders where the run was started,
    if it is resumed: relative paths may lead from there. Raises UserError as `prepare` does."""
    asked = config.evaluation
    if not asked.tasks:
        return []
    try:
        settings = Settings(asked.data and place_from(asked.data, starts), asked.shots, limit=asked.limit)
        tasks = [_located(task, starts) for task in find_tasks(asked.tasks)]
        return [prepare(task, settings, config.model.context, world) for task in tasks]
    except UserError as error:
        raise UserError(f"evaluation.tasks: {error}") from None


def _located(task: Task | TextTask, starts: Sequence[Path]) -> Task | TextTask:
    if not task.name.startswith(TEXT):
        return task
    return replace(task, source=task.source._replace(path=place_from(task.source.path, starts)))


# --- questions --------------------------------------------------------------------------------------------------------


def _prepare_task(task: Task, settings: Settings, positions: int, world: World) -> Exam:
    shots = task.paper_shots if settings.shots < 0 else settings.shots
    files = find_files(task.source, settings.data, world)
    rows = read_rows(files.paths)
    whole = task.items(rows, shots)
    chosen = _limited(len(whole), settings.limit)
    pool, pool_files, unfit = _pool(task, settings, shots, whole, world) if shots else ([], Files([], ""), 0)
    prompts: list[Prompt] = []
    encoded = functools.cache(encode)  # an example is drawn for many rows
    with contextlib.closing(ShownProgress(f"{task.name}, prompts", len(chosen), world.is_main)) as progress:
        for i in chosen:
            try:
                examples = draw(pool, whole[i], shots, f"{settings.seed}/{task.name}/{i}") if shots else []
            except UserError as error:
                raise UserError(f"{task.name}: {error}") from None
            prompts.append(prompt(task, whole[i], examples, positions, rows[i].place, encoded))
            progress.done(len(prompts) / len(chosen))
    items, groups = [whole[i] for i in chosen], [p.group for p in prompts]
    extra = _Unconditional(task, items, positions) if "unconditional" in task.scores else None
    same_text = not task.published or all(task.published in rows[i].values for i in chosen)
    details = {
        **_facts(files), "published": same_text, "first_prompt": prompts[0].context,
        "shots_from": [str(path) for path in pool_files.paths], "shots_sha256": pool_files.sha256,
        "shots_unfit": unfit, "seed": settings.seed, "instruction": task.instruction,
    }  # fmt: skip

    def result(scores: Scores) -> Result:
        own = scores[: len(items)]
        without = extra.of_rows(scores[len(items) :]) if extra else []
        values = []
        for name in task.scores:
            found = values_of(name, items, own, without)
            value, error = perplexity(found) if "perplexity" in name else accuracy(found)
            values.append(Value(name, CONVENTIONS[name], value, error, known_scores(task.name, name, shots, same_text)))
        text = task.shot_text if shots and task.shot_text else task.text
        cut = sum(any(tokens.cut for tokens in group) for group in groups)
        dropped = sum(p.dropped for p in prompts)
        return Result(task.name, values, len(items), len(whole), shots, text, cut, dropped, details)

    def told(scores: Scores) -> Iterator[dict[str, Any]]:
        without = extra.of_rows(scores[len(items) :]) if extra else [[] for _ in items]
        for i, asked, answers, others in zip(chosen, items, scores, without, strict=False):
            yield {
                "task": task.name, "row": i, "place": rows[i].place, "gold": asked.gold,
                "options": [
                    {"context": context, "continuation": continuation, **answer._asdict(),
                     **({"unconditional": others[k].log_likelihood} if others else {})}
                    for k, ((context, continuation), answer) in enumerate(zip(asked.pairs, answers, strict=True))
                ],
            }  # fmt: skip

    return Exam(task.name, len(items), groups + (extra.groups if extra else []), result, told)


def _facts(files: Files) -> dict[str, Any]:
    """The part of a result's details about its files."""
    return {"files": [str(path) for path in files.paths], "sha256": files.sha256, "commit": files.commit}


def _limited(rows: int, limit: int) -> list[int]:
    """Indices of the rows that are asked, in order. The draw is the same in every run, so limits are comparable; files
    are often sorted, so their first rows would not be typical."""
    order = list(range(rows))
    if 0 < limit < rows:
        random.Random("limit").shuffle(order)
        order = sorted(order[:limit])
    return order


def _pool(task: Task, settings: Settings, shots: int, own: list[Item], world: World) -> tuple[list[Item], Files, int]:
    """The rows that examples are drawn from, their files, and how many rows were left out because their answer is
    empty."""
    train = task.source.training()
    if settings.shots_from:
        path = named_path(settings.shots_from)
        if not path.is_file():
            raise UserError(f"--shots-from {settings.shots_from}: no such file")
        files = same_files([path], world)
    elif train is None:  # the paper draws from the exam itself if there is nothing else
        return own, Files([], ""), 0
    elif settings.data and not is_there(train, settings.data):
        names = " or ".join(f"{name}.jsonl" for name in train.names)
        ways = f"put {names} there, or name a file with --shots-from"
        raise UserError(f"{task.name}: {settings.data} has no training rows to draw {shots} shots from; {ways}")
    else:
        files = find_files(train, settings.data, world)
    rows = read_rows(files.paths)
    pool = task.pool(rows, shots)
    return pool, files, len(rows) - len(pool)


class _Unconditional:
    """The options of all rows without their question, each pair of texts scored once."""

    def __init__(self, task: Task, items: Sequence[Item], positions: int) -> None:
        self.groups: list[Group] = []
        self._items = items
        self._places: dict[str, tuple[int, int]] = {}
        for item in items:
            new = [text for text in dict.fromkeys(text for _, text in item.pairs) if text not in self._places]
            if new:
                self._places |= {text: (len(self.groups), i) for i, text in enumerate(new)}
                self.groups.append([fitted(pair(task.unconditional, text), positions, task.name) for text in new])

    def of_rows(self, scores: Scores) -> Scores:
        """The score of each option of each row."""
        found = []
        for item in self._items:
            places = [self._places[text] for _, text in item.pairs]
            found.append([scores[group][i] for group, i in places])
        return found


# --- texts ------------------------------------------------------------------------------------------------------------


def _prepare_text(task: TextTask, settings: Settings, positions: int, world: World) -> Exam:
    if settings.shots > 0:
        raise UserError(f"{task.name} is a text, which takes no shots; leave --shots or this task out")
    if settings.stride > positions:
        raise UserError(f"--stride {settings.stride} is more than the model's {positions} positions; lower it")
    if task.name.startswith(TEXT):
        files = same_files([_text_file(task)], world)
        (path,) = files.paths
        texts = task.documents(read_rows([path])) if is_rows(path) else [read_text(path)]
    else:
        files = find_files(task.source, settings.data, world)
        texts = task.documents(read_rows(files.paths))
    published = [text for text in texts if text.strip()]
    if not published:
        raise UserError(f"{files.paths[0]}: holds no text")
    stride = settings.stride or positions
    cut = windows(published, [task.detokenized(text) for text in published], positions, stride)
    groups = cut.groups[: settings.limit or None]
    how = f"windows of {positions} tokens, stride {stride}, detokenizer {task.detokenizer}"
    details = {**_facts(files), "published": True, "stride": stride}

    def result(scores: Scores) -> Result:
        values = text_values(task.name, [row[0] for row in scores], cut, how)
        text = f"{'each document' if task.by_document else 'one text'}, {how}"
        return Result(task.name, values, len(groups), len(cut.groups), 0, text, details=details)

    def told(scores: Scores) -> Iterator[dict[str, Any]]:
        for i, (answer,) in enumerate(scores):
            yield {"task": task.name, "window": i, **answer._asdict()}

    return Exam(task.name, len(groups), groups, result, told)


def _text_file(task: TextTask) -> Path:
    path = named_path(task.source.path)
    if not path.is_file():
        raise UserError(f"{task.name}: no such file")
    return path
