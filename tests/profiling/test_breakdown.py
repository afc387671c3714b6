"""A trace added up by part: hand-written traces with known answers, as PyTorch writes them for a CPU and for a GPU."""

import gzip
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.profiling import ranges
from megagpt.profiling.breakdown import breakdown, collectives
from megagpt.profiling.parts import Part
from megagpt.profiling.trace import Level, Span, Trace, read_trace

NODE = "autograd::engine::evaluate_function: "
Event = dict[str, Any]
Time = tuple[float, float]
MAIN, AUTOGRAD, GLOO = 1, 2, 3


def event(category: str, name: str, time: Time, thread: int = MAIN, **arguments: Any) -> Event:
    """`time`: begin and end (us)."""
    begin, end = time
    base = {"ph": "X", "cat": category, "name": name, "pid": 7, "tid": thread}
    return {**base, "ts": begin, "dur": end - begin, "args": arguments}


def named(name: str, time: Time, thread: int = MAIN) -> Event:
    return event("user_annotation", name, time, thread)


def op(name: str, time: Time, number: int | None = None, thread: int = MAIN) -> Event:
    return event("cpu_op", name, time, thread, **({} if number is None else {"Sequence number": number}))


def write(folder: Path, events: list[Event], name: str = "trace.json") -> Trace:
    """The events of a step from 0 to 1,000 us, in a file, and read again."""
    opened = gzip.open if name.endswith(".gz") else open
    with opened(folder / name, "wt") as file:
        json.dump({"traceEvents": [named("ProfilerStep#1", (0, 1000)), *events]}, file)
    return read_trace(folder / name)


def parts(trace: Trace, shortest: dict[tuple[str, int], int] | None = None) -> dict[Part, float]:
    """Microseconds of each part that took time."""
    found = breakdown(trace, collectives(trace) if shortest is None else shortest)
    assert sum(found.seconds.values()) == pytest.approx(found.step_seconds, rel=1e-12)
    return {part: round(seconds * 1e6, 3) for part, seconds in found.seconds.items() if seconds}


# The forward pass of one block, from 100 to 500 us; numbers are autograd's.
FORWARD = [
    named(ranges.DATA, (0, 50)),
    named(ranges.MICRO_BATCH, (100, 900)),
    named(ranges.FORWARD, (100, 500)),
    op("aten::embedding", (110, 130), 1),
    named(ranges.BLOCK, (200, 400)),
    op("aten::layer_norm", (200, 220), 2),
    op("aten::linear", (220, 290), 3),
    op("aten::t", (221, 225), 3),
    op("aten::addmm", (230, 290), 4),
    op("aten::scaled_dot_product_attention", (300, 340), 5),
    op("aten::bmm", (310, 330), 5),
    op("_LinearCrossEntropy", (410, 490), 6),
    op("aten::mm", (420, 480)),
]


def test_on_a_cpu_each_moment_belongs_to_the_innermost_operator(tmp_path: Path) -> None:
    backward = [
        op(f"{NODE}_LinearCrossEntropyBackward", (510, 530), 6),
        op("aten::mul", (512, 528)),
        op(f"{NODE}BmmBackward0", (540, 580), 5),
        op("aten::bmm", (545, 575)),
        op(f"{NODE}AddmmBackward0", (600, 700), 4),
        op("aten::mm", (610, 690)),
        op(f"{NODE}EmbeddingBackward0", (700, 720), 1),
        op(f"{NODE}torch::autograd::AccumulateGrad", (720, 740), 2**64 - 1),
        op("aten::add_", (722, 738)),
    ]
    update = [
        named(ranges.UPDATE, (900, 950)),
        op("aten::linalg_vector_norm", (900, 910)),
        named("Optimizer.step#AdamW.step", (920, 950)),
        op("aten::_fused_adamw_", (920, 945)),
    ]
    trace = write(tmp_path, [*FORWARD, *backward, *update], "trace.json.gz")
    assert not trace.on_gpu
    expected = {
        Part.DATA: 50,
        Part.EMBEDDING: 20 + 20,
        Part.BLOCKS: 20 + 10 + 20,  # LayerNorm, the linear layer around its product, the same of its gradient
        Part.PRODUCTS: 60 + 80,
        Part.ATTENTION: 40 + 40,
        Part.HEAD: 80 + 20,
        Part.OTHER: 20,
        Part.OPTIMIZER: 10 + 25,
    }
    assert parts(trace) == {**expected, Part.HOST: 1000 - sum(expected.values())}


