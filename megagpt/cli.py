"""`megagpt <command>`: each command is a thin door to one room. Rooms are imported on use, so that help is instant."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagpt import __version__
from megagpt.errors import Interrupted, Reported, UserError, disk_error

if TYPE_CHECKING:
    import torch

    from megagpt.config import Config
    from megagpt.models.gpt import GPT

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. What a user can cause ends with one line and code 2."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes no positional argument behind an option that follows the first ones: overrides may stand anywhere.
    overrides = next((getattr(arguments, n) for n in ("overrides", "arguments") if hasattr(arguments, n)), None)
    if rest and (overrides is None or any(text.startswith("-") or "=" not in text for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if overrides is not None:
        overrides.extend(rest)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except UserError as error:
        return _report(error)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): not an error, and nothing more to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        theirs = disk_error(error)
        if theirs is None:
            raise
        return _report(theirs)
    except KeyboardInterrupt:
        print("megagpt: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _report(error: UserError) -> int:
    if not isinstance(error, Reported):
        print(f"megagpt: error: {error}", file=sys.stderr)
    return EXIT_INTERRUPTED if isinstance(error, Interrupted) else EXIT_USER_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("megagpt", description="The GPT-2 and GPT-3 papers, executable.")
    parser.add_argument("--version", action="version", version=f"megagpt {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    add_train_arguments(add("train", _train, "Train a config, or go on with a run. Works under torchrun too."))

    sub = add("sample", _sample, "Continue prompts with a run's newest checkpoint or a transformers GPT-2 folder.")
    sub.add_argument("model", metavar="RUN_OR_FOLDER")
    sub.add_argument("--prompt", action="append", help="may be given several times")
    sub.add_argument("--samples", type=int, default=1, help="continuations of each prompt (1)")
    sub.add_argument("--max-tokens", type=int, default=64, help="new tokens in each (64)")
    sub.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (1.0)")
    sub.add_argument("--top-k", type=int, default=50, help="draw from the k likeliest tokens; 0: all (50)")
    sub.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this mass (1.0)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--stream", action="store_true", help="print tokens as they come, one continuation after another")
    sub.add_argument("--slide", action="store_true", help="of a prompt longer than the context, keep the end")
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")

    sub = add("prepare", _prepare, "Turn text into token shards. Run again after an interruption, it goes on.")
    sub.add_argument("source", help="stdlib; a file, folder or glob of .txt .jsonl(.gz/.zst) .parquet; a hub data set")
    sub.add_argument("--out", required=True, help="folder of the shards")
    sub.add_argument("--text-key", default="text", help="key or column that holds the text (text)")
    sub.add_argument("--subset", help="configuration of a hub data set, such as sample-10BT")
    sub.add_argument("--split", default="train", help="split of a hub data set (train)")
    sub.add_argument("--val-fraction", type=float, default=0.005, help="share of documents held out (0.005)")
    sub.add_argument("--shard-tokens", type=_count, default=100_000_000, help="tokens in a shard (1e8)")
    sub.add_argument("--workers", type=int, help="encoding processes (one per core)")

    sub = add("verify", _verify, "Read a folder of token shards from end to end against its checksums.")
    sub.add_argument("folder")

    sub = add("config", _config, "Show a resolved run and what is derived from it.")
    sub.add_argument("config", metavar="CONFIG")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value")
    sub.add_argument("--ranks", type=_count, default=1, help="world size to derive accumulation for (1)")

    add("models", _models, "List the papers' sizes.")

    sub = add("export", _export, "Write a run's newest weights as a folder for transformers.")
    sub.add_argument("run", metavar="RUN")
    sub.add_argument("--to", required=True, metavar="DIR")

    sub = add("bench", _bench, "Measure training steps: tokens/s, MFU and peak memory, beside other implementations.")
    sub.add_argument("model", help="a preset, such as gpt2-124m")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as engine.stage=3")
    sub.add_argument("--batch", type=_count, default=4, help="sequences in a step (4)")
    sub.add_argument("--context", type=_count, help="tokens in a sequence (the preset's)")
    sub.add_argument("--precision", action="append", choices=("fp32", "bf16"), help="may be given twice (both)")
    sub.add_argument("--compile", action="store_true", help="torch.compile")
    sub.add_argument("--engine", default="ddp", help="engine of megagpt's own row (ddp)")
    sub.add_argument("--against", default="", help="comma-separated: plain, transformers")
    sub.add_argument(
        "--same-allocator", action="store_true", help="give the others megagpt's CPU allocator setting too"
    )
    sub.add_argument("--steps", type=_count, default=5, help="measured steps in each round (5)")
    sub.add_argument("--rounds", type=_count, default=2, help="rounds, alternating between implementations (2)")
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")

    sub = add("parity", _parity, "Compare every engine with one plain process, and measure what each holds in memory.")
    sub.add_argument("--tables", default="fp32,bf16,memory", help="comma-separated: fp32, bf16, memory (all)")
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `megagpt train`, which launch/train.py shares."""
    parser.add_argument(
        "arguments", nargs="*", metavar="CONFIG | section.key=value", help="a config's path or bare name"
    )
    parser.add_argument("--config", help="the config, as an option")
    parser.add_argument("--resume", metavar="RUN", help="folder of the run to go on with")
    # The deepspeed launcher and older ones of PyTorch pass it beside LOCAL_RANK, which is what is read.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(command=_train)


