"""Ranks that generate together, logits that are not finite, and the attention kernels of generation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megagpt import generation
from megagpt.cli import main
from megagpt.config_file import load_config
from megagpt.data.tokenizer import END_OF_TEXT
from megagpt.engines.engine import build_engine
from megagpt.errors import NonFiniteError, UserError
from megagpt.generation import _attention_kernels, generate
from megagpt.models.attention import KeyValueCache
from megagpt.models.gpt import GPT
from megagpt.models.presets import ModelConfig
from megagpt.world import World, join
from tests.conftest import Refusal, Tiny, metrics
from tests.processes import run_ranks
from tests.runs import save_run

CONFIG = ModelConfig(layers=1, width=16, heads=2, context=17)


class Scripted(nn.Module):
    """Gives each row the logits of a function (row, call); counts its calls."""

    def __init__(self, script: Callable[[int, int], Tensor]) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))
        self.script, self.calls = script, 0

    def forward(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        cache.length += tokens.shape[1]
        self.calls += 1
        return torch.stack([self.script(row, self.calls) for row in range(len(tokens))])[:, None]


# --- ranks that differ ---


def samples_of_a_rank(config: str) -> list[list[Any]]:
    """Of an FSDP model: the number of its calls and the samples, or the error. First as it is; then with logits that
    make rank 1 alone end both samples at the third token; then with logits that are NaN on rank 0 alone."""
    with join("cpu") as world:
        engine = build_engine(load_config(config, ["engine.name=fsdp"]), world)
        calls, turn = 0, 0

        def disturb(module: nn.Module, inputs: object, logits: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if turn == 1 and world.rank == 1:
                logits = logits + 1e-6
                logits[..., END_OF_TEXT] += 100.0 if calls > 2 else 0.0
            if turn == 2 and world.rank == 0 and calls > 2:
                logits = logits * torch.nan
            return logits

        engine.model.register_forward_hook(disturb)
        found = []
        for number in range(3):
            turn, calls = number, 0
            with engine.evaluation() as model:
                try:
                    shape, prompts = engine.config.model, [[5, 17, 3], [7]]
                    rows: Any = generate(model, shape, prompts, 9, top_k=50, decide=world.from_main)
                except NonFiniteError as error:
                    rows = str(error)
            found.append([calls, rows])
        return found


@pytest.mark.slow
def test_ranks_whose_logits_differ_draw_the_same_samples(tiny: Tiny) -> None:
    of_rank_0, of_rank_1 = run_ranks(2, samples_of_a_rank, str(tiny()))
    assert of_rank_0 == of_rank_1
    alike, differing, (calls, error) = of_rank_0
    assert differing == alike
    assert alike[0] == 9
    assert [len(row) for row in alike[1]] == [9, 9]
    assert (calls, error[:24]) == (3, "sample 1, new token 3: t")


def test_the_loop_samples_the_main_ranks_tokens(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all ranks, only the main one draws: the occasion passes `World.from_main`."""
    asked = []
    usual = World.from_main

    def counted(self: World, function: Callable[[], object], group: object = None) -> object:
        asked.append(getattr(function, "__name__", ""))
        return usual(self, function, group)

    monkeypatch.setattr(World, "from_main", counted)
    config = str(tiny(train={"tokens": 128}, sampling={"max_tokens": 3, "every_tokens": 0}))
    assert main(["train", config]) == 0
    assert asked.count("next_tokens") == 3


# --- logits that are not finite ---


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_end_the_sampling(value: float, temperature: float) -> None:
    def script(row: int, call: int) -> Tensor:
        logits = torch.zeros(50257)
        logits[7] = value if (row, call) == (1, 3) else 1.0
        return logits

    with pytest.raises(NonFiniteError, match="sample 2, new token 3"):
        generate(Scripted(script), CONFIG, [[1], [2]], 5, temperature=temperature)
    # As `sample --stream` asks: other samples came before these.
    with pytest.raises(NonFiniteError, match="sample 9, new token 3"):
        generate(Scripted(script), CONFIG, [[1], [2]], 5, temperature=temperature, first_row=7)
    with pytest.raises(UserError, match="prompt 8 has 0 tokens"):
        generate(Scripted(script), CONFIG, [[]], 5, first_row=7)


def test_a_sample_that_has_ended_may_have_any_logits() -> None:
    def script(row: int, call: int) -> Tensor:
        logits = torch.zeros(50257)
        logits[END_OF_TEXT if row == 0 else 9] = 1e4
        return logits * torch.nan if (row, call > 1) == (0, True) else logits

    assert generate(Scripted(script), CONFIG, [[1], [2]], 3) == [[], [9, 9, 9]]


def set_gain(value: float) -> Callable[[GPT], None]:
    def change(model: GPT) -> None:
        model.final_norm.weight.fill_(value)

    return change


def test_a_runs_weights_that_are_not_finite_are_named(tiny: Tiny, refusal: Refusal, tmp_path: Path) -> None:
    run = str(save_run(str(tiny()), set_gain(torch.nan)))
    for command in (["sample", run], ["export", run, "--to", str(tmp_path / "out")]):
        refusal(command, "final_norm.weight", "32 of its 32 values", "older checkpoint")
    assert not list(tmp_path.glob("*out*"))


def test_finite_weights_whose_logits_overflow_end_in_one_line(tiny: Tiny, refusal: Refusal) -> None:
    run = str(save_run(str(tiny()), set_gain(3e38)))
    refusal(["sample", run, "--max-tokens", "2"], "sample 1, new token 1", "logits are NaN or infinite")
    refusal(["sample", run, "--max-tokens", "2", "--stream"], "sample 1, new token 1")


def test_a_run_goes_on_without_samples(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(logits: Tensor, alive: list[bool], i: int, first_row: int) -> None:
        raise NonFiniteError("the logits")

    monkeypatch.setattr("megagpt.generation._check_finite", refuse)
    assert main(["train", str(tiny(train={"tokens": 256}, sampling={"every_tokens": 128}))]) == 0
    run = tmp_path / "runs" / "tiny"
    assert [line["samples"] for line in metrics(run, "samples")] == [[], []]
    assert metrics(run, "finished")


# --- kernels ---


def test_generation_on_a_gpu_plans_nothing_with_cudnn() -> None:
    """No GPU is needed: the switches are those that the CUDA dispatcher reads."""
    backends = torch.backends.cuda
    before = backends.cudnn_sdp_enabled(), backends.flash_sdp_enabled()
    with _attention_kernels(torch.device("cuda")):
        assert not backends.cudnn_sdp_enabled()
        assert not backends.flash_sdp_enabled()
        assert backends.mem_efficient_sdp_enabled()
        assert backends.math_sdp_enabled()
    with _attention_kernels(torch.device("cpu")):
        assert (backends.cudnn_sdp_enabled(), backends.flash_sdp_enabled()) == before


def test_every_call_of_the_model_has_the_kernels_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(row: int, call: int) -> Tensor:
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        return torch.zeros(50257)

    asked = []

    def of_a_gpu(device: torch.device) -> Any:
        asked.append(device)
        return _attention_kernels(torch.device("cuda"))

    assert torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(generation, "_attention_kernels", of_a_gpu)
    model = Scripted(script)
    generate(model, CONFIG, [[1]], 3)
    assert asked == [torch.device("cpu")] * model.calls == [torch.device("cpu")] * 3
