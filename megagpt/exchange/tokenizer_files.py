"""GPT-2's tokenizer as the files that `transformers` reads, made from the rank table; whether a folder's tokenizer is
GPT-2's."""

import fnmatch
import functools
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megagpt.data.tokenizer import END_OF_TEXT, gpt2
from megagpt.errors import UserError
from megagpt.models.hf_files import read_mapping

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
VOCABULARIES = ("vocab.json", "tokenizer.json")
"""Those of them that hold the vocabulary; one is enough."""
# Files of other tokenizers: SentencePiece's, WordPiece's, tiktoken's, fastBPE's, and Python's code of one.
_FOREIGN = ("*.model", "vocab.txt", "*.tiktoken", "bpe.codes", "tokenization_*.py")
_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
_OTHER = "another tokenizer than GPT-2's, which is the only one here"
_WAY = "choose a model with GPT-2's tokenizer"
_END = "<|endoftext|>"


def tokenizer_files(context: int) -> dict[str, str]:
    """File name -> content, for each of TOKENIZER_FILES."""
    vocab = _vocabulary()
    merges = [f"{_spelled(a)} {_spelled(b)}" for a, b in _merges()]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {
        "id": END_OF_TEXT, "content": _END, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True,
    }  # fmt: skip
    fast = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None,
        "pre_tokenizer": level, "post_processor": {**level, "trim_offsets": False}, "decoder": level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip
    settings = {
        "tokenizer_class": "GPT2Tokenizer", "model_max_length": context,
        # Prompts of a batch are padded on the left, so that all of them end where the continuations begin.
        "bos_token": _END, "eos_token": _END, "unk_token": _END, "pad_token": _END, "padding_side": "left",
        "add_prefix_space": False, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    return {
        "tokenizer.json": json.dumps(fast, ensure_ascii=False),
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "\n".join(merges) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }


def check_tokenizer(folder: Path) -> None:
    """Raises UserError if a folder has a tokenizer that is not GPT-2's: its model, whose shape may be the same, means
    other text by the same ids. Tokens that were added behind GPT-2's are no difference."""
    check_names(str(folder), [path.name for path in folder.iterdir()])
    found = [folder / name for name in VOCABULARIES if (folder / name).is_file()]
    for path in found:
        _check_vocabulary(path)
    settings = folder / "tokenizer_config.json"
    if not found and settings.is_file():
        name = read_mapping(settings).get("tokenizer_class")
        if name not in (None, *_CLASSES):
            raise UserError(f"{settings}: {_OTHER}: tokenizer_class is {name!r:.60}; {_WAY}")


def check_names(place: str, names: Iterable[str]) -> None:
    """Raises UserError if these names of a model's files have another kind of tokenizer, and no vocabulary as GPT-2's
    tokenizer has it. `place`: for the message."""
    names = sorted(names)
    foreign = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in _FOREIGN)]
    if foreign and not set(VOCABULARIES) & set(names):
        raise UserError(f"{place}: {_OTHER}: it has {foreign[0]}, and no {' or '.join(VOCABULARIES)}; {_WAY}")


def _check_vocabulary(path: Path) -> None:
    theirs: Any = read_mapping(path)
    if path.name == "tokenizer.json":
        model = theirs.get("model")
        theirs = model.get("vocab") if isinstance(model, dict) else None
    theirs = theirs if isinstance(theirs, dict) else {}
    # End-of-text may be listed apart from the vocabulary.
    ours = _vocabulary()
    differing = [token for token, rank in ours.items() if theirs.get(token, END_OF_TEXT) != rank]
    if differing:
        first = differing[0]
        ids = f"token {first!r} is {theirs.get(first, 'missing')} in it, {ours[first]} in GPT-2's"
        raise UserError(f"{path}: {_OTHER}: {ids}; {len(differing):,} differ in all; {_WAY}")


def _vocabulary() -> dict[str, int]:
    return {_spelled(token): rank for token, rank in gpt2()._mergeable_ranks.items()} | {_END: END_OF_TEXT}


@functools.cache
def _merges() -> list[tuple[bytes, bytes]]:
    """For each token of more than one byte, the pair of tokens that is merged into it, in the order of the merges. If
    only the earlier merges are applied to the token's bytes, this pair is left."""
    ranks = gpt2()._mergeable_ranks
    return [_pair(token, rank, ranks) for token, rank in sorted(ranks.items(), key=lambda i: i[1]) if len(token) > 1]


def _pair(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        _, i = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


@functools.cache
def _letters() -> dict[int, str]:
    """GPT-2's spelling of bytes (encoder.py of its release): printable bytes as they are, others above U+0100."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def _spelled(token: bytes) -> str:
    return "".join(_letters()[b] for b in token)
