"""The part of an adapter that image models have a place for, its query projections; and what is left out, by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tav_peft.adapter import LATENTS, Adapter, check_values, split_name
from tav_peft.errors import AdapterError
from tav_peft.methods import is_lora, json_config
from tav_peft.presets import Subset, part_of
from tav_peft.tensor_file import LazyTensors, layout_of
from tav_peft.updates import Updates

LEFT_OUT = "tav_peft_left_out"  # the header's entry
_REASONS = {
    "t_attn": "image tools have no temporal attention to put it in",
    "latents": "they are the clip, no weights",
}


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """Tensors of one part of an adapter that a format has no place for, and why."""

    part: str
    names: tuple[str, ...]
    reason: str


class MadeTensors(LazyTensors):
    """Tensors that functions make when they are asked for, each by its name, with its shape and dtype."""

    def __init__(self, makers: Mapping[str, tuple[Tensor, Callable[[], Tensor]]]) -> None:
        self.makers = makers
        self.layout = {name: like for name, (like, _) in makers.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.makers[name][1]()


class RenamedTensors(LazyTensors):
    """Tensors of a mapping under other names, read when they are asked for, and refused where they are not finite.

    `names` are the old ones by the new; `file` is what errors call the mapping.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], names: Mapping[str, str], file: str = "the adapter"
    ) -> None:
        layout = layout_of(tensors)
        self._tensors, self._names, self._file = tensors, names, file
        self.layout = {new: layout[old] for new, old in names.items()}

    def __getitem__(self, name: str) -> Tensor:
        old = self._names[name]
        return check_values(old, self._tensors[old], self._file)


@dataclasses.dataclass(frozen=True)
class Query:
    """The update of one query projection as a LoRA whose scale is alpha/rank; `A` and `B` read it."""

    module: str
    rank: int
    alpha: float
    like: tuple[Tensor, Tensor]
    A: Callable[[], Tensor]
    B: Callable[[], Tensor]


def left_out(adapter: Adapter) -> list[LeftOut]:
    """Say what of an adapter is no part of an image model."""
    parts: dict[str, list[str]] = {}
    for name in layout_of(adapter.tensors):
        part = "latents" if name == LATENTS else part_of(split_name(name)[0])
        if part in _REASONS:
            parts.setdefault(part, []).append(name)
    return [LeftOut(part, tuple(sorted(names)), _REASONS[part]) for part, names in sorted(parts.items())]


def image_part(adapter: Adapter) -> Adapter:
    """Give the adapter without T-Attn and latents; its tensors are read when they are asked for.

    Updates by another method than LoRA become dense ones.

    Raises:
        AdapterError: when it is T-Attn alone, or its method turns the weights of a base.

    """
    absent = {name for each in left_out(adapter) for name in each.names}
    layout = layout_of(adapter.tensors)
    kept = {name: like for name, like in layout.items() if name not in absent}
    if not kept:
        raise AdapterError(
            "This adapter is T-Attn alone, and image tools have no temporal attention to put it in. Keep the "
            ".safetensors file, or export it as peft or official."
        )
    tensors = RenamedTensors(adapter.tensors, {name: name for name in kept})
    given, subset = adapter.provenance, adapter.subset
    if "t_attn" not in subset.parts:
        return _spelled(Adapter(tensors, adapter.peft_config, given))
    subset = Subset(subset.preset, tuple(part for part in subset.parts if part != "t_attn"), subset.blocks)
    # the probe was taken with T-Attn
    changed = {"subset": _as_json(subset), "probe": None, "temporal_branches": 1}
    config = None if adapter.peft_config is None else _reduced(adapter.peft_config, subset, kept)
    return _spelled(Adapter(tensors, config if subset.lora_parts else None, given.model_copy(update=changed)))


def _spelled(adapter: Adapter) -> Adapter:
    """Give an adapter of query projections as LoRAs or dense updates, for which other tools have names."""
    return adapter if is_lora(adapter.peft_config) else as_dense(adapter)


