"""The model for lm-evaluation-harness, by the harness's own interface: scored by the functions of our own exams, and
generated from as samples are.

The harness is told on every rank that it is alone, so all ranks build the same requests: its own way to split rows over
ranks draws other shots on each number of ranks. The requests are split here instead, by whole batches."""

import hashlib
import itertools
from collections.abc import Sequence
from contextlib import closing
from typing import Any, NamedTuple, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import nn

from megagpt.data.tokenizer import END_OF_TEXT, encode, gpt2
from megagpt.errors import UserError
from megagpt.evaluation.report import ShownProgress
from megagpt.evaluation.results import Score
from megagpt.evaluation.scoring import score
from megagpt.evaluation.sequences import Group, Tokens, fitted
from megagpt.evaluation.texts import windows
from megagpt.generation import generate
from megagpt.models.presets import ModelConfig
from megagpt.world import World

# Tokens that the harness's own models generate if a task names no number.
_NEW_TOKENS = 256
# Bytes of keys and values of the rows that are generated together, and the largest number of these rows.
_CACHE_BYTES = 4e9
_ROWS = 32
# Settings of a generation that are followed, and values of others that change nothing.
_FOLLOWED = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1}


class _Prompt(NamedTuple):
    """A text to continue."""

    number: int
    ids: list[int]
    stops: tuple[str, ...]
    new_tokens: int
    settings: tuple[tuple[str, Any], ...]
    """Of the draws."""


