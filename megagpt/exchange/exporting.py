"""A model as a folder that `transformers` loads: weights, tokenizer, generation settings, model card."""

import json
import math
from pathlib import Path
from typing import Any

from megagpt.checkpoints.checkpoint import CheckpointMeta, OpenCheckpoint
from megagpt.data.tokenizer import VOCAB_SIZE
from megagpt.exchange.importing import first_weights, origin
from megagpt.exchange.named import NamedModel
from megagpt.exchange.tokenizer_files import tokenizer_files
from megagpt.incarnations import Incarnation, list_incarnations
from megagpt.models.hf_layout import end_of_text
from megagpt.models.huggingface import export
from megagpt.models.presets import ModelConfig
from megagpt.run_log import Event, newest, read


def export_model(model: NamedModel, folder: str | Path, shard_bytes: int, dtype: str) -> None:
    """Write the folder, one safetensors file in memory at a time, with weights in `dtype` ("fp32", "bf16", "fp16").
    Raises UserError if `transformers` has no such model, the weights are incomplete or corrupt, or the folder is not
    empty; NonFiniteError if a weight is not finite, or not in `dtype`."""
    config = model.config
    card = _card(model.checkpoint, config, dtype) if model.checkpoint else _card_without_run(model, dtype)
    files = {
        **tokenizer_files(config.context),
        "generation_config.json": json.dumps(_generation(config), indent=2) + "\n",
        "README.md": card,
    }
    export(folder, config, model.read, files, shard_bytes, dtype)


def _generation(model: ModelConfig) -> dict[str, Any]:
    """Settings of `generate`. Ids behind GPT-2's vocabulary are padding, which no tokenizer can decode."""
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end_of_text(model))
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
        ("trained on", f"{meta.tokens_seen:,} of {train['tokens']:,} tokens in {meta.scalars['updates']:,} updates"),
        *_sources(meta, folder),
        ("validation loss", "not measured" if loss is None else f"{float(loss):.4f} nats per token"),
        *_shape(m, dtype),
        ("batch", f"{train['batch_tokens']:,} tokens"),
        ("AdamW", f"peak learning rate {adam['lr']:g}, betas {adam['beta1']:g} and {adam['beta2']:g}, {decay}"),
        ("precision", _precision(train)),
        ("saved by", f"{meta.engine} on {meta.layout}, {meta.saved}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in meta.versions.items())),
    ]
    return _page(run["name"], summary, rows)


def _card_without_run(model: NamedModel, dtype: str) -> str:
    """Of weights that were trained elsewhere."""
    if model.hub is not None:
        name, link = model.hub.repo, f"https://huggingface.co/{model.hub.repo}"
        weights = f"`{name}` at commit `{model.hub.revision}`"
        summary = f"The weights of [{name}]({link}), rewritten by megagpt. Its own card has its licence."
    else:
        name, weights = model.folder.resolve().name, f"`{model.folder.resolve()}`"
        summary = f"The weights of another folder for `transformers`, `{name}`, rewritten by megagpt."
    return _page(name, summary, [("weights", weights), *_shape(model.config, dtype)])


def _shape(m: ModelConfig, dtype: str) -> list[tuple[str, str]]:
    shape = f"{m.layers} layers, width {m.width}, {m.heads} heads, context {m.context}, dropout {m.dropout:g}"
    return [("parameters", f"{m.parameters:,}, stored in {dtype}"), ("shape", shape)]


def _page(title: str, summary: str, rows: list[tuple[str, str]]) -> str:
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, megagpt]
---

# {title}

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


def _precision(train: dict[str, Any]) -> str:
    float8 = train.get("float8", "none")  # checkpoints from before that key lack it
    return train["precision"] + (f", linear layers in float8, {float8}" if float8 != "none" else "")


def _origin(meta: CheckpointMeta, run: Path) -> tuple[str, str]:
    """A sentence about the model, and its initial weights."""
    whence = origin(run)
    if whence or meta.engine == "import":
        start = "imported, of unknown origin"
        if whence:
            start = f"{first_weights(whence, '`')}, imported {whence['imported']}"
        since = "trained further with it" if meta.tokens_seen else "not trained since"
        return f"A GPT-2 that was imported by megagpt and {since}.", start
    if _began_here(run):
        return "A GPT-2 trained from scratch with megagpt.", "random"
    return "A GPT-2 trained with megagpt.", "not recorded"


def _began_here(run: Path) -> bool:
    """Whether the run's first incarnation is known to have begun it. An import of version 0.1 left no note, but its
    first incarnation resumed."""
    resumed = (line.get("incarnation") for line in read(run) if line["event"] == Event.RESUMED)
    return Incarnation(run, 1).start().get("from_tokens") == 0 and 1 not in resumed


def _sources(meta: CheckpointMeta, run: Path) -> list[tuple[str, str]]:
    """A row for each source that was trained on. The mixture follows the weights to within a few sequences."""
    if not meta.tokens_seen:
        return []
    sources = meta.config["data"]["sources"]
    weights, fingerprints = [source["weight"] for source in sources], meta.data or []
    if len(fingerprints) != len(sources):
        fingerprints = ["not recorded"] * len(sources)
    same = was_all_data(dict(zip(fingerprints, weights, strict=True)), meta.tokens_seen, run)
    about = "about " if len(sources) > 1 else ""
    rows = []
    for source, weight, fingerprint in zip(sources, weights, fingerprints, strict=True):
        tokens = f"{about}{meta.tokens_seen * weight / sum(weights):,.0f} tokens, " if same else ""
        text = f"`{source['path']}`: {tokens}weight {weight:g}, fingerprint `{fingerprint}`"
        rows.append(("data" if same else "last data", text))
    return rows


def was_all_data(weights: dict[str, float], tokens: int, run: Path) -> bool:
    """Whether sources of these fingerprints and weights gave all of the first tokens, by the incarnations that trained
    on them. Those of version 0.1 tell only whether another choice was allowed."""
    for incarnation in reversed(list_incarnations(run)):
        start = incarnation.start()
        if start.get("from_tokens", tokens) >= tokens:
            continue
        changed = start["data"] != weights if "data" in start else "--allow-data-change" in start.get("command", "")
        if changed:
            return False
        tokens = start["from_tokens"]
    return tokens == 0
