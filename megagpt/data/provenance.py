"""The text that a folder of token shards was made of, for people."""

import json
from pathlib import Path
from typing import Any

from megagpt.data.shards import MANIFEST
from megagpt.data.stdlib_text import BUILTIN


def text_of(folder: Path) -> str | None:
    """The data set or the files that the folder was prepared from: `HuggingFaceFW/fineweb-edu, sample-10BT`, `stdlib`,
    `web.jsonl`, `a.jsonl and 3 more files`. None if nothing tells, as for shards of other programs."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        source = manifest["identity"]["source"]
        if "hub" in source:
            return ", ".join(filter(None, (source["hub"], source["subset"])))
        if BUILTIN in source:
            return BUILTIN
        files = [file[0] for file in manifest["sources"][0]["files"]]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    if not files:
        return None
    more = len(files) - 1
    return str(files[0]) + (f" and {more:,} more file{'s' if more > 1 else ''}" if more else "")
