"""TuneAVideoPipeline: a diffusers pipeline on an inflated base, with adapters, inversion and editing."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast, get_args

import torch
from diffusers import AutoencoderKL, DDIMScheduler, SchedulerMixin, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tav_peft import autoencoding
from tav_peft.adapter import ClipInfo
from tav_peft.conditions import Conditions, encode_clip_text, encode_sdxl_text
from tav_peft.control.steering import Control, Steering
from tav_peft.errors import BaseModelError, TavError
from tav_peft.feature_reuse import FeatureReuse
from tav_peft.injection import Injection, Injector
from tav_peft.inversion import ITERATIONS, TOLERANCE, Inversion, invert, timestep_pairs
from tav_peft.loading import AdapterLoading
from tav_peft.masks import KeptSource
from tav_peft.recipe import InversionMethod
from tav_peft.sampling import Sampling
from tav_peft.shapes import Latents
from tav_peft.token_merging import TokenMerging
from tav_peft.unet.inflation import InflatedUNet, inflate
from tav_peft.video.clip import Clip
from tav_peft.windows import OVERLAP, Windows

Progress = Callable[[int, int], None]  # steps done, steps in all


@dataclasses.dataclass(frozen=True)
class EditOutput:
    """What a call of the pipeline made: one clip a prompt, and their clean latents (one row a prompt)."""

    clips: list[Clip]
    latents: Latents


class TuneAVideoPipeline(AdapterLoading):  # type: ignore[misc]
    """Edit a clip by prompt with a base model inflated to video and adapters tuned on the clip.

    The base is a Stable Diffusion 1.x, 2.x or XL, the last with its second text encoder and tokenizer. `pipe.unet` is
    the inflated UNet (see `inflate`); the scheduler starts as the base's DDIM and may be replaced by any diffusers
    scheduler. Offloading, devices and dtypes work as in every diffusers pipeline.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    _optional_components = ["text_encoder_2", "tokenizer_2"]  # noqa: RUF012  (diffusers adds it to a list)

    def __init__(  # noqa: PLR0917  (diffusers passes a base's parts by these names)
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        tokenizer_2: CLIPTokenizer | None = None,
        force_zeros_for_empty_prompt: bool = True,
    ) -> None:
        super().__init__()
        if unet.config.in_channels != vae.config.latent_channels:
            raise BaseModelError(
                f"The UNet takes {unet.config.in_channels} channels, the VAE makes {vae.config.latent_channels}: "
                "an inpainting or depth model. Use a plain text-to-image base."
            )
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet if isinstance(unet, InflatedUNet) else inflate(unet),
            scheduler=_ddim(scheduler),
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )
        self.register_to_config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt)
        self._prepare_loading(self.unet, {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2})

    # -- text and pixels ---------------------------------------------------------------------------------

    def encode_prompts(self, prompts: Sequence[str], *, size: tuple[int, int] | None = None) -> Conditions:
        """Encode prompts to what the UNet is told, one row each.

        `size` is the clip's height and width in pixels, which SDXL is told too; not given, the base's own.

        Raises:
            TavError: when a prompt is longer than a text encoder reads.

        """
        device = self._execution_device
        prompts = [self.maybe_convert_prompt(prompt, self.tokenizer) for prompt in prompts]
        if self.text_encoder_2 is None:
            told = encode_clip_text(prompts, self.tokenizer, self.text_encoder, device)
        else:
            own = self.unet.config.sample_size * autoencoding.pixels_per_latent(self.vae)
            told = encode_sdxl_text(
                prompts,
                (self.tokenizer, self.tokenizer_2),
                (self.text_encoder, self.text_encoder_2),
                device,
                size=size or (own, own),
                empty_is_zero=self.config.force_zeros_for_empty_prompt,
            )
        return told.to(self.unet.dtype)

    def encode_moments(self, clip: Clip) -> tuple[Latents, Latents]:
        """Encode a clip to its posterior's mean and standard deviation, unscaled latents."""
        return autoencoding.encode_moments(self.vae, clip, self._execution_device)

    def encode_clip(self, clip: Clip) -> Latents:
        """Encode a clip to its clean latents, (1, channels, frames, height, width): the posterior's mean, scaled."""
        mean, _ = self.encode_moments(clip)
        return mean.to(self.unet.dtype) * self.vae.config.scaling_factor

    def decode_latents(self, latents: Latents, *, like: Clip | None = None, fps: float = 8.0) -> list[Clip]:
        """Decode each row of clean latents to a clip; `like` lends its frame rate and sound."""
        return autoencoding.decode(self.vae, latents.to(self._execution_device), like=like, fps=fps)

    def predict(
        self, latents: Latents, timestep: Tensor | int, conditions: Conditions, **residuals: Any
    ) -> Latents:
        """Run the UNet: the noise or velocity it sees in latents of as many rows as there are conditions.

        `residuals` are what control networks add, see `Steering.residuals`.
        """
        output: Latents = self.unet(
            latents, timestep, conditions.text, added_cond_kwargs=conditions.added, **residuals
        ).sample
        return output

    def noise(self, clip: Clip | ClipInfo, seed: int = 0) -> Latents:
        """Draw noise of the size of a clip's latents, to edit without an inversion; a seed is the same everywhere."""
        if not clip.frames * clip.height * clip.width:  # of a run imported without its config
            raise TavError("How many frames the clip has, and of what size, is not known. Give the clip.")
        factor = autoencoding.pixels_per_latent(self.vae)
        shape = (1, self.unet.config.in_channels, clip.frames, clip.height // factor, clip.width // factor)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def pixel_size(self, latents: Latents) -> tuple[int, int]:
        """Give the height and width in pixels of what latents decode to."""
        factor = autoencoding.pixels_per_latent(self.vae)
        return latents.shape[-2] * factor, latents.shape[-1] * factor

    # -- inversion and editing ---------------------------------------------------------------------------

    def inversion_scheduler(self) -> DDIMScheduler:
        """Build the DDIM scheduler that inversion walks: the pipeline's own numbers, never clipping."""
        return _ddim(self.scheduler)

    @torch.no_grad()
    def invert(
        self,
        clip_or_latents: Clip | Tensor,
        *,
        num_inference_steps: int = 50,
        depth: float = 1.0,
        method: str = "ddim",
        iterations: int = ITERATIONS,
        tolerance: float = TOLERANCE,
        controls: Sequence[Control] = (),
        window: int | None = None,
        overlap: int = OVERLAP,
        progress: Progress | None = None,
    ) -> Inversion:
        """Invert a clip, or its clean latents, by DDIM without text, with the adapters that are on.

        Only the share `depth` of the steps, from the clean end, is gone through. `method` is `ddim` or `fixed_point`
        (see `inversion.invert`); the latter makes up to `iterations` UNet passes a step, until one moves the latents by
        no more than `tolerance`. The result's `info["unet_passes"]` says how many there were. `controls` steer the
        inversion too; the paper's has none. A clip of more frames than `window` goes through the UNet in windows that
        share `overlap` frames, see `windows`.

        Raises:
            TavError: for impossible steps, depth, sizes or windows.

        """
        _check_steps(num_inference_steps, depth)
        if method not in get_args(InversionMethod):
            raise TavError(
                f"{method!r} is no way to invert: give one of {', '.join(get_args(InversionMethod))}."
            )
        if iterations < 1:
            raise TavError(f"{iterations} iterations: give at least 1.")
        given = clip_or_latents
        latents = self.encode_clip(given) if isinstance(given, Clip) else given
        latents = latents.to(self._execution_device, self.unet.dtype)
        if latents.ndim != 5 or latents.shape[0] != 1:
            raise TavError(
                f"Latents of shape {tuple(latents.shape)}: give (1, channels, frames, height, width)."
            )
        nothing = self.encode_prompts([""], size=self.pixel_size(latents))
        steering = self._steering(controls, latents)
        from_noise = list(reversed(self.timesteps(num_inference_steps)))
        windowed = self._windowed(window, overlap, self.predict)
        passes = itertools.count()

        def predict(x: Latents, timestep: int) -> Latents:
            next(passes)
            residuals = steering.residuals(
                x, timestep, nothing, from_noise.index(timestep), num_inference_steps
            )
            return windowed(x, timestep, nothing, **residuals)

        trajectory = invert(
            predict,
            latents,
            self.inversion_scheduler(),
            num_inference_steps,
            steps=max(1, round(depth * num_inference_steps)),
            method=cast("InversionMethod", method),
            iterations=iterations,
            tolerance=tolerance,
            progress=progress,
        )
        self.maybe_free_model_hooks()
        info = self.inverted_with(controls) | {"method": method, "unet_passes": next(passes)}
        if window is not None:
            info |= {"window": window, "overlap": overlap}
        if isinstance(given, Clip):
            info |= {"clip": given.fingerprint, "fps": given.fps, "name": given.name}
        return Inversion(trajectory.cpu(), num_inference_steps, info)

    def inverted_with(self, controls: Sequence[Control] = ()) -> dict[str, Any]:
        """Say what an inversion made now depends on, besides the clip: the base, the adapters that are on, controls."""
        return {
            "base": self.base_name,
            "base_fingerprint": self.base_fingerprint,
            "prediction_type": self.scheduler.config.prediction_type,
            "model": self.unet.variant.model_dump(),
            "adapters": self._acting(),
            "controls": [control.record for control in controls],
        }

    @torch.no_grad()
    def __call__(  # noqa: PLR0913  (options of one edit, named as in diffusers)
        self,
        prompt: str | Sequence[str],
        *,
        inversion: Inversion | None = None,
        guidance_scale: float = 12.5,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        num_inference_steps: int | None = None,
        depth: float = 1.0,
        negative_prompt: str = "",
        latents: Latents | None = None,
        controls: Sequence[Control] = (),
        mask: Clip | Tensor | None = None,
        window: int | None = None,
        overlap: int = OVERLAP,
        injection: Injection | None = None,
        reuse_features: int = 1,
        merge_tokens: float = 0.0,
        batch_size: int = 1,
        generator: torch.Generator | None = None,
        like: Clip | None = None,
        fps: float | None = None,
        progress: Progress | None = None,
    ) -> EditOutput:
        """Make one clip for each prompt, all from the same inversion (or the same noise `latents`).

        `depth` in (0, 1]: how far the clip was inverted before it is resampled; 1, the paper's way, starts from the
        noise end, less keeps more of the source. `guidance_interval` are the shares of the steps from which and up to
        which guidance acts; the others take half as long. `num_inference_steps` defaults to the inversion's. `controls`
        steer the sampling. Where `mask` (see `masks`) is 0 the source stays; `injection` keeps its layout by its own
        features. With `reuse_features` the deep blocks are computed at every so many steps only, and `merge_tokens` of
        ST-Attn's positions are seen as one with others. `window` and `overlap`
        are as in `invert`. As many as `batch_size` prompts are sampled at a time, which
        costs memory and changes a result by rounding only. `like` lends frame rate and sound to the results; without it
        `fps` is their frame rate, by default the inversion's, or 8. `generator` only matters to schedulers that add
        noise; each prompt draws from a stream of its own.

        Raises:
            TavError: for prompts that are too long and impossible numbers.
            BaseModelError: when a control does not fit the base.

        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        steps = num_inference_steps
        if steps is None:
            steps = inversion.num_inference_steps if inversion else 50
        _check_steps(steps, depth)
        if batch_size < 1:
            raise TavError(f"batch_size {batch_size}: give at least 1.")
        start, inverted = self._start(inversion, latents, steps, depth)
        told = self.encode_prompts([*prompts, negative_prompt], size=self.pixel_size(start))
        streams = None if generator is None else _streams(generator, len(prompts))
        if reuse_features != 1 and window is not None and window < start.shape[2]:
            raise TavError("Features are reused in whole clips. Give no window, or do not reuse them.")
        predict = self._windowed(window, overlap, self._approximated(reuse_features, merge_tokens))
        if injection is not None:
            if reuse_features != 1 or merge_tokens:
                raise TavError(
                    "Features that are reused or merged cannot be injected into. Give injection or the others."
                )
            predict = self._injector(injection, inversion, start, predict)
        sampling = Sampling(
            predict=predict, scheduler=self.scheduler, start=start, inverted=inverted, steps=steps,
            guidance_scale=guidance_scale, guidance_interval=guidance_interval, steering=self._steering(controls, start),
            keep=None if mask is None else self._keep(mask, inversion, start),
        )  # fmt: skip
        done = itertools.count(1)

        def tick(steps: int) -> None:
            if progress is not None:
                progress(next(done), steps * len(prompts))

        results = []
        for first in range(0, len(prompts), batch_size):
            rows = range(len(prompts))[first : first + batch_size]
            without = [-1] * len(rows) if guidance_scale != 1 else []
            generators = streams and [streams[row] for row in rows]
            results.append(sampling.run(told.rows(*without, *rows), len(rows), generators, tick))
        clean = torch.cat(results)
        if fps is None:
            fps = float(inversion.info.get("fps", 8.0)) if inversion else 8.0
        clips = self.decode_latents(clean, like=like, fps=fps)
        self.maybe_free_model_hooks()
        return EditOutput(clips, clean.cpu())

    def _start(
        self, inversion: Inversion | None, latents: Latents | None, steps: int, depth: float
    ) -> tuple[Latents, Tensor | None]:
        """Choose the latents to start from, and the timesteps that they have been inverted through."""
        if (inversion is None) == (latents is None):
            raise TavError("Give either an inversion (from `pipe.invert`) or noise latents to start from.")
        if inversion is None:
            assert latents is not None
            if depth != 1:
                raise TavError(
                    f"depth {depth:g} needs an inversion; noise latents are sampled from the start."
                )
            return latents.to(self._execution_device, self.unet.dtype), None
        if steps != inversion.num_inference_steps:
            raise TavError(
                f"The inversion has {inversion.num_inference_steps} steps, {steps} were asked for. Use the same number."
            )
        reached = len(inversion.trajectory) - 1
        if max(1, round(depth * steps)) > reached:
            raise TavError(
                f"The inversion goes to depth {reached / steps:g}, {depth:g} was asked for. Invert deeper."
            )
        start, left = inversion.at(depth)
        ddim = self.inversion_scheduler()
        ddim.set_timesteps(steps)
        return start.to(self._execution_device, self.unet.dtype), ddim.timesteps[-left:]

    def _windowed(
        self, window: int | None, overlap: int, predict: Callable[..., Latents]
    ) -> Callable[..., Latents]:
        return predict if window is None else functools.partial(Windows(window, overlap).predict, predict)

    def _steering(self, controls: Sequence[Control], latents: Latents) -> Steering:
        return Steering(controls, self.unet, self.vae, latents, self.pixel_size(latents))

    def _keep(self, mask: Clip | Tensor, inversion: Inversion | None, start: Latents) -> KeptSource:
        if inversion is None:
            raise TavError(
                "A mask keeps what the inversion has of the source. Give an inversion, or no mask."
            )
        return KeptSource.of(mask, inversion, self.timesteps(inversion.num_inference_steps), start)

    def _approximated(self, reuse: int, merge: float) -> Callable[..., Latents]:
        predict = TokenMerging(self.unet, self.predict, merge) if merge else self.predict
        return FeatureReuse(self.unet, predict, reuse) if reuse != 1 else predict

    def _injector(
        self,
        injection: Injection,
        inversion: Inversion | None,
        start: Latents,
        predict: Callable[..., Latents],
    ) -> Injector:
        if inversion is None:
            raise TavError("What is injected comes from the inversion. Give an inversion, or no injection.")
        timesteps = self.timesteps(inversion.num_inference_steps)
        nothing = self.encode_prompts([""], size=self.pixel_size(start))
        return Injector(injection, self.unet, inversion, timesteps, nothing, predict)

    def timesteps(self, num_inference_steps: int) -> list[int]:
        """List the timesteps that an inversion goes through, from the cleanest to the noisiest."""
        return [
            timestep for timestep, _, _ in timestep_pairs(self.inversion_scheduler(), num_inference_steps)
        ]


def _ddim(scheduler: SchedulerMixin) -> DDIMScheduler:
    """Build a DDIM scheduler of another one's numbers, as the original pipeline does: offset 1, no clipping."""
    if (
        isinstance(scheduler, DDIMScheduler)
        and scheduler.config.steps_offset == 1
        and not scheduler.config.clip_sample
    ):
        return DDIMScheduler.from_config(scheduler.config)
    return DDIMScheduler.from_config(scheduler.config, steps_offset=1, clip_sample=False)


def _streams(generator: torch.Generator, count: int) -> list[torch.Generator]:
    """Give each prompt a generator of its own, so that how many are sampled together changes none."""
    seeds = torch.randint(2**62, (count,), generator=generator, device=generator.device)
    return [torch.Generator(generator.device).manual_seed(int(seed)) for seed in seeds]


def _check_steps(num_inference_steps: int, depth: float) -> None:
    # with offset 1, a thousandth would stand outside of the 1000 timesteps
    if not 1 <= num_inference_steps <= 999:
        raise TavError(f"{num_inference_steps} steps: give between 1 and 999.")
    if not 0 < depth <= 1:
        raise TavError(f"depth {depth:g}: give more than 0 and at most 1 (the paper's).")
