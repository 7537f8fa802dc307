"""LoRA/PEFT adapters for one-shot video tuning; the public names, imported on first use."""

import os
from importlib import import_module
from typing import Any

# downloads from the hub tell it the versions of Python and of libraries otherwise; who wants that sets it to 0
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

_HOME = {
    "Adapter": "adapter",
    "Clip": "video.clip",
    "Control": "control.steering",
    "Inversion": "inversion",
    "Recipe": "recipe",
    "TavError": "errors",
    "TuneAVideoPipeline": "pipeline",
    "attention_mask": "cross_attention",
    "inflate": "unet.inflation",
    "load_network": "control.networks",
    "maps_of": "control.maps",
    "merge": "merging",
    "score": "scoring",
    "tune": "tuning",
    "verify": "verification",
}
__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":  # reading it costs more than the rest of this file
        return import_module("importlib.metadata").version("tav-peft")
    if name in _HOME:
        return getattr(import_module(f"tav_peft.{_HOME[name]}"), name)
    raise AttributeError(f"module 'tav_peft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
