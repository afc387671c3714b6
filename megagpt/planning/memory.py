"""The fullest moment of a training step on a GPU, by formula: named parts, whose sum is the peak.

Candidates are the end of the forward pass, where the head computes the loss; the backward pass of a block, last or not,
as each of its weights gets its gradient; and the end of the backward pass, where the tied table does. trace.py counts
the same on the trainer's own step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from megagpt.config import Config, compiles
from megagpt.engines.zero_config import bucket_elements
from megagpt.models.chunks import CHUNK, SOFTMAX_ROWS, chunk_rows
from megagpt.planning.activations import (
    MOMENTS,
    Kind,
    backward_per_token,
    compute_bytes,
    forward_per_token,
    kept_bytes,
    kept_per_token,
    kinds_of_blocks,
)
from megagpt.planning.state import (
    StateBytes,
    gpu_state_bytes,
    held_block,
    held_outside,
    held_parameters,
    matrices,
    sharded_block,
)

Verdict = Literal["fits", "tight", "does not fit"]

# Beside the tensors, from experience, not measured here: bytes of the CUDA context, cuBLAS and NCCL; and the slack of
# the allocator, as a share of what comes and goes.
_CONTEXT_BYTES = 2.5e9
_SLACK = 0.06
# Elements that ZeRO-3 keeps gathered: DeepSpeed's `stage3_max_live_parameters`.
_LIVE = 1e9
# Elements, in squares of the width, of the weight whose gradient is computed at a moment, and of all such so far.
_SQUARES = {"exchange": (0, 0), "down": (4, 4), "up": (4, 8), "sum": (0, 8), "attention": (0, 9), "qkv": (3, 12)}


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the fullest moment of a step."""

    moment: str
    """That moment, in plain words."""
    parts: dict[str, float]
    """Bytes by name; their sum is the peak."""
    state: float
    """Bytes of weights, gradients and optimizer, which stay from step to step; they are among the parts."""
    notes: tuple[str, ...] = ()
    """Sentences about what this config has and the formula does not cover."""

    @property
    def total(self) -> float:
        """Bytes of all tensors at that moment."""
        return sum(self.parts.values())

    @property
    def reserve(self) -> float:
        """Bytes to keep free beside the tensors: CUDA's context, libraries' buffers, the allocator's slack."""
        return _CONTEXT_BYTES + _SLACK * (self.total - self.state)

    def spare(self, capacity: float) -> float:
        """Bytes of a GPU with `capacity` bytes that are left beside peak and reserve; negative if they exceed it."""
        return capacity - self.total - self.reserve

    def verdict(self, capacity: float) -> Verdict:
        """fits: with the reserve; tight: only the tensors do."""
        if self.spare(capacity) >= 0:
            return "fits"
        return "tight" if self.total <= capacity else "does not fit"


def peak_memory(config: Config, ranks: int) -> Memory:
    """The peak of a full step on a GPU. Raises UserError if the run cannot be divided among the ranks."""
    config.check_ranks(ranks)
    step = _Step(config, ranks)
    moments = list(step.moments())
    name, parts = max(moments, key=lambda moment: sum(moment[1].values()))
    shown = {part: size for part, size in parts.items() if size}
    return Memory(name, shown, step.state.between_passes, tuple(_notes(config)))


def _notes(config: Config) -> Iterator[str]:
    if config.train.float8 != "none":
        yield f"train.float8 {config.train.float8}: planned as bf16; not traced, because its products need a GPU"
    if config.engine.name == "zero":
        yield "engine.name zero: DeepSpeed's buffers are counted by its settings; its peaks were not measured"
    if config.engine.offload != "none":
        yield f"engine.offload {config.engine.offload}: what is copied to the GPU for a moment is not counted"


