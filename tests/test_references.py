"""The numbers beside a run's own, typed here as literals from the papers and from the programs that printed them."""

import pytest

from megagpt.models.presets import PRESETS
from megagpt.references.exams import CONVENTIONS, chance, headline, model_label, references, tasks
from megagpt.references.losses import CORPORA, corpus_named, nearest_preset

GPT2 = ["gpt2-124m", "gpt2-355m", "gpt2-774m", "gpt2-1558m"]
GPT3 = ["gpt3-125m", "gpt3-350m", "gpt3-760m", "gpt3-xl", "gpt3-2.7b", "gpt3-6.7b", "gpt3-13b", "gpt3-175b"]


def percents(task: str, shots: int, convention: str | None = None) -> list[float]:
    """The firm scores of the GPT-3 sizes, in the paper's unit."""
    found = [r for r in references(task, convention, shots) if not r.is_gpt2 and r.firm]
    assert [r.model for r in found] == GPT3
    return [round(100 * r.value, 2) for r in found]


def test_gpt3s_firm_scores_are_the_papers() -> None:
    zero_shot = [33.7, 43.6, 51.0, 54.7, 62.8, 67.4, 70.9, 78.9]
    assert percents("hellaswag", 0) == percents("hellaswag:gpt3", 0) == zero_shot
    assert percents("hellaswag:gpt3", 20) == [33.5, 43.1, 51.3, 54.9, 62.9, 67.3, 71.3, 79.3]
    assert percents("lambada", 0) == [42.7, 54.3, 60.4, 63.6, 67.1, 70.3, 72.5, 76.2]
    assert percents("piqa", 50) == [64.3, 69.4, 72.0, 74.3, 75.4, 77.8, 79.9, 82.3]
    assert percents("arc_easy", 50) == [42.7, 51.0, 58.1, 59.1, 62.1, 65.8, 69.1, 70.1]
    perplexities = [r.value for r in references("lambada", "perplexity") if not r.is_gpt2]
    assert perplexities == [18.6, 9.09, 6.53, 5.44, 4.60, 4.00, 3.56, 3.00]


def test_gpt2s_scores_are_those_of_the_open_reproductions() -> None:
    found = [r for r in references("hellaswag") if r.is_gpt2]
    assert {r.model: r.value for r in found} == dict(zip(GPT2, [0.2945, 0.3752, 0.4320, 0.4889], strict=True))
    assert all(r.firm and r.same_text for r in found)
    (lambada,) = [r for r in references("lambada") if r.is_gpt2 and r.same_text]
    assert (lambada.label, lambada.value) == ("GPT-2 124M", 0.3256)
    assert [r.value for r in references("lambada:last_token")] == [0.4599, 0.5548, 0.6012, 0.6324]
    assert [r.value for r in references("hellaswag:harness")] == [0.3114, 0.5089]
    assert [r.value for r in references("hellaswag:harness", "sum")] == [0.2892, 0.4004]


def test_perplexities_of_texts_are_the_papers() -> None:
    """29.41 of WikiText-2 is what per-token perplexity gives: the same text gives 37.4 per word, as WikiText-103."""
    (small,) = references("wikitext2")
    assert (small.value, headline("wikitext2")) == (29.41, "per_token_perplexity")
    assert [r.value for r in references("wikitext103", "per_word_perplexity")] == [37.50]
    assert references("wikitext103") == []  # a run's log has the perplexity per token


def test_a_number_with_one_source_is_marked_as_unsure() -> None:
    assert all(not r.firm for r in references("winogrande"))
    assert all(not r.firm for r in references("piqa", shots=0))


def test_a_number_whose_sources_disagree_is_left_out() -> None:
    """ARC-easy of 13B, PIQA of 175B (81.0 and 80.5 in one paper), ARC-challenge few-shot of three sizes."""
    assert "gpt3-13b" not in [r.model for r in references("arc_easy", shots=0)]
    assert "gpt3-175b" not in [r.model for r in references("piqa", shots=0)]
    few = [r.model for r in references("arc_challenge", shots=50)]
    assert few == ["gpt3-350m", "gpt3-760m", "gpt3-xl", "gpt3-2.7b", "gpt3-175b"]


