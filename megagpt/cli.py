"""The command line: its parser, and how errors end it."""

import os
import sys
from collections.abc import Sequence

from megagpt import __version__
from megagpt.commands import checkpoint, data, exchange, launch, measure, plan, sample, train
from megagpt.commands.options import Command, Parser, adder, parse
from megagpt.errors import ExitCode, ExpectedError, Reported, expected


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. An expected error ends it with one line and that error's code."""
    arguments = parse(make_parser(), argv)
    command: Command = arguments.command
    try:
        return command(arguments)
    except BrokenPipeError:
        # The reader of the output has exited (`| head`): not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.DONE
    except (ExpectedError, OSError) as error:
        known = expected(error)
        if known is None:
            raise
        if not isinstance(known, Reported):
            print(f"megagpt: error: {known}", file=sys.stderr)
        return known.code
    except KeyboardInterrupt:
        print("megagpt: interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED


def make_parser() -> Parser:
    parser = Parser("megagpt", description="The GPT-2 and GPT-3 papers, executable.")
    parser.add_argument("--version", action="version", version=f"megagpt {__version__}")
    add = adder(parser.add_subparsers(title="commands", required=True, metavar="COMMAND"))
    for module in (train, launch, sample, exchange, checkpoint, data, plan, measure):
        module.register(add)
    return parser
