"""The origin that an exported folder names; folders with a padded vocabulary or broken weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, GPT2LMHeadModel

from megagpt.checkpoints.folder import find_checkpoint, list_checkpoints
from megagpt.checkpoints.loading import saved_config
from megagpt.cli import main
from megagpt.data.prepare import prepare
from megagpt.data.sources import open_source
from megagpt.data.tokenizer import END_OF_TEXT
from megagpt.exchange import exporting
from tests.conftest import Refusal, Tiny


@pytest.fixture
def padded(tmp_path: Path) -> Path:
    """A folder whose vocabulary is padded to a multiple of 128, as other trainers' are."""
    torch.manual_seed(3)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50304, n_positions=32, n_embd=8, n_layer=1, n_head=1))
    model.save_pretrained(tmp_path / "padded")
    return tmp_path / "padded"


SHAPE = ["model.layers=1", "model.width=8", "model.heads=1"]


def card(folder: Path) -> str:
    return (folder / "README.md").read_text()


def card_of(run: Path) -> str:
    """The card that an export of a run or a checkpoint would have."""
    found = find_checkpoint(run)
    return exporting._card(found, saved_config(found).model, "fp32")


@pytest.mark.slow
def test_a_padded_vocabulary_is_trained_and_exported(padded: Path, tiny: Tiny, tmp_path: Path) -> None:
    """End-of-text keeps its id, and the padding is never generated."""
    config = str(tiny(train={"tokens": 256}, sampling={"samples": 1, "max_tokens": 3}))
    run, out = tmp_path / "runs" / "tiny", tmp_path / "out"
    assert main(["import", str(padded), config, *SHAPE, "model.vocab_size=50304"]) == 0
    assert main(["export", str(run), "--to", str(tmp_path / "imported")]) == 0
    assert main(["train", "--resume", str(run)]) == 0  # as `import` advises
    assert main(["export", str(run), "--to", str(out)]) == 0
    for name in ("config.json", "generation_config.json"):
        ids = {key: value for key, value in json.loads((out / name).read_text()).items() if key.endswith("token_id")}
        assert ids == dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), END_OF_TEXT)
    model = AutoModelForCausalLM.from_pretrained(out, local_files_only=True).eval()
    assert model.config.vocab_size == 50304
    with torch.no_grad():
        model.lm_head.weight[END_OF_TEXT + 1 :] = 50 * model.lm_head.weight[3]
    settings = GenerationConfig.from_pretrained(out)
    new = model.generate(torch.tensor([[3, 3, 3]]), settings, max_new_tokens=20, min_new_tokens=20)[0, 3:]
    assert new.max() <= END_OF_TEXT

    assert f"`{padded}`" in card(out)
    assert "imported by megagpt and trained further" in card(out)
    assert "scratch" not in card(out)
    assert "256 tokens, weight 1" in card(out)
    assert "not trained since" in card(tmp_path / "imported")
    assert "weight 1," not in card(tmp_path / "imported")
    for folder in (out, tmp_path / "imported"):
        assert "language" not in card(folder)
    origin = json.loads((run / "imported.json").read_text())
    assert origin["folder"] == str(padded)
    assert origin["config"] == json.loads((padded / "config.json").read_text())


def test_a_new_run_with_a_padded_vocabulary_is_refused(tiny: Tiny, refusal: Refusal) -> None:
    for option in ([], ["--auto-resume"]):
        refusal(["train", *option, str(tiny()), "model.vocab_size=50304"], "model.vocab_size 50304", "leave it out")


@pytest.mark.slow
def test_a_card_has_the_tokens_of_each_source(tiny: Tiny, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": f"other {i} " * 99}) for i in range(100)))
    prepare(open_source(str(tmp_path / "text.jsonl")), tmp_path / "second", val_fraction=0.1, workers=1)
    sources = [{"path": str(corpus), "weight": 3}, {"path": str(tmp_path / "second"), "weight": 1}]
    config = str(tiny(data={"sources": sources}, train={"tokens": 1280}, validation={"tokens": 0}))
    assert main(["train", config]) == 0
    assert main(["export", str(tmp_path / "runs" / "tiny"), "--to", str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    text = card(tmp_path / "out")
    assert "A GPT-2 trained from scratch with megagpt." in text
    assert "| initial weights | random |" in text
    assert f"`{corpus}`: about 960 tokens, weight 3" in text
    assert f"`{tmp_path / 'second'}`: about 320 tokens, weight 1" in text
    assert "| trained on | 1,280 of 1,280 tokens in 10 updates |" in text
    assert "stored in bf16" in text
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}

    # Other weights from here on: nobody knows how much of each source was seen.
    run, others = tmp_path / "runs" / "tiny", json.dumps([{**source, "weight": 1} for source in sources])
    longer = ["--allow-data-change", "train.tokens=2560", f"data.sources={others}"]
    assert main(["train", "--resume", str(run), *longer]) == 0
    text = card_of(run)
    assert f"| last data | `{corpus}`: weight 1, fingerprint" in text
    assert "about" not in text
    assert f"| data | `{corpus}`: about 960 tokens, weight 3" in card_of(run / "checkpoints" / f"{1280:015d}")

    # A checkpoint that left its run.
    copy = tmp_path / "copy" / "checkpoints" / f"{1280:015d}"
    shutil.copytree(run / "checkpoints" / copy.name, copy)
    text = card_of(copy)
    assert "A GPT-2 trained with megagpt." in text
    assert "| initial weights | not recorded |" in text
    assert f"| last data | `{corpus}`: weight 3, fingerprint" in text


def test_an_import_names_a_weight_that_is_not_finite(
    padded: Path, tiny: Tiny, refusal: Refusal, tmp_path: Path
) -> None:
    file, name = padded / "model.safetensors", "transformer.h.0.mlp.c_fc.bias"
    weights = load_file(file)
    save_file({**weights, name: torch.full((32,), torch.inf)}, file, metadata={"format": "pt"})
    command = ["import", str(padded), str(tiny()), *SHAPE, "model.vocab_size=50304"]
    refusal(command, name, "32 of its 32 values", file.name)
    refusal(["sample", str(padded)], name)
    assert not (tmp_path / "runs" / "tiny").exists()
    save_file({**weights, "lm_head.weight": torch.zeros(50304, 8)}, file, metadata={"format": "pt"})
    refusal(command, "lm_head.weight", "differs")
    refusal(["sample", str(padded)], "lm_head.weight", "differs")


def test_an_import_reads_pytorchs_own_format(
    padded: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(padded / "model.safetensors")
    (padded / "model.safetensors").unlink()
    torch.save(weights, padded / "pytorch_model.bin")
    assert main(["import", str(padded), str(tiny()), *SHAPE, "model.vocab_size=50304"]) == 0
    run = tmp_path / "runs" / "tiny"
    assert [(checkpoint.tokens, checkpoint.is_proven) for checkpoint in list_checkpoints(run)] == [(0, True)]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["export", str(run), "--to", "~/out"]) == 0
    assert f"from_pretrained({str(tmp_path / 'out')!r})" in capsys.readouterr().out
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(exported[name], tensor), name


def test_another_tokenizers_vocabulary_is_refused(tiny: Tiny, refusal: Refusal, tmp_path: Path) -> None:
    folder = str(tmp_path / "small")
    GPT2LMHeadModel(GPT2Config(vocab_size=131, n_positions=32, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder)
    command = ["import", folder, str(tiny()), *SHAPE, "model.vocab_size=131"]
    refusal(command, "vocabulary of 131", "50257")
