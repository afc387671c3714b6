"""PyTorch's DistributedDataParallel: weights, gradients and optimizer state whole on every rank."""

import contextlib

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from megagpt.config import Config
from megagpt.data.loader import Batch
from megagpt.distributed import World
from megagpt.engines.engine import Engine, StepResult, autocast, build_optimizer, compile_blocks, is_finite
from megagpt.models.gpt import GPT
from megagpt.models.initialization import initialize


class DDPEngine(Engine):
    """One process, or several with one gradient all-reduce a step."""

    def __init__(self, config: Config, world: World) -> None:
        super().__init__(config, world)
        with torch.device("meta"):
            model = GPT(config.model)
        self.model = model.to_empty(device=world.device)
        initialize(self.model, config.model, config.run.seed)
        self.optimizer = build_optimizer(self.model, config)
        if config.train.compile:
            compile_blocks(self.model)
        self.wrapped: nn.Module = self.model
        if world.size > 1:
            # The buckets share memory with the gradients: no second copy of them.
            self.wrapped = DistributedDataParallel(self.model, gradient_as_bucket_view=True)

    def train_step(self, batch: Batch, lr: float) -> StepResult:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # DDP averages gradients over the ranks; the loss is a sum over them.
        scale = self.world.size / batch.tokens
        total = torch.zeros((), device=self.world.device)
        for i, (tokens, targets) in enumerate(batch.micro_batches):
            last = i == len(batch.micro_batches) - 1
            tokens, targets = (t.to(self.world.device, non_blocking=True) for t in (tokens, targets))
            with self._synchronising(last):
                with autocast(self.config, self.world.device):
                    loss = self.wrapped(tokens, targets)
                (loss * scale).backward()
            total += loss.detach()
        if self.world.size > 1:
            dist.all_reduce(total)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip)
        mean_loss, gradient_norm = (torch.stack([total / batch.tokens, norm])).tolist()
        updated = is_finite(mean_loss, gradient_norm)
        if updated:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(mean_loss, gradient_norm, batch.tokens, updated)

    def _synchronising(self, last: bool) -> contextlib.AbstractContextManager[None]:
        if last or not isinstance(self.wrapped, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.wrapped.no_sync()

    def evaluation_model(self) -> nn.Module:
        return self.model

    def state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            moments = self.optimizer.state[parameter]
            if not moments:
                moments["step"] = torch.zeros((), device=parameter.device)
                moments["exp_avg"] = torch.zeros_like(parameter)
                moments["exp_avg_sq"] = torch.zeros_like(parameter)
            state[f"model.{name}"] = parameter.detach()
            state[f"exp_avg.{name}"] = moments["exp_avg"]
            state[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"]
        return state

    def state_loaded(self, updates: int) -> None:
        for moments in self.optimizer.state.values():
            moments["step"].fill_(updates)

    @property
    def updates(self) -> int:
        return max((int(s["step"]) for s in self.optimizer.state.values()), default=0)
