"""Where an adapter's clip is when an edit needs it: given, inside the adapter, or near it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from tav_peft.adapter import Adapter
from tav_peft.errors import ClipError
from tav_peft.recipe import Recipe
from tav_peft.video.clip import Clip


def source_of(
    adapter: Adapter, adapter_path: Path | None = None, clip_path: Path | None = None
) -> Clip | Tensor:
    """Find the clip to edit: the path given, else the latents inside the adapter, else the clip's file nearby.

    A file nearby (beside the adapter, or in the current folder) counts only if its frames are those tuned on. A path
    that is given may be any clip; it is read as the adapter's recipe says.

    Raises:
        ClipError: when there is none; it names the clip and the ways to give it.
    """
    if clip_path is not None:
        return read_as_tuned(adapter, clip_path)
    if adapter.latents is not None:
        return adapter.latents
    clip = clip_nearby(adapter, adapter_path)
    if clip is None:
        raise ClipError(
            f"The adapter was tuned on {adapter.provenance.clip.name or 'a clip without a name'}, which is not beside it "
            "and not in it. Give the clip with --clip, or tune with --keep-latents."
        )
    return clip


def clip_nearby(adapter: Adapter, adapter_path: Path | None = None) -> Clip | None:
    """Find the clip an adapter was tuned on, beside its file or in the current folder, by name and by its frames."""
    info = adapter.provenance.clip
    folders = [adapter_path.parent] if adapter_path is not None else []
    for folder in [*folders, Path.cwd()]:
        file = folder / info.name
        if info.name and file.is_file():
            clip = read_as_tuned(adapter, file)
            if clip.fingerprint == info.fingerprint:
                return clip
    return None


def read_as_tuned(adapter: Adapter, path: Path) -> Clip:
    """Read a clip with the frames and the size that the adapter's recipe asks for."""
    section = Recipe.model_validate(adapter.provenance.recipe).clip
    return Clip.read(path, **section.model_dump())
