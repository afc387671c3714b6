"""Models of the Hugging Face hub: names, commits, and the files that are fetched."""

import re
from dataclasses import dataclass
from pathlib import Path

from megagpt.console import warn
from megagpt.data.hub_files import cached, commit_of, hub_file, hub_names, is_commit
from megagpt.errors import NoNetwork, TransientError, UserError
from megagpt.exchange.tokenizer_files import TOKENIZER_FILES, VOCABULARIES, check_names, check_tokenizer
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
# Arguments of `hf download` that bring the files that are needed.
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
    fetched, if it is no GPT-2 or has another tokenizer."""
    repo, commit = name.repo, name.revision
    folder = hub_file(repo, "config.json", commit, bring=_BRING).parent
    read_config(folder)
    known = (_known(name, *form) for form in WEIGHTS_AND_INDEX)
    tokenizer, weights = next((files for files in known if files), None) or _listed(name, folder)
    for file in tokenizer:
        hub_file(repo, file, commit, bring=_BRING)
    check_tokenizer(folder)
    for file in weights:
        hub_file(repo, file, commit, bring=_BRING)
    return folder


def _known(name: HubName, single: str, index: str) -> tuple[list[str], list[str]] | None:
    """The files of the tokenizer and those of the weights, if the cache has a vocabulary, and weights of that form:
    then the hub need not be asked."""
    tokenizer = [file for file in TOKENIZER_FILES if cached(name.repo, file, name.revision)]
    if not set(VOCABULARIES) & set(tokenizer):
        return None
    if cached(name.repo, single, name.revision):
        return tokenizer, [single]
    found = cached(name.repo, index, name.revision)
    return (tokenizer, [index, *_parts(found)]) if found else None


def _listed(name: HubName, folder: Path) -> tuple[list[str], list[str]]:
    """The files of the tokenizer and those of the weights, by the hub's list of all that there are. `folder`: theirs in
    the cache. Raises UserError if the tokenizer is of another kind, or if there are no weights."""
    repo, commit = name.repo, name.revision
    try:
        there = hub_names(repo, commit, bring=(*_BRING, _PICKLES))
    except (NoNetwork, TransientError) as error:
        if any(cached(repo, file, commit) for form in WEIGHTS_AND_INDEX for file in form):
            way = f"its weights are in the cache, but no tokenizer; if it has none, name the folder {folder}"
            raise type(error)(f"{error}; {way}") from None
        raise
    check_names(repo, there)
    tokenizer = [file for file in TOKENIZER_FILES if file in there]
    for single, index in WEIGHTS_AND_INDEX:
        if single in there:
            return tokenizer, [single]
        if index in there:
            return tokenizer, [index, *_parts(hub_file(repo, index, commit, bring=_BRING))]
    names = " or ".join(single for single, _ in WEIGHTS_AND_INDEX)
    raise UserError(f"{repo}: holds no {names} at {commit}, nor an index of several; choose another model")


def _parts(index: Path) -> list[str]:
    """The files that an index names."""
    weight_map = read_mapping(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: has no weight_map; its model is broken")
    return sorted(set(map(str, weight_map.values())))