class HarnessModel(TemplateLM):
    """A model as lm-evaluation-harness asks it. Every rank makes one, and gets all answers."""

    def __init__(
        self, model: nn.Module, config: ModelConfig, world: World, sharded: bool = False, batch_tokens: int = 0
    ) -> None:
        """`sharded`: the ranks hold parts of the model, so they must call it together."""
        super().__init__()
        self._model, self._config, self._world = model, config, world
        self._sharded, self._batch_tokens = sharded, batch_tokens
        self._places: list[tuple[str, int]] = []
        self.cut: set[tuple[str, int]] = set()
        """Task and row of each request whose left end was cut off, because it is longer than the model."""

    @property
    def eot_token_id(self) -> int:
        return END_OF_TEXT

    @property
    def max_length(self) -> int:
        return self._config.context

    @property
    def max_gen_toks(self) -> int:
        return _NEW_TOKENS if self.max_length > _NEW_TOKENS else max(1, self.max_length // 2)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: Any) -> list[int]:
        """As in our own exams, a text that spells <|endoftext|> is ordinary text."""
        return cast(list[int], encode(string).tolist())

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._places = [_place(request) for request in requests]
        return cast(list[tuple[float, bool]], super().loglikelihood(requests, disable_tqdm=True))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **others: Any
    ) -> list[tuple[float, bool]]:
        sequences: list[Tokens] = []
        for (task, row), (_, context, continuation) in zip(self._places, requests, strict=True):
            before = context or [END_OF_TEXT]  # of a context that is white space
            whole = Tokens(before + continuation, len(before))
            sequences.append(fitted(whole, self.max_length, f"{task} row {row}"))
            if sequences[-1].cut:
                self.cut.add((task, row))
        # Only sequences that begin alike share anything: not those with and without their question.
        keys = [(place, tokens.ids[0]) for place, tokens in zip(self._places, sequences, strict=True)]
        together = itertools.groupby(range(len(keys)), key=keys.__getitem__)
        groups = [[sequences[i] for i in indices] for _, indices in together]
        answers = [(found.log_likelihood, found.greedy) for found in self._scores("answers", groups)]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        n = self.max_length
        of_texts = [windows([], list(request.args), n, n).groups for request in requests]
        found = iter(self._scores("windows", [group for groups in of_texts for group in groups]))
        sums = [sum(next(found).log_likelihood for _ in each) for each in of_texts]
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def _scores(self, name: str, groups: list[Group]) -> list[Score]:
        """The score of each sequence of the groups, in order."""
        self._check_same(groups)
        if not groups:
            return []
        with closing(ShownProgress(f"harness, {name}", len(groups), self._world.is_main)) as progress:
            found = score(self._model, groups, self._world, self._batch_tokens, progress)
        assert found is not None  # nothing interrupts it
        return [each for group in found for each in group]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts = [self._prompt(i, request) for i, request in enumerate(requests)]
        self._check_same(prompts)
        batches = self._generations(prompts)
        ours = batches if self._sharded else batches[self._world.rank :: self._world.size]
        mine: dict[int, str] = {}
        with closing(ShownProgress("harness, texts", len(prompts), self._world.is_main)) as progress:
            for first_row, batch in ours:
                mine |= self._generate(first_row, batch)
                progress.done(len(mine) / sum(len(batch) for _, batch in ours))
        texts: dict[int, str] = {}
        for part in self._world.gather_objects(mine):
            texts |= part
        for i, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[i])
        return [texts[i] for i in range(len(requests))]

    def _prompt(self, number: int, request: Instance) -> _Prompt:
        text, asked = request.args
        settings = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
        task, row = _place(request)
        for key, value in settings.items():
            if key not in _FOLLOWED and _NEUTRAL.get(key) != value:
                known = ", ".join(sorted(_FOLLOWED))
                raise UserError(f"{task}: its generation_kwargs ask for {key}: {value}; only {known} can be followed")
        new = settings["max_gen_toks"]
        if not 0 < new < self.max_length:
            has = f"asks for max_gen_toks: {new}, and the model has {self.max_length} positions"
            raise UserError(f"{task}: {has}: no room is left for a prompt; lower it in the task's yaml file")
        ids = self.tok_encode(text) or [END_OF_TEXT]
        room = self.max_length - new
        if len(ids) > room:
            self.cut.add((task, row))
        draws = {key: settings[key] for key in ("temperature", "top_k", "top_p") if key in settings}
        if not settings["do_sample"]:
            draws = {"temperature": 0.0}
        stops = handle_stop_sequences(settings["until"], "<|endoftext|>")
        return _Prompt(number, ids[-room:], tuple(filter(None, stops)), new, tuple(sorted(draws.items())))

    def _generations(self, prompts: Sequence[_Prompt]) -> list[tuple[int, list[_Prompt]]]:
        """Prompts with equal settings, longest first, in batches, each with the number of its first row, which decides
        its draws: a function of the requests alone."""
        row_bytes = 8 * self._config.layers * self._config.width * self.max_length  # keys and values, fp32
        rows = int(min(_ROWS, max(1, _CACHE_BYTES // row_bytes)))
        found: list[list[_Prompt]] = []
        for prompt in sorted(prompts, key=lambda p: (repr(p[2:]), -len(p.ids), p.number)):
            if found and len(found[-1]) < rows and found[-1][0][2:] == prompt[2:]:
                found[-1].append(prompt)
            else:
                found.append([prompt])
        return list(zip(itertools.accumulate(map(len, found), initial=0), found, strict=False))

    def _generate(self, first_row: int, batch: Sequence[_Prompt]) -> dict[int, str]:
        stops, settings = list(batch[0].stops), dict(batch[0].settings)
        if self._sharded:
            settings["decide"] = self._world.from_main

        def is_over(new: list[int]) -> bool:
            text = gpt2().decode(new)
            return any(stop in text for stop in stops)

        ids = [prompt.ids for prompt in batch]
        rows = generate(
            self._model, self._config, ids, batch[0].new_tokens, first_row=first_row, is_over=is_over, **settings
        )
        texts = [postprocess_generated_text(gpt2().decode(new), stops, None) for new in rows]
        return {prompt.number: text for prompt, text in zip(batch, texts, strict=True)}

    def _check_same(self, requests: Sequence[Any]) -> None:
        """Raises UserError, on every rank, if the ranks were asked different things: the model would be called out of
        step, and a hang would be the least evil."""
        if self._world.size > 1:
            digest = hashlib.sha256()
            for request in requests:
                digest.update(repr(request).encode())
            digests = self._world.gather_objects(digest.hexdigest())
            if len(set(digests)) > 1:
                odd = next(i for i, digest in enumerate(digests) if digest != digests[0])
                same = "the same lm_eval, tasks and data sets on each machine"
                raise UserError(f"lm-evaluation-harness asks rank {odd} other things than rank 0; install {same}")


def _place(request: Instance) -> tuple[str, int]:
    return request.task_name or "task", request.doc_id or 0
