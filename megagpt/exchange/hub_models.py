"""Models of the Hugging Face hub: names, commits, and the files that are fetched."""

import re
from dataclasses import dataclass
from pathlib import Path

from megagpt.console import warn
from megagpt.data.hub_files import cached, commit_of, hub_file, hub_names, is_commit
from megagpt.errors import ExpectedError, UserError
from megagpt.exchange.tokenizer_files import TOKENIZER_FILES
from megagpt.models.hf_files import WEIGHTS_AND_INDEX, read_mapping
from megagpt.models.huggingface import read_config

# OpenAI's releases, each at the commit that its branch main had in 2026: scores of one name are those of one file.
_COMMITS = {
    "openai-community/gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "openai-community/gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "openai-community/gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "openai-community/gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}
SHORT_NAMES = {repo.partition("/")[2]: repo for repo in _COMMITS}
_NAME = re.compile(r"(?:https://huggingface\.co/)?([A-Za-z0-9][\w.-]*/[\w.-]+?)/?")
# What `hf download` takes for the files that are needed.
_BRING = ("--include '*.json'", "--include '*.txt'", "--include '*.safetensors'")
_PICKLES = "--include 'pytorch_model*.bin'"


@dataclass(frozen=True)
class HubName:
    """A model's repository on the hub, and the revision of it that is meant."""

    repo: str
    revision: str
    """A commit, a branch or a tag."""


def hub_name(name: str) -> HubName:
    """`gpt2`, `OWNER/NAME`, with or without `@REVISION`. Without one, OpenAI's releases mean the commit that is written
    here, other models their branch main. Raises UserError for anything else."""
    base, at, revision = name.partition("@")
    found = _NAME.fullmatch(SHORT_NAMES.get(base, base))
    if found is None or (at and not revision):
        form = "a model on the Hugging Face hub is OWNER/NAME or OWNER/NAME@REVISION"
        raise UserError(f"{name}: no such folder here; {form}; OpenAI's are {', '.join(SHORT_NAMES)}")
    return HubName(found[1], revision or _COMMITS.get(found[1], "main"))


def resolve(name: HubName) -> HubName:
    """The model at the commit that its revision means now. Raises UserError."""
    if is_commit(name.revision):
        return name
    commit = commit_of(hub_file(name.repo, "config.json", name.revision, bring=_BRING))
    warn(f"{name.repo}: {name.revision} is commit {commit}; to name it always: {name.repo}@{commit}")
    return HubName(name.repo, commit)


def fetch(name: HubName) -> Path:
    """The folder in the hub's cache with config, weights and, if there is one, tokenizer of a model at a commit.
    Weights in PyTorch's own format are fetched only if there are no safetensors. Raises UserError, before weights are
    fetched, if it is no GPT-2."""
    repo, commit = name.repo, name.revision
    folder = hub_file(repo, "config.json", commit, bring=_BRING).parent
    read_config(folder)
    for file in _known(name, *WEIGHTS_AND_INDEX[0]) or _listed(name):
        hub_file(repo, file, commit, bring=_BRING)
    return folder


def _known(name: HubName, single: str, index: str) -> list[str]:
    """The files, if weights of that form are in the cache: then the hub need not be asked. Else empty."""
    tokenizer = [file for file in TOKENIZER_FILES if cached(name.repo, file, name.revision)]
    if cached(name.repo, single, name.revision):
        return [single, *tokenizer]
    if found := cached(name.repo, index, name.revision):
        return [index, *_parts(found), *tokenizer]
    return []


def _listed(name: HubName) -> list[str]:
    """The files, by the hub's list of all that there are."""
    repo, commit = name.repo, name.revision
    try:
        there = hub_names(repo, commit, bring=(*_BRING, _PICKLES))
    except ExpectedError:
        if pickles := _known(name, *WEIGHTS_AND_INDEX[1]):
            return pickles
        raise
    tokenizer = [file for file in TOKENIZER_FILES if file in there]
    for single, index in WEIGHTS_AND_INDEX:
        if single in there:
            return [single, *tokenizer]
        if index in there:
            return [index, *_parts(hub_file(repo, index, commit, bring=_BRING)), *tokenizer]
    names = " or ".join(single for single, _ in WEIGHTS_AND_INDEX)
    raise UserError(f"{repo}: holds no {names} at {commit}, nor an index of several; choose another model")


def _parts(index: Path) -> list[str]:
    """The files that an index names."""
    weight_map = read_mapping(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: has no weight_map; its model is broken")
    return sorted(set(map(str, weight_map.values())))
