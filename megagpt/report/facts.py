"""Sentences and tables about a run's model, data and recipe, and texts that a page can show."""

import unicodedata
from typing import Any

from megagpt.config import Config
from megagpt.exchange.importing import first_weights, origin
from megagpt.report.amounts import amount, power
from megagpt.report.record import Record, number
from megagpt.report.texts import names_of, texts_of, were_changed

# Characters that change the direction of the text around them: they could turn the rest of a line around.
_TURNS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def visible(value: Any) -> Any:
    """A text in which each character that shows nothing, or that would change how its neighbours are shown, is an
    escape such as \\x1b. Other values, and texts that are HTML already, stay."""
    if type(value) is not str or value.isprintable():
        return value
    return "".join(map(_visible, value.replace("\r\n", "\n")))


def _visible(character: str) -> str:
    hidden = unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
    if hidden or character in _TURNS:
        return character.encode("unicode_escape").decode("ascii")
    return character


def summary(record: Record) -> str:
    """Which model was trained on what, from which weights on."""
    model, seen = record.config.model, record.reached
    counts = f"{_count(model.layers, 'layer')}, width {model.width:,}, {_count(model.heads, 'head')}"
    shape = f"{counts}, context {model.context:,}"
    name = f"{model.preset}, " if model.preset else ""
    trained = f"trained on {amount(seen)} tokens of" if seen else "to be trained on"
    if were_changed(record):
        trained = f"trained on {amount(seen)} tokens, not all of them of its last data,"
    text = f"A GPT of {model.parameters:,} parameters ({name}{shape}), {trained} {'; '.join(names_of(record))}."
    whence = origin(record.folder)
    return f"{text} Its first weights were those of {first_weights(whence)}." if whence else text


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("s" if number > 1 else "")


def data_rows(record: Record) -> list[dict[str, str]]:
    """A row for each source: its text, its folder, its share of the batches, its tokens, the passes made over them,
    which are unknown if the data was changed."""
    sources = record.config.data.sources
    noted, names, same = texts_of(record), names_of(record), not were_changed(record)
    total, rows = sum(source.weight for source in sources), []
    for i, source in enumerate(sources):
        share, facts = source.weight / total, noted[i] if len(noted) == len(sources) else {}
        tokens = number(facts.get("tokens"))
        known = tokens > 0
        rows.append({
            "text": names[i] if len(names) == len(sources) else source.path, "folder": source.path,
            "share": f"{share:.1%}", "tokens": amount(tokens) if known else "unknown",
            "passes": f"{record.reached * share / tokens:.2f}" if known and same else "unknown",
        })  # fmt: skip
    return rows


def recipe_rows(config: Config) -> list[tuple[str, str]]:
    """The settings that decide the curve."""
    train, optimizer, schedule = config.train, config.optimizer, config.schedule
    batch = f"{train.batch_tokens:,} tokens"
    if train.batch_ramp_tokens:
        batch += f", from {train.batch_ramp_start:,} over the first {amount(train.batch_ramp_tokens)} tokens"
    rate = f"peak {optimizer.lr:g}, warm-up over {amount(schedule.warmup_tokens)} tokens, {schedule.shape}"
    if schedule.shape != "constant":
        rate += f" to {schedule.floor_ratio:.0%} of the peak at {amount(schedule.decay_end_tokens)} tokens"
    moments = f"betas {optimizer.beta1:g} and {optimizer.beta2:g}, epsilon {optimizer.eps:g}"
    decay = f"weight decay {optimizer.weight_decay:g}, gradient norm clipped at {optimizer.clip_norm:g}"
    precision = train.precision + (f", float8 {train.float8}" if train.float8 != "none" else "")
    return [
        ("tokens of the whole run", f"{train.tokens:,}"),
        ("global batch", batch),
        ("learning rate", rate),
        ("AdamW", f"{moments}, {decay}"),
        ("precision", f"{precision}, residual stream {train.residual}"),
        ("dropout", f"{config.model.dropout:g}"),
        ("FLOPs per token", power(config.model.flops_per_token)),
        ("seed", str(config.run.seed)),
    ]
