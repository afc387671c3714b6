"""One run = one Config: nested dataclasses, each key with its default, its unit and its mark (config_marks). Quantities
that the papers give in tokens stay in tokens. `config_file` reads a Config from YAML; `megagpt config --keys` shows
every key with its docstring."""

from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megagpt.config_marks import Data, ForFSDP, ForSharded, ForZero, Free, Recipe, Was
from megagpt.config_occasions import CheckpointConfig, EvaluationConfig, LogConfig, SamplingConfig, ValidationConfig
from megagpt.config_types import (
    AUTO,
    ActivationCheckpointing,
    Compile,
    MicroBatch,
    PathText,
    RunName,
    Seconds,
    Spikes,
    Steps,
)
from megagpt.divisors import ways_to_divide
from megagpt.errors import UserError
from megagpt.models.presets import SECTION, ModelConfig

# Most tensor ranks that are advised: the GPUs of a usual machine, which a group does not leave.
_GPUS_OF_A_NODE = 8


@dataclass(frozen=True, config=SECTION)
class RunConfig:
    """The run's name and place."""

    name: Free[RunName] = ""
    """Name of the run's folder in `folder`, not a path; empty: the config file's name."""
    folder: Free[PathText] = "runs"
    """Folder that holds all runs; `tensorboard --logdir` takes it."""
    seed: Recipe[int] = Field(default=0, ge=0)
    """Decides initial weights, data order and dropout, each through its own hash."""


@dataclass(frozen=True, config=SECTION)
class SourceConfig:
    """One corpus of token shards."""

    path: Free[PathText]
    """Folder written by `megagpt data prepare`, or of llm.c / modded-nanogpt .bin, build-nanogpt .npy or nanoGPT's
    train.bin and val.bin. A relative path starts at the current folder; on a resume, also where the run was started.
    `stdlib` is the text of Python's own standard library, prepared on first use."""
    weight: Data[float] = Field(default=1.0, gt=0, le=1e15)
    """Share of this source in the mixture, relative to the other sources. Up to 6 decimals count."""


@dataclass(frozen=True, config=SECTION)
class SkipConfig:
    """A stretch of the data order that is left out."""

    at: Data[int] = Field(ge=0)
    """The run's position, in tokens seen, at which the stretch would come. Rounded up to whole sequences."""
    tokens: Data[int] = Field(gt=0)
    """Length of the stretch. Rounded up to whole sequences."""


@dataclass(frozen=True, config=SECTION)
class DataConfig:
    """The training data."""

    sources: Data[tuple[SourceConfig, ...]] = Field(default=(SourceConfig("data/fineweb_edu_10bt"),), min_length=1)
    """The corpora and their weights."""
    skip: Data[tuple[SkipConfig, ...]] = ()
    """Stretches of the data order to leave out, such as [{at: 3000000, tokens: 500000}]: to pass data at which the loss
    spiked."""
    cache: Free[PathText] = "data"
    """Folder in which the built-in corpus is prepared."""


