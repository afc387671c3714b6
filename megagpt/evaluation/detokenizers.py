"""Undo the tokenization of corpora that were published as lists of tokens, so that a model reads text as people write
it. The words and bytes by which a perplexity is divided are those of the published text."""

import re

# Published -> as written, in this order.
_WIKITEXT = (
    (r"s '", "s'"),
    (r" @-@ ", "-"), (r" @,@ ", ","), (r" @\.@ ", "."),
    (r" : ", ": "), (r" ; ", "; "), (r" \. ", ". "), (r" ! ", "! "), (r" \? ", "? "), (r" , ", ", "),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"), (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r"= = = =", "===="), (r"= = =", "==="), (r"= =", "=="), (f" {chr(176)} ", chr(176)),
    (r" \n", "\n"), (r"\n ", "\n"), (r" N ", " 1 "), (r" 's", "'s"),
)  # fmt: skip
_PTB = (
    (r" 's", "'s"), (r"s ' ", "s' "), (r" n't", "n't"), (r" \n ", "\n"), (r"\\/", "/"),
    (r" N(?= )", " 1"), (r"\$ 1", "$1"), (r"# 1", "#1"), (r"<unk>", "?"),
)  # fmt: skip


def wikitext(text: str) -> str:
    """WikiText (Merity et al. 2016), by the rules that Megatron-LM published and others have taken from there."""
    return _replaced(text, _WIKITEXT)


def ptb(text: str) -> str:
    """The Penn Treebank as Mikolov prepared it: numbers are N, rare words <unk>, lines begin and end with a space. By
    the rules of the same origin."""
    return _replaced(text, _PTB)


def _replaced(text: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, written in rules:
        text = re.sub(pattern, written, text)
    return text
