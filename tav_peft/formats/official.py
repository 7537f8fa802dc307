"""Reading what the original Tune-A-Video tuned: a whole UNet, or its trained tensors, as an adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tav_peft.adapter import Adapter, check_values
from tav_peft.errors import AdapterError
from tav_peft.formats import inflated
from tav_peft.formats.loaded_base import LoadedBase
from tav_peft.formats.official_run import find_run, read_weights
from tav_peft.formats.origin import UNKNOWN_CLIP, check_base, imported_from
from tav_peft.methods import json_config
from tav_peft.presets import PARTS, Subset
from tav_peft.unet.inflation import InflatedUNet, is_temporal
from tav_peft.unet.probe import probed


@dataclasses.dataclass(frozen=True)
class Imported:
    """An adapter made of a run, and how much of the run is in it.

    `energy` is the share of each query projection's update that its LoRA keeps, by module: Σσ² of the kept singular
    values over Σσ² of all; empty where the updates are dense. `inexact` counts the tuned weights that base and adapter
    do not give back bit for bit in float32, and `deviation` is the largest distance of one. `base_checked` says whether
    the file had the weights that are not tuned too, so that they could be compared with the base's.
    """

    adapter: Adapter
    energy: dict[str, float]
    inexact: int
    deviation: float
    base_checked: bool


@torch.no_grad()
def read(path: str | Path, base: LoadedBase, *, rank: int | None = None, caption: str = "") -> Imported:
    """Convert a run of the original code on `base`, which is loaded in float32, into an adapter.

    So is a checkpoint that `inflated.write` wrote.

    `path` is the output folder, its `unet` folder or file, a `checkpoint-N`, or the `.pth` of trained tensors that the
    LOVEU-TGVE-2023 code saves. Without `rank` the result is exact: T-Attn as it is, and the query projections as dense
    updates; with it, those are LoRAs of that rank, cut off a singular value decomposition, the best for the rank
    (Eckart & Young 1936). `caption` counts more than the one in the run's config. The latents that the original keeps in
    inv_latents/ are not read: an inversion belongs to the code that made it.

    Raises:
        AdapterError: when there is no run, the file is damaged or would run code, or its tensors are not what
            Tune-A-Video tunes on this base.

    """
    check_base(base)
    run = find_run(Path(path))
    ours = inflated.section_of(run.weights.parent)
    if ours is not None:
        base.unet.reset_temporal(ours.temporal_seed)
    found, unet, file = read_weights(run.weights), base.unet, run.weights.name
    names = _trainable(unet)
    whole = _check_names(found, unet, names, file)
    tuned = {name: found[name] for name in names}
    _check_tuned(tuned, unet, file)
    if whole:
        _check_frozen(found, unet, names, file, base.base_name)
    subset = Subset("paper" if rank is None else "hybrid")
    modules = [name for name, _ in unet.named_modules()]
    config = None if rank is None else subset.peft_config(modules, rank=rank)
    made = _Conversion()
    for name, tensor in tuned.items():
        if is_temporal(name):
            made.tensors[name] = tensor.clone()
        elif rank is None:
            made.add_dense(name.removesuffix(".weight"), tensor, unet.get_parameter(name))
        else:
            made.add_lora(name.removesuffix(".weight"), tensor, unet.get_parameter(name), rank)
    plain = None if config is None else json_config(config)
    recorded = run.config.train_data.prompt if run.config else ""
    tuning: dict[str, Any] = {"preset": subset.preset, "dtype": "fp32", **({"rank": rank} if rank else {})}
    clip, recipe = run.config.clip if run.config else UNKNOWN_CLIP, run.recipe(**tuning)
    origin = imported_from(base, subset, recipe, caption=caption or recorded, clip=clip, step=run.step or 0)
    if ours is not None:
        origin = origin.model_copy(update={"model": ours.model})
    adapter = Adapter(made.tensors, plain, origin)
    return Imported(probed(adapter, unet), made.energy, made.inexact, made.deviation, base_checked=whole)


class _Conversion:
    """The tensors of an adapter, and what they lose of the run's weights, as they are made one by one."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.energy: dict[str, float] = {}
        self.inexact = 0
        self.deviation = 0.0

    def add_dense(self, module: str, tuned: Tensor, first: Tensor) -> None:
        """Keep W - W0 so that W0 + (W - W0) is W bit for bit.

        The difference of two floats of one size is exact (Sterbenz 1974). Where W has become much smaller than W0 it
        has more bits than float32 holds, and is kept in float64.
        """
        tuned, first = tuned.float(), first.float()
        update = tuned - first
        if not torch.equal(first + update, tuned):
            update = tuned.double() - first.double()
        self.tensors[f"{module}.diff"] = update
        self._compare((first + update).float(), tuned)

    def add_lora(self, module: str, tuned: Tensor, first: Tensor, rank: int) -> None:
        """Keep the `rank` largest singular values of W - W0; B has them, so a module that was not tuned has B = 0."""
        update = tuned.float() - first.float()
        if rank > min(update.shape):
            raise AdapterError(
                f"Rank {rank} is more than {module} has, which is {min(update.shape)}. Give at most that."
            )
        U, S, Vh = torch.linalg.svd(update, full_matrices=False)
        B, A = (U[:, :rank] * S[:rank]).contiguous(), Vh[:rank].contiguous()
        self.tensors |= {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
        squares = S.double().square()
        total = float(squares.sum())
        self.energy[module] = float(squares[:rank].sum()) / total if total else 1.0
        self._compare(first.float() + B @ A, tuned.float())

    def _compare(self, rebuilt: Tensor, tuned: Tensor) -> None:
        self.inexact += int((rebuilt != tuned).sum())
        self.deviation = max(self.deviation, float((rebuilt.double() - tuned.double()).abs().max()))


# -- is it a run, and of this base? ------------------------------------------------------------------------


def _trainable(unet: InflatedUNet) -> list[str]:
    modules = Subset("paper").dense_modules(name for name, _ in unet.named_modules())
    return [f"{m}.{kind}" for m in modules for kind, _ in unet.get_submodule(m).named_parameters()]


def _check_names(found: Mapping[str, Tensor], unet: InflatedUNet, trainable: list[str], file: str) -> bool:
    """Tell a whole UNet (True) from the trained tensors of one (False), and refuse all else."""
    if found and not any(is_temporal(name) for name in found):
        raise AdapterError(
            f"{file} has no temporal attention (attn_temp), so it is no UNet that Tune-A-Video tuned. "
            "Give the run's output folder."
        )
    queries = tuple(f"{end}.weight" for part in ("st_attn", "cross_attn") for end in PARTS[part])
    whole = any(".attn_temp." not in name and not name.endswith(queries) for name in found)
    expected = set(unet.state_dict()) if whole else set(trainable)
    missing, unexpected = sorted(expected - set(found)), sorted(set(found) - expected)
    if missing or unexpected:
        say = [f"{len(names)} {what}, first {names[0]}" for what, names in
               (("missing", missing), ("unexpected", unexpected)) if names]  # fmt: skip
        raise AdapterError(
            f"{file} does not have the tensors of this base's UNet with Tune-A-Video's temporal attention: "
            f"{'; '.join(say)}. Name the base that the run started from."
        )
    return whole


def _check_tuned(tuned: Mapping[str, Tensor], unet: InflatedUNet, file: str) -> None:
    for name, tensor in tuned.items():
        shape = tuple(unet.get_parameter(name).shape)
        if tuple(tensor.shape) != shape:
            raise AdapterError(
                f"{file}: {name} has shape {tuple(tensor.shape)}, this base needs {shape}. "
                "Name the base that the run started from."
            )
        check_values(name, tensor, file)


def _check_frozen(
    found: Mapping[str, Tensor], unet: InflatedUNet, trainable: Iterable[str], file: str, base: str
) -> None:
    """Compare all that the original does not tune with the base, in the run's precision: it must be the same."""
    tuned = set(trainable)
    frozen = {name: tensor for name, tensor in unet.state_dict().items() if name not in tuned}
    other = [name for name, ours in frozen.items() if not _same(found[name], ours)]
    if not other:
        return
    norms = [name for name in other if ".norm_temp." in name]
    if norms == other:
        raise AdapterError(
            f"{file} has tuned {len(norms)} tensors of norm_temp, first {norms[0]}, which Tune-A-Video leaves at 1 and 0 "
            "and no adapter holds. It is another code's."
        )
    if len(other) > len(frozen) // 2:
        raise AdapterError(
            f"{file} was not tuned on {base}: {len(other)} of {len(frozen)} tensors that Tune-A-Video does not tune are "
            "others there. Name the base that the run started from, in the precision that it was loaded in."
        )
    raise AdapterError(
        f"{file} has tuned more than Tune-A-Video does: {len(other)} of {len(frozen)} tensors beside the query "
        f"projections and attn_temp differ from {base}, first {other[0]}. An adapter cannot hold them."
    )


def _same(theirs: Tensor, ours: Tensor) -> bool:
    return theirs.shape == ours.shape and torch.equal(theirs, ours.to(theirs.device, theirs.dtype))
