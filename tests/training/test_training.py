"""Whole runs: one loss curve over world sizes, resumes bit for bit, signals, and what runs leave behind."""

import math
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from megagpt.checkpoints.folder import list_checkpoints
from megagpt.cli import main
from megagpt.config_file import load_config
from megagpt.data.loader import Share, open_corpus
from megagpt.incarnations import list_incarnations
from megagpt.measure.plain import plain_optimizer, plain_step
from megagpt.models.gpt import GPT
from megagpt.models.initialization import initialize
from megagpt.training.reserve import Reserve
from megagpt.training.watchdog import Watchdog
from tests.conftest import Tiny, metrics
from tests.processes import environment, start_ranks, torchrun_command
from tests.runs import LOSS, PATIENCE, assert_same_curve, logs, losses, wait_for_steps


def train(*arguments: str) -> int:
    return main(["train", *arguments])


# --- one loss curve ---


def exact_clip(parameters: Iterable[Tensor], clip_norm: float) -> Tensor:
    """PyTorch's own norm, in fp32, of the embedding's gradient is off by a ten-thousandth on a CPU."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.stack([g.double().norm() for g in gradients]).norm()
    for g in gradients:
        g.mul_(min(1.0, clip_norm / (norm.item() + 1e-6)))
    return norm


def reference_curve(config_path: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step, by the plain loop, with the learning rate's closed form."""
    config = load_config(str(config_path))
    corpus = open_corpus(config.data, "train", config.model.context, config.run.seed)
    model = GPT(config.model)
    initialize(model, config.model, config.run.seed)
    optimizer = plain_optimizer(model, config.optimizer.lr, (0.9, 0.95), 1e-8, weight_decay=0.1)
    results = []
    for step in range(20):
        ((tokens, targets),) = corpus.batch(range(4 * step, 4 * step + 4), Share(0, 1, 4)).micro_batches
        done = (step + 1) * 128
        share = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (done - 512) / 2048)) if done >= 512 else done / 512
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.lr * share
        loss, norm = plain_step(model, optimizer, tokens, targets, config.optimizer.clip_norm, clip=exact_clip)
        results.append((loss.item(), norm.item()))
    return results


@pytest.mark.slow
def test_ranks_and_accumulation_keep_the_curve(tiny: Tiny, tmp_path: Path) -> None:
    """A clip that is active in every step, so that a local instead of the global norm would show."""
    config = tiny(optimizer={"clip_norm": 0.5, "lr": 3e-3})
    expected = reference_curve(config)
    assert train(str(config), "run.name=one") == 0
    assert train(str(config), "run.name=accumulated", "train.micro_batch=2") == 0
    two_ranks(tmp_path, str(config), "run.name=two-accumulated", "train.micro_batch=1")
    for name in ("one", "accumulated", "two-accumulated"):
        run = tmp_path / "runs" / name
        assert_same_curve(run, expected)
        assert losses(run)[-1] < losses(run)[0] - 0.5
        validation = metrics(run, "validation")[-1]
        assert validation["validation_loss"] == pytest.approx(
            metrics(tmp_path / "runs" / "one", "validation")[-1]["validation_loss"], abs=LOSS
        )


def two_ranks(folder: Path, *arguments: str) -> None:
    """Train on two ranks, to the end."""
    ranks = start_ranks(2, arguments, folder)
    assert [rank.wait(PATIENCE) for rank in ranks] == [0, 0], logs(folder)


