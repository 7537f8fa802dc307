"""Tune an adapter on one clip with its caption, or on several of one subject, in one process or several."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from tav_peft.adapter import LATENTS, Adapter, ClipInfo, FurtherClip, Provenance, library_versions
from tav_peft.conditions import Conditions
from tav_peft.early_stopping import PROBES, EarlyStopping, Watch
from tav_peft.errors import AdapterError, TuningError
from tav_peft.formats.origin import base_info, initial_temporal
from tav_peft.lock import locked
from tav_peft.objective import Example, denoising_loss, draw_example
from tav_peft.optimizing import Optimization, TuningStep
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.planning.memory import recomputes
from tav_peft.planning.stages import Frames
from tav_peft.presets import Subset
from tav_peft.processes import of_the_first
from tav_peft.recipe import Recipe
from tav_peft.shapes import DTYPES, Latents
from tav_peft.trail import Trail, plot_losses, settings_key
from tav_peft.unet.probe import probed
from tav_peft.unet.trainable import trainable
from tav_peft.video.clip import Clip


def tune(
    pipe: TuneAVideoPipeline,
    clip: Clip,
    prompt: str,
    recipe: Recipe,
    *,
    also: Sequence[tuple[Clip, str]] = (),
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

    `also` are further clips of the same subject with their captions; a step then learns from all of them, by the mean of
    their losses. Where `accelerate launch` started several processes, each takes its share of the clips, all return the
    adapter, and the first one writes.

    Raises:
        TuningError: when the output exists, another process is at it, adapters are loaded, an unfinished tuning has
            other settings, there are more processes than clips, or numbers are no longer finite.

    """
    if pipe.adapters:
        raise TuningError(f"Adapters are loaded ({', '.join(pipe.adapters)}). Unload them before tuning.")
    clips = [(clip, prompt), *also]
    with _accelerator(pipe, recipe.training.precision) as accelerator:
        if accelerator.num_processes > len(clips):
            raise TuningError(
                f"There are {accelerator.num_processes} processes and {len(clips)} clips, and each process takes whole "
                "clips. Start as many as there are clips at most."
            )
        run = partial(_tuned, pipe, clips, recipe, accelerator, progress=progress, keep_latents=keep_latents)
        if output is None:
            return run(None)
        trail = Trail(Path(output))
        _check_output(trail.output)
        with contextlib.ExitStack() as held:
            if accelerator.is_main_process:
                held.enter_context(locked(trail.lock, str(trail.output), TuningError))
                _prepare(trail, overwrite=overwrite, restart=restart)
            accelerator.wait_for_everyone()  # with what the first one found or cleared away
            made = run(trail)
            accelerator.wait_for_everyone()
            return made if accelerator.is_main_process else Adapter.load(trail.output)


def _tuned(
    pipe: TuneAVideoPipeline,
    clips: Sequence[tuple[Clip, str]],
    recipe: Recipe,
    accelerator: Accelerator,
    trail: Trail | None,
    *,
    progress: Callable[[TuningStep], None] | None,
    keep_latents: bool,
) -> Adapter:
    settings, dtype = recipe.training, DTYPES[recipe.adapter.dtype]
    subset = Subset(recipe.adapter.preset, recipe.adapter.parts, recipe.adapter.blocks)
    provenance = _provenance(pipe, clips, recipe, subset)
    moments = [pipe.encode_moments(clip) for clip, _ in clips]
    told = [pipe.encode_prompts([prompt], size=(clip.height, clip.width)) for clip, prompt in clips]
    kept = {LATENTS: pipe.encode_clip(clips[0][0]).cpu().to(dtype)} if keep_latents else {}
    generator = torch.Generator().manual_seed(settings.seed)

    draw = partial(_draw, pipe, moments, told, generator, settings.window, accelerator)
    written = trail if accelerator.is_main_process else None
    stopping = EarlyStopping(settings, written, of_the_first)
    with (
        trainable(
            pipe.unet,
            subset,
            rank=recipe.adapter.rank,
            alpha=recipe.adapter.alpha,
            method=recipe.adapter.method,
            seed=settings.seed,
        ) as part,
        _checkpointing(pipe, any(_recomputes(pipe, recipe, mean) for mean, _ in moments)),
        pipe.unet.as_variant(recipe.model),
    ):
        optimization = Optimization(part.parameters, settings, accelerator, generator)
        key = _key(recipe, provenance)
        stopping.begin(partial(Watch, pipe, accelerator.autocast, moments[0][0], clips[0][1], recipe))
        _resume(optimization, stopping, trail, key)

        def adapter() -> Adapter:
            stepped = provenance.model_copy(update={"step": len(optimization.losses)})
            tensors = _finite(part.tensors(dtype), recipe.adapter.dtype, stepped.step)
            return Adapter(tensors | kept, part.peft_config, stepped)

        def keep() -> None:
            if written is not None and optimization.losses and optimization.is_whole:
                adapter().save(written.at_step(len(optimization.losses)))
                written.save_state(key, optimization.state() | stopping.state())

        try:
            for done in stopping.watched(optimization.steps(draw), len(optimization.losses), adapter):
                if done.step % settings.save_every == 0 and done.step < settings.steps:
                    keep()
                if progress is not None:
                    progress(done)
            tuned = stopping.chosen or adapter()
        except KeyboardInterrupt:
            keep()
            raise
        except TuningError as error:
            raise TuningError(f"{error}{trail.kept() if trail else ''}") from None
        if written is not None:  # killed from here on, it goes on from its last step
            written.save_state(key, optimization.state() | stopping.state())
    return probed(tuned, pipe.unet) if written is None else _finish(tuned, pipe, written, optimization.losses)


