"""Training steps measured: megagpt's engine beside `transformers` and a plain loop, on equal work.

Each row of the result runs in a process of its own, so that its peak memory is its own, and the rows take turns, so
that a machine that is slower for a while is slower for all. The best step counts.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config import Config
from megagpt.config_file import build_config, override
from megagpt.data.loader import Batch
from megagpt.engines.engine import build_engine, build_optimizer
from megagpt.errors import ExpectedError, UserError
from megagpt.hardware import device_name, peak_flops
from megagpt.models.presets import ModelConfig
from megagpt.process_memory import peak_memory
from megagpt.world import join

IMPLEMENTATIONS = ("megagpt", "plain", "transformers")
_WARMUP_STEPS = 2


@dataclasses.dataclass(frozen=True)
class Row:
    """One process's work."""

    implementation: str
    config: dict[str, Any]
    """A whole run's config; its batch is the step's."""
    steps: int
    tuned_allocator: bool
    """Whether a CPU process keeps freed memory, as megagpt's own always do."""


def bench(arguments: argparse.Namespace) -> int:
    """Print a table of the rows; raises UserError for a model, batch or implementation that cannot be."""
    against = [name for name in arguments.against.split(",") if name]
    for name in against:
        if name not in IMPLEMENTATIONS[1:]:
            raise UserError(f"--against {name!r}: valid: {', '.join(IMPLEMENTATIONS[1:])}")
    configs = [_config(arguments, precision) for precision in arguments.precision or ("fp32", "bf16")]
    rows = [
        Row(
            implementation,
            dataclasses.asdict(config),
            arguments.steps,
            implementation == "megagpt" or arguments.same_allocator,
        )
        for config in configs
        for implementation in ("megagpt", *against)
    ]
    results: dict[int, list[dict[str, Any]]] = {i: [] for i in range(len(rows))}
    for turn in range(arguments.rounds):
        for i, row in enumerate(rows):
            print(
                f"round {turn + 1}: {row.implementation} {row.config['train']['precision']}",
                file=sys.stderr,
                flush=True,
            )
            results[i].append(_in_process(row))
    model, first = configs[0].model, results[0][0]
    print(
        f"{arguments.model}: {model.parameters:,} parameters, {arguments.batch} x {model.context} tokens a step, "
        f"{first['device']}, {first['threads']} threads, torch {first['torch']}, compile {arguments.compile}"
    )
    heads = (("s/step", 9), ("tok/s", 10), ("TFLOP/s", 9), ("MFU", 7), ("peak GiB", 10), ("vs best other", 15))
    print(f"{'implementation':15}{'precision':>10}" + "".join(f"{head:>{width}}" for head, width in heads))
    for i, row in enumerate(rows):
        seconds = min(r["seconds"] for r in results[i])
        precision = row.config["train"]["precision"]
        speed = arguments.batch * model.context / seconds
        others = [
            min(r["seconds"] for r in results[j])
            for j, other in enumerate(rows)
            if other.implementation != "megagpt" and other.config["train"]["precision"] == precision
        ]
        ratio = f"{min(others) / seconds:.2f}x" if others and row.implementation == "megagpt" else ""
        peak = first["peak_flops"][precision]
        mfu = f"{speed * model.flops_per_token / peak:.1%}" if peak else "n/a"
        memory = max(r["memory"] for r in results[i]) / 2**30
        print(
            f"{row.implementation:15}{precision:>10}{seconds:9.3f}{speed:10,.0f}"
            f"{speed * model.flops_per_token / 1e12:9.3f}{mfu:>7}{memory:10.2f}{ratio:>15}"
        )
    return 0


