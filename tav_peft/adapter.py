"""An adapter: its PEFT config, its named tensors, and where it comes from; one safetensors file."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor

from tav_peft.errors import AdapterError
from tav_peft.header import FORMAT_VERSION, PREVIEW, parse_preview, spell_preview, summarise
from tav_peft.methods import KINDS, method_of, read_config
from tav_peft.presets import Subset
from tav_peft.recipe import ModelSection, PeftMethod, Precision
from tav_peft.tensor_file import (
    FileTensors,
    check_hashes,
    check_header,
    hash_tensors,
    read_tensors,
    write_tensors,
)

LATENTS = "source.latents"  # the clip's clean latents, present only when asked for
_TENSOR = re.compile(
    r"(?P<module>(?:down_blocks|mid_block|up_blocks)\.[\w.]+?"
    r"\.(?:attn[12]\.to_q|attn_temp\.(?:to_q|to_k|to_v|to_out\.0)))"
    rf"\.(?P<kind>{'|'.join(map(re.escape, KINDS))}|diff|weight|bias)"
)


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class BaseModelInfo(_Section):
    """The model an adapter belongs to."""

    name: str
    fingerprint: str  # SHA-256 of its query projections in half precision
    architecture: dict[str, Any]
    prediction_type: str = "epsilon"
    license: str | None = None  # that its model card states


class ClipInfo(_Section):
    """The clip an adapter was tuned on; `fingerprint` is the SHA-256 of the frames as they were used.

    Of an adapter merged from several clips: their names, the first one's numbers, and no fingerprint.
    Of a run of the original code that was imported: what its config says, no fingerprint, and 0 for what is not known.
    """

    name: str
    fingerprint: str
    frames: int
    height: int
    width: int
    fps: float
    indices: tuple[int, ...]
    fit: str = "keep"


class FurtherClip(_Section):
    """Another clip that an adapter was tuned on, with its caption."""

    caption: str
    clip: ClipInfo


class TemporalInit(_Section):
    """The initial T-Attn that updates of T-Attn count from: generator, seed, and `temporal_init.fingerprint`."""

    name: str
    seed: int
    fingerprint: str


class ProbeInfo(_Section):
    """What the UNet with the adapter made of the input `name`, as `probe` computed it: some numbers of its output."""

    name: str
    precision: Precision
    device: str
    values: tuple[float, ...]
    mean: float
    std: float = pydantic.Field(gt=0)


class StepProbe(_Section):
    """What a tuning has learned and lost after some steps, each as a share of the base's own (see `early_stopping`).

    `reconstruction` is the error about the clip, `response` what another prompt changes.
    """

    step: int
    reconstruction: float
    response: float

    @property
    def gain(self) -> float:
        """What early stopping looks for the most of: what is learned of the clip, and kept of the prompts' effect."""
        return self.response - self.reconstruction


class MergedAdapter(_Section):
    """One of the adapters that were merged; `fingerprint` is `hash_tensors` of it."""

    name: str
    fingerprint: str
    caption: str
    clip: str
    weights: dict[str, float]


class MergeInfo(_Section):
    """How an adapter was merged and from which; None is what the method does not use."""

    method: str
    density: float | None = None
    seed: int | None = None
    rank: int | None = None
    adapters: tuple[MergedAdapter, ...]


class Derivation(_Section):
    """What a tool made an adapter of, and how: its name, the hash of its tensors (if it is an adapter), the settings."""

    tool: str
    name: str
    fingerprint: str = ""
    settings: dict[str, Any] = {}


def library_versions() -> dict[str, str]:
    """Give the versions of what an adapter is made with."""
    return {name: version(name) for name in ("tav-peft", "torch", "diffusers", "peft")}


