"""Weights to and from the folders of `transformers`, which itself reads and writes them here."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from megagpt.models.huggingface import is_pretrained, load_pretrained, read_config
from megagpt.models.presets import ModelConfig
from tests.models.folders import (
    CONFIG,
    assert_same_logits,
    edit_config,
    edit_tensors,
    export_model,
    our_model,
    refusal,
    their_model,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    their_model().save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def test_a_folder_is_loaded(folder: Path) -> None:
    ours = load_pretrained(folder)
    assert ours.config == CONFIG
    assert is_pretrained(folder)
    assert {(p.dtype, p.device.type) for p in ours.parameters()} == {(torch.float32, "cpu")}
    assert ours.token_embedding.weight.shape == (256, 32)
    assert not ours.token_embedding.weight[131:].any()
    assert_same_logits(ours, their_model())


def test_a_sharded_folder_is_loaded(tmp_path: Path) -> None:
    theirs = their_model()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_logits(load_pretrained(tmp_path), theirs)


def test_names_without_a_prefix_are_loaded(tmp_path: Path) -> None:
    """As in GPT-2's own release, whose names lack `transformer.`."""
    theirs = their_model()
    theirs.transformer.save_pretrained(tmp_path)
    assert "wte.weight" in load_file(tmp_path / "model.safetensors")
    assert_same_logits(load_pretrained(tmp_path), theirs)


def test_half_precision_is_loaded_as_fp32(tmp_path: Path) -> None:
    theirs = their_model().to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert_same_logits(ours, theirs.float())


def test_an_explicit_inner_width_of_4_widths_is_accepted(tmp_path: Path) -> None:
    theirs = their_model(n_inner=128)
    theirs.save_pretrained(tmp_path)
    assert_same_logits(load_pretrained(tmp_path), theirs)


def test_transformers_loads_an_exported_model(tmp_path: Path) -> None:
    ours = our_model()
    export_model(ours, tmp_path / "new" / "folder")
    theirs, report = GPT2LMHeadModel.from_pretrained(
        tmp_path / "new" / "folder", output_loading_info=True, attn_implementation="eager", local_files_only=True
    )
    assert not any(report.values()), report
    assert {p.dtype for p in theirs.parameters()} == {torch.float32}
    assert theirs.transformer.wte.weight.shape == (131, 32)
    assert theirs.lm_head.weight is theirs.transformer.wte.weight
    assert_same_logits(ours, theirs)


def test_an_export_describes_the_model(tmp_path: Path) -> None:
    config = ModelConfig(layers=2, width=32, heads=4, context=16, vocab_size=131, dropout=0.15)
    export_model(our_model(config), tmp_path)
    theirs = GPT2Config.from_pretrained(tmp_path)
    assert (theirs.n_layer, theirs.n_embd, theirs.n_head, theirs.n_positions) == (2, 32, 4, 16)
    assert theirs.vocab_size == 131
    assert (theirs.embd_pdrop, theirs.attn_pdrop, theirs.resid_pdrop) == (0.15, 0.15, 0.15)
    assert theirs.activation_function == "gelu_new"
    assert theirs.layer_norm_epsilon == 1e-5
    assert theirs.tie_word_embeddings is True
    assert theirs.architectures == ["GPT2LMHeadModel"]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (130, 130)
    assert is_pretrained(tmp_path)


def test_an_export_leaves_the_model_unchanged(tmp_path: Path) -> None:
    ours = our_model().train()
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    export_model(ours, tmp_path / "out")
    assert ours.training
    for name, parameter in ours.named_parameters():
        assert parameter.requires_grad
        assert torch.equal(parameter, before[name])


def test_a_round_trip_of_a_model_is_bit_exact(tmp_path: Path) -> None:
    ours = our_model()
    export_model(ours, tmp_path)
    back = dict(load_pretrained(tmp_path).named_parameters())
    for name, parameter in ours.named_parameters():
        live = slice(131) if name == "token_embedding.weight" else slice(None)
        assert torch.equal(back[name][live], parameter[live]), name


