"""Options that several commands share, and the one grammar of their arguments: `section.key=value` is an override, any
other argument names the config. Both may come before or after options."""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from megagpt.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from megagpt.config import Config

Command = Callable[[argparse.Namespace], int]
Actions = argparse._SubParsersAction
# Part of what argparse says of missing arguments.
_MISSING = "required"


class Parser(argparse.ArgumentParser):
    """Refuses arguments in one line, as every error of a user: with a UserError, not with the usage. Names the nearest
    command or option for one that does not exist."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{' '.join(message.splitlines())}; see {self.prog} --help")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        words = sys.argv[1:] if args is None else list(args)
        try:
            return super().parse_known_args(words, namespace)
        except UserError as error:
            # An option with a slip in it is missing, too: `--ndes 2` for the required --nodes.
            unknown = list(self._unknown(words)) if _MISSING in str(error) else []
            if not unknown:
                raise
        self.refuse(unknown)

    def _unknown(self, words: list[str]) -> Iterator[str]:
        """Options that this parser does not have, up to the command or action whose own ones follow."""
        known = [name for action in self._actions for name in action.option_strings]
        has_commands = any(isinstance(action, Actions) for action in self._actions)
        for word in words:
            if word == "--" or (has_commands and not word.startswith("-")):
                return
            name = word.partition("=")[0]
            if word.startswith("--") and " " not in name and not any(option.startswith(name) for option in known):
                yield word

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, Actions) and value not in action.choices:
            listed = [choice.dest for choice in action._choices_actions]  # without internal ones
            raise argparse.ArgumentError(action, f"{value!r} does not exist: {did_you_mean(value, listed)}")
        super()._check_value(action, value)

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """Raises UserError for the arguments that this command does not take."""
        word = words[0].partition("=")[0]
        listed = [action for action in self._actions if action.help != argparse.SUPPRESS]
        options = [name for action in listed for name in action.option_strings if name.startswith("--")]
        advice = ""
        if word.startswith("--"):
            advice = (
                f": an override has no dashes: {words[0][2:]}" if "." in word else f": {did_you_mean(word, options)}"
            )
        self.error(f"unrecognized arguments: {' '.join(words)}{advice}")


class Add(Protocol):
    """Adds a command to the command line and returns its parser. Without a text it has no entry in the help."""

    def __call__(self, name: str, command: Command, text: str = "") -> Parser: ...


def adder(actions: "Actions[Parser]") -> Add:
    def add(name: str, command: Command, text: str = "") -> Parser:
        sub = actions.add_parser(name, help=text, description=text) if text else actions.add_parser(name)
        sub.set_defaults(command=command, parser=sub)
        return sub

    return add


def add_actions(parser: Parser) -> Add:
    """Give a command actions of its own, such as `checkpoint list`."""
    return adder(parser.add_subparsers(title="actions", required=True, metavar="ACTION"))


def add_words(parser: Parser, name: str, text: str) -> None:
    """Let a command take a name and overrides; `split_words` takes them apart."""
    parser.add_argument("words", nargs="*", metavar=f"{name} | section.key=value", help=text)


def add_config(parser: Parser) -> None:
    """Let a command take a config and overrides; `config_of` reads them."""
    add_words(parser, "CONFIG", "a config's path or bare name, and what to override in it")
    parser.add_argument("--config", metavar="CONFIG", help="the config, as an option")


def add_model(parser: Parser, optional: bool = False) -> None:
    """Let a command take a model; `open_model` of `exchange/named.py` finds it. `optional`: it may be left out, for
    uses of the command that need none."""
    text = "a run, one of its checkpoints, a transformers GPT-2 folder, or a GPT-2 on the Hugging Face hub: OWNER/NAME"
    text += " or OWNER/NAME@REVISION; OpenAI's are gpt2, gpt2-medium, gpt2-large and gpt2-xl"
    parser.add_argument("model", metavar="MODEL", nargs="?" if optional else None, help=text)


def add_device(parser: Parser) -> None:
    text = "where to compute; auto: on a GPU if there is one (auto)"
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help=text)


def parse(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Raises UserError for arguments that no command takes."""
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes no positional arguments after an option that follows the first ones.
    words = [text for text in rest if not text.startswith("-")] if hasattr(arguments, "words") else []
    if len(words) < len(rest):
        command: Parser = arguments.parser
        command.refuse([text for text in rest if text not in words])
    if words:
        arguments.words = [*arguments.words, *words]
    return arguments


def split_words(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Names and overrides."""
    named = [arguments.config] if getattr(arguments, "config", None) else []
    overrides = [word for word in arguments.words if _is_override(word)]
    return [word for word in arguments.words if word not in overrides] + named, overrides


def _is_override(word: str) -> bool:
    """Whether the word is `section.key=value`. A file's name may have `=`, too: `lr=1e-3.yaml`."""
    from megagpt.config import Config
    from megagpt.config_marks import fields_of

    key, equals, _ = word.partition("=")
    if _is_file(word):
        return False
    if key.partition(".")[0] in fields_of(Config) and "/" not in key:
        return bool(equals)
    return bool(equals) and not ("/" in key or word.endswith((".yaml", ".yml")))


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # such as a name that is too long
        return False


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


def position(text: str) -> int:
    """A number of tokens; 0 is the position of imported weights."""
    return count(text, least=0)


def count(text: str, least: int = 1) -> int:
    """A whole number from `least` (0 or 1) on, which may be written 1e8 or 100_000_000."""
    try:
        value = float(text.replace("_", ""))
    except ValueError:
        value = -1.0
    if value < least or not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {'above 0' if least else 'of 0 or more'}")
    return int(value)


def above_zero(text: str, what: str = "a number above 0") -> float:
    """A finite number above 0. `what`: its words in the refusal."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value