def test_compiled_blocks_keep_their_products_and_attention(tmp_path: Path) -> None:
    compiled = [
        named(ranges.FORWARD, (100, 500)),
        named(ranges.BLOCK, (200, 400)),
        op("Torch-Compiled Region: 0/0", (200, 400)),
        op("CompiledFunction", (210, 390), 7),
        op("## Call CompiledFxGraph abc ##", (220, 380)),
        op("aten::addmm", (230, 260)),
        op("aten::_scaled_dot_product_flash_attention_for_cpu", (270, 300)),
        op(f"{NODE}CompiledFunctionBackward", (600, 700), 8),  # the graph has made two nodes
        op("CompiledFunctionBackward", (600, 700), 8),
        op("aten::mm", (610, 650)),
        op("aten::_scaled_dot_product_flash_attention_for_cpu_backward", (660, 680)),
    ]
    assert parts(write(tmp_path, compiled)) == {
        Part.PRODUCTS: 30 + 40, Part.ATTENTION: 30 + 20, Part.BLOCKS: 200 - 60 + 100 - 60, Part.HOST: 700,
    }  # fmt: skip


def test_on_a_gpu_kernels_belong_to_what_launched_them(tmp_path: Path) -> None:
    numbers = itertools.count(1)
    events = list(FORWARD)

    def kernel(name: str, launch: float, time: Time, thread: int = MAIN, runtime: str = "cuda_runtime") -> None:
        number = next(numbers)
        events.append(event(runtime, "cudaLaunchKernel", (launch, launch + 1), thread, correlation=number))
        events.append(event("kernel", name, time, 107, correlation=number))

    kernel("embedding_kernel", 115, (150, 170))
    kernel("layer_norm_kernel", 205, (250, 300))
    kernel("sm90_xmma_gemm", 250, (300, 400))
    kernel("flash_fwd_kernel", 320, (400, 450))
    kernel("nvjet_gemm", 425, (450, 550))
    # Autograd's own thread, which finds the forward operator by its number.
    events.append(op(f"{NODE}AddmmBackward0", (600, 650), 4, AUTOGRAD))
    events.append(op("aten::mm", (610, 640), None, AUTOGRAD))
    kernel("sm90_xmma_gemm", 620, (620, 720), AUTOGRAD)
    events.append(op(f"{NODE}ScaledDotProductCudnnAttentionBackward0", (650, 660), 5, AUTOGRAD))
    kernel("cudnn_generated_kernel", 655, (720, 800), AUTOGRAD)
    # Triton's kernels have no operator: their names tell a product from the rest.
    events.append(op(f"{NODE}CompiledFunctionBackward", (660, 700), 3, AUTOGRAD))
    kernel("triton_poi_fused_gelu_3", 665, (800, 810), AUTOGRAD, "cuda_driver")
    kernel("triton_tem_fused_mm_5", 667, (810, 830), AUTOGRAD, "cuda_driver")
    # An exchange that kernels hide in part.
    events.append(op("c10d::allreduce_", (690, 700), None, AUTOGRAD))
    kernel("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgs)", 692, (820, 900), AUTOGRAD)
    events.append(named(ranges.UPDATE, (900, 950)))
    kernel("multi_tensor_apply_kernel", 910, (920, 1100))

    trace = write(tmp_path, events)
    assert trace.on_gpu
    assert trace.end - trace.begin == 1_100_000, "the last kernel ends after the host's step"
    expected = {
        Part.DATA: 50, Part.EMBEDDING: 20, Part.BLOCKS: 50 + 10, Part.PRODUCTS: 100 + 100 + 20,
        Part.ATTENTION: 50 + 80, Part.HEAD: 100, Part.EXCHANGE: 70, Part.OPTIMIZER: 180,
    }  # fmt: skip
    expected[Part.HOST] = 1100 - sum(expected.values())
    assert parts(trace) == expected
    # The fastest rank's exchange took 30 us: this one waited for 50, of which kernels hid 10.
    ((key, _),) = collectives(trace).items()
    assert parts(trace, {key: 30_000}) == {**expected, Part.EXCHANGE: 30, Part.PEERS: 40}


def test_on_a_cpu_an_exchange_counts_if_nothing_computes(tmp_path: Path) -> None:
    events = [
        named("gloo:all_reduce", (100, 300), GLOO),
        named("gloo:all_reduce", (600, 700), GLOO),
        op("aten::add_", (150, 200)),
        op("aten::add_", (160, 170), None, GLOO),  # the sum is the exchange's own work
        # Hooks of autograd wait for gloo inside the operator of a node.
        op(f"{NODE}AddmmBackward0", (550, 750), 4),
    ]
    trace = write(tmp_path, events)
    assert parts(trace) == {Part.OTHER: 50 + 100, Part.EXCHANGE: 150 + 100, Part.HOST: 600}
    times = collectives(trace)
    assert times == {("gloo:all_reduce", 0): 200_000, ("gloo:all_reduce", 1): 100_000}
    assert parts(trace, {**times, ("gloo:all_reduce", 0): 40_000}) == {
        Part.OTHER: 150, Part.EXCHANGE: 40 + 100, Part.PEERS: 110, Part.HOST: 600,
    }  # fmt: skip


