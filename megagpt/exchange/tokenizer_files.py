"""GPT-2's tokenizer as the files that `transformers` reads, made from the rank table."""

import functools
import itertools
import json

from megagpt.data.tokenizer import END_OF_TEXT, gpt2

_END = "<|endoftext|>"


def tokenizer_files(context: int) -> dict[str, str]:
    """File name -> content: tokenizer.json, vocab.json, merges.txt, tokenizer_config.json."""
    vocab = {_spelled(token): rank for token, rank in gpt2()._mergeable_ranks.items()} | {_END: END_OF_TEXT}
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
        "bos_token": _END, "eos_token": _END, "unk_token": _END,
        "add_prefix_space": False, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    return {
        "tokenizer.json": json.dumps(fast, ensure_ascii=False),
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "\n".join(merges) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }


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
