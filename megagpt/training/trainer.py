"""The loop: draw a batch, step the engine, and at token intervals validate, sample, log and save."""

import contextlib
import functools
import os
import time
from collections.abc import Iterator
from typing import Any

from megagpt.checkpoints.compatibility import Allowed
from megagpt.checkpoints.folder import newest_complete
from megagpt.checkpoints.loading import resume as resume_from
from megagpt.checkpoints.saving import Saved, Saver, describe
from megagpt.config import Config
from megagpt.config_file import to_yaml
from megagpt.data.builtin import prepare_builtin
from megagpt.data.loader import Batch, Share, open_corpus, read_ahead, train_batches, validation_sequences
from megagpt.data.tokenizer import VOCAB_SIZE, gpt2
from megagpt.engines.clock import StepClock
from megagpt.engines.engine import StepResult, build_engine, seed_dropout
from megagpt.errors import ExitCode, TransientError, UserError, first_line
from megagpt.evaluation.validation import unigram_loss, validation_loss
from megagpt.generation import generate
from megagpt.hardware import peak_flops
from megagpt.incarnations import Incarnation, Superseded
from megagpt.launchers import torchrun_passes_sigterm_on
from megagpt.process_memory import peak_memory
from megagpt.training.metrics import Metrics, duration, tell
from megagpt.training.run_folder import begin, check_free, describe_start, run_folder
from megagpt.training.safety import FiniteGuard, StopRequest, seconds_since_start
from megagpt.training.schedule import batch_sequences, learning_rate, step_count
from megagpt.training.stragglers import Comparison, Pace
from megagpt.training.watchdog import Watchdog
from megagpt.world import World

# How often the main rank looks whether a newer start has taken the run over.
_FENCE_SECONDS = 5.0


