"""push_to_hub: a packaged recommender as a model repository, and back.

One commit holds the whole package, so a repository never shows half of one. Large files are uploaded before
the commit and are found again if the upload was cut. Nothing is sent that is not a recommender: no
interactions, no pictures, no local paths, no tokens.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, validate_repo_id

from llmrec.errors import ConfigError, LlmrecError, MissingArtifactError
from llmrec.files import read_json

SECRETS = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}"
    r"|github_pat_[A-Za-z0-9_]{30,})\b"
)
"""Tokens of the Hub and of common services."""

LOCAL_PATH = re.compile(r"^(?:hub:|local-dir:)?(?:/|~/|\.{1,2}[\\/]|[A-Za-z]:[\\/]|\\\\|file:)")
IN_TEXT = re.compile(
    r"(?:^|[\s\"'(])((?:/(?:home|root|Users|tmp|mnt|var|opt|srv|media|work|data)/|~/)[^\s\"')]+)"
)


class HubError(LlmrecError):
    """The Hub refused or could not be reached; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """Where a package is now."""

    repo: str
    url: str
    revision: str
    """The commit, which `Recommender.from_pretrained(repo, revision=...)` takes"""


def push(
    folder: Path,
    repo: str,
    *,
    private: bool = True,
    token: str | None = None,
    endpoint: str | None = None,
    message: str = "Recommender packaged by llmrec",
) -> Pushed:
    """Create or update a model repository with a package, in one commit.

    Args:
        folder: see `inference.package`.
        repo: owner/name.
        private: whether a repository that is created is private; one that exists stays as it is.
        token: of the Hub; None: the one that `hf auth login` stored.
        endpoint: address of the Hub; None: the public one, or $HF_ENDPOINT.
        message: of the commit.

    Raises:
        ConfigError: the package holds something that must not leave this machine.
        MissingArtifactError: a file of the package is damaged.
        HubError: the Hub refused.
    """
    from llmrec.inference.package import check

    check(folder)
    refuse_private(folder)
    api = HfApi(endpoint=endpoint, token=token)
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(folder / name))
        for name, _ in listing(folder)
    ]
    try:
        found = api.create_repo(repo, private=private, exist_ok=True, repo_type="model")
        api.preupload_lfs_files(found.repo_id, operations)
        stale = [CommitOperationDelete(name) for name in left_over(api, found.repo_id, listing(folder))]
        with warnings.catch_warnings():
            # It takes the table of items for a dataset.
            warnings.filterwarnings("ignore", message=".*commit a data file")
            commit = api.create_commit(found.repo_id, [*operations, *stale], commit_message=message)
    except (HfHubHTTPError, HFValidationError, OSError, RuntimeError, unanswered()) as error:
        raise HubError(explained(error, repo)) from None
    return Pushed(repo=found.repo_id, url=str(found), revision=commit.oid)


def left_over(api: HfApi, repo: str, files: list[tuple[str, int]]) -> list[str]:
    """Files in a repository that belong to the package pushed before, but not to this one.

    Args:
        api: the Hub.
        repo: the repository.
        files: those of this package, with their sizes.
    """
    from llmrec.inference.package import MANIFEST

    there = set(api.list_repo_files(repo))
    if MANIFEST not in there:
        return []
    try:
        before = read_json(Path(api.hf_hub_download(repo, MANIFEST)))
    except MissingArtifactError:  # it is not ours
        return []
    listed = before.get("files") if isinstance(before, dict) else None
    if not isinstance(listed, dict):
        return []
    kept = {name for name, _ in files}
    return sorted(name for name in listed if name in there and name not in kept)


