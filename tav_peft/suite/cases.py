"""What a suite edits: a clip, its caption, and a prompt for each of LOVEU-TGVE-2023's four kinds of edit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tav_peft.pocket.clips import PocketClip
from tav_peft.video.clip import Clip

KINDS = ("style", "object", "background", "multiple")


@dataclasses.dataclass(frozen=True)
class Case:
    """A clip of a set, and what is asked of it; `truth` is all that is known of one of pocket's."""

    group: str
    name: str
    caption: str
    prompts: Mapping[str, str]
    frames: Path | None = None
    truth: PocketClip | None = None

    @property
    def key(self) -> str:
        """Name the case in files."""
        return f"{self.group}/{self.name}"

    def clip(self, **how: Any) -> Clip:
        """Read the frames that a recipe asks for (`how`), or draw them."""
        if self.frames is not None:
            return Clip.read(self.frames, **how)
        assert self.truth is not None
        return self.truth.render()
