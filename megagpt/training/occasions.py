"""The work besides training that is due at token intervals: saves, validations, exams, samples.

The run log tells when each was last done, and the loop asks between steps which ones are due. So work that a stop or a
kill interrupted is done after the resume, at the same tokens as in the uninterrupted run."""

import contextlib
import functools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from megagpt.console import say, warn
from megagpt.data.tokenizer import gpt2
from megagpt.errors import NonFiniteError
from megagpt.evaluation.examinee import examined
from megagpt.evaluation.report import ShownProgress
from megagpt.evaluation.validation import unigram_loss, validation_loss
from megagpt.generation import generate
from megagpt.position import Position
from megagpt.run_log import Event, ExamScore, exam_scores, newest
from megagpt.training.markdown import samples_as_markdown
from megagpt.training.run import Run
from megagpt.training.safety import StopRequest

Work = Callable[[Position, StopRequest], bool]


@dataclass
class Occasion:
    """One kind of work that the loop does between steps, on all ranks."""

    work: Work
    """Does the work; returns False, on every rank, if a request to stop interrupted it."""
    intervals: tuple[int, ...]
    """Tokens from one time to the next; 0: at the end only."""
    held: int
    """Tokens at which it was last held."""
    put_off: Callable[[], bool] = lambda: False
    """Whether to hold it later, although an interval was crossed."""

    def due(self, at: Position) -> bool:
        """At the end, and when an interval was crossed since it was last held, unless it is put off."""
        crossed_one = any(crossed(every, self.held, at.tokens) for every in self.intervals)
        reached = at.last or (crossed_one and not self.put_off())
        return reached and self.held < at.tokens

    def hold(self, at: Position, stop: StopRequest) -> bool:
        """Do the work; False if it was interrupted, so that it stays due."""
        if done := self.work(at, stop):
            self.held = at.tokens
        return done


def crossed(every: int, before: int, now: int) -> bool:
    """Whether a multiple of `every` lies in (before, now]; never for 0."""
    return every > 0 and before // every < now // every


def occasions(run: Run) -> tuple[Occasion, ...]:
    """The run's occasions in order. The save comes first: a process that is killed during a validation has saved."""
    config, last, found = run.config, run.last_held, [_saves(run)]
    if run.validation_sequences:
        found.append(Occasion(_validate(run), (config.validation.every_tokens,), last.get(Event.VALIDATION, 0)))
    if run.exams:
        found.append(Occasion(_examine(run), (config.evaluation.every_tokens,), last.get(Event.EXAM, 0)))
    if config.sampling.samples:
        found.append(Occasion(_sample(run), (config.sampling.every_tokens,), last.get(Event.SAMPLES, 0)))
    return tuple(found)


def _saves(run: Run) -> Occasion:
    config = run.config.checkpoint

    def work(at: Position, stop: StopRequest) -> bool:
        run.save(at, milestone=crossed(config.milestone_every_tokens, saves.held, at.tokens))
        return True

    # While updates are skipped, the weights may be bad: an interval's save waits until one was made.
    def put_off() -> bool:
        return run.guard.suspicious(run.engine.loss_scale)

    # The checkpoint that the run resumed from is its last save, whatever the log says.
    saves = Occasion(work, (config.every_tokens, config.milestone_every_tokens), run.start.tokens, put_off)
    return saves