@pytest.mark.slow
def test_a_ramped_batch_is_the_same_run_on_any_ranks(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(train={"batch_tokens": 256, "batch_ramp_start": 32, "batch_ramp_tokens": 2000})
    assert train(str(config), "run.name=one") == 0
    two_ranks(tmp_path, str(config), "run.name=two", "train.micro_batch=2")
    one, two = metrics(tmp_path / "runs" / "one"), metrics(tmp_path / "runs" / "two")
    assert {1, 3, 5} & {line["batch_tokens"] // 32 for line in one}
    assert [line["tokens_seen"] for line in one] == [line["tokens_seen"] for line in two]
    assert_same_curve(tmp_path / "runs" / "two", tmp_path / "runs" / "one")


@pytest.mark.slow
def test_bf16_and_dropout_stay_near_the_fp32_curve(tiny: Tiny, tmp_path: Path) -> None:
    config = str(tiny(optimizer={"lr": 3e-3}))
    assert train(config, "run.name=fp32") == 0
    assert train(config, "run.name=bf16", "train.precision=bf16") == 0
    assert train(config, "run.name=dropout", "model.dropout=0.2") == 0
    fp32, bf16, dropout = (losses(tmp_path / "runs" / name) for name in ("fp32", "bf16", "dropout"))
    assert bf16 != fp32
    assert bf16 == pytest.approx(fp32, abs=3e-2)
    assert dropout[0] != fp32[0]
    assert dropout == pytest.approx(fp32, abs=0.15)
    assert dropout[-1] < dropout[0] - 1


@pytest.mark.slow
@pytest.mark.xdist_group("compiler")
def test_a_compiled_block_gives_the_same_losses(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the compiler's C++, one block of it, which takes half a minute; the engines' wrapping is tried without it. The
    graphs are those of the profiler's test, which finds them in the compiler's cache."""
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # processes that would each import PyTorch
    waits: list[str] = []
    patient = Watchdog.patient
    monkeypatch.setattr(Watchdog, "patient", lambda self, text: waits.append(text) or patient(self, text))
    config = str(tiny(model={"layers": 1}, train={"micro_batch": 2}, checkpoint={"every_tokens": 640}))
    assert train(config, "run.name=eager") == 0
    assert not [text for text in waits if "compiling" in text]
    assert train(config, "run.name=compiled", "train.compile=true", "validation.every_tokens=640") == 0
    eager, compiled = losses(tmp_path / "runs" / "eager"), losses(tmp_path / "runs" / "compiled")
    assert compiled == pytest.approx(eager, abs=5e-6)
    assert [text for text in waits if "compiling" in text] == ["step 1, compiling", "validation, compiling"]
    assert capsys.readouterr().out.count("first validation, which compiles the model") == 1
    # A checkpoint tells whether its run was compiled, as that changes the last digits.
    run = tmp_path / "runs" / "compiled"
    assert [c.open().meta.compiled for c in list_checkpoints(run)] == [True] * len(list_checkpoints(run))
    assert train("--resume", str(run), "--at", "1920", "train.compile=false") == 0
    changed = "blocks are not compiled from here on, and were compiled before (train.compile)"
    assert f"{changed}: losses may differ in the last digits" in capsys.readouterr().out
    assert list_checkpoints(run)[-1].open().meta.compiled is False


@pytest.mark.slow
def test_a_ramp_compiles_again_for_another_size(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The graphs, without their C++. The watchdog waits, the run says so, and the bound of a stop expects it."""
    compile_, patient, sentence = torch.compile, Watchdog.patient, Reserve.sentence
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend="eager", **options))
    waits: list[str] = []
    monkeypatch.setattr(Watchdog, "patient", lambda self, text: waits.append(text) or patient(self, text))
    bounds: list[Reserve] = []
    monkeypatch.setattr(Reserve, "sentence", lambda self, size: bounds.append(self) or sentence(self, size))
    ramp = {"batch_ramp_start": 32, "batch_ramp_tokens": 384, "tokens": 768, "micro_batch": 2}
    config = str(tiny(train={**ramp, "compile": True}, validation={"every_tokens": 320}))
    assert train(config, "run.name=compiled") == 0
    batches = [line["batch_tokens"] // 32 for line in metrics(tmp_path / "runs" / "compiled")]
    again = batches.index(2) + 1  # those of 3 and 4 are made of two
    assert 4 in batches
    assert [text for text in waits if "step" in text] == ["step 1, compiling", f"step {again}, compiling"]
    assert waits.count("validation, compiling") == 1
    output = capsys.readouterr().out
    assert output.count("compiles the model again: it may take minutes") == 1
    assert f"step {again}, the first with micro-batches of 2, compiles the model again" in output
    assert f"step {again} took " in output
    assert "a step that compiles the model again (" in output
    assert [reserve.step_compiles for reserve in bounds] == [False], "the ramp is over"
    assert train(config, "run.name=eager", "train.compile=false") == 0
    eager, compiled = losses(tmp_path / "runs" / "eager"), losses(tmp_path / "runs" / "compiled")
    assert compiled == pytest.approx(eager, abs=LOSS)


# --- resuming ---


@pytest.mark.slow
def test_resumed_equals_uninterrupted_bit_for_bit(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = {"every_tokens": 256, "keep_last": 9}
    config = str(tiny(model={"dropout": 0.1}, train={"tokens": 1280}, checkpoint=checkpoint))
    assert train(config, "run.name=whole") == 0
    shutil.copytree(tmp_path / "runs" / "whole", tmp_path / "runs" / "cut")
    for checkpoint in list_checkpoints(tmp_path / "runs" / "cut")[2:]:
        shutil.rmtree(checkpoint.path)
    assert train("--resume", str(tmp_path / "runs" / "cut")) == 0
    whole, cut = metrics(tmp_path / "runs" / "whole"), metrics(tmp_path / "runs" / "cut")
    assert [line["step"] for line in cut] == list(range(1, 11))
    for key in ("loss", "gradient_norm", "lr", "tokens_seen"):
        assert [line[key] for line in cut] == [line[key] for line in whole]
    validations = [metrics(tmp_path / "runs" / name, "validation")[-1] for name in ("whole", "cut")]
    assert validations[0]["validation_loss"] == validations[1]["validation_loss"]


@pytest.mark.slow
def test_sigterm_under_torchrun_saves_on_all_ranks(tiny: Tiny, tmp_path: Path) -> None:
    config = str(tiny(train={"tokens": 128 * 5000, "micro_batch": 2}))
    run = tmp_path / "runs" / "tiny"
    command = [*torchrun_command(2), "-m", "megagpt", "train", config]
    with (tmp_path / "torchrun.log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=log, stderr=log)
    wait_for_steps(run, 5, [process])
    process.terminate()
    process.wait(PATIENCE)
    output = logs(tmp_path)
    assert f"megagpt train --resume {run}" in output, output
    list_checkpoints(run)[-1].open()  # raises if it is not complete
    assert list_checkpoints(run)[-1].tokens == metrics(run)[-1]["tokens_seen"]


@pytest.mark.slow
def test_an_unfinished_run_without_a_checkpoint_starts_over(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(tiny(train={"tokens": 640}))
    assert train(config) == 0
    first = losses(tmp_path / "runs" / "tiny")
    shutil.rmtree(tmp_path / "runs" / "tiny" / "checkpoints")
    assert train("--resume", str(tmp_path / "runs" / "tiny")) == 0
    assert "starting from the first token" in capsys.readouterr().out
    assert losses(tmp_path / "runs" / "tiny") == first


@pytest.mark.slow
def test_a_finished_run_stays_as_it_is(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(str(tiny(train={"tokens": 256}))) == 0
    before = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text()
    assert train("--resume", str(tmp_path / "runs" / "tiny")) == 0
    assert "finished already" in capsys.readouterr().out
    assert (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text() == before


# --- what a run leaves behind ---


@pytest.mark.slow
def test_a_run_leaves_config_environment_metrics_and_events(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny(checkpoint={"every_tokens": 640, "keep_last": 1, "milestone_every_tokens": 1280})
    assert train(str(config)) == 0
    output = capsys.readouterr().out
    run = tmp_path / "runs" / "tiny"
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["tokens"] == 2560
    environment_line = list_incarnations(run)[0].start()
    assert environment_line["torch"] == torch.__version__
    (step, *_) = metrics(run)
    expected = {
        "loss", "lr", "gradient_norm", "tokens_seen", "sequences_seen", "batch_tokens", "tokens_per_second",
        "step_seconds", "data_wait_seconds", "mfu", "peak_memory_bytes", "skipped_updates",
    }  # fmt: skip
    assert expected <= set(step)
    assert step["mfu"] is None
    assert "MFU n/a" in output
    assert "Hello, I'm a language model," in output
    assert f"tensorboard --logdir {tmp_path / 'runs'}" in output
    events = EventAccumulator(str(run))
    events.Reload()
    assert [e.value for e in events.Scalars("loss/loss")] == pytest.approx(losses(run))
    assert {"config/text_summary", "samples/text_summary"} <= set(events.Tags()["tensors"])
    # The newest interval save, and beside it the milestones at 1,280 and 2,560.
    assert [c.tokens for c in list_checkpoints(run)] == [1280, 1920, 2560]


@pytest.mark.slow
def test_unigram_baseline_is_the_closed_form(tiny: Tiny, tmp_path: Path, corpus: Path) -> None:
    import numpy as np

    assert train(str(tiny(validation={"tokens": 10**9}))) == 0
    line = metrics(tmp_path / "runs" / "tiny", "validation")[-1]
    train_tokens, val_tokens = (np.load(corpus / f"{s}_00000.npy").astype(int) for s in ("train", "val"))
    counts = np.bincount(train_tokens, minlength=50257) + 1
    targets = val_tokens[1 : (len(val_tokens) - 1) // 32 * 32 + 1]
    assert line["unigram_loss"] == pytest.approx(-np.log(counts / counts.sum())[targets].mean(), rel=1e-6)


def test_nonfinite_steps_are_skipped_and_end_the_run(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(optimizer={"lr": 1e30}, train={"nonfinite_limit": 3}, schedule={"warmup_tokens": 0})
    assert train(str(config)) == 2
    assert "not finite in 3 steps in a row" in capsys.readouterr().err
    assert metrics(tmp_path / "runs" / "tiny")[-1]["skipped_updates"] >= 2