class Provenance(_Section):
    """Everything about an adapter that is not a tensor; `model` is the variant of the UNet that it was tuned in.

    `further_clips` are those it was tuned on besides `clip`.
    `derived_from` lists what tools did to it since it was tuned or merged, in that order.
    `step_probes` are what early stopping chose `step` by.
    `temporal_branches` is how many temporal attentions run side by side in it; their weights are stacked then.
    """

    format_version: int = FORMAT_VERSION
    caption: str
    base: BaseModelInfo
    clip: ClipInfo
    further_clips: tuple[FurtherClip, ...] = ()
    temporal_init: TemporalInit
    model: ModelSection = ModelSection()
    subset: dict[str, Any]
    step: int
    recipe: dict[str, Any]
    versions: dict[str, str]
    probe: ProbeInfo | None = None
    step_probes: tuple[StepProbe, ...] = ()
    merged_from: MergeInfo | None = None
    derived_from: tuple[Derivation, ...] = ()
    temporal_branches: int = pydantic.Field(default=1, ge=1)

    @property
    def clips(self) -> list[tuple[str, ClipInfo]]:
        """What it was tuned on: each clip with its caption."""
        return [(self.caption, self.clip), *((each.caption, each.clip) for each in self.further_clips)]

    def checked_subset(self) -> Subset:
        """Which parts and blocks the adapter updates."""
        given = self.subset
        return Subset(given["preset"], tuple(given["parts"]), tuple(given["blocks"]))

    @property
    def editing(self) -> dict[str, Any]:
        """The editing defaults that suit the base: guidance, steps, depth, negative prompt."""
        return dict(self.recipe.get("editing", {}))


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """Named tensors with the config that says how to apply them, and, in a bundle, a small picture of the clip.

    Tensor names are module paths of the inflated UNet and one of `lora_A.weight` (rank, in), `lora_B.weight`
    (out, rank), what another of PEFT's methods calls its own (`methods`), `diff` (a dense update of a query
    projection), or `weight`/`bias` (a dense T-Attn, absolute, as in PEFT's modules_to_save). `peft_config` is the JSON
    form of a stock config, or None for a dense adapter.
    `preview` is an animated WebP of the clip, at most 100 kB.
    """

    tensors: Mapping[str, Tensor]
    peft_config: Mapping[str, Any] | None
    provenance: Provenance
    preview: bytes | None = dataclasses.field(default=None, repr=False)

    @property
    def subset(self) -> Subset:
        """Which parts and blocks the adapter updates."""
        return self.provenance.checked_subset()

    @property
    def method(self) -> PeftMethod:
        """PEFT's method by which what is not dense was tuned."""
        return method_of(self.peft_config)

    @property
    def latents(self) -> Tensor | None:
        """The clip's clean latents (1, channels, frames, height, width), if the file carries them."""
        return self.tensors.get(LATENTS)

    @property
    def weights(self) -> dict[str, Tensor]:
        """All tensors but the latents."""
        return {name: tensor for name, tensor in self.tensors.items() if name != LATENTS}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash what acts on a model (SHA-256, hex): the PEFT config and the tensors, without the latents."""
        config = json.dumps(self.peft_config, sort_keys=True)
        return hashlib.sha256(f"{config} {hash_tensors(self.weights)}".encode()).hexdigest()

    def summary(self) -> dict[str, Any]:
        """Count tensors, parameters and bytes, in all and for each part."""
        sizes = {name: (t.numel(), t.numel() * t.element_size()) for name, t in self.tensors.items()}
        return summarise(sizes, self.subset.preset, self.peft_config, self.preview)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, whole or not at all.

        Raises:
            AdapterError: when the disk refuses; a file that was there before is untouched then.

        """
        metadata = {
            "format": "pt",
            "tav_peft": json.dumps(self.provenance.model_dump(mode="json"), sort_keys=True),
            "peft_config": json.dumps(self.peft_config, sort_keys=True),
        }
        if self.preview is not None:
            metadata[PREVIEW] = spell_preview(self.preview)
        return write_tensors(path, self.tensors, metadata, hashed=True)

    @classmethod
    def load(cls, path: str | Path, *, hashes: bool = True) -> Adapter:
        """Read a file that `save` wrote, checking its header, every name, dtype and value.

        The hashes in it are checked too, unless `hashes` is off.

        Raises:
            AdapterError: when the file is missing, damaged, a pickle, or not one of ours.

        """
        path = Path(path)
        tensors, metadata = read_tensors(path)
        config, provenance, preview = _parse_header(metadata, path.name)
        checked = check_tensors(tensors, path.name)
        if hashes:
            check_hashes(tensors, metadata, path.name)
        return cls(checked, config, provenance, preview)

    @classmethod
    def open(cls, path: str | Path) -> Adapter:
        """Do as `load`, but read each tensor when it is asked for, its values unchecked.

        Raises:
            AdapterError: when the file is missing, damaged, a pickle, or not one of ours.

        """
        path = Path(path)
        tensors = FileTensors(path)
        config, provenance, preview = _parse_header(tensors.metadata, path.name)
        check_layout(tensors.layout, path.name)
        check_header(tensors.metadata, path.name)
        return cls(tensors, config, provenance, preview)


