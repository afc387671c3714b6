"""Weights that are NaN or infinite, named."""

import torch
from torch import Tensor

from megagpt.errors import NonFiniteError


def check_finite(tensor: Tensor, name: str, where: object, way: str) -> Tensor:
    """The same tensor. Raises NonFiniteError, which names it, the file or folder `where` it lies, and a way out, if a
    value of it is NaN or infinite."""
    if bad := tensor.numel() - int(torch.isfinite(tensor).sum()):
        values = f"{bad:,} of its {tensor.numel():,} values are NaN or infinite"
        raise NonFiniteError(f"{where}: tensor {name!r} is not finite: {values}; {way}")
    return tensor
