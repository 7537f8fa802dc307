"""One picture of all frames of several clips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tav_peft.errors import ClipError
from tav_peft.report.page import Shown
from tav_peft.whole import whole


def write_sheet(path: Path, shown: Sequence[Shown], *, scale: int = 1) -> Path:
    """Write one picture with a row for each clip: its title, and its frames from left to right.

    Raises:
        ClipError: when the disk refuses.
    """
    gap, line = 6, 24
    height, width = (scale * side for side in shown[0].clip.pixels.shape[1:3])
    columns = max(item.clip.frames for item in shown)
    size = (gap + columns * (width + gap), len(shown) * (height + line + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for row, item in enumerate(shown):
        top = gap + row * (height + line + gap)
        draw.text((gap, top + 2), item.title, fill="#222222", font=font)
        for column, frame in enumerate(item.clip.pixels):
            enlarged = Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (gap + column * (width + gap), top + line))
    with whole(path, ClipError) as part:
        sheet.save(part, format="PNG", optimize=True)
    return path
