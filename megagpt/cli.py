"""The command line: its parser, and how errors end it."""

import argparse
import sys
from collections.abc import Sequence

from megagpt import __version__, console
from megagpt.commands import (
    checkpoint,
    config,
    data,
    evaluate,
    exchange,
    launch,
    measure,
    plan,
    report,
    sample,
    train,
)
from megagpt.commands.options import Command, Parser, adder, parse
from megagpt.errors import ExitCode, ExpectedError, Reported, expected


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. An expected error ends it with one line and that error's code. A reader
    of the output that has left (`| head`) is no error."""
    console.prepare_streams()
    try:
        return _run(argv)
    except BrokenPipeError:
        if console.is_unread():
            return ExitCode.DONE
        raise
    finally:
        console.drop_unread()


def _run(argv: Sequence[str] | None) -> int:
    try:
        arguments = parse(make_parser(), argv)
        command: Command = arguments.command
        code = command(arguments)
        sys.stdout.flush()
        return code
    except (ExpectedError, OSError) as error:
        known = expected(error)
        if known is None:
            raise
        if not isinstance(known, Reported):
            console.warn(f"megagpt: error: {known}")
        return known.code
    except KeyboardInterrupt:
        console.warn("megagpt: interrupted")
        return ExitCode.INTERRUPTED


def make_parser() -> Parser:
    parser = Parser("megagpt", description="The GPT-2 and GPT-3 papers, executable.")
    parser.add_argument("--version", action="version", version=f"megagpt {__version__}")
    # `deepspeed --module megagpt` passes it beside LOCAL_RANK, which is used instead.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    add = adder(parser.add_subparsers(title="commands", required=True, metavar="COMMAND"))
    for module in (train, plan, launch, sample, evaluate, report, exchange, checkpoint, data, config, measure):
        module.register(add)
    return parser
