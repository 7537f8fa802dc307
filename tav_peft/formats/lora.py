"""Reading LoRAs, LoHas, LoKrs and full-rank updates of any tool as an adapter, exactly."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tav_peft import bases
from tav_peft.adapter import Adapter, Provenance, check_layout, parse_config, parse_provenance
from tav_peft.errors import AdapterError
from tav_peft.formats import peft
from tav_peft.formats.diffusers import METADATA, PREFIX, WEIGHTS
from tav_peft.formats.image_part import MadeTensors
from tav_peft.formats.keys import modules_by_name
from tav_peft.formats.loaded_base import LoadedBase
from tav_peft.formats.lora_config import LoraConfigText
from tav_peft.formats.lora_module import LoraModule
from tav_peft.formats.lora_tensors import name_format, sort_tensors
from tav_peft.formats.origin import check_base, imported_from
from tav_peft.methods import json_config
from tav_peft.presets import BLOCKS, PARTS, Subset, part_of
from tav_peft.recipe import Recipe
from tav_peft.tensor_file import FileTensors, layout_of
from tav_peft.unet.probe import probed
from tav_peft.updates import Updates


@dataclasses.dataclass(frozen=True)
class ImportedLora:
    """An adapter made of another tool's file; `forms` counts the modules by the form that they had there.

    `multiplied` says whether they were multiplied out to dense updates, since not all of them are LoRAs.
    """

    adapter: Adapter
    format: str
    forms: dict[str, int]
    multiplied: bool


@torch.no_grad()
def read(path: str | Path, base: LoadedBase | None = None, *, caption: str = "") -> ImportedLora:
    """Convert a file of diffusers, kohya's tools, LyCORIS or PEFT into an adapter of query projections.

    LoRAs keep their tensors, in their precision, and their scales; if there is any other form beside them (LoHa, LoKr,
    DoRA, full rank) all become dense updates, multiplied out in float64 and kept in float32. A file that tav-peft
    exported says itself where it comes from; any other is imported on `base`, which DoRA needs too.

    Raises:
        AdapterError: when the file is damaged, has more than query projections, contradicts itself, or needs a base.

    """
    file, configs = _open(Path(path))
    known = file.metadata.get("tav_peft")
    provenance = None if known is None else parse_provenance(known, file.path.name)
    _check_origin(provenance, base, file.path)
    found = sort_tensors(file.layout, _query_names(provenance, base, file), file.path.name)
    if not found:
        raise AdapterError(f"{file.path.name} has no tensors. Ask for it again.")
    own = None
    if provenance is not None:
        own = parse_config(file.metadata.get("peft_config", "null"), provenance, file.path.name)
        configs += [] if own is None else [LoraConfigText(json.dumps(own), file.path.name)]
    modules = [LoraModule(name, kinds, file, configs, base) for name, kinds in sorted(found.items())]
    lora = all(module.is_lora for module in modules)
    if provenance is None:
        adapter = _on_base(modules, _needed(base, file), caption, file.path.name, lora=lora)
    else:
        adapter = _as_it_says(modules, provenance, own, file.path.name, lora=lora)
    forms = dict(collections.Counter(module.form for module in modules))
    multiplied = not lora and any(not module.is_dense for module in modules)
    return ImportedLora(adapter, name_format(file.layout), forms, multiplied)


def _open(path: Path) -> tuple[FileTensors, list[LoraConfigText]]:
    """Open a file, or the one in a folder of PEFT or diffusers, with the configs of it."""
    if (path / peft.CONFIG).is_file():
        text = (path / peft.CONFIG).read_text(encoding="utf-8", errors="replace")
        return FileTensors(path / peft.WEIGHTS), [LoraConfigText(text, str(path))]
    file = FileTensors(path / WEIGHTS if path.is_dir() else path)
    text = file.metadata.get(METADATA, "")
    if not text:
        return file, []
    prefix = PREFIX if f'"{PREFIX}' in text else ""
    return file, [LoraConfigText(text, file.path.name, prefix=prefix)]


def _query_names(provenance: Provenance | None, base: LoadedBase | None, file: FileTensors) -> dict[str, str]:
    """Give the base's query projections by the names that other tools have for them."""
    if provenance is not None:
        return modules_by_name(provenance.base.architecture)
    unet = _needed(base, file).unet
    there = {name for name, _ in unet.named_modules()}
    return {name: m for name, m in modules_by_name(bases.architecture(unet)).items() if m in there}


