"""What DDP and FSDP share: the model's parameters are the fp32 weights, and PyTorch's AdamW updates them."""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megagpt.engines.engine import Engine, scaled


class NativeEngine(Engine):
    """An engine whose gradients and optimizer state lie where the parameters lie, whole or as DTensors."""

    def _backward(self, loss: Tensor, scale: float) -> Tensor:
        scaled(loss, scale * self.loss_scale.value).backward()
        return loss.detach()

    def _update(self) -> float:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if self.loss_scale.dynamic:
            for p in parameters:
                cast(Tensor, p.grad).div_(self.loss_scale.value)
        total = nn.utils.clip_grad_norm_(parameters, self.config.optimizer.clip)
        norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

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
