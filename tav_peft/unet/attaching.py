"""An adapter's parts onto an inflated UNet and off again, with a strength for each part."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn

from tav_peft.adapter import Adapter, split_name
from tav_peft.bases import architecture
from tav_peft.errors import AdapterError
from tav_peft.presets import PARTS, part_of
from tav_peft.recipe import Part
from tav_peft.unet import temporal_init
from tav_peft.unet.branches import add_branches, remove_branches, set_branch_strength, stacked_shape
from tav_peft.unet.inflation import InflatedUNet, is_temporal

Strength = float | Mapping[Part, float]


@dataclasses.dataclass
class _Slot:
    """An attached adapter; `inner` is its name inside PEFT, chosen so that it can be part of no module path."""

    adapter: Adapter
    inner: str
    strength: dict[Part, float]


class Attachments:
    """The adapters on one UNet.

    Every module follows one law, W = W0 + Σ strength · ΔW, so strength 0 is exactly the base. LoRAs are PEFT layers;
    a dense update takes the weight's place, whose first value is kept and put back bit for bit. The first adapter
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
        slot = _Slot(adapter, f"tav_slot_{self._count}", strengths)
        if adapter.peft_config is not None:
            inject_lora(self.unet, lora_config(adapter.peft_config), slot.inner)
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
        slot.adapter = adapter
        _fill_lora(self.unet, adapter, slot.inner)
        self.apply()

    def detach(self, name: str) -> None:
        """Take an adapter off; the last one leaves the UNet bit for bit as it was."""
        slot = self._slots.pop(self._known(name))
        remove_lora(self.unet, slot.inner)
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
        for path, layer in lora_layers(self.unet):
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

    @torch.no_grad()
    def _apply_dense(self) -> None:
        wanted: dict[str, list[tuple[float, Tensor]]] = {}
        for slot in self._slots.values():
            for name, tensor in dense_tensors(slot.adapter).items():
                strength = slot.strength[part_of(split_name(name)[0])]
                wanted.setdefault(name, []).append((strength, tensor))
        for name in [*self._originals]:
            if name not in wanted:
                _replace(_parameter(self.unet, name), self._originals.pop(name))
        for name, terms in wanted.items():
            parameter = _parameter(self.unet, name)
            original = self._originals.setdefault(name, parameter.data)
            _replace(parameter, _composite(name, original, terms))


