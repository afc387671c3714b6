"""The tokenizer against GPT-2's published ids, tiktoken's own definition and an independent byte-pair encoder."""

import hashlib
import inspect
import itertools
import json
import random
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken_ext.openai_public
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megagpt.data.encoding import encode_documents
from megagpt.data.tokenizer import END_OF_TEXT, RANKS_SHA256, VOCAB_SIZE, gpt2

GOLDEN: dict[str, list[int]] = json.loads(
    Path(__file__).with_name("gpt2_golden.json").read_text(encoding="utf-8"),
)

_PARTS = (
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'LL", "’s", "'", "''", "I'll", "don't've", "it's"),
    *(" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\v", "\f", "\x1c", "\x85", "\xa0", "\u2003", "\u2028", "\u3000"),
    *("0", "1", "12", "123", "1234567890", "3.14", "1e-5", "²", "½", "٣", "Ⅷ", "一", "〇"),
    *("a", "the", "The", " the", "Hello", "GPT", "naïve", "Straße", "éa", "e\u0301", "ﬁ", "İ", "ǅ"),
    *("日本語", "中文", "한국어", "עברית", "العربية", "हिन्दी", "ไทย", "𝔘𝔫𝔦", "\U00020000"),
    *("😀", "👩‍👩‍👧‍👦", "🇩🇪", "👍🏽", "❤️", "\ufe0f", "\u200d", "\u200b", "\ufeff", "\ue000", "\uffff", "\U0010ffff"),
    *("\x00", "\x01", "\x07", "\x1b[0m", "\x7f", "\x9f", "�"),
    *(".", ",", "...", "!?", "--", "—", "(", ")", "[]", "{}", "</", "==", "#", "@"),
    *("_", "__init__", "$", "€", "\\", '"'),
    *("<|endoftext|>", "<|endof", "text|>", "<|", "|>", "def f(x):\n    return x\n", "http://a.b/c?d=1&e=2"),
)


def fuzz_corpus(count: int) -> list[str]:
    """Reproducible strings that mix the parts above with single code points from all of Unicode."""
    draw = random.Random(0)
    corpus = []
    for _ in range(count):
        parts = []
        for _ in range(draw.randint(1, 12)):
            kind = draw.random()
            if kind < 0.7:
                parts.append(draw.choice(_PARTS) * draw.choice((1, 1, 1, 2, 5)))
            elif kind < 0.85:
                parts.append("".join(chr(draw.randrange(32, 127)) for _ in range(draw.randint(1, 8))))
            else:
                point = draw.randrange(0x110000 - 0x800)
                parts.append(chr(point if point < 0xD800 else point + 0x800))
        corpus.append("".join(parts))
    return corpus


def _ranks() -> dict[bytes, int]:
    encoding = gpt2()
    return {encoding.decode_single_token_bytes(i): i for i in range(END_OF_TEXT)}


def _merge_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The pair whose merge makes this token: its parts after all earlier merges."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, END_OF_TEXT) for a, b in itertools.pairwise(parts)]
        best = min(joined)
        assert best < ranks[token], token
        i = joined.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


