"""One run = one Config: nested dataclasses, read from YAML, overridden on the command line.

    config = load_config("gpt3_xl.yaml", ["train.tokens=1e9", "model.layers=2"])

A file may name another as its `base` (beside itself, or by bare name) and then holds only what differs from it.
Quantities that the papers give in tokens stay in tokens. Every error names file, key and value.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PlainValidator, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megagpt.errors import UserError, did_you_mean
from megagpt.models.presets import SECTION, ModelConfig, preset_fields


@dataclass(frozen=True, config=SECTION)
class RunConfig:
    """What the run is called and where it lives."""

    name: str = ""
    """Folder of the run below `folder`; empty: the config file's name."""
    folder: str = "runs"
    """Folder that holds all runs; `tensorboard --logdir` takes it."""
    seed: int = Field(default=0, ge=0)
    """Decides initial weights, data order and dropout, each through its own hash."""


@dataclass(frozen=True, config=SECTION)
class SourceConfig:
    """One corpus of token shards."""

    path: str
    """Folder written by `megagpt prepare`, or of llm.c / modded-nanogpt .bin or build-nanogpt .npy shards.
    `stdlib` is the text of Python's own standard library, prepared on first use."""
    weight: float = Field(default=1.0, gt=0, le=1e15)
    """Share of this source in the mixture, relative to the others. Up to 6 decimals count."""


@dataclass(frozen=True, config=SECTION)
class DataConfig:
    """What is trained on."""

    sources: tuple[SourceConfig, ...] = Field(default=(SourceConfig("data/fineweb_edu_10bt"),), min_length=1)
    """The corpora and their weights."""
    cache: str = "data"
    """Where the built-in corpus is prepared."""


def _check_recomputation(value: Any) -> str | dict[str, int]:
    match value:
        case "none" | "full" | "selective":
            return value
        case {"every": int(k), **rest} if not rest and k > 0 and not isinstance(k, bool):
            return {"every": k}
    raise ValueError(f"{value!r} is none of: none, full, selective, {{every: k}} with a whole number k above 0")


def _check_seconds(value: Any) -> float:
    if isinstance(value, str):
        days, dash, clock = value.rpartition("-")
        parts = clock.split(":")
        if dash:  # hours come first then
            parts += ["0"] * (3 - len(parts))
        if all(p.isdigit() for p in [*parts, *([days] if dash else [])]) and len(parts) <= 3:
            seconds = 0
            for part in parts:
                seconds = 60 * seconds + int(part)
            return seconds + 86_400 * int(days or 0)
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(f"{value!r} is no time: use seconds, MM:SS, HH:MM:SS or D-HH:MM:SS")


Seconds = Annotated[float, PlainValidator(_check_seconds)]
Recomputation = Annotated[str | dict[str, int], PlainValidator(_check_recomputation)]


@dataclass(frozen=True, config=SECTION)
class TrainConfig:
    """How much is trained, in what pieces, in which precision."""

    tokens: int = Field(default=300_000_000_000, gt=0)
    """Tokens of the whole run; the last batch is cut to fit."""
    batch_tokens: int = Field(default=524_288, gt=0)
    """Global batch in tokens, whatever the number of ranks."""
    batch_ramp_start: int = Field(default=0, ge=0)
    """Batch in tokens at the start of the ramp; 0: the full batch from the first step."""
    batch_ramp_tokens: int = Field(default=0, ge=0)
    """Tokens over which the batch grows linearly from `batch_ramp_start` to `batch_tokens`."""
    micro_batch: int = Field(default=8, gt=0)
    """Sequences a rank takes through the model at a time. Accumulation is derived from it."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """What matrix products run in. The optimizer's weights, the sum of the gradients over micro-batches and over ranks,
    LayerNorm, softmax and the residual stream are fp32 in all of them. fp16 scales the loss, dynamically."""
    compile: bool = False
    """torch.compile each block. Evaluation and sampling run uncompiled."""
    activation_checkpointing: Recomputation = "none"
    """What the backward pass computes again instead of keeping it. none: nothing; full: every block; {every: k}: one
    block in k; selective: everything but the outputs of matrix products and attention."""
    nonfinite_limit: int = Field(default=10, gt=0)
    """A step whose loss or gradient is not finite on any rank is skipped on all; so many in a row end the run."""
    time_limit: Seconds = 0
    """Wall-clock time of a start, counted from the process's beginning, after which it has saved and ended as after a
    signal: seconds, MM:SS, HH:MM:SS or D-HH:MM:SS as in Slurm; 0: none."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""