def test_a_round_trip_of_a_folder_is_bit_exact(folder: Path, tmp_path: Path) -> None:
    export_model(load_pretrained(folder), tmp_path / "back")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "back"))
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name], tensor), name


def test_a_missing_tensor_is_named(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("transformer.h.1.mlp.c_fc.bias"))
    message = refusal(lambda: load_pretrained(folder))
    assert "h.1.mlp.c_fc.bias" in message
    assert "missing" in message
    assert str(folder) in message


@pytest.mark.parametrize(
    "name", ["transformer.h.0.attn.c_attn.weight", "transformer.wte.weight", "transformer.wpe.weight"]
)
def test_a_tensor_of_another_shape_is_named(folder: Path, name: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    message = refusal(lambda: load_pretrained(folder))
    assert name in message
    assert "shape" in message
    assert str(folder) in message


def test_an_untransposed_weight_is_refused(folder: Path) -> None:
    name = "transformer.h.0.mlp.c_fc.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    assert name in refusal(lambda: load_pretrained(folder))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_function", "relu"),
        ("activation_function", "gelu"),
        ("model_type", "gpt_neo"),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("n_inner", 64),
    ],
)
def test_a_model_with_other_arithmetic_is_refused(folder: Path, key: str, value: object) -> None:
    edit_config(folder, **{key: value})
    message = refusal(lambda: load_pretrained(folder))
    assert key in message
    assert repr(value) in message
    assert "config.json" in message


@pytest.mark.parametrize("key", ["n_layer", "n_embd", "n_head", "vocab_size"])
def test_a_missing_key_is_named(folder: Path, key: str) -> None:
    edit_config(folder, **{key: ...})
    assert key in refusal(lambda: read_config(folder))


@pytest.mark.parametrize(("key", "value", "named"), [("n_layer", 0, "layers"), ("n_head", 5, "heads 5")])
def test_an_impossible_shape_is_explained(folder: Path, key: str, value: int, named: str) -> None:
    edit_config(folder, **{key: value})
    message = refusal(lambda: read_config(folder))
    assert "config.json" in message
    assert named in message


def test_a_missing_context_is_named(folder: Path) -> None:
    edit_config(folder, n_positions=..., n_ctx=...)
    message = refusal(lambda: read_config(folder))
    assert "n_positions" in message or "context" in message


@pytest.mark.parametrize("text", ["{", "", "[]", "3"])
def test_a_config_that_is_not_a_mapping_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json" in refusal(lambda: load_pretrained(folder))


def test_a_folder_without_a_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert not is_pretrained(folder)
    assert "config.json" in refusal(lambda: load_pretrained(folder))


@pytest.mark.parametrize("kept", [0, 4, 200, -1000])
def test_a_truncated_file_is_refused(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    message = refusal(lambda: load_pretrained(folder))
    assert "model.safetensors" in message
    assert str(folder) in message


@pytest.mark.parametrize("corruption", ["truncated", "missing"])
def test_a_corrupt_shard_is_named(tmp_path: Path, corruption: str) -> None:
    their_model().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    if corruption == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        shard.unlink()
    assert shard.name in refusal(lambda: load_pretrained(tmp_path))


def test_the_export_of_a_banded_model_is_refused(tmp_path: Path) -> None:
    banded = ModelConfig(layers=2, width=32, heads=4, context=16, vocab_size=131, attention="banded", window=4)
    assert "banded" in refusal(lambda: export_model(our_model(banded), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_export_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("precious")
    assert str(tmp_path) in refusal(lambda: export_model(our_model(), tmp_path))
    assert [f.name for f in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "precious"

    file = tmp_path / "config.json"
    assert str(file) in refusal(lambda: export_model(our_model(), file))
    assert file.read_text() == "precious"


def test_exported_tensors_are_tagged_and_unpadded(tmp_path: Path) -> None:
    export_model(our_model(), tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes["transformer.wte.weight"] == (131, 32)
    assert shapes["transformer.h.0.attn.c_attn.weight"] == (32, 96)
    assert shapes["transformer.h.0.mlp.c_proj.weight"] == (128, 32)
    assert len(shapes) == 4 + 2 * 12
