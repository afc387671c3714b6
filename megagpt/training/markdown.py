"""Texts as TensorBoard shows them, which takes every text as Markdown."""

import html
from collections.abc import Mapping


def verbatim(text: str, element: str = "p") -> str:
    """HTML that shows a text exactly as it is, with its line ends and spaces. `element`: "p" wraps long lines, "pre"
    does not. Markdown leaves HTML alone, except for lines of "```": so the HTML is one line."""
    escaped = html.escape(text, quote=False)
    for character in "\t\n\r":
        escaped = escaped.replace(character, f"&#{ord(character)};")
    return f"<{element}>{escaped}</{element}>"


def table(rows: Mapping[str, object]) -> str:
    """A table with two columns."""
    cells = (f"<tr>{verbatim(key, 'td')}{verbatim(str(value), 'td')}</tr>" for key, value in rows.items())
    return f"<table>{''.join(cells)}</table>"


def samples_as_markdown(prompt: str, texts: list[str]) -> str:
    """A prompt, and apart from it the texts that the model made of it."""
    parts = {"Prompt": prompt} | {f"Sample {i}": text for i, text in enumerate(texts, 1)}
    return "\n\n".join(f"**{title}**\n\n{verbatim(text)}" for title, text in parts.items())
