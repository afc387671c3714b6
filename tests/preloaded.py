"""Imported by the server that processes are forked from: DeepSpeed, whose imports take longer than most tests of it.

The package's own server leaves it out, because DeepSpeed chooses between CPU and GPU when it is imported.
"""

import gc
import importlib

import torch

from megagpt.engines.deepspeed_library import load_deepspeed

if not torch.cuda.is_available():
    load_deepspeed(on_gpu=False)
    # DeepSpeed imports it when it is first used. It imports PyTorch's compiler.
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
# Each process's collector would look at all that was imported, and so copy it.
gc.collect()
gc.freeze()
