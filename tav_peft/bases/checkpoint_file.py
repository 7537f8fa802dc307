"""The tensors of a checkpoint, `.safetensors` or a pickle; of a pickle, nothing but tensors is ever made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from tav_peft.errors import BaseModelError

_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
# the first checkpoints name the parts of CLIP without the `text_model` that all later ones have
_OLD_NAME = re.compile(r"^(cond_stage_model\.transformer\.)(?=embeddings\.|encoder\.|final_layer_norm\.)")


class _Ignored:
    """Stands for a training framework's objects, which nothing here asks for."""


def check_checkpoint(path: Path) -> None:
    """Refuse a file that is cut short, or that could only be read by running code in it; its tensors are not read.

    Raises:
        BaseModelError: with the reason.

    """
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise BaseModelError(f"{path} is a pointer of Git LFS, not the file itself. Run `git lfs pull`.")
    if path.suffix.lower() in _PICKLES:
        _objects(path)
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError, ValueError):
        raise _damaged(path) from None


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file by their names; what else a `.ckpt` holds is left out.

    Raises:
        BaseModelError: when the file is damaged, or could only be read by running code in it.

    """
    check_checkpoint(path)
    tensors = _read_pickle(path) if path.suffix.lower() in _PICKLES else load_file(path)
    return {_OLD_NAME.sub(r"\1text_model.", name): tensor for name, tensor in tensors.items()}


def checkpoint_layout(path: Path) -> dict[str, Tensor]:
    """Read names and shapes of a file's tensors, as tensors on the meta device; a pickle is read whole for it.

    Raises:
        BaseModelError: when the file is damaged, or could only be read by running code in it.

    """
    if path.suffix.lower() in _PICKLES:
        return {name: tensor.to("meta") for name, tensor in read_checkpoint(path).items()}
    check_checkpoint(path)
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}


def _objects(path: Path) -> list[str]:
    """List the objects that a pickle names besides tensors, all of them harmless, or refuse it."""
    if not _zipped(path):
        return []  # PyTorch's format before 2020, of which only reading shows what is in it
    # broken archives and pickles fail in any way
    try:
        objects = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:
        raise _damaged(path) from None
    # Stable Diffusion's first checkpoints were saved by PyTorch Lightning, its callbacks beside the weights
    if all(name.startswith("pytorch_lightning.") for name in objects):
        return objects
    raise _refused(path, ", ".join(sorted(objects)))


def _read_pickle(path: Path) -> dict[str, Tensor]:
    ignored: list[Any] = [(_Ignored, name) for name in _objects(path)]
    try:
        with torch.serialization.safe_globals(ignored):
            found: Any = torch.load(str(path), map_location="cpu", weights_only=True, mmap=_zipped(path))
    except Exception as error:
        raise (_refused(path, "objects") if "Unsupported" in str(error) else _damaged(path)) from None
    while isinstance(found, Mapping) and "state_dict" in found:
        found = found["state_dict"]
    if not isinstance(found, Mapping):
        raise _damaged(path)
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _zipped(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _damaged(path: Path) -> BaseModelError:
    return BaseModelError(
        f"{path} is not a whole checkpoint. It was cut short or is something else; get it again."
    )


def _refused(path: Path, objects: str) -> BaseModelError:
    return BaseModelError(
        f"{path} is a pickle with more than tensors in it ({objects}), which could run code when read. "
        "Use the model's .safetensors file, or have it converted to one by a tool you trust."
    )
