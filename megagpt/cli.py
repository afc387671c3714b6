"""The command line: its parser, and how errors end it."""

import argparse
import os
import sys
from collections.abc import Sequence

from megagpt import __version__
from megagpt.commands import checkpoint, data, exchange, launch, measure, plan, sample, status, train
from megagpt.commands.options import Command
from megagpt.errors import ExitCode, ExpectedError, Reported, expected


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
    command: Command = arguments.command
    try:
        return command(arguments)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): not an error, and nothing more to say to it.
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("megagpt", description="The GPT-2 and GPT-3 papers, executable.")
    parser.add_argument("--version", action="version", version=f"megagpt {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    for room in (train, launch, status, sample, exchange, checkpoint, data, plan, measure):
        room.register(add)
    return parser


if __name__ == "__main__":
    sys.exit(main())
