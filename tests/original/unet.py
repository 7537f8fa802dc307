"""Calls of the UNet, and what goes into and out of its modules on the way."""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .comparing import Comparison, compare
from .recordings import Recording


@torch.no_grad()
def forward(recording: Recording) -> Iterator[Comparison]:
    """Every recorded call: inflated with either T-Attn, with T-Attn off, and flat."""
    for name, call in calls(recording, torch.float32).items():
        yield compare(recording, "forward", name, call(), recording.take("forward", name))


def calls(recording: Recording, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Every recorded call by the name of what it gave, ready to be done."""
    names = recording.names("forward")

    def given(name: str) -> Tensor:
        tensor = recording.take("forward", name)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def run(unet: nn.Module, case: str, sample: Tensor) -> Tensor:
        timestep = next(name for name in (f"{case}timestep", f"{case}timesteps") if name in names)
        return unet(sample, given(timestep), given(f"{case}text")).sample

    def inflated(name: str) -> Tensor:
        case, t_attn = re.fullmatch(r"(.*)out_(\w+)", name).groups()
        return run(recording.pipe(t_attn, dtype=dtype).unet, case, given(f"{case}latents"))

    def off(latents: Tensor) -> Tensor:
        return run(recording.pipe(dtype=dtype).unet, "", latents)  # ours starts with T-Attn off

    def flat(case: str, sample: Tensor) -> Tensor:
        return run(recording.flat().to(dtype), case, sample)

    first = given("latents")[:, :, :1]
    special = {
        "out_tattn_off": lambda: off(given("latents")),
        "same_frames_out_tattn_off": lambda: off(first.expand_as(given("latents"))),
        "per_frame_2d_out": lambda: torch.stack([flat("", x) for x in given("latents").unbind(2)], dim=2),
        "2d_out": lambda: flat("2d_", given("2d_sample")),
    }
    outputs = sorted(name for name in names if re.search(r"(^|_)out(_|$)", name))
    return {name: special.get(name, functools.partial(inflated, name)) for name in outputs}


@torch.no_grad()
def trace(recording: Recording) -> Iterator[Comparison]:
    """Every recorded input and output of a module, in one call with the T-Attn named in the facts."""
    facts = recording.facts["trace"]
    unet = recording.pipe(facts["t_attn"]).unet
    seen: dict[str, Tensor] = {}
    for name, path in facts["modules"].items():
        _watch(unet.get_submodule(path), name, seen)
    latents, timestep, states = (recording.take("forward", key) for key in ("latents", "timestep", "text"))
    unet(latents, timestep, states)
    for name in sorted(recording.names("trace")):
        theirs = recording.take("trace", name)
        ours = _laid_out(seen[name], theirs, frames=latents.shape[2])
        yield compare(recording, "trace", name, ours, theirs)


def _watch(module: nn.Module, name: str, seen: dict[str, Tensor]) -> None:
    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        for number, tensor in enumerate(inputs):
            seen[f"{name}.in{number or ''}"] = tensor.clone()
        if isinstance(kwargs.get("encoder_hidden_states"), Tensor):
            seen[f"{name}.encoder_hidden_states_first_frame"] = kwargs["encoder_hidden_states"][:1].clone()
        seen[f"{name}.out"] = (output if isinstance(output, Tensor) else output[0]).clone()

    module.register_forward_hook(keep, with_kwargs=True)


def _laid_out(ours: Tensor, theirs: Tensor, *, frames: int) -> Tensor:
    """Lay our tensor, whose frames are folded into the batch everywhere, out as the original's.

    Its residual blocks and transformers take b c f h w, and one time embedding for all frames of a video.
    """
    if theirs.ndim == ours.ndim + 1:
        return ours.unflatten(0, (-1, frames)).transpose(1, 2)
    if len(ours) == frames * len(theirs):
        rows = ours.unflatten(0, (-1, frames))
        # a library on several threads may round equal rows of one product differently, in their last bit
        assert (rows - rows[:, :1]).abs().max() <= 1e-6 * rows.abs().max(), "frames of one video differ"
        return rows[:, 0]
    return ours