@dataclass(frozen=True, config=SECTION)
class TrainConfig:
    """Length of the run, size of its batches, precision, limits."""

    tokens: Free[int] = Field(default=300_000_000_000, gt=0)
    """Tokens of the whole run; the last batch is cut to fit."""
    batch_tokens: Recipe[int] = Field(default=524_288, gt=0)
    """Global batch in tokens, the same on any number of ranks."""
    batch_ramp_start: Recipe[int] = Field(default=0, ge=0)
    """Batch in tokens at the start of the ramp; 0: the full batch from the first step."""
    batch_ramp_tokens: Recipe[int] = Field(default=0, ge=0)
    """Tokens over which the batch grows linearly from `batch_ramp_start` to `batch_tokens`."""
    micro_batch: Free[MicroBatch] = 8
    """Sequences that a rank takes through the model at a time, or that each group of `engine.tensor_ranks` ranks takes
    together; fewer if its share of the batch is smaller. Gradient accumulation is derived from it. auto: on a GPU, the
    largest that fits and divides the batch, by the plan, and confirmed by a trial step; on a CPU, the largest of at
    most 4,096 tokens. It changes time and memory only."""
    precision: Free[Literal["fp32", "bf16", "fp16"]] = "bf16"
    """Number format of matrix products. The optimizer's weights, the sum of the gradients over micro-batches and over
    ranks, LayerNorm and softmax are always fp32. fp16 uses dynamic loss scaling."""
    residual: Recipe[Literal["fp32", "bf16"]] = "fp32"
    """Number format of the residual stream, the sum to which each block adds. bf16 moves fewer bytes and rounds the sum
    at each block; it needs precision bf16."""
    float8: Recipe[Literal["none", "tensorwise", "rowwise"]] = "none"
    """Rounding of both operands of the blocks' matrix products to 8 bits, on GPUs that multiply such numbers. The scale
    is one for each tensor, or one for each row of it: more precise, and slower. Needs bf16 and torchao. Attention, the
    embeddings and the head stay bf16; MFU stays a fraction of bf16's peak."""
    compile: Free[Compile] = "auto"
    """torch.compile each block, the head's softmax and what is between them. auto: on a GPU. The first step then takes
    up to a few minutes, and so does each step of a batch ramp that is the first with micro-batches of its size.
    Sampling runs uncompiled."""
    activation_checkpointing: Free[ActivationCheckpointing] = "none"
    """Activations that the backward pass computes again, so that they need not be kept. none: no activations; full: all
    blocks'; {every: k}: those of one in every k blocks; selective: all but outputs of matrix products and attention."""
    nonfinite_limit: Free[int] = Field(default=10, gt=0)
    """A step whose loss or gradient is not finite on some rank is skipped on all ranks. The run ends after this many
    skipped steps in a row, and names the last good checkpoint."""
    spike: Recipe[Spikes] = "none"
    """Loss spikes: a loss that exceeds the mean of the last `steps` losses by more than `deviations` of their standard
    deviations. Its update is skipped, which counts towards `nonfinite_limit`, or the run stops. Such as
    {deviations: 6, steps: 128, action: skip}."""
    time_limit: Free[Seconds] = 0
    """Wall-clock time in which one incarnation saves and ends, as after a signal; counted from the start of its
    process. Seconds, MM:SS, HH:MM:SS or D-HH:MM:SS as in Slurm; 0: no limit."""
    hang_timeout: Annotated[Free[Annotated[Seconds, Field(gt=0)]], Was("collective_timeout")] = 900
    """Longest time that a rank may spend without a step, a validation batch or a sampled token. After that, the stacks
    of all ranks are written to the run's folder, and the run ends with code 3, resumable. Same form as `time_limit`."""
    profile_steps: Free[Steps] = ""
    """Steps that are profiled, at most 20, the first and the last of them, such as 100-103: traces, the step's time
    by part, the memory over time; in profile/ in the run's folder. Empty: none."""
    device: Free[Literal["auto", "cpu", "cuda"]] = "auto"
    """auto: cuda if there is a GPU."""


