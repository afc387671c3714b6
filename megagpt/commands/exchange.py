"""export, import: to and from `transformers`."""

import argparse

from megagpt.commands.options import Add, add_config, add_model, config_of, count


def register(add: Add) -> None:
    sub = add("export", _export, "Write a model's weights, a run's newest ones, as a folder for transformers.")
    add_model(sub)
    sub.add_argument("--to", required=True, metavar="DIR", help="folder to write, which must be empty or new")
    sub.add_argument("--shard-bytes", type=count, default=5_000_000_000, help="largest safetensors file (5e9)")
    text = "format of the weights (fp32); fp16 is refused if a weight is too large for it"
    sub.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help=text)

    sub = add("import", _import, "Start a run from a model's weights, OpenAI's for instance, with the config's recipe.")
    add_model(sub)
    add_config(sub)


def _export(arguments: argparse.Namespace) -> int:
    from megagpt.exchange.exporting import export_model
    from megagpt.exchange.named import open_model
    from megagpt.files import named_path

    model = open_model(arguments.model)
    folder = str(named_path(arguments.to))
    export_model(model, folder, arguments.shard_bytes, arguments.dtype)
    call = f"transformers.AutoModelForCausalLM.from_pretrained({folder!r})"
    print(f"wrote {folder} from {model.checkpoint.path if model.checkpoint else model.label}; load it with {call}")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from megagpt.exchange.importing import import_run
    from megagpt.exchange.named import open_model
    from megagpt.training.run_folder import resume_command

    config = config_of(arguments)
    model = open_model(arguments.model)
    run = import_run(model, config)
    print(f"{run}: starts from {model.label}; train it with: {resume_command(run)}")
    return 0
