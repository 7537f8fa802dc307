"""What the header of a LoRA for image tools says: kohya's `ss_*` and hashes, and Stability AI's ModelSpec."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from tav_peft.adapter import Adapter, BaseModelInfo
from tav_peft.bases.ldm_keys import Kind
from tav_peft.tensor_file import order_of, spell_header

_KINDS: dict[int, Kind] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # by the width of the text states
_ARCHITECTURES = {
    ("sd1", "epsilon"): "stable-diffusion-v1",
    ("sd2", "epsilon"): "stable-diffusion-v2-512",
    ("sd2", "v_prediction"): "stable-diffusion-v2-768-v",
    ("sdxl", "epsilon"): "stable-diffusion-xl-v1-base",
}
_VERSIONS: dict[Kind, str] = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
_LEGACY = range(0x100000, 0x110000)  # the bytes of a file that its oldest hash looks at


def training_metadata(
    adapter: Adapter,
    module: str,
    ranks: Collection[int],
    alphas: Collection[float],
    arguments: Mapping[str, Any],
) -> dict[str, str]:
    """Give the `ss_*` entries that readers look at: the form of the network, and the kind of its base.

    sd-scripts writes "Dynamic" where a LoRA has several ranks; a base that is no Stable Diffusion has no kind.
    """
    base = adapter.provenance.base
    said = {
        "ss_network_module": module,
        "ss_network_dim": _one(ranks),
        "ss_network_alpha": _one(alphas),
        "ss_network_args": json.dumps(arguments),
        "ss_steps": str(adapter.provenance.step),
        "ss_training_comment": "the query projections of a Tune-A-Video adapter, without its temporal attention",
    }
    kind = _kind(base)
    if kind is not None:
        v = "_v" if base.prediction_type == "v_prediction" else ""
        said |= {"ss_v2": str(kind == "sd2"), "ss_base_model_version": _VERSIONS[kind] + v}
    return said


def model_spec(adapter: Adapter) -> dict[str, str]:
    """Give the `modelspec.*` entries (ModelSpec 1.0.1); no date, since an adapter knows none."""
    info = adapter.provenance
    base, clip = info.base, info.clip
    kind = _kind(base) or base.name
    name = _ARCHITECTURES.get((kind, base.prediction_type), kind)
    frames = f"{clip.frames} frames of {clip.name}" if clip.name and clip.frames else "one clip"
    said = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{name}/lora",
        "implementation": "diffusers",
        "title": info.caption or f"Tune-A-Video on {base.name}",
        "description": f"What Tune-A-Video changed in the query projections of {base.name} on {frames}"
        f"{f', captioned {info.caption!r}' if info.caption else ''}. For images: the temporal attention that it was "
        "tuned with is not in this file.",
        "prediction_type": "v" if base.prediction_type == "v_prediction" else base.prediction_type,
    }
    if clip.width and clip.height:
        said["resolution"] = f"{clip.width}x{clip.height}"
    return {f"modelspec.{key}": value for key, value in said.items()}


class Hashes:
    """The hashes of a file's tensors that sd-scripts writes and the web UIs tell files apart by.

    `sshs_model_hash` is the SHA-256 of all bytes after the header, and ModelSpec's is the same. `sshs_legacy_hash` looks
    at 65,536 bytes in the second megabyte of the file as it would be if its header had the `ss_*` entries only.
    """

    def __init__(self, layout: Mapping[str, Tensor], training: Mapping[str, str]) -> None:
        self._position = len(spell_header(layout, order_of(layout), training))
        self._all, self._legacy = hashlib.sha256(), hashlib.sha256()
        assert self._position < _LEGACY.start

    @property
    def entries(self) -> dict[str, str]:
        """The header's entries, of what was seen so far."""
        digest = self._all.hexdigest()
        return {
            "sshs_model_hash": digest,
            "sshs_legacy_hash": self._legacy.hexdigest()[:8],
            "modelspec.hash_sha256": f"0x{digest}",
        }

    def update(self, data: memoryview) -> None:
        """See the bytes of the next tensor."""
        start, stop = (max(0, edge - self._position) for edge in (_LEGACY.start, _LEGACY.stop))
        self._all.update(data)
        self._legacy.update(data[start:stop])
        self._position += len(data)


def _kind(base: BaseModelInfo) -> Kind | None:
    return _KINDS.get(base.architecture.get("cross_attention_dim", 0))


def _one(values: Collection[float]) -> str:
    return f"{next(iter(values))}" if len(set(values)) == 1 else "Dynamic"
