"""Files of the Hugging Face hub: from its client's cache, or fetched into it, and proved by the hub's checksum.

The client (`huggingface_hub`) compares sizes only. Its cache names a file by the hub's ETag: the SHA-256 of a large
file, git's SHA-1 of a small one. Both are checked here, each time a file is asked for."""

import contextlib
import hashlib
import io
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from tqdm import tqdm

from megagpt.console import warn
from megagpt.errors import ExpectedError, NoNetwork, TransientError, UserError, expected, first_line

Kind = Literal["model", "dataset"]
T = TypeVar("T")
# Pauses (s) before the attempts after the first one, beside the client's own retries within a file.
_PAUSES = (1.0, 4.0)
# Errors, by name because the client's library for HTTP changes, if there is no way to the hub: another attempt in a few
# seconds would only delay the advice.
_UNREACHABLE = ("ConnectError", "ConnectTimeout", "ProxyError", "OfflineModeIsEnabled")
# Sizes (bytes) from which a file's download is announced, and its check, which takes a second or more from there on.
_LARGE, _SLOW = 1_000_000, 1_000_000_000
_PLAIN_SECONDS = 30.0  # between two lines of a log


def hub_file(repo: str, path: str, revision: str, kind: Kind = "model", bring: Sequence[str] = ()) -> Path:
    """One file of a repository, as a path in the client's cache. `revision`: a commit, whose files are taken from the
    cache without a request, or a branch or tag, whose commit is asked for; if the hub cannot be reached, a line says
    so, and the cache's is taken. `bring`: arguments of `hf download` that bring all that is needed, for the error
    without a network; by default those for this file. Raises UserError, and TransientError if the hub is down."""
    bring = bring or (shlex.quote(path),)
    found = cached(repo, path, revision, kind) if is_commit(revision) else None
    found = found or _fetch(repo, path, revision, kind, bring)
    if (wrong := _difference(found)) is None:
        return found
    corrupt = found
    try:
        found = _fetch(repo, path, commit_of(found), kind, bring, again=True)
    except ExpectedError as error:
        raise UserError(f"{corrupt}: corrupt, {wrong}; {error}") from None
    warn(f"{corrupt}: was corrupt, {wrong}; it was fetched again")
    if (wrong := _difference(found)) is None:
        return found
    _forget(found)
    way = "a proxy, a mirror (HF_ENDPOINT) or this machine's memory or disk changes what is fetched"
    raise UserError(f"{repo}: {path} is corrupt after a second download, too, and was removed: {wrong}; {way}")


def hub_names(repo: str, commit: str, kind: Kind = "model", bring: Sequence[str] = ()) -> list[str]:
    """Paths of the files of a repository at a commit. Raises UserError, and TransientError if the hub is down."""
    from huggingface_hub import HfApi

    def ask() -> list[str]:
        return sorted(HfApi().list_repo_files(repo, revision=commit, repo_type=kind))

    return asked(repo, f"the list of its files at {commit}", commit, kind, bring, ask)


def commit_of(file: Path) -> str:
    """The commit that a path of `hub_file` belongs to."""
    from huggingface_hub import constants

    return file.relative_to(constants.HF_HUB_CACHE).parts[2]  # REPOSITORY/snapshots/COMMIT/PATH


def is_commit(revision: str) -> bool:
    """Whether a revision names a commit in full."""
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def cached(repo: str, path: str, revision: str, kind: Kind = "model") -> Path | None:
    """The file's path in the cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo, path, revision=revision, repo_type=kind)
    except HFValidationError as error:
        raise UserError(f"{repo}: no name of a repository of the Hugging Face hub: {first_line(error)}") from None
    return Path(found) if isinstance(found, str) else None


def asked(repo: str, what: str, revision: str, kind: Kind, bring: Sequence[str], ask: Callable[[], T]) -> T:
    """The hub's answer, after a few attempts if it or the network fails. `what`: a noun, for the message. `bring`: as
    of `hub_file`; if it is empty, nothing that is brought would help. Raises UserError with what to do: no such name,
    no access, a full disk; NoNetwork; TransientError if the hub is down."""
    from huggingface_hub.errors import HfHubHTTPError

    for pause in (*_PAUSES, None):
        try:
            with _quiet():
                return ask()
        except Exception as error:
            _refuse(error, repo, what, revision, kind)
            unreachable = type(error).__name__ in _UNREACHABLE
            down = f"the hub answers {_status(error)}" if isinstance(error, HfHubHTTPError) else ""
            if pause is not None and not unreachable:
                warn(f"{repo}: {what}: {down or first_line(error)}; trying again in {pause:g} s")
                time.sleep(pause)
            elif down:
                raise TransientError(f"{repo}: {what}: {down}; try again later") from None
            else:
                raise NoNetwork(_without_network(error, repo, what, revision, kind, bring)) from None
    raise AssertionError("the last attempt returns or raises")


def _fetch(repo: str, path: str, revision: str, kind: Kind, bring: Sequence[str], again: bool = False) -> Path:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    def ask() -> Path:
        # The client's download would ask for minutes if the hub stalls.
        url = hf_hub_url(repo, path, repo_type=kind, revision=revision)
        known = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        large = (known.size or 0) >= _LARGE and (again or not cached(repo, path, known.commit_hash or revision, kind))
        if large:
            warn(f"fetching {repo}: {path}, {(known.size or 0) / 1e6:,.0f} MB, into {constants.HF_HUB_CACHE}")
        options: dict[str, Any] = {"repo_type": kind, "revision": revision, "tqdm_class": _Progress}
        return Path(hf_hub_download(repo, path, force_download=again, **options))

    try:
        return asked(repo, f"an intact {path}" if again else path, revision, kind, bring, ask)
    except (NoNetwork, TransientError) as error:
        # A branch or a tag, as it was when the hub was last reached.
        if not is_commit(revision) and not again and (found := cached(repo, path, revision, kind)):
            why = "the hub is down" if isinstance(error, TransientError) else "the hub cannot be asked"
            warn(f"{repo}: {why}: {revision} is commit {commit_of(found)} in the cache, and may be another by now")
            return found
        raise


def _refuse(error: Exception, repo: str, what: str, revision: str, kind: Kind) -> None:
    """Raises UserError if another attempt would fail in the same way."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    login = "log in with `hf auth login`, or set HF_TOKEN"
    says = f" (the hub says: {' '.join(text.split())})" if (text := getattr(error, "server_message", None)) else ""
    problem = ""
    match error:
        case hub.GatedRepoError():
            page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
            problem = f"gated: accept its terms at {page}, then {login}{says}"
        case hub.RepositoryNotFoundError():
            noun = "data set" if kind == "dataset" else kind
            problem = f"the Hugging Face hub has no {noun} of that name that you may see: check it; if it is private, "
            problem += login
        case hub.RevisionNotFoundError():
            problem = f"has no revision {revision!r}; name a branch, a tag or a commit in full"
        case hub.RemoteEntryNotFoundError():
            problem = f"{what} is not among its files at {revision}"
        case hub.HFValidationError():
            problem = f"no name of a repository of the Hugging Face hub: {first_line(error)}"
        case hub.HfHubHTTPError() if _status(error) in (401, 403):
            problem = f"{what}: the hub refuses it with {_status(error)}{says}: {login} with one that may read it"
        case hub.HfHubHTTPError() if _status(error) < 500 and _status(error) not in (408, 429):
            problem = f"{what}: {first_line(error)}{says}"
        case _ if not constants.ENDPOINT.startswith(("http://", "https://")):
            problem = f"HF_ENDPOINT is {constants.ENDPOINT!r}, no address that begins with https://; set or unset it"
        case OSError() if expected(error) and error.errno:
            ways = "free some space, or set HF_HOME to a folder with room that this user may write"
            problem = f"{what} cannot be stored in {constants.HF_HUB_CACHE}: {os.strerror(error.errno)}; {ways}"
    if problem:
        raise UserError(f"{repo}: {problem}") from None


