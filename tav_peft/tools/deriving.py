"""What an adapter that is made of another remembers of it."""

from __future__ import annotations

from typing import Any

from tav_peft.adapter import Adapter, Derivation, Provenance
from tav_peft.hashes import TENSORS_HASH
from tav_peft.tensor_file import FileTensors, hash_tensors


def derived(adapter: Adapter, name: str, tool: str, **settings: Any) -> Provenance:
    """Give an adapter's provenance with what a tool did to it, and without its probe, which holds no more.

    `settings` that are None are left out.
    """
    done = Derivation(
        tool=tool,
        name=name,
        fingerprint=_fingerprint(adapter),
        settings={key: value for key, value in settings.items() if value is not None},
    )
    said = adapter.provenance
    return said.model_copy(update={"probe": None, "derived_from": (*said.derived_from, done)})


def _fingerprint(adapter: Adapter) -> str:
    """Hash an adapter's tensors; where they are in a file, take its header's word, which `tav verify` checks."""
    known = adapter.tensors.metadata.get(TENSORS_HASH) if isinstance(adapter.tensors, FileTensors) else None
    return known or hash_tensors(adapter.tensors)
