"""The report of a folder: its adapter, the clip, the reconstruction if it is there, and the edits, found and scored."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tav_peft.adapter import Adapter
from tav_peft.errors import AdapterError, TavError
from tav_peft.pocket import truth
from tav_peft.recipe import EditingSection
from tav_peft.report.page import Shown, write_report
from tav_peft.scoring import POCKET, pixels, score
from tav_peft.scoring.clip_model import ClipModel
from tav_peft.scoring.result import Score
from tav_peft.sources import clip_nearby, read_as_tuned
from tav_peft.tensor_file import FileTensors
from tav_peft.trail import Trail
from tav_peft.video.clip import Clip
from tav_peft.video.record import Record

RECONSTRUCTION = "reconstruction.mp4"
PAGE = "index.html"
_VIDEOS = ("*.mp4", "*.gif")


@dataclasses.dataclass(frozen=True)
class Found:
    """What a folder holds for its report."""

    adapter: Adapter
    adapter_file: Path
    source: Clip | None
    edits: dict[Path, Record]

    @classmethod
    def look(cls, folder: Path, adapter_file: Path | None = None, clip: Path | None = None) -> Found:
        """Find the one adapter, its clip, and every video with a record of its prompt beside it.

        Raises:
            TavError: when there is no folder, no adapter or more than one, or no edit.

        """
        if not folder.is_dir():
            raise TavError(f"{folder} is no folder. Give the one that `tav edit` or `tav demo` wrote to.")
        file = adapter_file or _only_adapter(folder)
        adapter = Adapter.open(file)
        source = read_as_tuned(adapter, clip) if clip else clip_nearby(adapter, file)
        videos = sorted(video for pattern in _VIDEOS for video in folder.glob(pattern))
        edits = {video: record for video in videos if (record := Record.beside(video))}
        if not edits:
            raise TavError(
                f"{folder} has no video with a record of its prompt beside it. Make edits with `tav edit -o {folder}`."
            )
        return cls(adapter, file, source, edits)


def report(
    folder: Path,
    *,
    adapter_file: Path | None = None,
    clip: Path | None = None,
    clip_model: str | ClipModel | None = None,
    title: str = "",
    command: str = "",
    notes: dict[str, str] | None = None,
) -> Path:
    """Write a folder's page, `index.html`: the clip, its reconstruction and each edit in step, scores, and all facts.

    Edits are scored with `clip_model`; not given, with the package's own where prompts are of pocket's world, else not
    at all. `command` makes it all again; not given, it is put together from what the adapter and the edits say.
    `notes` are more facts.

    Raises:
        TavError: when something is missing or cannot be read or written.

    """
    found = Found.look(folder, adapter_file, clip)
    said = found.adapter.provenance
    shown = []
    if found.source:
        shown.append(Shown(f"the clip: {said.caption}", found.source))
    if (folder / RECONSTRUCTION).is_file():
        again = _read(folder / RECONSTRUCTION, found.source)
        shown.append(Shown("inverted and sampled back", again, _told_of(again, found.source)))
    for video, record in found.edits.items():
        edit = _read(video, found.source)
        shown.append(Shown(record.prompt, edit, str(record), _scored(edit, record, found, clip_model)))
    plot = Trail(found.adapter_file).plot
    return write_report(
        folder / PAGE,
        title or f"“{said.caption}”, edited by prompt",
        shown,
        facts=_facts(found) | (notes or {}),
        plot=plot if plot.is_file() else None,
        command=command or _commands(found),
        recipe=yaml.safe_dump(said.recipe, sort_keys=False, allow_unicode=True),
        hashes=_hashes(found),
    )


def _only_adapter(folder: Path) -> Path:
    files = []
    for file in sorted(folder.glob("*.safetensors")):
        try:
            if "tav_peft" in FileTensors(file).metadata:
                files.append(file)
        except AdapterError:
            continue  # a file of something else
    if len(files) != 1:
        names = ", ".join(file.name for file in files)
        had = f"{len(files)} adapters ({names})" if files else "no adapter"
        raise TavError(f"{folder} has {had}. Say which with --adapter.")
    return files[0]


def _read(video: Path, source: Clip | None) -> Clip:
    """Read a video at its source's size, as it was made, whatever it was enlarged to."""
    size = (source.width, source.height) if source else None
    return Clip.read(video, size=size, fit="squash", multiple=1)


def _told_of(again: Clip, source: Clip | None) -> str:
    if source is None or again.pixels.shape != source.pixels.shape:
        return ""
    return f"PSNR to the clip {pixels.psnr(again, source):.1f} dB"