LEVELS = {Part.DATA: Level.DATA, Part.EXCHANGE: Level.EXCHANGE, Part.HEAD: Level.OPERATOR, Part.OTHER: Level.CONTAINER}
# Between the two steps, a run did something else.
STEPS = [(0, 40), (60, 100)]
SPANS = st.builds(
    lambda begin, length, part, name: Span(begin, begin + length, LEVELS[part], part, name),
    st.integers(-20, 120), st.integers(0, 60), st.sampled_from(list(LEVELS)), st.sampled_from(["nccl", "x"]),
)  # fmt: skip


@given(st.lists(SPANS, max_size=12, unique=True), st.integers(0, 60))
def test_parts_add_up_to_the_step_whatever_overlaps(spans: list[Span], shortest: int) -> None:
    trace = Trace(STEPS, spans, on_gpu=True)
    found = breakdown(trace, dict.fromkeys(collectives(trace), shortest))
    assert found.step_seconds == 40e-9
    assert sum(found.seconds.values()) == pytest.approx(40e-9, rel=1e-9)

    def is_in_a_step(time: int) -> bool:
        return any(begin <= time < end for begin, end in STEPS)

    def part_at(time: int) -> Part:
        """By the definition: of all that covers a moment, the highest level."""
        covering = [(float(s.level), s) for s in spans if s.begin <= time < s.end]
        for i, (_, s) in enumerate(covering):
            if s.part is Part.EXCHANGE and s.name == "nccl" and is_in_a_step(s.begin) and time < s.end - shortest:
                covering[i] = 2.5, s
        level, span = max(covering, default=(0.0, None), key=lambda pair: pair[0])
        return Part.HOST if span is None else Part.PEERS if level == 2.5 else span.part

    expected = Counter(part_at(time) for time in range(100) if is_in_a_step(time))
    assert {p: round(s * 2e9) for p, s in found.seconds.items() if round(s * 2e9)} == expected


def test_a_file_that_was_cut_off_or_has_no_steps_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text('{"traceEvents": [{"ph": "X", ')
    (tmp_path / "empty.json").write_text('{"traceEvents": []}')
    for name in ("cut", "empty"):
        with pytest.raises(ValueError):
            read_trace(tmp_path / f"{name}.json")


def launched(number: int, time: int, runtime: str = "cudaLaunchKernel") -> Event:
    return event("cuda_runtime", runtime, (time, time + 1), correlation=number)


def test_a_trace_that_lost_kernels_is_refused(tmp_path: Path) -> None:
    """The profiler stops recording kernels when its buffers are full, and says so to nobody."""
    launches = [launched(number, number) for number in range(200)]
    kernels = [event("kernel", "gemm", (n, n + 1), 107, correlation=n) for n in range(200)]
    # Copies need not reach the GPU, and work between steps does not count.
    others = [launched(300, 500, "cudaMemcpyAsync"), *(launched(400 + n, 1000 + n) for n in range(50))]
    assert write(tmp_path, [*launches, *kernels[1:], *others]).on_gpu, "one may lie at the edge"
    with pytest.raises(ValueError, match=r"the trace lacks 150 of the 200 kernels.*; profile fewer steps"):
        write(tmp_path, [*launches, *kernels[:50], *others])


def test_each_step_lasts_until_its_last_kernel(tmp_path: Path) -> None:
    events = [named("ProfilerStep#2", (1100, 1500)), launched(1, 990), launched(2, 1400), launched(3, 1050)]
    times = [(1000, 1200), (1450, 1600), (1210, 1250)]
    events += [event("kernel", "gemm", time, 107, correlation=n) for n, time in enumerate(times, 1)]
    trace = write(tmp_path, events)
    assert trace.steps == [(0, 1_100_000), (1_100_000, 1_600_000)]
    assert (trace.begin, trace.end) == (0, 1_600_000)


def test_time_between_two_steps_is_in_neither(tmp_path: Path) -> None:
    operators = [op("aten::add_", (900, 1000)), op("aten::mul", (1500, 2500)), op("aten::sum", (3000, 3200))]
    assert parts(write(tmp_path, [named("ProfilerStep#2", (3000, 4000)), *operators])) == {
        Part.OTHER: (100 + 200) / 2,
        Part.HOST: (900 + 800) / 2,
    }
