"""Imports DeepSpeed quietly."""

import logging
import os
import warnings
from types import ModuleType

from megagpt.errors import UserError, first_line
from megagpt.extras import pip_install


def load_deepspeed(on_gpu: bool) -> ModuleType:
    """The `deepspeed` module, without its banner. The first call in a process decides whether the module works on GPUs
    or on CPUs; on CPUs it then needs no compiler. Raises UserError if it cannot be imported."""
    # DeepSpeed's collectives use deprecated names of PyTorch's, which warns at every call.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        import deepspeed
        from deepspeed.utils import logger
    except Exception as error:  # it also raises types of its own, for a CUDA that it finds unfit
        way = f"install it ({pip_install('deepspeed')}), or use engine.name fsdp"
        raise UserError(f"engine.name zero: DeepSpeed cannot be imported: {first_line(error)}; {way}") from None

    logger.setLevel(logging.ERROR)
    if not on_gpu:
        # An operator for inference; DeepSpeed would spend half a minute on compiling it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