class _Step:
    """The moments of one step, each with its parts."""

    def __init__(self, config: Config, ranks: int) -> None:
        self.config, self.model, self.a = config, config.model, compute_bytes(config)
        self.group = config.engine.tensor_ranks
        self.parameters = held_parameters(self.model, self.group)
        """Elements of the model, of the part that a tensor rank has; so are those below."""
        self.tokens = config.micro_batch * config.model.context
        self.compiled = compiles(config.train.compile, "cuda")
        self.state: StateBytes = gpu_state_bytes(config, ranks)
        self.kinds = kinds_of_blocks(config)
        self.kept = {kind: kept_per_token(config, kind) for kind in set(self.kinds)}
        """Bytes a token that a block of each kind keeps."""
        self.name = config.engine.name
        self.whole = self.name == "zero" and config.engine.stage < 3
        """Whether every rank has all weights in the compute precision."""
        sharing = (config.sharing_ranks(ranks) if self.name == "fsdp" else ranks) // self.group
        self.arriving = 0 if sharing == 1 else 1
        """Blocks whose gathered weights are there twice for a moment, or ahead of their turn: none on one rank."""
        self.block = float(held_block(self.model, self.group))
        """Elements of a gathered block, which FSDP fills up to a multiple of the ranks."""
        if self.name == "fsdp":
            self.block = sharing * sharded_block(self.model, sharing, self.group)
        self.table = self.model.padded_vocab_size // self.group * self.model.width
        self.outside = held_outside(self.model, self.group)
        # Without them, the gradients come into being during the only backward pass.
        accumulates = config.accumulation(ranks) > 1
        self.has_gradients = accumulates or self.name == "zero" or (self.name == "ddp" and ranks > 1)

    def moments(self) -> Iterator[tuple[str, dict[str, float]]]:
        yield from self._head()
        yield (
            "the last block's forward pass",
            self._parts(
                len(self.kinds) - 1,
                {
                    "saved activations": kept_bytes(self.config),
                    "block at work": self.tokens * forward_per_token(self.config, self.kinds[-1]),
                    "copies of weights": self._copies(len(self.kinds), self.kinds),
                    "gathered weights": self._gathered(
                        1 if self.config.engine.reshard_after_forward else len(self.kinds) + self.arriving
                    ),
                },
            ),
        )
        for index in self._representatives():
            before = sum(kept * self.kinds[:index].count(other) for other, kept in self.kept.items())
            before += self.model.width / self.group if self.model.dropout else 0  # the embedding's mask
            for moment, at_work in backward_per_token(self.config, self.kinds[index]).items():
                yield from self._block(index, moment, self.tokens * before, self.tokens * at_work)
        yield self._end()

    def _parts(self, done: int, more: dict[str, float]) -> dict[str, float]:
        """Parts with the state. `done`: the block whose gradients come next, counted from the first: those of all later
        ones exist."""
        gradients = self.state.gradients
        if not self.has_gradients:
            share = (len(self.kinds) - 1 - done) * self.block / self.parameters
            gradients *= min(1.0, share)
        return {"weights": self.state.weights, "gradients": gradients, "optimizer": self.state.optimizer, **more}

    def _head(self) -> Iterator[tuple[str, dict[str, float]]]:
        """The loss, at the end of the forward pass, and the begin of its backward pass."""
        last = len(self.kinds) - 1
        c, n, v = self.model.width, self.tokens, self.model.padded_vocab_size // self.group
        rows = chunk_rows(n, CHUNK["cuda"])
        logits = float(rows * v * self.a)
        if not self.compiled:
            # The softmax of some rows, their fp32 copy in half precision, and the softmax of the rows before.
            some = min(SOFTMAX_ROWS["cuda"], rows)
            if self.group > 1:  # the scores of the last rows, and of these the softmax and two steps to its gradient
                logits += some * v * 16
            else:
                logits += some * v * ((8 if some < rows else 4) + (4 if self.a == 2 else 0))
        hidden, behind = self._hidden()
        again = self.config.engine.reshard_after_forward
        parts = {
            "saved activations": kept_bytes(self.config),
            "copies of weights": self.state.copies,
            "gathered weights": self._gathered((0 if again else len(self.kinds)) + self.arriving),
            "head": float(hidden * c * n),
            "table's gradient": 4.0 * self.table,
        }
        yield "the loss, at the end of the forward pass", self._parts(last, parts | {"logits": logits})
        if self.name != "ddp":
            copy = self.a * self.table if self.a == 2 else 0
            parts |= {"head": float(behind * c * n), "table's gradient": 4.0 * self.table + copy}
            parts["gathered weights"] = self._gathered(self.arriving if again else len(self.kinds))
            yield "the begin of the backward pass", self._parts(last, parts)
        if self.group > 1:  # input and gradient of the final LayerNorm; partial sums, twice if they are put in order
            exchanged = behind - self.a + 4 / self.group + (3 if self.config.micro_batch > 1 else 2) * self.a
            parts |= {"head": float(exchanged * c * n), "table's gradient": float(self.a * self.table)}
            yield "the begin of the backward pass, exchange of tokens", self._parts(last, parts)

    def _hidden(self) -> tuple[float, float]:
        """Bytes of the final LayerNorm for each number of a token's width, in the loss and behind it: input, output,
        cast and gradient. Compiled, it takes a bf16 stream as it is."""
        narrow = self.compiled and self.config.train.residual == "bf16"
        if self.group == 1:
            return (10, 8) if narrow else (12, 10)
        own = (2 if narrow else 4) / self.group  # its output is gathered
        return own + 2 * self.a, own + self.a

    def _representatives(self) -> list[int]:
        """Blocks among which is the fullest: the last one, and of each kind the last and the first before it."""
        last = len(self.kinds) - 1
        found = {last}
        for kind in set(self.kinds[:last]):
            same = [index for index, other in enumerate(self.kinds[:last]) if other == kind]
            found |= {same[-1], same[0]}
        return sorted(found)

    def _block(self, index: int, moment: str, saved: float, at_work: float) -> Iterator[tuple[str, dict[str, float]]]:
        a, c = self.a, self.model.width
        current, done = (count * c * c / self.group for count in _SQUARES[moment])
        what = f"gradient of {moment}" if moment in MOMENTS else "exchange of tokens"
        name = f"the backward pass of block {index + 1} of {len(self.kinds)}, {what}"
        parts = {"saved activations": saved, "block at work": at_work}
        table = self.table * (4 if self.name == "ddp" else a)
        if self.name != "ddp":
            sums = 0.0
            if self.name == "zero":
                sums = 4.0 * bucket_elements(self.config)
            elif index < len(self.kinds) - 1:
                sums = 4 * self.block
            kept = not self.config.engine.reshard_after_forward
            blocks = index + 1 if kept else min(1 + self.arriving, index + 1)  # those of later blocks are gone
            more = {"gathered weights": self._gathered(blocks), "block's gradients": a * done + sums}
            yield name, self._parts(index, parts | more | {"table's gradient": float(table)})
            return
        parts |= {"table's gradient": float(table), "copies of weights": self._copies(index, self.kinds[:index])}
        own: float = 0 if a == 4 else a * 12 * c * c  # kept, or made again
        earlier = 4.0 * (done - current) if self.compiled else 0.0
        if self.compiled:  # a copy is freed when the gradient behind it is on its way
            own -= a * done if a == 2 else 0
            used = 0.0
        else:
            used = a * current if a == 2 else 0.0
        gradients = earlier + a * current + own
        yield name, self._parts(index, parts | {"block's gradients": float(gradients)})
        if a == 2:  # then the gradient in fp32, when the product's operands are gone
            parts["block at work"] -= self.tokens * 5 * a * c
            gradients = earlier + (4 + a) * current + own - used
            yield name + ", in fp32", self._parts(index, parts | {"block's gradients": float(gradients)})

    def _end(self) -> tuple[str, dict[str, float]]:
        """The gradient of the table as a head, as an embedding, and their sum, at the end of the backward pass."""
        parts = {"gathered weights": self._gathered(0)}
        if self.name == "ddp":
            return "the end of the backward pass", self._parts(-1, parts | {"table's gradient": 12.0 * self.table})
        sums = 4 * self.block if self.name == "fsdp" else 4.0 * bucket_elements(self.config)
        sizes = (3 * self.a * self.table + sums, (4 + self.a) * self.outside - parts["gathered weights"])
        most = float(max(sizes))
        if self.group > 1:  # the embedding's gradient comes of gathered tokens, of which each rank looks up some
            exchanged = 2 * self.a * self.tokens * self.model.width
            most = max(most, exchanged + self.a * self.table + sums, exchanged / 2 + 2 * self.a * self.table + sums)
        return "the end of the backward pass", self._parts(-1, parts | {"table's gradient": most})

    def _copies(self, count: int, kinds: Sequence[Kind]) -> float:
        """Copies in the compute precision of the matrices of the first `count` blocks, under DDP: in the forward pass
        all, later those that were saved."""
        if self.name != "ddp" or self.a == 4:
            return 0.0
        forward = count == len(self.kinds) and not self.compiled
        blocks = sum(forward or mode == "none" for mode, _ in kinds)
        return float(self.a * blocks * matrices(self.model))

    def _gathered(self, blocks: int) -> float:
        """Bytes of the gathered weights: of those outside of the blocks, and of a number of blocks."""
        if self.name == "ddp" or self.whole:
            return 0.0
        if self.name == "zero":
            return self.a * min(float(self.parameters), _LIVE + self.block)
        return self.a * (self.outside + blocks * self.block)