def _count(text: str) -> int:
    try:
        value = float(text.replace("_", ""))
    except ValueError:
        value = -1.0
    if value < 1 or not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(value)


# --- training --------------------------------------------------------------------------------------------------------


def _train(arguments: argparse.Namespace) -> int:
    from megagpt.distributed import fail_together, join

    try:
        config = _train_config(arguments)
    except UserError as error:
        fail_together(error)
    with join(config.train.device) as world:
        from megagpt.training.trainer import train

        return train(config, world, resume=bool(arguments.resume))


def _train_config(arguments: argparse.Namespace) -> "Config":
    from megagpt.config import load_config

    overrides = [a for a in arguments.arguments if "=" in a]
    names = [a for a in arguments.arguments if "=" not in a] + ([arguments.config] if arguments.config else [])
    if arguments.resume:
        if names:
            raise UserError(f"--resume takes the run's own config; leave {names[0]!r} out")
        names = [_run_config(arguments.resume)]
    if len(names) != 1:
        raise UserError(
            "name one config, such as: megagpt train quickstart.yaml" + (f" (got {names})" if names else "")
        )
    config = load_config(names[0], overrides)
    if arguments.resume:
        # The folder may have been moved or be named from elsewhere: it is where it is.
        run = Path(arguments.resume).resolve()
        config = dataclasses.replace(
            config, run=dataclasses.replace(config.run, name=run.name, folder=_relative(run.parent))
        )
    return config


def _relative(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _run_config(run: str) -> str:
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run}: not a run's folder (no config.yaml in it)")
    return str(path)


# --- sampling and exchange -------------------------------------------------------------------------------------------


def _load_run(run: str) -> "GPT":
    """The model of a run's newest whole checkpoint, fp32 on the CPU."""
    import torch

    from megagpt.config import load_config
    from megagpt.models.gpt import GPT
    from megagpt.training.checkpoint import check_model, load_weights, newest_whole

    config = load_config(_run_config(run))
    newest = newest_whole(Path(run), lambda text: print(text, file=sys.stderr))
    if newest is None:
        raise UserError(f"{run}: has no whole checkpoint yet")
    check_model(newest, newest.meta(), config)
    with torch.device("meta"):
        model = GPT(config.model)
    model = model.to_empty(device="cpu")
    load_weights(newest, model)
    return model


def _load_model(name: str) -> "GPT":
    from megagpt.models.huggingface import is_pretrained, load_pretrained

    if not Path(name).is_dir():
        raise UserError(f"{name}: no such folder")
    return load_pretrained(name) if is_pretrained(Path(name)) else _load_run(name)


def _sample(arguments: argparse.Namespace) -> int:
    from megagpt.data.tokenizer import VOCAB_SIZE, gpt2
    from megagpt.distributed import join
    from megagpt.generation import generate

    checks = [
        (arguments.temperature >= 0, "--temperature must not be negative"),
        (arguments.top_k >= 0, "--top-k must not be negative"),
        (0 < arguments.top_p <= 1, "--top-p must be above 0 and at most 1"),
        (arguments.samples > 0, "--samples must be at least 1"),
        (arguments.max_tokens > 0, "--max-tokens must be at least 1"),
        (arguments.seed >= 0, "--seed must not be negative"),
    ]
    for holds, message in checks:
        if not holds:
            raise UserError(message)
    with join(arguments.device) as world:
        model = _load_model(arguments.model).to(world.device).eval()
        context = model.config.context
        if model.config.vocab_size < VOCAB_SIZE:
            raise UserError(f"{arguments.model}: a vocabulary of {model.config.vocab_size} is not GPT-2's {VOCAB_SIZE}")
        texts = [p for p in arguments.prompt or ["Hello, I'm a language model,"] for _ in range(arguments.samples)]
        prompts = []
        for text in texts:
            tokens = gpt2().encode_ordinary(text) or [gpt2().eot_token]
            if len(tokens) > context:
                if not arguments.slide:
                    raise UserError(
                        f"the prompt has {len(tokens)} tokens, the model's context is {context}: "
                        f"shorten it, or let --slide keep its last {context}"
                    )
                print(f"the prompt has {len(tokens)} tokens: its last {context} are used", file=sys.stderr)
                tokens = tokens[-context:]
            prompts.append(tokens)
        if max(map(len, prompts)) + arguments.max_tokens > context:
            print(f"past the context of {context} tokens the window slides by half of it", file=sys.stderr)
        settings: dict[str, Any] = {
            "temperature": arguments.temperature,
            "top_k": arguments.top_k,
            "top_p": arguments.top_p,
        }
        if arguments.stream:
            for i, (text, tokens) in enumerate(zip(texts, prompts, strict=True)):
                _stream(model, text, tokens, arguments.max_tokens, arguments.seed + i, settings)
            return 0
        rows = generate(model, model.config, prompts, arguments.max_tokens, seed=arguments.seed, **settings)
        print("\n---\n".join(text + gpt2().decode(row) for text, row in zip(texts, rows, strict=True)))
    return 0


