"""Clips side by side: one self-contained HTML page that plays them, or one picture of all their frames."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tav_peft.errors import ClipError
from tav_peft.video.clip import Clip
from tav_peft.whole import whole

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #777; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; line-height: 1.2; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1rem; }
figure { margin: 0; }
figure img { width: 100%; image-rendering: pixelated; border-radius: .4rem; display: block; }
figcaption { font-size: .9rem; margin-top: .35rem; }
figcaption small { color: var(--soft); display: block; }
table { border-collapse: collapse; font-size: .9rem; }
td:first-child { white-space: nowrap; }
td { border-top: 1px solid var(--line); padding: .3rem .8rem .3rem 0; vertical-align: top; overflow-wrap: anywhere; }
img.plot { max-width: 100%; background: #fff; border-radius: .4rem; }
pre { overflow-x: auto; border: 1px solid var(--line); border-radius: .4rem; padding: .6rem; }
"""


@dataclasses.dataclass(frozen=True)
class Shown:
    """A clip on the page, with what is said under it."""

    title: str
    clip: Clip
    note: str = ""


def write_report(
    path: Path,
    title: str,
    shown: Sequence[Shown],
    *,
    facts: Mapping[str, str],
    plot: Path | None = None,
    command: str = "",
) -> Path:
    """Write the page: the clips playing in step, the facts as a table, the loss plot, and how to make it again.

    Raises:
        ClipError: when the disk refuses.
    """
    figures = "\n".join(_figure(item) for item in shown)
    rows = "\n".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in facts.items()
    )
    picture = f'<h2>Loss</h2><img class="plot" alt="loss of each step" src="{_data(plot)}">' if plot else ""
    again = f"<h2>Make it again</h2><pre>{html.escape(command)}</pre>" if command else ""
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f'<h1>{html.escape(title)}</h1><div class="clips">{figures}</div>'
        f"<h2>How</h2><table>{rows}</table>{picture}{again}</html>\n"
    )
    with whole(path, ClipError) as part:
        part.write_text(page, encoding="utf-8")
    return path


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


def _figure(item: Shown) -> str:
    note = f"<small>{html.escape(item.note)}</small>" if item.note else ""
    return (
        f'<figure><img alt="{html.escape(item.title)}" src="{_animation(item.clip)}">'
        f"<figcaption>{html.escape(item.title)}{note}</figcaption></figure>"
    )


def _animation(clip: Clip) -> str:
    """Encode a clip as an animated WebP without loss, as a data address."""
    frames = [Image.fromarray(frame) for frame in clip.pixels]
    file = io.BytesIO()
    duration = round(1000 / clip.fps)
    frames[0].save(
        file, format="WEBP", save_all=True, append_images=frames[1:], duration=duration, loop=0, lossless=True
    )
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _data(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
