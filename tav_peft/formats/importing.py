"""What `tav import` reads: the format of a file or folder, told by its tensors, and the adapter in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tav_peft.adapter import LATENTS, Adapter, is_tensor_name
from tav_peft.formats import diffusers, lora, peft
from tav_peft.formats.image_part import RenamedTensors
from tav_peft.formats.loaded_base import LoadedBase
from tav_peft.formats.lora import ImportedLora
from tav_peft.formats.lora_tensors import name_format
from tav_peft.tensor_file import FileTensors

OFFICIAL, OURS = "official", "tav-peft"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# a whole UNet's, or those that the original trains: no LoRA has a projection's own weight
_MODEL_ENDS = ("conv_in.weight", "attn1.to_q.weight", "attn2.to_q.weight")


def recognise(path: str | Path) -> str:
    """Name the format of a file or folder: tav-peft, peft, diffusers, kohya, lycoris, or else official.

    Raises:
        AdapterError: when there is nothing, or a file that is damaged.

    """
    path = Path(path)
    if (path / peft.CONFIG).is_file():
        return "peft"
    if (path / diffusers.WEIGHTS).is_file():
        return "diffusers"
    if path.is_dir() or path.suffix in _PICKLES:
        return OFFICIAL
    file = FileTensors(path)
    if any(name.endswith(_MODEL_ENDS) for name in file):
        return OFFICIAL
    own = "tav_peft" in file.metadata and all(name == LATENTS or is_tensor_name(name) for name in file)
    return OURS if own else name_format(file)


def read(path: str | Path, base: LoadedBase | None = None, *, caption: str = "") -> ImportedLora:
    """Read an adapter in any format but a run's; `base` and `caption` are for files that do not say theirs.

    Raises:
        AdapterError: when the file is damaged, has more than an adapter can hold, or needs a base.

    """
    path, kind = Path(path), recognise(path)
    if kind == OURS:
        adapter = Adapter.open(path)
        checked = RenamedTensors(adapter.tensors, {name: name for name in adapter.tensors}, path.name)
        return _whole(dataclasses.replace(adapter, tensors=checked), kind)
    if kind == "peft" and "tav_peft" in FileTensors(path / peft.WEIGHTS).metadata:
        return _whole(peft.read(path), kind)
    return lora.read(path, base, caption=caption)


def _whole(adapter: Adapter, kind: str) -> ImportedLora:
    return ImportedLora(adapter, kind, {}, multiplied=False)
