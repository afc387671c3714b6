"""The prose of Python's standard library: English text that every machine has."""

import ast
import inspect
import re
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from megagpt.data.documents import Cursor, DocumentBatch, Source

BUILTIN = "stdlib"
"""The name of this source."""


def stdlib_source() -> Source:
    """English text on every machine: the standard library's docstrings, and the language reference of `help()`. Code is
    left out: a third of its tokens would be single spaces of indentation, and losses would be falsely low."""

    def batches(cursor: Cursor | None) -> Iterator[DocumentBatch]:
        # Some texts are in several modules. Spaces of indentation would be a third of all tokens; tabs are few.
        indent = re.compile("^(?: {4})+", re.MULTILINE)
        texts = dict.fromkeys(_stdlib_documents())
        documents = [indent.sub(lambda spaces: "\t" * (len(spaces[0]) // 4), text) for text in texts]
        yield DocumentBatch(documents[cursor["row"] if cursor else 0 :], {"row": len(documents)}, 1.0)

    return Source(BUILTIN, batches, {"stdlib": sys.version})


def _stdlib_documents() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    root = Path(inspect.getsourcefile(ast) or ast.__file__).parent
    skipped = {"test", "tests", "idlelib", "site-packages", "lib2to3", "turtledemo", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        if skipped & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # deliberately broken examples
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) for node in _blocks(tree) if isinstance(node, kinds)]
        if any(texts):
            yield "\n\n".join(filter(None, texts))


def _blocks(tree: ast.Module) -> Iterator[ast.AST]:
    """All nodes that may hold statements, in the order of `ast.walk`, which visits each expression, too, and takes half
    of the time."""
    found: deque[ast.AST] = deque([tree])
    while found:
        node = found.popleft()
        yield node
        for name in ("body", "handlers", "orelse", "finalbody", "cases"):
            found.extend(getattr(node, name, ()))
