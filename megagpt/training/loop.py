"""The loop: the only place where a run advances. It takes steps, and between them holds the occasions that are due."""

import contextlib
import gc
import shlex
import time
from collections.abc import Generator

from megagpt.checkpoints.compatibility import Allowed
from megagpt.config import Config
from megagpt.console import duration, say
from megagpt.data.loader import Batch
from megagpt.engines.clock import StepTimes
from megagpt.engines.engine import DTYPES, StepResult, seed_dropout
from megagpt.errors import ExitCode, UserError
from megagpt.hardware import peak_flops
from megagpt.models.attention import attention_kernel
from megagpt.position import Position
from megagpt.process_memory import peak_memory
from megagpt.run_log import Event
from megagpt.schedule import learning_rate, sizes_ahead
from megagpt.training.bad_steps import act_on
from megagpt.training.markdown import verbatim
from megagpt.training.occasions import crossed, occasions
from megagpt.training.outcome import FINISHED, Outcome
from megagpt.training.run import Run, open_run
from megagpt.training.run_folder import resume_command
from megagpt.training.safety import TIME_LIMIT, StopRequest, seconds_since_start
from megagpt.training.speed import Speed
from megagpt.world import World


def train(
    config: Config, world: World, resume: bool, allowed: Allowed, stop: StopRequest, resume_at: int | None = None
) -> ExitCode:
    """Run a config or resume its run, from its checkpoint at `resume_at` tokens if given; returns the exit code. Raises
    ExpectedError."""
    with open_run(config, world, resume, allowed, resume_at) as run:
        _say_what_is_special(run)
        if not run.start.last:
            say("first step" + (", which compiles the model: it may take minutes" if run.engine.compiled else ""))
        outcome = loop(run, stop)
        run.ending.outcome(outcome)
        return outcome.code


def loop(run: Run, stop: StopRequest) -> Outcome:
    """Take every remaining step, until the end or a request to stop. Every rank calls it, and all decide alike."""
    began, at, due, speed = time.monotonic(), run.start, occasions(run), Speed()
    saves = due[0]
    with contextlib.ExitStack() as stack:
        batches = stack.enter_context(contextlib.closing(run.batches()))
        stack.callback(gc.unfreeze)  # the first step freezes
        while True:
            # Each incarnation takes a step before it may stop, however short its time limit is.
            stopping = at != run.start and run.between_steps(at)
            for occasion in due:
                if not stopping and occasion.due(at):
                    run.reporter.write_step()
                    with speed.pause():
                        stopping = not occasion.hold(at, stop)
            if stopping or at.last:
                break
            with speed.pause():
                run.profiler.begin(at.step + 1)
            seen = at.sequences
            at = _step(run, at, batches, speed, stop)
            # A profile takes a while to write: more than the bound of a stop allows.
            if run.profiler.end(at.step, at.sequences - seen) and not run.raised[0]:
                run.reporter.write_step()
                with speed.pause(), run.watchdog.patient("the profile"):
                    run.profiler.write()
            run.ending.reached = at.tokens
    if saves.held < at.tokens:
        saves.hold(at, stop)
    run.finish_saves(at)
    if stopping:
        return _stopped(run, at, stop)
    return _finished(run, at, time.monotonic() - began)


def _step(run: Run, before: Position, batches: Generator[Batch], speed: Speed, stop: StopRequest) -> Position:
    """Take one optimizer step and log it; returns the position after it."""
    config = run.config
    began = time.monotonic()
    run.watchdog.phase(f"step {before.step + 1}, waiting for data")
    batch = next(batches)
    waited = time.monotonic() - began
    at = before.after(batch.sequences)
    if config.model.dropout:
        seed_dropout(config, at.sequences, run.world.rank)
    run.watchdog.phase(f"step {at.step}")
    first, size = before == run.start, len(batch.micro_batches[0][0])
    # Compiling may take long, once for each size.
    compiles = run.engine.compiled and size not in run.compiled_sizes
    if compiles and not first:
        say(f"step {at.step}, the first with micro-batches of {size}, compiles the model again: it may take minutes")
    patient = run.watchdog.patient(f"step {at.step}, compiling") if compiles else None
    with patient or contextlib.nullcontext():
        is_spike = run.guard.is_spike if run.guard.watches_spikes else None
        result = run.engine.train_step(
            batch, learning_rate(config, at.tokens), is_spike, lambda: run.flags(stop), run.reporter.write_step
        )
    run.raised = result.raised
    took = time.monotonic() - began
    speed.step(batch.tokens)
    times = run.engine.clock.read()
    act_on(run, before, at, result)
    if first and run.resumed:
        since = seconds_since_start()
        values = {"seconds_to_first_step": since, "incarnation": run.lease.incarnation.number}
        run.reporter.event(Event.RESUMED, at, values, f"first step {since:.1f} s after the process began")
    if compiles:
        say(f"{'the first step' if first else f'step {at.step}'} took {duration(took)}, compiling included")
        run.compiled_sizes.add(size)
        run.reserve.took(compiling=took)
    else:
        run.reserve.took(**{"first_step" if first else "step": took})
    if run.engine.compiled:
        run.reserve.step_compiles = not sizes_ahead(config, at.sequences, run.engine.share.cut) <= run.compiled_sizes
    if first:
        # All that lives now stays: Python's collector need not look at it again and again, which would hold a rank up.
        gc.collect()
        gc.freeze()
    if at.step == run.start.step + 2:
        run.say_bound()
    if at.last or not config.log.every_tokens or crossed(config.log.every_tokens, before.tokens, at.tokens):
        _report_step(run, at, batch, result, speed, waited, times)
    _compare_ranks(run, at, took, waited, times)
    run.planned.step(at, batch.tokens, took, run.profiler.active(at.step))
    if run.planned.is_due(at):
        run.reporter.event(Event.PLAN, at, *run.planned.compare(peak_memory(run.world.device)))
    return at