def _draw(
    pipe: TuneAVideoPipeline,
    moments: Sequence[tuple[Tensor, Tensor]],  # of as many frames and such a size as each clip has
    told: Sequence[Conditions],
    generator: torch.Generator,
    window: int | None,
    accelerator: Accelerator,
) -> list[Callable[[], Tensor]]:
    """Draw an example of every clip, alike in all processes, and give the losses of this process's clips."""
    examples = [draw_example(pipe, each, generator, window) for each in moments]
    return [
        partial(_share, pipe, examples[number], told[number], 1 / len(examples))
        for number in range(accelerator.process_index, len(examples), accelerator.num_processes)
    ]


def _share(pipe: TuneAVideoPipeline, example: Example, told: Conditions, share: float) -> Tensor:
    return denoising_loss(pipe, example, told) * share


def _resume(optimization: Optimization, stopping: EarlyStopping, trail: Trail | None, key: str) -> None:
    state = None if trail is None else trail.load_state(key)
    if trail is None or state is None:
        return
    try:
        stopping.restore(state.pop(PROBES, None))
        optimization.restore(state)
    except (AdapterError, ValueError, RuntimeError) as error:  # RuntimeError: no state of a generator
        raise trail.refusal(str(error)) from None


def _finish(tuned: Adapter, pipe: TuneAVideoPipeline, trail: Trail, losses: list[float]) -> Adapter:
    """Write the adapter with its probe, and the loss plot, and only then let go of the state to resume from."""
    try:
        result = probed(tuned, pipe.unet)
    except Exception:
        tuned.save(trail.output)  # hours of tuning must not depend on a probe
        trail.clear_state()
        raise
    plot_losses(losses, trail.plot, result.provenance.step_probes)
    result.save(trail.output)
    trail.clear_state()
    return result


def _finite(tensors: dict[str, Tensor], dtype: str, step: int) -> dict[str, Tensor]:
    """Refuse what no reader of the adapter would take."""
    for name, tensor in tensors.items():
        if not all(math.isfinite(value) for value in torch.aminmax(tensor)):
            raise TuningError(
                f"{name} is not finite in {dtype} after step {step}. Lower training.lr, or set adapter.dtype to fp32."
            )
    return tensors


def _key(recipe: Recipe, provenance: Provenance) -> str:
    """Hash what a resumed tuning must share with the one it goes on with."""
    return settings_key(
        training=recipe.training.model_dump(exclude={"save_every"}),
        model=recipe.model.model_dump(),
        adapter=recipe.adapter.model_dump(),
        caption=provenance.caption,
        clip=provenance.clip.fingerprint,
        base=provenance.base.fingerprint,
        **(
            {"further": [each.model_dump() for each in further]}
            if (further := provenance.further_clips)
            else {}
        ),
    )


def _check_output(output: Path) -> None:
    if output.suffix != ".safetensors":
        raise TuningError(f"{output}: an adapter is one .safetensors file. Give a name that ends so.")


def _prepare(trail: Trail, *, overwrite: bool, restart: bool) -> None:
    # with a state to resume from, the output is one that this tuning wrote or was allowed to replace
    if trail.output.exists() and not (overwrite or trail.state.exists()):
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


def _recomputes(pipe: TuneAVideoPipeline, recipe: Recipe, latents: Latents) -> bool:
    """Tell whether activations are made again in the backward, which changes a tuning by rounding at most."""
    frames, height, width = latents.shape[2:]
    seen = Frames(min(frames, recipe.training.window or frames), height, width)
    return recomputes(pipe.unet, recipe, seen, pipe.device)


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
    pipe: TuneAVideoPipeline, clips: Sequence[tuple[Clip, str]], recipe: Recipe, subset: Subset
) -> Provenance:
    if pipe.unet.temporal_seed is None or pipe.unet.temporal_tuned:
        raise TuningError(
            "This UNet's T-Attn is tuned already, or did not start from a known seed, and the adapter's would count from "
            "its initial weights. Load the base that it was made from, or inflate it again."
        )
    (clip, prompt), *also = clips
    return Provenance(
        caption=prompt,
        base=base_info(pipe),
        clip=_info(clip, recipe),
        further_clips=tuple(FurtherClip(caption=told, clip=_info(each, recipe)) for each, told in also),
        temporal_init=initial_temporal(pipe),
        model=recipe.model,
        subset=dataclasses.asdict(subset),
        step=0,
        recipe=recipe.model_copy(update={"base": pipe.base_name}).model_dump(mode="json"),
        versions=library_versions(),
    )


def _info(clip: Clip, recipe: Recipe) -> ClipInfo:
    return ClipInfo(
        name=clip.name,
        fingerprint=clip.fingerprint,
        frames=clip.frames,
        height=clip.height,
        width=clip.width,
        fps=clip.fps,
        indices=clip.indices,
        fit=recipe.clip.fit,
    )
