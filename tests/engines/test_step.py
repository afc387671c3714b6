"""The host's part of a step: it waits for the device once, after the update is on its way."""

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megagpt.config_file import build_config
from megagpt.engines import native
from megagpt.engines.engine import build_engine
from megagpt.engines.native import sum_of_squares
from megagpt.measure.cases import Case, share
from megagpt.models.attention import attention_kernel, attention_kernels
from megagpt.models.gpt import GPT
from megagpt.world import World


class Order(TorchDispatchMode):
    """Names of the operators that run, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_host_waits_for_the_device_once(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, as a stand-in: reading a value is what a host waits for on a GPU."""
    monkeypatch.setattr(native, "_is_one", lambda factor: False)  # as it is on a GPU
    case = Case({"name": "ddp"}, 1, accumulation=2, precision=precision)
    engine = build_engine(case.config(), World.alone())
    batch = share(0, 0, case)
    engine.train_step(batch, 1e-3)
    read = torch.Tensor.tolist
    with Order() as order:
        monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: order.names.append("tolist") or read(tensor))
        engine.train_step(batch, 1e-3, flags=lambda: (False, True, False))
    assert order.names.count("_fused_adamw_") == 2  # decayed weights, and the others
    assert "_local_scalar_dense" not in order.names
    assert order.names.count("tolist") == 1
    assert order.names[-1] == "tolist"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_changes_nothing(bad: float) -> None:
    """Not the weights, not the moments, not Adam's count of updates."""
    case = Case({"name": "ddp"}, 1)
    engine = build_engine(case.config(), World.alone())
    batch = share(0, 0, case)
    engine.train_step(batch, 1e-3)
    before = {key: shard.flat.clone() for key, shard in engine.state().items()}
    hook = engine.model.final_norm.weight.register_hook(lambda gradient: gradient * bad)
    result = engine.train_step(batch, 1e-3)
    assert not result.updated
    assert engine.updates == 1
    assert all(torch.equal(shard.flat, before[key]) for key, shard in engine.state().items())
    hook.remove()
    assert engine.train_step(batch, 1e-3).updated
    assert engine.updates == 2


def test_the_norm_is_that_of_fp64() -> None:
    """Of small tensors and of large ones, of which an fp32 norm would be off by 1e-4. The fp32 norm of a row is off by
    up to 6e-8, so its square by up to 1.2e-7."""
    torch.manual_seed(0)
    for tensors in ([torch.randn(300, 7), torch.randn(11) * 1e-4, torch.randn(1, 1)], [torch.randn(8_000_001)]):
        exact = sum(float(tensor.double().square().sum()) for tensor in tensors)
        assert float(sum_of_squares(tensors)) == pytest.approx(exact, rel=1e-6)
    assert math.isnan(float(sum_of_squares([torch.tensor([1.0, math.nan])])))
    assert float(sum_of_squares([torch.zeros(3)])) == 0


@pytest.mark.parametrize(
    ("capability", "cudnn", "dropout", "first"),
    [((9, 0), 91900, 0.0, "CUDNN"), ((10, 0), 91900, 0.0, "CUDNN"), ((9, 0), 91500, 0.0, "FLASH"),
     ((9, 0), None, 0.0, "FLASH"), ((8, 0), 91900, 0.0, "FLASH"), ((12, 0), 91900, 0.0, "FLASH"),
     ((9, 0), 91900, 0.1, "FLASH")],
)  # fmt: skip
def test_attention_tries_cudnn_first_where_it_is_right(
    capability: tuple[int, int], cudnn: int | None, dropout: float, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order that PyTorch would follow; no GPU is needed to ask for it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    usual = torch._C._get_sdp_priority_order()
    with attention_kernels(torch.device("cuda"), dropout):
        names = [torch.nn.attention.SDPBackend(number).name for number in torch._C._get_sdp_priority_order()]
        assert torch.backends.cuda.cudnn_sdp_enabled() == (first == "CUDNN")
    others = ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]
    assert names[:4] == ["CUDNN_ATTENTION", *others] if first == "CUDNN" else names[:3] == others
    assert torch._C._get_sdp_priority_order() == usual
    with attention_kernels(torch.device("cpu"), dropout):
        assert torch._C._get_sdp_priority_order() == usual


def test_the_chosen_kernel_has_a_name() -> None:
    case = Case({"name": "ddp"}, 1)
    assert attention_kernel(case.config().model, torch.device("cpu"), torch.float32) == "flash"


@pytest.mark.parametrize("residual", ["fp32", "bf16"])
def test_the_residual_stream_has_its_format(residual: str) -> None:
    tree = {"model": {"layers": 2, "width": 32, "heads": 2, "context": 16, "vocab_size": 100}}
    train = {"precision": "bf16", "residual": residual, "device": "cpu", "tokens": 32, "batch_tokens": 32}
    engine = build_engine(build_config({**tree, "train": {**train, "micro_batch": 2}}, "t"), World.alone())
    seen = set()
    for block in engine.model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.add((inputs[0].dtype, output.dtype)))
    tokens = torch.randint(100, (2, 16))
    loss = engine.model(tokens, tokens)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[residual]
    assert seen == {(dtype, dtype)}
    assert loss.dtype == torch.float32
    plain = GPT(engine.config.model)
    plain.load_state_dict(engine.model.state_dict())
    assert float(loss.detach()) == pytest.approx(float(plain(tokens, tokens).detach()), rel=2e-3)
