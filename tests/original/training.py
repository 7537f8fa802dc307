"""The recorded training runs, done again by `tune` with the recorded draws in the place of its own."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from tav_peft import tuning
from tav_peft.conditions import Conditions
from tav_peft.objective import Example
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.presets import BLOCKS
from tav_peft.recipe import Recipe
from tav_peft.unet.inflation import is_temporal
from tav_peft.video.clip import Clip

from .comparing import Comparison, compare
from .recordings import Recording, put


@dataclasses.dataclass
class Replay:
    """What our tuning made of a recorded run; tensors go by their names in the UNet's state dict."""

    first: dict[str, Tensor]
    losses: list[float] = dataclasses.field(default_factory=list)
    predictions: list[Tensor] = dataclasses.field(default_factory=list)
    norms: list[float] = dataclasses.field(default_factory=list)
    gradients: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    last: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def training(recording: Recording, run: str, *, checkpointing: bool = False) -> Iterator[Comparison]:
    """Losses, predictions, gradients and tuned weights of one run."""
    replay = replayed(recording, run, checkpointing=checkpointing)
    names = recording.names(run)

    def beside(kind: str, name: str, ours: Tensor) -> Comparison:
        floor = _floor(recording, run, kind)
        return compare(recording, kind, name, ours, recording.take(run, name), floor=floor)

    yield beside("loss", "loss", torch.tensor(replay.losses))
    norms = recording.take(run, "grad_norm")
    ratio = torch.tensor(replay.norms) / norms
    yield compare(recording, "gradient norm", "grad_norm", ratio, torch.ones_like(norms))
    if "pred" in names:
        yield beside("forward", "pred", torch.stack(replay.predictions))
    gradients = {name.removeprefix("grad1.") for name in names if name.startswith("grad1.")}
    assert gradients in (set(), set(replay.gradients)), "other tensors have a gradient"
    for name in sorted(gradients):
        yield beside("gradient", f"grad1.{name}", replay.gradients[name])
    tuned = {name.removeprefix("final.") for name in names if name.startswith("final.")}
    for name in sorted(tuned):
        yield beside("tuned weight", f"final.{name}", replay.last[name])
    yield _whole_update(recording, run, replay, sorted(tuned))


def trained_blocks(recording: Recording, run: str) -> list[str]:
    """Which of our block groups the original's run changed."""
    still = set(recording.run(run)["tensors_never_changed"])
    moved = [name for name in recording.facts["trainable"]["names"] if name not in still]
    return [block for block, start in BLOCKS.items() if any(name.startswith(start) for name in moved)]


@functools.cache
def replayed(recording: Recording, run: str, *, checkpointing: bool) -> Replay:
    """Tune our pipeline as the recorded run was, on its latents, noise and timesteps; once, as it takes a while."""
    settings = recording.run(run)
    pipe = recording.pipe()
    put(pipe, _temporal(recording, run, pipe))
    replay = Replay({name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()})
    recipe = Recipe().override(
        [
            "adapter.preset=paper", "adapter.dtype=fp32",
            f"adapter.blocks=[{', '.join(trained_blocks(recording, run))}]",
            f"training.steps={settings['steps']}", f"training.lr={settings['lr']}",
            f"training.gradient_checkpointing={str(checkpointing).lower()}",
        ]
    )  # fmt: skip
    clip = _any_clip(pipe, drawn(recording, run, "latents"))
    with _recorded_draws(recording, run, replay), _watched_gradients(replay) as gradients:
        adapter = tuning.tune(pipe, clip, "", recipe, progress=lambda step: replay.losses.append(step.loss))
    replay.gradients = dict(zip(map(_plain, adapter.tensors), gradients, strict=True))
    pipe.load_adapter(adapter)
    replay.last = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    return replay


def drawn(recording: Recording, run: str, name: str) -> Tensor:
    """What a run was given; the carried runs were given the same and have it in one file."""
    return recording.take(run if name in recording.names(run) else "train_draws", name)