def _scored(edit: Clip, record: Record, found: Found, clip_model: str | ClipModel | None) -> list[Score]:
    if clip_model is None and not truth.is_known(record.prompt):
        return []
    source, ideal = found.source, None
    if source is not None and source.pixels.shape != edit.pixels.shape:
        source = None  # an edit of something else, or cut
    if source is not None and source.source is not None:
        known = truth.beside(source.source)
        ideal = truth.asked_of(known, record.prompt) if known and len(known.path) == edit.frames else None
    return score(
        edit, record.prompt, source=source, caption=found.adapter.provenance.caption, ideal=ideal,
        clip_model=clip_model or POCKET,
    )  # fmt: skip


def _facts(found: Found) -> dict[str, str]:
    said, size = found.adapter.provenance, found.adapter_file.stat().st_size
    facts = {
        "base": said.base.name + (f", {said.base.license}" if said.base.license else ""),
        "adapter": f"{found.adapter_file.name}, {size / 1000:.0f} kB, preset {said.subset['preset']}",
        "clip": "; ".join(
            f"{clip.name}, {clip.frames} frames of {clip.width}x{clip.height}" for _, clip in said.clips
        ),
    }
    training: Any = said.recipe.get("training")
    if training:
        facts["tuning"] = f"{said.step} steps at learning rate {training['lr']:g}, seed {training['seed']}"
    return facts | {"made with": ", ".join(f"{name} {number}" for name, number in said.versions.items())}


def _hashes(found: Found) -> dict[str, str]:
    said = found.adapter.provenance
    files = {file.name: _sha256(file) for file in (found.adapter_file, *found.edits)}
    return {
        "base (query projections)": said.base.fingerprint,
        **{
            f"clip {number}, {clip.name} (its frames)": clip.fingerprint
            for number, (_, clip) in enumerate(said.clips, 1)
        },
        "adapter (config and tensors)": found.adapter.fingerprint,
        **{f"{name} (file)": digest for name, digest in files.items()},
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _commands(found: Found) -> str:
    """Spell the commands that tune and edit as the adapter and the records say."""
    said, name = found.adapter.provenance, found.adapter_file.name
    usual = EditingSection().replace(**said.editing).model_dump(mode="json", include=_LEFT_OUT)
    lines = [
        f"tav tune {' '.join(shlex.quote(clip.name) for _, clip in said.clips)} --recipe recipe.yaml "
        f"{' '.join(f'--prompt {shlex.quote(caption)}' for caption, _ in said.clips)} "
        f"--base {shlex.quote(said.base.name)} -o {shlex.quote(name)}  # recipe.yaml: the recipe below"
    ]
    for video, record in found.edits.items():
        settings = " ".join(_options(record.settings, usual))
        given = f" {settings}" if settings else ""
        lines.append(
            f"tav edit {shlex.quote(name)} --prompt {shlex.quote(record.prompt)}{given} -o {shlex.quote(video.name)}"
        )
    return "\n".join(lines)


_OPTIONS = {"guidance_scale": "guidance", "num_inference_steps": "steps"} | {
    name: name.replace("_", "-")
    for name in (
        "depth", "negative_prompt", "strength", "window", "overlap", "lora", "textual_inversion", "control", "controlnet",
        "control_inversion", "guidance_interval", "reuse_features", "merge_tokens", "mask", "mask_word",
        "inject_attention", "inject_features", "seed", "precision",
    )
}  # fmt: skip
_OF_INVERSION = {"depth", "inject_attention", "inject_features"}
_LEFT_OUT = {  # where they are as the recipe has them
    "guidance_interval", "reuse_features", "merge_tokens", "inject_attention", "inject_features",
}  # fmt: skip


def _options(settings: Mapping[str, Any], usual: Mapping[str, Any]) -> Iterator[str]:
    """Spell the settings of an edit as options of `tav edit`, those that it has and that the recipe has otherwise."""
    if settings.get("seed") is not None:
        yield "--no-inversion"
        settings = {name: value for name, value in settings.items() if name not in _OF_INVERSION}
    for name in [name for name in settings if name in _OPTIONS]:
        value, option = settings[name], f"--{_OPTIONS[name]}"
        if name in usual and usual[name] == value:
            continue
        if name == "guidance_interval" and isinstance(value, (list, tuple)):
            value = "-".join(map(str, value))
        if value is True:
            yield option
        elif value is not None and value is not False and value != "":
            for each in value if isinstance(value, list) else [value]:
                yield f"{option} {shlex.quote(str(each))}"