@pytest.fixture(scope="module")
def independent() -> Tokenizer:
    """Hugging Face's byte-level BPE, built from the rank table alone; it has its own pattern and merge loop."""
    # GPT-2's printable substitutes for bytes.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letter = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    ranks = _ranks()

    def spell(token: bytes) -> str:
        return "".join(letter[b] for b in token)

    vocab = {spell(token): rank for token, rank in ranks.items()}
    merges = [_merge_of(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[(spell(a), spell(b)) for a, b in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.mark.parametrize("text", GOLDEN, ids=lambda text: repr(text)[:20])
def test_encodings_are_gpt2s_published_ones(text: str) -> None:
    assert gpt2().encode_ordinary(text) == GOLDEN[text]
    assert gpt2().decode(GOLDEN[text]) == text


def test_the_vocabulary_is_gpt2s() -> None:
    assert gpt2().n_vocab == VOCAB_SIZE == 50257
    assert gpt2().eot_token == END_OF_TEXT == 50256
    assert gpt2().decode([END_OF_TEXT]) == "<|endoftext|>"
    assert sorted(_ranks().values()) == list(range(50256))


def test_rank_table_is_the_one_that_tiktoken_names() -> None:
    source = inspect.getsource(tiktoken_ext.openai_public.r50k_base)
    found = re.search(r'expected_hash="([0-9a-f]{64})"', source)
    assert found
    table = resources.files("megagpt.data").joinpath("gpt2/r50k_base.tiktoken").read_bytes()
    assert hashlib.sha256(table).hexdigest() == RANKS_SHA256 == found[1]


def test_splits_like_the_pattern_in_tiktoken() -> None:
    theirs = tiktoken.Encoding(
        "theirs",
        pat_str=tiktoken_ext.openai_public.r50k_pat_str,
        mergeable_ranks=_ranks(),
        special_tokens={"<|endoftext|>": END_OF_TEXT},
    )
    corpus = fuzz_corpus(5000)
    assert gpt2().encode_ordinary_batch(corpus) == theirs.encode_ordinary_batch(corpus)


@pytest.mark.slow
def test_equals_an_independent_encoder_on_a_fuzz_corpus(independent: Tokenizer) -> None:
    corpus = fuzz_corpus(5000)
    expected = [e.ids for e in independent.encode_batch(corpus, add_special_tokens=False)]
    for text, ids in zip(corpus, expected, strict=True):
        assert gpt2().encode_ordinary(text) == ids, repr(text)
        assert gpt2().decode(ids) == text


@pytest.mark.slow
@given(st.text(max_size=200))
@settings(max_examples=500, deadline=None)
def test_equals_an_independent_encoder(independent: Tokenizer, text: str) -> None:
    ids = gpt2().encode_ordinary(text)
    assert ids == independent.encode(text, add_special_tokens=False).ids
    assert gpt2().decode(ids) == text


def test_text_that_spells_the_special_token_is_ordinary() -> None:
    for text in ("<|endoftext|>", "a<|endoftext|>b", "<|endoftext|>" * 3, " <|endoftext|>\n"):
        assert END_OF_TEXT not in gpt2().encode_ordinary(text)
        tokens, lengths = encode_documents([text])
        assert tokens[:-1].tolist() == gpt2().encode_ordinary(text)
        assert tokens[-1] == END_OF_TEXT
        assert lengths.tolist() == [len(tokens)]


def test_documents_are_encoded_like_single_texts() -> None:
    corpus = [*fuzz_corpus(300), "", "last"]
    tokens, lengths = encode_documents(corpus)
    expected = [[*gpt2().encode_ordinary(text), END_OF_TEXT] for text in corpus if text]
    assert lengths.tolist() == [len(e) for e in expected]
    assert tokens.tolist() == [token for e in expected for token in e]
    assert tokens.dtype == np.dtype("<u2")
    tokens, lengths = encode_documents(["", ""])
    assert tokens.tolist() == lengths.tolist() == []


def test_half_a_surrogate_pair_does_not_stop_a_corpus() -> None:
    """JSON can spell it (`"\\ud83d"`), UTF-8 cannot; tiktoken replaces it."""
    text = json.loads('"broken \\ud83d emoji"')
    tokens, _ = encode_documents([text])
    assert tokens[:-1].tolist() == gpt2().encode_ordinary(text)
    assert gpt2().decode(tokens[:-1].tolist()) == "broken \ufffd emoji"


@pytest.mark.parametrize("text", [" " * 1_200_000 + "x", "\n" * 1_200_000, "a" * 300_000], ids=["spaces", "lines", "a"])
def test_very_long_runs_do_not_stop_a_corpus(text: str) -> None:
    tokens, _ = encode_documents([f"before{text}after"])
    assert gpt2().decode(tokens[:-1].tolist()) == f"before{text}after"


def test_the_tokenizer_needs_no_network(tmp_path: Path) -> None:
    program = """
import sys

def forbid(event, arguments):
    if event.startswith(("socket.", "urllib.", "http.")):
        raise RuntimeError(f"network used: {event}")

sys.addaudithook(forbid)
from megagpt.data.tokenizer import gpt2
print(gpt2().encode_ordinary("Hello world"))
"""
    environment = {"PATH": "", "HOME": str(tmp_path), "TIKTOKEN_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[15496, 995]"
    assert not list(tmp_path.iterdir()), "a cached file was fetched first"
