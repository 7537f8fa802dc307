"""An adapter's parts onto an inflated UNet and off again, with a strength for each part."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tav_peft.adapter import Adapter, split_name
from tav_peft.errors import AdapterError
from tav_peft.method_updates import MethodUpdates
from tav_peft.methods import is_lora
from tav_peft.presets import PARTS, part_of
from tav_peft.recipe import Part
from tav_peft.unet.auditing import audit, has_branches
from tav_peft.unet.branches import add_branches, remove_branches, set_branch_strength
from tav_peft.unet.inflation import InflatedUNet, is_temporal
from tav_peft.unet.peft_layers import inject_layers, layers_config, layers_of, parameter_of, remove_layers

Strength = float | Mapping[Part, float]


@dataclasses.dataclass
class _Slot:
    """An attached adapter; `inner` is its name inside PEFT, chosen so that it can be part of no module path.

    `updates` are ΔW by the UNet's parameter of what was tuned by another method than LoRA.
    """

    adapter: Adapter
    inner: str
    strength: dict[Part, float]
    updates: Mapping[str, Tensor]


class _Term(NamedTuple):
    """What an adapter adds to a parameter: an update, or an absolute value, whose update counts from the first one."""

    strength: float
    tensor: Tensor
    absolute: bool


class Attachments:
    """The adapters on one UNet.

    Every module follows one law, W = W0 + Σ strength · ΔW, so strength 0 is exactly the base. LoRAs are PEFT layers;
    a dense update, or one by another method, takes the weight's place, whose first value is kept and put back bit for
    bit. A method that turns weights turns the base's own, whatever else is on the UNet. The first adapter
    switches the UNet to the variant it was tuned in, and the last one to go switches it back.
    """

    def __init__(self, unet: InflatedUNet) -> None:
        self.unet = unet
        self._slots: dict[str, _Slot] = {}
        self._originals: dict[str, Tensor] = {}
        self._own_variant = unet.variant
        self._count = 0

    @property
    def names(self) -> list[str]:
        """Names of the attached adapters, in the order they came."""
        return list(self._slots)

    def record(self) -> list[dict[str, Any]]:
        """Say in plain values which adapters act, each with its strengths; in an order of its own."""
        acting = [slot for slot in self._slots.values() if any(slot.strength.values())]
        said: list[dict[str, Any]] = [
            {"fingerprint": slot.adapter.fingerprint, "strength": slot.strength.copy()} for slot in acting
        ]
        return sorted(said, key=lambda adapter: json.dumps(adapter, sort_keys=True))

    def attach(self, name: str, adapter: Adapter, strength: Strength = 1.0) -> None:
        """Add an adapter under a name.

        Raises:
            AdapterError: when the name is taken, the adapter does not fit the UNet, tensor by tensor, or those on it were
                tuned in another variant.

        """
        if name in self._slots:
            raise AdapterError(
                f"An adapter named {name!r} is loaded already. Unload it, or choose another name."
            )
        strengths = by_part(strength)
        audit(adapter, self.unet)
        self._audit_variant(adapter)
        self._count += 1
        slot = _Slot(adapter, f"tav_slot_{self._count}", strengths, self._updates(adapter))
        if adapter.peft_config is not None and is_lora(adapter.peft_config):
            inject_layers(self.unet, layers_config(adapter.peft_config), slot.inner)
            _fill_lora(self.unet, adapter, slot.inner)
        if has_branches(adapter):
            add_branches(self.unet, slot.inner, adapter.weights, adapter.provenance.temporal_branches)
        if not self._slots:
            self._own_variant, self.unet.variant = self.unet.variant, adapter.provenance.model
        self._slots[name] = slot
        self.apply()

    def swap(self, name: str, adapter: Adapter) -> None:
        """Put an adapter in the place of another of the same config, whose layers take its tensors, strengths kept.

        Raises:
            AdapterError: when the two differ in their config or their variant, or the new one does not fit the UNet.

        """
        slot = self._slots[self._known(name)]
        alike = [(a.peft_config, a.provenance.model, a.provenance.subset) for a in (adapter, slot.adapter)]
        if alike[0] != alike[1] or has_branches(adapter) or has_branches(slot.adapter):
            raise AdapterError(
                f"The adapter is of another preset, rank, variant or selection than {name!r}, so its layers cannot take "
                f"its tensors. Unload {name!r} and load it."
            )
        audit(adapter, self.unet)
        slot.adapter, slot.updates = adapter, self._updates(adapter)
        _fill_lora(self.unet, adapter, slot.inner)
        self.apply()

    def detach(self, name: str) -> None:
        """Take an adapter off; the last one leaves the UNet bit for bit as it was."""
        slot = self._slots.pop(self._known(name))
        remove_layers(self.unet, slot.inner)
        remove_branches(self.unet, slot.inner)
        if not self._slots:
            self.unet.variant = self._own_variant
        self.apply()

    def set_strengths(self, strengths: Mapping[str, Strength]) -> None:
        """Set the strengths of the named adapters; those not named get 0."""
        given = {self._known(name): by_part(strength) for name, strength in strengths.items()}
        for name, slot in self._slots.items():
            slot.strength = given.get(name, dict.fromkeys(PARTS, 0.0))
        self.apply()

    def _audit_variant(self, adapter: Adapter) -> None:
        theirs = {slot.adapter.provenance.model for slot in self._slots.values()} - {adapter.provenance.model}
        if theirs:
            raise AdapterError(
                f"The adapter was tuned with {adapter.provenance.model}, {', '.join(self.names)} with "
                f"{theirs.pop()}. A UNet treats frames one way at a time: unload the one or the other."
            )

    def _known(self, name: str) -> str:
        if name not in self._slots:
            raise AdapterError(
                f"No adapter named {name!r} is loaded. Loaded: {', '.join(self._slots) or 'none'}."
            )
        return name

    def apply(self) -> None:
        """Bring every module to the strengths."""
        inner = [slot.inner for slot in self._slots.values()]
        for path, layer in layers_of(self.unet):
            # plain LoRAs of other tools stay on
            others = [n for n in layer.active_adapters if not n.startswith("tav_slot_")]
            layer.set_adapter(others + [n for n in inner if n in layer.r])
            layer.lora_A.requires_grad_(False)
            layer.lora_B.requires_grad_(False)
            for slot in self._slots.values():
                if slot.inner in layer.r:
                    layer.set_scale(slot.inner, slot.strength[part_of(path)])
        for slot in self._slots.values():
            set_branch_strength(self.unet, slot.inner, slot.strength["t_attn"])
        self._apply_dense()

    def _updates(self, adapter: Adapter) -> dict[str, Tensor]:
        """Make the updates of an adapter that was tuned by another method than LoRA."""
        return dict(MethodUpdates(adapter, "the adapter", self._own_weight))

    def _own_weight(self, name: str) -> Tensor:
        return self._originals.get(name, parameter_of(self.unet, name).data)

    @torch.no_grad()
    def _apply_dense(self) -> None:
        wanted: dict[str, list[_Term]] = {}
        for slot in self._slots.values():
            whole, updates = dense_tensors(slot.adapter), slot.updates
            for name, tensor in [*whole.items(), *updates.items()]:
                strength = slot.strength[part_of(name.rpartition(".")[0])]
                wanted.setdefault(name, []).append(
                    _Term(strength, tensor, is_temporal(name) and name in whole)
                )
        for name in [*self._originals]:
            if name not in wanted:
                _replace(parameter_of(self.unet, name), self._originals.pop(name))
        for name, terms in wanted.items():
            parameter = parameter_of(self.unet, name)
            original = self._originals.setdefault(name, parameter.data)
            _replace(parameter, _composite(original, terms))


def _replace(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter other data; never in place, since an inflated UNet shares its weights with the 2-D one."""
    parameter.data = value.to(parameter.device, parameter.dtype)