def split_name(name: str) -> tuple[str, str]:
    """Split a tensor's name into its module path and its kind."""
    match = _TENSOR.fullmatch(name)
    if match is None:
        raise ValueError(name)
    return match["module"], match["kind"]


def is_tensor_name(name: str) -> bool:
    """Tell whether an adapter may have a tensor of that name."""
    return _TENSOR.fullmatch(name) is not None


def check_tensors(tensors: Mapping[str, Tensor], file: str) -> dict[str, Tensor]:
    """Refuse names that are no part of an adapter, other dtypes than fp32/fp16/bf16, NaN and infinity."""
    check_layout(tensors, file)
    return {name: check_values(name, tensor, file) for name, tensor in tensors.items()}


def check_layout(layout: Mapping[str, Tensor], file: str) -> None:
    """Refuse names that are no part of an adapter, and other dtypes than fp32/fp16/bf16."""
    unknown = [name for name in layout if name != LATENTS and not _TENSOR.fullmatch(name)]
    if unknown:
        raise AdapterError(
            f"{file} has {len(unknown)} tensors that belong to no part of an adapter, first {unknown[0]!r}. "
            "It was made by another tool (`tav import` may read it) or is damaged."
        )
    if not any(name != LATENTS for name in layout):
        raise AdapterError(f"{file} holds no adapter tensors. Tune again, or ask for the file again.")
    for name, tensor in layout.items():
        # float64 is for the updates of an imported run, where float32 would round them
        allowed = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        if tensor.dtype not in allowed[: 4 if name.endswith(".diff") else 3]:
            raise AdapterError(
                f"{file}: {name} has dtype {tensor.dtype}, allowed are float32, float16 and bfloat16."
            )


def check_values(name: str, tensor: Tensor, file: str) -> Tensor:
    """Give a tensor back, unless it holds NaN or infinity."""
    # either of the two is NaN where one value is; looking at all values one by one takes forty times as long
    if tensor.numel() and not all(math.isfinite(value) for value in torch.aminmax(tensor.detach())):
        raise AdapterError(
            f"{file}: {name} holds NaN or infinity. The file is damaged, or its tuning diverged."
        )
    return tensor


def _parse_header(
    metadata: Mapping[str, str], file: str
) -> tuple[dict[str, Any] | None, Provenance, bytes | None]:
    if "tav_peft" not in metadata:
        raise AdapterError(
            f"{file} is a safetensors file, but not a tav-peft adapter (its header has no 'tav_peft' entry). "
            "Use a file that `tav tune` wrote, or make it one by `tav import`."
        )
    provenance = parse_provenance(metadata["tav_peft"], file)
    config = parse_config(metadata.get("peft_config", "null"), provenance, file)
    try:
        return config, provenance, parse_preview(metadata)
    except ValueError as error:
        raise AdapterError(f"{file}: its preview {error}. Ask for the file again.") from None


def _json(text: str, file: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            f"{file}: its header holds broken JSON ({error}). Ask for the file again."
        ) from None


def parse_provenance(text: str, file: str) -> Provenance:
    """Parse the header entry of a file, refusing a newer format version by name."""
    given = _json(text, file)
    version = given.get("format_version") if isinstance(given, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise AdapterError(
            f"{file} has format version {version}, this tav-peft reads up to {FORMAT_VERSION}. Update tav-peft."
        )
    try:
        provenance = Provenance.model_validate(given)
        provenance.checked_subset()
    except Exception as error:
        raise AdapterError(
            f"{file}: its header is not that of a tav-peft adapter: {_first_line(error)}"
        ) from None
    return provenance


def parse_config(text: str, provenance: Provenance, file: str) -> dict[str, Any] | None:
    """Parse the PEFT config of a file: one of a known method where a part has one, none where all are dense."""
    given = _json(text, file)
    if given is None and not provenance.checked_subset().lora_parts:
        return None
    try:
        config = read_config(given)
        if not provenance.checked_subset().lora_parts:
            raise ValueError(f"peft_type {given['peft_type']} for the preset {provenance.subset['preset']}")
        if isinstance(config.target_modules, str):
            re.compile(config.target_modules)
    except Exception as error:
        raise AdapterError(
            f"{file}: its PEFT config does not fit ({_first_line(error)}). It needs another PEFT, or is damaged."
        ) from None
    return dict(given)


def _first_line(error: Exception) -> str:
    if isinstance(error, pydantic.ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
    return str(error).splitlines()[0] if str(error) else type(error).__name__
