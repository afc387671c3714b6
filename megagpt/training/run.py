"""Sets up a run on one rank: data, engine, checkpoint, and everything else that the loop needs."""

import contextlib
import functools
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megagpt.checkpoints.checkpoint import OpenCheckpoint
from megagpt.checkpoints.checksums import CorruptError
from megagpt.checkpoints.compatibility import Allowed
from megagpt.checkpoints.folder import abandon
from megagpt.checkpoints.loading import choose, load, quarantine, saved_config
from megagpt.checkpoints.saving import Saved, Saver, meta_of
from megagpt.config import Config
from megagpt.config_file import to_yaml
from megagpt.console import say
from megagpt.data.builtin import prepare_builtin
from megagpt.data.loader import (
    Batch,
    Corpus,
    open_corpus,
    placed,
    read_ahead,
    train_batches,
    validation_corpus,
    validation_sequences,
)
from megagpt.data.located import locate
from megagpt.data.mixture import describe
from megagpt.data.tokenizer import VOCAB_SIZE, gpt2
from megagpt.engines.engine import Engine
from megagpt.engines.float8 import check_float8
from megagpt.errors import UserError
from megagpt.evaluation.exam import Exam, exams_of
from megagpt.incarnations import Lease, Superseded
from megagpt.launchers import torchrun_passes_sigterm_on, torchrun_waits_longer
from megagpt.position import Position, position
from megagpt.profiling.profiler import StepProfiler, profile_folder
from megagpt.profiling.rates import Rates, find_rates
from megagpt.run_log import Event, newest
from megagpt.schedule import batch_sequences, check_profile_steps, step_count, steps_to_profile
from megagpt.training.guard import Guard
from megagpt.training.markdown import verbatim
from megagpt.training.outcome import Ending
from megagpt.training.planned import Planned
from megagpt.training.reporter import Reporter
from megagpt.training.reserve import Reserve
from megagpt.training.run_folder import (
    check_free,
    claim_run,
    holds_run,
    last_start,
    restarted_command,
    run_folder,
    start_as_markdown,
    start_folders,
    went_back,
)
from megagpt.training.safety import StopRequest
from megagpt.training.sizing import build_sized, plan_of, size_run
from megagpt.training.stragglers import Stragglers
from megagpt.training.watchdog import Watchdog
from megagpt.world import World

Found = OpenCheckpoint | None


@dataclass
class Run:
    """One incarnation of a run on one rank. Every rank has one and calls its methods in the same order."""

    config: Config
    world: World
    folder: Path
    engine: Engine
    train_data: Corpus
    validation_data: Corpus
    validation_sequences: int
    exams: list[Exam]
    start: Position
    """The position at which this incarnation begins."""
    resumed: bool
    last_held: dict[str, int]
    """Event -> tokens of its last line in the run log, up to `start`."""
    lease: Lease
    saver: Saver
    watchdog: Watchdog
    reporter: Reporter
    guard: Guard
    stragglers: Stragglers
    reserve: Reserve
    ending: Ending
    profiler: StepProfiler
    planned: Planned
    raised: tuple[bool, ...] = (False, False, False)
    """The `flags` that some rank raised in the last step."""
    compiled_sizes: set[int] = field(default_factory=set)
    """Sizes of micro-batches for which the model was compiled in a step of this incarnation."""

    def __post_init__(self) -> None:
        # Only the first one compiles. Its graphs are not those of a step, as they keep nothing for gradients.
        self.reserve.validation_compiles = self.engine.compiled and self.validation_sequences > 0

    def batches(self) -> Generator[Batch]:
        """This rank's share of every remaining batch, read ahead."""
        first, total = self.start.sequences, self.config.total_sequences
        size = functools.partial(batch_sequences, self.config)
        return read_ahead(
            placed(train_batches(self.train_data, first, total, size, self.engine.share), self.world.device)
        )

    def agree_to_stop(self, stop: StopRequest) -> bool:
        """Whether some rank was asked to stop, or has too little of its time left for another step and a save."""
        return self.world.any(stop.requested(self.reserve.seconds))

    def flags(self, stop: StopRequest) -> tuple[bool, bool, bool]:
        """Everything that the ranks must agree on between two steps; it travels with a step's loss."""
        lost = self.world.is_main and self.lease.lost()
        return stop.requested(self.reserve.seconds), self.saver.failed, lost

    def between_steps(self, at: Position) -> bool:
        """Act on the flags that some rank raised in the last step; returns whether to stop. Raises Superseded, and the
        error of a save in the background."""
        stopping, failed, superseded = self.raised
        if superseded:
            self.reporter.forget_step()
            raise Superseded(f"{self.folder}: a newer incarnation has taken this run over; this one ends")
        if failed:
            self.saver.finish()
        self.report_saved(at, self.saver.poll())
        return stopping

    def save(self, at: Position, milestone: bool) -> None:
        """Begin a save of this position."""
        self.reporter.flush()
        fingerprints = [stream.fingerprint for stream in self.train_data.streams]
        meta = meta_of(self.engine, at, fingerprints, milestone, **self.guard.counters())
        with self.watchdog.patient("a save"):
            self.report_saved(at, self.saver.save(self.engine.state(), self.engine.replica, meta))

    def finish_saves(self, at: Position) -> None:
        """Wait for the save in flight."""
        with self.watchdog.patient("the last save"):
            self.report_saved(at, self.saver.finish())

    def report_saved(self, at: Position, saved: Saved | None) -> None:
        if saved is None or not self.world.is_main:
            return
        meta = saved.meta
        at = position(self.config, meta.sequences_seen, at.step if meta.step is None else meta.step)
        path, seconds, stall = str(saved.checkpoint.path), saved.save_seconds, saved.stall_seconds
        values = {"path": path, "save_seconds": seconds, "stall_seconds": stall}
        text = f"saved {path} in {seconds:.1f} s; training waited for {stall:.2f} s"
        self.reporter.event(Event.CHECKPOINT, at, values, text)

    def say_bound(self) -> None:
        """Print how long a stop takes at most."""
        say(self.reserve.sentence(self.config.model.checkpoint_bytes))
        if torchrun_passes_sigterm_on(os.environ):
            longer = "give it --shutdown-timeout to wait longer"
            if not torchrun_waits_longer():
                longer = (
                    "only PyTorch 2.12 and newer can wait longer: set train.time_limit, or send SIGUSR1 to the ranks"
                )
            say(f"torchrun ends its ranks 30 s after it passes a signal on; {longer}")
        limit, needed = self.config.train.time_limit, self.reserve.seconds
        if 0 < limit < needed:
            short = f"shorter than the {needed:.0f} s that a step and its save may take"
            say(f"train.time_limit {limit:g} s is {short}: each incarnation will take one step")


