"""Render the sample clips that the package ships, each with its caption and true path as JSON.

python training/render_clips.py
"""

from pathlib import Path

from tav_peft.pocket.clips import write_shipped

if __name__ == "__main__":
    write_shipped(Path(__file__).parent.parent / "tav_peft" / "pocket" / "samples")
