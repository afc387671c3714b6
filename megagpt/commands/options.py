"""Options that several commands share, and the one grammar of their arguments: an argument with `=` is an override, any
other names the config. Both may come before or after options."""

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from megagpt.errors import UserError

if TYPE_CHECKING:
    from megagpt.config import Config

Command = Callable[[argparse.Namespace], int]
Actions = argparse._SubParsersAction


class Add(Protocol):
    """Adds a command to the command line and returns its parser. Without a text it has no entry in the help."""

    def __call__(self, name: str, command: Command, text: str = "") -> argparse.ArgumentParser: ...


def adder(actions: "Actions[argparse.ArgumentParser]") -> Add:
    def add(name: str, command: Command, text: str = "") -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=text, description=text) if text else actions.add_parser(name)
        sub.set_defaults(command=command)
        return sub

    return add


def add_actions(parser: argparse.ArgumentParser) -> Add:
    """Give a command actions of its own, such as `checkpoint list`."""
    return adder(parser.add_subparsers(title="actions", required=True, metavar="ACTION"))


def add_words(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    """Let a command take a name and overrides; `split_words` takes them apart."""
    parser.add_argument("words", nargs="*", metavar=f"{name} | section.key=value", help=text)


def add_config(parser: argparse.ArgumentParser) -> None:
    """Let a command take a config and overrides; `config_of` reads them."""
    add_words(parser, "CONFIG", "a config's path or bare name, and what to override in it")
    parser.add_argument("--config", metavar="CONFIG", help="the config, as an option")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Exits with code 2 and the usage for arguments that no command takes."""
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes no positional arguments after an option that follows the first ones.
    words = [text for text in rest if not text.startswith("-")] if hasattr(arguments, "words") else []
    if len(words) < len(rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if words:
        arguments.words = [*arguments.words, *words]
    return arguments


def split_words(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Names and overrides."""
    named = [arguments.config] if getattr(arguments, "config", None) else []
    return [w for w in arguments.words if "=" not in w] + named, [w for w in arguments.words if "=" in w]


def one_name(names: Sequence[str], what: str) -> str:
    """Raises UserError unless there is exactly one. `what`: "config, such as quickstart.yaml"."""
    if len(names) != 1:
        raise UserError(f"name one {what}" + (f" (got {', '.join(names)})" if names else ""))
    return names[0]


def config_of(arguments: argparse.Namespace) -> "Config":
    """The config that the arguments name, with their overrides. Raises UserError."""
    from megagpt.config_file import load_config

    names, overrides = split_words(arguments)
    return load_config(one_name(names, "config, such as quickstart.yaml"), overrides)


def count(text: str) -> int:
    """A whole number above 0, which may be written 1e8 or 100_000_000."""
    try:
        value = float(text.replace("_", ""))
    except ValueError:
        value = -1.0
    if value < 1 or not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(value)
