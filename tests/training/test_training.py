"""Whole runs: one loss curve over world sizes, resumes bit for bit, signals, and what a run is refused for."""

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from megagpt.checkpoints.folder import list_checkpoints
from megagpt.cli import main
from megagpt.config_file import load_config
from megagpt.data.loader import Share, open_corpus
from megagpt.incarnations import list_incarnations
from megagpt.models.gpt import GPT
from megagpt.models.initialization import initialize
from tests.conftest import Tiny, metrics
from tests.processes import environment, run_ranks, torchrun


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run)]


def train(*arguments: str) -> int:
    return main(["train", *arguments])


# --- one loss curve ---


def reference_losses(config_path: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step, by a plain loop: whole batch, full logits, torch's own AdamW."""
    config = load_config(str(config_path))
    corpus = open_corpus(config.data, "train", config.model.context, config.run.seed)
    model = GPT(config.model)
    initialize(model, config.model, config.run.seed)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    results = []
    for step in range(20):
        batch = corpus.batch(range(4 * step, 4 * step + 4), Share(0, 1, 4))
        ((tokens, targets),) = batch.micro_batches
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        # Not PyTorch's clipping: its fp32 norm of the embedding's gradient is off by a ten-thousandth on a CPU.
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.stack([g.double().norm() for g in gradients]).norm()
        for g in gradients:
            g.mul_(min(1.0, config.optimizer.clip_norm / (norm.item() + 1e-6)))
        done = (step + 1) * 128
        share = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (done - 512) / 2048)) if done >= 512 else done / 512
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.lr * share
        optimizer.step()
        optimizer.zero_grad()
        results.append((loss.item(), norm.item()))
    return results


@pytest.mark.slow
def test_world_size_and_accumulation_do_not_change_the_run(tiny: Tiny, tmp_path: Path) -> None:
    """A clip that is active in every step, so that a local instead of the global norm would show."""
    config = tiny(optimizer={"clip_norm": 0.5, "lr": 3e-3})
    expected = reference_losses(config)
    assert train(str(config), "run.name=one") == 0
    assert train(str(config), "run.name=accumulated", "train.micro_batch=2") == 0
    for name, micro_batch in (("two", 2), ("two-accumulated", 1)):
        done = torchrun(2, ["--config", str(config), f"run.name={name}", f"train.micro_batch={micro_batch}"], tmp_path)
        assert done.returncode == 0, done.stderr
    for name in ("one", "accumulated", "two", "two-accumulated"):
        steps = metrics(tmp_path / "runs" / name)
        assert len(steps) == 20
        for line, (loss, norm) in zip(steps, expected, strict=True):
            assert line["loss"] == pytest.approx(loss, abs=5e-6)
            assert line["gradient_norm"] == pytest.approx(norm, abs=2e-5)
        assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
        validation = metrics(tmp_path / "runs" / name, "validation")[-1]
        assert validation["validation_loss"] == pytest.approx(
            metrics(tmp_path / "runs" / "one", "validation")[-1]["validation_loss"], abs=5e-6
        )


