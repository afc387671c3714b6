"""`megagpt plan --calibrate RUN`: the speed of a run of one size gives that of others, with logs that are made here."""

import dataclasses
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from megagpt.cli import main
from megagpt.config import Config
from megagpt.config_file import load_config, to_yaml
from megagpt.errors import UserError
from megagpt.planning.gpus import Cluster, find_gpu
from megagpt.planning.measured import own_constants
from megagpt.planning.speed import predict_speed
from tests.conftest import Refusal

H100 = "NVIDIA H100 80GB HBM3"
# Layers, width, heads, context, micro-batch, micro-batches -> CPU seconds of a step (a thread of a Xeon, PyTorch 2.13,
# fp32), scaled to a rate of 80 GFLOP/s: that of products was measured beside each step.
CPU_STEPS = {
    (2, 64, 2, 64, 4, 1): 0.129, (2, 128, 4, 128, 4, 1): 0.369, (4, 128, 4, 128, 4, 1): 0.466,
    (4, 256, 4, 128, 4, 1): 0.821, (8, 256, 4, 128, 2, 1): 0.577, (4, 64, 4, 128, 4, 4): 1.088,
    (4, 256, 4, 512, 1, 1): 0.873, (2, 512, 8, 128, 4, 1): 1.556, (6, 384, 6, 256, 4, 1): 2.918,
    (4, 512, 8, 256, 2, 2): 4.135, (2, 256, 4, 1024, 1, 1): 1.389, (12, 768, 12, 256, 1, 1): 3.388,
}  # fmt: skip


