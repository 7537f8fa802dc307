"""What `tav tune` and `tav edit` ask of the memory before they load anything."""

from typing import TYPE_CHECKING

from tav_peft.cli.options import place_of

if TYPE_CHECKING:
    from tav_peft.adapter import Adapter
    from tav_peft.planning import Job
    from tav_peft.recipe import EditingSection, Recipe
    from tav_peft.video.clip import Clip


def before_tuning(base: str, recipe: "Recipe", clip: "Clip", device: str | None, *, ignore: bool) -> bool:
    """Refuse a tuning that does not fit, unless that is to be ignored; say whether activations will be recomputed."""
    from tav_peft.planning import Job

    job = Job(recipe, clip.frames, clip.height, clip.width, prompts=0)
    return _recompute(base, job, device, recipe.training.precision, "" if ignore else "--ignore-memory")


def before_editing(
    base: str,
    tuned: "Adapter",
    how: "EditingSection",
    *,
    prompts: int,
    batch: int,
    device: str | None,
    precision: str | None,
) -> None:
    """Refuse edits that do not fit."""
    from tav_peft.planning import Job
    from tav_peft.recipe import Recipe

    clip, recipe = tuned.provenance.clip, Recipe(model=tuned.provenance.model, editing=how)
    if clip.frames * clip.height * clip.width:  # of a run imported without its config they are not known
        job = Job(recipe, clip.frames, clip.height, clip.width, prompts, batch, tunes=False)
        _recompute(base, job, device, precision, "--ignore-memory")


def _recompute(base: str, job: "Job", device: str | None, precision: str | None, anyway: str) -> bool:
    place = place_of(device)
    import torch

    from tav_peft.errors import BaseModelError
    from tav_peft.planning.blueprint import Blueprint
    from tav_peft.planning.check import check_memory
    from tav_peft.shapes import DTYPES, precision_on

    try:
        blueprint = Blueprint.of(base)
    except BaseModelError:
        return False  # loading it tells better what is wrong with it
    dtype = DTYPES[precision or precision_on(place)]
    return bool(check_memory(blueprint, job, torch.device(place), dtype=dtype, anyway=anyway).recompute)
