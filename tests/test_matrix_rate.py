"""The machine's matrix rate is that of the products of a real step; times are taken and chosen by device."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megagpt import timing
from megagpt.engines.engine import DTYPES
from megagpt.measure import matrix_rate
from megagpt.measure.matrix_rate import linears, matrix_flops, matrix_seconds
from megagpt.measure.plain import PlainGPT, plain_optimizer, plain_step
from megagpt.models.gpt import GPT
from megagpt.models.presets import PRESETS, ModelConfig

CPU = torch.device("cpu")
TINY = ModelConfig(layers=1, width=32, heads=2, context=16, vocab_size=500)


class Products(TorchDispatchMode):
    """Counts matrix products by shape (m, k, n), dtype and layout of the operands."""

    _OPERANDS: ClassVar = {"mm": slice(0, 2), "addmm": slice(1, 3)}

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Any] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operands := self._OPERANDS.get(function.overloadpacket.__name__):
            a, b = args[operands]
            assert a.dtype == b.dtype
            self.found[*a.shape, b.shape[1], a.dtype, a.is_contiguous(), b.is_contiguous()] += 1
        return function(*args, **(kwargs or {}))


def timed_as(seconds: Callable[[Callable[[], object]], float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the clock by a function of the call."""
    monkeypatch.setattr(matrix_rate, "time_call", lambda call, device: seconds(call))


@pytest.mark.parametrize("name", ["gpt2-124m", "gpt3-13b"])
@pytest.mark.parametrize("tokens", [1, 4096])
def test_the_products_flops_are_the_models_without_attention(name: str, tokens: int) -> None:
    """The whole difference: vectors (biases, LayerNorms), which the model's count takes for multiplied, and the padding
    of the vocabulary, which the products compute."""
    model = PRESETS[name].model
    with torch.device("meta"):
        vectors = sum(p.numel() for p in GPT(model).parameters() if p.dim() == 1)
    attention = 12 * model.layers * model.width * model.context
    padding = (model.padded_vocab_size - model.vocab_size) * model.width
    per_token = model.flops_per_token - attention - 6 * vectors + 6 * padding
    assert matrix_flops(model, tokens) == tokens * per_token


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_products_are_those_of_a_step_in_its_precision(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = DTYPES[precision]
    model = PlainGPT(TINY)
    optimizer = plain_optimizer(model, 1e-3, (0.9, 0.95), 1e-8, 0.1)
    rows = torch.randint(500, (2, 17), generator=torch.Generator().manual_seed(1))
    with Products() as of_step:
        plain_step(model, optimizer, rows[:, :-1], rows[:, 1:], 1.0, dtype)
    with Products() as timed:
        timed_as(lambda call: [call(), 0.0][1], monkeypatch)
        matrix_seconds(TINY, 2 * 16, dtype, CPU)
    # One more product of each layer prepares its operands.
    prepared = Counter({(32, k.inputs, k.outputs, dtype, True, False): 1 for k in linears(TINY)})
    assert timed.found - prepared == of_step.found
    assert sum(of_step.found.values()) == 15


def test_products_count_as_often_as_they_occur(monkeypatch: pytest.MonkeyPatch) -> None:
    timed_as(lambda call: 1.0, monkeypatch)
    model = ModelConfig(layers=7, width=32, heads=2, context=16, vocab_size=500)
    assert matrix_seconds(model, 32, torch.float32, CPU) == 3 * (4 * 7 + 1)


@pytest.mark.parametrize("largest", [2**31, 32 * 128, 4 * 512])
def test_large_operands_are_cut_into_equal_pieces(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that needs a second for each FLOP."""
    largest_seen = 0

    def flops(call: Callable[[], object]) -> float:
        nonlocal largest_seen
        with Products() as products:
            call()
        ((m, k, n, *_),) = products.found
        largest_seen = max(largest_seen, m * k, k * n, m * n)
        return 2.0 * m * k * n

    monkeypatch.setattr(matrix_rate, "_LARGEST_OPERAND", largest)
    timed_as(flops, monkeypatch)
    assert matrix_seconds(TINY, 32, torch.float32, CPU) == matrix_flops(TINY, 32)
    assert largest_seen <= max(largest, 512 * 32)  # weights are not cut


class Event:
    """A GPU's event: the time at which the GPU, which is behind the host, reaches it."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.time = math.nan

    def record(self) -> None:
        self.time = Event.now

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end.time - self.time)


@pytest.mark.parametrize(
    ("device", "asked", "first", "all_steps", "measured"),
    [
        ("cpu", None, 1.0, 7, 5),
        ("cpu", 3, 1.0, 5, 3),
        ("cuda", None, 8.0, 10 + 1 + 1 + 50, 50),  # the eleventh step takes 88 s
        ("cuda", 3, 1.0, 10 + 1 + 1 + 3, 3),  # 11 s
        ("cuda", 3, 0.1, 10 + 8 + 1 + 3, 3),  # 1.1 s + 1.2 s + ... + 1.8 s
    ],
)
def test_a_gpu_warms_up_by_time_after_its_first_steps(
    device: str, asked: int | None, first: float, all_steps: int, measured: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step is longer than the one before, by as much."""
    taken, waited = [], []

    def step() -> None:
        taken.append(1)
        Event.now += first * len(taken)

    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: Event.now)
    seconds = timing.time_steps(step, torch.device(device), asked)
    assert len(taken) == all_steps
    assert seconds == pytest.approx([first * (all_steps - measured + i + 1) for i in range(measured)])
    warmed = all_steps - measured - 10 - 1
    waits = 1 + warmed + 1 if device == "cuda" else 0
    assert len(waited) == waits, "the host waits during the warm-up by time, and once at the end"


@pytest.mark.parametrize(("device", "counts"), [("cpu", 1.0), ("cuda", 3.0)])
def test_a_gpus_median_and_a_cpus_best_time_count(device: str, counts: float, monkeypatch: pytest.MonkeyPatch) -> None:
    assert timing.typical([3.0, 1.0, 9.0], device) == counts
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    warmup = [0.0, 0.1, 0.6] if device == "cuda" else []  # one more call, until half a second is over
    ticks = iter(warmup + [0.0, 9.0] + [t for i in range(10) for t in (0.0, (3.0, 1.0, 9.0, 3.0)[i % 4])])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))
    calls: list[int] = []
    assert timing.time_call(lambda: calls.append(1), torch.device(device)) == counts
    assert len(calls) == (1 + 1 + 1 + 10 if device == "cuda" else 1 + 1 + 3)


def test_short_calls_are_timed_in_long_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1

    monkeypatch.setattr(timing.time, "perf_counter", lambda: calls * timing.BLOCK_SECONDS / 100)
    assert timing.time_call(call, CPU) == pytest.approx(timing.BLOCK_SECONDS / 100)
    assert calls == 1 + 1 + 3 * 100  # to warm up, to see how long one takes, three blocks
