"""The parts of a step, and which part an operator or a kernel belongs to.

An operator's part follows from its region, the range of `ranges.py` that it runs in, and from its kind, which its name
tells. A backward operator has the region of the forward operator whose gradient it computes."""

import enum
import re
from typing import NamedTuple

from megagpt.profiling import ranges


class Part(enum.StrEnum):
    """The parts, in the order of the table. Each moment of a step belongs to exactly one."""

    ATTENTION = "attention"
    PRODUCTS = "blocks, matrix products"
    BLOCKS = "blocks, other operators"
    EMBEDDING = "embedding"
    HEAD = "head and loss"
    OPTIMIZER = "optimizer"
    OTHER = "other operators"
    EXCHANGE = "exchange between ranks"
    DATA = "waiting for data"
    PEERS = "waiting for peers"
    HOST = "host"


class Region(enum.Enum):
    """The place in the step that an operator comes from."""

    NONE = enum.auto()
    DATA = enum.auto()
    FORWARD = enum.auto()
    """The model's forward pass: until it is known whether before or behind the blocks."""
    EMBEDDING = enum.auto()
    BLOCK = enum.auto()
    HEAD = enum.auto()
    UPDATE = enum.auto()


class Kind(enum.Enum):
    """The kinds of work of an operator."""

    OTHER = enum.auto()
    PRODUCT = enum.auto()
    ATTENTION = enum.auto()
    EXCHANGE = enum.auto()


class Place(NamedTuple):
    """Everything that decides an operator's part."""

    region: Region = Region.NONE
    kind: Kind = Kind.OTHER

    @property
    def part(self) -> Part:
        if self.kind is Kind.EXCHANGE:
            return Part.EXCHANGE
        if self.kind is Kind.ATTENTION:
            return Part.ATTENTION
        if self.region is Region.BLOCK and self.kind is Kind.PRODUCT:
            return Part.PRODUCTS
        return _PARTS.get(self.region, Part.OTHER)


_PARTS = {
    Region.BLOCK: Part.BLOCKS,
    Region.EMBEDDING: Part.EMBEDDING,
    Region.HEAD: Part.HEAD,
    Region.UPDATE: Part.OPTIMIZER,
}
_REGIONS = {
    ranges.DATA: Region.DATA,
    ranges.MICRO_BATCH: Region.NONE,
    ranges.FORWARD: Region.FORWARD,
    ranges.BLOCK: Region.BLOCK,
    ranges.UPDATE: Region.UPDATE,
}
# Collectives by the names of their operators, their ranges on gloo's threads, and their kernels.
_EXCHANGE = re.compile("_?c10d(_functional)?::|gloo:|nccl|record_param_comms")
# Batched products are attention's, too: the layers multiply matrices of two dimensions.
_ATTENTION = re.compile(
    ".*(scaled_dot_product|ScaledDotProduct|flash_attention|efficient_attention|sdpa|fmha|flex_attention"
    "|aten::b(addb)?mm$)"
)
_PRODUCT = re.compile(
    r"aten::(_scaled_|_int_)?(add)?mm$|aten::mkldnn_linear|mkl(dnn)?::\w*linear"
    "|.*(gemm|cutlass|nvjet|xmma)|triton_(tem_fused_)?(addmm|mm)"
)
# DDP's and FSDP2's own work, such as copies into buckets, is no layer's.
_WRAPPER = ("FSDP::", "DistributedDataParallel.")


def region_of_range(name: str) -> Region | None:
    """The region that a range begins; None if it begins none."""
    if name.startswith("Optimizer.step#"):
        return Region.UPDATE
    if name.startswith(_WRAPPER):
        return Region.NONE
    return _REGIONS.get(name)


def kind_of(name: str) -> Kind:
    """The kind of an operator or a kernel, by its name."""
    if _EXCHANGE.match(name):
        return Kind.EXCHANGE
    if _ATTENTION.match(name):
        return Kind.ATTENTION
    return Kind.PRODUCT if _PRODUCT.match(name) else Kind.OTHER
