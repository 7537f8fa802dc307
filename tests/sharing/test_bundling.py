"""Bundles: what is in them, how large they are, and that an edit from one is an edit from the clip."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from tav_peft import bases
from tav_peft.adapter import LATENTS, Adapter
from tav_peft.errors import AdapterError
from tav_peft.header import PREVIEW, parse_preview, read_header, spell_preview
from tav_peft.merging import merge
from tav_peft.methods import json_config
from tav_peft.presets import Subset
from tav_peft.sharing.bundling import bundle
from tav_peft.unet.inflation import InflatedUNet
from tav_peft.verification import verify
from tav_peft.video.preview import LIMIT, preview


@pytest.fixture
def tuned(make_adapter, pipe, clip):
    """An adapter of the clip on the tiny base."""

    def make(preset="lite", **settings):
        adapter = make_adapter(preset, **settings)
        provenance = adapter.provenance.model_copy(update={
            "clip": adapter.provenance.clip.model_copy(update={"fingerprint": clip.fingerprint}),
            "base": adapter.provenance.base.model_copy(update={"fingerprint": bases.fingerprint(pipe.unet)}),
        })  # fmt: skip
        return dataclasses.replace(adapter, provenance=provenance)

    return make


def test_a_bundle_has_the_latents_in_half_precision_and_comes_back_from_its_file(tuned, pipe, clip, tmp_path):
    made = bundle(pipe, tuned(), clip)
    again = Adapter.load(made.save(tmp_path / "bundle.safetensors"))
    assert torch.equal(again.latents, pipe.encode_clip(clip).half())
    assert again.preview == made.preview == Adapter.open(tmp_path / "bundle.safetensors").preview
    assert again.fingerprint == tuned().fingerprint
    assert (
        made.save(tmp_path / "again.safetensors").read_bytes()
        == (tmp_path / "bundle.safetensors").read_bytes()
    )


def test_inverting_and_editing_from_a_bundle_is_that_from_the_clip_to_the_rounding_of_the_latents(
    tuned, pipe, clip
):
    made = bundle(pipe, tuned(), clip)
    pipe.load_adapter(made)
    from_clip, from_bundle = (pipe.invert(each, num_inference_steps=5) for each in (clip, made.latents))
    exact = pipe.encode_clip(clip)
    rounding = (made.latents.float() - exact).norm() / exact.norm()
    assert 0 < rounding <= 2**-11  # half of fp16's last digit
    apart = (from_bundle.trajectory - from_clip.trajectory).flatten(1).norm(dim=1)
    apart /= from_clip.trajectory.flatten(1).norm(dim=1)
    # a random UNet carries the difference on, without making much more of it
    assert apart.max() < 2 * 2**-11
    edits = [pipe("a man", inversion=each, guidance_scale=2).latents for each in (from_clip, from_bundle)]
    assert (edits[1] - edits[0]).norm() / edits[0].norm() < 4 * 2**-11


def test_a_bundle_of_an_adapter_with_latents_needs_no_clip(tuned, pipe, clip):
    adapter = tuned()
    carrying = dataclasses.replace(adapter, tensors={**adapter.tensors, LATENTS: pipe.encode_clip(clip)})
    made = bundle(pipe, carrying, carrying.latents)
    assert torch.equal(made.latents, pipe.encode_clip(clip).half())
    assert Image.open(io.BytesIO(made.preview)).size == (clip.width, clip.height)


def test_another_clip_and_another_base_are_refused(tuned, pipe, clip, xl_pipe):
    other = dataclasses.replace(clip, pixels=clip.pixels[::-1].copy())
    with pytest.raises(AdapterError, match=r"square\.mp4 is not the clip that the adapter was tuned on"):
        bundle(pipe, tuned(), other)
    with pytest.raises(AdapterError, match="tuned for a base with cross_attention_dim 32"):
        bundle(xl_pipe, tuned(), clip)
    adapter = tuned()
    unknown = adapter.provenance.clip.model_copy(update={"fingerprint": ""})
    adapter = dataclasses.replace(adapter, provenance=adapter.provenance.model_copy(update={"clip": unknown}))
    with pytest.raises(AdapterError, match="merged or imported"):
        bundle(pipe, adapter, clip)


def test_a_bundle_is_told_by_its_header_and_verified_and_merged_as_any_adapter(tuned, pipe, clip, tmp_path):
    made = bundle(pipe, tuned(), clip)
    file = made.save(tmp_path / "bundle.safetensors")
    told = read_header(file).summary()
    assert (told["carries_latents"], told["preview_bytes"]) == (True, len(made.preview))
    assert told == Adapter.load(file).summary()
    assert {claim.verdict for claim in verify(file, pipe)} <= {"holds", "not checked", "noted"}
    both, _ = merge([file, tuned("hybrid", seed=4)])
    assert torch.equal(both.latents, made.latents)
    assert both.preview == made.preview
    strange = tuned(seed=5)
    elsewhere = strange.provenance.clip.model_copy(update={"fingerprint": "2" * 64})
    strange = dataclasses.replace(
        strange, provenance=strange.provenance.model_copy(update={"clip": elsewhere})
    )
    two_clips, _ = merge([file, strange])
    assert (two_clips.latents, two_clips.preview) == (None, None)


def test_a_changed_preview_is_found_and_a_foreign_one_refused(tuned, pipe, clip, tmp_path):
    made = bundle(pipe, tuned(), clip)
    file = made.save(tmp_path / "bundle.safetensors")
    before = file.read_bytes()
    text = spell_preview(made.preview).encode()
    other = text[:-8] + (b"AAAA" if text[-8:-4] != b"AAAA" else b"BBBB") + text[-4:]
    file.write_bytes(before.replace(text, other))
    assert [claim.name for claim in verify(file) if claim.verdict == "differs"] == ["header"]
    file.write_bytes(before.replace(b"data:image/webp;base64,", b"data:image/html;base64,"))
    with pytest.raises(AdapterError, match="its preview is no small WebP"):
        Adapter.load(file)
    assert read_header(file) is None
    for wrong in ("data:image/webp;base64,####", spell_preview(b"GIF89a and so on"), "x", "a" * 2_000_000):
        with pytest.raises(ValueError, match=r"no small WebP|base64|discontinuous|padding|alphabet"):
            parse_preview({PREVIEW: wrong})


def test_an_adapter_without_a_preview_has_none(tuned, tmp_path):
    file = tuned().save(tmp_path / "a.safetensors")
    assert Adapter.load(file).preview is None
    assert read_header(file).summary()["preview_bytes"] is None


@pytest.mark.parametrize(
    ("shape", "fps"), [((24, 200, 300), 8.0), ((3, 32, 48), 10.0), ((90, 64, 64), 29.97), ((1, 128, 64), 8.0)]
)
def test_a_preview_moves_lasts_as_long_as_the_clip_and_is_small_whatever_it_shows(shape, fps):
    pixels = np.random.default_rng(0).integers(
        0, 255, (*shape, 3), dtype=np.uint8
    )  # noise is what compresses worst
    picture = Image.open(io.BytesIO(data := preview(pixels, fps)))
    assert len(data) <= LIMIT
    assert picture.n_frames == min(shape[0], 24)
    assert max(picture.size) <= 320
    assert picture.size[0] <= shape[2]
    lasting = 0
    for index in range(picture.n_frames):
        picture.seek(index)
        picture.load()
        lasting += picture.info.get("duration", 0)
    if picture.n_frames > 1:
        assert lasting == pytest.approx(1000 * shape[0] / fps, abs=1)
    assert preview(pixels, fps) == data


def test_a_preview_of_an_ordinary_clip_is_large_enough_to_see():
    wave = 127 + 120 * np.sin(
        np.arange(512)[:, None] / 40 + np.arange(512)[None] / 60 + np.arange(24)[:, None, None] / 3
    )
    pixels = np.repeat(wave.astype(np.uint8)[..., None], 3, axis=-1)
    assert Image.open(io.BytesIO(preview(pixels, 8.0))).size == (320, 320)


def test_a_bundle_of_24_frames_of_512_with_lite_on_sd_15_stays_below_3_mb(make_adapter, tmp_path):
    with torch.device("meta"):  # diffusers' default UNet is Stable Diffusion 1's but for the text width
        unet = InflatedUNet(sample_size=64, cross_attention_dim=768)
    subset, names = Subset("lite"), [name for name, _ in unet.named_modules()]
    generator, rank, tensors = torch.Generator().manual_seed(0), 4, {}
    for name in subset.lora_modules(names):
        rows, columns = unet.get_submodule(name).weight.shape
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator).half()
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator).half()
    tensors[LATENTS] = torch.randn(1, 4, 24, 64, 64, generator=generator).half()
    config = json_config(subset.peft_config(names, rank=rank, alpha=None))
    adapter = Adapter(tensors, config, make_adapter().provenance, preview=of_size(LIMIT))
    file = adapter.save(tmp_path / "bundle.safetensors")
    size, latents = file.stat().st_size, tensors[LATENTS].numel() * 2
    print(
        f"\nlite {adapter.summary()['bytes']:,}, latents {latents:,}, preview at most {LIMIT:,}, file {size:,} bytes"
    )
    assert latents == 786_432
    assert size < 3_000_000
    assert Adapter.load(file).summary()["carries_latents"]


def of_size(count):
    """Give as many bytes in the form of a WebP."""
    return b"RIFF" + bytes(4) + b"WEBP" + bytes(count - 12)


def test_the_header_of_a_bundle_is_json_that_others_read(tuned, pipe, clip, tmp_path):
    """ModelSpec's `modelspec.thumbnail` is a data URL, which other tools show."""
    file = bundle(pipe, tuned(), clip).save(tmp_path / "bundle.safetensors")
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"]["modelspec.thumbnail"].startswith("data:image/webp;base64,")


def test_a_preview_shows_the_clip(clip):
    picture = Image.open(io.BytesIO(preview(clip.pixels, clip.fps)))
    picture.seek(2)
    shown = np.asarray(picture.convert("RGB")).astype(int)
    # levels of 255; the other frames are more than 12 away
    assert abs(shown - clip.pixels[2]).mean() < 5
