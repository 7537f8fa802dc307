"""What an adapter's file says of itself in its header; no tensor is read, and torch is not imported."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tav_peft.hashes import HEADER_HASH, hash_header, is_hashed
from tav_peft.methods import METHODS, method_of
from tav_peft.presets import PARTS

FORMAT_VERSION = 1
PREVIEW = "modelspec.thumbnail"  # as ModelSpec calls a small picture in a header, which is a data URL
_PREVIEW_FORM, _LARGEST_PREVIEW = "data:image/webp;base64,", 1_000_000
_SOURCE = "source."  # how the names of what a file carries of its clip begin
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_LONGEST = 100_000_000  # the longest header that the safetensors library reads, in bytes


@dataclasses.dataclass(frozen=True)
class Header:
    """The provenance and the PEFT config as they stand in a file, unchecked, its tensors' sizes by name, its preview."""

    provenance: Mapping[str, Any]
    peft_config: Mapping[str, Any] | None
    sizes: Mapping[str, tuple[int, int]]
    preview: bytes | None = None

    def summary(self) -> dict[str, Any]:
        """Count tensors, parameters and bytes, in all and for each part."""
        return summarise(self.sizes, self.provenance["subset"]["preset"], self.peft_config, self.preview)


def read_header(path: Path) -> Header | None:
    """Read the header of an adapter's file; None where it has none that is whole and of this version.

    What is wrong then, reading the whole adapter says. The file's length is compared with the header's.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            told = json.loads(file.read(length)) if length <= _LONGEST else {}
        metadata, entries = told.pop("__metadata__"), told
        provenance, config = (json.loads(metadata[key]) for key in ("tav_peft", "peft_config"))
        sizes = {name: _size(entry) for name, entry in entries.items()}
        whole = 8 + length + sum(count for _, count in sizes.values()) == path.stat().st_size
        header = Header(provenance, config, sizes, parse_preview(metadata))
        header.summary()
        whole = whole and (not is_hashed(metadata) or metadata.get(HEADER_HASH) == hash_header(metadata))
        return header if whole and provenance["format_version"] <= FORMAT_VERSION else None
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        StopIteration,
        RecursionError,
        struct.error,
    ):
        return None


def spell_preview(picture: bytes) -> str:
    """Spell a WebP as its header's entry."""
    return _PREVIEW_FORM + base64.b64encode(picture).decode()


def parse_preview(metadata: Mapping[str, str]) -> bytes | None:
    """Read the WebP of a header's metadata; it is not decoded.

    Raises:
        ValueError: when the entry is something else, or larger than any preview.

    """
    text = metadata.get(PREVIEW)
    if text is None:
        return None
    if not text.startswith(_PREVIEW_FORM) or len(text) > _LARGEST_PREVIEW:
        raise ValueError("is no small WebP")
    picture = base64.b64decode(text.removeprefix(_PREVIEW_FORM), validate=True)
    if (picture[:4], picture[8:12]) != (b"RIFF", b"WEBP"):
        raise ValueError("is no small WebP")
    return picture


def summarise(
    sizes: Mapping[str, tuple[int, int]],
    preset: str,
    config: Mapping[str, Any] | None,
    preview: bytes | None = None,
) -> dict[str, Any]:
    """Sum up an adapter's tensors by part, from how many parameters and bytes each of them has."""
    parts: dict[str, dict[str, int]] = {}
    for name, (parameters, count) in sizes.items():
        if not name.startswith(_SOURCE):
            row = parts.setdefault(_part(name), {"tensors": 0, "parameters": 0, "bytes": 0})
            row["tensors"] += 1
            row["parameters"] += parameters
            row["bytes"] += count
    method = METHODS[method_of(config)]
    return {
        "preset": preset,
        "method": None if config is None else method_of(config),
        "rank": None if config is None else method.rank(config),
        "alpha": None if config is None else config.get(method.alpha),
        "parts": parts,
        "parameters": sum(row["parameters"] for row in parts.values()),
        "bytes": sum(row["bytes"] for row in parts.values()),
        "carries_latents": any(name.startswith(_SOURCE) for name in sizes),
        "preview_bytes": None if preview is None else len(preview),
    }


def _size(entry: Mapping[str, Any]) -> tuple[int, int]:
    if not all(isinstance(side, int) and side >= 0 for side in entry["shape"]):
        raise ValueError("a shape is not of whole numbers")  # a text times a number would be a long text
    parameters = math.prod(entry["shape"])
    return parameters, parameters * _BYTES[entry["dtype"]]


def _part(tensor: str) -> str:
    return next(part for part, ends in PARTS.items() for end in ends if f".{end}." in tensor)
