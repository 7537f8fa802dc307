"""How a pipeline comes from a base, and goes to disk as an inflated checkpoint."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import nn

from tav_peft import bases
from tav_peft.bases import single_file
from tav_peft.bases.folder import check_loaded, loading_options
from tav_peft.bases.prediction_type import check as check_prediction_type
from tav_peft.errors import AdapterError, BaseModelError
from tav_peft.foreign import refused
from tav_peft.formats import inflated
from tav_peft.unet.inflation import InflatedUNet

if TYPE_CHECKING:
    from typing import Self


class BaseLoading(DiffusionPipeline):  # type: ignore[misc]
    """The part of a pipeline that reads, knows and writes its base."""

    unet: InflatedUNet

    @property
    def base_name(self) -> str:
        """Name of the base, without folders of this machine."""
        location = self.config.get("_name_or_path")  # not there when the pipeline was put together by hand
        return bases.name_of(location) if location else "unnamed"

    @property
    def base_license(self) -> str | None:
        """Licence of the base as its model card states it."""
        location = self.config.get("_name_or_path")
        return bases.license_of(location) if location else None

    @functools.cached_property
    def base_fingerprint(self) -> str:
        """Hash of the base's query projections; taken before the first adapter changes them, then kept."""
        return bases.fingerprint(self.unet)

    @classmethod
    def from_pretrained(cls, base: str | Path, *, prediction_type: str | None = None, **kwargs: Any) -> Self:
        """Load a base: a folder in diffusers layout, a single file, a hub id, or the embedded `"pocket"`.

        `prediction_type` says what the base predicts, `epsilon` or `v_prediction`, where its files do not or are wrong.
        Other keyword arguments are those of `DiffusionPipeline.from_pretrained` (dtype, revision, …), and for a single
        file those of `single_file.components`.

        Raises:
            BaseModelError: when there is no such base, or it cannot be inflated.

        """
        location = bases.locate(base)
        dtype = kwargs.setdefault("dtype", torch.float32)  # all parts alike, whatever the files hold
        given = set(kwargs)
        if dtype == torch.bfloat16:
            kwargs["dtype"] = torch.float32  # bfloat16 would lose what the fingerprint is taken of
        if prediction_type is not None:
            check_prediction_type(prediction_type)
        with refused(BaseModelError, f"{base} cannot be loaded as a base"):
            pipe = cls._load_parts(location, prediction_type, kwargs)
            read = {name: part for name, part in pipe.components.items() if name not in kwargs}
            check_loaded(Path(location), read)
        if prediction_type is not None:
            pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction_type)
        for model in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.unet):
            if model is not None:
                model.requires_grad_(False)
        if dtype == torch.bfloat16:
            _ = pipe.base_fingerprint  # taken now, and kept
            for name, part in pipe.components.items():
                if isinstance(part, nn.Module) and name not in given:
                    nn.Module.to(part, dtype)  # diffusers' own `to` warns of what does not matter here
        return pipe

    @classmethod
    def _load_parts(cls, location: str, prediction_type: str | None, kwargs: dict[str, Any]) -> Self:
        path = Path(location)
        if path.is_file():
            pipe = cls(**single_file.components(path, prediction_type=prediction_type, **kwargs))
            pipe.register_to_config(_name_or_path=location)
            return pipe
        section = inflated.section_of(path / "unet")
        if section is not None and "unet" not in kwargs:
            kwargs["unet"] = inflated.read_unet(path / "unet", section, kwargs["dtype"])
        options = loading_options(path, kwargs) if path.is_dir() else {}
        return super().from_pretrained(location, **{**options, **kwargs})

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the base as an inflated checkpoint, which `from_pretrained` loads with its variant.

        Raises:
            AdapterError: when adapters are loaded, or the disk refuses.

        """
        if self.adapters:
            raise AdapterError(
                f"Adapters are loaded ({', '.join(self.adapters)}). Unload them, or bake them in with `tav merge --into`."
            )
        unet = self.unet
        assert unet.temporal_seed is not None
        section = inflated.Section(
            model=unet.variant, temporal_seed=unet.temporal_seed, temporal_tuned=unet.temporal_tuned
        )
        state = {name: tensor.detach() for name, tensor in unet.state_dict().items()}
        inflated.save(state, Path(save_directory), self, section)
