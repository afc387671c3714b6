"""Weight files of `transformers` folders in every format, and folders that hold another model than they seem to."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import ACT2FN

from megagpt.errors import NonFiniteError
from megagpt.models import hf_files, huggingface
from megagpt.models.hf_layout import _GELU_NAMES
from megagpt.models.huggingface import load_pretrained, read_config
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

BIAS = "transformer.h.0.mlp.c_fc.bias"
WTE, HEAD = "transformer.wte.weight", "lm_head.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    their_model().save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def as_bin(folder: Path, shards: int = 1, **options: Any) -> None:
    """Turns the folder's safetensors into PyTorch's own format, as older versions of `transformers` wrote it."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin", **options)
        return
    index = {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        part = dict(list(tensors.items())[shard::shards])
        torch.save(part, folder / file, **options)
        index |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "old"])
@pytest.mark.parametrize("shards", [1, 3])
def test_pytorchs_own_format_is_loaded(folder: Path, shards: int, options: dict[str, Any]) -> None:
    as_bin(folder, shards, **options)
    assert_same_logits(load_pretrained(folder), their_model())


def test_a_pickle_that_runs_code_is_refused(folder: Path, tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    as_bin(folder)
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save({"wte.weight": Malicious()}, folder / "pytorch_model.bin", **options)
        message = refusal(lambda: load_pretrained(folder))
        assert "pytorch_model.bin" in message
        assert "convert it to safetensors" in message
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious()))
    assert "pytorch_model.bin" in refusal(lambda: load_pretrained(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3)], ids=["list", "tensor"])
def test_a_pickle_without_names_is_refused(folder: Path, content: object) -> None:
    as_bin(folder)
    torch.save(content, folder / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(lambda: load_pretrained(folder))


def test_a_truncated_pickle_is_refused(folder: Path) -> None:
    as_bin(folder)
    file = folder / "pytorch_model.bin"
    content = file.read_bytes()
    for kept in (0, 100, len(content) // 2, len(content) - 10):
        file.write_bytes(content[:kept])
        assert "pytorch_model.bin" in refusal(lambda: load_pretrained(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_a_git_lfs_pointer_is_named(folder: Path, name: str) -> None:
    if name == "pytorch_model.bin":
        as_bin(folder)
    oid = f"oid sha256:{'a' * 64}\nsize 548105171\n"
    (folder / name).write_text(f"version https://git-lfs.github.com/spec/v1\n{oid}")
    message = refusal(lambda: load_pretrained(folder))
    for part in (name, "Git LFS pointer", "git lfs pull", "hf download"):
        assert part in message


def test_a_pointer_among_shards_is_named(tmp_path: Path) -> None:
    their_model().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[-1]
    shard.write_text("version https://git-lfs.github.com/spec/v1\n")
    message = refusal(lambda: load_pretrained(tmp_path))
    assert shard.name in message
    assert "git lfs pull" in message


@pytest.mark.parametrize(("single", "part"), [("model.safetensors", "a.safetensors"), ("pytorch_model.bin", "a.bin")])
def test_a_tensor_that_its_file_lacks_is_named(folder: Path, single: str, part: str) -> None:
    keys = list(load_file(folder / "model.safetensors"))
    edit_tensors(folder, lambda tensors: tensors.pop(BIAS))
    if single == "pytorch_model.bin":
        as_bin(folder)
    (folder / single).rename(folder / part)
    (folder / f"{single}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(keys, part)}))
    message = refusal(lambda: load_pretrained(folder))
    assert message.startswith(f"{folder / part}: has no tensor {BIAS!r}, but the folder's index says that it does")


def test_a_file_that_may_not_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(hf_files, "is_lfs_pointer", refuse)
    message = refusal(lambda: load_pretrained(folder))
    assert message == f"{folder / 'config.json'}: this user may not read it; change its permissions, or copy the folder"


def test_a_folder_without_weights_names_the_formats(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "tf_model.h5")
    message = refusal(lambda: load_pretrained(folder))
    assert "model.safetensors or pytorch_model.bin" in message


# --- weights that this decoder would not use as they are ---


def test_a_head_of_its_own_is_refused(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({HEAD: tensors[WTE] + 1e-3}))
    message = refusal(lambda: load_pretrained(folder))
    for part in (HEAD, WTE, "differs", str(folder)):
        assert part in message
    edit_tensors(folder, lambda tensors: tensors.update({HEAD: tensors[WTE][:-1].clone()}))
    assert HEAD in refusal(lambda: load_pretrained(folder))


def test_a_head_that_repeats_the_embedding_is_accepted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({HEAD: tensors[WTE].clone()}))
    assert_same_logits(load_pretrained(folder), their_model())
    # Of another precision, and in several pieces, of which the last differs.
    monkeypatch.setattr(huggingface, "_ROWS", 50)
    table = their_model().lm_head.weight.detach().half()
    edit_tensors(folder, lambda tensors: tensors.update({WTE: table, HEAD: table.float()}))
    assert torch.equal(load_pretrained(folder).token_embedding.weight[:131], table.float())
    edit_tensors(folder, lambda tensors: tensors[HEAD][-1, -1].add_(1))
    assert "differs" in refusal(lambda: load_pretrained(folder))


@pytest.mark.parametrize("name", ["lm_head.bias", "transformer.h.2.ln_1.weight", "score.weight", "h.0.attn.rotary"])
def test_weights_of_another_model_are_refused(folder: Path, name: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(3)}))
    message = refusal(lambda: load_pretrained(folder))
    assert repr(name) in message


def test_masks_of_old_versions_are_ignored(folder: Path) -> None:
    masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16).tril(), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    edit_tensors(folder, lambda tensors: tensors.update(masks))
    assert_same_logits(load_pretrained(folder), their_model())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_named(folder: Path, value: float) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[BIAS][3] = value

    edit_tensors(folder, change)
    message = refusal(lambda: load_pretrained(folder))
    assert BIAS in message
    assert "1 of its 128 values" in message


def test_integers_are_no_weights(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({BIAS: torch.ones(128, dtype=torch.int8)}))
    message = refusal(lambda: load_pretrained(folder))
    assert BIAS in message
    assert "int8" in message


def test_the_tanh_gelu_is_known_by_all_its_names(folder: Path) -> None:
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    expected = torch.nn.functional.gelu(x, approximate="tanh")
    for name in _GELU_NAMES:
        torch.testing.assert_close(ACT2FN[name](x), expected, rtol=0, atol=1e-9)
        edit_config(folder, activation_function=name)
        assert read_config(folder) == CONFIG


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pruned_heads", {"0": [1]}),
        ("auto_map", {"AutoModelForCausalLM": "modeling_x.X"}),
        ("quantization_config", {"quant_method": "gptq"}),
        ("reorder_and_upcast_attn", True),
        ("n_inner", 96),
    ],
)
def test_a_config_key_that_changes_the_model_is_refused(folder: Path, key: str, value: object) -> None:
    edit_config(folder, **{key: value})
    message = refusal(lambda: load_pretrained(folder))
    assert f"{key} is {value!r}" in message
    assert ("this decoder computes 4 x n_embd = 128 only" in message) == (key == "n_inner")