def _stream(
    model: "torch.nn.Module", text: str, tokens: list[int], count: int, seed: int, settings: dict[str, Any]
) -> None:
    import codecs

    from megagpt.data.tokenizer import gpt2
    from megagpt.generation import generate

    # A character may span several tokens: print it when its last byte is there.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def show(row: int, token: int) -> None:
        print(decoder.decode(gpt2().decode_single_token_bytes(token)), end="", flush=True)

    print(text, end="", flush=True)
    generate(model, model.config, [tokens], count, seed=seed, on_token=show, **settings)  # type: ignore[arg-type]
    print(decoder.decode(b"", final=True), flush=True)


def _export(arguments: argparse.Namespace) -> int:
    from megagpt.models.huggingface import export

    export(_load_model(arguments.run), arguments.to)
    print(f"wrote {arguments.to}; load it with transformers.GPT2LMHeadModel.from_pretrained({arguments.to!r})")
    return 0


# --- data ------------------------------------------------------------------------------------------------------------


def _prepare(arguments: argparse.Namespace) -> int:
    from megagpt.data.prepare import prepare
    from megagpt.data.progress import PrepareProgress
    from megagpt.data.sources import open_source

    if arguments.workers is not None and arguments.workers < 1:
        raise UserError("--workers must be at least 1")
    source = open_source(arguments.source, arguments.text_key, arguments.subset, arguments.split)
    with PrepareProgress() as progress:
        manifest = prepare(
            source,
            arguments.out,
            val_fraction=arguments.val_fraction,
            shard_tokens=arguments.shard_tokens,
            workers=arguments.workers,
            report=progress.report,
        )
    splits = manifest["splits"]
    print(
        f"{arguments.out}: {manifest['documents']:,} documents, {splits['train']['tokens']:,} training and "
        f"{splits['val']['tokens']:,} validation tokens; train with data.sources='[{{path: {arguments.out}}}]'"
    )
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from megagpt.data.shards import verify

    print(f"{arguments.folder}: {verify(arguments.folder):,} tokens, all whole")
    return 0


# --- what a run will be ----------------------------------------------------------------------------------------------


def _config(arguments: argparse.Namespace) -> int:
    from megagpt.config import load_config, to_yaml
    from megagpt.planning.summary import summarize

    config = load_config(arguments.config, arguments.overrides)
    summary = summarize(config, arguments.ranks)
    print(to_yaml(config))
    print("\n".join(f"# {line}" for line in summary))
    return 0


def _models(arguments: argparse.Namespace) -> int:
    from megagpt.models.presets import PRESETS

    print(
        f"{'name':12}{'layers':>7}{'width':>7}{'heads':>10}{'context':>9}{'parameters':>17}{'batch':>11}{'lr':>9}{'FLOPs':>11}"
    )
    for name, preset in PRESETS.items():
        m = preset.model
        lr = f"{preset.peak_lr:.1e}" if preset.peak_lr else "-"
        flops = f"{preset.paper_flops:.2e}" if preset.paper_flops else "-"
        print(
            f"{name:12}{m.layers:7}{m.width:7}{f'{m.heads} x {m.head_width}':>10}{m.context:9}"
            f"{m.parameters:17,}{preset.batch_tokens:11,}{lr:>9}{flops:>11}"
        )
    print("batch: tokens; lr: the paper's peak; FLOPs: 6 x parameters x the paper's 300B tokens; -: not published")
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from megagpt.bench import bench

    return bench(arguments)


def _parity(arguments: argparse.Namespace) -> int:
    from megagpt.parity.tables import parity

    return parity(arguments)


if __name__ == "__main__":
    sys.exit(main())
