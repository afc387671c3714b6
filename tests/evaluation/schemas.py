"""A row of each schema of each exam, as the hub or a folder of local files has it."""

from typing import Any

# A row of each schema, as the hub has it, with the texts that are scored.
ROWS: dict[str, tuple[str, dict[str, Any], list[tuple[str, str]], int]] = {
    "hellaswag": (
        "hellaswag_val.jsonl",
        {"ctx": "A man sits. he", "endings": ["runs.", "is", "sits there.", "x"], "label": "2"},
        [("A man sits. he", f" {e}") for e in ("runs.", "is", "sits there.", "x")],
        2,
    ),
    "hellaswag:gpt3": (
        "Rowan/hellaswag/data/validation-00000-of-00001.parquet",
        {
            "activity_label": "Making tea",
            "ctx_a": "[header] He boils [title] Water [step] now.",
            "ctx_b": "he",
            "ctx": "-",
            "endings": ["runs.", "is", "sits [x] there.", "x"],
            "label": "1",
        },
        [("Making tea: He boils. Water now. He", f" {e}") for e in ("runs.", "is", "sits there.", "x")],
        1,
    ),
    "hellaswag:harness": (
        "hellaswag_validation.jsonl.gz",
        {
            "activity_label": "Tea",
            "ctx_a": "He boils.",
            "ctx_b": "then he",
            "endings": ["a", "b", "c", "d"],
            "label": "0",
        },
        [("Tea: He boils. Then he", f" {e}") for e in "abcd"],
        0,
    ),
    "lambada": (
        "lambada_test.jsonl",
        {"text": "She saw a cat and called the cat"},
        [("She saw a cat and called the", " cat")],
        0,
    ),
    "lambada:last_token": (
        "lambada_openai.jsonl",
        {"context": "In Zan", "continuation": "Zanzibar\n"},
        [("In Zan Zanzib", "ar")],
        0,
    ),
    "piqa": (
        "piqa.jsonl",
        {"query": "Question: To dry hair\n", "choices": ["use air", "use sand"], "gold": 1},
        [("To dry hair", " use air"), ("To dry hair", " use sand")],
        1,
    ),
    "piqa:harness": (
        "baber/piqa/piqa_validation.parquet",
        {"goal": "To dry hair", "sol1": "air", "sol2": "sand", "label": 0},
        [("Question: To dry hair\nAnswer:", " air"), ("Question: To dry hair\nAnswer:", " sand")],
        0,
    ),
    "arc_easy": (
        "ARC-Easy/test-00000-of-00001.parquet",
        {
            "id": "1",
            "question": "What is red?",
            "choices": {"text": ["grass", "blood"], "label": ["1", "2"]},
            "answerKey": "2",
        },
        [("Question: What is red?\nAnswer:", " grass"), ("Question: What is red?\nAnswer:", " blood")],
        1,
    ),
    "arc_challenge": (
        "arc_challenge.jsonl",
        {"query": "Question: Why?", "choices": ["no", "so"], "gold": 0},
        [("Question: Why?\nAnswer:", " no"), ("Question: Why?\nAnswer:", " so")],
        0,
    ),
    "openbookqa": (
        "openbookqa_test.jsonl",
        {
            "question_stem": "The sun is",
            "choices": [{"text": "hot", "label": "A"}, {"text": "wet", "label": "B"}],
            "answerKey": "A ",
        },
        [("The sun is", " hot"), ("The sun is", " wet")],
        0,
    ),
    "copa": (
        "copa_val.jsonl",
        {"premise": "It rained.", "choice1": "He ran.", "choice2": "I sat.", "question": "effect", "label": 1},
        [("It rained therefore", " he ran."), ("It rained therefore", " i sat.")],
        1,
    ),
    "boolq": (
        "boolq_val.jsonl",
        {"passage": "P -- a cat.", "question": "is p a cat", "label": True},
        [("P -- a cat.\nquestion: is p a cat?\nanswer:", f" {a}") for a in ("no", "yes")],
        1,
    ),
    "winogrande": (
        "winogrande_xl/validation-00000-of-00001.parquet",
        {"sentence": "Ann met Eve as _ was old.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        [("Ann met Eve as Ann", " was old."), ("Ann met Eve as Eve", " was old.")],
        1,
    ),
    "wsc273": (
        "wsc273.jsonl",
        {
            "text": "Ann met Eve. The cat saw her mice.",
            "pronoun": "her",
            "pronoun_loc": 25,
            "options": ["Ann", "The cat"],
            "label": 0,
        },
        [("Ann met Eve. The cat saw Ann's", " mice."), ("Ann met Eve. The cat saw the cat's", " mice.")],
        0,
    ),
    "arithmetic_2da": (
        "two_digit_addition.jsonl",
        {"context": "\n\nQ: What is 98 plus 45?\n\nA:", "completion": " 143"},
        [("\n\nQ: What is 98 plus 45?\n\nA:", " 143")],
        0,
    ),
    "reversed_words": (
        "reversed_words.jsonl.gz",
        {"context": "\nasinoc =", "completion": " casino"},
        [("Please unscramble the letters into a word, and write that word:\nasinoc =", " casino")],
        0,
    ),
}
