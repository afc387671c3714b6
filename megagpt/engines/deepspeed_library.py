"""Imports DeepSpeed quietly."""

import logging
import os
import warnings
from types import ModuleType

import torch


def load_deepspeed() -> ModuleType:
    """The `deepspeed` module, set up for this machine: no banner, and no compiler needed on a machine without GPUs."""
    # Its collectives call names that PyTorch has renamed, once per call.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if not on_gpu:
        # An operator for inference, which its start would compile for half a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
