"""Keys of a config that contradict each other, whatever machine it runs on."""

from collections.abc import Iterator

from megagpt.config import Config, EngineConfig
from megagpt.config_marks import For, fields_of, mark_of


def contradictions(config: Config) -> Iterator[str]:
    """One sentence for each contradiction between keys."""
    train, schedule, context = config.train, config.schedule, config.model.context
    for key in ("batch_tokens", "batch_ramp_start"):
        value = getattr(train, key)
        if value % context:
            low = value // context * context
            near = " and ".join(str(v) for v in (low, low + context) if v)
            yield f"train.{key} {value} is not a multiple of model.context {context}; the nearest that are: {near}"
    if train.residual == "bf16" and train.precision != "bf16":
        yield f"train.residual bf16 needs train.precision bf16, and it is {train.precision}"
    if train.tokens < train.batch_tokens:
        yield f"train.tokens {train.tokens} is less than one batch, train.batch_tokens {train.batch_tokens}"
    if bool(train.batch_ramp_start) != bool(train.batch_ramp_tokens):
        yield "train.batch_ramp_start and train.batch_ramp_tokens go together: set both, or neither"
    if train.batch_ramp_start > train.batch_tokens:
        yield f"train.batch_ramp_start {train.batch_ramp_start} exceeds train.batch_tokens {train.batch_tokens}"
    if schedule.shape == "cosine" and schedule.decay_start_tokens:
        yield "schedule.decay_start_tokens is for schedule.shape wsd; a cosine starts at the end of the warm-up"
    start = schedule.decay_start_tokens if schedule.shape == "wsd" else schedule.warmup_tokens
    if schedule.shape == "wsd" and start < schedule.warmup_tokens:
        yield f"schedule.decay_start_tokens {start} lies before the end of the warm-up, {schedule.warmup_tokens}"
    if schedule.shape != "constant" and schedule.decay_end_tokens <= start:
        yield f"schedule.decay_end_tokens {schedule.decay_end_tokens} must exceed the start of the decay, {start}"
    yield from _check_float8(config)
    yield from _check_engine(config.engine)
    yield from _check_tensor_ranks(config)
    for source in config.data.sources:
        if not source.path:
            yield "data.sources: a path is empty; name a folder of shards, or stdlib"
        if round(source.weight * 1e6) < 1:
            yield f"data.sources weight {source.weight} of {source.path} is less than 1e-6 of a part"


def _check_float8(config: Config) -> Iterator[str]:
    scaling, train = config.train.float8, config.train
    if scaling == "none":
        return
    if train.precision != "bf16":
        yield f"train.float8 {scaling} is for train.precision bf16, and train.precision is {train.precision}"
    if train.device == "cpu":
        yield f"train.float8 {scaling} needs a GPU, and train.device is cpu"
    for key in ("width", "context"):
        value = getattr(config.model, key)
        if value % 16:
            low = value // 16 * 16
            near = " and ".join(str(v) for v in (low, low + 16) if v)
            yield f"train.float8 {scaling} needs multiples of 16, and model.{key} is {value}; the nearest: {near}"


def _check_tensor_ranks(config: Config) -> Iterator[str]:
    model, size = config.model, config.engine.tensor_ranks
    able = model.ways_to_split()
    if size not in able:
        rows = f"the {model.padded_vocab_size} rows of the token embedding"
        shape = f"model.heads {model.heads}, model.context {model.context} and {rows}"
        yield f"engine.tensor_ranks {size} must divide {shape}; these do: {', '.join(map(str, able))}"
    if size > 1 and config.train.float8 != "none":
        reason = "scales whole tensors, and tensor ranks hold parts of them"
        yield f"train.float8 {config.train.float8} {reason}: set train.float8=none or engine.tensor_ranks=1"


def _check_engine(engine: EngineConfig) -> Iterator[str]:
    default = EngineConfig()
    for key, field in fields_of(EngineConfig).items():
        only = mark_of(field, For)
        if only and engine.name not in only.engines and getattr(engine, key) != getattr(default, key):
            yield f"engine.{key} is for engine.name {' or '.join(only.engines)}, and engine.name is {engine.name}"
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
            yield "engine.nvme_path holds offloaded state: set engine.offload to optimizer or all"
