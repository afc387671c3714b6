"""A run's checkpoint as a folder that `transformers` loads: model, tokenizer, generation settings, model card."""

import functools
import json
import math
from pathlib import Path

from megagpt.checkpoints.checkpoint import OpenCheckpoint
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
    model = saved_config(checkpoint).model
    files = {
        **tokenizer_files(model.context),
        "generation_config.json": json.dumps(_GENERATION, indent=2) + "\n",
        "README.md": _card(checkpoint, model),
    }
    export(folder, model, functools.partial(read_weights, checkpoint), files, shard_bytes)


def _card(checkpoint: OpenCheckpoint, m: ModelConfig) -> str:
    meta = checkpoint.meta
    run, data, adam, train = (meta.config[section] for section in ("run", "data", "optimizer", "train"))
    log = newest(checkpoint.path.parent.parent, up_to_tokens=meta.tokens_seen)
    loss = log[Event.VALIDATION]["validation_loss"] if Event.VALIDATION in log else None
    clipping = f"gradient clipping at {adam['clip_norm']:g}" if math.isfinite(adam["clip_norm"]) else "no clipping"
    decay = f"weight decay {adam['weight_decay']:g}, {clipping}"
    rows = [
        ("run", f"`{run['name']}`, seed {run['seed']}"),
        ("trained on", f"{meta.tokens_seen:,} tokens in {meta.scalars['updates']:,} updates"),
        ("validation loss", "not measured" if loss is None else f"{float(loss):.4f} nats per token"),
        ("parameters", f"{m.parameters:,}"),
        ("shape", f"{m.layers} layers, width {m.width}, {m.heads} heads, context {m.context}, dropout {m.dropout:g}"),
        ("batch", f"{train['batch_tokens']:,} tokens"),
        ("AdamW", f"peak learning rate {adam['lr']:g}, betas {adam['beta1']:g} and {adam['beta2']:g}, {decay}"),
        ("precision", train["precision"]),
        ("saved by", f"{meta.engine} on {meta.world_size} rank(s), {meta.saved}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in meta.versions.items())),
    ]
    sources = "\n".join(
        f"| data | `{source['path']}`, weight {source['weight']:g}, fingerprint `{fingerprint}` |"
        for source, fingerprint in zip(data["sources"], meta.data or [], strict=False)
    )
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
language: en
tags: [gpt2, megagpt]
---

# {run["name"]}

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
