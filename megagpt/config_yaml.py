"""YAML whose values are what was typed. The key decides how its value is read: a text key takes the text as it is
(`2024-05-01`, `010`, `no`), any other key takes decimal numbers (`5e8`, `1_000`, `010` is 10), true, false and .inf.

    parse_value("Chapter 1 # The end", str, "here")  # the whole text
    parse_value("010", int, "here")  # 10"""

import dataclasses
import json
import math
import re
import types
from decimal import Decimal
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from megagpt.config_marks import fields_of
from megagpt.errors import UserError, first_line

_PLAIN = "plain"  # tag of a scalar that has neither quotes nor a tag of its own
_YAML = "tag:yaml.org,2002:"
_SCALARS = {_PLAIN, *(f"{_YAML}{name}" for name in ("str", "int", "float", "bool", "null"))}
_WORDS = {"null": None, "true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_CONSTANTS: dict[str, bool | None] = {"": None, "~": None}
_CONSTANTS |= {form: value for word, value in _WORDS.items() for form in (word, word.title(), word.upper())}
_WHOLE = re.compile(r"[-+]?\d[\d_]*", re.ASCII)
_NUMBER = re.compile(r"[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?", re.ASCII)
_INFINITE = re.compile(r"([-+]?)\.?(?:inf|Inf|INF)")
# Whole numbers must fit into the 64 bits of tensors and files.
_LARGEST = 2**63


class _Loader(yaml.SafeLoader):
    """Leaves it to `_value` to read plain scalars."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0]:
            return _PLAIN
        return super().resolve(kind, value, implicit)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that `plain_value`, or any other reader of YAML, would take for something else."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)
        misread = kind is yaml.ScalarNode and implicit[0] and not isinstance(plain_value(value), str)
        return f"{_YAML}null" if misread and tag == f"{_YAML}str" else tag


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # In other styles a line break of a rarer kind would be read back as a plain one.
    return dumper.represent_scalar(f"{_YAML}str", text, style=None if text.isprintable() else '"')


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    # With an exponent, a whole number would be read as an int, of which a float holds 53 bits.
    whole = value.is_integer() and abs(value) < _LARGEST
    return dumper.represent_scalar(f"{_YAML}float", f"{value:.1f}") if whole else dumper.represent_float(value)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(float, _represent_float)


def dump(value: Any, flow: bool = False) -> str:
    """YAML that `parse` reads back to the value, of plain values. `flow`: in one line, with braces and brackets."""
    options: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": math.inf}
    return yaml.dump(value, Dumper=_Dumper, default_flow_style=flow, **options).removesuffix("...\n")


def plain_value(text: str) -> Any:
    """The value of a text without quotes for a key that is not a text key: None, a bool, a number, or the text itself
    if it is neither, or a number that no float holds."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if infinite := _INFINITE.fullmatch(text):
        return float(f"{infinite[1]}inf")
    if not _NUMBER.fullmatch(text):
        return text
    digits = text.replace("_", "")
    value = float(digits)
    if math.isinf(value) or (value == 0 and re.search("[1-9]", re.split("[eE]", digits)[0])):
        return text
    # 5e8 tokens are a whole number; 1.0e-4 is not, and neither is 2.0, without an exponent.
    if abs(value) > _LARGEST or not ("e" in digits.lower() or _WHOLE.fullmatch(text)):
        return value
    exact = Decimal(digits) if value else Decimal(0)  # whatever the exponent of a zero is
    return int(exact) if exact == exact.to_integral_value() and abs(exact) < _LARGEST else value


def parse(text: str, kind: Any, where: str) -> Any:
    """A YAML document as plain values, for a key, section or whole config of type `kind`. Raises UserError with `where`
    and the line."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _value(node, kind, ())
    except yaml.YAMLError as error:
        raise UserError(f"{where}{_place(error, text)}: {_problem(error)}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None
    except (ValueError, OverflowError) as error:  # such as "\UFFFFFFFF", which is no character
        raise UserError(f"{where}: {first_line(error)}") from None


def parse_value(text: str, kind: Any, where: str) -> Any:
    """The value of an override for a key of type `kind`. Quotes around the whole value are not part of a text. Raises
    UserError with `where`."""
    takes_text, stripped = _takes(kind, str), text.strip()
    if not stripped and not takes_text:
        return {} if _is_section(kind) else None
    if _is_section(kind) or get_origin(kind) is tuple or _takes(kind, dict) or _is_flow(stripped, kind):
        return parse(text, kind, where)
    quoted = _unquoted(stripped)
    if quoted is not None or (takes_text and not _takes(kind, bool)):
        return _checked(text if quoted is None else quoted, where)
    value = _typed(stripped, kind)
    return _checked(text, where) if isinstance(value, str) else value


def value_text(value: Any) -> str:
    """The value as an override has it after `=`, before a shell's quotes."""
    if not isinstance(value, str):
        return dump(value, flow=True).strip()
    return value if parse_value(value, str, "") == value else json.dumps(value)


def _unquoted(text: str) -> str | None:
    """The text inside a quoted scalar; None if the whole text is not one."""
    if not text.startswith(("'", '"')) or "\n" in text:
        return None
    try:
        node = yaml.compose(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError):
        return None
    return node.value if isinstance(node, yaml.ScalarNode) and node.end_mark.index == len(text) else None


def _value(node: yaml.Node, kind: Any, outer: tuple[yaml.Node, ...]) -> Any:
    """The plain value of a node. `outer`: the nodes that hold it."""
    if any(node is holder for holder in outer):
        raise _error(node, "an alias refers to what holds it")
    if isinstance(node, yaml.MappingNode) and node.tag == f"{_YAML}map":
        return _mapping(node, kind, (*outer, node))
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_YAML}seq":
        return [_value(item, kind_below(kind, ""), (*outer, node)) for item in node.value]
    if not isinstance(node, yaml.ScalarNode) or node.tag not in _SCALARS:
        raise _error(node, f"unknown tag {node.tag.replace(_YAML, '!!')!r}")
    text = _text(node)
    if node.tag == f"{_YAML}str":
        return text
    return {} if plain_value(text) is None and _is_section(kind) else _typed(text, kind)


