"""Adapters on the Hugging Face hub: downloaded into its cache, and uploaded when told to."""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import cast

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tav_peft.errors import AdapterError, TavError
from tav_peft.sharing.address import LIMIT, size_text

NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
SAMPLES = "samples"  # folder of a published adapter's pictures
_PEFT = ("adapter_config.json", "adapter_model.safetensors")
# what the hub's client raises when nothing answers is its HTTP library's, which differs between its versions
_FAILURES: tuple[type[Exception], ...] = (OSError, cast("type[Exception]", HfHubHTTPError.__mro__[1]))
# those of an upload: a card that the hub does not accept, and what the client packs a failing file's reason into
_REFUSALS: tuple[type[Exception], ...] = (*_FAILURES, ValueError, RuntimeError)

_LOG = logging.getLogger(__name__)


def download(name: str, revision: str | None = None) -> Path:
    """Give the adapter of a repository of the hub: its one .safetensors file, or a folder of PEFT.

    Only that is downloaded. What is in the hub's cache is not downloaded again; without a network, or with
    HF_HUB_OFFLINE=1, it is taken from there.

    Raises:
        AdapterError: when there is no such repository, no one adapter in it, or the network is needed and not there.

    """
    api = HfApi(library_name="tav-peft")
    try:
        info = api.model_info(name, revision=revision, files_metadata=True)
        sizes = {each.rfilename: each.size or 0 for each in info.siblings or ()}
        chosen = _choose(sizes, name, revision)
        _announce(name, info.sha, {each: sizes[each] for each in chosen})
        folder = api.snapshot_download(name, revision=revision, allow_patterns=chosen)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise AdapterError(_absence(name, revision, error)) from None
    except _FAILURES as error:
        if getattr(error, "errno", None) == errno.ENOSPC:  # nothing of the hub's
            raise
        return _from_cache(api, name, revision, error)
    return _adapter_in(Path(folder), name, revision)


def upload(folder: Path, name: str, *, private: bool = False) -> str:
    """Upload a published folder as one commit, making the repository if there is none, and give the commit's address.

    `create_commit` is used, as `upload_folder` may make several. Pictures of an earlier publication are replaced.

    Raises:
        TavError: without a token or a network, where the token may not write, or the repository is not fit for it.

    """
    files = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    api = HfApi(library_name="tav-peft")
    try:
        # not asked for, it is as the owner's settings have it
        api.create_repo(name, private=private or None, exist_ok=True)
        info = api.model_info(name)
        there = {each.rfilename for each in info.siblings or ()}
        _check_fit(name, there, files, wanted_private=private, is_private=bool(info.private))
        stale = sorted(each for each in there - files.keys() if each.startswith(f"{SAMPLES}/"))
        done = api.create_commit(
            name,
            [CommitOperationAdd(each, path) for each, path in files.items()]
            + [CommitOperationDelete(each) for each in stale],
            commit_message="Publish with tav-peft",
        )
    except _REFUSALS as error:
        raise TavError(f"Nothing was uploaded to {name}: {_why_not(name, error)}") from None
    return str(done.commit_url)


def check_upload(name: str) -> None:
    """Refuse an upload that cannot be, before anything is made for it.

    Raises:
        TavError: for an impossible name, or without a token.

    """
    if not NAME.fullmatch(name):
        raise TavError(f"{name} is no name on the hub. Give one like user/name.")
    if constants.HF_HUB_OFFLINE:
        raise TavError("HF_HUB_OFFLINE forbids to upload. Unset it.")
    if get_token() is None:
        raise TavError("There is no token to upload with. Log in with `hf auth login`, or set HF_TOKEN.")


# -- what to download --------------------------------------------------------------------------------------


