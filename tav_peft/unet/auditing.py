"""Whether an adapter fits an inflated UNet: its modules, tensor by tensor, and the initial T-Attn it counts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists

from tav_peft.adapter import Adapter
from tav_peft.bases import architecture
from tav_peft.errors import AdapterError
from tav_peft.method_updates import shapes
from tav_peft.methods import is_lora
from tav_peft.unet import temporal_init
from tav_peft.unet.branches import stacked_shape
from tav_peft.unet.inflation import InflatedUNet, is_temporal
from tav_peft.unet.peft_layers import base_layer, is_added, layers_config, module_names, parameter_of


def has_branches(adapter: Adapter) -> bool:
    """Tell whether the adapter's T-Attn runs beside the UNet's own, and does not take its place."""
    return adapter.provenance.temporal_branches > 1


def expected_shapes(adapter: Adapter, unet: InflatedUNet) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that the adapter's config asks for on this UNet."""
    subset = adapter.subset
    expected = _method_shapes(adapter, unet)
    names = module_names(unet)
    for module in subset.dense_modules(names):
        temporal = is_temporal(f"{module}.")
        for kind, parameter in base_layer(unet.get_submodule(module)).named_parameters():
            if temporal:
                width, count = min(parameter.shape), adapter.provenance.temporal_branches
                expected[f"{module}.{kind}"] = stacked_shape(f"{module}.{kind}", width, count)
            elif kind == "weight":
                expected[f"{module}.diff"] = tuple(parameter.shape)
    return expected


def _method_shapes(adapter: Adapter, unet: InflatedUNet) -> dict[str, tuple[int, ...]]:
    config: Mapping[str, Any] = adapter.peft_config or {}
    expected: dict[str, tuple[int, ...]] = {}
    modules = adapter.subset.lora_modules(module_names(unet))
    widths = {module: parameter_of(unet, f"{module}.weight").shape[0] for module in modules}
    ranks = config.get("rank_pattern") or {}
    for module, width in widths.items():
        own = next((r for key, r in ranks.items() if module.endswith(key)), config.get("r", 0))
        kinds: dict[str, tuple[int, ...]] = {"lora_A.weight": (own, width), "lora_B.weight": (width, own)}
        if not is_lora(config):
            kinds = _shapes(adapter, width, max(widths.values()))
        expected |= {f"{module}.{kind}": shape for kind, shape in kinds.items()}
    return expected


def _shapes(adapter: Adapter, width: int, largest: int) -> dict[str, tuple[int, ...]]:
    try:
        return shapes(adapter.peft_config or {}, width, largest)
    except ValueError as error:
        raise AdapterError(
            f"The adapter's {adapter.method} cannot be had on this base: {error}. Use a base like "
            f"{adapter.provenance.base.name}, or retune."
        ) from None


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
    config = layers_config(adapter.peft_config)
    names = module_names(unet)
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
    return temporal_init.fingerprint({n: s for n, s in shapes.items() if not is_added(n)}, seed)
