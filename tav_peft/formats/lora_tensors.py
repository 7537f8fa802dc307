"""The tensors of a LoRA in any tool's names, sorted by the query projections that they change."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from tav_peft.errors import AdapterError

_PREFIX = re.compile(
    r"(?:base_model_model_)?(?:lora_unet_|lycoris_|model_diffusion_model_|diffusion_model_|unet_)?"
)
_QUERY = re.compile(r"(?P<module>.*attn[12]_to_q)_(?P<kind>.+)")
# flat ends of the tensors of one module: of PEFT and diffusers, of kohya, and of diffusers before PEFT
_KINDS = {
    "lora_A_weight": "A", "lora_B_weight": "B", "lora_down_weight": "A", "lora_up_weight": "B", "alpha": "alpha",
    "dora_scale": "magnitude", "lora_magnitude_vector": "magnitude", "lora_magnitude_vector_weight": "magnitude",
    "diff": "diff", **{f"hada_w{n}_{side}": f"hada_w{n}_{side}" for n in (1, 2) for side in "ab"},
    **{f"lokr_w{n}{side}": f"lokr_w{n}{side}" for n in (1, 2) for side in ("", "_a", "_b")},
}  # fmt: skip
_LYCORIS = ("_diff", "_hada_w1_a", "_lokr_w1", "_lokr_w1_a")
# what a module's tensors may be, beside alpha and magnitude
_FORMS = {
    "lora": [{"A", "B"}],
    "full": [{"diff"}],
    "loha": [{"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}],
    "lokr": [
        first | second
        for first in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
        for second in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})
    ],
}


def name_format(names: Iterable[str]) -> str:
    """Name the tool that spells tensors so: peft, diffusers, kohya or lycoris."""
    names = list(names)
    if any(name.startswith("base_model.model.") for name in names):
        return "peft"
    if not any(name.startswith(("lora_unet_", "lora_te", "lycoris_", "diffusion_model.")) for name in names):
        return "diffusers"
    return "lycoris" if any(name.replace(".", "_").endswith(_LYCORIS) for name in names) else "kohya"


def sort_tensors(names: Iterable[str], modules: Mapping[str, str], file: str) -> dict[str, dict[str, str]]:
    """Sort tensors by module and kind; kinds are A, B, alpha, magnitude, diff, hada_… and lokr_….

    `modules` are the query projections by their flat names, as `keys.modules_by_name` gives them.

    Raises:
        AdapterError: when there are tensors of other modules, or of kinds that are not read, or one twice.

    """
    found: dict[str, dict[str, str]] = {}
    others, unread = [], []
    for name in names:
        flat = name.replace(".processor.", ".").replace(".", "_")
        flat = flat[_PREFIX.match(flat).end() :]  # type: ignore[union-attr]  # which always matches
        match = _QUERY.fullmatch(flat)
        module = modules.get(match["module"]) if match else None
        if match is None or module is None:
            others.append(name)
        elif match["kind"] not in _KINDS:
            unread.append(name)
        else:
            kind = _KINDS[match["kind"]]
            if kind in found.setdefault(module, {}):
                raise AdapterError(
                    f"{file} has {found[module][kind]} and {name}, which are the same. Remove one."
                )
            found[module][kind] = name
    if others:
        raise _foreign(others, file)
    if unread:
        raise AdapterError(
            f"{file} has {len(unread)} tensors of a form that is not read, first {unread[0]}. Read are LoRA, LoHa, LoKr, "
            "DoRA and full-rank updates."
        )
    return found


def form_of(kinds: Iterable[str], module: str, file: str) -> str:
    """Name the form of a module's tensors: lora, full, loha or lokr.

    Raises:
        AdapterError: when a tensor is missing, or forms are mixed.

    """
    kinds = set(kinds)
    own = kinds - {"alpha", "magnitude"}
    for form, sets in _FORMS.items():
        if own in sets and not (form == "full" and "alpha" in kinds):
            return form
    raise AdapterError(
        f"{file}: of {module} it has {', '.join(sorted(kinds))}, which is no whole LoRA, LoHa, LoKr or full-rank update. "
        "The file is damaged; ask for it again."
    )


def _foreign(others: list[str], file: str) -> AdapterError:
    if any("attn_temp" in name for name in others):
        return AdapterError(
            f"{file} has LoRAs of temporal attention, but its header does not say from which initial weights they count. "
            "Give the .safetensors file or the folder that tav-peft wrote."
        )
    parts = {name.split(".lora")[0].rsplit(".alpha", 1)[0] for name in others}
    return AdapterError(
        f"{file} changes {len(parts)} modules that are no part of Tune-A-Video, first {others[0]}. Such a LoRA, of a "
        "style or an object, is not imported but loaded beside an adapter: pipe.load_lora_weights(file, name)."
    )
