"""The hashes that a file's header tells of itself, without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

TENSORS_HASH, HEADER_HASH = "tensors_sha256", "header_sha256"  # entries of a hashed file's header


def hash_header(metadata: Mapping[str, str]) -> str:
    """Hash a header's metadata but for this hash itself (SHA-256, hex)."""
    others = {name: value for name, value in metadata.items() if name != HEADER_HASH}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def is_hashed(metadata: Mapping[str, str]) -> bool:
    """Tell whether a file was written with hashes; one of the two may be lost since."""
    return not {TENSORS_HASH, HEADER_HASH}.isdisjoint(metadata)