def _replace(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter other data; never in place, since an inflated UNet shares its weights with the 2-D one."""
    parameter.data = value.to(parameter.device, parameter.dtype)


def _composite(name: str, original: Tensor, terms: list[tuple[float, Tensor]]) -> Tensor:
    """Sum W0 + Σ s·ΔW, to float32; a T-Attn tensor is absolute, and its ΔW counts from W0, the initial value."""
    active = [(strength, tensor) for strength, tensor in terms if strength != 0.0]
    if not active:
        return original
    if is_temporal(name) and len(active) == 1 and active[0][0] == 1.0:
        return active[0][1]  # W0 + (W - W0) without its rounding
    # the update of an imported run may have more bits than float32, which not every device knows
    double = any(tensor.dtype == torch.float64 for _, tensor in active)
    first = original.to("cpu", torch.float64) if double else original.float()
    total = first
    for strength, tensor in active:
        update = tensor.to(first.device, first.dtype)
        if is_temporal(name):
            update = update - first
        total = total + strength * update
    return total.float()


def by_part(strength: Strength) -> dict[Part, float]:
    """Spread one strength over the three parts, or complete a mapping with 1."""
    if not isinstance(strength, Mapping):
        return dict.fromkeys(PARTS, float(strength))
    unknown = [part for part in strength if part not in PARTS]
    if unknown:
        raise AdapterError(f"No part named {', '.join(unknown)}. The parts are {', '.join(PARTS)}.")
    return {part: float(strength.get(part, 1.0)) for part in PARTS}


def lora_config(given: Mapping[str, Any]) -> LoraConfig:
    """Build the LoraConfig of an adapter, without the whole modules, which are handled here."""
    return LoraConfig(**{**given, "modules_to_save": None})


def dense_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Dense tensors by the UNet parameter they change: a `diff` is an update, a T-Attn tensor is absolute.

    A T-Attn that runs beside the UNet's own changes none.
    """
    return {
        f"{module}.weight" if kind == "diff" else f"{module}.{kind}": tensor
        for name, tensor in adapter.weights.items()
        for module, kind in [split_name(name)]
        if not kind.startswith("lora_") and not (has_branches(adapter) and is_temporal(name))
    }


def has_branches(adapter: Adapter) -> bool:
    """Tell whether the adapter's T-Attn runs beside the UNet's own, and does not take its place."""
    return adapter.provenance.temporal_branches > 1


def expected_shapes(adapter: Adapter, unet: InflatedUNet) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that the adapter's config asks for on this UNet."""
    subset = adapter.subset
    expected: dict[str, tuple[int, ...]] = {}
    names = _module_names(unet)
    ranks = (adapter.peft_config or {}).get("rank_pattern") or {}
    rank = (adapter.peft_config or {}).get("r", 0)
    for module in subset.lora_modules(names):
        weight = _parameter(unet, f"{module}.weight")
        own = next((r for key, r in ranks.items() if module.endswith(key)), rank)
        expected[f"{module}.lora_A.weight"] = (own, weight.shape[1])
        expected[f"{module}.lora_B.weight"] = (weight.shape[0], own)
    for module in subset.dense_modules(names):
        temporal = is_temporal(f"{module}.")
        for kind, parameter in _base(unet.get_submodule(module)).named_parameters():
            if temporal:
                width, count = min(parameter.shape), adapter.provenance.temporal_branches
                expected[f"{module}.{kind}"] = stacked_shape(f"{module}.{kind}", width, count)
            elif kind == "weight":
                expected[f"{module}.diff"] = tuple(parameter.shape)
    return expected


def audit(adapter: Adapter, unet: InflatedUNet) -> None:
    """Compare an adapter with a UNet: its modules, tensor by tensor, and the initial T-Attn.

    Raises:
        AdapterError: naming what differs and what to do.

    """
    audit_modules(adapter, unet)
    _audit_temporal(adapter, unet)


def audit_modules(adapter: Adapter, unet: InflatedUNet) -> None:
    """Compare an adapter with a UNet tensor by tensor: architecture, names, shapes.

    Raises:
        AdapterError: naming what differs and what to do.

    """
    info = adapter.provenance
    for key, theirs in info.base.architecture.items():
        ours = architecture(unet).get(key)
        if theirs != ours:
            raise AdapterError(
                f"The adapter was tuned for a base with {key} {theirs}, this one has {ours}. "
                f"Use a base like {info.base.name}, or retune."
            )
    _audit_targets(adapter, unet)
    expected = expected_shapes(adapter, unet)
    missing = [name for name in expected if name not in adapter.weights]
    unexpected = [name for name in adapter.weights if name not in expected]
    if missing or unexpected:
        say = [f"{len(names)} {what}, first {names[0]}" for what, names in
               (("missing", missing), ("unexpected", unexpected)) if names]  # fmt: skip
        raise AdapterError(
            f"The adapter's tensors do not match its config on this base: {'; '.join(say)}. Retune."
        )
    for name, shape in expected.items():
        if tuple(adapter.weights[name].shape) != shape:
            raise AdapterError(
                f"{name} has shape {tuple(adapter.weights[name].shape)}, this base needs {shape}. "
                f"Use a base like {info.base.name}, or retune."
            )


def _audit_targets(adapter: Adapter, unet: InflatedUNet) -> None:
    if adapter.peft_config is None:
        return
    config = lora_config(adapter.peft_config)
    names = _module_names(unet)
    targets = [name for name in names if check_target_module_exists(config, name)]
    if targets != adapter.subset.lora_modules(names):
        raise AdapterError(
            f"The adapter's PEFT config targets {len(targets)} modules of this base, not those that its subset "
            f"{adapter.provenance.subset} names. The file was changed; ask for it again."
        )


def _audit_temporal(adapter: Adapter, unet: InflatedUNet) -> None:
    init = adapter.provenance.temporal_init
    if "t_attn" not in adapter.subset.parts or has_branches(adapter):
        return
    if init.name != temporal_init.NAME:
        raise AdapterError(
            f"The adapter's T-Attn starts from {init.name!r}, this tav-peft knows {temporal_init.NAME!r}. Update it."
        )
    if temporal_fingerprint(unet, init.seed) != init.fingerprint:
        raise AdapterError(
            f"The adapter's T-Attn starts from weights that seed {init.seed} does not give on this base "
            "(their SHA-256 differ), and its updates count from those. The file was changed, or tuned for another base."
        )
    if unet.temporal_tuned:
        raise AdapterError(
            "This base's T-Attn is tuned already, and the adapter's T-Attn counts from initial weights. Use the base "
            "that was baked, or merge the adapters."
        )
    if unet.temporal_seed != init.seed:
        raise AdapterError(
            f"The adapter's T-Attn counts from initial weights of seed {init.seed}, this UNet has seed "
            f"{unet.temporal_seed}. Inflate with temporal_seed={init.seed}."
        )


def temporal_fingerprint(unet: InflatedUNet, seed: int) -> str:
    """Hash the initial T-Attn that `seed` gives on a UNet of these shapes."""
    shapes = {n.replace(".base_layer", ""): p.shape for n, p in unet.named_parameters() if is_temporal(n)}
    return temporal_init.fingerprint({n: s for n, s in shapes.items() if not _added(n)}, seed)


# -- PEFT layers -----------------------------------------------------------------------------------------


def inject_lora(unet: InflatedUNet, config: LoraConfig, inner: str, *, seed: int = 0) -> None:
    """Wrap the targets in PEFT layers in place, new weights drawn for `seed`."""
    flags = [(parameter, parameter.requires_grad) for parameter in unet.parameters()]
    active = {path: [*layer.active_adapters] for path, layer in lora_layers(unet)}
    # PEFT draws from torch's global stream; nobody else's moves
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # stacking is what was asked for
        torch.manual_seed(seed)
        inject_adapter_in_model(config, unet, adapter_name=inner)
    for path, layer in lora_layers(unet):  # injecting leaves only the new adapter on; other tools' LoRAs stay
        if path in active:
            layer.set_adapter([*active[path], *([inner] if inner in layer.r else [])])
    for parameter, flag in flags:  # PEFT freezes all but its own
        parameter.requires_grad_(flag)
    if not lora_layers(unet, inner):
        raise AdapterError(
            "The adapter's config matches no module of this base. Use the base it was tuned for."
        )


def lora_layers(unet: InflatedUNet, inner: str | None = None) -> list[tuple[str, BaseTunerLayer]]:
    """List the PEFT layers of a UNet by path; with `inner`, those that carry the adapter of that name."""
    layers = [(path, m) for path, m in unet.named_modules() if isinstance(m, BaseTunerLayer)]
    return [(path, layer) for path, layer in layers if inner is None or inner in layer.r]


@torch.no_grad()
def _fill_lora(unet: InflatedUNet, adapter: Adapter, inner: str) -> None:
    for name, tensor in adapter.weights.items():
        module, kind = split_name(name)
        if kind.startswith("lora_"):
            target = getattr(unet.get_submodule(module), kind.removesuffix(".weight"))[inner].weight
            target.copy_(tensor)


def remove_lora(unet: InflatedUNet, inner: str) -> None:
    """Take one PEFT adapter off; layers that carry no other become the plain modules they wrapped."""
    for path, layer in lora_layers(unet):
        if inner in layer.r:
            # else PEFT chooses another itself
            layer.set_adapter([n for n in layer.active_adapters if n != inner])
            layer.delete_adapter(inner)
        if not layer.r:
            parent, _, child = path.rpartition(".")
            setattr(unet.get_submodule(parent), child, layer.get_base_layer())
    configs = getattr(unet, "peft_config", {})
    configs.pop(inner, None)
    if not configs and hasattr(unet, "peft_config"):
        del unet.peft_config
        unet._hf_peft_config_loaded = False


def _module_names(unet: InflatedUNet) -> list[str]:
    return [name for name, _ in unet.named_modules() if ".base_layer" not in name and not _added(name)]


def _added(name: str) -> bool:
    """Tell whether a module or parameter came with an adapter."""
    return ".lora_" in name or ".tav_slot_" in name


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _parameter(unet: InflatedUNet, name: str) -> nn.Parameter:
    module, _, kind = name.rpartition(".")
    parameter = getattr(_base(unet.get_submodule(module)), kind)
    assert isinstance(parameter, nn.Parameter)
    return parameter
