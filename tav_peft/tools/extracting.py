"""Adapters out of tuned models: what was tuned, minus the base, as LoRAs; and what no adapter can hold is told."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tav_peft.adapter import Adapter, Derivation, check_values
from tav_peft.bases.checkpoint_file import read_checkpoint
from tav_peft.bases.ldm_keys import UNET, Place, places
from tav_peft.errors import AdapterError, BaseModelError
from tav_peft.formats import official
from tav_peft.formats.loaded_base import LoadedBase
from tav_peft.formats.official_run import find_run
from tav_peft.formats.origin import check_base, imported_from
from tav_peft.presets import PARTS, Subset
from tav_peft.recipe import Part
from tav_peft.tensor_file import FileTensors, LazyTensors, layout_of
from tav_peft.tools.ranks import RankRule
from tav_peft.tools.resizing import ResizeReport, resize
from tav_peft.unet.inflation import InflatedUNet, is_temporal
from tav_peft.unet.probe import probed

_QUERIES: tuple[Part, ...] = ("st_attn", "cross_attn")


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """What of a tuned UNet differs from the base outside the parts that an adapter has.

    `tensors` counts them, of `compared`; `first` is the first one's name, and `change` is ‖W - W0‖ / ‖W0‖ over them.
    """

    tensors: int
    compared: int
    first: str
    change: float


@dataclasses.dataclass(frozen=True)
class Extracted:
    """An adapter out of a tuned model, what its LoRAs lost (None where all is dense), and what was left out."""

    adapter: Adapter
    report: ResizeReport | None
    left_out: LeftOut | None


@torch.no_grad()
def extract(
    tuned: str | Path,
    base: LoadedBase,
    rule: RankRule | None,
    *,
    preset: str | None = None,
    caption: str = "",
) -> Extracted:
    """Take what a tuned model has and `base`, which is loaded in float32, has not, as an adapter.

    `tuned` is a run of the original code, as `official.read` takes it, which has all three parts; or a 2-D model that was
    fine-tuned from the base, a folder in diffusers layout, its unet, or a single file, of which the query projections
    are taken. Updates W - W0 become LoRAs as in `resizing.resize`; the preset paper needs no rule and keeps them whole.
    A tensor that is the base's, rounded to the precision of the file, has no update. Of a 2-D model only the UNet is
    looked at, a tensor at a time.

    Raises:
        AdapterError: when there is no model, it does not fit the base, nothing of the parts is tuned, or the rule is
            missing.

    """
    check_base(base)
    path = Path(tuned)
    if rule is None and preset != "paper":
        raise AdapterError("Without a rank or a share of energy only the preset paper can be had. Give one.")
    if rule is not None and preset == "paper":
        raise AdapterError(
            "The preset paper keeps updates whole. Leave out the rank, or choose lite or hybrid."
        )
    found = _read_unet(path, base.unet)
    left_out = None
    if any(is_temporal(name) for name in layout_of(found)):
        whole = official.read(path, base, caption=caption).adapter
    else:
        _check(found, base.unet, path.name, base.base_name)
        left_out = _left_out(found, base.unet)
        subset = Subset("paper", _QUERIES)
        recipe = {"name": "extracted", "description": "the difference of a tuned model and its base"}
        origin = imported_from(base, subset, recipe, caption=caption)
        whole = Adapter(_TunedQueries(found, base.unet, path.name), None, origin)
    made, report = (whole, None) if rule is None else resize(whole, rule, preset=preset)
    if not any(tensor.any() for name, tensor in made.tensors.items() if not name.endswith(".lora_A.weight")):
        raise AdapterError(
            f"The query projections of {path.name} are those of {base.base_name}: there is nothing to extract."
        )
    done = Derivation(tool="extract", name=path.name, settings=_settings(rule, made.subset))
    made = Adapter(
        dict(made.tensors),
        made.peft_config,
        made.provenance.model_copy(update={"derived_from": (done,)}),
    )
    return Extracted(probed(made, base.unet), report, left_out)


def _settings(rule: RankRule | None, subset: Subset) -> dict[str, Any]:
    given = dataclasses.asdict(rule) if rule is not None else {}
    return {name: value for name, value in given.items() if value is not None} | {"preset": subset.preset}


class _TunedQueries(LazyTensors):
    """The dense updates W - W0 of a tuned UNet's query projections, each made when it is asked for."""

    def __init__(self, found: Mapping[str, Tensor], unet: InflatedUNet, file: str) -> None:
        self._found, self._unet, self._file = found, unet, file
        ends = tuple(f"{end}.weight" for part in _QUERIES for end in PARTS[part])
        self.layout = {
            name.removesuffix(".weight") + ".diff": torch.empty_like(like, dtype=torch.float32, device="meta")
            for name, like in layout_of(found).items()
            if name.endswith(ends)
        }

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.layout:
            raise KeyError(name)
        parameter = name.removesuffix(".diff") + ".weight"
        theirs = check_values(parameter, self._found[parameter], self._file)
        return _change(theirs, self._unet.get_parameter(parameter))