def _validate(run: Run) -> Work:
    sequences, tokens = run.validation_sequences, run.validation_sequences * run.config.model.context

    @functools.cache
    def unigram() -> float:
        return unigram_loss(run.train_data, run.validation_data, sequences)

    def work(at: Position, stop: StopRequest) -> bool:
        first_batch = contextlib.ExitStack()

        def interrupted() -> bool:
            first_batch.close()
            run.watchdog.phase("validation")
            if run.agree_to_stop(stop):
                return True
            if run.reserve.validation_compiles:
                say("first validation, which compiles the model without gradients: it may take minutes")
                first_batch.enter_context(run.watchdog.patient("validation, compiling"))
                first_batch.callback(setattr, run.reserve, "validation_compiles", False)
            return False

        with first_batch:
            loss = validation_loss(run.engine, run.validation_data, sequences, interrupted)
        if at.last and loss is not None and math.isfinite(loss) and not run.guard.in_a_row:
            run.saver.proved(at.tokens)  # no step will follow that could
        if loss is not None and run.world.is_main:
            values = {"validation_loss": loss, "unigram_loss": unigram()}
            known = f"a model that knows only how common each token is: {unigram():.4f}"
            text = f"validation loss {loss:.4f} over {tokens:,} held-out tokens ({known})"
            run.reporter.event(Event.VALIDATION, at, values, text)
        return loss is not None

    return work


def _examine(run: Run) -> Work:
    resumed = run.resumed and run.world.is_main
    before = exam_scores(newest(run.folder).get(Event.EXAM, {})) if resumed else {}

    def work(at: Position, stop: StopRequest) -> bool:
        scores: dict[str, dict[str, Any]] = {}
        texts = []
        with examined(run.engine) as model:
            for exam in run.exams:

                def interrupted(name: str = exam.name) -> bool:
                    run.watchdog.phase(f"exam {name}")
                    return run.agree_to_stop(stop)

                progress = ShownProgress(exam.name, exam.items, run.world.is_main, interrupted)
                try:
                    with contextlib.closing(progress):
                        held = exam.hold(model, run.world, progress)
                except NonFiniteError as error:  # the steps decide whether the run ends
                    texts.append(f"no score of {error}")
                    continue
                if held is None:
                    return False
                result, _ = held
                headline = result.values[0]
                facts = {key: result.details[key] for key in ("published", "sha256", "commit")}
                score = ExamScore(
                    headline.value, headline.standard_error, result.items, headline.name, result.shots, **facts
                )
                _compare(exam.name, score, before.pop(exam.name, score))
                scores[exam.name] = asdict(score)
                texts.append(f"{exam.name} {headline.text} ({headline.name}, {result.items:,} items)")
        run.reporter.event(Event.EXAM, at, {"exams": scores}, f"exams: {'; '.join(texts)}")
        return True

    return work


def _compare(task: str, score: ExamScore, before: ExamScore) -> None:
    """Say if an exam is another one than that of the incarnation before."""
    kinds = {"rows": "sha256", "shots": "shots", "score": "score", "limit": "items"}
    now, then = ([getattr(each, field) for field in kinds.values()] for each in (score, before))
    changed = [kind for kind, a, b in zip(kinds, now, then, strict=True) if b is not None and a != b]
    if changed:
        warn(f"exam {task}: {' and '.join(changed)} changed since the last incarnation: its curve has a break here")


def _sample(run: Run) -> Work:
    s = run.config.sampling

    def work(at: Position, stop: StopRequest) -> bool:
        if run.agree_to_stop(stop):
            return False
        began = time.monotonic()
        prompt = gpt2().encode_ordinary(s.prompt)
        problem = ""
        with run.engine.evaluation(any_shape=True) as model:
            try:
                rows = generate(
                    model, run.config.model, [prompt] * s.samples, s.max_tokens,
                    temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, seed=run.config.run.seed,
                    on_token=lambda row, token: run.watchdog.phase("sampling"), decide=run.world.from_main,
                )  # fmt: skip
            except NonFiniteError as error:  # the steps decide whether the run ends
                rows, problem = [], f"no samples: {error}"
        run.reserve.took(samples=time.monotonic() - began)
        found = [gpt2().decode(row) for row in rows]
        texts = [s.prompt + text for text in found]
        run.reporter.event(Event.SAMPLES, at, {"samples": texts}, problem or "\n".join(f"> {text}" for text in texts))
        run.reporter.text(at, "samples", problem or samples_as_markdown(s.prompt, found))
        return True

    return work
