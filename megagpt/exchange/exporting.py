"""A run's checkpoint as a folder that `transformers` loads: model, tokenizer, generation settings, model card."""

import functools
import json
from pathlib import Path

from megagpt.checkpoints.checkpoint import CheckpointMeta, OpenCheckpoint
from megagpt.checkpoints.loading import read_weights, saved_config
from megagpt.data.tokenizer import END_OF_TEXT
from megagpt.exchange.tokenizer_files import tokenizer_files
from megagpt.models.huggingface import export
from megagpt.models.presets import ModelConfig
from megagpt.run_log import Event, newest

_GENERATION = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT, "do_sample": True, "top_k": 50}


def export_checkpoint(checkpoint: OpenCheckpoint, folder: str | Path, shard_bytes: int) -> None:
    """Write the folder, one safetensors file in memory at a time. Raises UserError if `transformers` has no such model,
    the checkpoint is incomplete or corrupt, or the folder is not empty."""
    meta = checkpoint.meta
    model = saved_config(checkpoint).model
    files = {
        **tokenizer_files(model.context),
        "generation_config.json": json.dumps(_GENERATION, indent=2) + "\n",
        "README.md": _card(checkpoint, meta, model),
    }
    export(folder, model, functools.partial(read_weights, checkpoint), files, shard_bytes)


def _card(checkpoint: OpenCheckpoint, meta: CheckpointMeta, model: ModelConfig) -> str:
    config, versions = meta.config, meta.versions
    optimizer, train = config["optimizer"], config["train"]
    validation = _validation_loss(checkpoint)
    sources = "\n".join(
        f"| data | `{source['path']}`, weight {source['weight']:g}, fingerprint `{fingerprint}` |"
        for source, fingerprint in zip(config["data"]["sources"], meta.data or [], strict=False)
    )
    rows = [
        ("run", f"`{config['run']['name']}`, seed {config['run']['seed']}"),
        ("trained on", f"{meta.tokens_seen:,} tokens in {meta.scalars['updates']:,} updates"),
        ("validation loss", f"{validation:.4f} nats per token" if validation is not None else "not measured"),
        ("parameters", f"{model.parameters:,}"),
        (
            "shape",
            f"{model.layers} layers, width {model.width}, {model.heads} heads, context {model.context}, "
            f"dropout {model.dropout:g}",
        ),
        ("batch", f"{train['batch_tokens']:,} tokens"),
        (
            "AdamW",
            f"peak learning rate {optimizer['lr']:g}, betas {optimizer['beta1']:g} and {optimizer['beta2']:g}, "
            f"weight decay {optimizer['weight_decay']:g}, gradient clipping at {optimizer['clip_norm']:g}",
        ),
        ("precision", train["precision"]),
        ("saved by", f"{meta.engine} on {meta.world_size} rank(s), {meta.saved}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
language: en
tags: [gpt2, megagpt]
---

# {config["run"]["name"]}

A GPT-2 trained from scratch with megagpt.

| | |
|---|---|
{table}
{sources}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)
```
"""


def _validation_loss(checkpoint: OpenCheckpoint) -> float | None:
    """Loss of the run's last validation up to the checkpoint, in nats per token; None if there is none."""
    log = newest(checkpoint.path.parent.parent, up_to_tokens=checkpoint.meta.tokens_seen)
    return float(log[Event.VALIDATION]["validation_loss"]) if Event.VALIDATION in log else None
