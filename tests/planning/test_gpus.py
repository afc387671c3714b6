"""GPUs by name, for people who plan."""

import math

import pytest

from megagpt.cards import CARDS, card
from megagpt.errors import UserError
from megagpt.planning.gpus import Cluster, find_gpu, gpu_names, gpu_of_device

# As people, shops and drivers spell them -> the name in plans.
SPELLINGS = {
    "H100": "h100", "h100_80gb": "h100", "h100-sxm5-80gb": "h100", "NVIDIA H100 80GB HBM3": "h100",
    "H100 PCIe": "h100-pcie", "nvidia_h100_nvl": "h100-nvl", "h200_141gb": "h200", "NVIDIA GH200 480GB": "gh200",
    "a100": "a100-80gb", "A100_40GB": "a100-40gb", "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA A100-SXM4-40GB": "a100-40gb", "NVIDIA A100 80GB PCIe": "a100-80gb-pcie",
    "B200-192GB": "b200", "NVIDIA B300 SXM6 AC": "b300", "gb200": "gb200", "AMD Instinct MI300X OAM": "mi300x",
    "MI325X": "mi325x", "v100": "v100-32gb", "Tesla V100-SXM2-16GB": "v100-16gb", "l40s": "l40s",
    "rtx_4090": "rtx-4090", "NVIDIA GeForce RTX 4090": "rtx-4090", "4090": "rtx-4090",
}  # fmt: skip
# Names of no card, or of a variant with other figures.
UNKNOWN = ("h1000", "a10g", "tpu-v4", "h100_96gb_500w", "h100-64gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "80gb", "")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_gpu_is_found_in_any_spelling(spelling: str) -> None:
    assert find_gpu(spelling).name == SPELLINGS[spelling]


@pytest.mark.parametrize("name", UNKNOWN)
def test_no_other_card_passes_for_a_known_one(name: str) -> None:
    with pytest.raises(UserError, match="give its figures: --gpu-memory, --gpu-tflops, --gpu-bandwidth, --gpu-link"):
        find_gpu(name)


def test_each_card_has_one_name_and_its_figures() -> None:
    found = [find_gpu(name) for name in gpu_names()]
    assert [gpu.name for gpu in found] == gpu_names()
    assert len(found) == len(CARDS)
    for gpu in found:
        assert all(0 < figure < math.inf for figure in (gpu.memory, gpu.half, gpu.fp32, gpu.bandwidth, gpu.link))
        assert gpu.watts > 0
        assert gpu.half > gpu.fp32
        assert set(dict(gpu.origins).values()) == {"data sheet", "assumed"}
        assert [name for name, origin in gpu.origins if origin == "assumed"] == ["network"]


def test_plans_and_running_devices_share_one_table() -> None:
    for name, driver in (("h100", "NVIDIA H100 80GB HBM3"), ("a100-80gb", "NVIDIA A100-SXM4-80GB")):
        gpu, found = find_gpu(name), card(driver)
        assert found is not None
        assert gpu_of_device(driver) == gpu
        assert (gpu.half, gpu.bandwidth, gpu.memory) == (found.half * 1e12, found.bandwidth * 1e12, found.memory * 1e9)


def test_a_device_says_its_own_memory() -> None:
    gpu = gpu_of_device("NVIDIA H100 80GB HBM3", 84.9e9)
    assert gpu is not None
    assert (gpu.name, gpu.memory) == ("h100", 84.9e9)
    assert gpu_of_device("NVIDIA GeForce RTX 4090 Laptop GPU") is None


def test_given_figures_replace_those_of_the_data_sheet() -> None:
    gpu = find_gpu("h100", memory=94e9, watts=500)
    assert (gpu.memory, gpu.watts, gpu.half) == (94e9, 500, 989.4e12)
    assert dict(gpu.origins)["memory"] == "given"
    assert dict(gpu.origins)["half"] == "data sheet"
    own = find_gpu("my card", memory=48e9, half=200e12, bandwidth=1e12, link=32e9)
    assert own.name == "my card"
    assert dict(own.origins)["fp32"] == "assumed"


def test_an_unknown_gpu_is_answered_with_near_names() -> None:
    with pytest.raises(UserError) as caught:
        find_gpu("mi350x", memory=288e9, half=2300e12)
    assert "mi3" in str(caught.value).partition("did you mean")[2]
    assert str(caught.value).endswith("give its figures: --gpu-bandwidth, --gpu-link")


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
def test_figures_are_numbers_above_zero(value: float) -> None:
    with pytest.raises(UserError, match="give a number above 0"):
        find_gpu("h100", memory=value)


def test_a_cluster_has_the_usual_network_of_its_gpu() -> None:
    assert Cluster(find_gpu("h100"), 16).network == 400
    assert Cluster(find_gpu("h100"), 16, network=50).network == 50
    assert [Cluster(find_gpu("h100"), gpus).nodes for gpus in (1, 8, 9, 64)] == [1, 1, 2, 8]
    with pytest.raises(UserError, match="number of GPUs 0"):
        Cluster(find_gpu("h100"), 0)