class Trainer:
    """One run on one rank; every rank makes one and calls the same methods."""

    def __init__(self, config: Config, world: World, resume: bool, allowed: Allowed = Allowed()) -> None:  # noqa: B008
        self.config, self.world = config, world
        self.run = run_folder(config)
        config.accumulation(world.size)  # refuses what does not divide, before anything is written
        if not resume:
            check_free(self.run)
        self._check_vocabulary()
        data = prepare_builtin(config.data, world)
        seed = config.run.seed
        self.train_data = open_corpus(data, "train", config.model.context, seed)
        self.validation_data = open_corpus(data, "val", config.model.context, seed)
        self.validation_size = validation_sequences(self.validation_data, config.validation.tokens)
        self.fingerprints = [s.fingerprint for s in self.train_data.streams]
        self.engine = build_engine(config, world)
        self.resumed = resume
        self._claimed: Incarnation | None = None
        self.sequences_seen = self._resume(allowed) if resume else 0
        self.guard = FiniteGuard(config.train.nonfinite_limit)
        self.longest_step = self.longest_samples = 0.0
        world.barrier()
        self.incarnation = self._begin(self.tokens_seen)
        self.saver = Saver(self.run, config.checkpoint, world, self.incarnation)
        self.saver.probe(self._checkpoint_bytes)
        self.pace = Pace(world, world.hosts(), config.log.straggler_every_steps, config.log.straggler_factor)
        hangs = self.run / "hangs" / f"{self.incarnation.number:06d}"
        self.watchdog = Watchdog(world, hangs, config.train.hang_timeout, self.hung)
        self.engine.clock = self.clock = StepClock(self.engine.model, world.device, self.watchdog.progress)
        self.metrics: Metrics | None = None
        if world.is_main:
            self.metrics = Metrics(self.run, config.train.tokens, self.tokens_seen, self.step, resume)
            self.metrics.text(self.step, "config", f"```yaml\n{to_yaml(config)}```")
            self.metrics.text(self.step, "start", describe_start(self.run, self.incarnation))

    @property
    def tokens_seen(self) -> int:
        return self.sequences_seen * self.config.model.context

    @property
    def step(self) -> int:
        return step_count(self.config, self.tokens_seen)

    def _check_vocabulary(self) -> None:
        """What depends on the tokenizer, before anything is read or written."""
        model, sampling = self.config.model, self.config.sampling
        if model.vocab_size != VOCAB_SIZE:
            raise UserError(
                f"model.vocab_size {model.vocab_size} is not GPT-2's vocabulary of {VOCAB_SIZE}; "
                "leave it out: the table is padded to a multiple of 128 by itself"
            )
        prompt = len(gpt2().encode_ordinary(sampling.prompt))
        if sampling.samples and not 0 < prompt <= model.context:
            raise UserError(f"sampling.prompt has {prompt} tokens; the model takes 1 to model.context {model.context}")

    def say(self, text: str) -> None:
        if self.world.is_main:
            tell(text)

    # --- the run's folder ---

    @property
    def _checkpoint_bytes(self) -> int:
        """fp32 weights and two moments."""
        return 12 * self.config.model.stored_parameters

    def _begin(self, tokens_seen: int) -> Incarnation:
        """Take the run over, once it is known that it can go on here, and before anything of it is read."""
        if self._claimed is None:
            number = self.world.from_main(lambda: begin(self.run, self.engine, tokens_seen).number)
            self._claimed = Incarnation(self.run, number)
        return self._claimed

    def _resume(self, allowed: Allowed) -> int:
        meta = resume_from(self.run, self.engine, self.fingerprints, allowed, self.say, self._begin)
        if meta is None:
            self.say(f"{self.run}: no checkpoint was completed; starting from the first token")
            return 0
        self.say(
            f"resuming at {meta['tokens_seen']:,} tokens, saved by {meta['engine']} on {meta['world_size']} rank(s)"
        )
        return int(meta["sequences_seen"])

    def _record(self, kind: str, values: dict[str, Any], text: str) -> None:
        if self.metrics is not None:
            self.metrics.event(self.step, kind, {"tokens_seen": self.tokens_seen, **values}, text)

    # --- what happens at intervals ---

    @functools.cached_property
    def unigram(self) -> float:
        return unigram_loss(self.train_data, self.validation_data, self.validation_size)

    def validate(self, stop: StopRequest) -> bool:
        """False where it was asked to stop on the way; the same on every rank."""
        if not self.validation_size:
            return True

        def interrupted() -> bool:
            self.watchdog.phase("validation")
            return self._agree(stop)

        loss = validation_loss(self.engine, self.validation_data, self.validation_size, interrupted)
        if loss is not None and self.world.is_main:
            self._record(
                "validation",
                {"validation_loss": loss, "unigram_loss": self.unigram},
                f"validation loss {loss:.4f} over {self.validation_size * self.config.model.context:,} held-out tokens "
                f"(a model that knows only how common each token is: {self.unigram:.4f})",
            )
        return loss is not None

    def sample(self, stop: StopRequest) -> bool:
        """False where it was asked to stop before; the same on every rank."""
        s = self.config.sampling
        if not s.samples:
            return True
        if self._agree(stop):
            return False
        start = time.monotonic()
        prompt = gpt2().encode_ordinary(s.prompt)
        with self.engine.evaluation() as model:
            rows = generate(
                model, self.config.model, [prompt] * s.samples, s.max_tokens,
                temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, seed=self.config.run.seed,
                on_token=lambda row, token: self.watchdog.phase("sampling"),
            )  # fmt: skip
        self.longest_samples = max(self.longest_samples, time.monotonic() - start)
        texts = [s.prompt + gpt2().decode(row) for row in rows]
        self._record("samples", {"samples": texts}, "\n".join(f"> {text}" for text in texts))
        if self.metrics is not None:
            self.metrics.text(self.step, "samples", "\n\n---\n\n".join(texts))
        return True

    def save(self, milestone: bool = False) -> None:
        if self.metrics is not None:
            self.metrics.flush()
        meta = describe(self.engine, self.sequences_seen, self.fingerprints, milestone)
        with self.watchdog.patient("a save"):
            self._tell(self.saver.save(self.engine.state(), self.engine.replica, meta, self.say))

    def _tell(self, saved: Saved | None) -> None:
        if saved is None:
            return
        seconds, stall = saved.save_seconds, saved.stall_seconds
        self._record(
            "checkpoint",
            {
                "tokens_seen": saved.checkpoint.tokens, "path": str(saved.checkpoint.path), "save_seconds": seconds,
                "stall_seconds": stall,
            },
            f"saved {saved.checkpoint.path} in {seconds:.1f} s; training stood still for {stall:.2f} s",
        )  # fmt: skip

    # --- the loop ---

    def fit(self, stop: StopRequest) -> int:
        """Train to the end, or until asked to stop; returns the exit code."""
        config = self.config
        if config.validation.tokens and not self.validation_size:
            self.say("no validation: the corpus holds less than one sample of held-out text")
        if config.schedule.shape != "constant" and config.train.tokens < config.schedule.decay_end_tokens:
            self.say(
                f"the learning rate does not reach its floor: train.tokens {config.train.tokens:,} end before "
                f"schedule.decay_end_tokens {config.schedule.decay_end_tokens:,}"
            )
        self.say(f"{config.run.name}: {config.model.parameters:,} parameters, {self.engine.describe()}")
        batches = read_ahead(
            train_batches(
                self.train_data,
                self.sequences_seen,
                config.total_sequences,
                functools.partial(batch_sequences, config),
                Share(self.world.rank, self.world.size, config.train.micro_batch),
            )
        )
        began = time.monotonic()
        try:
            last = self._loop(batches, stop)
            self.watchdog.phase("the end of the run")
            if last and self._finished():
                self.say(f"{self.run}: finished already, at {self.tokens_seen:,} tokens")
                self._ended("finished", "the last token")
                return 0
            whole = last and self.validate(stop) and self.sample(stop)
            with self.watchdog.patient("the last save"):
                self._tell(self.saver.finish())
            if not whole:
                # What a rank was stopped by, on every rank: a scheduler may have told one of them only.
                reasons = [reason for reason in self.world.gather_objects(stop.reason) if reason]
                reason = reasons[0] if reasons else "a signal"
                text = f"stopped by {reason}; resume with: megagpt train --resume {self.run}"
                self._record("stopped", {"reason": reason}, text)
                self._ended("stopped", reason)
                return ExitCode.STOPPED
            done = f"done in {duration(time.monotonic() - began)}: {self.tokens_seen:,} tokens in {self.run}"
            self._record("finished", {}, done)
            self._ended("finished", "the last token")
            self.say(f"see it with: tensorboard --logdir {config.run.folder}")
            return 0
        finally:
            batches.close()
            if self.metrics is not None:
                self.metrics.close()

    def _ended(self, outcome: str, reason: str) -> None:
        if self.world.is_main:
            self._end(outcome, reason)

    def hung(self, reason: str) -> None:
        """Note that this start hung, on the rank that noticed first."""
        self._end("failed", reason, rank=self.world.rank, host=self.world.host)

    def failed(self, error: Exception) -> None:
        """Note what this start failed of, on whichever rank sees it first. `mend`: going on would fail again."""
        reason = str(error) if isinstance(error, UserError) else first_line(error)
        mend = isinstance(error, UserError) and not isinstance(error, TransientError)
        self._end("failed", reason, rank=self.world.rank, host=self.world.host, mend=mend)

    def _end(self, outcome: str, reason: str, **more: Any) -> None:
        self.incarnation.end(outcome, reason, self.tokens_seen, **more)

    def _agree(self, stop: StopRequest) -> bool:
        """Whether some rank was asked to stop, or has too little of its time left for another step and a save."""
        return self.world.any(stop.requested(self._reserve))

    @property
    def _reserve(self) -> float:
        """Seconds from the end of a step to the end of the run, if the next step is the last: samples, that step, what
        is left of a save in flight, and a save."""
        return self.longest_samples + self.longest_step + 2 * self.saver.expected_seconds

    def _finished(self) -> bool:
        """Whether an earlier start got past the last step's validation and samples."""
        recorded = self.metrics is not None and self.metrics.has("finished", self.tokens_seen)
        return self.world.any(recorded)

    def _loop(self, batches: Iterator[Batch], stop: StopRequest) -> bool:
        """Every remaining step; False where it was asked to stop before the last, with a save under way."""
        config, step, first = self.config, self.step, self.step + 1
        looked = time.monotonic()
        while True:
            before = time.monotonic()
            self.watchdog.phase(f"step {step + 1}, waiting for data")
            batch = next(batches, None)
            if batch is None:
                return True
            ready = time.monotonic()
            tokens_before = self.tokens_seen
            self.sequences_seen += batch.sequences
            step += 1
            lr = learning_rate(config, self.tokens_seen)
            if config.model.dropout:
                seed_dropout(config, self.sequences_seen, self.world.rank)
            self.watchdog.phase(f"step {step}")
            # Compiling may take long, once.
            compiling = step == first and config.train.compile
            with self.watchdog.patient(f"step {step}, compiling") if compiling else contextlib.nullcontext():
                result = self.engine.train_step(batch, lr)
            done = time.monotonic()
            spent = self.clock.read()
            if not result.updated:
                self._skipped(result, step)
            self.guard.check(result.updated, step, self._last_good)

            def crossed(every: int, before: int = tokens_before) -> bool:
                return every > 0 and self.tokens_seen // every > before // every

            if step == first and self.resumed:
                since = seconds_since_start()
                values = {"seconds_to_first_step": since, "incarnation": self.incarnation.number}
                self._record("resumed", values, f"first step {since:.1f} s after the start")
            elif step == first + 1:
                self._tell_bound(done - before)
            if step > first:
                self.longest_step = max(self.longest_step, done - before)
            last = self.sequences_seen >= config.total_sequences
            if self.metrics is not None and (last or not config.log.every_tokens or crossed(config.log.every_tokens)):
                speed = batch.tokens / (done - before)
                self.metrics.step(step, {
                    "loss": result.loss,
                    "lr": lr,
                    "gradient_norm": result.gradient_norm,
                    "tokens_seen": self.tokens_seen,
                    "sequences_seen": self.sequences_seen,
                    "batch_tokens": batch.tokens,
                    "tokens_per_second": speed,
                    "step_seconds": done - before,
                    "data_wait_seconds": ready - before,
                    "communication_wait_seconds": spent.wait,
                    "mfu": self._mfu(speed),
                    "peak_memory_bytes": peak_memory(self.world.device),
                    "skipped_updates": self.guard.skipped,
                    **({"loss_scale": self.engine.loss_scale.value} if self.engine.loss_scale.dynamic else {}),
                })  # fmt: skip
            self._compare(self.pace.add(done - before, ready - before, spent), step)
            superseded = False
            if self.world.is_main and done - looked > _FENCE_SECONDS:
                looked, superseded = done, self._superseded()
            # Saved first: whoever sent the signal may not wait for a validation.
            stopping, failed, superseded = self.world.any_of(
                stop.requested(self._reserve), self.saver.failed, superseded
            )
            if superseded:
                raise Superseded(f"{self.run}: a newer incarnation has taken this run over; this one ends")
            if failed:
                self.saver.finish()
            self._tell(self.saver.poll())
            stopping = stopping and not last
            milestone = crossed(config.checkpoint.milestone_every_tokens)
            if last or stopping or milestone or crossed(config.checkpoint.every_tokens):
                self.save(milestone)
            if stopping:
                return False
            if not last and crossed(config.validation.every_tokens):
                self.validate(stop)
            if not last and crossed(config.sampling.every_tokens):
                self.sample(stop)

    def _tell_bound(self, step_seconds: float) -> None:
        save = self.saver.expected_seconds
        self.say(
            f"Ctrl-C, SIGTERM or SIGUSR1 ends this run within about {step_seconds + save:.1f} s: one step of "
            f"{step_seconds:.2f} s and one save of {self._checkpoint_bytes / 1e9:.2f} GB ({save:.1f} s), after a save "
            f"in flight; it exits with code {ExitCode.STOPPED}"
        )
        if torchrun_passes_sigterm_on(os.environ):
            self.say(
                "torchrun ends its ranks 30 s after it passes a signal on: give it --shutdown-timeout to wait longer"
            )
        if 0 < self.config.train.time_limit < self._reserve:
            self.say(
                f"train.time_limit {self.config.train.time_limit:g} s is shorter than the {self._reserve:.0f} s that a "
                "step and its save may take: each start will make one step"
            )

    def _superseded(self) -> bool:
        with contextlib.suppress(OSError):  # a disk that does not answer now says nothing
            return self.incarnation.is_superseded()
        return False

    def _compare(self, found: Comparison | None, step: int) -> None:
        """Log how the ranks' own work compares, and who holds the others up."""
        if found is None or self.metrics is None:
            return
        numbers = {f"ranks_{key}": value for key, value in found._asdict().items() if key != "slow"}
        self.metrics.note(step, "pace", {"tokens_seen": self.tokens_seen, **numbers})
        for sentence in found.slow:
            self._record("straggler_factor", {"text": sentence}, sentence)
            self.metrics.text(step, "slow ranks", sentence)

    def _skipped(self, result: StepResult, step: int) -> None:
        """Log a step whose update was left out, on any rank's account."""
        scale = self.engine.loss_scale
        then = f"; the loss scale is now {scale.value:g}" if scale.dynamic else ""
        text = f"step {step}: loss {result.loss}, gradient norm {result.gradient_norm}: update skipped{then}"
        self._record("skipped", {}, text)

    def _last_good(self) -> str:
        with self.watchdog.patient("the last save"):
            self._tell(self.saver.finish())
        newest = newest_complete(self.run, lambda text: None)
        return f"the last good checkpoint is {newest.path}" if newest else "no checkpoint was saved yet"

    def _mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilisation: the FLOPs of presets.flops_per_token over the devices' peak; None if unknown."""
        peak = peak_flops(self.world.device, self.config.train.precision)
        if peak is None:
            return None
        return self.config.model.flops_per_token * tokens_per_second / (peak * self.world.size)


def train(
    config: Config,
    world: World,
    resume: bool,
    allowed: Allowed = Allowed(),  # noqa: B008
    stop: StopRequest | None = None,
) -> int:
    """Run or resume; returns the exit code. `stop`: set up by the caller, who wants signals noted from earlier on.
    Raises UserError."""
    if stop is None:
        with StopRequest(config.train.time_limit) as stop:
            return train(config, world, resume, allowed, stop)
    trainer = Trainer(config, world, resume, allowed)
    try:
        with trainer.watchdog:
            return trainer.fit(stop)
    except Exception as error:
        trainer.failed(error)
        raise
