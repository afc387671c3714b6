"""The interface of an engine, and the step that all engines share.

An engine owns weights, gradients and optimizer state of one model across the ranks. The shared step:

    loss = sum of token losses / global token count, micro-batch by micro-batch; backward;
    one gradient synchronisation; clip by the global norm; skip if not finite; update.

A loss can be refused before the last backward pass: that one then makes the gradient NaN, so every engine skips the
update in its usual way.
"""

import abc
import contextlib
import dataclasses
import hashlib
import math
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagpt.config import Config
from megagpt.data.loader import Batch, Share
from megagpt.engines.activation_checkpointing import checkpoint_activations
from megagpt.engines.clock import StepClock
from megagpt.engines.compilation import compile_model, is_compiled
from megagpt.engines.flat_shard import FlatShard
from megagpt.engines.float8 import compile_options, convert_linears
from megagpt.engines.loss_scale import LossScale, loss_scale
from megagpt.models.attention import attention_kernels
from megagpt.models.gpt import GPT
from megagpt.models.initialization import initial_values, is_decayed
from megagpt.models.tensor_parallel import ALONE
from megagpt.world import World

# Name -> the engine's class, which is imported on use, so that no engine costs the imports of another.
ENGINES = {
    "ddp": "megagpt.engines.ddp:DDPEngine",
    "fsdp": "megagpt.engines.fsdp:FSDPEngine",
    "zero": "megagpt.engines.zero:ZeroEngine",
}
MOMENTS = ("exp_avg", "exp_avg_sq")  # PyTorch's names of Adam's moments
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class StepResult(NamedTuple):
    """The outcome of one optimizer step."""

    loss: float
    """Mean over all tokens of the global batch, in nats."""
    gradient_norm: float
    """Global norm before clipping."""
    tokens: int
    """Targets of the global batch that counted."""
    updated: bool
    """False if the weights stayed as they were, because loss or gradient was not finite or the loss was a spike."""
    spiked: bool = False
    """Whether the loss was refused; then the gradient norm is NaN."""
    raised: tuple[bool, ...] = ()
    """For each flag that the ranks were asked for, whether some rank raised it."""


@dataclasses.dataclass(frozen=True)
class Replica:
    """One of several equal copies of the state: the copy that this rank's ranges belong to."""

    index: int
    count: int


