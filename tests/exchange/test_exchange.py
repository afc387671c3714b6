"""Runs that become folders of `transformers`, which itself reads them here, and such folders that become runs."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel

from megagpt.checkpoints.folder import list_checkpoints
from megagpt.checkpoints.loading import read_weights
from megagpt.cli import main
from megagpt.config_file import load_config
from megagpt.data.loader import Share, open_corpus
from megagpt.data.tokenizer import encode, gpt2
from megagpt.errors import UserError
from megagpt.exchange.tokenizer_files import check_tokenizer, tokenizer_files
from megagpt.models.gpt import GPT
from megagpt.models.huggingface import export
from megagpt.models.presets import ModelConfig
from tests.conftest import Refusal, Tiny, metrics, write_tiny


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with two checkpoints, to be read only."""
    folder = tmp_path_factory.mktemp("run")
    config = write_tiny(folder, corpus, checkpoint={"every_tokens": 1280, "keep_last": 9})
    assert main(["train", str(config), "optimizer.lr=1e-2"]) == 0
    return folder / "runs" / "tiny"


def our_logits(run: Path, which: int, tokens: Tensor) -> Tensor:
    checkpoint = list_checkpoints(run)[which].open()
    model = GPT(load_config(str(run / "config.yaml")).model)
    weights = read_weights(checkpoint, {name: tuple(p.shape) for name, p in model.named_parameters()})
    model.load_state_dict(weights)
    with torch.no_grad():
        return model.eval()(tokens)


@pytest.mark.slow
def test_transformers_loads_an_exported_run(run: Path, tmp_path: Path) -> None:
    tokens = torch.randint(50257, (2, 32), generator=torch.Generator().manual_seed(0))
    for which, name in ((-1, str(run)), (0, str(list_checkpoints(run)[0].path))):
        out = tmp_path / f"out{which}"
        assert main(["export", name, "--to", str(out)]) == 0
        model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, local_files_only=True)
        assert not any(report.values()), report
        assert isinstance(model, GPT2LMHeadModel)
        with torch.no_grad():
            difference = (model.eval()(tokens).logits - our_logits(run, which, tokens)).abs().max()
        assert difference <= 1e-5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out-1", local_files_only=True)
    prompt = tokenizer("Hello, I'm a language model,", return_tensors="pt")
    settings = GenerationConfig.from_pretrained(tmp_path / "out-1")
    assert (settings.bos_token_id, settings.eos_token_id) == (50256, 50256)
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=3, pad_token_id=50256)[0])
    assert text.startswith("Hello, I'm a language model,")


def test_the_card_has_the_runs_facts(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), "--to", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    validation = metrics(run, "validation")[-1]["validation_loss"]
    for fact in ("2,560 tokens in 20 updates", f"{validation:.4f} nats", "peak learning rate 0.01", "128 tokens"):
        assert fact in card
    (fingerprint,) = list_checkpoints(run)[-1].open().meta.data or []
    assert fingerprint in card
    assert all(path.stat().st_mode & 0o044 for path in (tmp_path / "out").iterdir()), "others cannot read it"


@pytest.mark.slow
def test_an_export_holds_one_file_in_memory_at_a_time(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = load_config(str(run / "config.yaml")).model
    checkpoint = list_checkpoints(run)[-1].open()
    most, asked = 20_000, []

    def read(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        asked.append({name: 4 * torch.Size(shape).numel() for name, shape in shapes.items()})
        return read_weights(checkpoint, shapes)

    export(out, config, read, shard_bytes=most)
    assert len(asked) > 4
    assert all(len(sizes) == 1 or sum(sizes.values()) <= most for sizes in asked)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    found = {}
    for path in out.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path.name)
    assert index["weight_map"] == found
    assert len(set(found.values())) == len(asked)
    assert index["metadata"]["total_size"] == 4 * config.parameters
    assert main(["export", str(run), "--to", str(tmp_path / "command"), "--shard-bytes", "2e4"]) == 0
    tokens = torch.arange(32)[None]
    for folder in (out, tmp_path / "command"):
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        with torch.no_grad():
            assert (model.eval()(tokens).logits - our_logits(run, -1, tokens)).abs().max() <= 1e-5


def test_an_interrupted_export_leaves_no_folder(run: Path, tmp_path: Path) -> None:
    config = load_config(str(run / "config.yaml")).model

    def fail(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "out", config, fail)
    assert not (tmp_path / "out").exists()
    assert main(["export", str(run), "--to", str(tmp_path / "out")]) == 0
    assert not list(tmp_path.glob("*.megagpt-export"))


def test_streamed_samples_are_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sample", str(run), "--prompt", "One", "--prompt", "Two", "--samples", "2", "--max-tokens", "5"]
    capsys.readouterr()
    assert main(arguments) == 0
    together = capsys.readouterr().out[:-1].split("\n---\n")
    assert len(set(together)) == 4
    assert main([*arguments, "--stream"]) == 0
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in together)


