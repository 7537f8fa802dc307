"""Other tools' adapter formats, one file each; `read` recognises what it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from tav_peft.adapter import Adapter
from tav_peft.errors import AdapterError
from tav_peft.formats import diffusers, image_part, inflated, kohya, lycoris, official_folder, peft
from tav_peft.formats.image_part import LeftOut
from tav_peft.formats.loaded_base import LoadedBase
from tav_peft.sharing.fetching import fetch


class Format(Protocol):
    """What the module of a format offers that holds an adapter, or those parts of it that image models have."""

    def write(self, adapter: Adapter, path: Path) -> Path:
        """Write an adapter in this format."""
        ...


class ModelFormat(Protocol):
    """What the module of a format offers that holds a whole model, the adapter in it."""

    def write(self, adapter: Adapter, path: Path, base: LoadedBase) -> Path:
        """Write a base with an adapter in this format."""
        ...


FORMATS: dict[str, Format] = {"peft": peft, "diffusers": diffusers, "kohya": kohya, "lycoris": lycoris}
IMAGE_FORMATS = ("diffusers", "kohya", "lycoris")  # which have a place for query projections only
MODEL_FORMATS: dict[str, ModelFormat] = {"official": official_folder, "inflated": inflated}


def left_out(adapter: Adapter, to: str) -> list[LeftOut]:
    """Say what of an adapter a format has no place for: the clip's latents, and T-Attn where it is one for images."""
    absent = image_part.left_out(adapter)
    return absent if to in IMAGE_FORMATS else [each for each in absent if each.part == "latents"]


def open_adapter(path: str | Path) -> Adapter:
    """Do as `read`, but of a file of ours read each tensor when it is asked for."""
    path = Path(path)
    return read(path) if path.is_dir() else Adapter.open(path)


def read(path: str | Path, *, hashes: bool = True) -> Adapter:
    """Read an adapter: one of our files, or a PEFT folder that `tav export` wrote; or what `fetch` finds by its name.

    A file that has changed since it was written is refused, by its own hashes, unless `hashes` is off.

    Raises:
        AdapterError: when there is nothing, or nothing that can be read.

    """
    path = fetch(path)
    if (path / "unet").is_dir():
        raise AdapterError(
            f"{path} is a whole model. If the original code tuned it, `tav import {path} --base …` makes it an adapter."
        )
    reader = peft.read if path.is_dir() else Adapter.load
    return reader(path, hashes=hashes)
