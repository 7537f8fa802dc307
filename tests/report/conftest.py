"""A folder as `tav edit` leaves it: an adapter, its clip and two edits, without a model that made them."""

import numpy as np
import pytest

from tav_peft.adapter import ClipInfo
from tav_peft.pocket import truth
from tav_peft.pocket.clips import SHIPPED
from tav_peft.recipe import Recipe
from tav_peft.sources import read_as_tuned
from tav_peft.trail import Trail, plot_losses
from tav_peft.video.record import Record

RABBIT = SHIPPED[0]
PANDA = RABBIT.edited(name="panda")
SNOW = RABBIT.edited(name="panda", background="snow")


@pytest.fixture
def folder(tmp_path, make_adapter):
    place = tmp_path / "edits"
    video = truth.write(RABBIT, place)
    adapter, file = make_adapter(), place / "rabbit.safetensors"
    recipe = Recipe.load("pocket").override(["editing.num_inference_steps=4"])
    told = adapter.provenance.model_copy(
        update={"caption": RABBIT.caption, "recipe": recipe.model_dump(mode="json"), "step": 200}
    )
    object.__setattr__(adapter, "provenance", told)
    clip = read_as_tuned(adapter, video)
    info = ClipInfo(
        name=video.name,
        fingerprint=clip.fingerprint,
        frames=8,
        height=64,
        width=64,
        fps=8.0,
        indices=clip.indices,
    )
    object.__setattr__(adapter, "provenance", told.model_copy(update={"clip": info}))
    adapter.save(file)
    plot_losses(list(np.linspace(0.2, 0.05, 200)), Trail(file).plot)
    for name, ideal, settings in (
        ("panda.mp4", PANDA, {"guidance_scale": 4.0, "depth": 1.0}),
        ("snow.gif", SNOW, {}),
    ):
        edit = ideal.render().write(place / name, scale=4)
        Record(ideal.caption, settings).write(edit)
    return place