def make_run(folder: Path, config: Config, tokens_per_second: float, **facts: Any) -> Path:
    """The folder of a run with 20 steps: slow first ones, and three of other kinds that must not count."""
    run = folder / config.run.name
    (run / "incarnations").mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config))
    start = {"world_size": 8, "device": H100, "hosts": {"n1": 8}, "from_tokens": 0, **facts}
    (run / "incarnations" / "000001.json").write_text(json.dumps(start))
    batch = config.train.batch_tokens
    with (run / "metrics.jsonl").open("w") as log:
        for step in range(1, 21):
            speed = tokens_per_second * (0.1 if step <= 3 else 1 + 0.01 * (step % 3 - 1))
            line = {"event": "step", "step": step, "tokens_seen": step * batch, "batch_tokens": batch}
            log.write(json.dumps({**line, "tokens_per_second": speed}) + "\n")
        for odd in ({"batch_tokens": batch // 2}, {"profiled": True}, {"tokens_per_second": "inf"}):
            log.write(json.dumps({**line, "tokens_per_second": 1.0, **odd}) + "\n")
    return run


@pytest.mark.parametrize("size", [8, "auto"])
def test_a_runs_factor_holds_for_other_sizes(size: int | str, tmp_path: Path) -> None:
    """On the same cards, whose name the run's driver gives; the micro-batch is the one that the run had."""
    small, large = load_config("gpt2_124m", ["train.micro_batch=8"]), load_config("gpt3_6.7b")
    cluster = Cluster(find_gpu("h100"), 8)
    measured = 0.8 * predict_speed(small, cluster).tokens_per_second
    run = make_run(tmp_path, load_config("gpt2_124m", [f"train.micro_batch={size}"]), measured, micro_batch=8)
    own = own_constants(run)
    own.check(large, cluster)
    assert own.gpu.name == "h100"
    assert predict_speed(small, cluster, own.calibration).tokens_per_second == pytest.approx(measured)
    published, calibrated = predict_speed(large, cluster), predict_speed(large, cluster, own.calibration)
    assert calibrated.step == pytest.approx(published.step / 0.8)
    assert "calibrated with the run gpt2_124m" in calibrated.evidence


def shaped(shape: tuple[int, ...], name: str) -> Config:
    layers, width, heads, context, size, count = shape
    model = [f"model.layers={layers}", f"model.width={width}", f"model.heads={heads}", f"model.context={context}"]
    train = ["train.precision=fp32", "train.device=cpu", f"train.micro_batch={size}", f"run.name={name}"]
    tokens = size * count * context
    return load_config("quickstart", [*model, *train, f"train.batch_tokens={tokens}"])


def test_a_cpus_run_of_one_shape_gives_the_others(tmp_path: Path) -> None:
    """Steps that were really taken. The plan says how near all pairs of shapes are."""
    configs = {shape: shaped(shape, f"run{i}") for i, shape in enumerate(CPU_STEPS)}
    own = {}
    for shape, config in configs.items():
        speed = config.train.batch_tokens / CPU_STEPS[shape]
        run = make_run(tmp_path, config, speed, world_size=1, device="cpu", hosts={"n1": 1}, micro_batch=shape[4])
        own[shape] = own_constants(run)
        assert predict_speed(config, Cluster(own[shape].gpu, 1, 1), own[shape].calibration).step == pytest.approx(
            CPU_STEPS[shape]
        )
    errors = []
    for one, other in itertools.permutations(CPU_STEPS, 2):
        found = predict_speed(configs[other], Cluster(own[one].gpu, 1, 1), own[one].calibration)
        errors.append(abs(found.step / CPU_STEPS[other] - 1))
    assert statistics.quantiles(errors, n=10)[-1] < 0.15
    said = f"nine in ten pairs of 12 shapes on one CPU were that near ({statistics.median(errors):.0%} at the median, "
    assert f"{said}{max(errors):.0%} at most)" in found.evidence


def test_a_plan_of_which_the_run_says_nothing_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    config = load_config("gpt2_124m", ["train.micro_batch=8"])
    run = str(make_run(tmp_path, config, 1e6, micro_batch=8))
    plan = ["plan", "gpt3_xl", "--gpus", "8", "--calibrate"]
    refusal([*plan, run, "--gpu", "a100-80gb"], "ran on h100", "nothing about a100-80gb", "--gpu h100")
    refusal([*plan, run, "train.precision=fp16"], "ran in bf16", "set train.precision=bf16")
    cpu = shaped((2, 64, 2, 64, 4, 1), "cpu")
    on_cpu = str(make_run(tmp_path, cpu, 1e3, world_size=2, device="cpu", micro_batch=2))
    refusal([*plan[:2], "--calibrate", on_cpu, "--gpu-memory", "8"], "--gpu-memory: a figure of a GPU", "leave it out")
    refusal([*plan, on_cpu, "train.precision=fp32"], "ran on 2 rank(s) of a CPU", "plan for --gpus 2")
    unknown = str(make_run(tmp_path / "u", config, 1e6, device="NVIDIA RTX A1000", micro_batch=8))
    refusal([*plan, unknown], "'NVIDIA RTX A1000', whose figures are unknown", "--gpu-tflops")
    old = str(make_run(tmp_path / "o", config, 1e6, device=None))
    refusal([*plan, old], "its devices are not on record")
    short = dataclasses.replace(config, run=dataclasses.replace(config.run, name="short"))
    folder = make_run(tmp_path, short, 1e6, micro_batch=8)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:6]))
    refusal([*plan, str(folder)], "has 3 of the 5 steps", "let it run longer, or name a longer run")
    refusal([*plan, str(tmp_path)], "not a run's folder")
    refusal(["plan", "gpt3_xl", "--gpu", "cpu"], "--gpu cpu", "add --calibrate RUN")


def test_the_command_takes_a_runs_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = shaped((4, 128, 4, 128, 4, 2), "own")
    run = make_run(tmp_path, config, 2345.0, world_size=1, device="cpu", hosts={"n1": 1}, micro_batch=4)
    assert main(["plan", str(run / "config.yaml"), "--calibrate", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cluster"]["gpu"] == "cpu"
    assert found["as_configured"]["gpus"] == 1
    assert found["as_configured"]["tokens_per_second"] == pytest.approx(2345.0)
    assert main(["plan", str(run / "config.yaml"), "--calibrate", str(run)]) == 0
    text = capsys.readouterr().out
    assert "rank-hours" in text
    assert not [word for word in ("GB a GPU", "MFU", "GPU-hours") if word in text]


def test_an_unknown_card_with_given_figures_is_calibrated(tmp_path: Path) -> None:
    config = load_config("gpt2_124m", ["train.micro_batch=8"])
    run = make_run(tmp_path, config, 1e5, device="NVIDIA RTX A1000", micro_batch=8)
    given = find_gpu("a1000", memory=8e9, half=27e12, bandwidth=2.24e11, link=1.6e10)
    own = own_constants(run, given)
    found = predict_speed(config, Cluster(given, 8, 8), own.calibration)
    assert found.tokens_per_second == pytest.approx(1e5)
    with pytest.raises(UserError, match="whose figures are unknown"):
        own_constants(run)
