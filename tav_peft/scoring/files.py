"""Score video files: the edit is read at its source's size, and a pocket clip is known by the truth beside it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tav_peft.errors import TavError
from tav_peft.pocket import truth
from tav_peft.pocket.clips import PocketClip
from tav_peft.pocket.world import PIXELS
from tav_peft.scoring import score
from tav_peft.scoring.result import Score
from tav_peft.video.clip import Clip


@dataclasses.dataclass(frozen=True)
class Source:
    """What edits were made of: the frames, what they show, and, of a pocket clip, all that is known of it."""

    clip: Clip
    caption: str | None = None
    truth: PocketClip | None = None

    @classmethod
    def read(cls, path: Path, caption: str | None = None, **how: Any) -> Source:
        """Read a source; `how` are the arguments of `Clip.read`. Not given, all its frames, of a pocket clip at 64x64.

        Raises:
            ClipError: when it cannot be read, or the truth beside it is damaged.

        """
        known = truth.beside(path)
        how = how or {"size": PIXELS if known else None, "multiple": 1}
        return cls(Clip.read(path, **how), caption or (known.caption if known else None), known)


def score_file(
    edit: Path,
    prompt: str,
    *,
    source: Source | None = None,
    mask: Path | None = None,
    reconstruction: Path | None = None,
    **models: Any,
) -> list[Score]:
    """Score an edited video by all that is given; `models` are those of `score`.

    Edit, mask and reconstruction are read at the source's size. A mask may be a picture, meant for all frames.

    Raises:
        TavError: when a file cannot be read, has other frames than the source, or a model cannot be loaded.

    """
    if source is None:
        clips = [_read(path, None) for path in (edit, mask, reconstruction)]
        return score(_there(clips[0]), prompt, mask=clips[1], reconstruction=clips[2], **models)
    size = (source.clip.width, source.clip.height)
    made, masked, again = (_read(path, size) for path in (edit, mask, reconstruction))
    made = _there(made)
    if made.frames != source.clip.frames:
        raise TavError(
            f"{edit} has {made.frames} frames, its source {source.clip.frames}. Give the adapter too "
            "(--adapter), whose recipe says which frames were used."
        )
    known = source.truth
    fits = known is not None and size == (PIXELS, PIXELS) and made.frames == len(known.path)
    ideal = truth.asked_of(known, prompt) if known and fits else None
    return score(
        made, prompt, source=source.clip, caption=source.caption, mask=masked, reconstruction=again,
        ideal=ideal, **models,
    )  # fmt: skip


def _read(path: Path | None, size: tuple[int, int] | None) -> Clip | None:
    return None if path is None else Clip.read(path, size=size, fit="squash", multiple=1)


def _there(clip: Clip | None) -> Clip:
    assert clip is not None
    return clip
