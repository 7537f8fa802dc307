"""Our own checkpoint: a base in diffusers layout whose UNet is inflated, with the updates in its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor

from tav_peft.adapter import Adapter
from tav_peft.bases.checkpoint_file import read_checkpoint
from tav_peft.bases.folder import read_config
from tav_peft.errors import AdapterError, BaseModelError
from tav_peft.formats.loaded_base import LoadedBase
from tav_peft.formats.official_configs import write_json
from tav_peft.recipe import ModelSection
from tav_peft.tensor_file import LazyTensors, write_tensors
from tav_peft.unet import temporal_init
from tav_peft.unet.inflation import InflatedUNet, is_temporal
from tav_peft.updates import UpdatedTensors, Updates
from tav_peft.whole import whole

WEIGHTS = "diffusion_pytorch_model.safetensors"
_CLASS, _OWN = "InflatedUNet", "tav_peft"  # in the UNet's config: its class, and what no 2-D UNet has
_PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


class Section(pydantic.BaseModel):
    """What the config of an inflated UNet says besides that of a 2-D one.

    `temporal_seed` is that of the initial values which T-Attn has, or had before it was tuned.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    model: ModelSection
    temporal_init: Literal["philox-uniform-1"] = temporal_init.NAME
    temporal_seed: int
    temporal_tuned: bool


def write(adapter: Adapter, path: Path, base: LoadedBase) -> Path:
    """Write a base with an adapter at strength 1 in its weights, as a folder that `from_pretrained` loads.

    The weights are in the precision that the base was loaded in, and the base is left as it was. Of a checkpoint that
    was written so, with the adapter's update negated, the base is given back within the rounding of that precision.
    Stock diffusers reads the folder as the image model in it, and warns that it leaves out the temporal tensors.

    Raises:
        AdapterError: when the adapter does not fit the base, or runs several temporal attentions, or the disk refuses.

    """
    info = adapter.provenance
    if base.adapters:
        raise AdapterError(f"Adapters are loaded ({', '.join(base.adapters)}). Unload them before exporting.")
    if info.temporal_branches > 1:
        raise AdapterError(
            f"The adapter has {info.temporal_branches} temporal attentions side by side, a checkpoint has one. "
            "Merge by another method, such as linear."
        )
    updates, init = Updates(adapter, "the adapter", base.unet.get_parameter), info.temporal_init
    state = _state(base.unet, init.seed)
    tensors: LazyTensors = UpdatedTensors(state, updates, {name: name for name in updates})
    tuned = not _at_rest(state, updates, init.seed)
    tensors = tensors if tuned else _Rested(tensors, init.seed)
    return save(tensors, path, base, Section(model=info.model, temporal_seed=init.seed, temporal_tuned=tuned))


def save(unet: Mapping[str, Tensor], path: Path, base: LoadedBase, section: Section) -> Path:
    """Write the folder: the tensors of an inflated UNet, and the other parts of a base."""
    if path.exists() and not path.is_dir():
        raise AdapterError(f"{path} is a file; a checkpoint is a folder. Give another name.")
    with whole(path, AdapterError) as folder:
        for name, part in _parts(base).items():
            part.save_pretrained(folder / name)
        write_tensors(folder / "unet" / WEIGHTS, unet, {"format": "pt"})
        config = {**base.unet.config, "_class_name": _CLASS, _OWN: section.model_dump(mode="json")}
        config.pop("_name_or_path", None)
        write_json(folder / "unet" / "config.json", config)
        write_json(folder / "model_index.json", _index(base))
    return path


def section_of(folder: Path) -> Section | None:
    """Read what a UNet's folder says of its inflation, or None where it is not one that `write` wrote.

    Raises:
        BaseModelError: when it is damaged, or was written by a newer version.

    """
    config = read_config(folder / "config.json") if (folder / "config.json").is_file() else {}
    if config.get("_class_name") != _CLASS:
        return None
    try:
        return Section.model_validate(config.get(_OWN))
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        raise BaseModelError(
            f"{folder} is an inflated UNet whose config this tav-peft cannot read: {'.'.join(map(str, problem['loc']))}: "
            f"{problem['msg']}. Update tav-peft, or write the checkpoint again."
        ) from None


def read_unet(folder: Path, section: Section, dtype: torch.dtype) -> InflatedUNet:
    """Load the UNet in a folder that `write` wrote.

    Raises:
        BaseModelError: when it is damaged.

    """
    config = read_config(folder / "config.json")
    config.pop(_OWN)
    with torch.device("meta"):
        unet: InflatedUNet = InflatedUNet.from_config(config)
    wanted = unet.state_dict()
    found = read_checkpoint(folder / WEIGHTS)
    other = sorted(set(wanted) ^ set(found)) or [n for n in wanted if wanted[n].shape != found[n].shape]
    if other:
        raise BaseModelError(
            f"{folder}: {len(other)} tensors of its UNet are not those of its config, first {other[0]}. It was changed; "
            "write it again."
        )
    # copies, so that nothing hangs on the file once it is read
    unet.load_state_dict({name: tensor.to(dtype, copy=True) for name, tensor in found.items()}, assign=True)
    unet.temporal_seed, unet.temporal_tuned = section.temporal_seed, section.temporal_tuned
    unet.variant = section.model
    return unet.eval()


class _Rested(LazyTensors):
    """A UNet's tensors, with the temporal ones at their initial values."""

    def __init__(self, tensors: LazyTensors, seed: int) -> None:
        self.layout, self._tensors, self._seed = tensors.layout, tensors, seed

    def __getitem__(self, name: str) -> Tensor:
        if not is_temporal(name):
            return self._tensors[name]
        like = self.layout[name]
        return temporal_init.initial(name, like.shape, self._seed).to(like.dtype)


def _state(unet: InflatedUNet, seed: int) -> dict[str, Tensor]:
    """Give the UNet's tensors, T-Attn that was not tuned with the initial values of `seed`."""
    state = {name: tensor.detach() for name, tensor in unet.state_dict().items()}
    if unet.temporal_seed != seed and not unet.temporal_tuned:
        for name, tensor in state.items():
            if is_temporal(name):
                state[name] = temporal_init.initial(name, tensor.shape, seed).to(tensor.device, tensor.dtype)
    return state


def _at_rest(state: Mapping[str, Tensor], updates: Updates, seed: int) -> bool:
    """Tell whether every temporal tensor ends at its initial value, but for the rounding of an update there and back."""
    for name in (name for name in state if is_temporal(name)):
        update = updates[name] if name in updates else torch.zeros(())
        before, first = state[name].float().cpu(), temporal_init.initial(name, state[name].shape, seed)
        allowed = 4 * torch.finfo(state[name].dtype).eps * (before.abs() + update.abs())
        if not ((before + update - first).abs() <= allowed).all():
            return False
    return True


def _parts(base: LoadedBase) -> dict[str, Any]:
    return {name: part for name in _PARTS if (part := getattr(base, name, None)) is not None}


def _index(base: LoadedBase) -> dict[str, Any]:
    """Say what the folder has; the UNet is called by the class that stock diffusers can make of it."""
    classes = {
        name: [type(part).__module__.split(".")[0], type(part).__name__]
        for name, part in _parts(base).items()
    }
    zeros = {"force_zeros_for_empty_prompt": base.config.get("force_zeros_for_empty_prompt", True)}
    return {
        "_class_name": "TuneAVideoPipeline",
        **zeros,
        **classes,
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