class Engine(abc.ABC):
    """One model across the ranks. Its weights are undefined until `initialize` or a load."""

    model: GPT
    """The model itself, without the library's wrapper."""
    optimizer: torch.optim.AdamW
    """It has two groups of parameters; each step sets their learning rate."""
    clock: StepClock
    """Times this rank's own work in a step."""

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.compiled = is_compiled(config, world)
        """Whether the model runs in compiled graphs."""
        self.ranks = ALONE
        """The tensor ranks that share this model's products, and which of them this is."""
        self.replica = Replica(0, 1)
        """The copy of the state that this rank holds a part of."""
        self.loss_scale = loss_scale(config.train.precision)
        self.on_micro_batch: Callable[[], object] = lambda: None
        """Called after each micro-batch's backward pass: a measurement's chance to look."""
        self._refuse: Callable[[Tensor], bool] | None = None
        """Whether to refuse the step, by this rank's summed loss of the last micro-batch."""

    def train_step(
        self,
        batch: Batch,
        lr: float,
        is_spike: Callable[[float], bool] | None = None,
        flags: Callable[[], Sequence[bool]] = tuple,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> StepResult:
        """One optimizer step over this rank's share of a global batch. `is_spike`: whether to refuse the step's loss,
        the same on every rank; asking costs one more exchange of the loss. `flags`: questions that travel with the
        loss, each raised if some rank raises it; as many on every rank. `meanwhile` is called once the first
        micro-batch is on its way: a GPU computes while the host does it.

        The host waits for the device in one place, at the end; and once more if spikes are watched, if the optimizer's
        state is in host memory, and under ZeRO, whose library asks for the norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        device = self.world.device
        # Engines average gradients over the shares of the batch; the loss is a sum over them.
        scale = self.share.count / batch.tokens
        total = torch.zeros((), device=device)
        spiked = False

        def refuse(loss: Tensor) -> bool:
            nonlocal spiked
            assert is_spike is not None
            whole = total + loss.detach()
            if self.world.size > 1:
                dist.all_reduce(whole)
            spiked = is_spike(self._mean(float(whole), batch))
            return spiked

        self._refuse = refuse if is_spike else None
        with attention_kernels(device, self.config.model.dropout):
            for i, (tokens, targets) in enumerate(batch.micro_batches):
                tokens, targets = (t.to(device, non_blocking=True) for t in (tokens, targets))
                total += self._accumulate(tokens, targets, scale, last=i == len(batch.micro_batches) - 1)
                if i == 0:
                    meanwhile()
                self.on_micro_batch()
        sums = torch.stack([total, *(torch.full((), float(flag), device=device) for flag in flags())])
        if self.world.size > 1:
            dist.all_reduce(sums)
        self.clock.summed()
        norm = self._update()
        loss, *raised, gradient_norm = torch.cat([sums.double(), norm.to(device).double()[None]]).tolist()
        finite = math.isfinite(gradient_norm)
        if not spiked:
            self.loss_scale.update(finite)
        return StepResult(
            self._mean(loss, batch), gradient_norm, batch.tokens, finite, spiked, tuple(count > 0 for count in raised)
        )

    def _mean(self, total: float, batch: Batch) -> float:
        """The mean over a batch's tokens of a loss that is summed over all ranks. The tensor ranks of a group have the
        same loss, which the sum counts once for each of them."""
        return total / self.config.engine.tensor_ranks / batch.tokens

    def _scaled(self, loss: Tensor, scale: float, last: bool) -> Tensor:
        """`scale` times the loss, with a gradient of NaN if the loss is not finite or is refused: so a check of the
        reduced gradient's norm finds any rank's bad loss, on all ranks."""
        if last and self._refuse is not None and self._refuse(loss):
            scale = math.nan
        return loss * (scale + 0.0 * loss.detach())

    @abc.abstractmethod
    def _accumulate(self, tokens: Tensor, targets: Tensor, scale: float, last: bool) -> Tensor:
        """Add the gradient of `scale` times the summed loss to the step's gradient so far; returns the summed loss,
        detached. `last`: no further micro-batch follows in this step."""

    @abc.abstractmethod
    def _update(self) -> Tensor:
        """Clip, update the weights unless the gradient is not finite, and drop the gradient. Returns its global norm
        before clipping, a scalar on any device."""

    @abc.abstractmethod
    def state(self) -> dict[str, FlatShard]:
        """Weights and both Adam moments in fp32, keyed `model.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME`: on each rank
        the range that it holds. The memory is the engine's own: writing into it and then calling `state_loaded`
        resumes from what was written."""

    def scalars(self) -> dict[str, Any]:
        """The state that is not a tensor, as plain values: a checkpoint stores it beside `state()`."""
        return {"updates": self.updates, "loss_scale": dataclasses.asdict(self.loss_scale)}

    def state_loaded(self, scalars: dict[str, Any]) -> None:
        """To be called after `state()` was overwritten with a checkpoint's; `scalars` are that checkpoint's."""
        self._state_loaded(scalars["updates"])
        if self.loss_scale.dynamic and scalars["loss_scale"]["dynamic"]:  # both this run and that one use fp16
            self.loss_scale = LossScale(**scalars["loss_scale"])

    @abc.abstractmethod
    def _state_loaded(self, updates: int) -> None:
        """Derive again what the engine derives from the state, and set Adam's count of updates."""

    @abc.abstractmethod
    def initialize(self) -> None:
        """Set the weights to their initial values, and both moments and the count of updates to zero."""

    def _initialize(self, name: str, weight: FlatShard) -> None:
        """Set the range of a weight that this rank holds to its initial values."""
        config = self.config
        for box, piece in weight.pieces():
            piece.copy_(initial_values(name, tuple(weight.shape), config.model, config.run.seed, *box))

    @property
    def share(self) -> Share:
        """The part of every batch that this rank takes, with the other tensor ranks of its group."""
        group = self.config.engine.tensor_ranks
        return Share(self.world.rank // group, self.world.size // group, self.config.micro_batch, self.compiled)

    @property
    def updates(self) -> int:
        """Optimizer updates so far: Adam's bias correction depends on it."""
        return max((int(s["step"]) for s in self.optimizer.state.values() if "step" in s), default=0)

    def describe(self) -> str:
        """One line for logs."""
        groups = f", groups of {self.ranks.size} tensor ranks" if self.ranks.size > 1 else ""
        return f"{self.config.engine.name} on {self.world.size} x {self.world.device.type}{groups}"

    def settings(self) -> dict[str, Any]:
        """The library's own config, to be saved in the run's folder; empty if it has none."""
        return {}

    @contextlib.contextmanager
    def evaluation(self, any_shape: bool = False) -> Iterator[nn.Module]:
        """The model in evaluation mode, without gradients, in the run's precision. Every rank must enter and call the
        model equally often, because the ranks gather sharded weights together. `any_shape`: its inputs have other
        shapes than a training step's, so it runs uncompiled: it would be compiled again and again."""
        self.model.eval()
        try:
            eager = torch.compiler.set_stance("force_eager") if any_shape else contextlib.nullcontext()
            # The model casts by itself; the cache of keys and values takes its dtype from here.
            kernels = attention_kernels(self.world.device, dropout=0)
            with torch.no_grad(), eager, kernels, autocast(self.config, self.world.device):
                yield self.model
        finally:
            self.model.train()


def build_engine(config: Config, world: World, initialized: bool = True) -> Engine:
    """The engine that the config names, with initial weights unless a checkpoint is about to be loaded: they take
    seconds to draw. Raises UserError for what cannot run here."""
    engine: Engine = pkgutil.resolve_name(ENGINES[config.engine.name])(config, world)
    if initialized:
        engine.initialize()
    return engine


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """The run's precision for matrix products; weights, sums and the softmax stay fp32."""
    dtype = DTYPES[config.train.precision]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def prepare_model(model: GPT, config: Config, device: torch.device, compiled: bool) -> StepClock:
    """Convert a model's linear layers to float8 if the config says so, and wrap its forward passes, before an engine
    shards it: each block in activation checkpointing, then compilation, then a clock, from the inside out; the model in
    autocast. Returns the clock."""
    model.residual_dtype = DTYPES[config.train.residual]
    convert_linears(model, config, device, compiled)
    checkpoint_activations(model, config.train.activation_checkpointing)
    if compiled:
        compile_model(model, device, compile_options(config))
    clock = StepClock(model, device)
    # Inside the model, so that no engine's own wrapping can switch it off.
    model.forward = autocast(config, device)(model.forward)  # type: ignore[method-assign]
    return clock


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW over two groups: decayed matrices, and everything else."""
    o = config.optimizer
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if is_decayed(n)], "weight_decay": o.weight_decay},
        {"params": [p for n, p in named if not is_decayed(n)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, o.lr, (o.beta1, o.beta2), o.eps, fused=True)


def moments_of(optimizer: torch.optim.AdamW, weight: Tensor) -> dict[str, Tensor]:
    """Adam's state of a weight, made of zeros if the weight was never updated."""
    state = optimizer.state[weight]
    if "exp_avg" not in state:
        state["step"] = torch.zeros((), device=weight.device)
        state |= {kind: torch.zeros_like(weight) for kind in MOMENTS}
    return state


def seed_dropout(config: Config, position: int, rank: int) -> None:
    """Make this step's dropout a function of (seed, position, rank): a resumed run draws the same numbers."""
    digest = hashlib.sha256(f"dropout/{config.run.seed}/{position}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
