"""Inverting a clip, unless the same inversion is in the cache."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tav_peft.control.steering import Control
from tav_peft.errors import AdapterError
from tav_peft.inversion import Inversion
from tav_peft.inversion_cache import InversionCache
from tav_peft.pipeline import Progress, TuneAVideoPipeline
from tav_peft.video.clip import Clip

FORMAT = 1  # goes up when the same settings would be inverted to something else
_LOG = logging.getLogger(__name__)
_SAMPLED = 256  # values of each tensor


def invert_once(
    pipe: TuneAVideoPipeline,
    source: Clip | Tensor,
    cache: InversionCache,
    *,
    controls: Sequence[Control] = (),
    progress: Progress | None = None,
    **inverting: Any,
) -> tuple[Inversion, bool]:
    """Invert a clip, or take what the cache has of the same inversion; say which it was (True: from the cache).

    `inverting` are the arguments of `pipe.invert`. What is in the cache is the same bytes as what would be computed, on
    the same kind of device.
    """
    depth = inverting.get("depth", 1.0)
    others = {name: value for name, value in inverting.items() if name != "depth"}
    key = _key({**others, **_depends_on(pipe, source, controls)})
    path = cache.path(key)
    kept = _whole_and_deep(path, depth)
    if kept is not None:
        cache.use(path)
        return kept, True
    inversion = pipe.invert(source, controls=controls, progress=progress, **inverting)
    try:
        inversion.save(path)
        cache.shrink(but=path)
    except AdapterError as error:  # no room for it: the inversion itself is there
        _LOG.warning("The inversion is not kept for the next time: %s", error)
    return inversion, False


def _whole_and_deep(path: Path, depth: float) -> Inversion | None:
    """Load a kept inversion; None where there is none, it is damaged, or it does not go as deep."""
    try:
        inversion = Inversion.load(path)
    except AdapterError:
        return None
    return inversion if inversion.depth + 1e-9 >= depth else None


def _key(depends_on: Mapping[str, Any]) -> str:
    text = json.dumps({"format": FORMAT, **depends_on}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _depends_on(
    pipe: TuneAVideoPipeline, source: Clip | Tensor, controls: Sequence[Control]
) -> dict[str, Any]:
    scheduler = pipe.inversion_scheduler().config
    nothing = pipe.encode_prompts([""]).text
    return {
        **pipe.inverted_with(controls),
        "source": source.fingerprint if isinstance(source, Clip) else _sample_hash({"": source}, every=True),
        "scheduler": {name: scheduler[name] for name in sorted(scheduler) if not name.startswith("_")},
        "text": _sample_hash({"": nothing}, every=True),
        "unet": _sample_hash(pipe.unet.state_dict()),
        "vae": _sample_hash(pipe.vae.state_dict()),
        "device": pipe.device.type,
    }


def _sample_hash(tensors: Mapping[str, Tensor], *, every: bool = False) -> str:
    """Hash names, dtypes, shapes and up to some hundred evenly chosen values of each tensor, or every value.

    A base's fingerprint looks at the query projections alone; two bases may differ elsewhere only.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        values = tensor.detach().flatten()
        chosen = values if every else values[:: max(1, len(values) // _SAMPLED)]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(chosen.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
