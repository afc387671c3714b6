"""The sections of a config about what happens between steps: validation, exams, samples, saves, and the log."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megagpt.config_marks import Free, Was
from megagpt.config_types import Names, PathText
from megagpt.models.presets import SECTION


@dataclass(frozen=True, config=SECTION)
class ValidationConfig:
    """Loss on held-out documents."""

    every_tokens: Free[int] = Field(default=131_072_000, ge=0)
    """Interval in tokens; 0: only at the end. The default is 250 steps of 0.5M tokens."""
    tokens: Free[int] = Field(default=10_485_760, ge=0)
    """Size of the validation set, the same on any number of ranks; less if the corpus holds less. 0: no validation."""


@dataclass(frozen=True, config=SECTION)
class EvaluationConfig:
    """Exams of the model while it trains."""

    tasks: Free[Names] = ()
    """Exams, such as [hellaswag, lambada]; `megagpt evaluate --tasks list` shows all. Empty: none."""
    every_tokens: Free[int] = Field(default=131_072_000, ge=0)
    """Interval in tokens; 0: only at the end. The default is 250 steps of 0.5M tokens."""
    limit: Free[int] = Field(default=0, ge=0)
    """Rows of each exam, the same ones in every run; 0: all."""
    shots: Free[int] = Field(default=0, ge=0)
    """Solved examples in front of each row."""
    data: Free[PathText] = ""
    """Folder of the exams' rows; empty: they come from the Hugging Face hub."""
    precision: Free[Literal["fp32", "bf16"]] = "fp32"
    """Number format of matrix products in exams, whatever `train.precision` is. Weights are the optimizer's, fp32."""


@dataclass(frozen=True, config=SECTION)
class SamplingConfig:
    """Text drawn from the model while it trains."""

    every_tokens: Free[int] = Field(default=524_288_000, ge=0)
    """Interval in tokens; 0: only at the end. The default is 1,000 steps of 0.5M tokens."""
    prompt: Free[str] = "Hello, I'm a language model,"
    """Text that the samples continue."""
    samples: Free[int] = Field(default=4, ge=0)
    """Number of samples; 0: none."""
    max_tokens: Free[int] = Field(default=32, gt=0)
    """New tokens in each sample."""
    temperature: Free[float] = Field(default=1.0, ge=0)
    """Temperature of the draw; 0: greedy."""
    top_k: Free[int] = Field(default=50, ge=0)
    """Draw from the k likeliest tokens only; 0: from all tokens."""
    top_p: Free[float] = Field(default=1.0, gt=0, le=1)
    """Draw from the likeliest tokens that together reach this probability."""


@dataclass(frozen=True, config=SECTION)
class CheckpointConfig:
    """How and when checkpoints are saved, and which are kept."""

    asynchronous: Free[bool] = True
    """Training stops only while each rank's share is copied into CPU memory; a thread then writes the copy. If false,
    or if memory is short, training waits until everything is written."""
    every_tokens: Free[int] = Field(default=524_288_000, ge=0)
    """Interval in tokens; 0: only at the end and when stopped. The default is 1,000 steps of 0.5M tokens."""
    keep_last: Annotated[Free[int], Was("keep")] = Field(default=3, ge=1)
    """Number of interval checkpoints to keep: the newest of those from which a later step was finite."""
    milestone_every_tokens: Free[int] = Field(default=0, ge=0)
    """Interval of milestones in tokens: the first checkpoint at or past each multiple is kept for good. 0: none."""


@dataclass(frozen=True, config=SECTION)
class LogConfig:
    """How often metrics are written and ranks compared."""

    every_tokens: Free[int] = Field(default=0, ge=0)
    """Interval in tokens; 0: every step."""
    peak_tflops: Free[float] = Field(default=0.0, ge=0)
    """Peak of one device in TFLOP/s, dense, in `train.precision`: what MFU is a fraction of. 0: by the GPU's name, if
    it is a known one."""
    straggler_every_steps: Annotated[Free[int], Was("pace_steps")] = Field(default=50, ge=0)
    """Steps between comparisons of the time that each rank works without waiting for others; 0: never."""
    straggler_factor: Annotated[Free[float], Was("slow_rank")] = Field(default=1.2, gt=1)
    """A rank that works longer than this multiple of the median in three comparisons in a row is a straggler: the log
    and TensorBoard name it."""
