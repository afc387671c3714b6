"""A rank's GPU, and the process group on it, with stand-ins for PyTorch's CUDA."""

import datetime
import os
import platform
import sys
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megagpt import world
from megagpt.errors import UserError
from megagpt.world import World, choose_device
from tests.processes import run_ranks

VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets PyTorch see that many GPUs; the list takes the devices that are set."""
    taken: list[torch.device] = []

    def see(count: int) -> list[torch.device]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        for name in VISIBLE:
            monkeypatch.delenv(name, raising=False)
        for name in ALLOCATOR:
            monkeypatch.setenv(name, "")  # so that it is as before after the test
            monkeypatch.delenv(name)
        monkeypatch.setattr(platform, "release", lambda: "6.8.0")
        monkeypatch.setattr(torch.version, "hip", None)
        return taken

    return see


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_rank_takes_the_gpu_of_its_number_on_the_node(name: str, gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = gpus(8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    assert choose_device(name, 5) == torch.device("cuda", 5)
    assert taken == [torch.device("cuda", 5)]


@pytest.mark.parametrize("variable", VISIBLE)
@pytest.mark.parametrize("value", ["5", "GPU-8d5c6f2e", "MIG-3f"])
def test_a_task_that_is_shown_one_gpu_takes_it(
    variable: str, value: str, gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`srun --gpus-per-task=1`: tasks 0 to 7 of a node see one GPU each, as device 0."""
    taken = gpus(1)
    monkeypatch.setenv(variable, value)
    for local_rank in range(8):
        assert choose_device("auto", local_rank) == torch.device("cuda", 0)
    assert set(taken) == {torch.device("cuda", 0)}


@pytest.mark.parametrize(("count", "visible"), [(1, None), (2, "0,1"), (1, "")])
def test_more_ranks_than_gpus_are_refused(
    count: int, visible: str | None, gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(count)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError, match=rf"local rank 2, but only {count} GPU\(s\) here: start fewer ranks"):
        choose_device("cuda", 2)


def test_without_gpus_auto_is_the_cpu(gpus: Any) -> None:
    gpus(0)
    assert choose_device("auto", 3) == torch.device("cpu")
    with pytest.raises(UserError, match=r"train\.device is cuda, but PyTorch sees no GPU"):
        choose_device("cuda", 0)


@pytest.mark.parametrize("name", ["cuda", "cpu"])
def test_a_gpus_partial_sums_stay_fp32(name: str, gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The switches are those that cuBLAS calls read; no GPU is needed to set them."""
    gpus(1)
    matmul = torch.backends.cuda.matmul
    switches = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [getattr(matmul, switch) for switch in switches]
    try:
        for switch in switches:
            setattr(matmul, switch, True)
        World.alone(name)
        reduced = name == "cpu"
        assert [getattr(matmul, switch) for switch in switches] == [reduced, reduced]
    finally:
        for switch, value in zip(switches, before, strict=True):
            setattr(matmul, switch, value)


def allocator() -> list[str | None]:
    return [os.environ.get(name) for name in ALLOCATOR]


def test_a_gpus_segments_expand_from_its_first_use(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(2)
    seen: list[list[str | None]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: seen.append(allocator()))
    choose_device("cpu", 0)
    assert allocator() == [None, None]
    choose_device("auto", 1)
    assert seen == [["expandable_segments:True", None]]


def test_a_process_may_keep_the_allocators_defaults(gpus: Any) -> None:
    gpus(1)
    choose_device("cuda", 0, tune_allocator=False)
    assert allocator() == [None, None]


@pytest.mark.parametrize("name", ALLOCATOR)
@pytest.mark.parametrize("value", ["", "max_split_size_mb:512"])
def test_the_users_settings_of_the_allocator_stay(
    name: str, value: str, gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(1)
    monkeypatch.setenv(name, value)
    before = allocator()
    choose_device("cuda", 0)
    assert allocator() == before


@pytest.mark.parametrize(
    ("place", "attribute", "value"),
    [(sys, "platform", "win32"), (torch.version, "hip", "6.4"), (platform, "release", lambda: "6.6-microsoft-WSL2")],
    ids=["Windows", "ROCm", "WSL"],
)
def test_segments_stay_where_they_may_not_expand(
    place: Any, attribute: str, value: Any, gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(1)
    monkeypatch.setattr(place, attribute, value)
    choose_device("cuda", 0)
    assert allocator() == [None, None]


def late_settings() -> str:
    """PyTorch's view of a setting that is made after its import: the setting, or 2.11's complaint about it."""
    os.environ["PYTORCH_ALLOC_CONF"] = "no_such_setting:1"
    if hasattr(torch._C, "_accelerator_getAllocatorSettings"):
        return torch._C._accelerator_getAllocatorSettings()
    try:
        torch._C._accelerator_setAllocatorSettings("max_split_size_mb:512")
    except ValueError as error:
        return str(error)
    return ""


def test_pytorch_reads_the_setting_at_its_first_use() -> None:
    (read,) = run_ranks(1, late_settings)
    assert "no_such_setting" in read


@pytest.mark.parametrize("device", ["cpu", "cuda:3"])
def test_the_process_group_of_a_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_GLOO_LAZY_INIT", "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    found: dict[str, Any] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: found.update(more, backend=backend))
    on_gpu, store = device != "cpu", dist.HashStore()
    ranks = World(3, 8, 3, torch.device(device))
    with warnings.catch_warnings():
        world._start_process_group(ranks, store, datetime.timedelta(minutes=1))
        warnings.warn("`torch.distributed.all_gather_into_tensor` is deprecated.", FutureWarning, stacklevel=1)
    assert found["backend"] == ("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    assert found["device_id"] == (torch.device("cuda", 3) if on_gpu else None)
    assert (found["rank"], found["world_size"], found["store"]) == (3, 8, store)
    assert (os.environ["TORCH_GLOO_LAZY_INIT"], os.environ["TORCH_FR_BUFFER_SIZE"]) == ("1", "2000")


def test_the_old_name_of_the_flight_recorders_size_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "")
    monkeypatch.delenv("TORCH_FR_BUFFER_SIZE")
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "77")
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    with warnings.catch_warnings():
        world._start_process_group(World.alone(), dist.HashStore(), datetime.timedelta(minutes=1))
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "77"


def test_zero_takes_the_gpu_by_its_number_here(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    from megagpt.config_file import load_config
    from megagpt.engines import zero

    class Enough(Exception):
        pass

    class DeepSpeed:
        def get_accelerator(self) -> Any:
            return self

        is_bf16_supported = is_fp16_supported = staticmethod(lambda: True)

        def init_distributed(self, **_: object) -> None:
            raise Enough

    monkeypatch.setattr(zero, "load_deepspeed", lambda on_gpu: DeepSpeed())
    monkeypatch.setenv("LOCAL_RANK", "5")
    config = load_config(str(tiny()), ["engine.name=zero", "train.micro_batch=2", "train.compile=false"])
    for device, number in (("cuda:0", "0"), ("cpu", "5")):
        with pytest.raises(Enough):
            zero.ZeroEngine(config, World(1, 2, 5, torch.device(device)))
        assert os.environ["LOCAL_RANK"] == number
