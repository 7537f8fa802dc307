"""What was asked for when a video was made, as JSON beside it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tav_peft.errors import ClipError
from tav_peft.whole import whole

_KEY = "tav_peft_edit"


@dataclasses.dataclass(frozen=True)
class Record:
    """An edit's prompt, and the settings that are known of it."""

    prompt: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def write(self, video: Path) -> Path:
        """Write it beside a video.

        Raises:
            ClipError: when the disk refuses.

        """
        path = video.with_suffix(".json")
        with whole(path, ClipError) as part:
            part.write_text(json.dumps({_KEY: dataclasses.asdict(self)}, indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def beside(cls, video: Path) -> Record | None:
        """Read it from beside a video; None where there is none."""
        try:
            said = json.loads(video.with_suffix(".json").read_text(encoding="utf-8"))[_KEY]
            return cls(str(said["prompt"]), dict(said["settings"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def __str__(self) -> str:
        """Say the settings."""
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.settings.items())
