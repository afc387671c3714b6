"""How a GPU's matrix kernels add up."""

from types import SimpleNamespace

import pytest
import torch

from megagpt.config_file import load_config
from megagpt.engines import engine as engines
from megagpt.engines.engine import build_engine
from megagpt.world import World


@pytest.mark.parametrize(("device", "reduced"), [("cuda", False), ("cpu", True)])
def test_a_gpus_partial_sums_stay_fp32(device: str, reduced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The switches are those that cuBLAS calls read; no GPU is needed to set them."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [getattr(matmul, name) for name in names]
    seen = []
    built = SimpleNamespace(resolve_name=lambda name: lambda config, world: seen.append(name))
    monkeypatch.setattr(engines, "pkgutil", built)
    try:
        for name in names:
            setattr(matmul, name, True)
        build_engine(load_config("gpt2_124m"), World(0, 1, 0, torch.device(device)))
        assert [getattr(matmul, name) for name in names] == [reduced, reduced]
        assert len(seen) == 1
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)