def _report_step(
    run: Run, at: Position, batch: Batch, result: StepResult, speed: Speed, waited: float, times: StepTimes
) -> None:
    scale = run.engine.loss_scale
    step_seconds, tokens_per_second = speed.read()
    peak = peak_flops(run.world.device, run.config.train.precision, run.config.log.peak_tflops)
    values = {
        "loss": result.loss, "lr": learning_rate(run.config, at.tokens), "gradient_norm": result.gradient_norm,
        "sequences_seen": at.sequences, "batch_tokens": batch.tokens,
        "tokens_per_second": tokens_per_second, "step_seconds": step_seconds, "data_wait_seconds": waited,
        "communication_wait_seconds": times.wait,
        # Model FLOPs utilisation: the FLOPs of presets.flops_per_token over the devices' peak.
        "mfu": run.config.model.flops_per_token * tokens_per_second / (peak * run.world.size) if peak else None,
        "peak_memory_bytes": peak_memory(run.world.device), "skipped_updates": run.guard.skipped,
    }  # fmt: skip
    # Recording takes time, too: the speed of these steps is not that of the run.
    values |= {"profiled": True} if run.profiler.active(at.step) else {}
    values |= {"loss_scale": scale.value} if scale.dynamic else {}
    values |= {"spikes": run.guard.spikes} if run.guard.watches_spikes else {}
    run.reporter.step(at, values)
    if run.world.device.type == "cpu":  # it does not compute by itself while the host writes
        run.reporter.write_step()


def _compare_ranks(run: Run, at: Position, took: float, waited: float, times: StepTimes) -> None:
    """Log how the ranks' own work compares, and name the stragglers."""
    found = run.stragglers.add(took, waited, times)
    if found is None:
        return
    numbers = {f"ranks_{key}": value for key, value in found._asdict().items() if key != "stragglers"}
    run.reporter.event(Event.RANKS, at, numbers)
    for sentence in found.stragglers:
        run.reporter.event(Event.STRAGGLER, at, {"text": sentence}, sentence)
    if found.stragglers:
        run.reporter.text(at, "stragglers", verbatim("\n".join(found.stragglers)))


def _say_what_is_special(run: Run) -> None:
    config = run.config
    end, floor_at = config.train.tokens, config.schedule.decay_end_tokens
    if config.schedule.shape != "constant" and end < floor_at:
        where = f"train.tokens {end:,} is less than schedule.decay_end_tokens {floor_at:,}"
        say(f"the learning rate does not reach its floor: {where}")
    kernel = attention_kernel(config.model, run.world.device, DTYPES[config.train.precision])
    how = f"{run.engine.describe()}, {'compiled' if run.engine.compiled else 'not compiled'}, {kernel} attention"
    say(f"{config.run.name}: {config.model.parameters:,} parameters, {how}")


def _stopped(run: Run, at: Position, stop: StopRequest) -> Outcome:
    # A scheduler may have told one rank only.
    reasons = [reason for reason in run.world.gather_objects(stop.reason) if reason]
    reason = reasons[0] if reasons else "a signal"
    if reason == TIME_LIMIT and at == run.start:
        due = f"a validation, exams or samples that are due at {at.tokens:,} tokens: it would never get past them"
        ways = "raise train.time_limit, or lower validation.tokens, evaluation.limit or sampling.samples"
        limit = run.config.train.time_limit
        raise UserError(f"train.time_limit {limit:g} s ends this run before {due}; {ways}")
    text = f"stopped by {reason}; resume with: {resume_command(run.folder)}"
    run.reporter.event(Event.STOPPED, at, {"reason": reason}, text)
    return Outcome("stopped", reason, ExitCode.STOPPED)


def _finished(run: Run, at: Position, seconds: float) -> Outcome:
    if run.last_held.get(Event.FINISHED) == at.tokens:
        say(f"{run.folder}: finished already, at {at.tokens:,} tokens")
        return FINISHED
    text = f"done in {duration(seconds)}: {at.tokens:,} tokens in {run.folder}"
    run.reporter.event(Event.FINISHED, at, {}, text)
    if skipped := run.guard.in_a_row:
        say(f"the last {skipped} updates were skipped: the weights may be bad since {run.guard.bad_since:,} tokens")
    say(f"see it with: {shlex.join(['tensorboard', '--logdir', str(run.folder.parent)])}")
    return FINISHED