def _mapping(node: yaml.MappingNode, kind: Any, outer: tuple[yaml.Node, ...]) -> dict[str, Any]:
    inherited: dict[str, Any] = {}
    own: dict[str, Any] = {}
    seen = set()
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise _error(key_node, "a key must be a word")
        key = _text(key_node)
        if key in seen:
            raise _error(key_node, f"duplicate key {key!r}")
        seen.add(key)
        if key == "<<" and key_node.tag == _PLAIN:
            # Of several sections, the first wins.
            for source in reversed(value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]):
                if not isinstance(source, yaml.MappingNode) or any(source is holder for holder in outer):
                    raise _error(source, "`<<` takes an alias of another section, or a list of them")
                inherited |= _mapping(source, kind, (*outer, source))
        else:
            own[key] = _value(value_node, kind_below(kind, key), outer)
    return inherited | own


def _typed(text: str, kind: Any) -> Any:
    """The value of a text without quotes for a key of type `kind`. An error then shows what was typed."""
    value = plain_value(text)
    if isinstance(value, bool):
        return value if _takes(kind, bool) or kind is Any else text
    return text if _takes(kind, str) and value is not None else value


def kind_below(kind: Any, key: str) -> Any:
    """The type of a key of a section, or of a list's items; Any if it is unknown."""
    if dataclasses.is_dataclass(kind):
        field = fields_of(kind).get(key)
        return field.annotation if field else Any
    return get_args(kind)[0] if get_origin(kind) is tuple else Any


def _parts(kind: Any) -> list[Any]:
    parts = get_args(kind) if get_origin(kind) in (types.UnionType, Union) else [kind]
    return [get_origin(part) or part for part in parts]


def _takes(kind: Any, wanted: Any) -> bool:
    """Whether a key's type is, or has among others, `wanted`. Words such as fp32 count as texts, but not a word beside
    numbers."""
    parts = _parts(kind)
    return any(part is wanted or (wanted is str and part is Literal and int not in parts) for part in parts)


def _is_flow(text: str, kind: Any) -> bool:
    """Whether it is a list or a mapping in one line: in a text, brackets and braces are characters like others."""
    return text.startswith(("[", "{")) and not _takes(kind, str)


def _is_section(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or get_origin(kind) is dict


def _checked(text: str, where: str) -> str:
    """The text with the pairs of code units that JSON writes joined. Raises UserError for what is not Unicode."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise UserError(f"{where}: {text!r} is not valid UTF-8 text") from None


def _text(node: yaml.ScalarNode) -> str:
    try:
        return _checked(node.value, "")
    except UserError as error:
        raise _error(node, str(error).removeprefix(": ")) from None


def _error(node: yaml.Node, problem: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _place(error: yaml.YAMLError, text: str) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        return f" line {text.count(chr(10), 0, error.position) + 1}"
    mark = getattr(error, "problem_mark", None)
    return f" line {mark.line + 1}" if mark else ""


def _problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        return f"the character {chr(error.character)!r} is not allowed in YAML; is this a text file?"
    problem = getattr(error, "problem", None) or "not valid YAML"
    if problem.startswith("but "):  # the second half of a sentence
        problem = f"{getattr(error, 'context', '')}, {problem}"
    return problem + ("; indent with blanks" if "'\\t'" in problem else "")
