"""A run's checkpoint as a folder that `transformers` loads: model, tokenizer, generation settings, model card."""

import functools
import json
import math
from pathlib import Path
from typing import Any

from megagpt.checkpoints.checkpoint import CheckpointMeta, OpenCheckpoint
from megagpt.checkpoints.loading import read_weights, saved_config
from megagpt.data.tokenizer import END_OF_TEXT, VOCAB_SIZE
from megagpt.exchange.importing import origin
from megagpt.exchange.tokenizer_files import tokenizer_files
from megagpt.models.huggingface import export
from megagpt.models.presets import ModelConfig
from megagpt.run_log import Event, newest


def export_checkpoint(checkpoint: OpenCheckpoint, folder: str | Path, shard_bytes: int, dtype: str) -> None:
    """Write the folder, one safetensors file in memory at a time, with weights in `dtype` ("fp32", "bf16", "fp16").
    Raises UserError if `transformers` has no such model, the checkpoint is incomplete or corrupt, or the folder is not
    empty; NonFiniteError if a weight is not finite, or not in `dtype`."""
    model = saved_config(checkpoint).model
    files = {
        **tokenizer_files(model.context),
        "generation_config.json": json.dumps(_generation(model), indent=2) + "\n",
        "README.md": _card(checkpoint, model, dtype),
    }
    export(folder, model, functools.partial(read_weights, checkpoint), files, shard_bytes, dtype)


def _generation(model: ModelConfig) -> dict[str, Any]:
    """Settings of `generate`. Ids behind GPT-2's vocabulary are padding, which no tokenizer can decode."""
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), END_OF_TEXT)
    padding = list(range(VOCAB_SIZE, model.vocab_size))
    return {**ids, "do_sample": True, "top_k": 50, **({"suppress_tokens": padding} if padding else {})}


def _card(checkpoint: OpenCheckpoint, m: ModelConfig, dtype: str) -> str:
    meta, folder = checkpoint.meta, checkpoint.path.parent.parent
    run, adam, train = (meta.config[section] for section in ("run", "optimizer", "train"))
    log = newest(folder, up_to_tokens=meta.tokens_seen)
    loss = log[Event.VALIDATION]["validation_loss"] if Event.VALIDATION in log else None
    clipping = f"gradient clipping at {adam['clip_norm']:g}" if math.isfinite(adam["clip_norm"]) else "no clipping"
    decay = f"weight decay {adam['weight_decay']:g}, {clipping}"
    summary, start = _origin(meta, folder)
    rows = [
        ("run", f"`{run['name']}`, seed {run['seed']}"),
        ("initial weights", start),
        ("trained on", f"{meta.tokens_seen:,} tokens in {meta.scalars['updates']:,} updates"),
        *(("data", text) for text in _sources(meta)),
        ("validation loss", "not measured" if loss is None else f"{float(loss):.4f} nats per token"),
        ("parameters", f"{m.parameters:,}, stored in {dtype}"),
        ("shape", f"{m.layers} layers, width {m.width}, {m.heads} heads, context {m.context}, dropout {m.dropout:g}"),
        ("batch", f"{train['batch_tokens']:,} tokens"),
        ("AdamW", f"peak learning rate {adam['lr']:g}, betas {adam['beta1']:g} and {adam['beta2']:g}, {decay}"),
        ("precision", train["precision"]),
        ("saved by", f"{meta.engine} on {meta.world_size} rank(s), {meta.saved}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in meta.versions.items())),
    ]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, megagpt]
---

# {run["name"]}

{summary}

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)
```
"""


def _origin(meta: CheckpointMeta, run: Path) -> tuple[str, str]:
    """A sentence about the model, and its initial weights."""
    whence = origin(run)
    if not whence and meta.engine != "import":
        return "A GPT-2 trained from scratch with megagpt.", "random"
    start = f"`{whence['folder']}`, imported {whence['imported']}" if whence else "imported, of unknown origin"
    if not meta.tokens_seen:
        return "A GPT-2 that was imported by megagpt and not trained since.", start
    return "A GPT-2 that was imported by megagpt and trained further with it.", start


def _sources(meta: CheckpointMeta) -> list[str]:
    """A text for each source that was trained on. The mixture follows the weights to within a few sequences."""
    if not meta.tokens_seen:
        return []
    sources, fingerprints = meta.config["data"]["sources"], meta.data or []
    total = sum(source["weight"] for source in sources)
    about = "about " if len(sources) > 1 else ""
    return [
        f"`{source['path']}`: {about}{meta.tokens_seen * source['weight'] / total:,.0f} tokens, "
        f"weight {source['weight']:g}, fingerprint `{fingerprint}`"
        for source, fingerprint in zip(sources, fingerprints, strict=False)
    ]
