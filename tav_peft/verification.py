"""What an adapter's file says of itself, made again and compared."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor

from tav_peft import formats
from tav_peft.adapter import Adapter, ProbeInfo, split_name
from tav_peft.errors import AdapterError, ClipError, TavError
from tav_peft.formats import peft
from tav_peft.hashes import HEADER_HASH, TENSORS_HASH, hash_header
from tav_peft.method_updates import modules_by_method
from tav_peft.methods import is_lora
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.sharing.fetching import fetch
from tav_peft.sources import clip_nearby, read_as_tuned
from tav_peft.tensor_file import FileTensors, hash_tensors
from tav_peft.unet import probe as probes
from tav_peft.unet import temporal_init
from tav_peft.unet.auditing import audit_modules, has_branches, temporal_fingerprint
from tav_peft.unet.inflation import InflatedUNet
from tav_peft.unet.peft_layers import layers_config

Verdict = Literal["holds", "differs", "not checked", "noted"]  # noted: told, and neither right nor wrong


@dataclasses.dataclass(frozen=True)
class Claim:
    """One thing that a file says, what was found instead, and the verdict; `note` says why, or how far they are apart."""

    name: str
    verdict: Verdict
    claimed: str = ""
    found: str = ""
    note: str = ""


def verify(
    adapter: Adapter | str | Path, pipe: TuneAVideoPipeline | None = None, clip: Path | None = None
) -> list[Claim]:
    """Check what an adapter claims: its file, and what can be made again with a base and with the clip.

    `pipe` is the base that the adapter is to be compared with; without one the claims about it are not checked. Without
    `clip`, a file beside the adapter is taken if it is the clip.

    Raises:
        TavError: when there is no such file, or adapters are loaded in the pipeline.

    """
    if pipe is not None and pipe.adapters:
        raise TavError(
            f"Adapters are loaded ({', '.join(pipe.adapters)}). Unload them before verifying another."
        )
    path, of_file = None, []
    if not isinstance(adapter, Adapter):
        path = fetch(adapter)
        try:
            adapter = formats.read(path, hashes=False)  # each hash is a claim of its own
        except AdapterError as error:
            if not path.exists():
                raise
            return [Claim("file", "differs", note=str(error))]
        of_file = [
            Claim("file", "holds", note=f"{len(adapter.tensors)} tensors of finite numbers"),
            *_hashes(path),
        ]
    on_base = _without_base(adapter) if pipe is None else _on_base(adapter, pipe)
    return [*of_file, _config(adapter), *on_base, _clip(adapter, path, clip), _versions(adapter)]


def _compared(name: str, claimed: str, found: str, note: str = "") -> Claim:
    return Claim(name, "holds" if claimed == found else "differs", claimed, found, note)


# -- the file ----------------------------------------------------------------------------------------------


def _hashes(path: Path) -> Iterator[Claim]:
    """Compare the hashes in the file's header; one without the other was lost, both were never there."""
    file = FileTensors(path / peft.WEIGHTS if path.is_dir() else path)
    found = {"tensors": hash_tensors(file), "header": hash_header(file.metadata)}
    for (name, value), key in zip(found.items(), (TENSORS_HASH, HEADER_HASH), strict=True):
        if not {TENSORS_HASH, HEADER_HASH} & set(file.metadata):
            yield Claim(name, "not checked", found=value, note="the file was written without hashes")
        else:
            yield _compared(name, file.metadata.get(key, ""), value, "SHA-256")
    if path.is_dir():
        yield _adapter_config(path)


def _adapter_config(folder: Path) -> Claim:
    expected = json.dumps(peft.config_of(peft.read(folder, hashes=False)), sort_keys=True)
    try:
        given = json.dumps(json.loads((folder / peft.CONFIG).read_text(encoding="utf-8")), sort_keys=True)
    except (ValueError, RecursionError) as error:
        return Claim(peft.CONFIG, "differs", note=f"broken JSON ({error})")
    return _compared(peft.CONFIG, given, expected)


def _config(adapter: Adapter) -> Claim:
    """Compare the tensors with what subset and PEFT config say they are, as far as that goes without a base."""
    weights, subset = adapter.weights, adapter.subset
    names = list(dict.fromkeys(split_name(name)[0] for name in weights))
    try:
        lora = {
            name for name in names if {f"{name}.lora_A.weight", f"{name}.lora_B.weight"} <= weights.keys()
        }
        lora |= modules_by_method(adapter, "the adapter").keys()
    except AdapterError as error:
        return Claim("config", "differs", note=str(error))
    wrong = (lora ^ {*subset.lora_modules(names)}) | ({*names} - lora ^ {*subset.dense_modules(names)})
    if adapter.peft_config is not None:
        config = layers_config(adapter.peft_config)
        wrong |= lora ^ {name for name in names if check_target_module_exists(config, name)}
        if is_lora(adapter.peft_config):
            wrong |= {name for name in lora if not _has_rank(weights, name, config)}
    what = "a LoRA" if is_lora(adapter.peft_config) else adapter.method
    claimed = f"{subset.preset}: {', '.join(subset.parts)}"
    if wrong:
        return Claim("config", "differs", claimed, note=f"not so in {len(wrong)} modules, first {min(wrong)}")
    return Claim(
        "config", "holds", claimed, note=f"{len(lora)} modules with {what}, {len(names) - len(lora)} dense"
    )


