"""The HTML page: clips that play in step, their scores and rules, and all that is needed to make them again."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from tav_peft.errors import ClipError
from tav_peft.scoring.result import Score
from tav_peft.video.clip import Clip
from tav_peft.whole import whole

_WIDEST_FRAME, _WIDEST_STRIP = 256, 16_383  # pixels; a WebP is no wider than the latter
_PAUSE = '<label class="pause"><input type="checkbox" id="pause"> pause</label>'


@dataclasses.dataclass(frozen=True)
class Shown:
    """A clip on the page, with what is said under it and how good it is."""

    title: str
    clip: Clip
    note: str = ""
    scores: Sequence[Score] = ()


def write_report(
    path: Path,
    title: str,
    shown: Sequence[Shown],
    *,
    facts: Mapping[str, str],
    plot: Path | None = None,
    command: str = "",
    recipe: str = "",
    hashes: Mapping[str, str] | None = None,
) -> Path:
    """Write the page: the clips in step, scores and rules, the loss, the recipe, hashes, and how to make it again.

    Nothing outside of the file is loaded, and no script is run.

    Raises:
        ClipError: when the disk refuses.
    """
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _PAUSE,
        f'<div class="clips">{"".join(map(_figure, shown))}</div>',
        _scores(shown),
        f"<h2>How</h2>{_table(facts)}",
        f'<h2>Loss</h2><img class="plot" alt="loss of each step" src="{_picture(plot)}">' if plot else "",
        f"<h2>Make it again</h2><pre>{html.escape(command)}</pre>" if command else "",
        f"<details><summary>Recipe</summary><pre>{html.escape(recipe)}</pre></details>" if recipe else "",
        f"<details><summary>Hashes</summary>{_table(hashes)}</details>" if hashes else "",
    ]
    style = (files("tav_peft.report") / "page.css").read_text(encoding="utf-8")
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{style}</style>{''.join(parts)}</html>\n"
    )
    with whole(path, ClipError) as part:
        part.write_text(page, encoding="utf-8")
    return path


def _figure(item: Shown) -> str:
    """Show a clip as a strip of its frames, of which the page's style shows one after the other.

    All strips run by the page's one clock, so that clips of one length stay in step; animated pictures each have
    their own.
    """
    note = f"<small>{html.escape(item.note)}</small>" if item.note else ""
    clip, seconds = item.clip, item.clip.frames / item.clip.fps
    style = (
        f"--frames:{max(2, clip.frames)};--seconds:{seconds:.3f}s;aspect-ratio:{clip.width}/{clip.height};"
        f"background-size:{100 * clip.frames}% 100%;background-image:url({_strip(clip)})"
    )
    return (
        f'<figure><div class="strip" role="img" aria-label="{html.escape(item.title)}" style="{style}"></div>'
        f"<figcaption>{html.escape(item.title)}{note}</figcaption></figure>"
    )


def _strip(clip: Clip) -> str:
    """Lay the frames out side by side in one WebP, as a data address; without loss where they are small."""
    width = min(clip.width, _WIDEST_FRAME, _WIDEST_STRIP // clip.frames)
    frames = [Image.fromarray(frame) for frame in clip.pixels]
    if width < clip.width:
        size = (width, max(1, round(width * clip.height / clip.width)))
        frames = [frame.resize(size, Image.Resampling.LANCZOS) for frame in frames]
    strip, file = Image.fromarray(np.concatenate([np.asarray(f) for f in frames], axis=1)), io.BytesIO()
    strip.save(file, format="WEBP", lossless=width <= 64, quality=85)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _scores(shown: Sequence[Shown]) -> str:
    """Write a table with a column for each clip that has scores, and under it how each score is made."""
    scored = [item for item in shown if item.scores]
    kinds = {score.name: score for item in scored for score in item.scores}
    if not kinds:
        return ""
    head = "".join(f"<th>{html.escape(item.title)}" for item in scored)
    lines = []
    for name, kind in kinds.items():
        own = [{score.name: str(score) for score in item.scores}.get(name, "") for item in scored]
        cells = "".join(f"<td>{html.escape(value)}" for value in own)
        lines.append(f"<tr><th>{_spaced(kind)} {'↑' if kind.better == 'higher' else '↓'}{cells}")
    rules = "".join(
        f"<dt>{_spaced(kind)}<dd>{html.escape(kind.rule)}"
        + (f" <small>[{html.escape(kind.model)}]</small>" if kind.model else "")
        for kind in kinds.values()
    )
    return (
        f'<h2>Scores</h2><div class="wide"><table class="scores"><tr><th>{head}{"".join(lines)}</table></div>'
        f"<details><summary>How each is made</summary><dl>{rules}</dl></details>"
    )


def _spaced(score: Score) -> str:
    return html.escape(score.name.replace("_", " "))


def _table(rows: Mapping[str, str]) -> str:
    return f"<table>{''.join(_rows(rows.items()))}</table>"


def _rows(rows: Iterable[tuple[str, str]]) -> Iterable[str]:
    return (f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in rows)


def _picture(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