@contextlib.contextmanager
def open_run(
    config: Config, world: World, resume: bool, allowed: Allowed, resume_at: int | None = None
) -> Iterator[Run]:
    """Begin the config's run or resume it, and record how it ended if that is an error. `resume_at`: tokens of the
    checkpoint to resume from; None: the newest. Raises UserError before anything is written, for all that can be known
    by then."""
    folder, given = run_folder(config), config
    check_float8(config, world.device)
    if not resume:
        check_free(folder)
    sizing = size_run(config, world, world.from_main(lambda: last_start(folder)) if resume else None)
    config = sizing.config
    if world.from_main(lambda: resume_at is not None and went_back(folder, resume_at)):
        say(f"--at {resume_at} was done before this restart; resuming from the newest checkpoint")
        resume_at = None
    check_profile_steps(config)
    check_vocabulary(config, holds_run(folder))
    say("reading data")
    starts = world.from_main(lambda: start_folders(folder)) if resume else []
    data = prepare_builtin(locate(config.data, starts), world)
    context, seed = config.model.context, config.run.seed
    train_data, held_out = (open_corpus(data, split, context, seed) for split in ("train", "val"))
    validation_data = validation_corpus(held_out)
    if world.is_main:
        say("\n".join(describe(config, train_data, held_out)))
    if config.evaluation.tasks:
        say(f"reading exams: {', '.join(config.evaluation.tasks)}")
    exams = exams_of(config, world, starts)
    rates = world.from_main(lambda: find_rates(config, world.device)) if config.train.profile_steps else None
    say("building the model")
    config, engine = build_sized(sizing, world)
    planned = plan_of(sizing, config, world)
    fingerprints = [stream.fingerprint for stream in train_data.streams]
    seek = functools.partial(choose, folder, config, fingerprints, allowed, world, resume_at)
    # The run is claimed when it is known that it can resume here, and before anything of it is read.
    found = seek() if resume else None
    if found is not None:
        _check_length(config, found)
    tokens = found.meta.tokens_seen if found else 0
    lease = Lease(claim_run(folder, given, engine, train_data.streams, tokens, planned))
    ending = Ending(lease.incarnation, world, tokens)
    with ending.recording(), contextlib.ExitStack() as stack:
        found = _load(found, seek, engine)
        start = position(config, 0, 0)
        if found is not None:
            meta = found.meta
            step = meta.step if meta.step is not None else step_count(saved_config(found), meta.tokens_seen)
            start = position(config, meta.sequences_seen, step)
        else:
            engine.initialize()
            if resume:
                say(f"{folder}: no checkpoint was completed; starting from the first token")
        ending.reached = start.tokens
        newer = _abandon_newer(folder, start, world) if resume_at is not None else []
        world.barrier()
        saver = Saver(folder, config.checkpoint, world, lease.incarnation)
        saver.probe(config.model.checkpoint_bytes)
        reporter = Reporter(folder, start, start.total * start.context, resume, world.is_main, resume_at is not None)
        stack.callback(reporter.close)
        if resume_at is not None:
            renamed = f"; newer checkpoints were renamed: {', '.join(newer)}" if newer else ""
            values = {"abandoned": newer, "command": restarted_command()}
            reporter.event(Event.WENT_BACK, start, values, f"went back to {start.tokens:,} tokens{renamed}")
        reporter.text(start, "config", verbatim(to_yaml(given), "pre"))
        reporter.text(start, "start", start_as_markdown(lease.incarnation))
        hangs = folder / "hangs" / f"{lease.incarnation.number:06d}"
        watchdog = stack.enter_context(Watchdog(world, hangs, config.train.hang_timeout, ending.hung))
        engine.clock.on_pass = watchdog.progress
        yield Run(
            config, world, folder, engine, train_data, validation_data,
            validation_sequences(validation_data, config.validation.tokens), exams, start, resume,
            world.from_main(lambda: {event: line["tokens_seen"] for event, line in newest(folder).items()}),
            lease, saver, watchdog, reporter,
            Guard(config.train, found.meta if found else None),
            Stragglers(world, world.hosts(), config.log, config.engine.tensor_ranks), Reserve(saver), ending,
            stack.enter_context(contextlib.closing(_profiler(engine, folder, start, rates))),
            Planned(planned, start, config.train.batch_tokens),
        )  # fmt: skip


