"""Types of config values that have a rule of their own, each with its check."""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, PlainValidator

from megagpt.config_marks import Values

# Longest name of a folder (bytes): the limit of Linux file systems.
_LONGEST_NAME = 255
# Value of a key that the run decides by itself.
AUTO: Literal["auto"] = "auto"
# Longest time (s), about 30 years: timers count nanoseconds in 64 bits.
_LONGEST_TIME = 1e9


def name_problem(name: str) -> str:
    """Why a run cannot have that name, as part of a sentence; empty if it can."""
    if "/" in name or "\\" in name:
        return "is a path, not a name: the run would lie outside run.folder, which may be a path"
    if name in (".", ".."):
        return "is no name of its own: every folder has it"
    if name != name.strip():
        return "begins or ends with a blank"
    if not name.isprintable():
        return "has characters that cannot be seen"
    return f"has more than {_LONGEST_NAME} bytes" if len(name.encode()) > _LONGEST_NAME else ""


def _check_name(name: str) -> str:
    if problem := name_problem(name):
        raise ValueError(f"{name!r} {problem}; choose another run.name")
    return name


def _check_path(path: str) -> str:
    if "\0" in path:
        raise ValueError(f"{path!r} has a zero byte, which no path has; leave it out")
    return path


def _check_activation_checkpointing(value: Any) -> str | dict[str, int]:
    match value:
        case "none" | "full" | "selective":
            return value
        case {"every": int(k), **rest} if not rest and k > 0 and not isinstance(k, bool):
            return {"every": k}
    raise ValueError(f"{value!r} is not one of: none, full, selective, {{every: k}} with a whole number k above 0")


def _check_seconds(value: Any) -> float:
    seconds = value
    if isinstance(value, str):
        days, dash, clock = value.rpartition("-")
        parts = clock.split(":")
        if dash:  # after days, hours come first
            parts += ["0"] * (3 - len(parts))
        if all(p.isdecimal() for p in [*parts, *([days] if dash else [])]) and len(parts) <= 3:
            seconds = 86_400 * int(days or 0) + sum(int(part) * 60**i for i, part in enumerate(reversed(parts)))
    if isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= seconds <= _LONGEST_TIME:
        return seconds
    most = f"of at most {_LONGEST_TIME:.0f} s"
    raise ValueError(f"{value!r} is not a time {most}: use seconds, MM:SS, HH:MM:SS or D-HH:MM:SS")


def _check_micro_batch(value: Any) -> int | str:
    if value == AUTO or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise ValueError(f"{value!r} is neither a whole number above 0 nor {AUTO}")


def _check_compile(value: Any) -> bool | str:
    if value == "auto" or isinstance(value, bool):
        return value
    raise ValueError(f"{value!r} is not one of: auto, true, false")


_SPIKE_WORDS = "none | {deviations: number, steps: whole number, action: skip | stop}"


def _check_spikes(value: Any) -> str | dict[str, Any]:
    match value:
        case "none":
            return value
        case {"deviations": int() | float() as far, "steps": int(steps), "action": "skip" | "stop", **rest}:
            booleans = isinstance(far, bool) or isinstance(steps, bool)
            if not rest and not booleans and 0 < far < math.inf and steps > 1:
                return value
    raise ValueError(f"{value!r} is not {_SPIKE_WORDS}, with deviations above 0 and steps above 1")


_STEPS = re.compile(r"\s*\[?\s*([\d_]+)\s*(?:[-,]\s*([\d_]+)\s*)?\]?\s*", re.ASCII)
# Most steps in a profile: their traces are read into memory, some hundred MB for each step of a large model.
MOST_PROFILED = 20
_STEPS_WORDS = "first-last | one step | nothing"


def steps_of(text: str) -> range:
    """The steps, numbered from 1, of a value such as 100-103; empty for an empty one."""
    if not text:
        return range(0)
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def _check_steps(value: Any) -> str:
    text = str(value) if isinstance(value, str | int | list) and not isinstance(value, bool) else repr(value)
    if text in ("", "0", "none"):
        return ""
    if not (found := _STEPS.fullmatch(text)):
        raise ValueError(f"{value!r} is not {_STEPS_WORDS}, such as 100-103")
    first, last = int(found[1]), int(found[2] or found[1])
    if not 0 < first <= last:
        problem = "steps are numbered from 1" if first == 0 else f"the first step {first} is after the last one {last}"
        raise ValueError(f"{value!r}: {problem}; give the first and the last one, such as 100-103")
    if last - first >= MOST_PROFILED:
        many = f"{last - first + 1:,} steps are more than {MOST_PROFILED}, and a trace grows with each of them"
        raise ValueError(f"{value!r}: {many}; give fewer, such as {first}-{first + 3}")
    return f"{first}-{last}" if last > first else f"{first}"


def _split_names(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise ValueError(f"{value!r} is not a list of names, such as [hellaswag, lambada]")


RunName = Annotated[str, AfterValidator(_check_name)]
PathText = Annotated[str, AfterValidator(_check_path)]
Seconds = Annotated[float, PlainValidator(_check_seconds), Values("seconds, MM:SS, HH:MM:SS or D-HH:MM:SS")]
_Modes = Annotated[str | dict[str, int], Values("none | full | selective | {every: k}")]
ActivationCheckpointing = Annotated[_Modes, PlainValidator(_check_activation_checkpointing)]
_SizeOrAuto = Annotated[int | Literal["auto"], Values("whole number > 0 | auto")]
MicroBatch = Annotated[_SizeOrAuto, PlainValidator(_check_micro_batch)]
Compile = Annotated[bool | str, PlainValidator(_check_compile), Values("auto | true | false")]
Steps = Annotated[str, PlainValidator(_check_steps), Values(_STEPS_WORDS)]
Spikes = Annotated[str | dict[str, Any], PlainValidator(_check_spikes), Values(_SPIKE_WORDS)]
Names = Annotated[tuple[str, ...], BeforeValidator(_split_names), Values("[name, name, ...]")]