def _config(arguments: argparse.Namespace, precision: str) -> Config:
    context = [f"model.context={arguments.context}"] if arguments.context else []
    tree: dict[str, Any] = {"model": {"preset": arguments.model}, "engine": {"name": arguments.engine}}
    for text in [*context, *(t for t in arguments.overrides if t.startswith("model."))]:
        tree = override(tree, text)
    tokens = arguments.batch * build_config(tree, "bench").model.context
    tree["train"] = {
        "tokens": tokens,
        "batch_tokens": tokens,
        "micro_batch": arguments.batch,
        "precision": precision,
        "compile": arguments.compile,
        "device": arguments.device,
    }
    for text in arguments.overrides:
        tree = override(tree, text)
    return build_config(tree, "bench")


def _in_process(row: Row) -> dict[str, Any]:
    command = [sys.executable, "-m", "megagpt.measure.steps"]
    done = subprocess.run(
        command, input=json.dumps(dataclasses.asdict(row)), capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{row.implementation} {row.config['train']['precision']}: {last}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _measure(row: Row) -> dict[str, Any]:
    config = build_config(row.config, "bench")
    with join(config.train.device, tune_allocator=row.tuned_allocator) as world:
        device = world.device
        generator = torch.Generator().manual_seed(0)
        shape = (config.train.micro_batch, config.model.context + 1)
        rows = torch.randint(config.model.vocab_size, shape, generator=generator).to(device)
        tokens, targets = rows[:, :-1], rows[:, 1:].contiguous()
        step: Callable[[], object]
        if row.implementation == "megagpt":
            engine = build_engine(config, world)
            batch = Batch([(tokens, targets)], len(rows), targets.numel())
            step = lambda: engine.train_step(batch, 1e-4)  # noqa: E731
        else:
            build = {"plain": PlainGPT, "transformers": _transformers}[row.implementation]
            step = _plain_step(build(config.model).to(device), config, tokens, targets)
        seconds = []
        for _ in range(_WARMUP_STEPS + row.steps):
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            seconds.append(time.perf_counter() - start)
        return {
            "seconds": min(seconds[_WARMUP_STEPS:]),
            "memory": peak_memory(device),
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "peak_flops": {p: peak_flops(device, p) for p in ("fp32", "bf16")},
        }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- the others ------------------------------------------------------------------------------------------------------


def _plain_step(model: nn.Module, config: Config, tokens: Tensor, targets: Tensor) -> Callable[[], object]:
    """The usual loop: autocast forward, mean cross-entropy over all logits, backward, clip, AdamW."""
    optimizer = build_optimizer(model, config)
    if config.train.compile:
        model.compile()

    def step() -> Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            output = model(tokens)
            logits = output if isinstance(output, Tensor) else output.logits
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


class PlainGPT(nn.Module):
    """GPT-2 as it is usually written, nothing fused or chunked, PyTorch's own initialisation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.width
        self.heads = config.heads
        self.wte = nn.Embedding(config.padded_vocab_size, c)
        self.wpe = nn.Embedding(config.context, c)
        self.layers = nn.ModuleList(
            nn.ModuleList([
                nn.LayerNorm(c), nn.Linear(c, 3 * c), nn.Linear(c, c),
                nn.LayerNorm(c), nn.Linear(c, 4 * c), nn.Linear(4 * c, c),
            ])
            for _ in range(config.layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(c)
        nn.init.normal_(self.wte.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        B, T = tokens.shape
        x = self.wte(tokens) + self.wpe.weight[:T]
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            norm_1, qkv, out, norm_2, up, down = layer
            q, k, v = qkv(norm_1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + out(y.transpose(1, 2).reshape(B, T, -1))
            x = x + down(F.gelu(up(norm_2(x)), approximate="tanh"))
        return F.linear(self.norm(x), self.wte.weight)


def _transformers(config: ModelConfig) -> nn.Module:
    try:
        import transformers
    except ImportError:
        raise UserError("--against transformers needs it installed: pip install transformers") from None
    from megagpt.models.huggingface import hf_config

    model: nn.Module = transformers.GPT2LMHeadModel(transformers.GPT2Config(**hf_config(config)))
    return model.train()


if __name__ == "__main__":
    try:
        print(json.dumps(_measure(Row(**json.loads(sys.stdin.read())))))
    except ExpectedError as error:
        sys.exit(str(error))
