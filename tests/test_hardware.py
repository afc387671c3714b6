"""Peak rates by the names that drivers give to their cards."""

import pytest
import torch

from megagpt import hardware
from megagpt.hardware import LARGEST_GPU_GB, memory_bandwidth, peak_flops
from tests.conftest import Tiny, metrics

# Names as `torch.cuda.get_device_name` gives them -> dense TFLOP/s in bf16 of the data sheets; None: unknown.
NAMES = {
    "NVIDIA GB200": 2500,
    "NVIDIA B200": 2250,
    "NVIDIA B300 SXM6 AC": 2250,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H800": 989.4,
    "NVIDIA H20": 148,
    "NVIDIA H20-3e": 148,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A800-SXM4-80GB": 312,
    "NVIDIA A40": 149.7,
    "NVIDIA A30": 165,
    "NVIDIA A10": 125,
    "NVIDIA L40S": 362,
    "NVIDIA L40": 181,
    "NVIDIA L4": 121,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA GeForce RTX 4090": 165.2,
    "AMD Instinct MI300X": 1307.4,
    # No bf16 in the hardware.
    "Tesla V100-SXM2-32GB": None,
    "Tesla T4": None,
    # A name that contains another card's, and parts and variants of a card.
    "NVIDIA RTX A1000": None,
    "NVIDIA A10G": None,
    "NVIDIA A100-SXM4-40GB MIG 3g.20gb": None,
    "NVIDIA A10-4Q": None,
    "NVIDIA A40-48Q": None,
    "NVIDIA A40-1B4": None,
    "NVIDIA A100-4-20C": None,
    "NVIDIA L40S-12A": None,
    "GRID T4-16C": None,
    "GRID A100-40": None,
    "NVIDIA H800 NVL": None,
    "NVIDIA A100-SXM-64GB": None,
    "NVIDIA H100 64GB HBM2": None,
    "Tesla V100-FHHL-16GB": None,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 4090 D": None,
    "NVIDIA GeForce RTX 3090 Ti": None,
    "Some Other Card": None,
}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    hardware.device_name.cache_clear()
    yield monkeypatch
    hardware.device_name.cache_clear()


def peak(card: pytest.MonkeyPatch, name: str, precision: str) -> float | None:
    hardware.device_name.cache_clear()
    card.setattr(torch.cuda, "get_device_name", lambda device: name)
    return peak_flops(torch.device("cuda", 0), precision)


@pytest.mark.parametrize("name", NAMES)
def test_a_card_is_known_by_the_words_of_its_name(name: str, card: pytest.MonkeyPatch) -> None:
    expected = NAMES[name]
    assert peak(card, name, "bf16") == (None if expected is None else expected * 1e12)


def test_the_peak_in_fp16_is_that_in_bf16(card: pytest.MonkeyPatch) -> None:
    for name in (name for name, known in NAMES.items() if known):
        half, full = peak(card, name, "fp16"), peak(card, name, "fp32")
        assert half == peak(card, name, "bf16")
        assert half > full
    assert peak(card, "NVIDIA H100 80GB HBM3", "fp32") == 66.9e12
    assert peak(card, "NVIDIA B200", "fp32") == 75e12
    assert peak(card, "Tesla V100-SXM2-32GB", "fp16") == 125e12
    assert peak(card, "Tesla V100-PCIE-16GB", "fp16") == 112e12


def test_a_cpu_has_no_known_peak() -> None:
    assert peak_flops(torch.device("cpu"), "fp32") is None
    assert LARGEST_GPU_GB == 288


def test_the_configs_peak_decides_the_mfu(tiny: Tiny) -> None:
    from megagpt.cli import main
    from megagpt.config_file import load_config

    config = str(tiny(train={"tokens": 256}, validation={"tokens": 0}, sampling={"samples": 0}))
    assert main(["train", config, "log.peak_tflops=0.002"]) == 0
    loaded = load_config(config)
    for line in metrics(tiny().parent / "runs" / "tiny"):
        flops = loaded.model.flops_per_token * line["tokens_per_second"]
        assert line["mfu"] == pytest.approx(flops / 2e9)


def test_the_bandwidth_is_that_of_the_same_card(card: pytest.MonkeyPatch) -> None:
    known = {
        "NVIDIA H100 80GB HBM3": 3.35, "NVIDIA H100 PCIe": 2.0, "NVIDIA H200": 4.8, "NVIDIA B200": 8.0,
        "NVIDIA A100-SXM4-80GB": 2.039, "NVIDIA A100 80GB PCIe": 1.935, "NVIDIA A100-SXM4-40GB": 1.555,
        "NVIDIA L40S": 0.864, "NVIDIA H20": 4.0, "NVIDIA H20-3e": 4.8, "Tesla V100-SXM2-32GB": 0.9,
    }  # fmt: skip
    for name, expected in {**NAMES, "NVIDIA A100-SXM4-40GB": 312}.items():
        hardware.device_name.cache_clear()
        card.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        found = memory_bandwidth(torch.device("cuda", 0))
        # Every card with a known peak has a known bandwidth, and no other name has one.
        assert (found is not None) == (expected is not None or name in ("Tesla V100-SXM2-32GB", "Tesla T4")), name
        assert name not in known or found == pytest.approx(known.pop(name) * 1e12)
    assert not known
    assert memory_bandwidth(torch.device("cpu")) is None
