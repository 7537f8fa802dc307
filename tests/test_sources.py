"""Where an edit finds its clip."""

import dataclasses

import numpy as np
import pytest
import torch

from tav_peft.adapter import LATENTS, Adapter, BaseModelInfo, ClipInfo, Provenance, TemporalInit
from tav_peft.errors import ClipError
from tav_peft.recipe import Recipe
from tav_peft.sources import source_of
from tav_peft.video.clip import Clip

RECIPE = Recipe().override(["clip.frames=2", "clip.size=[16, 16]"])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Clip(pixels=rng.integers(0, 255, (3, 16, 16, 3), dtype=np.uint8), fps=8.0).write(
        tmp_path / "near" / "it.mp4"
    )
    return tmp_path


@pytest.fixture
def adapter(folder):
    clip = Clip.read(folder / "near" / "it.mp4", **RECIPE.clip.model_dump())
    provenance = Provenance(
        caption="x",
        base=BaseModelInfo(name="b", fingerprint="f", architecture={}),
        clip=ClipInfo(
            name=clip.name,
            fingerprint=clip.fingerprint,
            frames=2,
            height=16,
            width=16,
            fps=8.0,
            indices=clip.indices,
        ),
        temporal_init=TemporalInit(name="n", seed=0, fingerprint="f"),
        subset={"preset": "lite", "parts": ["st_attn"], "blocks": ["mid"]},
        step=1,
        recipe=RECIPE.model_dump(mode="json"),
        versions={},
    )
    return Adapter({}, None, provenance)


def test_a_clip_that_is_given_is_read_as_it_was_for_tuning(folder, adapter):
    found = source_of(adapter, None, folder / "near" / "it.mp4")
    assert found.fingerprint == adapter.provenance.clip.fingerprint


def test_latents_inside_the_adapter_are_taken_before_files_nearby(folder, adapter):
    latents = torch.zeros(1, 4, 2, 2, 2)
    carrying = dataclasses.replace(adapter, tensors={LATENTS: latents})
    assert source_of(carrying, folder / "near" / "a.safetensors") is latents


def test_the_clip_beside_the_adapter_is_found(folder, adapter):
    found = source_of(adapter, folder / "near" / "a.safetensors")
    assert found.fingerprint == adapter.provenance.clip.fingerprint


def test_another_clip_of_the_same_name_is_not_taken(folder, adapter):
    Clip(pixels=np.zeros((3, 16, 16, 3), np.uint8), fps=8.0).write(folder / "near" / "it.mp4")
    with pytest.raises(ClipError, match=r"tuned on it\.mp4.*--clip"):
        source_of(adapter, folder / "near" / "a.safetensors")


def test_a_clip_that_is_nowhere_is_asked_for(adapter, tmp_path):
    with pytest.raises(ClipError, match=r"Give the clip with --clip, or tune with --keep-latents"):
        source_of(adapter, tmp_path / "elsewhere" / "a.safetensors")