@dataclass(frozen=True, config=SECTION)
class OptimizerConfig:
    """AdamW. Defaults: GPT-3, appendix B."""

    lr: Recipe[float] = Field(default=6.0e-4, gt=0)
    """Peak learning rate."""
    beta1: Recipe[float] = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: Recipe[float] = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: Recipe[float] = Field(default=1.0e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: Recipe[float] = Field(default=0.1, ge=0)
    """Weight decay of matrices: embeddings and linear layers. Biases and LayerNorm gains have none."""
    clip_norm: Annotated[Recipe[float], Was("clip")] = Field(default=1.0, gt=0, allow_inf_nan=True)
    """Largest global gradient norm; .inf: gradients are not clipped."""


@dataclass(frozen=True, config=SECTION)
class ScheduleConfig:
    """Learning rate as a function of tokens. Defaults: GPT-3, appendix B."""

    shape: Recipe[Literal["cosine", "wsd", "constant"]] = "cosine"
    """Rate after the warm-up. cosine: to the floor; wsd (warm-up-stable-decay): constant, then linear to the floor;
    constant: no decay."""
    warmup_tokens: Recipe[int] = Field(default=375_000_000, ge=0)
    """Tokens over which the rate grows linearly from zero to the peak."""
    decay_start_tokens: Recipe[int] = Field(default=0, ge=0)
    """wsd only: position in tokens at which the constant part ends."""
    decay_end_tokens: Recipe[int] = Field(default=260_000_000_000, ge=0)
    """Position in tokens at which the rate reaches the floor; it is constant after that."""
    floor_ratio: Annotated[Recipe[float], Was("floor")] = Field(default=0.1, ge=0, le=1)
    """The floor as a fraction of the peak."""


@dataclass(frozen=True, config=SECTION)
class EngineConfig:
    """Placement of weights, gradients and optimizer state, and the ranks that share products."""

    name: Free[Literal["ddp", "fsdp", "zero"]] = "ddp"
    """ddp: everything on every rank. fsdp: PyTorch's FSDP2, everything sharded. zero: DeepSpeed ZeRO, sharded by
    `stage`. A name given on the command line drops the file's settings for another engine, but not `tensor_ranks`
    between fsdp and zero, which both have it."""
    stage: ForZero[int] = Field(default=2, ge=1, le=3)
    """zero: state that is sharded. 1: optimizer state; 2: gradients too; 3: weights too."""
    tensor_ranks: ForSharded[int] = Field(default=1, ge=1)
    """fsdp and zero: number of neighbouring ranks of one machine that share every matrix product and the activations
    around it (tensor and sequence parallelism). They take the same sequences, so the batch is dealt to groups of ranks.
    It must divide the model's heads, context and padded vocabulary. 1: each rank computes whole products."""
    shard_ranks: ForFSDP[int] = Field(default=0, ge=0)
    """fsdp: number of ranks that share one copy of the model, such as a node's; an all-reduce in each step keeps the
    copies equal (hybrid sharding). A multiple of `tensor_ranks`. 0: all ranks share one copy."""
    reshard_after_forward: ForFSDP[bool] = True
    """fsdp: drop a block's gathered weights after its forward pass and gather them again for its backward pass.
    false: keep them, which saves a gather and takes the memory of a whole model in the compute precision."""
    offload: Free[Literal["none", "optimizer", "all"]] = "none"
    """State kept in CPU memory instead of GPU memory. optimizer: optimizer state and update (zero). all: weights and
    gradients too (fsdp, zero stage 3)."""
    nvme_path: ForZero[PathText] = ""
    """zero stage 3: folder on a local NVMe disk for the state that `offload` names, instead of CPU memory."""
    deepspeed: ForZero[dict[str, Any]] = Field(default_factory=dict)
    """zero: DeepSpeed settings merged over the generated ones, such as
    {zero_optimization: {stage3_prefetch_bucket_size: 1e7}}. Settings that other keys of the config decide are
    refused."""


@dataclass(frozen=True, config=SECTION)
class Config:
    """A whole run."""

    model: ModelConfig
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = Field(default_factory=EngineConfig)
    validation: ValidationConfig = ValidationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sampling: SamplingConfig = SamplingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @property
    def batch_sequences(self) -> int:
        """Sequences in a full global batch."""
        return self.train.batch_tokens // self.model.context

    @property
    def total_sequences(self) -> int:
        """Sequences in the whole run."""
        return self.train.tokens // self.model.context

    @property
    def micro_batch(self) -> int:
        """Sequences that a rank takes through the model at a time. Raises UserError while `train.micro_batch` is auto:
        `planning.micro_batch` decides it."""
        size = self.train.micro_batch
        if size == AUTO:
            raise UserError("train.micro_batch is auto, which only a run decides; set a number")
        return size

    def check_ranks(self, ranks: int) -> None:
        """Raises UserError, with what to change, if the run cannot start on that many ranks."""
        if self.train.micro_batch == AUTO:
            self.sequences_of_a_rank(ranks)
        else:
            self.accumulation(ranks)
        self.sharing_ranks(ranks)
        tokens, context = self.validation.tokens, self.model.context
        if 0 < tokens < context:  # not a contradiction of keys: old runs with such a value can still be read
            ways = f"raise it to {context} or more, or set it to 0 for no validation"
            raise UserError(f"validation.tokens {tokens} is less than one sequence, model.context {context}; {ways}")

    def shares(self, ranks: int) -> int:
        """Parts into which every batch is dealt: one for each group of tensor ranks. Raises UserError if the groups do
        not divide all ranks."""
        size = self.engine.tensor_ranks
        if ranks % size:
            able = ", ".join(str(n) for n in self.model.ways_to_split() if ranks % n == 0)
            problem = f"engine.tensor_ranks {size} does not divide {ranks} rank{'s' if ranks > 1 else ''}"
            raise UserError(f"{problem}; these fit: {able}; or start a multiple of {size}")
        return ranks // size

    def sequences_of_a_rank(self, ranks: int) -> int:
        """Sequences that each rank takes of a full batch. Raises UserError with the nearest batches and ranks that
        divide."""
        shares = self.shares(ranks)
        if self.batch_sequences % shares:
            raise self._indivisible(ranks, None)
        return self.batch_sequences // shares

    def accumulation(self, ranks: int) -> int:
        """Micro-batches of a rank in a full step. Raises UserError with the nearest batches, ranks and micro-batches
        that divide."""
        unit = self.micro_batch * self.shares(ranks)
        if self.batch_sequences % unit:
            raise self._indivisible(ranks, self.micro_batch)
        return self.batch_sequences // unit

    def _indivisible(self, ranks: int, size: int | None) -> UserError:
        """The error for a batch that the ranks do not divide; `size`: sequences in their micro-batches; None: any."""
        group = self.engine.tensor_ranks
        ways = ways_to_divide(self.batch_sequences, self.model.context, ranks // group, size, group)
        batch = f"{self.train.batch_tokens} is {self.batch_sequences} sequences of {self.model.context}"
        divisor = f"{ranks} rank(s)" if group == 1 else f"{ranks // group} group(s) of {group} tensor ranks"
        divisor += f" x train.micro_batch {size}" if size else ""
        if self.engine.name != "ddp" and self.train.float8 == "none":
            more = [n for n in self.model.ways_to_split() if group < n <= _GPUS_OF_A_NODE and ranks % n == 0]
            more = [n for n in more if self.engine.shard_ranks % n == 0]
            fits = [n for n in more if self.batch_sequences % (ranks // n * (size or 1)) == 0]
            ways += f", or engine.tensor_ranks {fits[0]}" if fits else ""
        return UserError(f"train.batch_tokens {batch}, which {divisor} do not divide; use {ways}")

    def sharing_ranks(self, ranks: int) -> int:
        """Ranks that share one copy of the model under FSDP. Raises UserError if they do not divide all ranks, or if
        groups of tensor ranks do not divide them."""
        self.shares(ranks)
        shard, group = self.engine.shard_ranks or ranks, self.engine.tensor_ranks
        problems = [f"does not divide {ranks} rank{'s' if ranks > 1 else ''}"] if ranks % shard else []
        problems += [f"is no multiple of engine.tensor_ranks {group}"] if shard % group else []
        if problems:
            fits = ", ".join(str(n) for n in range(group, ranks + 1, group) if ranks % n == 0)
            raise UserError(f"engine.shard_ranks {shard} {' and '.join(problems)}; these fit: {fits}")
        return shard


def compiles(wanted: bool | str, device_type: str) -> bool:
    """Whether a value of `train.compile` means yes on "cpu" or "cuda"."""
    return wanted is True or (wanted == "auto" and device_type == "cuda")
