"""Published training speeds, read as configs of this project, and what a constant for each GPU would predict.

All rows are GPTs that train without pipeline parallelism, from README files, papers and charts; those with tensor
parallelism are in a file of their own (sequence parallelism 2022: arXiv:2205.05198, table 5):

llm-foundry: mosaicml/llm-foundry, scripts/train/benchmarking/README.md, by table. A100: 200 Gbit/s a GPU, H100: 400.
DeepSpeed Azure: deepspeed.ai, post of 2022-07-26, figure 5, read from the chart (2% at 150 TFLOP/s, 7% at 40).
FSDP paper: arXiv:2304.11277, section 5.4. SC21: arXiv:2104.04473, tables 1 and 2. llm.c: comments in its run scripts.
Megatron-LM 2020: its images/tables.tex of 2020-09; micro-batch 16 presumed. Megatron-DeepSpeed: its
examples_deepspeed/rebase/README.md; micro-batch 8 and ZeRO-3 presumed.

`hardware_tflops` count the recomputed forward pass: 96 L C^2 (1 + T/6C + V/16LC) a token (arXiv:2104.04473)."""

import csv
from pathlib import Path
from typing import NamedTuple

from megagpt.config import Config, EngineConfig, TrainConfig
from megagpt.models.presets import ModelConfig
from megagpt.planning.gpus import Cluster, find_gpu

_FILE = Path(__file__).with_name("published_speeds.csv")


class Row(NamedTuple):
    """One published speed."""

    source: str
    model: str
    config: Config
    cluster: Cluster
    tokens_per_second: float
    """Of all GPUs."""


def load_rows(float8: bool = False, tensor: bool = False) -> list[Row]:
    """The rows in bf16 and fp16, those in float8, or those of several tensor ranks, to which nothing is fitted."""
    path = _FILE.with_name("published_tensor_speeds.csv") if tensor else _FILE
    with path.open(encoding="utf-8", newline="") as file:
        return [_row(line) for line in csv.DictReader(file) if (line["precision"] == "float8") == float8]


def _row(line: dict[str, str]) -> Row:
    context, gpus, batch = int(line["context"]), int(line["gpus"]), int(line["batch"])
    model = ModelConfig(int(line["layers"]), int(line["width"]), int(line["heads"]), context)
    name, _, stage = line["engine"].partition("-")
    group = int(line.get("tensor_ranks", 1))
    engine = EngineConfig(
        name=name,  # type: ignore[arg-type]
        tensor_ranks=group,
        shard_ranks=group if group > 1 else 0,  # those codes keep a copy of the weights in each group
        **({"stage": int(stage)} if stage else {}),  # type: ignore[arg-type]
        **({"reshard_after_forward": False} if line["reshard"] == "no" else {}),  # type: ignore[arg-type]
    )
    is_float8 = line["precision"] == "float8"
    train = TrainConfig(
        tokens=100 * batch * context,
        batch_tokens=batch * context,
        micro_batch=int(line["micro_batch"]),
        precision="bf16" if is_float8 else line["precision"],  # type: ignore[arg-type]
        float8="tensorwise" if is_float8 else "none",
        activation_checkpointing=line["activation_checkpointing"],
    )
    cluster = Cluster(find_gpu(line["gpu"]), gpus, network=float(line["network"]))
    if line["tokens_per_second"]:
        speed = float(line["tokens_per_second"])
    else:
        c, layers = model.width, model.layers
        flops = 96 * layers * c**2 * (1 + context / (6 * c) + model.padded_vocab_size / (16 * layers * c))
        speed = 1e12 * float(line["hardware_tflops"]) / flops
    return Row(line["source"], line["model"], Config(model=model, train=train, engine=engine), cluster, speed * gpus)


def hardware_flops(row: Row) -> float:
    """FLOPs of a token with the recomputed forward pass, attention over the whole context."""
    model = row.config.model
    again = row.config.train.activation_checkpointing == "full"
    return model.flops_per_token * (4 / 3 if again else 1)
