"""All exams, each a short declaration: where its rows come from, how a row becomes contexts and continuations, how it
is scored. `NAME` has GPT-3's wording (Brown et al. 2020, appendix G) if the paper has one, `NAME:harness` the wording
and the scores of lm-evaluation-harness 0.4."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megagpt.errors import UserError, did_you_mean
from megagpt.evaluation import detokenizers
from megagpt.evaluation.rows import Row, Source, is_rows
from megagpt.evaluation.task import Item, Task, TextTask, options

_HARNESS = ("sum", "mean_char")
# Commits of the data sets, so that scores of one name are those of the same rows. Data sets that are missing here are
# read at the newest commit, which a result names.
_COMMITS = {
    "Rowan/hellaswag": "218ec52e09a7e7462a5400043bb9a69a41d06b76",
    "EleutherAI/lambada_openai": "900124bf3b8235c6daf21033af9948b3f07346c4",
    "baber/piqa": "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1",
    "allenai/ai2_arc": "210d026faf9955653af8916fad021475a3f00453",
    "allenai/winogrande": "01e74176c63542e6b0bcb004dcdea22d94fb67b5",
    "allenai/openbookqa": "388097ea7776314e93a529163e0fea805b8a6454",
    "aps/super_glue": "3de24cf8022e94f4ee4b9d55a6f539891524d646",
    "Salesforce/wikitext": "b08601e04326c79dfdd32d625aee71d232d685c3",
    "EleutherAI/arithmetic": "cf5ec4512aaa47cdebf02ca032b7af870528c272",
    "EleutherAI/wikitext_document_level": "647234772b9554e208af6c826f23b99e3cac88c8",
}


def on_hub(
    repository: str, path: str, names: tuple[str, ...], train: str = "", train_names: tuple[str, ...] = ()
) -> Source:
    """A source at the data set's commit."""
    return Source(repository, path, names, train, train_names, _COMMITS.get(repository, ""))


def parquet(repository: str, folder: str, split: str, names: str, train: str = "train") -> Source:
    """The source of a data set that the hub has as parquet: folder/split-00000-of-00001.parquet. `names`: of local
    files, the shortest last; each may also end in the split's name. `train`: the split of examples, if there is one."""
    known = names.split()
    short = {"validation": ("_val", "_validation", ""), "test": ("_test", "")}[split]
    local = tuple(f"{name}{end}" for name in known for end in short)
    path = f"{folder}/{train}-*.parquet" if train else ""
    return on_hub(repository, f"{folder}/{split}-*.parquet", local, path, tuple(f"{name}_train" for name in known))


# --- completion of stories and sentences ------------------------------------------------------------------------------

_HELLASWAG = parquet("Rowan/hellaswag", "data", "validation", "hellaswag")


def _hellaswag(row: Row) -> Item:
    endings = row.texts("endings")
    return options(row.text("ctx"), endings, row.label("label", len(endings)))


def _hellaswag_cleaned(row: Row) -> Item:
    """With the activity's label in front, and without the marks of the articles' structure."""

    def clean(text: str) -> str:
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    said = f"{row.text('ctx_a')} {row.text('ctx_b').capitalize()}" if "ctx_a" in row.values else row.text("ctx")
    endings = [clean(text) for text in row.texts("endings")]
    return options(clean(f"{row.text('activity_label')}: {said}"), endings, row.label("label", len(endings)))


_PARTS = ("activity_label", "ctx_a", "ctx_b", "endings", "label")

HELLASWAG = [
    Task("hellaswag", _HELLASWAG, {("ctx", "endings", "label"): _hellaswag}, ("mean_token", "sum"),
         "context | ending", 20, published="ctx_a"),
    Task("hellaswag:gpt3", _HELLASWAG,
         {_PARTS: _hellaswag_cleaned, ("activity_label", "ctx", "endings", "label"): _hellaswag_cleaned},
         ("mean_token", "sum"), "label: context | ending", 20, published="ctx_a"),
    Task("hellaswag:harness", _HELLASWAG, {_PARTS: _hellaswag_cleaned}, ("mean_char", "sum"),
         "label: context | ending", 20),
]  # fmt: skip

_LAMBADA = on_hub("EleutherAI/lambada_openai", "data/lambada_test.jsonl", ("lambada_openai", "lambada_test", "lambada"))