def _composite(original: Tensor, terms: list[_Term]) -> Tensor:
    """Sum W0 + Σ s·ΔW, to float32; the ΔW of an absolute tensor counts from W0, the initial value."""
    active = [term for term in terms if term.strength != 0.0]
    if not active:
        return original
    if len(active) == 1 and active[0].absolute and active[0].strength == 1.0:
        return active[0].tensor  # W0 + (W - W0) without its rounding
    # the update of an imported run may have more bits than float32, which not every device knows
    double = any(term.tensor.dtype == torch.float64 for term in active)
    first = original.to("cpu", torch.float64) if double else original.float()
    total = first
    for term in active:
        update = term.tensor.to(first.device, first.dtype)
        if term.absolute:
            update = update - first
        total = total + term.strength * update
    return total.float()


def by_part(strength: Strength) -> dict[Part, float]:
    """Spread one strength over the three parts, or complete a mapping with 1."""
    if not isinstance(strength, Mapping):
        return dict.fromkeys(PARTS, float(strength))
    unknown = [part for part in strength if part not in PARTS]
    if unknown:
        raise AdapterError(f"No part named {', '.join(unknown)}. The parts are {', '.join(PARTS)}.")
    return {part: float(strength.get(part, 1.0)) for part in PARTS}


def dense_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Dense tensors by the UNet parameter they change: a `diff` is an update, a T-Attn tensor is absolute.

    A T-Attn that runs beside the UNet's own changes none.
    """
    return {
        f"{module}.weight" if kind == "diff" else f"{module}.{kind}": tensor
        for name, tensor in adapter.weights.items()
        for module, kind in [split_name(name)]
        if kind in ("diff", "weight", "bias") and not (has_branches(adapter) and is_temporal(name))
    }


@torch.no_grad()
def _fill_lora(unet: InflatedUNet, adapter: Adapter, inner: str) -> None:
    for name, tensor in adapter.weights.items():
        module, kind = split_name(name)
        if kind in ("lora_A.weight", "lora_B.weight"):
            target = getattr(unet.get_submodule(module), kind.removesuffix(".weight"))[inner].weight
            target.copy_(tensor)