@pytest.mark.parametrize("task", tasks())
def test_each_reference_tells_its_convention_and_source(task: str) -> None:
    found = [r for convention in CONVENTIONS for r in references(task, convention)]
    assert found
    assert headline(task) in {None, *CONVENTIONS}
    for reference in found:
        assert reference.convention
        assert reference.source
        assert reference.model in PRESETS
        assert reference.label.startswith(model_label(reference.model))
        assert 0 < reference.value < 1 or "perplexity" in reference.convention or reference.value == 1.0
    assert references(task) == sorted(references(task), key=lambda r: not r.is_gpt2)


def test_an_unknown_task_has_no_references() -> None:
    assert references("mmlu") == []
    assert references("hellaswag", "no_such_score") == []
    assert headline("mmlu") is None
    assert (chance("hellaswag:harness"), chance("lambada")) == (0.25, None)


def test_losses_are_those_of_openais_checkpoints() -> None:
    edu, classic = CORPORA["fineweb-edu"], CORPORA["fineweb"]
    assert {r.model: r.value for r in edu.losses} == {"gpt2-124m": 3.2924}
    assert [r.value for r in classic.losses] == [3.4250, 3.0831, 3.0006, 2.8313]
    assert [r.model for r in classic.losses] == GPT2


def test_llm_cs_curve_is_that_of_its_log() -> None:
    """Lines of the log that modded-nanogpt keeps: `s:0 tel:11.0092`, and so on, to step 19,560."""
    curve = CORPORA["fineweb"].curve
    assert curve is not None
    points = dict(zip(curve.tokens, curve.losses, strict=True))
    printed = {0: 11.0092, 2000: 3.8585, 4000: 3.6176, 8000: 3.4431, 12000: 3.3509, 16000: 3.2882, 19000: 3.2724}
    for step, loss in printed.items():
        assert points[step * 524_288] == loss
    assert max(points) == 19_560 * 524_288 == 10_255_073_280
    assert points[max(points)] == 3.2722
    assert len(points) == 80
    assert list(curve.losses) == sorted(curve.losses, reverse=True)
    assert 1e-6 * curve.tokens_per_second == pytest.approx(3.745, abs=1e-3)  # 140 ms a step


@pytest.mark.parametrize(
    ("names", "key"),
    [
        (["HuggingFaceFW/fineweb-edu, sample-10BT"], "fineweb-edu"),
        (["data/fineweb_edu_10bt"], "fineweb-edu"),
        (["/data/edu_fineweb10B"], "fineweb-edu"),
        (["HuggingFaceFW/fineweb, sample-10BT"], "fineweb"),
        (["dev/data/fineweb10B"], "fineweb"),
        (["data/fineweb_10bt", "HuggingFaceFW/fineweb"], "fineweb"),
        (["data/fineweb_20b"], "fineweb"),
        (["data/fineweb2b"], "fineweb"),
        (["data/fineweb_edu_2b"], "fineweb-edu"),
        (["HuggingFaceFW/fineweb-2, deu_Latn"], None),
        (["data/fineweb-2.5bt"], "fineweb"),
        (["data/fineweb2"], None),
        (["data/fineweb2hq"], None),
        (["data/fineweb_2_deu"], None),
        (["data/fineweb_10bt", "data/books"], None),
        (["data/fineweb_10bt", "data/fineweb_edu_10bt"], None),
        (["stdlib"], None),
        ([], None),
    ],
)
def test_a_corpus_is_known_by_its_names(names: list[str], key: str | None) -> None:
    found = corpus_named(names)
    assert (found.key if found else None) == key


def test_the_nearest_size_is_by_ratio() -> None:
    assert nearest_preset(10_000_000, "gpt2") == "gpt2-124m"
    assert nearest_preset(210_000_000, "gpt2") == "gpt2-124m"
    assert nearest_preset(211_000_000, "gpt2") == "gpt2-355m"
    assert nearest_preset(10**12, "gpt3") == "gpt3-175b"