def _change(theirs: Tensor, ours: Tensor) -> Tensor:
    """Give W - W0 in float32; 0 where they are the same but for the rounding of the file."""
    ours = ours.cpu()
    if torch.equal(theirs, ours.to(theirs.dtype)):
        return torch.zeros_like(theirs, dtype=torch.float32)
    return theirs.float() - ours.float()


def _left_out(found: Mapping[str, Tensor], unet: InflatedUNet) -> LeftOut | None:
    ends = tuple(f"{end}.weight" for part in _QUERIES for end in PARTS[part])
    others = [name for name in layout_of(found) if not name.endswith(ends)]
    state, changed, squares = unet.state_dict(), [], []
    for name in sorted(others):
        ours = state[name].cpu().float()
        change = _change(found[name], state[name]).double().square().sum()
        if change > 0 or change.isnan():
            changed.append(name)
            squares.append((float(change), float(ours.double().square().sum())))
    if not changed:
        return None
    wrong, asked = (math.fsum(column) for column in zip(*squares, strict=True))
    return LeftOut(len(changed), len(others), changed[0], math.sqrt(wrong / asked) if asked else math.inf)


# -- the tuned UNet ----------------------------------------------------------------------------------------


def _read_unet(path: Path, unet: InflatedUNet) -> Mapping[str, Tensor]:
    """Find a UNet's tensors by their names in diffusers, those of a safetensors file without reading them."""
    file = _unet_file(path) if path.is_dir() else path
    if not file.is_file():
        raise AdapterError(f"{file} does not exist. Check the name.")
    found: Mapping[str, Tensor] = FileTensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
    if any(name.startswith(UNET) for name in layout_of(found)):
        flat = [name for name in unet.state_dict() if not is_temporal(name)]
        return _Renamed(
            found, places("sd1", "unet", flat), file.name
        )  # all kinds name the UNet's tensors alike
    return found


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        return read_checkpoint(file)
    except BaseModelError as error:
        raise AdapterError(str(error)) from None


def _unet_file(folder: Path) -> Path:
    """Find the file of the UNet in a model's folder or its unet; a run of the original code may have it elsewhere."""
    for place in (folder / "unet", folder):
        files = sorted(place.glob("diffusion_pytorch_model*"), key=lambda file: (len(file.name), file.name))
        weights = [file for file in files if file.suffix in (".safetensors", ".bin")]
        if any("-of-" in file.name for file in weights):
            raise AdapterError(f"{place} has a UNet in several files. Save it as one, or give a single file.")
        if weights:
            return next((file for file in weights if file.suffix == ".safetensors"), weights[0])
    return find_run(folder).weights


class _Renamed(LazyTensors):
    """A single file's UNet by its names in diffusers."""

    def __init__(self, found: Mapping[str, Tensor], where: Mapping[str, Place], file: str) -> None:
        self._found, self._where = found, where
        there = layout_of(found)
        known = {place.key for place in where.values()}
        wrong = sorted(known ^ {key for key in there if key.startswith(UNET)})
        if wrong:
            raise AdapterError(
                f"{file} has not the UNet of this base: {len(wrong)} tensors are missing or too many, first {wrong[0]}. "
                "Name the base that it was tuned from."
            )
        self.layout = {name: place.take(there[place.key]) for name, place in where.items()}

    def __getitem__(self, name: str) -> Tensor:
        place = self._where[name]
        return place.take(self._found[place.key])


def _check(found: Mapping[str, Tensor], unet: InflatedUNet, file: str, base: str) -> None:
    ours = {name: tensor for name, tensor in unet.state_dict().items() if not is_temporal(name)}
    theirs = layout_of(found)
    wrong = sorted(set(ours) ^ set(theirs))
    wrong += [name for name in ours if name in theirs and ours[name].shape != theirs[name].shape]
    if wrong:
        raise AdapterError(
            f"{file} is no UNet like that of {base}: {len(wrong)} tensors are missing, too many or of other shapes, "
            f"first {wrong[0]}. Name the base that it was tuned from."
        )