@pytest.mark.slow
def test_a_ramped_batch_that_no_world_divides_is_the_same_run(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(train={"batch_tokens": 256, "batch_ramp_start": 32, "batch_ramp_tokens": 2000})
    assert train(str(config), "run.name=one") == 0
    done = torchrun(2, ["--config", str(config), "run.name=two", "train.micro_batch=2"], tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = metrics(tmp_path / "runs" / "one"), metrics(tmp_path / "runs" / "two")
    assert {1, 3, 5} & {line["batch_tokens"] // 32 for line in one}
    assert [line["tokens_seen"] for line in one] == [line["tokens_seen"] for line in two]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=5e-6)


def test_bf16_and_dropout_train(tiny: Tiny, tmp_path: Path) -> None:
    config = str(tiny(optimizer={"lr": 3e-3}))
    assert train(config, "run.name=fp32") == 0
    assert train(config, "run.name=bf16", "train.precision=bf16") == 0
    assert train(config, "run.name=dropout", "model.dropout=0.2") == 0
    fp32, bf16, dropout = (losses(tmp_path / "runs" / name) for name in ("fp32", "bf16", "dropout"))
    assert bf16 != fp32
    assert bf16 == pytest.approx(fp32, abs=3e-2)
    assert dropout[0] != fp32[0]
    assert dropout[-1] < dropout[0]


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(tiny: Tiny, tmp_path: Path) -> None:
    config = str(tiny())
    assert train(config, "run.name=eager") == 0
    assert train(config, "run.name=compiled", "train.compile=true", "validation.every_tokens=640") == 0
    eager, compiled = losses(tmp_path / "runs" / "eager"), losses(tmp_path / "runs" / "compiled")
    assert compiled == pytest.approx(eager, abs=5e-6)


# --- resuming ---


def test_resumed_equals_uninterrupted_bit_for_bit(tiny: Tiny, tmp_path: Path) -> None:
    config = str(tiny(model={"dropout": 0.1}, checkpoint={"every_tokens": 640, "keep_last": 9}))
    assert train(config, "run.name=whole") == 0
    shutil.copytree(tmp_path / "runs" / "whole", tmp_path / "runs" / "cut")
    for checkpoint in list_checkpoints(tmp_path / "runs" / "cut")[2:]:
        shutil.rmtree(checkpoint.path)
    assert train("--resume", str(tmp_path / "runs" / "cut")) == 0
    whole, cut = metrics(tmp_path / "runs" / "whole"), metrics(tmp_path / "runs" / "cut")
    assert [line["step"] for line in cut] == list(range(1, 21))
    for key in ("loss", "gradient_norm", "lr", "tokens_seen"):
        assert [line[key] for line in cut] == [line[key] for line in whole]
    validations = [metrics(tmp_path / "runs" / name, "validation")[-1] for name in ("whole", "cut")]
    assert validations[0]["validation_loss"] == validations[1]["validation_loss"]


def start(arguments: list[str], cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "megagpt", "train", *arguments]
    return subprocess.Popen(
        command, cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_steps(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count('"step", ') >= count:
            return
        time.sleep(0.02)
    raise AssertionError("the run made no progress")


@pytest.mark.slow
def test_sigterm_under_torchrun_saves_on_all_ranks(tiny: Tiny, tmp_path: Path) -> None:
    config = str(tiny(train={"tokens": 128 * 5000, "micro_batch": 2}))
    run = tmp_path / "runs" / "tiny"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "megagpt"]
    command += ["train", config]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_steps(run, 5, process)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert f"megagpt train --resume {run}" in output, output
    assert list_checkpoints(run)[-1].problem() is None
    assert list_checkpoints(run)[-1].tokens == metrics(run)[-1]["tokens_seen"]


def test_an_unfinished_run_without_a_checkpoint_starts_over(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(tiny())
    assert train(config) == 0
    first = losses(tmp_path / "runs" / "tiny")
    shutil.rmtree(tmp_path / "runs" / "tiny" / "checkpoints")
    assert train("--resume", str(tmp_path / "runs" / "tiny")) == 0
    assert "starting from the first token" in capsys.readouterr().out
    assert losses(tmp_path / "runs" / "tiny") == first


def test_a_finished_run_stays_as_it_is(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(str(tiny())) == 0
    before = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text()
    assert train("--resume", str(tmp_path / "runs" / "tiny")) == 0
    assert "finished already" in capsys.readouterr().out
    assert (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text() == before


# --- what a run leaves behind ---


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


# --- what is refused ---


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *parts: str) -> None:
    """Exit code 2, one line, every part in it, no traceback."""
    assert train(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert "Traceback" not in error
    for part in parts:
        assert part in error


def test_what_a_run_is_refused_for(
    tiny: Tiny, tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(tiny())
    run = tmp_path / "runs" / "tiny"
    refused(capsys, [], "name one config")
    refused(capsys, ["nowhere.yaml"], "nowhere.yaml")
    refused(capsys, [config, "train.micro_batch=3"], "micro_batch 3", "2 or 4")
    refused(capsys, [config, "data.sources=[{path: missing}]"], "missing", "megagpt prepare")
    (tmp_path / "empty").mkdir()
    refused(capsys, [config, f"data.sources=[{{path: {tmp_path / 'empty'}}}]"], "no token shards")
    long = ["model.context=65536", "train.batch_tokens=65536", "train.micro_batch=1", "train.tokens=65536"]
    refused(capsys, [config, *long], "less than one sequence", "65536")
    refused(capsys, [config, "model.vocab_size=50304"], "model.vocab_size 50304", "50257")
    refused(capsys, [config, "model.vocab_size=50000"], "model.vocab_size 50000", "50257")
    refused(capsys, [config, "sampling.prompt=''"], "sampling.prompt", "0 tokens")
    refused(capsys, ["--resume", str(tmp_path / "nothing")], "nothing", "not a run")
    refused(capsys, ["--resume", str(run), config], "--resume")
    (tmp_path / "file").write_text("kept")
    refused(capsys, [config, f"run.folder={tmp_path}", "run.name=file"], str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "kept"
    (tmp_path / "runs" / "half" / "checkpoints").mkdir(parents=True)
    refused(capsys, [config, "run.name=half"], "already holds a run")
    if not torch.cuda.is_available():
        refused(capsys, [config, "train.device=cuda"], "train.device", "cpu")
    assert not run.exists()
    assert train(config) == 0
    before = sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*"))
    refused(capsys, [config], "already holds a run", f"--resume {run}")
    assert sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*")) == before


def test_a_checkpoint_of_another_model_or_of_other_data(
    tiny: Tiny, tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(str(tiny())) == 0
    run = tmp_path / "runs" / "tiny"
    capsys.readouterr()
    wider = ["--resume", str(run), "model.width=64"]
    refused(capsys, wider, "model.width 32 there, 64 here", "another run.name")
    recipe = ["--allow-recipe-change", "--allow-data-change"]
    refused(capsys, [*wider, *recipe], "model.width 32 there, 64 here")
    refused(capsys, ["--resume", str(run), "run.seed=1"], "run.seed 0 there, 1 here", "--allow-recipe-change")
    both = ["train.batch_tokens=256", "optimizer.lr=1e-4"]
    refused(
        capsys, ["--resume", str(run), *both], "train.batch_tokens 128 there, 256 here", "optimizer.lr 0.0006 there"
    )
    from megagpt.data.prepare import prepare
    from megagpt.data.sources import open_source

    (tmp_path / "other.jsonl").write_text("\n".join(json.dumps({"text": f"other {i}" * 99}) for i in range(100)))
    prepare(open_source(str(tmp_path / "other.jsonl")), tmp_path / "other", val_fraction=0.1, workers=1)
    other = ["--resume", str(run), f"data.sources=[{{path: {tmp_path / 'other'}}}]"]
    refused(capsys, other, "data ", "--allow-data-change")
    refused(capsys, [*other, "--allow-recipe-change"], "--allow-data-change")


def test_a_change_that_is_meant_goes_on(
    tiny: Tiny, tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the saved position with the new recipe and the new data, which the next resume takes for its own."""
    config = str(tiny(train={"tokens": 1280}, schedule={"decay_end_tokens": 2560}))
    assert train(config) == 0
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(corpus, tmp_path / "moved")
    sources = [{"path": str(tmp_path / "moved"), "weight": 1}, {"path": str(corpus), "weight": 3}]
    changes = [f"data.sources={json.dumps(sources)}", "optimizer.lr=1e-5", "model.dropout=0.1", "train.tokens=1920"]
    capsys.readouterr()
    assert train("--resume", str(run), "--allow-data-change", "--allow-recipe-change", *changes) == 0
    output = capsys.readouterr().out
    for difference in ("optimizer.lr 0.0006 there, 1e-05 here", "model.dropout 0.0 there, 0.1 here", "data"):
        assert f"resuming with a change: {difference}" in output
    steps = metrics(run)
    assert [line["step"] for line in steps] == list(range(1, 16))
    assert max(line["lr"] for line in steps[10:]) <= 1e-5 < min(line["lr"] for line in steps[3:10])
    assert train("--resume", str(run), "train.tokens=2560") == 0
    assert [line["step"] for line in metrics(run)] == list(range(1, 21))


def test_half_written_checkpoints_are_skipped_and_said(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(checkpoint={"every_tokens": 640, "keep_last": 9})
    assert train(str(config)) == 0
    run = tmp_path / "runs" / "tiny"
    expected = losses(run)
    first, second, third, fourth = list_checkpoints(run)
    (fourth.path / "COMPLETE").unlink()
    shard = next(third.path.glob("*.distcp"))
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    (second.path / "meta.json").unlink()
    capsys.readouterr()
    assert train("--resume", str(run)) == 0
    output = capsys.readouterr().out
    for damaged, reason in ((fourth, "COMPLETE is missing"), (third, f"{shard.name} has"), (second, "meta.json is")):
        (line,) = (line for line in output.splitlines() if f"{damaged.path.name}.corrupt" in line)
        assert str(damaged.path) in line
        assert reason in line
    assert f"resuming at {first.tokens:,} tokens" in output
    assert losses(run) == expected


def test_altered_shard_is_found_while_training(
    tiny: Tiny, tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    shard = copy / "train_00000.npy"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    refused(capsys, [str(tiny()), f"data.sources=[{{path: {copy}}}]"], "train_00000.npy", "checksums")


@pytest.mark.slow
def test_an_error_that_every_rank_sees_is_printed_once_with_the_rank(tiny: Tiny, tmp_path: Path) -> None:
    done = torchrun(2, ["--config", str(tiny()), "train.micro_batch=3"], tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("megagpt: error:") == 1
    assert "of 2] train.batch_tokens" in done.stderr


def test_every_rank_starts_from_the_same_weights(tiny: Tiny) -> None:
    path = str(tiny())
    (one,) = run_ranks(1, initial_sum, path)
    assert run_ranks(2, initial_sum, path) == [one, one]


def initial_sum(path: str) -> float:
    from megagpt.engines.engine import build_engine
    from megagpt.world import join

    with join("cpu") as world:
        engine = build_engine(load_config(path), world)
        return sum(float(s.flat.double().abs().sum()) for s in engine.state().values())