def test_a_shape_is_read_under_its_other_names(folder: Path) -> None:
    other = {"n_layer": "num_hidden_layers", "n_embd": "hidden_size", "n_head": "num_attention_heads"}
    fields = json.loads((folder / "config.json").read_text())
    renamed = {other.get(key, key): value for key, value in fields.items()}
    (folder / "config.json").write_text(json.dumps(renamed))
    assert GPT2Config.from_pretrained(folder).n_layer == 2
    assert read_config(folder) == CONFIG
    edit_config(folder, n_layer=3)
    assert "n_layer 3 and num_hidden_layers 2 contradict" in refusal(lambda: read_config(folder))


# --- export in other formats ---


@pytest.mark.parametrize(("dtype", "theirs"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_an_export_in_half_precision_is_rounded(tmp_path: Path, dtype: str, theirs: torch.dtype) -> None:
    ours = our_model()
    export_model(ours, tmp_path, dtype=dtype, shard_bytes=20_000)
    model, report = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True, local_files_only=True)
    assert not any(report.values()), report
    assert {p.dtype for p in model.parameters()} == {theirs}
    back = load_pretrained(tmp_path)
    for (name, parameter), rounded in zip(ours.named_parameters(), back.parameters(), strict=True):
        live = slice(131) if name == "token_embedding.weight" else slice(None)
        assert torch.equal(rounded[live], parameter[live].to(theirs).float()), name
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = [tmp_path / name for name in set(index["weight_map"].values())]
    stored = sum(t.nbytes for file in files for t in load_file(file).values())
    assert index["metadata"]["total_size"] == stored == 2 * CONFIG.parameters
    assert all(sum(t.nbytes for t in load_file(f).values()) <= 20_000 for f in files)


def test_a_weight_too_large_for_fp16_is_refused(tmp_path: Path) -> None:
    ours = our_model()
    with torch.no_grad():
        ours.blocks[1].mlp.up.bias[7] = -7e4
    message = refusal(lambda: export_model(ours, tmp_path / "out", dtype="fp16"))
    large = "1 of its 128 values are larger than fp16's largest, 65504; the largest is 70000"
    assert message == f"--dtype fp16: tensor 'blocks.1.mlp.up.bias': {large}: export with --dtype fp32 or bf16"
    assert not list(tmp_path.iterdir())
    export_model(ours, tmp_path / "out", dtype="bf16")
    with torch.no_grad():
        ours.blocks[1].mlp.up.bias[7] = 3.4e38  # above bf16's largest
    for dtype in ("fp16", "bf16"):
        with pytest.raises(NonFiniteError, match=r"the largest is 3\.4e\+38: export with --dtype fp32$"):
            export_model(ours, tmp_path / dtype, dtype=dtype)