def _has_rank(weights: Mapping[str, Tensor], module: str, config: LoraConfig) -> bool:
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)
    down, up = (weights[f"{module}.lora_{part}.weight"] for part in "AB")
    return bool(rank == down.shape[0] == up.shape[1])


# -- the base ----------------------------------------------------------------------------------------------


def _without_base(adapter: Adapter) -> list[Claim]:
    why = f"it needs the base {adapter.provenance.base.name}, which was not given"
    claimed = {"base": _base_text(adapter), "modules": "", "t_attn": _temporal_text(adapter), "probe": ""}
    return [Claim(name, "not checked", text, note=why) for name, text in claimed.items()]


def _on_base(adapter: Adapter, pipe: TuneAVideoPipeline) -> list[Claim]:
    claims = [_base(adapter, pipe), _modules(adapter, pipe.unet), _temporal(adapter, pipe.unet)]
    differing = [claim.name for claim in claims if claim.verdict == "differs"]
    if differing:
        why = f"it is the output on the adapter's own base ({', '.join(differing)} differs)"
        return [*claims, Claim("probe", "not checked", note=why)]
    return [*claims, _probe(adapter, pipe.unet)]


def _base_text(adapter: Adapter) -> str:
    info = adapter.provenance.base
    return f"{info.prediction_type}, {info.fingerprint}"


def _base(adapter: Adapter, pipe: TuneAVideoPipeline) -> Claim:
    found = f"{pipe.scheduler.config.prediction_type}, {pipe.base_fingerprint}"
    return _compared("base", _base_text(adapter), found, adapter.provenance.base.name)


def _modules(adapter: Adapter, unet: InflatedUNet) -> Claim:
    try:
        audit_modules(adapter, unet)
    except AdapterError as error:
        return Claim("modules", "differs", note=str(error))
    return Claim("modules", "holds", note="names and shapes are those of the base")


def _temporal_text(adapter: Adapter) -> str:
    init = adapter.provenance.temporal_init
    return f"{init.name}, seed {init.seed}, {init.fingerprint}"


def _temporal(adapter: Adapter, unet: InflatedUNet) -> Claim:
    if "t_attn" not in adapter.subset.parts or has_branches(adapter):
        return Claim("t_attn", "noted", note="no tensor of the adapter counts from an initial T-Attn")
    rebuilt = temporal_fingerprint(unet, adapter.provenance.temporal_init.seed)
    found = f"{temporal_init.NAME}, seed {unet.temporal_seed}, {rebuilt}"
    return _compared("t_attn", _temporal_text(adapter), found)


def _probe(adapter: Adapter, unet: InflatedUNet) -> Claim:
    claimed = adapter.provenance.probe
    if claimed is None:
        return Claim("probe", "not checked", note="the adapter was made without one")
    if claimed.name != probes.NAME:
        return Claim("probe", "not checked", claimed.name, note=f"this tav-peft knows {probes.NAME}")
    found = probes.probe(adapter, unet)
    if found is None:
        return Claim("probe", "differs", _probe_text(claimed), note="the output is not finite")
    apart, allowed = probes.distance(claimed, found), probes.tolerance(claimed, found)
    note = f"{apart:.1e} standard deviations apart, {allowed:.1e} allowed"
    verdict: Verdict = "holds" if apart <= allowed else "differs"
    return Claim("probe", verdict, _probe_text(claimed), _probe_text(found), note)


def _probe_text(info: ProbeInfo) -> str:
    return f"mean {info.mean:.6f}, deviation {info.std:.6f}, {info.precision} on {info.device}"


# -- the clip and the tools --------------------------------------------------------------------------------


def _clip(adapter: Adapter, path: Path | None, given: Path | None) -> Claim:
    info = adapter.provenance.clip
    if not info.fingerprint:
        return Claim("clip", "noted", note="the adapter is not of one clip that is known")
    try:
        found = clip_nearby(adapter, path) if given is None else read_as_tuned(adapter, given)
    except ClipError as error:
        if given is not None:
            raise
        return Claim("clip", "not checked", info.fingerprint, note=str(error))
    if found is None:
        return Claim("clip", "not checked", info.fingerprint, note=f"{info.name or 'the clip'} is not near")
    return _compared("clip", info.fingerprint, found.fingerprint, found.name)


def _versions(adapter: Adapter) -> Claim:
    then = adapter.provenance.versions
    now = {name: _installed(name) for name in then}
    claimed, found = (", ".join(f"{name} {value}" for name, value in each.items()) for each in (then, now))
    return Claim("versions", "noted", claimed, found)


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
