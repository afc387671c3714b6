"""Exams of lm-evaluation-harness: held by it with our model, as results like those of our own exams."""

import contextlib
import sys
import traceback
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from megagpt.errors import ExpectedError, UserError, first_line
from megagpt.evaluation.harness_surroundings import surroundings
from megagpt.evaluation.harness_tasks import Asked
from megagpt.evaluation.known import known_scores
from megagpt.evaluation.results import Result, Value
from megagpt.models.presets import ModelConfig
from megagpt.world import World

# Draws of a bootstrap, which gives standard errors of what is no mean: good to about 2%. Each goes over all rows.
_BOOTSTRAPS = 1000
# Our tasks with the same text, if their names do not end in ":harness", and our scores of the same answers. References
# are kept under these names.
_OUR_TASKS = {"lambada_openai": "lambada", "winogrande": "winogrande", "wsc273": "wsc273"}
_OUR_SCORES = {"acc": "sum", "acc_norm": "mean_char"}


class Held(NamedTuple):
    """The outcome of exams."""

    results: list[Result]
    whole: dict[str, Any]
    """All that the harness says, without the rows, as values that JSON has."""
    rows: list[dict[str, Any]]


def hold(
    tasks: list[Any],
    asked: Asked,
    model: nn.Module,
    config: ModelConfig,
    world: World,
    sharded: bool,
    batch_tokens: int,
) -> Held | None:
    """Hold the exams. Every rank calls it; the main rank gets what came out, the others None. The state of the random
    generators, which the harness seeds, is as before. Raises UserError for what the harness refuses."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from megagpt.evaluation.harness import HarnessModel

    asks = HarnessModel(model, config, world, sharded, batch_tokens)
    options: dict[str, Any] = {} if asked.seed is None else {"fewshot_random_seed": asked.seed}
    # The harness prints remarks to stdout.
    with surroundings(world, asked.download), contextlib.redirect_stdout(sys.stderr):
        try:
            whole = simple_evaluate(
                model=asks, tasks=tasks, task_manager=TaskManager(include_defaults=False), num_fewshot=asked.shots,
                limit=asked.limit or None, bootstrap_iters=_BOOTSTRAPS if world.is_main else 0, **options,
            )  # fmt: skip
        except ExpectedError:
            raise
        except Exception as error:
            if _is_ours(error):
                raise
            raise UserError(f"lm-evaluation-harness: {_refusal(error)}") from None
    if not world.is_main:
        return None
    samples = whole.pop("samples")
    results = [
        _result(name, whole, samples.get(name, []), len({row for task, row in asks.cut if task == name}))
        for name in whole["results"]
    ]
    rows = [{"task": name, **plain(sample)} for name, found in samples.items() for sample in found]
    return Held(results, plain(whole), rows)


def _result(name: str, whole: dict[str, Any], samples: list[dict[str, Any]], cut_rows: int) -> Result:
    """A task's or a group's values, in the form of our own results."""
    metrics, version = whole["results"][name], whole["lm_eval_version"]
    shots = int(whole["n-shot"].get(name) or 0)
    values = []
    for key, value in metrics.items():
        metric, _, kind = key.partition(",")
        number = plain(value)
        if not kind or metric.endswith("_stderr") or isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        deviation = plain(metrics.get(f"{metric}_stderr,{kind}"))
        error = deviation if isinstance(deviation, float) else None
        label = metric if kind == "none" else f"{metric},{kind}"
        ours = _OUR_TASKS.get(name, f"{name}:harness")
        score = "greedy" if (ours, metric) == ("lambada", "acc") else _OUR_SCORES.get(metric, metric)
        references = known_scores(ours, score, shots)
        values.append(Value(label, f"{label} of lm-evaluation-harness", float(number), error, references))
    counts = whole["n-samples"].get(name, {})
    items = int(counts.get("effective", metrics.get("sample_len", 0)))
    text = f"lm-evaluation-harness {version}, version {whole['versions'].get(name)} of the task"
    if shots and samples and _shares_rows(whole["configs"][name]):
        text += "; its shots are drawn from the rows that are asked, so that a row may show its own answer"
    details = (
        {"lm_eval": version, "first_prompt": str(samples[0]["arguments"][0][0])} if samples else {"lm_eval": version}
    )
    return Result(name, values, items, int(counts.get("original", items)), shots, text, cut_rows, details=details)


def _shares_rows(config: dict[str, Any]) -> bool:
    """Whether shots come from the split that is asked, without the row itself being left out, as the harness does it
    in a test split only."""
    split = config.get("fewshot_split")
    return split is not None and not config.get("test_split") and split == config.get("validation_split")


def plain(value: Any) -> Any:
    """The value in types that JSON has: NumPy's numbers as numbers, other objects as their text."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(each) for each in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _is_ours(error: Exception) -> bool:
    """Whether the error came out of this package's code, or of PyTorch below it. Our code also calls the harness, which
    refuses a yaml file's values there: the last frame of the two decides."""
    names = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [name.partition(".")[0] for name in names[1:] if name.startswith(("megagpt.", "lm_eval."))]
    return ours[-1:] == ["megagpt"]


def _refusal(error: Exception) -> str:
    text = first_line(error)
    if "unsafe" in text:
        way = "export the model and use the harness's own command in a sandbox"
        return f"{text.partition(' Set ')[0]} It runs code that the model has written; {way}"
    if "population" in text or "fewshot samples" in text or "no documents available" in text:
        return f"{text}: the task has fewer rows to draw examples from than --shots asks for; lower it"
    return f"{text}; fix the task's yaml file or its rows"
