"""Tune an adapter on one clip with its caption."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from torch import Tensor

from tav_peft.adapter import LATENTS, Adapter, ClipInfo, Provenance, library_versions
from tav_peft.conditions import Conditions
from tav_peft.errors import TuningError
from tav_peft.formats.origin import base_info, initial_temporal
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.presets import Subset
from tav_peft.recipe import Recipe, TrainingSection
from tav_peft.shapes import DTYPES, Latents
from tav_peft.trail import Trail, plot_losses, settings_key
from tav_peft.unet.probe import probed
from tav_peft.unet.trainable import Trainable, trainable
from tav_peft.video.clip import Clip


@dataclasses.dataclass(frozen=True)
class TuningStep:
    """How far a tuning has come; told after every step."""

    step: int
    steps: int
    loss: float
    seconds_per_step: float


def tune(
    pipe: TuneAVideoPipeline,
    clip: Clip,
    prompt: str,
    recipe: Recipe,
    *,
    output: Path | None = None,
    progress: Callable[[TuningStep], None] | None = None,
    overwrite: bool = False,
    restart: bool = False,
    keep_latents: bool = False,
) -> Adapter:
    """Tune the recipe's parts of the base on a clip with its caption (Wu et al. 2023, eq. 5), and return the adapter.

    With `output` the adapter is written there, a trail of earlier ones, the loss plot and, until it is done, the state
    to resume from beside it; the same call goes on where a killed one stopped. `keep_latents` puts the clip's clean
    latents into the adapter: they decode to the clip. The pipeline is left as it was.

    Raises:
        TuningError: when the output exists, adapters are loaded, an unfinished tuning has other settings, or the loss
            is no longer a number.

    """
    if pipe.adapters:
        raise TuningError(f"Adapters are loaded ({', '.join(pipe.adapters)}). Unload them before tuning.")
    trail = Trail(Path(output)) if output is not None else None
    _prepare(trail, overwrite=overwrite, restart=restart)
    settings, dtype = recipe.training, DTYPES[recipe.adapter.dtype]
    subset = Subset(recipe.adapter.preset, recipe.adapter.parts, recipe.adapter.blocks)
    provenance = _provenance(pipe, clip, prompt, recipe, subset)
    moments = pipe.encode_moments(clip)
    told = pipe.encode_prompts([prompt], size=(clip.height, clip.width))
    kept = {LATENTS: pipe.encode_clip(clip).cpu().to(dtype)} if keep_latents else {}
    generator = torch.Generator().manual_seed(settings.seed)
    loss_of = partial(denoising_loss, pipe, moments, told, generator)
    with (
        _accelerator(pipe, settings.precision) as accelerator,
        trainable(
            pipe.unet, subset, rank=recipe.adapter.rank, alpha=recipe.adapter.alpha, seed=settings.seed
        ) as part,
        _checkpointing(pipe, settings.gradient_checkpointing),
        pipe.unet.as_variant(recipe.model),
    ):
        optimizer = _optimizer(part, settings)
        key = _key(recipe, provenance)
        losses = trail.load_state(key, part.parameters, optimizer, generator) if trail else []
        drawn = generator.get_state()  # as of the last whole step

        def adapter() -> Adapter:
            stepped = provenance.model_copy(update={"step": len(losses)})
            return Adapter(part.tensors(dtype) | kept, part.peft_config, stepped)

        def keep() -> None:
            if trail is not None and losses and _is_whole(optimizer, len(losses)):
                adapter().save(trail.at_step(len(losses)))
                trail.save_state(key, part.parameters, optimizer, drawn, losses)

        try:
            for done in _steps(loss_of, part, optimizer, settings, accelerator, losses):
                drawn = generator.get_state()
                if done.step % settings.save_every == 0 and done.step < settings.steps:
                    keep()
                if progress is not None:
                    progress(done)
        except KeyboardInterrupt:
            keep()
            raise
        tuned = adapter()
    if trail is None:
        return probed(tuned, pipe.unet)
    tuned.save(trail.output)  # before its probe, which hours of tuning must not depend on
    plot_losses(losses, trail.plot)
    trail.clear_state()
    result = probed(tuned, pipe.unet)
    result.save(trail.output)
    return result


def _steps(
    loss_of: Callable[[], Tensor],
    part: Trainable,
    optimizer: torch.optim.Optimizer,
    settings: TrainingSection,
    accelerator: Accelerator,
    losses: list[float],
) -> Iterator[TuningStep]:
    """Take the steps that `losses` does not have yet, appending to it; every yield is a state to save."""
    parameters = list(part.parameters.values())
    prepared = accelerator.prepare_optimizer(optimizer)
    for step in range(len(losses) + 1, settings.steps + 1):
        started = time.perf_counter()
        with accelerator.autocast():
            loss = loss_of()
        value = loss.item()
        if not math.isfinite(value):
            raise TuningError(
                f"The loss is {value} at step {step}. Lower training.lr, or set training.precision to fp32."
            )
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)
        prepared.step()
        prepared.zero_grad(set_to_none=True)
        losses.append(value)
        yield TuningStep(step, settings.steps, value, time.perf_counter() - started)


def _is_whole(optimizer: torch.optim.Optimizer, steps: int) -> bool:
    """Tell whether every parameter has taken these steps; Ctrl-C may come in the middle of an update."""
    return all(int(state["step"]) == steps for state in optimizer.state.values())


def _optimizer(part: Trainable, settings: TrainingSection) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        part.parameters.values(),
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )


def _key(recipe: Recipe, provenance: Provenance) -> str:
    """Hash what a resumed tuning must share with the one it goes on with."""
    return settings_key(
        training=recipe.training.model_dump(exclude={"save_every"}),
        model=recipe.model.model_dump(),
        adapter=recipe.adapter.model_dump(),
        caption=provenance.caption,
        clip=provenance.clip.fingerprint,
        base=provenance.base.fingerprint,
    )


def denoising_loss(
    pipe: TuneAVideoPipeline,
    moments: tuple[Latents, Latents],
    conditions: Conditions,
    generator: torch.Generator,
) -> Tensor:
    """Draw latents, noise and a timestep, and return the mean squared error of the prediction (Ho et al. 2020, eq. 14).

    The latents are sampled anew from the posterior at each step, in the original's order of draws: posterior, noise,
    timestep. `moments` are the posterior's mean and standard deviation, (1, channels, frames, height, width).
    """
    noise_schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    mean, std = (m.to(conditions.text.device, torch.float32) for m in moments)
    folded = mean.transpose(1, 2)[0].shape  # drawn as the original does, frames first
    draw = torch.randn(folded, generator=generator).transpose(0, 1)[None].to(mean.device)
    latents = (mean + std * draw) * pipe.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=generator).to(mean.device)
    timesteps = noise_schedule.config.num_train_timesteps
    timestep = torch.randint(0, timesteps, (len(latents),), generator=generator).to(mean.device)
    noisy = noise_schedule.add_noise(latents, noise, timestep).to(conditions.text.dtype)
    predicted = pipe.predict(noisy, timestep, conditions)
    target = {
        "epsilon": lambda: noise,
        "v_prediction": lambda: noise_schedule.get_velocity(latents, noise, timestep),
        "sample": lambda: latents,
    }[noise_schedule.config.prediction_type]()
    return F.mse_loss(predicted.float(), target.float())


def _prepare(trail: Trail | None, *, overwrite: bool, restart: bool) -> None:
    if trail is None:
        return
    if trail.output.suffix != ".safetensors":
        raise TuningError(f"{trail.output}: an adapter is one .safetensors file. Give a name that ends so.")
    if trail.output.exists() and not overwrite:
        raise TuningError(f"{trail.output} exists already. Choose another output, or pass --overwrite.")
    if restart:
        trail.clear_state()


@contextlib.contextmanager
def _accelerator(pipe: TuneAVideoPipeline, precision: str) -> Iterator[Accelerator]:
    """Give an Accelerator for this precision; its settings are global, so they are reset before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    on_cpu = pipe.device.type == "cpu"
    if precision == "fp16" and on_cpu:
        raise TuningError(
            "training.precision fp16 needs a GPU, this pipeline is on the CPU. Use fp32 or bf16."
        )
    try:
        yield Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=on_cpu)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@contextlib.contextmanager
