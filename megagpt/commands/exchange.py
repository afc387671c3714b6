"""export, import: to and from `transformers`."""

import argparse
from pathlib import Path

from megagpt.commands.options import Add, add_config, config_of, count


def register(add: Add) -> None:
    sub = add("export", _export, "Write a run's newest weights as a folder for transformers.")
    sub.add_argument("run", metavar="RUN_OR_CHECKPOINT", help="a run, for its newest checkpoint, or a checkpoint")
    sub.add_argument("--to", required=True, metavar="DIR", help="folder to write, which must be empty or new")
    sub.add_argument("--shard-bytes", type=count, default=5_000_000_000, help="largest safetensors file (5e9)")
    text = "format of the weights (fp32); fp16 is refused if a weight is too large for it"
    sub.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help=text)

    sub = add("import", _import, "Start a run from a transformers GPT-2 folder: its weights, the config's recipe.")
    sub.add_argument("folder", metavar="FOLDER", help="folder of a GPT-2 that transformers has saved")
    add_config(sub)


def _export(arguments: argparse.Namespace) -> int:
    from megagpt.checkpoints.folder import find_checkpoint
    from megagpt.exchange.exporting import export_checkpoint
    from megagpt.files import named_path

    checkpoint = find_checkpoint(Path(arguments.run))
    folder = str(named_path(arguments.to))
    export_checkpoint(checkpoint, folder, arguments.shard_bytes, arguments.dtype)
    call = f"transformers.AutoModelForCausalLM.from_pretrained({folder!r})"
    print(f"wrote {folder} from {checkpoint.path}; load it with {call}")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from megagpt.exchange.importing import import_run
    from megagpt.training.run_folder import resume_command

    run = import_run(arguments.folder, config_of(arguments))
    print(f"{run}: starts from {arguments.folder}; train it with: {resume_command(run)}")
    return 0