def _split_word(row: Row) -> tuple[str, str]:
    if "text" in row.values:
        context, space, word = row.text("text").rstrip().rpartition(" ")
        if not space:
            raise row.problem("'text' has no last word after a space")
        return context, word
    return row.text("context"), row.text("continuation").strip()


def _last_word(row: Row) -> Item:
    context, word = _split_word(row)
    return options(context, [word], 0)


def _blank(row: Row) -> Item:
    context, word = _split_word(row)
    return options(f"Fill in blank:\n\n{context} ____. ->", [word], 0)


def _lambada(name: str, scores: tuple[str, ...]) -> Task:
    keys = (("text",), ("context", "continuation"))
    return Task(name, _LAMBADA, dict.fromkeys(keys, _last_word), scores, "text | last word", 15,
                dict.fromkeys(keys, _blank), "fill in blank: text ____. -> | last word")  # fmt: skip


LAMBADA = [
    _lambada("lambada", ("greedy", "perplexity")),
    _lambada("lambada:last_token", ("last_token", "last_token_perplexity")),
]

# --- questions --------------------------------------------------------------------------------------------------------


def _local(row: Row) -> tuple[str, list[str], int]:
    """Question without its mark, choices and gold of a row of {query, choices, gold}."""
    choices = row.texts("choices")
    return row.text("query").strip().removeprefix("Question: "), choices, row.label("gold", len(choices))


def _piqa(form: str) -> dict[tuple[str, ...], Any]:
    def hub(row: Row) -> Item:
        return options(form.format(row.text("goal")), [row.text("sol1"), row.text("sol2")], row.label("label", 2))

    def local(row: Row) -> Item:
        query, choices, gold = _local(row)
        return options(form.format(query), choices, gold)

    return {("goal", "sol1", "sol2", "label"): hub, ("query", "choices", "gold"): local}


_PIQA = on_hub(
    "baber/piqa", "piqa_validation.parquet", ("piqa_val", "piqa_validation", "piqa"), "piqa_train.parquet",
    ("piqa_train",),
)  # fmt: skip

PIQA = [
    Task("piqa", _PIQA, _piqa("{}"), ("mean_token", "sum"), "goal | solution", 50),
    Task("piqa:harness", _PIQA, _piqa("Question: {}\nAnswer:"), _HARNESS, "question, answer | solution", 50),
]


def _arc(question: str, form: str) -> dict[tuple[str, ...], Any]:
    """Rows of ARC and OpenBookQA: the key is one of the choices' labels."""

    def hub(row: Row) -> Item:
        texts, labels = row.choices()
        key = row.text("answerKey").strip()
        if key not in labels:
            raise row.problem(f"'answerKey' is {key!r}, not one of {', '.join(labels)}")
        return options(form.format(row.text(question)), texts, labels.index(key))

    def local(row: Row) -> Item:
        query, choices, gold = _local(row)
        return options(form.format(query.removesuffix("\nAnswer:")), choices, gold)

    return {(question, "choices", "answerKey"): hub, ("query", "choices", "gold"): local}


_QUESTION = "Question: {}\nAnswer:"
_ARC = {
    name: parquet("allenai/ai2_arc", folder, "test", f"{name} {folder}")
    for name, folder in (("arc_easy", "ARC-Easy"), ("arc_challenge", "ARC-Challenge"))
}
_OPENBOOKQA = parquet("allenai/openbookqa", "main", "test", "openbookqa obqa")

QUESTIONS = [
    *(Task(name, source, _arc("question", _QUESTION), ("unconditional", "sum", "mean_token"),
           "question, answer | choice", 50)
      for name, source in _ARC.items()),
    *(Task(f"{name}:harness", source, _arc("question", _QUESTION), _HARNESS, "question, answer | choice", 50)
      for name, source in _ARC.items()),
    Task("openbookqa", _OPENBOOKQA, _arc("question_stem", "{}"), ("unconditional", "sum"), "stem | choice", 100),
    Task("openbookqa:harness", _OPENBOOKQA, _arc("question_stem", "{}"), _HARNESS, "stem | choice", 100),
]  # fmt: skip


