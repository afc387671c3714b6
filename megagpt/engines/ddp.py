"""PyTorch's DistributedDataParallel: every rank has all weights, gradients and optimizer state."""

import contextlib

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from megagpt.config import Config
from megagpt.engines.engine import Replica, build_optimizer, prepare_model
from megagpt.engines.native import NativeEngine
from megagpt.models.gpt import GPT
from megagpt.world import World


class DDPEngine(NativeEngine):
    """One process, or several with one gradient all-reduce a step."""

    def __init__(self, config: Config, world: World) -> None:
        super().__init__(config, world)
        self.replica = Replica(world.rank, world.size)
        with torch.device("meta"):
            model = GPT(config.model)
        self.model = model.to_empty(device=world.device)
        self.optimizer = build_optimizer(self.model, config)
        self.clock = prepare_model(self.model, config, world.device, self.compiled)
        self.wrapped: nn.Module = self.model
        if world.size > 1:
            # Buckets share memory with the gradients, which saves a copy. Every rank gives the weights their values
            # by itself, so rank 0 need not send its own.
            self.wrapped = DistributedDataParallel(self.model, gradient_as_bucket_view=True, init_sync=False)
            # The buckets stay. A dropped gradient would come back beside them until the step's last micro-batch.
            self.keeps_gradients = True

    def _accumulate(self, tokens: Tensor, targets: Tensor, scale: float, last: bool) -> Tensor:
        local = not last and isinstance(self.wrapped, DistributedDataParallel)
        with self.wrapped.no_sync() if local else contextlib.nullcontext():  # type: ignore[operator]
            return self._backward(self.wrapped(tokens, targets), scale, last)