@dataclass(frozen=True, config=SECTION)
class OptimizerConfig:
    """AdamW. Defaults: GPT-3, appendix B."""

    lr: float = Field(default=6.0e-4, gt=0)
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(default=1.0e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """On matrices only: embeddings and linear layers, not biases and LayerNorm gains."""
    clip: float = Field(default=1.0, gt=0)
    """Largest global gradient norm."""


@dataclass(frozen=True, config=SECTION)
class ScheduleConfig:
    """Learning rate as a function of tokens. Defaults: GPT-3, appendix B."""

    shape: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine to the floor; warm-up-stable-decay (constant, then linear to the floor); constant."""
    warmup_tokens: int = Field(default=375_000_000, ge=0)
    """Linear from zero to the peak over these tokens."""
    decay_start_tokens: int = Field(default=0, ge=0)
    """wsd only: where the stable part ends."""
    decay_end_tokens: int = Field(default=260_000_000_000, ge=0)
    """Where the floor is reached; constant from there on."""
    floor: float = Field(default=0.1, ge=0, le=1)
    """The floor as a fraction of the peak."""


@dataclass(frozen=True, config=SECTION)
class EngineConfig:
    """Where weights, gradients and optimizer state live."""

    name: Literal["ddp", "fsdp", "zero"] = "ddp"
    """ddp: everything on every rank. fsdp: PyTorch's FSDP2, all of it sharded. zero: DeepSpeed ZeRO, sharded by
    `stage`. A name given on the command line drops the settings that the file makes for another engine."""
    stage: int = Field(default=2, ge=1, le=3)
    """zero: what is sharded. 1: optimizer state; 2: gradients too; 3: weights too."""
    shard_ranks: int = Field(default=0, ge=0)
    """fsdp: ranks that share one copy of the model, such as those of a node; copies are kept equal by an all-reduce
    once a step (hybrid sharding). 0: all ranks share one."""
    reshard_after_forward: bool = True
    """fsdp: drop a block's gathered weights after its forward pass and gather them again for its backward pass.
    false: keep them, one gather less for the memory of a whole model in the compute precision."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What lives in CPU memory instead of the GPU's. optimizer: optimizer state and update (zero). all: weights and
    gradients too (fsdp, zero stage 3)."""
    nvme_path: str = ""
    """zero stage 3: folder on a local NVMe disk that takes what `offload` names, instead of CPU memory."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """zero: DeepSpeed settings merged over the generated ones, such as
    {zero_optimization: {stage3_prefetch_bucket_size: 1e7}}. What this config decides itself is refused."""


@dataclass(frozen=True, config=SECTION)
class ValidationConfig:
    """Loss on held-out documents."""

    every_tokens: int = Field(default=131_072_000, ge=0)
    """Interval; 0: only at the end. The default is 250 steps of 0.5M tokens."""
    tokens: int = Field(default=10_485_760, ge=0)
    """Size of the validation set, the same on any number of ranks; cut where the corpus holds less. 0: none."""


@dataclass(frozen=True, config=SECTION)
class SamplingConfig:
    """Text drawn from the model while it trains."""

    every_tokens: int = Field(default=524_288_000, ge=0)
    """Interval; 0: only at the end. The default is 1,000 steps of 0.5M tokens."""
    prompt: str = "Hello, I'm a language model,"
    """What the samples continue."""
    samples: int = Field(default=4, ge=0)
    """How many; 0: none."""
    max_tokens: int = Field(default=32, gt=0)
    """New tokens in each."""
    temperature: float = Field(default=1.0, ge=0)
    """0: greedy."""
    top_k: int = Field(default=50, ge=0)
    """Draw from the k likeliest tokens only; 0: from all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the likeliest tokens that together reach this probability."""


@dataclass(frozen=True, config=SECTION)
class CheckpointConfig:
    """What is kept of the run."""

    asynchronous: bool = True
    """Training stops only for a copy of each rank's share into CPU memory, which a thread then writes. false, or where
    memory is short: training waits until all is written."""
    every_tokens: int = Field(default=524_288_000, ge=0)
    """Interval; 0: only at the end and when stopped. The default is 1,000 steps of 0.5M tokens."""
    keep: int = Field(default=3, ge=1)
    """Newest interval checkpoints that stay."""
    milestone_every_tokens: int = Field(default=0, ge=0)
    """The first checkpoint at or past each multiple of this stays for good; 0: none."""


@dataclass(frozen=True, config=SECTION)
class LogConfig:
    """How often the metrics are written."""

    every_tokens: int = Field(default=0, ge=0)
    """Interval; 0: every step."""


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
    sampling: SamplingConfig = SamplingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @property
    def batch_samples(self) -> int:
        """Sequences in a full global batch."""
        return self.train.batch_tokens // self.model.context

    @property
    def total_samples(self) -> int:
        """Sequences in the whole run."""
        return self.train.tokens // self.model.context

    def accumulation(self, world: int) -> int:
        """Micro-batches of a rank in a full step; raises UserError with the nearest batches that divide."""
        unit = self.train.micro_batch * world
        if self.batch_samples % unit:
            per_rank = self.batch_samples // world if self.batch_samples % world == 0 else 0
            fits = [m for m in range(1, per_rank + 1) if per_rank % m == 0]
            fits = sorted(sorted(fits, key=lambda m: abs(m - self.train.micro_batch))[:2])
            low = self.batch_samples // unit * unit * self.model.context
            batches = [b for b in (low, low + unit * self.model.context) if b]
            ways = f"train.batch_tokens {' or '.join(map(str, batches))}"
            ways += f", or train.micro_batch {' or '.join(map(str, fits))}" if fits else ", or another number of ranks"
            raise UserError(
                f"train.batch_tokens {self.train.batch_tokens} is {self.batch_samples} sequences of "
                f"{self.model.context}, which {world} rank(s) x train.micro_batch {self.train.micro_batch} "
                f"do not divide; use {ways}"
            )
        return self.batch_samples // unit

    def sharing_ranks(self, world: int) -> int:
        """Ranks that share one copy of the model under FSDP; raises UserError where they do not divide the world."""
        shard = self.engine.shard_ranks or world
        if world % shard:
            fits = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
            raise UserError(f"engine.shard_ranks {shard} does not divide {world} ranks; these do: {fits}")
        return shard


def _check(config: Config) -> Iterator[str]:
    """What no single field can know; yields one sentence for each contradiction."""
    train, schedule, context = config.train, config.schedule, config.model.context
    for key in ("batch_tokens", "batch_ramp_start"):
        value = getattr(train, key)
        if value % context:
            low = value // context * context
            near = [v for v in (low, low + context) if v]
            yield (
                f"train.{key} {value} is not a multiple of model.context {context}; "
                f"the nearest that are: {' and '.join(map(str, near))}"
            )
    if train.tokens < train.batch_tokens:
        yield f"train.tokens {train.tokens} is less than one batch, train.batch_tokens {train.batch_tokens}"
    if bool(train.batch_ramp_start) != bool(train.batch_ramp_tokens):
        yield "train.batch_ramp_start and train.batch_ramp_tokens go together: set both, or neither"
    if train.batch_ramp_start > train.batch_tokens:
        yield f"train.batch_ramp_start {train.batch_ramp_start} exceeds train.batch_tokens {train.batch_tokens}"
    if schedule.shape == "cosine" and schedule.decay_start_tokens:
        yield "schedule.decay_start_tokens is for schedule.shape wsd; a cosine starts where the warm-up ends"
    start = schedule.decay_start_tokens if schedule.shape == "wsd" else schedule.warmup_tokens
    if schedule.shape == "wsd" and start < schedule.warmup_tokens:
        yield f"schedule.decay_start_tokens {start} lies before the end of the warm-up, {schedule.warmup_tokens}"
    if schedule.shape != "constant" and schedule.decay_end_tokens <= start:
        yield f"schedule.decay_end_tokens {schedule.decay_end_tokens} must exceed the start of the decay, {start}"
    yield from _check_engine(config.engine)
    for source in config.data.sources:
        if round(source.weight * 1e6) < 1:
            yield f"data.sources weight {source.weight} of {source.path} is less than 1e-6 of a part"


def _check_engine(engine: EngineConfig) -> Iterator[str]:
    owners = {
        "stage": "zero", "shard_ranks": "fsdp", "reshard_after_forward": "fsdp", "nvme_path": "zero",
        "deepspeed": "zero",
    }  # fmt: skip
    default = EngineConfig()
    for key, owner in owners.items():
        if owner != engine.name and getattr(engine, key) != getattr(default, key):
            yield f"engine.{key} is for engine.name {owner}, and engine.name is {engine.name}"
    stage = f" stage {engine.stage}" if engine.name == "zero" else ""
    ways = {"ddp": ("none",), "fsdp": ("none", "all"), "zero": ("none", "optimizer")}[engine.name]
    if engine.name == "zero" and engine.stage == 3:
        ways += ("all",)
    if engine.offload not in ways:
        yield f"engine.offload {engine.offload}: {engine.name}{stage} can do: {', '.join(ways)}"
    if engine.name == "zero" and engine.nvme_path:
        if engine.stage != 3:
            yield f"engine.nvme_path needs engine.stage 3, and it is {engine.stage}"
        if engine.offload == "none":
            yield "engine.nvme_path is where offloaded state goes: set engine.offload to optimizer or all"


# --- reading ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are numbers (`5e8`, `1_000`) and whose duplicate keys are errors."""


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    value = float(loader.construct_scalar(node).replace("_", ""))
    # 5e8 tokens are a whole number; 1.0e-4 is not, and 2.0 without an exponent is meant as a fraction.
    return int(value) if value.is_integer() and "e" in node.value.lower() else value


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)$|^[-+]?(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*)$"),
    list("-+0123456789."),
)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)
_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: {getattr(error, 'problem', None) or 'not valid YAML'}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}") from None


