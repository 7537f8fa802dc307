"""What is put onto a pipeline and taken off again: adapters of clips, LoRAs of image models, and learned words."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

from diffusers.loaders import TextualInversionLoaderMixin
from torch import nn

from tav_peft import formats
from tav_peft.adapter import Adapter
from tav_peft.base_loading import BaseLoading
from tav_peft.errors import AdapterError, TavError
from tav_peft.image_loras import ImageLoras
from tav_peft.unet.attaching import Attachments, Strength
from tav_peft.unet.inflation import InflatedUNet

_LOG = logging.getLogger(__name__)


class AdapterLoading(TextualInversionLoaderMixin, BaseLoading):  # type: ignore[misc]
    """The part of a pipeline that loads and unloads what goes onto its base."""

    def _prepare_loading(self, unet: InflatedUNet, encoders: Mapping[str, nn.Module | None]) -> None:
        """Begin with nothing on the UNet and on the text encoders, which are those by a diffusers pipeline's names."""
        self._attachments = Attachments(unet)
        self._image_loras = ImageLoras(
            unet, {name: each for name, each in encoders.items() if each is not None}
        )

    def _acting(self) -> list[dict[str, Any]]:
        """Say in plain values what acts on the UNet, each with its strength."""
        return [*self._attachments.record(), *self._image_loras.record()]

    def load_adapter(
        self,
        adapter: Adapter | str | Path,
        adapter_name: str = "default",
        strength: Strength = 1.0,
        *,
        hotswap: bool = False,
    ) -> Adapter:
        """Attach an adapter (a file, a PEFT folder, `user/name` on the hub, an https address, or an `Adapter`).

        `strength` is one number, or one for each of the parts st_attn, cross_attn and t_attn; 0 is exactly the base. The
        UNet takes on the variant that the adapter was tuned in, until the last adapter is unloaded. With
        `hotswap` it takes the place of the loaded adapter of that name and its config, whose layers and strengths stay.

        Raises:
            AdapterError: when the file is damaged, does not fit this base, or an adapter of another variant is loaded.

        """
        if not isinstance(adapter, Adapter):
            adapter = formats.read(adapter)
        tuned_on = adapter.provenance.base
        if tuned_on.fingerprint != self.base_fingerprint:
            _LOG.warning(
                "The adapter was tuned on another base (%s); it is stacked onto %s.",
                tuned_on.name,
                self.base_name,
            )
        if hotswap:
            self._attachments.swap(adapter_name, adapter)
        elif adapter_name in self._image_loras.names:
            raise AdapterError(f"{adapter_name!r} is loaded already. Unload it, or choose another name.")
        else:
            self._attachments.attach(adapter_name, adapter, strength)
        return adapter

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: Strength | Sequence[Strength] | None = None
    ) -> None:
        """Choose which loaded adapters and LoRAs are on, with their strengths; the others go off.

        Strengths are 1 where none are given. An adapter's may be one for each part, a LoRA's is a number.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if adapter_weights is None or isinstance(adapter_weights, (int, float, Mapping)):
            weights: list[Strength] = [1.0 if adapter_weights is None else adapter_weights] * len(names)
        else:
            weights = list(adapter_weights)
        if len(weights) != len(names):
            raise TavError(
                f"{len(names)} adapters and {len(weights)} strengths were given. Give one strength each."
            )
        chosen = dict(zip(names, weights, strict=True))
        loras = {name: chosen.pop(name) for name in self._image_loras.names if name in chosen}
        if any(isinstance(strength, Mapping) for strength in loras.values()):
            raise TavError("A LoRA of an image model has no parts. Give one number for its strength.")
        self._image_loras.set_strengths(cast("dict[str, float]", loras))
        self._attachments.set_strengths(chosen)

    def unload_adapter(self, adapter_name: str = "default") -> None:
        """Take an adapter or a LoRA off; without any, UNet and text encoders are bit for bit the base's again."""
        if adapter_name in self._image_loras.names:
            self._image_loras.unload(adapter_name)
            self._attachments.apply()
        else:
            self._attachments.detach(adapter_name)

    def load_lora_weights(self, lora: str | Path, adapter_name: str, strength: float = 1.0) -> None:
        """Load an ordinary LoRA of an image model, for style or character, beside the adapters of clips.

        `lora` is a file of kohya's or diffusers' keys, or a folder of PEFT or diffusers. It acts in every frame, and on
        the text encoders where it has tensors for them. Load it before inverting: an inversion holds for what is on.

        Raises:
            AdapterError: when the name is taken, or the file is no LoRA that fits this base.

        """
        if adapter_name in self.adapters:
            raise AdapterError(f"{adapter_name!r} is loaded already. Unload it, or choose another name.")
        self._image_loras.load(Path(lora), adapter_name, strength)
        self._attachments.apply()

    def load_textual_inversion(self, *args: Any, **kwargs: Any) -> None:
        """Load words that were learned for the base, as diffusers' pipelines do.

        Raises:
            AdapterError: when the file is no textual inversion of this base's.

        """
        try:
            super().load_textual_inversion(*args, **kwargs)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, UnpicklingError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise AdapterError(f"{args[0]} cannot be loaded as a textual inversion: {reason}") from error

    @property
    def adapters(self) -> list[str]:
        """Names of the loaded adapters, and of LoRAs beside them."""
        return [*self._attachments.names, *self._image_loras.names]