def _profiler(engine: Engine, folder: Path, start: Position, rates: Rates | None) -> StepProfiler:
    """The profiler of the steps that the config names, as far as this incarnation can profile them."""
    text = engine.config.train.profile_steps
    left = steps_to_profile(text, start.step, engine.compiled)
    return StepProfiler(engine, left, profile_folder(folder, f"steps_{text}"), rates)


def _load(found: Found, seek: Callable[[], Found], engine: Engine) -> Found:
    """Load the checkpoint; if it turns out to be corrupt, the next older one, and so on. Returns the loaded one."""
    while found is not None:
        try:
            load(found, engine)
            meta = found.meta
            say(f"resuming at {meta.tokens_seen:,} tokens, saved by {meta.engine} on {meta.layout}")
            if meta.compiled not in (None, engine.compiled):
                now, before = ("compiled", "not compiled") if engine.compiled else ("not compiled", "compiled")
                changed = f"blocks are {now} from here on, and were {before} before (train.compile)"
                say(f"{changed}: losses may differ in the last digits")
            break
        except CorruptError as error:
            quarantine(found, error, engine.world)
            found = seek()
    return found


def _abandon_newer(folder: Path, start: Position, world: World) -> list[str]:
    """Rename the checkpoints past `start`; returns their new names."""
    return world.from_main(lambda: [path.name for path in abandon(folder, lambda c: c.tokens > start.tokens)])


def _check_length(config: Config, found: OpenCheckpoint) -> None:
    """Raises UserError if the run has seen more tokens than it is to see now."""
    seen, wanted = found.meta.tokens_seen, config.train.tokens
    if seen > wanted:
        ways = "raise train.tokens, or resume from an older checkpoint with --at"
        raise UserError(f"train.tokens {wanted:,} is less than the {seen:,} that {found.path} has seen; {ways}")


def check_vocabulary(config: Config, exists: bool) -> None:
    """Raises UserError if the model does not fit the tokenizer, before anything is read or written. Only a run that
    exists already may have a larger vocabulary: imported weights may be padded."""
    model, sampling = config.model, config.sampling
    if model.vocab_size < VOCAB_SIZE or (model.vocab_size > VOCAB_SIZE and not exists):
        way = "leave it out: the table is padded to a multiple of 128 by itself"
        raise UserError(f"model.vocab_size {model.vocab_size} is not GPT-2's vocabulary of {VOCAB_SIZE}; {way}")
    prompt = len(gpt2().encode_ordinary(sampling.prompt))
    if sampling.samples and not 0 < prompt <= model.context:
        raise UserError(f"sampling.prompt has {prompt} tokens; the model takes 1 to model.context {model.context}")
