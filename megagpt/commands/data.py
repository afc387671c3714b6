"""data prepare, data verify: token shards."""

import argparse
import shlex

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
    sub.add_argument("source", help="stdlib; a file, folder or glob of .txt .jsonl(.gz/.zst) .parquet; a hub data set")
    sub.add_argument("--out", required=True, help="folder of the shards")
    sub.add_argument("--text-key", default="text", help="key or column that holds the text (text)")
    sub.add_argument("--subset", help="configuration of a hub data set, such as sample-10BT")
    sub.add_argument("--split", default="train", help="split of a hub data set (train)")
    sub.add_argument("--val-fraction", type=float, default=0.005, help="share of documents held out (0.005)")
    sub.add_argument("--shard-tokens", type=count, default=100_000_000, help="tokens in a shard (1e8)")
    sub.add_argument("--workers", type=int, help="encoding processes (one per core)")


def _add_verify(add: Add, text: str = "") -> None:
    add("verify", _verify, text).add_argument("folder", help="folder of token shards")


def _prepare(arguments: argparse.Namespace) -> int:
    from megagpt.config_yaml import value_text
    from megagpt.data.prepare import prepare
    from megagpt.data.progress import PrepareProgress
    from megagpt.data.sources import open_source

    if arguments.workers is not None and arguments.workers < 1:
        raise UserError("--workers must be at least 1")
    source = open_source(arguments.source, arguments.text_key, arguments.subset, arguments.split)
    with PrepareProgress() as progress:
        manifest = prepare(
            source, arguments.out, val_fraction=arguments.val_fraction, shard_tokens=arguments.shard_tokens,
            workers=arguments.workers, report=progress.report,
        )  # fmt: skip
    train, val = (manifest["splits"][split]["tokens"] for split in ("train", "val"))
    found = f"{manifest['documents']:,} documents, {train:,} training and {val:,} validation tokens"
    sources = f"data.sources={value_text([{'path': arguments.out}])}"
    print(f"{arguments.out}: {found}; train with {shlex.quote(sources)}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from megagpt.data.shards import unchecked_note, unread_note, verify

    print(f"{arguments.folder}: {verify(arguments.folder):,} tokens, all complete")
    for note in filter(None, (unchecked_note(arguments.folder), unread_note(arguments.folder))):
        print(note)
    return 0