def _boolq(word: str) -> dict[tuple[str, ...], Any]:
    def read(row: Row) -> Item:
        context = f"{row.text('passage')}\n{word}: {row.text('question').removesuffix('?')}?\n"
        return options(context + ("Answer:" if word[0].isupper() else "answer:"), ["no", "yes"], _truth(row))

    return {("passage", "question", "label"): read, ("passage", "question", "answer"): read}


def _truth(row: Row) -> int:
    for key in ("label", "answer"):  # SuperGLUE's own files, and BoolQ's
        if isinstance(row.values.get(key), bool):
            return int(row.values[key])
    return row.label("label" if "label" in row.values else "answer", 2)


def _copa(row: Row) -> Item:
    words = {"cause": "because", "effect": "therefore"}
    asked = row.text("question")
    if asked not in words:
        raise row.problem(f"'question' is {asked!r:.40}, not one of {', '.join(words)}")
    context = f"{row.text('premise').strip().removesuffix('.')} {words[asked]}"
    choices = [row.text(key).strip() for key in ("choice1", "choice2")]
    return options(context, [text[:1].lower() + text[1:] for text in choices], row.label("label", 2))


_BOOLQ = parquet("aps/super_glue", "boolq", "validation", "boolq")

SUPERGLUE = [
    Task("copa", parquet("aps/super_glue", "copa", "validation", "copa"),
         {("premise", "choice1", "choice2", "question", "label"): _copa}, ("mean_token", "sum"),
         "premise because/therefore | choice", 32),
    Task("boolq", _BOOLQ, _boolq("question"), ("sum",), "passage, question, answer | yes or no", 32),
    Task("boolq:harness", _BOOLQ, _boolq("Question"), ("sum",), "passage, question, answer | yes or no", 32),
]  # fmt: skip

# --- pronouns: the options are contexts, and what follows them is scored (Trinh and Le 2018) -------------------------


def _winogrande(row: Row) -> Item:
    before, blank, after = row.text("sentence").partition("_")
    if not blank or not after.strip():
        raise row.problem("'sentence' has no blank _ with text after it")
    return Item(tuple((before + row.text(key), after) for key in ("option1", "option2")), row.label("answer", 2, 1))


_POSSESSIVE = ("my", "his", "her", "our", "their")
_CAPITALS = ("A", "An", "The", "She", "He", "It", "They", "My", "His", "Her", "Their")


def _wsc273(row: Row) -> Item:
    """As the harness has it: 's for possessive pronouns, articles in lower case inside a sentence."""
    text, pronoun, at, names = row.text("text"), row.text("pronoun"), row.number("pronoun_loc"), row.texts("options")
    if text[at : at + len(pronoun)] != pronoun or not text[at + len(pronoun) :].strip():
        raise row.problem(f"'text' has no {pronoun!r} at 'pronoun_loc' {at} with text after it")

    def put(name: str) -> str:
        first = name.split()[0] if name.strip() else ""
        if first in _CAPITALS and at > 1 and text[at - 2] != ".":
            name = name.replace(first, first.lower(), 1)
        return f"{name}'s" if pronoun.lower() in _POSSESSIVE else name

    after = text[at + len(pronoun) :]
    return Item(tuple((text[:at] + put(name), after) for name in names), row.label("label", len(names)))


PRONOUNS = [
    Task("winogrande", parquet("allenai/winogrande", "winogrande_xl", "validation", "winogrande winogrande_xl"),
         {("sentence", "option1", "option2", "answer"): _winogrande}, ("sum",),
         "sentence with an option | its rest", 50),
    Task("wsc273", parquet("lighteval/winograd_wsc", "wsc273", "test", "wsc273 winograd", train=""),
         {("text", "pronoun", "pronoun_loc", "options", "label"): _wsc273}, ("sum",),
         "sentence with an option | its rest", 7),
]  # fmt: skip

# --- answers that are written, not chosen -----------------------------------------------------------------------------

_UNSCRAMBLE = "Please unscramble the letters into a word, and write that word:"


def _written(row: Row) -> Item:
    return Item(((row.text("context"), row.text("completion")),))


def _exact(name: str, file: str, repository: str, path: str, text: str, shots: int, instruction: str = "") -> Task:
    """`file`: the name that OpenAI's release gives the rows."""
    source = on_hub(repository, path, (file, name))
    schemas: dict[tuple[str, ...], Any] = {("context", "completion"): _written}
    return Task(name, source, schemas, ("greedy",), text, shots, instruction=instruction, separator="")


