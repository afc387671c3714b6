"""Consequences of a step's outcome: it proves checkpoints, it is skipped, or it ends the run with advice."""

import dataclasses
import json
import shlex
from pathlib import Path

from megagpt.checkpoints.folder import abandon, newest_good
from megagpt.engines.engine import StepResult
from megagpt.errors import UserError
from megagpt.position import Position
from megagpt.run_log import Event
from megagpt.training.guard import Judgement
from megagpt.training.run import Run


def judge(run: Run, before: Position, at: Position, result: StepResult) -> None:
    """Act on the outcome of the step between two positions. Every rank calls it. Raises UserError, with the checkpoint
    to resume from, if the run cannot continue."""
    match run.guard.judge(result, before.tokens):
        case Judgement.FINE:
            run.saver.proved(before.tokens)
        case Judgement.SKIPPED:
            _report(run, at, result)
        case Judgement.TOO_MANY:
            _report(run, at, result)
            raise UserError(_after_streak(run, at))
        case Judgement.SPIKE_STOP:
            _report(run, at, result)
            raise UserError(_after_spike(run, at))


def _report(run: Run, at: Position, result: StepResult) -> None:
    scale = run.engine.loss_scale
    cause = f"loss {result.loss}, gradient norm {result.gradient_norm}"
    if result.spiked:
        cause = str(run.guard.spike)
    then = f"; the loss scale is now {scale.value:g}" if scale.dynamic and not result.spiked else ""
    values = {"reason": "spike" if result.spiked else "not finite"}
    run.reporter.event(Event.SKIPPED, at, values, f"step {at.step}: {cause}: update skipped{then}")


def _after_streak(run: Run, at: Position) -> str:
    run.finish_saves(at)
    since, folder = run.guard.bad_since, run.folder

    def describe() -> str:
        good = newest_good(folder, since)
        if good is None:
            return "no checkpoint from before them is known to be good: begin again with a lower optimizer.lr"
        run.lease.incarnation.check()
        gone = ", ".join(path.name for path in abandon(folder, lambda c: not c.is_proven))
        renamed = f"renamed, because no step from it was finite: {gone}; " if gone else ""
        lower = f"--allow-recipe-change optimizer.lr={run.config.optimizer.lr / 2:g}"
        way = f"resume from it with a lower learning rate: {_resume(folder, good.tokens)} {lower}"
        return f"{renamed}the last good checkpoint is {good.path}; {way}"

    kind = "the loss was a spike or not finite" if run.guard.spikes_in_a_row else "loss or gradient was not finite"
    count = f"in {run.guard.in_a_row} steps in a row, the last of them step {at.step}"
    return f"{kind} {count}: the weights may be bad since {since:,} tokens; {run.world.from_main(describe)}"


def _after_spike(run: Run, at: Position) -> str:
    run.finish_saves(at)
    spike, folder = run.guard.spike, run.folder

    def describe() -> str:
        good = newest_good(folder, run.guard.bad_since)
        if good is None:
            return "no checkpoint from before it is known to be good: begin again with a lower optimizer.lr"
        left_out = [dataclasses.asdict(stretch) for stretch in run.config.data.skip]
        left_out.append({"at": good.tokens, "tokens": at.tokens - good.tokens})
        skip = shlex.quote(f"data.skip={json.dumps(left_out)}")
        way = "resume from it without the data that follow it"
        return (
            f"the last good checkpoint is {good.path}; {way}: {_resume(folder, good.tokens)} --allow-data-change {skip}"
        )

    return f"step {at.step}: {spike}, so train.spike stops the run; {run.world.from_main(describe)}"


def _resume(run: Path, tokens: int) -> str:
    return f"megagpt train --resume {shlex.quote(str(run))} --at {tokens}"