def _checkpointing(pipe: TuneAVideoPipeline, on: bool) -> Iterator[None]:
    if not on or pipe.unet.is_gradient_checkpointing:
        yield
        return
    pipe.unet.train().enable_gradient_checkpointing()  # diffusers recomputes in training mode only
    try:
        yield
    finally:
        pipe.unet.disable_gradient_checkpointing()


def _provenance(
    pipe: TuneAVideoPipeline, clip: Clip, prompt: str, recipe: Recipe, subset: Subset
) -> Provenance:
    if pipe.unet.temporal_seed is None or pipe.unet.temporal_tuned:
        raise TuningError(
            "This UNet's T-Attn is tuned already, or did not start from a known seed, and the adapter's would count from "
            "its initial weights. Load the base that it was made from, or inflate it again."
        )
    return Provenance(
        caption=prompt,
        base=base_info(pipe),
        clip=ClipInfo(
            name=clip.name,
            fingerprint=clip.fingerprint,
            frames=clip.frames,
            height=clip.height,
            width=clip.width,
            fps=clip.fps,
            indices=clip.indices,
            fit=recipe.clip.fit,
        ),
        temporal_init=initial_temporal(pipe),
        model=recipe.model,
        subset=dataclasses.asdict(subset),
        step=0,
        recipe=recipe.model_copy(update={"base": pipe.base_name}).model_dump(mode="json"),
        versions=library_versions(),
    )
