"""The text of Python's standard library."""

import ast
import collections
import email
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from megagpt.data import documents as batching
from megagpt.data import stdlib_text
from megagpt.data.sources import open_source
from megagpt.data.tokenizer import gpt2
from tests.data.writers import read

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("stdlib")]


@pytest.fixture(scope="module")
def stdlib() -> list[str]:
    return read(open_source("stdlib"))


def test_stdlib_is_prose(stdlib: list[str]) -> None:
    assert len(stdlib) > 300
    assert all(text.strip() for text in stdlib)
    tokens = np.concatenate([np.array(gpt2().encode_ordinary(text)) for text in stdlib])
    assert len(tokens) > 300_000
    assert np.mean(tokens == gpt2().encode_single_token(" ")) < 0.10


def test_stdlib_has_no_document_twice(stdlib: list[str]) -> None:
    """A text in both splits would make the validation loss too low."""
    twice = {text[:60] for text, count in collections.Counter(stdlib).items() if count > 1}
    assert not twice


def digest(hash_seed: int, first_file: str) -> str:
    """SHA-256 of the texts of the library in that file's folder, read by another process."""
    program = """
import hashlib, json, sys
from megagpt.data import sources, stdlib_text
stdlib_text.inspect.getsourcefile = lambda module: sys.argv[1]
texts = [text for batch in sources.open_source("stdlib").batches(None) for text in batch.documents]
print(hashlib.sha256(json.dumps(texts).encode()).hexdigest())
"""
    done = subprocess.run(
        [sys.executable, "-c", program, first_file],
        env=os.environ | {"PYTHONHASHSEED": str(hash_seed)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.strip()


def test_a_part_of_stdlib_has_a_fixed_order() -> None:
    assert digest(7, email.__file__) == digest(8, email.__file__) != digest(7, json.__file__)


@pytest.mark.slow
def test_stdlib_has_a_fixed_order(stdlib: list[str]) -> None:
    assert digest(7, ast.__file__) == hashlib.sha256(json.dumps(stdlib).encode()).hexdigest()


@pytest.mark.parametrize("characters", [5000, 10**6])
def test_stdlib_resumes_at_every_cursor(monkeypatch: pytest.MonkeyPatch, stdlib: list[str], characters: int) -> None:
    monkeypatch.setattr(batching, "_BATCH_CHARACTERS", characters)
    monkeypatch.setattr(stdlib_text, "_stdlib_documents", lambda: iter(stdlib))
    source = open_source("stdlib")
    done = 0
    for batch in source.batches(None):
        done += len(batch.documents)
        assert read(source, json.loads(json.dumps(batch.cursor))) == stdlib[done:]
    assert done == len(stdlib)


def test_stdlib_identity_names_the_python_version() -> None:
    assert sys.version in open_source("stdlib").identity.values()