# --- the tokenizer ---


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, text in tokenizer_files(1024).items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@given(text=st.text(max_size=60))
def test_the_exported_tokenizer_encodes_alike(text: str, tokenizer: Any) -> None:
    assert tokenizer(text).input_ids == encode(text).tolist()


def test_the_exported_tokenizer_has_the_same_vocabulary(tokenizer: Any) -> None:
    assert len(tokenizer) == 50257
    assert tokenizer.model_max_length == 1024
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 50256
    for token in (*range(0, 50256, 97), 50255):
        assert tokenizer.decode([token]).encode("utf-8", "replace").decode() == gpt2().decode([token])
    merges = tokenizer_files(8)["merges.txt"].splitlines()
    # The first and the last of GPT-2's release.
    assert merges[1:4] == ["Ġ t", "Ġ a", "h e"]
    assert len(merges) == 1 + 50_000


# --- import ---


@pytest.fixture
def theirs(tmp_path: Path) -> GPT2LMHeadModel:
    torch.manual_seed(3)
    model = GPT2LMHeadModel(GPT2Config(n_positions=32, n_embd=32, n_layer=2, n_head=2)).eval()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="3MB")
    return model


@pytest.mark.slow
def test_a_run_starts_from_imported_weights(theirs: GPT2LMHeadModel, tiny: Tiny, tmp_path: Path) -> None:
    """Its first loss is the model's loss on the first batch, and its weights are exported unchanged."""
    config = str(tiny())
    assert main(["import", str(tmp_path / "theirs"), config, "run.name=tuned"]) == 0
    run = tmp_path / "runs" / "tuned"
    (checkpoint,) = list_checkpoints(run)
    assert checkpoint.verify() == []
    assert (checkpoint.tokens, checkpoint.open().meta.scalars["updates"]) == (0, 0)
    assert main(["export", str(run), "--to", str(tmp_path / "back")]) == 0
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", local_files_only=True)
    for (name, ours), (_, wanted) in zip(back.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(ours, wanted), name

    assert main(["train", "--resume", str(run)]) == 0
    loaded = load_config(config)
    corpus = open_corpus(loaded.data, "train", 32, 0)
    ((tokens, targets),) = corpus.batch(range(4), Share(0, 1, 4)).micro_batches
    with torch.no_grad():
        expected = F.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten())
    steps = metrics(run)
    assert steps[0]["loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert [line["step"] for line in steps] == list(range(1, 21))


def test_impossible_imports_are_refused_in_one_line(
    theirs: GPT2LMHeadModel, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = str(tmp_path / "theirs"), str(tiny())

    def refused(arguments: list[str], *parts: str) -> None:
        assert main(["import", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        for part in parts:
            assert part in error

    refused([folder, config, "model.layers=3", "model.width=64"], "model.layers is 2 there, 3", "model.width is 32")
    refused([str(tmp_path / "nowhere"), config], "nowhere")
    refused([folder, "nowhere.yaml"], "nowhere.yaml")
    with_file = next(Path(folder).glob("*.safetensors"))
    content = with_file.read_bytes()
    with_file.write_bytes(b"")
    refused([folder, config], "safetensors")
    with_file.write_bytes(content)
    assert not (tmp_path / "runs").exists()
    assert main(["import", folder, config]) == 0
    capsys.readouterr()
    refused([folder, config], "already holds a run", "run.name")


def test_the_export_of_banded_attention_is_refused(tmp_path: Path) -> None:
    config = ModelConfig(layers=2, width=32, heads=2, context=32, attention="banded", window=8)
    with pytest.raises(Exception, match="banded"):
        export(tmp_path / "out", config, lambda shapes: {})
    assert not (tmp_path / "out").exists()


def test_another_run_is_imported(run: Path, tmp_path: Path, corpus: Path) -> None:
    """Or one of its checkpoints, whose weights differ."""
    config, checkpoints = str(write_tiny(tmp_path, corpus)), list_checkpoints(run)
    for source, name, which in ((run, "newest", -1), (checkpoints[0].path, "first", 0)):
        assert main(["import", str(source), config, f"run.name={name}"]) == 0
        tuned = tmp_path / "runs" / name
        shapes = {"blocks.1.mlp.up.weight": (128, 32)}
        (ours,) = read_weights(list_checkpoints(tuned)[0].open(), shapes).values()
        (wanted,) = read_weights(checkpoints[which].open(), shapes).values()
        assert torch.equal(ours, wanted)
        assert json.loads((tuned / "imported.json").read_text())["folder"] == str(checkpoints[which].path)


def test_a_folder_is_exported_in_another_format(theirs: GPT2LMHeadModel, tmp_path: Path) -> None:
    assert main(["export", str(tmp_path / "theirs"), "--to", str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    for (name, ours), (_, wanted) in zip(back.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(ours, wanted.bfloat16()), name
    assert f"`{tmp_path / 'theirs'}`" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_a_folder_with_another_tokenizer_is_refused(
    theirs: GPT2LMHeadModel, tmp_path: Path, tokenizer: Any, refusal: Refusal
) -> None:
    """GPT-2's own is accepted in each form, and with tokens added behind it."""
    folder, vocab = tmp_path / "theirs", tokenizer_files(32)["vocab.json"]
    tokenizer.add_tokens(["<|pad|>"])
    tokenizer.save_pretrained(folder)
    command = ["sample", str(folder), "--max-tokens", "1"]
    assert main(command) == 0
    (folder / "vocab.json").write_text(vocab)
    assert main(command) == 0
    (folder / "vocab.json").write_text(json.dumps(json.loads(vocab) | {"Ġthe": 257, "Ġa": 262}))
    refusal(command, "vocab.json: another tokenizer than GPT-2's", "'Ġa' is 262 in it, 257 in GPT-2's", "2 differ")


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"spiece.model": ""}, "it has spiece.model, and no vocab.json or tokenizer.json"),
        ({"tokenizer_config.json": '{"tokenizer_class": "GPTSw3Tokenizer"}'}, "tokenizer_class is 'GPTSw3Tokenizer'"),
        ({"vocab.json": None, "tokenizer.json": '{"model": {"vocab": []}}'}, "50,256 differ in all"),
        ({"vocab.json": None, "vocab.txt": ""}, ""),
        ({"tokenizer_config.json": '{"tokenizer_class": "GPT2Tokenizer"}'}, ""),
    ],
)
def test_each_form_of_tokenizer_is_judged(tmp_path: Path, files: dict[str, str | None], problem: str) -> None:
    """By the files of a folder; None: as GPT-2 has it."""
    for name, content in files.items():
        (tmp_path / name).write_text(tokenizer_files(8)[name] if content is None else content, encoding="utf-8")
    with pytest.raises(UserError, match=problem) if problem else contextlib.nullcontext():
        check_tokenizer(tmp_path)


def test_a_name_without_a_model_says_what_was_looked_for(tmp_path: Path, refusal: Refusal) -> None:
    (tmp_path / "file").write_text("text")
    cases = {
        str(tmp_path): ["neither config.json (a transformers folder) nor checkpoints/ (a run)"],
        str(tmp_path / "file"): ["a file, not a model's folder"],
        str(tmp_path / "nowhere"): ["no such folder here", "OWNER/NAME"],
        "gpt2-xxl": ["no such folder here", "OpenAI's are gpt2, gpt2-medium, gpt2-large, gpt2-xl"],
        "gpt2@": ["OWNER/NAME@REVISION"],
        "": ["a name is empty"],
    }
    for command in (["sample"], ["export", "--to", str(tmp_path / "out")], ["import", "quickstart.yaml"]):
        for name, words in cases.items():
            refusal([command[0], name, *command[1:]], *words)