def config_folders() -> list[Path]:
    """Where a bare config name is looked for, in order."""
    package = Path(__file__).resolve().parent
    return [Path(), Path("configs"), package / "configs", package.parent / "configs"]


def find_config(name: str) -> Path:
    """The file of that path or bare name (`gpt3_xl.yaml`); raises UserError with the nearest names."""
    for folder in config_folders():
        for candidate in (folder / name, folder / f"{name}.yaml"):
            if candidate.is_file():
                return candidate
    known = sorted({p.name for folder in config_folders()[1:] for p in folder.glob("*.yaml")})
    raise UserError(f"config {name!r} not found: {did_you_mean(name, known)}")


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise UserError(f"{path}: `base` leads back to itself")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    tree = _parse_yaml(text, str(path)) or {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds a {type(tree).__name__}, not sections such as `model:` and `train:`")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"{path}: base {base!r} is not a file's name")
    beside = path.parent / base
    try:
        base_path = beside if beside.is_file() else find_config(base)
    except UserError as error:
        raise UserError(f"{path}: base: {error}") from None
    return _merge(_read_tree(base_path, (*seen, path)), tree)


def override(tree: dict[str, Any], text: str) -> dict[str, Any]:
    """The tree with one `section.key=value` applied. Raises UserError where the text is not of that form."""
    key, equals, value = text.partition("=")
    if not equals or not key or not all(key.split(".")):
        raise UserError(f"override {text!r} is not of the form section.key=value, such as train.tokens=1e9")
    over: Any = _parse_yaml(value, f"override {text!r}")
    for part in reversed(key.split(".")):
        over = {part: over}
    return _merge(tree, over)


def _valid_names(location: tuple[str | int, ...]) -> list[str]:
    """The keys that are valid beside the one at `location`."""
    kind: Any = Config
    for part in location[:-1]:
        if isinstance(part, str):
            fields = {f.name: f.type for f in dataclasses.fields(kind)}
            kind = fields.get(part)
        else:
            kind = SourceConfig  # the only list of sections
    return [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _describe(error: Any) -> str:
    location, value = error["loc"], error["input"]
    key = ".".join(map(str, location)) or "config"
    match error["type"]:
        case "unexpected_keyword_argument":
            return f"unknown key {key}: {did_you_mean(str(location[-1]), _valid_names(location))}"
        case "missing":
            return f"{key} is missing"
        case "dataclass_type" | "dataclass_exact_type":
            return f"{key}: {value!r} is not a section with keys of its own"
        case "value_error":
            return f"{key}: {error['ctx']['error']}"
    message = error["msg"].replace("Input should be", "should be")
    return f"{key}: {value!r} {message}"


def build_config(tree: dict[str, Any], where: str) -> Config:
    """Check a tree of plain values and make the Config; `where` names it in errors."""
    model = tree.get("model")
    if isinstance(model, dict) and model.get("preset"):
        try:
            tree = {**tree, "model": {**preset_fields(str(model["preset"])), **model}}
        except UserError as error:
            raise UserError(f"{where}: model.preset: {error}") from None
    try:
        # JSON mode is pydantic's strict mode for parsed files: no string passes for a number, no bool for an int.
        config = TypeAdapter(Config).validate_json(json.dumps(tree))
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_describe(e) for e in error.errors())) from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None
    problems = list(_check(config))
    if problems:
        raise UserError(f"{where}: " + "; ".join(problems))
    return config


def _other_engine(tree: dict[str, Any], text: str) -> dict[str, Any]:
    """Without the file's settings for another engine than the override names."""
    engine, over = tree.get("engine"), override({}, text).get("engine")
    if not isinstance(engine, dict) or not isinstance(over, dict) or "name" not in over:
        return tree
    return tree if over["name"] == engine.get("name", EngineConfig.name) else {**tree, "engine": {}}


def load_config(name: str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a config by path or bare name, apply `section.key=value` overrides, check it. Raises UserError."""
    path = find_config(name)
    tree = _read_tree(path)
    for text in overrides:
        tree = _other_engine(tree, text)
    for text in overrides:
        tree = override(tree, text)
    where = str(path) + (f" with {' '.join(overrides)}" if overrides else "")
    config = build_config(tree, where)
    if not config.run.name:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, name=path.stem))
    return config


def to_yaml(config: Config) -> str:
    """The resolved run, every value spelled out; `load_config` reads it back to an equal Config."""
    tree = json.loads(json.dumps(dataclasses.asdict(config)))
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
