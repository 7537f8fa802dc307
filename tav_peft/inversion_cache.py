"""Inversions kept by what they are of, so that the same clip is not inverted twice."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tav_peft.control.steering import Control
from tav_peft.errors import AdapterError
from tav_peft.inversion import Inversion
from tav_peft.pipeline import Progress, TuneAVideoPipeline
from tav_peft.sharing.address import cache_folder
from tav_peft.tensor_file import FileTensors
from tav_peft.video.clip import Clip

_LOG = logging.getLogger(__name__)
FORMAT = 1  # goes up when the same settings would be inverted to something else
_SAMPLED = 256  # values of each tensor
LIMIT = 8_000_000_000  # bytes of all files together; those that were used longest ago go first


@dataclasses.dataclass(frozen=True)
class Kept:
    """A file of the cache, and what its header says of the inversion."""

    path: Path
    bytes: int
    used: float  # seconds since 1970
    info: Mapping[str, Any]


class InversionCache:
    """A folder of inversions, each under the hash of all that it depends on but its depth.

    A deeper one has the others in it. Of more than `limit` bytes those that were used longest ago are let go of.
    """

    def __init__(self, folder: Path | None = None, limit: int = LIMIT) -> None:
        self.folder = cache_folder() / "inversions" if folder is None else folder
        self.limit = limit

    def get(self, key: str, depth: float) -> Inversion | None:
        """Give the inversion of a key if it is there, whole and deep enough."""
        path = self._path(key)
        try:
            inversion = Inversion.load(path)
        except AdapterError:  # not there, or damaged: it is made again
            return None
        if inversion.depth + 1e-9 < depth:
            return None
        with contextlib.suppress(OSError):  # a cache that may only be read is a cache still
            path.touch()
        return inversion

    def put(self, key: str, inversion: Inversion) -> None:
        """Keep an inversion, and let go of those that were used longest ago when there are too many.

        Raises:
            AdapterError: when it cannot be written.

        """
        inversion.save(self._path(key))
        total = 0
        for kept in self.entries():  # the one used last comes first, and stays
            total += kept.bytes
            if total > self.limit and kept.path != self._path(key):
                kept.path.unlink(missing_ok=True)

    def entries(self) -> list[Kept]:
        """List what is kept, used last first."""
        found = []
        for path in self.folder.glob("*.safetensors"):
            with contextlib.suppress(OSError):
                stat = path.stat()
                found.append(Kept(path, stat.st_size, stat.st_mtime, _info(path)))
        return sorted(found, key=lambda kept: kept.used, reverse=True)

    def clear(self) -> int:
        """Remove everything; return how many bytes that were."""
        entries = self.entries()
        for kept in entries:
            kept.path.unlink(missing_ok=True)
        return sum(kept.bytes for kept in entries)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def invert_once(
    pipe: TuneAVideoPipeline,
    source: Clip | Tensor,
    cache: InversionCache,
    *,
    controls: Sequence[Control] = (),
    progress: Progress | None = None,
    **inverting: Any,
) -> tuple[Inversion, bool]:
    """Invert a clip, or take what the cache has of the same inversion; say which it was (True: from the cache).

    `inverting` are the arguments of `pipe.invert`. What is in the cache is the same bytes as what would be computed, on
    the same kind of device.
    """
    depth = inverting.get("depth", 1.0)
    others = {name: value for name, value in inverting.items() if name != "depth"}
    key = _key({**others, **_depends_on(pipe, source, controls)})
    kept = cache.get(key, depth)
    if kept is not None:
        return kept, True
    inversion = pipe.invert(source, controls=controls, progress=progress, **inverting)
    try:
        cache.put(key, inversion)
    except AdapterError as error:  # no room for it: the inversion itself is there
        _LOG.warning("The inversion is not kept for the next time: %s", error)
    return inversion, False


def _key(depends_on: Mapping[str, Any]) -> str:
    text = json.dumps({"format": FORMAT, **depends_on}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _depends_on(
    pipe: TuneAVideoPipeline, source: Clip | Tensor, controls: Sequence[Control]
) -> dict[str, Any]:
    scheduler = pipe.inversion_scheduler().config
    nothing = pipe.encode_prompts([""]).text
    return {
        **pipe.inverted_with(controls),
        "source": source.fingerprint if isinstance(source, Clip) else _sample_hash({"": source}, every=True),
        "scheduler": {name: scheduler[name] for name in sorted(scheduler) if not name.startswith("_")},
        "text": _sample_hash({"": nothing}, every=True),
        "unet": _sample_hash(pipe.unet.state_dict()),
        "vae": _sample_hash(pipe.vae.state_dict()),
        "device": pipe.device.type,
    }


def _sample_hash(tensors: Mapping[str, Tensor], *, every: bool = False) -> str:
    """Hash names, dtypes, shapes and up to some hundred evenly chosen values of each tensor, or every value.

    A base's fingerprint looks at the query projections alone; two bases may differ elsewhere only.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        values = tensor.detach().flatten()
        chosen = values if every else values[:: max(1, len(values) // _SAMPLED)]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(chosen.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _info(path: Path) -> Mapping[str, Any]:
    try:
        info = json.loads(FileTensors(path).metadata.get("tav_peft_inversion", "{}"))
    except (AdapterError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}
