"""data prepare, data verify: token shards."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megagpt.commands.options import Add, add_actions, count
from megagpt.errors import UserError


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
    sub.add_argument("--text-key", default="text", help="key or column that holds the text (text)")
    sub.add_argument("--separator", metavar="TEXT", help="text between two documents of a text file")
    sub.add_argument("--skip-bad", type=count, default=0, metavar="N", help="leave out up to N rows without text (0)")
    sub.add_argument("--subset", help="configuration of a hub data set, such as sample-10BT")
    sub.add_argument("--split", default="train", help="split of a hub data set (train)")
    sub.add_argument("--revision", metavar="COMMIT", help="commit of a hub data set (the newest)")
    held_out = sub.add_mutually_exclusive_group()
    share = "share of documents held out, or of tokens if that is no whole document (0.005)"
    held_out.add_argument("--val-fraction", type=float, help=share)
    held_out.add_argument("--val", metavar="SOURCE", help="validation set of its own; training leaves its files out")
    sub.add_argument("--val-split", default="validation", help="split of --val on the hub (validation)")
    sub.add_argument("--shard-tokens", type=count, default=100_000_000, help="tokens in a shard (1e8)")
    sub.add_argument("--workers", type=int, help="encoding processes (one per core)")


def _add_verify(add: Add, text: str = "") -> None:
    add("verify", _verify, text).add_argument("folder")


def _prepare(arguments: argparse.Namespace) -> int:
    from megagpt.console import say
    from megagpt.data.prepare import VAL_FRACTION, prepare
    from megagpt.data.progress import PrepareProgress
    from megagpt.data.sources import open_source, open_validation

    if arguments.workers is not None and arguments.workers < 1:
        raise UserError("--workers must be at least 1")
    options = {name: getattr(arguments, name) for name in ("text_key", "separator", "subset", "revision")}
    val, held_out = None, frozenset[Path]()
    if arguments.val:
        # Another data set has other subsets and commits.
        other = {} if arguments.val == arguments.source else {"subset": None, "revision": None}
        val, held_out = open_validation(arguments.val, split=arguments.val_split, **(options | other))
    source = open_source(arguments.source, split=arguments.split, held_out=held_out, **options)
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
    found = f"{manifest['documents']:,} documents, {train:,} training and {held:,} validation tokens"
    print(f"{arguments.out}: {found}; train with data.sources='[{{path: {arguments.out}}}]'")
    return 0


def _notes(manifest: dict[str, Any]) -> Iterator[str]:
    if manifest.get("tail_tokens"):
        yield f"no whole document was held out for validation: the last {manifest['tail_tokens']:,} tokens are"
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