def loras(adapter: Adapter) -> list[Query]:
    """Give each update as a LoRA; a dense one as a LoRA of full rank, exactly: B is the update, A the identity."""
    updates, layout, found = Updates(adapter, "the adapter"), layout_of(adapter.tensors), []
    for parameter in updates.layout:
        module = parameter.removesuffix(".weight")
        rank = updates.rank(parameter)
        if rank is not None:
            a, b = (f"{module}.lora_{kind}.weight" for kind in "AB")
            read = reader(adapter, a), reader(adapter, b)
            found.append(Query(module, rank, updates.alpha(parameter), (layout[a], layout[b]), *read))
        else:
            dense = layout[f"{module}.diff"]
            width = dense.shape[1]
            identity, make = eye_of(width, dense.dtype)
            read = make, reader(adapter, f"{module}.diff")
            found.append(Query(module, width, width, (identity, dense), *read))
    return found


def as_dense(adapter: Adapter) -> Adapter:
    """Give an adapter of query projections with dense updates, multiplied out, in the precision of its tensors."""
    if adapter.peft_config is None:
        return adapter
    updates, layout, makers = Updates(adapter, "the adapter"), layout_of(adapter.tensors), {}
    for parameter, like in updates.layout.items():
        module = parameter.removesuffix(".weight")
        dtype = next(each.dtype for name, each in layout.items() if name.startswith(f"{module}."))
        makers[f"{module}.diff"] = like.to(dtype), _product(updates, parameter, dtype)
    subset = Subset("paper", adapter.subset.parts, adapter.subset.blocks)
    changed = {"subset": _as_json(subset), "probe": None}
    return Adapter(MadeTensors(makers), None, adapter.provenance.model_copy(update=changed))


def full_rank_config(adapter: Adapter, queries: Sequence[Query]) -> dict[str, Any]:
    """Build the PEFT config of a dense adapter's updates as LoRAs of full rank."""
    ranks = {query.module: query.rank for query in queries}
    subset = Subset("lite", adapter.subset.parts, adapter.subset.blocks)
    config = subset.peft_config(ranks, rank=max(ranks.values()))
    assert config is not None
    config.rank_pattern, config.alpha_pattern = ranks, dict(ranks)
    return json_config(config)


def header(adapter: Adapter, kept: Adapter) -> dict[str, str]:
    """Spell what a file says of itself: what of the adapter is in it, and what was left out."""
    entries = {
        "format": "pt",
        "tav_peft": json.dumps(kept.provenance.model_dump(mode="json"), sort_keys=True),
        "peft_config": json.dumps(kept.peft_config, sort_keys=True),
    }
    absent = left_out(adapter)
    if absent:
        said = [{"part": each.part, "count": len(each.names), "names": each.names} for each in absent]
        entries[LEFT_OUT] = json.dumps(said)
    return entries


def _reduced(config: Mapping[str, Any], subset: Subset, kept: Mapping[str, Tensor]) -> dict[str, Any]:
    """Give the PEFT config without T-Attn, with ranks and alphas of those modules that are kept."""
    modules = {split_name(name)[0] for name in kept}
    targets = subset.peft_config(modules, rank=1)
    others = {key: value for key, value in config.items() if key != "modules_to_save"}
    if targets is None:
        return others
    for pattern in ("rank_pattern", "alpha_pattern"):
        if pattern in others:
            inside = {key: v for key, v in others[pattern].items() if any(m.endswith(key) for m in modules)}
            others[pattern] = inside
            if not inside:
                del others[pattern]
    return {**others, "target_modules": json_config(targets)["target_modules"]}


def _as_json(subset: Subset) -> dict[str, Any]:
    return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(subset).items()}


def reader(adapter: Adapter, name: str) -> Callable[[], Tensor]:
    """Give what reads one of the adapter's tensors, and refuses it where it is not finite."""
    return lambda: check_values(name, adapter.tensors[name], "the adapter")


def _product(updates: Updates, parameter: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    def make() -> Tensor:
        product = updates[parameter].to(dtype)
        if not torch.isfinite(product).all():
            raise AdapterError(
                f"The update of {parameter} does not fit into {dtype}, or is not finite. Cast the adapter to fp32."
            )
        return product

    return make


def eye_of(width: int, dtype: torch.dtype) -> tuple[Tensor, Callable[[], Tensor]]:
    """Give the shape and dtype of an identity matrix, as a tensor without storage, and what makes it."""
    like = torch.empty(width, width, dtype=dtype, device="meta")
    return like, lambda: torch.eye(width, dtype=dtype)