ARITHMETIC = [
    _exact(f"arithmetic_{short}", file, "EleutherAI/arithmetic", f"data/{file}.jsonl", "question | number", 50)
    for short, file in {
        "1dc": "single_digit_three_ops", "2da": "two_digit_addition", "2ds": "two_digit_subtraction",
        "2dm": "two_digit_multiplication", "3da": "three_digit_addition", "3ds": "three_digit_subtraction",
        "4da": "four_digit_addition", "4ds": "four_digit_subtraction", "5da": "five_digit_addition",
        "5ds": "five_digit_subtraction",
    }.items()
]  # fmt: skip
SCRAMBLING = [
    # EleutherAI/unscramble has a loading script only.
    _exact(name, file, "lighteval/GPT3_unscramble", f"data/{file}-*.parquet", "instruction, letters | word", 100,
           _UNSCRAMBLE)
    for name, file in {
        "anagrams1": "mid_word_1_anagrams", "anagrams2": "mid_word_2_anagrams",
        "cycle_letters": "cycle_letters_in_word", "random_insertion": "random_insertion_in_word",
        "reversed_words": "reversed_words",
    }.items()
]  # fmt: skip

# --- perplexity of texts ----------------------------------------------------------------------------------------------

TEXTS = [
    TextTask("wikitext2",
             parquet("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "wikitext2 wikitext-2 wiki.test", train=""),
             detokenizers.wikitext, "WikiText's"),
    TextTask("wikitext103",
             parquet("Salesforce/wikitext", "wikitext-103-raw-v1", "test", "wikitext103 wikitext-103 wiki.test",
                     train=""), detokenizers.wikitext, "WikiText's"),
    TextTask("wikitext:harness", on_hub("EleutherAI/wikitext_document_level",
                                        "wikitext-2-raw-v1/wikitext-2-raw-v1-test.parquet",
                                        ("wikitext_document_level", "wikitext2_pages")),
             detokenizers.wikitext, "WikiText's", by_document=True, columns=("page", "text")),
    # Its branch main has a loading script only.
    TextTask("ptb", Source("ptb-text-only/ptb_text_only", "penn_treebank/test/0000.parquet",
                           ("ptb_test", "ptb.test", "ptb"), branch="refs/convert/parquet"),
             detokenizers.ptb, "PTB's", columns=("sentence", "text")),
]  # fmt: skip

_ALL: list[Task | TextTask] = [
    *HELLASWAG, *LAMBADA, *PIQA, *QUESTIONS, *SUPERGLUE, *PRONOUNS, *ARITHMETIC, *SCRAMBLING, *TEXTS,
]  # fmt: skip
TASKS = {task.name: task for task in _ALL}
GROUPS = {
    "arithmetic": [task.name for task in ARITHMETIC],
    "scrambling": [task.name for task in SCRAMBLING],
    "all": [name for name in TASKS if ":" not in name],
}
"""Names of several tasks together."""
TEXT = "text:"
"""Start of the name of a task that measures the perplexity of a user's own file, such as text:book.txt."""


def find_tasks(names: Sequence[str]) -> list[Task | TextTask]:
    """The tasks and groups of those names, each task once. Raises UserError with the nearest name of one that does not
    exist."""
    found: dict[str, Task | TextTask] = {}
    for name in names:
        if name.startswith(TEXT) and len(name) > len(TEXT):
            columns = ("text", "page", "sentence")
            file = name.removeprefix(TEXT)
            source, by_document = Source("", file, ()), is_rows(Path(file))
            found[name] = TextTask(name, source, str, "none", by_document, columns)
            continue
        if name not in TASKS and name not in GROUPS:
            near = did_you_mean(name, [*TASKS, *GROUPS, "text:FILE"])
            command = (
                f"for one of lm-evaluation-harness, `megagpt evaluate MODEL --harness --tasks {shlex.quote(name)}`"
            )
            raise UserError(f"task {name!r} does not exist ({command}): {near}")
        found |= {each: TASKS[each] for each in GROUPS.get(name, [name])}
    if not found:
        raise UserError(f"no task is named; valid: {', '.join([*TASKS, *GROUPS, 'text:FILE'])}")
    return list(found.values())