def download(repo: str, *, revision: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """The folder of a package from the Hub, from the cache as far as it is there.

    Raises:
        MissingArtifactError: no such repository, revision or package.
        HubError: the Hub cannot be reached.
    """
    no_folder = f"{repo} is no folder here"
    if repo.count("/") != 1:
        raise MissingArtifactError(f"{no_folder}, nor a Hub id (owner/name)")
    try:
        return Path(snapshot_download(repo, revision=revision, cache_dir=cache_dir))
    except HFValidationError:
        raise MissingArtifactError(f"{no_folder}, nor a Hub id (owner/name)") from None
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise HubError(f"{no_folder}; {explained(error, repo, pushed=False)}") from None
        name = repo if revision is None else f"{repo}@{revision}"
        raise MissingArtifactError(
            f"{name} is no folder here and not on the Hub, or not for you to see; check the name, or log in "
            "with `hf auth login`"
        ) from None
    except (HfHubHTTPError, OSError, unanswered()) as error:
        raise HubError(f"{no_folder}; {explained(error, repo, pushed=False)}") from None


def check_name(repo: str) -> None:
    """Refuse a name that no repository can have.

    Raises:
        ConfigError: says what is wrong with it.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{repo!r} is no name of a repository: {reason}") from None


def check_login() -> None:
    """Refuse to begin what ends with a push that the Hub will not take.

    Raises:
        ConfigError: nobody is logged in, or with a token that is no longer valid.
        HubError: the Hub cannot be reached.
    """
    try:
        HfApi().whoami()
    except (HfHubHTTPError, OSError, unanswered()) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
            raise ConfigError(
                "--push-to-hub: nobody is logged in to the Hub, or with a token that is not valid; run `hf "
                "auth login`, or set $HF_TOKEN"
            ) from None
        raise HubError(explained(error, "--push-to-hub")) from None


def unanswered() -> type[Exception]:
    """What huggingface_hub lets through where no answer comes: an error of its HTTP client, which is httpx in
    release 1 and httpx2 in release 2."""
    client = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    found: type[Exception] = client.HTTPError
    return found


def listing(folder: Path) -> list[tuple[str, int]]:
    """What would be pushed: names and bytes."""
    return [
        (path.relative_to(folder).as_posix(), path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def refuse_private(folder: Path) -> None:
    """Stop if a package holds interactions, tokens, or paths of this machine.

    Raises:
        ConfigError: names file and place, and all paths at once.
    """
    from llmrec.inference.package import ENDINGS, MANIFEST, NOT_HASHED

    made = set(NOT_HASHED)
    if (folder / MANIFEST).is_file():
        made |= set(read_json(folder / MANIFEST)["files"])
    texts = []
    for name, _ in listing(folder):
        path = folder / name
        if name not in made or not name.endswith((*ENDINGS, ".gitattributes")):
            raise ConfigError(
                f"{name} is not part of a recommender and is not pushed; take it out of {folder}"
            )
        if path.suffix not in (".json", ".jsonl", ".md"):
            continue
        text = path.read_text(encoding="utf-8")
        if SECRETS.search(text):
            raise ConfigError(
                f"{name} holds what looks like an access token; take it out, and revoke the token"
            )
        texts += [(name, place, value) for place, value in texts_of(path, text)]
    refuse_paths(texts)


def refuse_paths(texts: list[tuple[str, str, str]]) -> None:
    """Stop if texts, given as file, place and text, are or hold paths of this machine.

    Raises:
        ConfigError: names all of them.
    """
    settings, lines = [], []
    for name, place, value in texts:
        found = IN_TEXT.search(value)
        if name.endswith(".md"):
            lines += [(name, place, found.group(1))] if found else []
        elif found or LOCAL_PATH.match(value) or ("/" in value and os.path.isdir(value)):
            settings.append((name, place, value))
    if not settings and not lines:
        return
    shown = ", ".join(f"{name}: {place} ({value})" for name, place, value in settings + lines)
    advice = f"take them out of {lines[0][0]}" if lines else ""
    if settings:
        # The card is written from the settings, so that its lines change with them.
        olds = dict.fromkeys(value for _, _, value in settings)
        pairs = " ".join(f"{shlex.quote(old)}=HUB_ID" for old in olds)
        advice = f"push or package the run folder with --rename {pairs} (or any other text for HUB_ID)"
    raise ConfigError(f"these are paths of this machine: {shown}; {advice}")


def texts_of(path: Path, text: str) -> Iterator[tuple[str, str]]:
    """Every text in a file with the place where it stands."""
    if path.suffix == ".md":
        for number, line in enumerate(text.splitlines(), start=1):
            yield f"line {number}", line
        return
    documents = text.splitlines() if path.suffix == ".jsonl" else [text]
    for number, document in enumerate(documents, start=1):
        prefix = f"line {number} " if path.suffix == ".jsonl" else ""
        yield from ((prefix + place, value) for place, value in leaves(json.loads(document), ""))


def leaves(value: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{place}[{number}]")
    elif isinstance(value, str):
        yield place, value


def explained(error: Exception, repo: str, *, pushed: bool = True) -> str:
    """What went wrong and what to do, without any token.

    Args:
        error: of the Hub's client.
        repo: owner/name.
        pushed: whether something was to be sent there, not fetched.
    """
    again = "push again later, what was uploaded is kept"
    if not pushed:
        again = "try again later, what was fetched is kept; or give a folder that is here"
    status = getattr(getattr(error, "response", None), "status_code", None)
    advice = {
        401: "log in with `hf auth login`, or give a token with write access",
        403: "the token may not write there; use one with write access, or another owner",
        404: "there is no such repository, or it is not for you to see",
        409: "someone else changed it at the same moment; push again",
        413: "a file is too large for this Hub",
        429: "too many requests; wait a few minutes and try again, what was sent is kept",
    }.get(status or 0, again)
    if status is None:
        advice = f"see whether this machine reaches it, and whether its address is right; {advice}"
    reason = SECRETS.sub("<token>", " ".join(str(error).split()))[:300]
    return f"{repo}: the Hub said {status or 'nothing'} ({reason}); {advice}"
