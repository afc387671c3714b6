"""What an engine is, and the step that all engines share.

An engine owns weights, gradients and optimizer state of one model across the ranks. The shared step:

    loss = sum of token losses / global token count, micro-batch by micro-batch; backward;
    one gradient synchronisation; clip by the global norm; skip if not finite; update.
"""

import abc
import contextlib
import hashlib
import importlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megagpt.config import Config
from megagpt.data.loader import Batch
from megagpt.distributed import World
from megagpt.errors import UserError
from megagpt.models.gpt import GPT
from megagpt.models.initialization import is_decayed

# name -> where its class lives; imported on use, so that no engine costs another's import.
ENGINES = {"ddp": "megagpt.engines.ddp:DDPEngine"}


class StepResult(NamedTuple):
    """What one optimizer step did."""

    loss: float
    """Mean over all tokens of the global batch, in nats."""
    gradient_norm: float
    """Global norm before clipping."""
    tokens: int
    """Targets of the global batch that counted."""
    updated: bool
    """False where loss or gradient was not finite and the weights stayed as they were."""


class Engine(abc.ABC):
    """One model across the ranks."""

    def __init__(self, config: Config, world: World) -> None:
        self.config = config
        self.world = world

    @abc.abstractmethod
    def train_step(self, batch: Batch, lr: float) -> StepResult:
        """One optimizer step over this rank's share of a global batch."""

    @abc.abstractmethod
    def evaluation_model(self) -> nn.Module:
        """The model for evaluation and sampling: uncompiled, over the same weights. Call it equally often on every
        rank."""

    @abc.abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Weights and both Adam moments in fp32, keyed `model.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME`. The tensors are
        the engine's own: writing into them and then calling `state_loaded` resumes from them."""

    @abc.abstractmethod
    def state_loaded(self, updates: int) -> None:
        """`state()` was overwritten with a checkpoint after `updates` optimizer updates."""

    @property
    @abc.abstractmethod
    def updates(self) -> int:
        """Optimizer updates so far: Adam's bias correction depends on it."""

    def describe(self) -> str:
        """One line for logs."""
        return f"{self.config.engine.name} on {self.world.size} x {self.world.device.type}"

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[nn.Module]:
        """The model in evaluation mode, without gradients, in the run's precision."""
        model = self.evaluation_model()
        model.eval()
        try:
            # Shapes change with every call here: compiled blocks would be compiled again and again.
            eager = torch.compiler.set_stance("force_eager")
            with torch.no_grad(), eager, autocast(self.config, self.world.device):
                yield model
        finally:
            model.train()


def build_engine(config: Config, world: World) -> Engine:
    """The engine that the config names, with initial weights."""
    if config.engine.name not in ENGINES:
        raise UserError(f"engine.name {config.engine.name!r}: valid: {', '.join(ENGINES)}")
    module, _, name = ENGINES[config.engine.name].partition(":")
    engine: Engine = getattr(importlib.import_module(module), name)(config, world)
    return engine


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """bf16 for the products where the config asks for it; weights, sums and the softmax stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16")


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Two groups for AdamW: decayed matrices, and everything else."""
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if is_decayed(n)], "weight_decay": config.optimizer.weight_decay},
        {"params": [p for n, p in named if not is_decayed(n)], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    o = config.optimizer
    return torch.optim.AdamW(parameter_groups(model, config), o.lr, (o.beta1, o.beta2), o.eps, fused=True)


def compile_blocks(model: GPT) -> None:
    """torch.compile each block in place: one graph, used by every layer."""
    for block in model.blocks:
        block.compile()


def seed_dropout(config: Config, position: int, rank: int) -> None:
    """Make this step's dropout a function of (seed, position, rank), so that a resumed run draws what it would have."""
    digest = hashlib.sha256(f"dropout/{config.run.seed}/{position}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def is_finite(*values: float) -> bool:
    return all(math.isfinite(v) for v in values)
