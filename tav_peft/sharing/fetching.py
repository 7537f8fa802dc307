"""What an adapter is called: a path, an https address of a file, or a name on the hub."""

from __future__ import annotations

import re
from pathlib import Path

from tav_peft.sharing import address, hub

_FILES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".zip"}


def fetch(adapter: str | Path) -> Path:
    """Give the path of an adapter: itself if it is one, else that of what was downloaded from an address or the hub.

    A name on the hub is `user/name`, or `user/name@revision`. What exists on this disk comes before it, and what is
    called like a file is never looked for there; a path to nothing is given back, for its reader to say so.

    Raises:
        AdapterError: when it cannot be downloaded and is not in a cache.

    """
    # a Path has made one slash of two
    name = re.sub(r"^(https?):/+", r"\1://", str(adapter))
    if re.match(r"https?://", name):
        return address.download(name)
    path = Path(adapter)
    repository, _, revision = name.partition("@")
    if path.exists() or path.suffix in _FILES or not hub.NAME.fullmatch(repository):
        return path
    return hub.download(repository, revision or None)
