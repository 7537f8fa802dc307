"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from tav_peft.errors import TavError


@contextmanager
def whole(
    path: Path, error: type[TavError], *, failures: tuple[type[Exception], ...] = (OSError,)
) -> Iterator[Path]:
    """Give a name beside the path to write to; flush it and move it over the path at the end, or remove it.

    Parent folders are made. A failure leaves what was at the path before, and is raised as `error`.
    """
    part = path.with_name(f".{uuid4().hex[:12]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        _flush(part)
        _move(part, path)
    except failures as failure:
        reason = getattr(failure, "strerror", None) or str(failure)
        raise error(
            f"{path} cannot be written: {reason}. Nothing was changed; choose another place."
        ) from failure
    finally:
        _remove(part)


def _flush(part: Path) -> None:
    for path in [part] if part.is_file() else [inside for inside in part.rglob("*") if inside.is_file()]:
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _move(part: Path, path: Path) -> None:
    if not (part.is_dir() and path.is_dir()):
        os.replace(part, path)
        return
    aside = part.with_suffix(".old")  # a folder cannot replace a folder that has files in it
    os.replace(path, aside)
    try:
        os.replace(part, path)
    except OSError:
        os.replace(aside, path)
        raise
    _remove(aside)


def _remove(part: Path) -> None:
    if part.is_dir():
        shutil.rmtree(part, ignore_errors=True)
    else:
        with suppress(OSError):
            part.unlink()
