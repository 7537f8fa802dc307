"""Publishing: a folder ready for a hub, with the adapter, its card, samples, and hashes of all."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from tav_peft import formats
from tav_peft.errors import AdapterError
from tav_peft.sharing.card import PICTURES, PREVIEW, VIDEOS, Card, is_found_by_all
from tav_peft.sharing.fetching import fetch
from tav_peft.sharing.hub import SAMPLES
from tav_peft.whole import whole

CARD, HASHES = "README.md", "SHA256SUMS"


@dataclasses.dataclass(frozen=True)
class Publication:
    """What was written: the folder, its files by their paths in it, and what its publisher should know."""

    folder: Path
    files: tuple[str, ...]
    notes: tuple[str, ...]


def publish(
    adapter: str | Path,
    folder: Path,
    *,
    title: str | None = None,
    license_id: str | None = None,
    samples: Sequence[Path] | None = None,
    base: str | None = None,
    name: str | None = None,
    keep_latents: bool = False,
) -> Publication:
    """Write a folder that is ready for a hub; the same input gives the same bytes.

    `name` is the repository that it is for, `base` how others find the base, where that is not its recorded name. Without
    `samples`, what `tav edit` wrote beside the adapter is taken. The clip's latents are left out unless `keep_latents`:
    they decode to nearly the clip. A preview, which someone put in to be seen, stays and is a sample.

    Raises:
        AdapterError: when there is no such adapter, a sample cannot be shown, the folder holds something else, or the
            disk refuses.

    """
    path = fetch(adapter)
    given = formats.read(path)
    _check_replaceable(folder)
    if base is not None and not is_found_by_all(base):
        raise AdapterError(
            f"{base} is no base that others can load. Give its name on the hub (user/name), or pocket."
        )
    made = given if keep_latents else dataclasses.replace(given, tensors=given.weights)
    shown = _chosen(path, samples)
    card = Card(
        adapter=made,
        file=f"{path.stem}.safetensors",
        title=title or given.provenance.caption,
        base=base or given.provenance.base.name,
        name=name,
        license_id=license_id,
        samples=tuple(f"{SAMPLES}/{each}" for each in [*shown, *([PREVIEW] if made.preview else [])]),
    )
    with whole(folder, AdapterError) as part:
        made.save(part / card.file)
        (part / SAMPLES).mkdir()
        for each, source in shown.items():
            shutil.copyfile(source, part / SAMPLES / each)
        if made.preview:
            (part / SAMPLES / PREVIEW).write_bytes(made.preview)
        if not card.samples:
            (part / SAMPLES).rmdir()
        (part / CARD).write_text(card.text(), encoding="utf-8", newline="\n")
        files = _files(part)
        sums = "".join(
            f"{hashlib.sha256((part / each).read_bytes()).hexdigest()}  {each}\n" for each in files
        )
        (part / HASHES).write_text(sums, encoding="utf-8", newline="\n")
    left_out = given.latents is not None and not keep_latents
    return Publication(folder, (*files, HASHES), tuple(_notes(card, latents_left_out=left_out)))


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _check_replaceable(folder: Path) -> None:
    """Refuse a place that holds anything else than an earlier publication."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise AdapterError(f"{folder} is a file; a folder is written. Give another name.")
    sums = folder / HASHES
    known = {line[66:] for line in sums.read_text(encoding="utf-8").splitlines()} if sums.is_file() else set()
    foreign = [each for each in _files(folder) if each not in {*known, HASHES}]
    if foreign:
        raise AdapterError(
            f"{folder} holds other files ({foreign[0]}), which would be lost. Name a new or empty folder."
        )


def _chosen(adapter: Path, samples: Sequence[Path] | None) -> dict[str, Path]:
    """Choose the samples by the names they will have: those given, or those that `tav edit` wrote beside the adapter."""
    shown = (*PICTURES, *VIDEOS)
    if samples is None:
        edits = adapter.with_name(f"{adapter.stem}-edits")
        found = sorted(edits.iterdir()) if edits.is_dir() else []
        return {path.name: path for path in found if path.is_file() and path.suffix in shown}
    chosen: dict[str, Path] = {}
    for path in samples:
        if not path.is_file() or path.suffix not in shown:
            raise AdapterError(f"{path} cannot be a sample: give files of {', '.join(shown)}.")
        if path.name in {*chosen, PREVIEW}:
            raise AdapterError(f"Two samples are called {path.name}. Rename one.")
        chosen[path.name] = path
    return chosen


def _notes(card: Card, *, latents_left_out: bool) -> list[str]:
    notes = []
    if latents_left_out:
        notes.append(
            "The clip's latents were left out, as they decode to nearly the clip; --keep-latents keeps them."
        )
    elif card.adapter.latents is not None:
        notes.append("The adapter carries the clip's latents: who has it can see nearly the clip.")
    if card.license_id is None:
        notes.append("No licence is stated, so that nobody may pass it on: give one with --license.")
    if not is_found_by_all(card.base):
        notes.append(
            f"The base is called {card.base}, which others cannot load: give its name on the hub with --base."
        )
    if not card.samples:
        notes.append("There are no samples: give some with --samples.")
    return notes
