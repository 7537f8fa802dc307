"""Baking: the updates of adapters into the weights of a checkpoint, an inflated one or a plain image model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tav_peft import bases
from tav_peft.adapter import Adapter, MergeInfo
from tav_peft.bases.checkpoint_file import read_checkpoint
from tav_peft.bases.folder import weight_files
from tav_peft.bases.ldm_keys import UNET
from tav_peft.bases.single_file import kind_of
from tav_peft.errors import AdapterError
from tav_peft.formats import ModelFormat, inflated, official_folder
from tav_peft.formats.image_part import LeftOut, image_part, left_out
from tav_peft.formats.keys import ldm_names
from tav_peft.formats.loaded_base import LoadedBase
from tav_peft.merging import merge
from tav_peft.merging.weights import Weight
from tav_peft.tensor_file import FileTensors, write_tensors
from tav_peft.updates import UpdatedTensors, Updates
from tav_peft.whole import whole

LAYOUTS = ("inflated", "official", "image")
HEADER = "tav_peft_baked"  # the entry in the header of an image model's file


@dataclasses.dataclass(frozen=True)
class Baked:
    """What was baked: from which adapters by which weights, how many tensors changed, and what was left out."""

    path: Path
    info: MergeInfo
    changed: int
    left_out: tuple[LeftOut, ...] = ()


def bake(
    adapters: Sequence[Adapter | str | Path],
    base: LoadedBase,
    output: str | Path,
    weights: Sequence[Weight] | None = None,
    *,
    layout: str = "inflated",
    **settings: Any,
) -> Baked:
    """Write a base with the sum of adapters in its weights: `inflated`, our own folder, or the `official` code's.

    `weights` and `settings` are those of `merge`; a weight of -1 takes out of an inflated checkpoint what was baked in.
    The base keeps its precision, and its rounding.

    Raises:
        AdapterError: when adapters and base do not fit, or the layout has no place for them.

    """
    formats: dict[str, ModelFormat] = {"inflated": inflated, "official": official_folder}
    if layout not in formats:
        raise AdapterError(f"{layout!r} is no layout of a video model. Give one of {', '.join(formats)}.")
    adapter, report = merge(adapters, weights, **{**settings, "dtype": "fp32"})
    formats[layout].write(adapter, Path(output), base)
    return Baked(Path(output), report.info, len(Updates(adapter, "the adapters")))


def bake_image(
    adapters: Sequence[Adapter | str | Path],
    base: str | Path,
    output: str | Path,
    weights: Sequence[Weight] | None = None,
    **settings: Any,
) -> Baked:
    """Write an image model, a folder or a single file as `base` is, with the query projections of adapters in it.

    Every tensor keeps its precision, and those that no adapter changes their bytes. What image models have no place
    for, T-Attn, is left out, and both the result and the file's header name it. A weight of -1 undoes it within the
    rounding of the precision. Tensors are read and written one at a time.

    Raises:
        AdapterError: when adapters and base do not fit, or the adapters are T-Attn alone.
        BaseModelError: when there is no such base on this disk.

    """
    adapter, report = merge(adapters, weights, **{**settings, "dtype": "fp32"})
    path, output, kept = Path(bases.locate(base)), Path(output), image_part(adapter)
    updates, absent = Updates(kept, "the adapters"), tuple(left_out(adapter))
    about = {
        "merged_from": report.info.model_dump(mode="json"),
        "left_out": [dataclasses.asdict(a) for a in absent],
    }
    header = {HEADER: json.dumps(about, sort_keys=True)}
    if path.is_dir():
        _bake_folder(path, output, updates, header)
    elif path.is_file():
        _bake_file(path, output, updates, header)
    else:
        raise AdapterError(f"{base} is not on this disk. Download it, and give its folder or file.")
    return Baked(output, report.info, len(updates), absent)


def _bake_file(path: Path, output: Path, updates: Updates, header: Mapping[str, str]) -> None:
    if output.suffix != ".safetensors":
        raise AdapterError(f"{output}: a single file is written as .safetensors. Give such a name.")
    tensors = _tensors(path)
    kind_of(path, tensors)
    modules = [name.removesuffix(".weight") for name in updates]
    names = ldm_names(modules, updates.adapter.provenance.base.architecture)
    keys = {f"{module}.weight": f"{UNET}{names[module]}.weight" for module in modules}
    write_tensors(output, UpdatedTensors(tensors, updates, keys), {**_metadata(tensors), **header})


def _bake_folder(path: Path, output: Path, updates: Updates, header: Mapping[str, str]) -> None:
    if inflated.section_of(path / "unet") is not None:
        raise AdapterError(
            f"{path} is an inflated checkpoint, no image model. Bake into it by the layout inflated."
        )
    if output.exists() and not output.is_dir():
        raise AdapterError(
            f"{output} is a file; {path} is a folder, and so is the result. Give another name."
        )
    variants = weight_files(path, "unet").values()
    if any(file.suffix == ".bin" for files in variants if len(files) > 1 for file in files):
        raise AdapterError(
            f"{path}: its UNet is a .bin in several pieces. Save it as safetensors with diffusers."
        )
    opened = [{file: _tensors(file) for file in files} for files in variants]
    with whole(output, AdapterError) as folder:
        shutil.copytree(path, folder, ignore=lambda at, names: _weights_among(Path(at), names, path / "unet"))
        for pieces in opened:
            missing = set(updates).difference(*pieces.values())
            if missing:
                raise AdapterError(
                    f"{path}: its UNet has no {min(missing)}. Use the base the adapters were tuned for."
                )
            for file, tensors in pieces.items():
                here = {name: name for name in updates if name in tensors}
                target = folder / "unet" / file.with_suffix(".safetensors").name
                write_tensors(
                    target, UpdatedTensors(tensors, updates, here), {**_metadata(tensors), **header}
                )


def _weights_among(folder: Path, names: Sequence[str], unet: Path) -> list[str]:
    """List what is not to be copied: the UNet's weights, in every form."""
    return [name for name in names if folder == unet and name.endswith((".safetensors", ".bin", ".msgpack"))]


def _tensors(file: Path) -> Mapping[str, Tensor]:
    return FileTensors(file) if file.suffix == ".safetensors" else read_checkpoint(file)


def _metadata(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return tensors.metadata if isinstance(tensors, FileTensors) else {"format": "pt"}