def _without_network(error: Exception, repo: str, what: str, revision: str, kind: Kind, bring: Sequence[str]) -> str:
    """A line about what is missing, and how to bring it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    off = isinstance(error, OfflineModeIsEnabled)
    reason = "HF_HUB_OFFLINE is set" if off else f"the Hugging Face hub cannot be reached ({first_line(error)})"
    if not bring:
        return f"{repo}: {what}: {reason}"
    cache, folder = constants.HF_HUB_CACHE, f"{kind}s--{repo.replace('/', '--')}"
    kind_option = "" if kind == "model" else f" --repo-type {kind}"
    command = f"hf download {repo}{kind_option} --revision {shlex.quote(revision)} {' '.join(bring)}"
    copy = f"copy the folder {folder} of its cache (~/.cache/huggingface/hub, or $HF_HOME/hub) into {cache}"
    after = "" if off else "; with HF_HUB_OFFLINE=1 the hub is not asked at all"
    if re.fullmatch(r"[0-9a-f]{7,39}", revision):
        after += "; a commit that is in the cache is found by all its 40 digits only"
    missing = f"{what} is not in the cache here, and {reason}"
    return f"{repo}: {missing}: on a machine with a network run `{command}`, then {copy}{after}"


def _status(error: Exception) -> int:
    return getattr(getattr(error, "response", None), "status_code", 0)


def _difference(file: Path) -> str | None:
    """How a file differs from what the hub has; None if it does not. The hub's checksum is unknown in a cache without
    symbolic links."""
    name = file.readlink().name if file.is_symlink() else ""
    if (size := file.stat().st_size) >= _SLOW and name:
        warn(f"checking {file.name}, {size / 1e6:,.0f} MB, against the hub's checksum")
    with file.open("rb") as content:
        if re.fullmatch(r"[0-9a-f]{64}", name):
            kind, digest = "SHA-256", hashlib.file_digest(content, "sha256").hexdigest()
        elif re.fullmatch(r"[0-9a-f]{40}", name):
            start = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
            kind, digest = "SHA-1", hashlib.file_digest(content, lambda: start).hexdigest()
        else:
            return None
    return None if digest == name else f"its {kind} is {digest[:12]}..., the hub's is {name[:12]}..."


def _forget(file: Path) -> None:
    """Remove a corrupt file from the cache, so that no other program takes it."""
    with contextlib.suppress(OSError):
        (file.parent / file.readlink()).unlink()
        file.unlink()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the client's own lines on stderr."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


class _Progress(tqdm):
    """A large file's bar on a terminal, lines in a log."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        from huggingface_hub import constants

        options.pop("name", None)
        options["desc"] = str(options.get("desc", "")).rpartition("/")[2]
        options["disable"] = (options.get("total") or 0) < _LARGE or constants.HF_HUB_DISABLE_PROGRESS_BARS is True
        self._plain = not sys.stderr.isatty()
        if self._plain:  # the bar itself goes nowhere
            options |= {"file": io.StringIO(), "mininterval": _PLAIN_SECONDS}
        super().__init__(*arguments, **options)

    def display(self, *arguments: Any, **options: Any) -> None:
        if not self._plain:
            super().display(*arguments, **options)
        elif 0 < self.n < (self.total or 0):
            warn(str(self))
