"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from tav_peft.errors import TavError

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


@contextmanager
def whole(
    path: Path, error: type[TavError], *, failures: tuple[type[Exception], ...] = (OSError,)
) -> Iterator[Path]:
    """Give a name beside the path to write to; flush it and move it over the path at the end, or remove it.

    Parent folders are made. A failure leaves what was at the path before, and is raised as `error`. What a killed
    process left of an earlier attempt at the same path is removed.
    """
    part = path.with_name(f"{_beginning(path)}{os.getpid()}-{uuid4().hex[:6]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_strays(path)
        yield part
        _flush(part)
        _move(part, path)
        _flush_folder(path.parent)
    except failures as failure:
        reason = getattr(failure, "strerror", None) or str(failure)
        raise error(
            f"{path} cannot be written: {reason}. Nothing was changed; choose another place."
        ) from failure
    finally:
        _remove(part)


def _beginning(path: Path) -> str:
    """Begin the names of unfinished files for a path: hashes, since the path's own name may be as long as names get."""
    return f".{_short_hash(path.name)}-{_short_hash(socket.gethostname())}-"


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:8]


def _clear_strays(path: Path) -> None:
    """Remove what dead processes of this machine left beside the path, and put back a folder that they set aside."""
    for stray in sorted(path.parent.glob(f"{_beginning(path)}*")):
        process = stray.name.split("-")[2]
        if not process.isdecimal() or _runs(int(process)):
            continue
        if stray.suffix == ".old" and not path.exists():
            os.replace(stray, path)
        else:
            _remove(stray)


def _runs(process: int) -> bool:
    if os.name == "nt":  # where asking like this would stop it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flush(part: Path) -> None:
    for path in [part, *part.rglob("*")]:
        if path.is_dir():
            _flush_folder(path)
            continue
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make new names last, where the system can do that for a folder."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _move(part: Path, path: Path) -> None:
    if not (part.is_dir() and path.is_dir()):
        os.replace(part, path)
        return
    if _exchange(part, path):  # what was there is removed with the part's name
        return
    aside = part.with_suffix(".old")  # a folder cannot replace a folder that has files in it
    os.replace(path, aside)
    try:
        os.replace(part, path)
    except OSError:
        os.replace(aside, path)
        raise
    _remove(aside)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once, where the system can (Linux, on most file systems)."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def _remove(part: Path) -> None:
    if part.is_dir():
        shutil.rmtree(part, ignore_errors=True)
    else:
        with suppress(OSError):
            part.unlink()
