"""The check before a run starts: its way out, which is followed here, and the micro-batch that auto means."""

import re
from collections.abc import Sequence

import pytest

from megagpt.config import Config
from megagpt.config_file import load_config
from megagpt.errors import UserError
from megagpt.planning.fit import check_fit
from megagpt.planning.memory import peak_memory
from megagpt.planning.micro_batch import largest_micro_batch, micro_batches, resolved, with_micro_batch
from tests.processes import REPOSITORY

A100_40, H100 = 42.3e9, 85e9
LONG = ["model.context=16384", "train.batch_ramp_start=0", "train.batch_ramp_tokens=0"]
LONGER = ["model.context=65536", *LONG[1:]]
FULL = ["train.micro_batch=1", "train.activation_checkpointing=full"]
PRESETS = sorted(path.name for path in (REPOSITORY / "configs").glob("gpt*.yaml"))


def followed(config: str, overrides: Sequence[str], ranks: int, advice: str) -> tuple[Config, int]:
    """The config and the number of GPUs after the advice: `set KEY=VALUE ... and take N GPUs`."""
    more = re.search(r"take (\d+) GPUs", advice)
    given = re.search(r"set (\S+=\S+(?: \S+=\S+)*)", advice)
    words = given[1].rstrip(",").split() if given else []
    return load_config(config, [*overrides, *words]), int(more[1]) if more else ranks


@pytest.mark.parametrize(
    ("config", "overrides", "ranks", "capacity", "expected"),
    [
        ("gpt2_1558m", ["engine.name=ddp", "train.micro_batch=32"], 8, H100, "set train.micro_batch="),
        ("gpt3_xl", ["engine.name=ddp", "train.micro_batch=1", *LONG], 64, A100_40, "set train.activation_checkpoin"),
        ("gpt3_2.7b", ["engine.name=ddp", "train.micro_batch=1"], 64, A100_40, "set engine.name=fsdp"),
        ("gpt3_13b", ["engine.name=ddp"], 64, H100, "set engine.name=fsdp"),
        ("gpt3_13b", ["engine.name=zero", "engine.stage=1"], 32, H100, "engine.stage="),
        ("gpt3_13b", ["engine.name=fsdp", "engine.shard_ranks=8"], 64, 32e9, "engine.shard_ranks=0"),
        ("gpt3_13b", ["engine.name=fsdp", "train.micro_batch=1"], 1, H100, "engine.offload=all"),
        ("gpt3_13b", ["engine.name=ddp", "train.micro_batch=1"], 1, A100_40, "engine.offload=all"),
        ("gpt3_175b", ["train.micro_batch=auto"], 64, A100_40, ""),
        ("gpt3_6.7b", ["engine.name=fsdp", *FULL, *LONGER], 8, A100_40, "set engine.tensor_ranks="),
    ],
)  # fmt: skip
def test_the_way_out_makes_it_fit(
    config: str, overrides: list[str], ranks: int, capacity: float, expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_fit(load_config(config, overrides), ranks, capacity, per_node=8)
    message = str(caught.value)
    assert f"does not fit on {ranks} GPU(s) of {capacity / 1e9:.1f} GB: each needs " in message
    assert expected in message
    better, gpus = followed(config, overrides, ranks, message)
    assert check_fit(better, gpus, capacity).warning == ""


def test_the_first_kind_of_change_that_helps_is_named() -> None:
    """A smaller micro-batch, if one of them fits, and then the largest such."""
    overrides = ["engine.name=ddp", "train.activation_checkpointing=none", "train.micro_batch=32"]
    config = load_config("gpt2_1558m", overrides)
    with pytest.raises(UserError, match="does not fit") as caught:
        check_fit(config, 8, H100)
    better, _ = followed("gpt2_1558m", overrides, 8, str(caught.value))
    assert better.micro_batch < 32
    larger = min(size for size in micro_batches(config, 8) if size > better.micro_batch)
    assert peak_memory(with_micro_batch(config, larger), 8).verdict(H100) != "fits"
    assert better.train.activation_checkpointing == "none"


def test_what_nothing_helps_against_is_not_called_impossible() -> None:
    config = load_config("gpt3_175b", ["train.micro_batch=1", "engine.tensor_ranks=1"])
    with pytest.raises(UserError, match="no setting of this code makes it fit: take GPUs with more memory"):
        check_fit(config, 1, 1e9)


def test_little_room_is_a_warning_with_a_way_out() -> None:
    overrides = ["engine.name=ddp", "train.micro_batch=4", "train.activation_checkpointing=none"]
    config = load_config("gpt2_1558m", overrides)
    peak = peak_memory(config, 8)
    found = check_fit(config, 8, peak.total + 0.5 * peak.reserve)
    assert found.warning.startswith("memory is tight: ")
    better, gpus = followed("gpt2_1558m", overrides, 8, found.warning)
    assert check_fit(better, gpus, peak.total + 0.5 * peak.reserve).warning == ""
    assert check_fit(config, 8, peak.total + 1.01 * peak.reserve).warning == ""


@pytest.mark.parametrize("capacity", [A100_40, H100])
@pytest.mark.parametrize("ranks", [8, 64])
@pytest.mark.parametrize("config", PRESETS)
def test_auto_is_the_largest_that_fits_and_divides(config: str, ranks: int, capacity: float) -> None:
    wanted = load_config(config, ["train.micro_batch=auto"])
    size = largest_micro_batch(wanted, ranks, capacity)
    assert wanted.batch_sequences % (wanted.shares(ranks) * size) == 0
    verdicts = {
        s: peak_memory(with_micro_batch(wanted, s), ranks).verdict(capacity) for s in micro_batches(wanted, ranks)
    }
    if "fits" in verdicts.values():
        assert size == max(s for s, verdict in verdicts.items() if verdict == "fits")
        assert check_fit(wanted, ranks, capacity).warning == ""
    else:
        assert size == 1


def test_a_batch_that_no_micro_batch_divides_is_refused() -> None:
    config = load_config("gpt2_124m", ["train.micro_batch=auto"])
    for check in (
        lambda: config.check_ranks(24),
        lambda: resolved(config, 24, H100),
        lambda: resolved(config, 24, None),
    ):
        with pytest.raises(UserError, match=r"which 24 rank\(s\) do not divide; use .* or 16 or 32 ranks$"):
            check()


@pytest.mark.parametrize(("context", "ranks", "expected"), [(1024, 1, 4), (128, 1, 32), (128, 64, 8), (8192, 1, 1)])
def test_on_a_cpu_auto_has_at_most_4096_tokens(context: int, ranks: int, expected: int) -> None:
    """Of 512 sequences."""
    overrides = [f"model.context={context}", f"train.batch_tokens={512 * context}", "train.micro_batch=auto"]
    config = load_config("gpt2_124m", [*overrides, "train.device=cpu"])
    assert resolved(config, ranks, None).micro_batch == expected


def test_auto_must_be_decided_before_it_is_read() -> None:
    config = load_config("gpt2_124m", ["train.micro_batch=auto"])
    with pytest.raises(UserError, match=r"train\.micro_batch is auto"):
        config.accumulation(8)
