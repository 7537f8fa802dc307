"""The folder of inversions that are kept, each under the hash of what it depends on; torch is not imported."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tav_peft.sharing.address import cache_folder

LIMIT = 8_000_000_000  # bytes of all files together
_LONGEST = 1_000_000  # of an inversion's header


@dataclasses.dataclass(frozen=True)
class Kept:
    """A file of the cache, and what its header says of the inversion, unchecked."""

    path: Path
    bytes: int
    used: float  # seconds since 1970
    info: Mapping[str, Any]


class InversionCache:
    """A folder of inversions. Of more than `limit` bytes those that were used longest ago are let go of."""

    def __init__(self, folder: Path | None = None, limit: int = LIMIT) -> None:
        self.folder = cache_folder() / "inversions" if folder is None else folder
        self.limit = limit

    def path(self, key: str) -> Path:
        """Give the file of a key, whether it is there or not."""
        return self.folder / f"{key}.safetensors"

    def entries(self) -> list[Kept]:
        """List what is kept, used last first."""
        found = []
        for path in self.folder.glob("*.safetensors"):
            with contextlib.suppress(OSError):
                stat = path.stat()
                found.append(Kept(path, stat.st_size, stat.st_mtime, _info(path)))
        return sorted(found, key=lambda kept: kept.used, reverse=True)

    def use(self, path: Path) -> None:
        """Note that a file is used now."""
        with contextlib.suppress(OSError):  # a cache that may only be read is a cache still
            path.touch()

    def shrink(self, but: Path) -> None:
        """Let go of what was used longest ago, as far as there is too much; one file stays."""
        total = 0
        for kept in self.entries():
            total += kept.bytes
            if total > self.limit and kept.path != but:
                kept.path.unlink(missing_ok=True)

    def clear(self) -> int:
        """Remove everything; return how many bytes that were."""
        entries = self.entries()
        for kept in entries:
            kept.path.unlink(missing_ok=True)
        return sum(kept.bytes for kept in entries)


def _info(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            told = json.loads(file.read(length)) if length <= _LONGEST else {}
        info = json.loads(told["__metadata__"]["tav_peft_inversion"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError, struct.error):
        return {}
    return info if isinstance(info, dict) else {}
