"""bench, parity, profile: measurements of this machine."""

import argparse
import os

from megagpt.commands.options import Add, add_config, add_device, add_words, config_of, count, one_name, split_words
from megagpt.errors import UserError


def register(add: Add) -> None:
    sub = add("bench", _bench, "Measure training steps of one rank: tokens/s, MFU, memory; compare implementations.")
    add_words(sub, "PRESET", "a preset, such as gpt2-124m, and overrides, such as engine.stage=3")
    sub.add_argument("--batch", type=count, default=4, help="sequences in a micro-batch (4)")
    text = "micro-batches in a step (1; with --sweep of batches 8 of the smallest, so that batches double three times)"
    sub.add_argument("--accumulation", type=count, help=text)
    sub.add_argument("--context", type=count, help="tokens in a sequence (the preset's)")
    text = "may be given more than once (fp32 and bf16; with --sweep bf16)"
    sub.add_argument("--precision", action="append", choices=("fp32", "bf16", "fp16"), help=text)
    text = "torch.compile, for every row: megagpt's blocks, the others as a whole (as train.compile does by default)"
    sub.add_argument("--compile", action=argparse.BooleanOptionalAction, help=text)
    engines = ("ddp", "fsdp", "zero")
    sub.add_argument("--engine", choices=engines, default="ddp", help="engine of megagpt's own row (ddp)")
    sub.add_argument("--against", default="", help="comma-separated: plain, transformers")
    text = "give the others megagpt's settings of the allocator, too"
    sub.add_argument("--same-allocator", action="store_true", help=text)
    text = "measured steps in each round (5; on a GPU 50, after 10 and 10 seconds more to warm up)"
    sub.add_argument("--steps", type=count, help=text)
    text = "number of rounds, alternating between rows (2; with --sweep 1)"
    sub.add_argument("--rounds", type=count, help=text)
    text = "measure megagpt along all of batch,compile,activation_checkpointing or the named ones: micro-batches that"
    text += " double while a step keeps its tokens, without and with torch.compile, each activation checkpointing"
    sub.add_argument("--sweep", nargs="?", const="", metavar="AXES", help=text)
    text = "also write every measured number to this file; - for stdout, and the table to stderr"
    sub.add_argument("--json", default="", metavar="FILE", help=text)
    add_device(sub)

    sub = add("profile", _profile, "Profile a config's first steps: time by part beside its floor, memory, traces.")
    add_config(sub)
    sub.add_argument("--steps", type=count, default=3, help="profiled steps, after a few to warm up (3; at most 20)")

    sub = add("parity", _parity, "Compare every engine with one plain process, and measure the memory of each.")
    text = "comma-separated: fp32, bf16, residual, memory, crossings (fp32,bf16,memory; with --device cuda fp32,bf16)"
    sub.add_argument("--tables", help=text)
    add_device(sub)


def _bench(arguments: argparse.Namespace) -> int:
    from megagpt.measure.bench import bench
    from megagpt.models.presets import PRESETS, get_preset
    from megagpt.world import check_device

    # argparse takes a word that follows `--sweep` for its value.
    if arguments.sweep and ("=" in arguments.sweep or arguments.sweep in PRESETS):
        arguments.words, arguments.sweep = [*arguments.words, arguments.sweep], ""
    names, arguments.overrides = split_words(arguments)
    arguments.model = one_name(names, "preset, such as gpt2-124m")
    if arguments.model.endswith((".yaml", ".yml")):
        raise UserError(f"bench takes a preset, such as gpt2-124m, and no config file: {arguments.model}")
    get_preset(arguments.model)
    check_device(arguments.device, "--device")
    return bench(arguments)


def _profile(arguments: argparse.Namespace) -> int:
    # Otherwise PyTorch warns of each process's first tensor that is older than the profile.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from megagpt.config_types import MOST_PROFILED
    from megagpt.measure.first_steps import profile_first_steps
    from megagpt.world import fail_together, join

    try:
        if arguments.steps > MOST_PROFILED:
            problem = f"--steps {arguments.steps:,} is more than {MOST_PROFILED}, and a trace grows with each step"
            raise UserError(f"{problem}; give fewer, such as --steps 3")
        config = config_of(arguments)
    except UserError as error:
        fail_together(error)
    with join(config.train.device, hang_timeout=config.train.hang_timeout) as world:
        profile_first_steps(config, world, arguments.steps)
    return 0


def _parity(arguments: argparse.Namespace) -> int:
    from megagpt.measure.tables import parity
    from megagpt.world import check_device

    check_device(arguments.device, "--device")
    return parity(arguments)