def _choose(names: Iterable[str], name: str, revision: str | None) -> list[str]:
    """Choose the files of a repository's one adapter, from those at its top."""
    top = sorted(each for each in names if "/" not in each and "\\" not in each)
    if {*_PEFT} <= {*top}:
        return [*_PEFT]
    files = [each for each in top if fnmatch(each, "*.safetensors")]
    if not files:
        pickles = [each for each in top if each.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        advice = (
            f"{pickles[0]} is a pickle, which is not read." if pickles else "Is it a base? Give it as --base."
        )
        raise AdapterError(f"{name} on the hub has no .safetensors file at its top. {advice}")
    if len(files) > 1:
        address = f"{constants.ENDPOINT}/{name}/resolve/{revision or 'main'}/{files[0]}"
        raise AdapterError(
            f"{name} on the hub has {len(files)} .safetensors files ({', '.join(files[:3])}…). Give the address of one, "
            f"such as {address}"
        )
    return files


def _adapter_in(folder: Path, name: str, revision: str | None) -> Path:
    chosen = _choose([path.name for path in folder.iterdir()], name, revision)
    return folder if len(chosen) > 1 else folder / chosen[0]


def _announce(name: str, commit: str | None, sizes: dict[str, int]) -> None:
    """Say what will be downloaded, unless all of it is in the cache."""
    missing = [
        each for each in sizes if not isinstance(try_to_load_from_cache(name, each, revision=commit), str)
    ]
    size = sum(sizes[each] for each in missing)
    if size > LIMIT:
        raise AdapterError(
            f"{name}: {missing[0]} has {size_text(size)}, more than any adapter. Is it a base?"
        )
    if missing:
        told = (", ".join(missing), name, constants.ENDPOINT, size_text(size))
        _LOG.warning("Downloading %s of %s from %s (%s).", *told)


def _from_cache(api: HfApi, name: str, revision: str | None, error: Exception) -> Path:
    """Take what was downloaded before, or say why it cannot be downloaded now."""
    try:
        # no patterns: where the snapshot is; the client's check for completeness would ask for more than the adapter
        folder = Path(
            api.snapshot_download(name, revision=revision, allow_patterns=[], local_files_only=True)
        )
        adapter = _adapter_in(folder, name, revision)
    except (LocalEntryNotFoundError, AdapterError):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _first_line(error)
        raise AdapterError(
            f"{name} is no path here, it is not in the hub's cache, and {constants.ENDPOINT} cannot be asked for it "
            f"({why}). Check the name, go online once, or give a file."
        ) from None
    if not constants.HF_HUB_OFFLINE:
        _LOG.warning("%s cannot be reached; %s is taken from the cache.", constants.ENDPOINT, name)
    return adapter


def _absence(name: str, revision: str | None, error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return f"{name} on the hub asks for consent first. Give it at {constants.ENDPOINT}/{name}, then `hf auth login`."
    if isinstance(error, RevisionNotFoundError):
        return f"{name} on the hub has no revision {revision}. Give a branch, a tag or a commit, or none."
    return (
        f"{name} is neither a path here nor a repository on the hub that may be read. Check the name; for a private one, "
        "log in with `hf auth login`."
    )


# -- what to upload ----------------------------------------------------------------------------------------


def _check_fit(
    name: str, there: set[str], files: dict[str, Path], *, wanted_private: bool, is_private: bool
) -> None:
    if wanted_private and not is_private:
        raise TavError(
            f"{name} is there already and is public. Make it private in its settings, or choose another name."
        )
    others = sorted(
        each for each in there - files.keys() if "/" not in each and each.endswith(".safetensors")
    )
    if others:
        raise TavError(f"{name} has another adapter already ({others[0]}). Choose another repository.")


def _why_not(name: str, error: Exception) -> str:
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the hub does not know the token. Log in again with `hf auth login`."
    if status == 403:
        return f"the token may not write to {name}. Make one that may, or choose a name of your own."
    if isinstance(error, (BadRequestError, ValueError)) or status is not None:
        return f"{constants.ENDPOINT} refuses it ({' '.join(str(error).split())[:300]})."
    return (
        f"{constants.ENDPOINT} cannot be reached ({_first_line(error)}). Check the network, then try again."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
