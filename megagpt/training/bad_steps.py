"""Consequences of a step's outcome: it proves checkpoints, it is skipped, or it ends the run with advice."""

import dataclasses
import json
import shlex

from megagpt.checkpoints.checkpoint import OpenCheckpoint
from megagpt.checkpoints.compatibility import changes
from megagpt.checkpoints.folder import abandon, newest_good
from megagpt.config import SkipConfig
from megagpt.engines.engine import StepResult
from megagpt.errors import UserError
from megagpt.position import Position
from megagpt.run_log import Event
from megagpt.training.guard import Judgement
from megagpt.training.run import Run
from megagpt.training.run_folder import resume_command


def act_on(run: Run, before: Position, at: Position, result: StepResult) -> None:
    """Act on the outcome of the step between two positions. Every rank calls it. Raises UserError, with the checkpoint
    to resume from, if the run cannot continue."""
    judgement = run.guard.judge(result, before.tokens)
    if judgement is Judgement.FINE:
        run.saver.proved(before.tokens)
        return
    _report(run, at, result)
    if judgement is Judgement.TOO_MANY:
        raise UserError(_after_streak(run, at))
    if judgement is Judgement.SPIKE_STOP:
        raise UserError(_after_spike(run, at))


def _report(run: Run, at: Position, result: StepResult) -> None:
    scale, spike = run.engine.loss_scale, run.guard.spike if result.spiked else None
    values = {
        "reason": "spike" if spike else "not finite", "loss": result.loss, "gradient_norm": result.gradient_norm,
        "skipped_updates": run.guard.skipped, "spikes": run.guard.spikes,
    }  # fmt: skip
    cause = f"loss {result.loss}, gradient norm {result.gradient_norm}"
    then = f"; the loss scale is now {scale.value:g}" if scale.dynamic and spike is None else ""
    if spike is not None:
        cause = str(spike)
        values |= {"mean": spike.mean, "deviation": spike.deviation}
    run.reporter.event(Event.SKIPPED, at, values, f"step {at.step}: {cause}: update skipped{then}")


def _after_streak(run: Run, at: Position) -> str:
    run.finish_saves(at)
    since, lower = run.guard.bad_since, f"optimizer.lr={run.config.optimizer.lr / 2:g}"

    def describe() -> str:
        run.lease.incarnation.check()
        good = newest_good(run.folder, since)
        gone = abandon(run.folder, lambda c: c.tokens >= since and not c.is_proven)
        names = ", ".join(path.name for path in gone)
        renamed = f"renamed, because no step from it was finite: {names}; " if gone else ""
        if good is None:
            return f"{renamed}{_begin_again(run, lower)}"
        way = f"resume from it with a lower learning rate: {_go_back(run, good, lower, recipe=True)}"
        return f"{renamed}the last good checkpoint is {good.path}; {way}"

    kind = "the loss was a spike or not finite" if run.guard.spikes_in_a_row else "loss or gradient was not finite"
    count = f"in {run.guard.in_a_row} steps in a row, the last of them step {at.step}"
    return f"{kind} {count}: the weights may be bad since {since:,} tokens; {run.world.from_main(describe)}"


def _after_spike(run: Run, at: Position) -> str:
    run.finish_saves(at)

    def describe() -> str:
        good = newest_good(run.folder, run.guard.bad_since)
        if good is None:
            return _begin_again(run, f"optimizer.lr={run.config.optimizer.lr / 2:g}")
        stretches = leave_out(run.config.data.skip, good.meta.tokens_seen, at.tokens)
        skip = json.dumps([dataclasses.asdict(stretch) for stretch in stretches])
        way = f"resume from it without the data that follow it: {_go_back(run, good, f'data.skip={skip}', data=True)}"
        return f"the last good checkpoint is {good.path}; {way}"

    return f"step {at.step}: {run.guard.spike}, so train.spike stops the run; {run.world.from_main(describe)}"


def leave_out(stretches: tuple[SkipConfig, ...], start: int, end: int) -> list[SkipConfig]:
    """The stretches that also leave out what a run with `stretches` saw between the positions `start` and `end`. Those
    in between become one with it, and later ones come as much earlier as it is long."""
    inside = sum(s.tokens for s in stretches if start < s.at < end)
    before = [s for s in stretches if s.at <= start]
    later = [SkipConfig(s.at - (end - start), s.tokens) for s in stretches if s.at >= end]
    return [*before, SkipConfig(start, end - start + inside), *later]


def _go_back(run: Run, good: OpenCheckpoint, override: str, recipe: bool = False, data: bool = False) -> str:
    """The command that resumes from a checkpoint with another recipe or other data, and with whatever has changed since
    that checkpoint."""
    fingerprints = [stream.fingerprint for stream in run.train_data.streams]
    changed_recipe, changed_data = changes(good, run.config, fingerprints)
    flags = ["--allow-recipe-change"] if recipe or changed_recipe else []
    flags += ["--allow-data-change"] if data or changed_data else []
    return resume_command(run.folder, "--at", str(good.meta.tokens_seen), *flags, override)


def _begin_again(run: Run, override: str) -> str:
    words = [str(run.folder / "config.yaml"), f"run.name={run.folder.name}-2", override]
    return f"no earlier checkpoint is known to be good; begin again: {shlex.join(['megagpt', 'train', *words])}"