def _needed(base: LoadedBase | None, file: FileTensors) -> LoadedBase:
    if base is None:
        raise AdapterError(
            f"{file.path.name} was not written by tav-peft and does not say what it was tuned on. Name it with --base."
        )
    return base


def _check_origin(provenance: Provenance | None, base: LoadedBase | None, file: Path) -> None:
    if base is not None:
        check_base(base)
    if provenance is not None and base is not None and provenance.base.fingerprint != base.base_fingerprint:
        raise AdapterError(
            f"{file.name} says that it was tuned on {provenance.base.name}, which is not {base.base_name}. Leave --base "
            "out."
        )


# -- the adapter -------------------------------------------------------------------------------------------


def _as_it_says(
    modules: list[LoraModule], provenance: Provenance, own: Mapping[str, Any] | None, file: str, *, lora: bool
) -> Adapter:
    """Make the adapter that the file's header describes, or refuse a file whose tensors are another one's."""
    if lora != (own is not None):
        raise AdapterError(
            f"{file} contradicts itself: its header is of {'dense updates' if lora else 'LoRAs'}, its tensors are not. "
            "Another tool changed it; export it again."
        )
    adapter = Adapter(_tensors(modules, lora=lora), own, provenance)
    check_layout(layout_of(adapter.tensors), file)
    Updates(adapter, file)  # which compares with what the header names
    return adapter


def _on_base(modules: list[LoraModule], base: LoadedBase, caption: str, file: str, *, lora: bool) -> Adapter:
    """Make an adapter of those parts and blocks that the file has anything of; modules it lacks get no update."""
    parts = tuple(part for part in PARTS if any(part_of(module.name) == part for module in modules))
    blocks = tuple(b for b, start in BLOCKS.items() if any(m.name.startswith(start) for m in modules))
    subset = Subset("lite" if lora else "paper", parts, blocks)
    names = [name for name, _ in base.unet.named_modules()]
    makers = dict(_tensors(modules, lora=lora).makers)
    usual = collections.Counter((module.rank, module.alpha) for module in modules).most_common(1)[0][0]
    given = {module.name: module for module in modules}
    for name in subset.lora_modules(names) if lora else subset.dense_modules(names):
        if name not in given:
            rows, columns = base.unet.get_parameter(f"{name}.weight").shape
            makers |= _zeros(name, rows, columns, usual[0] if lora else None)
    config = _config(subset, names, modules, *usual) if lora else None
    section: dict[str, Any] = {"preset": subset.preset, "parts": subset.parts, "blocks": subset.blocks}
    if lora:
        section |= {"rank": usual[0], "alpha": usual[1]}
    recipe = Recipe.model_validate(
        {"name": "imported", "description": "a LoRA of another tool, imported", "adapter": section}
    ).model_dump(mode="json", exclude_unset=True)
    tensors = MadeTensors(makers)
    check_layout(tensors.layout, file)
    adapter = Adapter(tensors, config, imported_from(base, subset, recipe, caption=caption))
    return probed(adapter, base.unet)


def _tensors(modules: list[LoraModule], *, lora: bool) -> MadeTensors:
    makers: dict[str, tuple[Tensor, Callable[[], Tensor]]] = {}
    for module in modules:
        makers |= module.lora() if lora else module.dense()
    return MadeTensors(makers)


def _zeros(
    module: str, rows: int, columns: int, rank: int | None
) -> dict[str, tuple[Tensor, Callable[[], Tensor]]]:
    """Give tensors that change nothing, a dense one where there is no rank."""
    shapes = {"diff": (rows, columns)}
    if rank is not None:
        shapes = {"lora_A.weight": (rank, columns), "lora_B.weight": (rows, rank)}
    return {
        f"{module}.{kind}": (torch.empty(shape, device="meta"), functools.partial(torch.zeros, shape))
        for kind, shape in shapes.items()
    }


def _config(
    subset: Subset, names: list[str], modules: list[LoraModule], rank: int, alpha: float
) -> dict[str, Any]:
    config = subset.peft_config(names, rank=rank, alpha=alpha)
    assert config is not None
    config.rank_pattern = {module.name: module.rank for module in modules if module.rank != rank}
    config.alpha_pattern = {module.name: module.alpha for module in modules if module.alpha != alpha}
    return json_config(config)