def _plain(name: str) -> str:
    """A tensor's name in an adapter as its name in the UNet."""
    return name.removesuffix(".diff") + ".weight" if name.endswith(".diff") else name


def _temporal(recording: Recording, run: str, pipe: TuneAVideoPipeline) -> dict[str, Tensor]:
    """What the run's temporal attentions began as: recorded with it, or those of a file of their own."""
    which = recording.run(run)["t_attn_init"]
    if which != "fresh":
        return recording.t_attn(which)
    own = {name: tensor for name, tensor in pipe.unet.state_dict().items() if is_temporal(name)}
    # the norms are not tuned and not recorded: they begin with 1 and 0, as ours do
    return own | {name: drawn(recording, run, f"init.{name}") for name in own if ".attn_temp." in name}


def _any_clip(pipe: TuneAVideoPipeline, latents: Tensor) -> Clip:
    """A clip of the right size; its pixels do not matter, as the recorded latents take their place."""
    side = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    frames, height, width = latents.shape[-3:]
    return Clip(np.zeros((frames, height * side, width * side, 3), np.uint8), 8.0)


@contextlib.contextmanager
def _recorded_draws(recording: Recording, run: str, replay: Replay) -> Iterator[None]:
    """Give the objective the recorded latents, text, noise and timesteps, and note what the UNet predicts of them."""
    every = [drawn(recording, run, name) for name in ("latents", "noise", "timesteps")]
    steps = zip(*every, strict=True)
    told = Conditions(drawn(recording, run, "text"))
    objective = tuning.denoising_loss

    def given(pipe: TuneAVideoPipeline, example: Example, *_: Any) -> Tensor:
        def predicted(_module: nn.Module, _args: Any, output: Any) -> None:
            replay.predictions.append(output.sample.detach().clone())

        hook = pipe.unet.register_forward_hook(predicted)
        loss = objective(pipe, example, told)
        hook.remove()
        return loss

    with (
        mock.patch.object(tuning, "draw_example", side_effect=map(Example._make, steps)),
        mock.patch.object(tuning, "denoising_loss", given),
    ):
        yield


@contextlib.contextmanager
def _watched_gradients(replay: Replay) -> Iterator[list[Tensor]]:
    """Note the norm of each step's gradients, and give those of the first step, all before clipping."""
    clip = tuning.Accelerator.clip_grad_norm_
    gradients: list[Tensor] = []

    def noting(self: Any, parameters: list[nn.Parameter], limit: float) -> Tensor:
        if not gradients:
            gradients.extend(parameter.grad.clone() for parameter in parameters)
        norm = clip(self, parameters, limit)
        replay.norms.append(float(norm))
        return norm

    with mock.patch.object(tuning.Accelerator, "clip_grad_norm_", noting):
        yield gradients


_FLOORS = {
    "loss": "max loss diff",
    "tuned weight": "max final diff",
    "tuned update": "relative l2 error of the update (float64)",
}


def _floor(recording: Recording, run: str, kind: str) -> float | None:
    """How far the original's own replays are from the run: its code again in float32, and in float64."""
    measured = recording.noise_floor.get(run)
    if kind not in _FLOORS or measured is None:
        return None
    return max(value for name, value in measured.items() if name.endswith(_FLOORS[kind]))


def _whole_update(recording: Recording, run: str, replay: Replay, names: list[str]) -> Comparison:
    """Compare the way that all tuned weights went, as one vector: its error over its length."""

    def way(last: dict[str, Tensor]) -> Tensor:
        return torch.cat([(last[name].double() - replay.first[name].double()).flatten() for name in names])

    theirs = way({name: recording.take(run, f"final.{name}") for name in names})
    error = (way(replay.last) - theirs).norm() / theirs.norm()
    floor = _floor(recording, run, "tuned update")
    return compare(recording, "tuned update", "final.*", error, torch.zeros_like(error), floor=floor)
