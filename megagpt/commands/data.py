"""data prepare, data verify: token shards."""

import argparse
import functools
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagpt.commands.options import Add, add_actions, count
from megagpt.errors import UserError

if TYPE_CHECKING:
    from megagpt.data.documents import Source


def register(add: Add) -> None:
    actions = add_actions(add("data", _prepare, "Make and check token shards."))
    _add_prepare(actions, "Turn text into token shards. After an interruption, run the same command again to resume.")
    _add_verify(actions, "Read a folder of token shards from end to end against its checksums.")
    # The commands' old names.
    _add_prepare(add)
    _add_verify(add)


def _add_prepare(add: Add, text: str = "") -> None:
    sub = add("prepare", _prepare, text)
    kinds = ".txt .md .jsonl .json .csv (also with .gz .zst .xz .bz2) .parquet .arrow"
    sub.add_argument("source", help=f"stdlib; a file, a folder or a glob of {kinds}; a hub data set")
    sub.add_argument("--out", required=True, help="folder of the shards")
    sub.add_argument("--text-key", help="key or column that holds the text (text)")
    sub.add_argument("--separator", metavar="TEXT", help="text between two documents of a text file")
    number = functools.partial(count, least=0)
    sub.add_argument("--skip-bad", type=number, default=0, metavar="N", help="leave out up to N rows without text (0)")
    sub.add_argument("--subset", help="configuration of a hub data set, such as sample-10BT")
    sub.add_argument("--split", help="split of a hub data set (train)")
    sub.add_argument("--revision", metavar="COMMIT", help="commit of a hub data set (the newest)")
    held_out = sub.add_mutually_exclusive_group()
    share = "share of documents held out, or of tokens if that is no whole document (0.005)"
    held_out.add_argument("--val-fraction", type=float, help=share)
    held_out.add_argument("--val", metavar="SOURCE", help="validation set of its own; training leaves its files out")
    sub.add_argument("--val-split", help="split of --val on the hub (validation)")
    revision = "commit of --val on the hub (that of SOURCE if it is the same data set, else the newest)"
    sub.add_argument("--val-revision", metavar="COMMIT", help=revision)
    sub.add_argument("--shard-tokens", type=count, default=100_000_000, help="tokens in a shard (1e8)")
    sub.add_argument("--workers", type=int, help="encoding processes (one per core)")


def _add_verify(add: Add, text: str = "") -> None:
    add("verify", _verify, text).add_argument("folder", help="folder of token shards")


def _prepare(arguments: argparse.Namespace) -> int:
    from megagpt.config_yaml import value_text
    from megagpt.console import say
    from megagpt.data.prepare import VAL_FRACTION, prepare
    from megagpt.data.progress import PrepareProgress

    if arguments.workers is not None and arguments.workers < 1:
        raise UserError("--workers must be at least 1")
    for name in ("source", "out", "val", *_HUB_OPTIONS):
        if getattr(arguments, name) == "":
            raise UserError(f"{_as_typed(name)}: is empty; give a value, or leave it out")
    source, val = _sources(arguments)
    for note in (*source.notes, *(f"--val: {note}" for note in (val.notes if val else ()))):
        say(note)
    fraction = VAL_FRACTION if arguments.val_fraction is None else arguments.val_fraction
    with PrepareProgress() as progress:
        manifest = prepare(
            source, arguments.out, val=val, val_fraction=fraction, shard_tokens=arguments.shard_tokens,
            workers=arguments.workers, skip_bad=arguments.skip_bad, report=progress.report,
        )  # fmt: skip
    for note in _notes(manifest):
        say(note)
    train, held = (manifest["splits"][split]["tokens"] for split in ("train", "val"))
    count = manifest["documents"]
    found = f"{count:,} {'document' if count == 1 else 'documents'}, {train:,} training and {held:,} validation tokens"
    sources = f"data.sources={value_text([{'path': arguments.out}])}"
    print(f"{arguments.out}: {found}; train with {shlex.quote(sources)}")
    return 0


# Options that are for a data set on the hub, and whether it is that of --val.
_HUB_OPTIONS = {"subset": False, "split": False, "revision": False, "val_split": True, "val_revision": True}


def _as_typed(name: str) -> str:
    return "SOURCE" if name == "source" else f"--{name.replace('_', '-')}"


def _sources(arguments: argparse.Namespace) -> tuple["Source", "Source | None"]:
    """The source of training, and that of --val. Raises UserError also for an option that neither takes."""
    from megagpt.data.sources import open_source, open_validation

    def given(*names: str) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(arguments, name)) is not None}

    both = given("text_key", "separator")
    val, held_out = None, frozenset[Path]()
    if arguments.val is not None:
        # Another data set has other subsets and commits.
        same = given("subset", "revision") if arguments.val == arguments.source else {}
        own = {name.removeprefix("val_"): value for name, value in given("val_split", "val_revision").items()}
        val, held_out = open_validation(arguments.val, **({"split": "validation"} | both | same | own))
    source = open_source(arguments.source, held_out=held_out, **both, **given("subset", "split", "revision"))
    if val and not held_out and val.identity == source.identity:
        way = "choose another --val" + (" or --val-split" if "hub" in val.identity else "")
        raise UserError(f"--val {arguments.val}: is the text to train on; {way}")
    for name in given(*_HUB_OPTIONS):
        of_val = _HUB_OPTIONS[name]
        if "hub" not in ((val.identity if val else {}) if of_val else source.identity):
            place = "--val" if of_val else "SOURCE"
            raise UserError(f"{_as_typed(name)}: is for a data set on the hub as {place}; leave it out")
    if given("text_key") and all("stdlib" in s.identity for s in (source, val) if s):
        raise UserError("--text-key: stdlib has no keys; leave it out")
    return source, val


def _notes(manifest: dict[str, Any]) -> Iterator[str]:
    if manifest.get("tail_tokens"):
        tokens = f"held out the last {manifest['tail_tokens']:,} tokens for validation"
        yield f"{tokens}: the documents are too few to hold out a whole one"
    skipped = manifest.get("skipped", {"rows": 0})
    if skipped["rows"]:
        rows = "; ".join(skipped["first"])
        yield f"left out {skipped['rows']:,} bad row{'s' * (skipped['rows'] > 1)}; the first: {rows}"


def _verify(arguments: argparse.Namespace) -> int:
    from megagpt.data.shards import unchecked_note, unread_note, verify

    print(f"{arguments.folder}: {verify(arguments.folder):,} tokens, all complete")
    for note in filter(None, (unchecked_note(arguments.folder), unread_note(arguments.folder))):
        print(note)
    return 0
