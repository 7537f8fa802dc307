"""Render the sample clips that the package ships, each with its caption and true path as JSON.

python training/render_clips.py
"""

from pathlib import Path

from tav_peft.pocket.clips import SHIPPED
from tav_peft.pocket.truth import write

if __name__ == "__main__":
    for clip in SHIPPED:
        write(clip, Path(__file__).parent.parent / "tav_peft" / "pocket" / "samples")
