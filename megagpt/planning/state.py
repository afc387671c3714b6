"""Bytes of weights, gradients and optimizer state on each rank, by formula.

Activations, gathered weights and buffers of a single operation are not included."""

from dataclasses import dataclass, replace

from megagpt.config import Config, compiles
from megagpt.engines.zero_config import bucket_elements
from megagpt.models.presets import ModelConfig
from megagpt.planning.activations import compute_bytes, kinds_of_blocks

_FP32 = 4
_MOMENTS = 2 * _FP32


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank at the end of a step's last forward pass, with the sum of the gradients so far."""

    weights: float
    """Weights in the precision that the engine keeps for the forward pass."""
    gradients: float
    """Sums of gradients, and the buckets that stay allocated for them."""
    optimizer: float
    """Both Adam moments; under ZeRO also the fp32 weights."""
    copies: float = 0.0
    """Copies of matrices in the compute precision, which live from the forward pass to the backward pass (ddp)."""

    @property
    def between_passes(self) -> float:
        """Bytes that stay from step to step."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return self.between_passes + self.copies


def state_bytes(config: Config, ranks: int) -> StateBytes:
    """State per rank under any engine, with the bytes that `engine.offload` moves to the CPU's memory or to a disk.

    DDP: 4 + 4 + 8 bytes per parameter, and in bf16 and fp16 a copy of every matrix, 2 bytes. FSDP: 4 + 4 + 8, divided
    by the ranks that share a copy; its gathered weights are not counted here. ZeRO keeps weights in the compute
    precision (2 bytes in bf16 and fp16) and an fp32 copy that is part of the optimizer state; all sums of gradients are
    fp32. Stage 1 sums the gradients of all weights on each rank until the step ends; in bf16 it also keeps the bf16
    gradient of the last micro-batch. A bucket that stays allocated counts as gradients. With tensor ranks,
    all this is said of one rank's part of the model, and of the ranks that have the same part."""
    engine, group = config.engine, config.engine.tensor_ranks
    parameters = held_parameters(config.model, group)
    if engine.name == "fsdp":
        held = sharded_parameters(config.model, config.sharing_ranks(ranks) // group, group)
        return StateBytes(_FP32 * held, _FP32 * held, _MOMENTS * held)
    if engine.name == "ddp":
        return StateBytes(_FP32 * parameters, _FP32 * parameters, _MOMENTS * parameters, _copies(config))
    low = compute_bytes(config)
    shard = parameters / config.shares(ranks)
    weights = low * (shard if engine.stage == 3 else parameters)
    gradients: float = _FP32 * (parameters if engine.stage == 1 else shard)
    if engine.stage == 1 and config.train.precision == "bf16":
        gradients += low * parameters
    elif engine.stage != 2:
        gradients += _FP32 * bucket_elements(config)
    return StateBytes(weights, gradients, (_FP32 + _MOMENTS) * shard)


def gpu_state_bytes(config: Config, ranks: int) -> StateBytes:
    """The part of `state_bytes` that lies in the GPU's memory."""
    state, offload = state_bytes(config, ranks), config.engine.offload
    if offload == "all":
        return StateBytes(0.0, 0.0, 0.0)
    return replace(state, optimizer=0.0) if offload == "optimizer" else state


def held_block(model: ModelConfig, tensor_ranks: int) -> int:
    """Parameters of a block's part on one of the tensor ranks: the matrices with the biases of `qkv` and `up` are cut;
    each rank has the LayerNorms and the biases of `out` and `down`."""
    c = model.width
    return (12 * c * c + 7 * c) // tensor_ranks + 6 * c


def held_outside(model: ModelConfig, tensor_ranks: int) -> int:
    """The same outside of the blocks: the table of tokens is cut, and the positions and the final LayerNorm are not."""
    return (model.padded_vocab_size // tensor_ranks + model.context + 2) * model.width


def held_parameters(model: ModelConfig, tensor_ranks: int) -> int:
    """Parameters of a model's part on one of the tensor ranks."""
    return held_outside(model, tensor_ranks) + model.layers * held_block(model, tensor_ranks)


def uncut_parameters(model: ModelConfig) -> int:
    """Parameters that every tensor rank has, and whose gradients the ranks sum."""
    return (model.context + 2 + 6 * model.layers) * model.width


def sharded_parameters(model: ModelConfig, ranks: int, tensor_ranks: int = 1) -> int:
    """Parameters on the first of the ranks that share a tensor rank's part of a copy under FSDP, which cuts each by its
    rows: the rank with the most."""
    c, rows = model.width, model.padded_vocab_size // tensor_ranks
    outside = -(-rows // ranks) * c + -(-model.context // ranks) * c + 2 * -(-c // ranks)
    return outside + model.layers * sharded_block(model, ranks, tensor_ranks)


def sharded_block(model: ModelConfig, ranks: int, tensor_ranks: int = 1) -> int:
    """The same of one block."""
    c, part = model.width, model.width // tensor_ranks
    rows, triple, inner = -(-c // ranks), -(-3 * part // ranks), -(-4 * part // ranks)
    # Both LayerNorms; qkv, out, up and down with their biases.
    return 4 * rows + triple * (c + 1) + rows * (part + 1) + inner * (c + 1) + rows * (4 * part + 1)


def matrices(model: ModelConfig) -> int:
    """Elements of one block's matrices, which autocast copies: biases count little."""
    return 12 * model.width**2 + 9 * model.width


def _copies(config: Config) -> float:
    """Autocast keeps its copies to the end of the forward pass; without activation checkpointing, they are saved for
    the backward pass. A compiled block that is checkpointed makes them again. The head's copy of the table is always
    there."""
    if compute_bytes(config) == _FP32:
        return 0.0
    model, compiled = config.model, compiles(config.train.compile, "cuda")
    blocks = sum(not (compiled and mode != "none") for mode, _ in kinds_of_blocks(config))
    return compute_bytes(config) * (blocks * matrices(model) + model.padded_vocab_size * model.width)
