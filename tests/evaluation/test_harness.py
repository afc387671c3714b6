"""lm-evaluation-harness over our models: its numbers are ours, and those of its own model of `transformers`."""

import json
import math
import random
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: the extra harness")

import datasets
import lm_eval.tasks
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from megagpt.cli import main
from megagpt.data.tokenizer import gpt2
from megagpt.evaluation.examinee import opened
from megagpt.evaluation.harness_exams import hold
from megagpt.evaluation.harness_tasks import Asked, load_tasks
from megagpt.exchange.named import open_model
from megagpt.exchange.tokenizer_files import tokenizer_files
from megagpt.world import World, join
from tests.conftest import Refusal
from tests.evaluation import harness_data
from tests.evaluation.conftest import POSITIONS, WORDS, read_lines, write
from tests.processes import run_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness_data.make(tmp_path_factory.mktemp("harness"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Refuses each connection, and gives the list of the attempts."""
    tried: list[Any] = []

    def refuse(self: socket.socket, address: Any) -> None:
        tried.append(address)
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *asked, **named: refuse(socket.socket(), asked))
    return tried


def evaluate(folder: Path, out: Path, *options: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The command's files of --json and --rows."""
    files = ["--json", str(out / "out.json"), "--rows", str(out / "rows.jsonl")]
    assert main(["evaluate", str(folder), *files, *options]) == 0
    return json.loads((out / "out.json").read_text()), read_lines(out / "rows.jsonl")


def by_name(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {result["task"]: {value["name"]: value for value in result["values"]} for result in found["results"]}


# Of both sides, the tasks with the same texts, and our scores by the names of the harness's.
SAME = {
    "hellaswag": ("hellaswag:harness", {"acc": "sum", "acc_norm": "mean_char"}),
    "arc_easy": ("arc_easy:harness", {"acc": "sum", "acc_norm": "mean_char"}),
    "piqa": ("piqa:harness", {"acc": "sum", "acc_norm": "mean_char"}),
    "openbookqa": ("openbookqa:harness", {"acc": "sum", "acc_norm": "mean_char"}),
    "boolq": ("boolq:harness", {"acc": "sum"}),
    "winogrande": ("winogrande", {"acc": "sum"}),
    "lambada_openai": ("lambada", {"acc": "greedy", "perplexity": "perplexity"}),
    "wikitext": ("wikitext:harness", {"bits_per_byte": "bits_per_byte"}),
}


def test_our_exams_have_the_harnesss_numbers(
    folder: Path, data: Path, tmp_path: Path, no_network: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    named = ["--harness", "--include-path", str(data), "--tasks", ",".join(SAME)]
    theirs, their_rows = evaluate(folder, tmp_path, *named)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert no_network == []
    printed = capsys.readouterr().out
    own_names = ",".join(name for name, _ in SAME.values())
    ours, our_rows = evaluate(folder, tmp_path, "--data", str(data), "--tasks", own_names)

    for task, (own, names) in SAME.items():
        expected, found = by_name(ours)[own], by_name(theirs)[task]
        for metric, score in names.items():
            assert found[metric]["value"] == pytest.approx(expected[score]["value"], rel=1e-6), (task, metric)
            assert found[metric]["references"] == expected[score]["references"], (task, metric)
            if metric.startswith("acc"):  # of what is no mean, theirs is a bootstrap's, or there is none
                assert found[metric]["standard_error"] == pytest.approx(expected[score]["standard_error"], rel=1e-6)
        (result,) = [result for result in theirs["results"] if result["task"] == task]
        (own_result,) = [result for result in ours["results"] if result["task"] == own]
        assert result["cut_rows"] == own_result["cut_rows"]
        if task != "wikitext":
            assert result["items"] == result["of_items"] == harness_data.ROWS
            mine = [option["log_likelihood"] for row in our_rows if row["task"] == own for option in row["options"]]
            sums = [answer[0][0] for row in their_rows if row["task"] == task for answer in row["resps"]]
            assert sums == pytest.approx(mine, abs=1e-5)
    # The harness counts the emptiness before a page's first space, and after its last one, as words.
    pages = [row["page"] for row in read_lines(data / "wikitext2_pages.jsonl")]
    total = sum(row["log_likelihood"] for row in our_rows if row["task"] == "wikitext:harness")
    per_word = math.exp(-total / sum(len(re.split(r"\s+", page)) for page in pages))
    assert by_name(theirs)["wikitext"]["word_perplexity"]["value"] == pytest.approx(per_word, rel=1e-6)
    (result,) = [result for result in theirs["results"] if result["task"] == "hellaswag"]
    assert result["cut_rows"] > 1
    assert result["values"][1]["value"] == theirs["harness"]["results"]["hellaswag"]["acc_norm,none"]
    assert result["details"]["first_prompt"] == their_rows[0]["arguments"][0][0]
    assert f"acc_norm         {result['values'][1]['value']:.4f} ± " in printed
    assert "lm-evaluation-harness 0.4" in printed


def test_the_numbers_are_those_of_the_harnesss_own_model(folder: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the harness's own model needs it: pip install 'lm_eval[hf]'")
    from lm_eval.models.huggingface import HFLM

    exported = tmp_path / "exported"
    shutil.copytree(folder, exported)
    for name, content in tokenizer_files(POSITIONS).items():
        (exported / name).write_text(content)
    model = HFLM(pretrained=str(exported), batch_size=4, device="cpu", softmax_dtype="float64")
    _declare_texts(tmp_path, data)
    _declare_greedy(tmp_path, model)
    names = [*(name for name in harness_data.FILES if name != "reversed_words"), "texts", "greedy"]
    folders = [str(data), str(tmp_path)]
    options = [option for path in folders for option in ("--include-path", path)]
    manager = TaskManager(include_path=folders, include_defaults=False)
    for shots, asked in ((None, names), (2, ["hellaswag", "arc_easy", "winogrande"])):
        more = ["--shots", "2", "--limit", "9"] if shots else []
        found, rows = evaluate(folder, tmp_path, "--harness", *options, "--tasks", ",".join(asked), *more)
        expected: Any = simple_evaluate(
            model=model, tasks=asked, task_manager=manager, bootstrap_iters=0, num_fewshot=shots,
            limit=9 if shots else None,
        )  # fmt: skip
        for task in asked:
            for key, value in expected["results"][task].items():
                if isinstance(value, float):
                    exact = key.startswith(("acc", "exact_match"))
                    mine = found["harness"]["results"][task][key]
                    assert mine == (value if exact else pytest.approx(value, rel=1e-5)), (task, key)
            answers = [answer for row in rows if row["task"] == task for answer in row["resps"]]
            references = [answer for row in expected["samples"][task] for answer in row["resps"]]
            for (answer,), (reference,) in zip(answers, references, strict=True):
                if isinstance(reference, tuple):
                    assert answer == [pytest.approx(reference[0], abs=1e-4), reference[1]]
                else:
                    assert answer == (reference if isinstance(reference, str) else pytest.approx(reference, abs=1e-4))
            if task == "greedy":
                assert {answer[0][1] for answer in answers} == {True, False}
            if task == "texts":
                assert len({answer[0] for answer in answers}) > 5


def _declare_texts(folder: Path, data: Path) -> None:
    """Texts that end before "o" or "an", or after six tokens; one context is longer than the model."""
    settings = {"until": ["o", "an"], "max_gen_toks": 6, "do_sample": False}
    rows = [*read_lines(data / "lambada.jsonl"), {"text": "old cat " * 40}]
    include = f"{harness_data.tasks()}/unscramble/reversed_words.yaml"
    harness_data.declare(
        folder, "texts", include, {"test": write(folder / "texts.jsonl", rows)}, test_split="test",
        doc_to_text="{{text}}", doc_to_target="{{text}}", generation_kwargs=settings,
    )  # fmt: skip


def _declare_greedy(folder: Path, model: Any) -> None:
    """Answers of two tokens, of which every second one is what the model would write."""
    rows: list[dict[str, Any]] = []
    for word in WORDS:
        ids = gpt2().encode_ordinary(f"The {word} and the")
        with torch.no_grad():
            written = model.model.generate(torch.tensor([ids]), max_new_tokens=2, do_sample=False)[0].tolist()
        context, answer = gpt2().decode(ids), gpt2().decode(written[len(ids) :])
        if gpt2().encode_ordinary(context + answer) == written:
            rows.append({"context": context, "completion": " tree" if len(rows) % 2 else answer})
    include = f"{harness_data.tasks()}/lambada/lambada_openai.yaml"
    harness_data.declare(
        folder, "greedy", include, {"test": write(folder / "greedy.jsonl", rows)}, target_delimiter="",
        doc_to_text="{{context}}", doc_to_target="{{completion}}", doc_to_decontamination_query="{{context}}",
    )  # fmt: skip


def answers_of(world: World, folder: str, data: str, engine: str) -> tuple[int, str]:
    """The calls of the model, and on the main rank all values and answers."""
    asked = Asked(["hellaswag", "wikitext", "reversed_words"], [data])
    found, tasks, calls = open_model(folder, world), load_tasks(asked, world), 0
    with opened(found, world, engine, "fp32") as model:

        def counted(*_: object) -> None:
            nonlocal calls
            calls += 1

        model.register_forward_hook(counted)  # type: ignore[attr-defined]
        held = hold(tasks, asked, model, found.config, world, engine != "ddp", 150)  # type: ignore[arg-type]
    values = None if held is None else [[result.as_json() for result in held.results], held.rows]
    return calls, json.dumps(values, sort_keys=True)


def of_a_rank(folder: str, data: str, cache: str) -> list[tuple[int, str]]:
    datasets.config.HF_DATASETS_CACHE = cache
    with join("cpu") as world:
        return [answers_of(world, folder, data, engine) for engine in ("ddp", "fsdp")]


def test_ranks_have_the_same_answers(folder: Path, data: Path, tmp_path: Path) -> None:
    calls, one = answers_of(World.alone("cpu"), str(folder), str(data), "ddp")
    assert '"filtered_resps"' in one
    first, second = run_ranks(2, of_a_rank, str(folder), str(data), str(tmp_path))
    assert [values for _, values in first] == [one, one]
    assert [values for _, values in second] == ["null", "null"]
    assert first[0][0] < calls, "each of them does a part"
    assert first[1][0] == second[1][0], "sharded weights are gathered in step"


def test_refusals_of_the_harness_are_one_line(
    folder: Path,
    data: Path,
    tmp_path: Path,
    refusal: Refusal,
    no_network: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    include = f"{harness_data.tasks()}/piqa/piqa.yaml"
    (tmp_path / "absent.yaml").write_text(f"include: {include}\ntask: absent\n")
    harness_data.declare(tmp_path, "lost", include, {"validation": tmp_path / "lost.jsonl"})
    harness_data.declare(
        tmp_path, "long", f"{data}/reversed_words.yaml", {"test": data / "reversed_words.jsonl"},
        generation_kwargs={"until": [], "max_gen_toks": POSITIONS},
    )  # fmt: skip
    harness_data.declare(
        tmp_path, "beams", f"{data}/reversed_words.yaml", {"test": data / "reversed_words.jsonl"},
        generation_kwargs={"until": [], "num_beams": 4},
    )  # fmt: skip
    harness_data.declare(
        tmp_path, "words", f"{data}/reversed_words.yaml", {"test": data / "reversed_words.jsonl"},
        generation_kwargs={"until": [], "max_gen_toks": "many"},
    )  # fmt: skip
    command = ["evaluate", str(folder), "--harness", "--include-path", str(tmp_path), "--include-path", str(data)]
    for task, parts in {
        "absent": ["task absent: its rows are not in the Hugging Face cache", "without --download; add it"],
        "lost": ["task lost cannot be loaded", "lost.jsonl"],
    }.items():
        refusal([*command, "--tasks", task], *parts)
    for task, part in {
        "long": "long: asks for max_gen_toks: 48, and the model has 48 positions: no room is left for a prompt",
        "beams": "beams: its generation_kwargs ask for num_beams: 4",
        "words": "'many'; fix the task's yaml file",
        "piqa": "fewer rows to draw examples from than --shots asks for; lower it",
    }.items():  # behind the harness's own lines
        assert main([*command, "--tasks", task, "--shots", "13" if task == "piqa" else "0"]) == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith("megagpt: error: ")
        assert part in line
    assert no_network == []


def test_an_unknown_task_is_answered_with_the_nearest(
    folder: Path, data: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The real declarations take half a minute.
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", lambda **named: TaskManager(**named | {"include_defaults": False})
    )
    command = ["evaluate", str(folder), "--harness", "--include-path", str(data), "--tasks"]
    refusal([*command, "hellaswog"], "has no task 'hellaswog'", "did you mean hellaswag?")
    refusal([*command, "piqa,zzz*"], "has no task 'zzz*'", "--harness --tasks list")


def test_rows_among_their_own_examples_are_said(
    folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"validation": data / "piqa.jsonl"}
    harness_data.declare(tmp_path, "leaky", f"{data}/piqa.yaml", files, training_split=None, fewshot_split="validation")
    options = ["--harness", "--include-path", str(tmp_path), "--include-path", str(data), "--shots", "3"]
    _, rows = evaluate(folder, tmp_path, *options, "--tasks", "leaky,piqa")

    def leaks(task: str) -> int:
        prompts = [(row["doc"]["goal"], "\n\n" + row["arguments"][0][0]) for row in rows if row["task"] == task]
        return sum(prompt.count(f"\n\nQuestion: {goal}\n") > 1 for goal, prompt in prompts)

    assert leaks("leaky") > 0
    assert leaks("piqa") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "a row may show its own answer" in line]
    assert [line.split(":")[0] for line in said] == ["leaky"]
