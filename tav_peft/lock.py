"""A lock on an output: of several runs that would write it, one does."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from tav_peft.errors import TavError

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(path: Path, subject: str, error: type[TavError]) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; the system lets go of it when the process ends in any way.

    `subject` is what the lock is for, in the message.

    Raises:
        TavError: as `error`, at once, when another process holds it, or its folder cannot be written.

    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _taken(path)
    except OSError as failure:
        raise error(
            f"{subject} cannot be written: {failure.strerror}. Nothing was changed; choose another place."
        ) from failure
    if file is None:
        raise error(f"{subject} is being written by {_holder(path)}. Wait for it, or choose another output.")
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        file.close()


def _taken(path: Path) -> IO[str] | None:
    """Open and lock the file, with a note of who did; None when another process has it."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError:
            pass  # a file system without locks
        # the former holder may have removed the file between the two calls
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            return file
        file.close()


def _holder(path: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8")[:200] or "another process"
    return "another process"
