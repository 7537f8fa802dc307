"""Steering: what is added is what stock diffusers adds, frame by frame, in the right order, when and as much as asked."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    UNet2DConditionModel,
)

from tav_peft.control.steering import Control, Steering
from tav_peft.errors import AdapterError, TavError
from tav_peft.injection import Injection
from tav_peft.video.clip import Clip


def one_frame(clip):
    return Clip(clip.pixels[:1], clip.fps, clip.name, (0,))


def tensor_of(maps):
    return (maps.tensor()[0].transpose(0, 1) + 1) / 2


@pytest.mark.parametrize("guess_mode", [False, True])
def test_one_frame_with_a_controlnet_is_what_stock_diffusers_makes(pipe, base, noise, controls, guess_mode):
    control = controls["controlnet"]
    maps = one_frame(control.maps)
    stock = StableDiffusionControlNetPipeline.from_pretrained(
        base, controlnet=control.network, safety_checker=None
    )
    stock.set_progress_bar_config(disable=True)
    latents = noise(1, 4, 1, 8, 8)
    expected = stock(
        "a man is skiing", image=tensor_of(maps), latents=latents[:, :, 0].clone(), num_inference_steps=5,
        guidance_scale=4, controlnet_conditioning_scale=0.7, control_guidance_start=0.2, control_guidance_end=0.8,
        guess_mode=guess_mode, output_type="latent",
    ).images  # fmt: skip
    steered = Control(control.network, maps, scale=0.7, start=0.2, end=0.8, guess_mode=guess_mode)
    made = pipe(
        "a man is skiing", latents=latents, num_inference_steps=5, guidance_scale=4, controls=[steered]
    )
    torch.testing.assert_close(made.latents[:, :, 0], expected, rtol=1e-4, atol=1e-4)
    without = pipe("a man is skiing", latents=latents, num_inference_steps=5, guidance_scale=4)
    assert (made.latents - without.latents).abs().max() > 0.05


def test_one_frame_with_a_t2i_adapter_is_what_stock_diffusers_makes(pipe, base, noise, controls):
    control = controls["t2i_adapter"]
    maps = one_frame(control.maps)
    stock = StableDiffusionAdapterPipeline.from_pretrained(base, adapter=control.network, safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    latents = noise(1, 4, 1, 8, 8)
    expected = stock(
        "a man", image=tensor_of(maps), latents=latents[:, :, 0].clone(), num_inference_steps=4, guidance_scale=4,
        adapter_conditioning_scale=0.7, output_type="latent",
    ).images  # fmt: skip
    steered = Control(control.network, maps, scale=0.7)
    made = pipe("a man", latents=latents, num_inference_steps=4, guidance_scale=4, controls=[steered])
    torch.testing.assert_close(made.latents[:, :, 0], expected, rtol=1e-4, atol=1e-4)


def test_sdxl_is_steered_with_its_added_conditions(xl_pipe, xl_base, noise, clip, edges):
    torch.manual_seed(0)
    network = ControlNetModel.from_unet(
        UNet2DConditionModel.from_pretrained(xl_base / "unet"), conditioning_embedding_out_channels=(8, 8, 16)
    ).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    stock = StableDiffusionXLControlNetPipeline.from_pretrained(xl_base, controlnet=network)
    stock.set_progress_bar_config(disable=True)
    latents, maps = noise(1, 4, 1, 8, 8), one_frame(edges)
    expected = stock(
        "a man", image=tensor_of(maps), latents=latents[:, :, 0].clone(), num_inference_steps=3, guidance_scale=4,
        output_type="latent",
    ).images  # fmt: skip
    made = xl_pipe(
        "a man", latents=latents, num_inference_steps=3, guidance_scale=4, controls=[Control(network, maps)]
    )
    torch.testing.assert_close(made.latents[:, :, 0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["controlnet", "t2i_adapter"])
def test_a_row_of_residuals_belongs_to_its_video_and_frame(pipe, clip, controls, kind, noise):
    # two prompts of three frames: each residual is the one that its own latents, prompt and map give alone
    control = controls[kind]
    latents, told = noise(2, 4, 3, 8, 8), pipe.encode_prompts(["a man", "skiing"])
    together = Steering([control], pipe.unet, pipe.vae, latents, (32, 32)).residuals(latents, 300, told, 0, 1)
    for row in range(2):
        for frame in range(3):
            maps = Clip(control.maps.pixels[frame : frame + 1], 8.0)
            one = latents[row : row + 1, :, frame : frame + 1]
            alone = Steering([dataclasses.replace(control, maps=maps)], pipe.unet, pipe.vae, one, (32, 32))
            expected = alone.residuals(one, 300, told.rows(row), 0, 1)
            assert expected.keys() == together.keys()
            for name, given in expected.items():
                pairs = zip([given] if torch.is_tensor(given) else given,
                            [together[name]] if torch.is_tensor(given) else together[name], strict=True)  # fmt: skip
                for a, b in pairs:
                    torch.testing.assert_close(b[3 * row + frame], a[0], rtol=1e-4, atol=1e-5)


def test_a_map_that_changes_in_one_frame_changes_only_that_frames_residuals(pipe, clip, controls, noise):
    control, latents = controls["controlnet"], noise(2, 4, 3, 8, 8)
    told = pipe.encode_prompts(["a man", "skiing"])
    dark = control.maps.pixels.copy()
    dark[1] = 0
    both = [
        Steering([each], pipe.unet, pipe.vae, latents, (32, 32)).residuals(latents, 300, told, 0, 1)
        for each in (control, dataclasses.replace(control, maps=Clip(dark, 8.0)))
    ]
    moved = (both[0]["mid_block_additional_residual"] - both[1]["mid_block_additional_residual"]).abs()
    changed = [index for index, rows in enumerate(moved.flatten(1).amax(1)) if rows > 1e-3]
    assert changed == [1, 4]  # frame 1 of both videos, frames running fastest


def test_several_controls_add_up_each_by_its_scale(
    pipe, controls, make_controlnet, make_t2i_adapter, edges, noise
):
    latents, told = noise(1, 4, 3, 8, 8), pipe.encode_prompts(["a man"])
    four = [
        *controls.values(),
        Control(make_controlnet(7), edges, 0.3),
        Control(make_t2i_adapter(7), edges, -0.5),
    ]

    def residuals(*chosen):
        return Steering(chosen, pipe.unet, pipe.vae, latents, (32, 32)).residuals(latents, 300, told, 0, 1)

    together, alone = residuals(*four), [residuals(each) for each in four]
    assert set(together) == {
        "down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals"
    }  # fmt: skip
    for name, sums in together.items():
        parts = [each[name] for each in alone if name in each]
        assert len(parts) == 2
        for level, total in enumerate([sums] if torch.is_tensor(sums) else sums):
            one, other = (part if torch.is_tensor(part) else part[level] for part in parts)
            torch.testing.assert_close(total, one + other, rtol=1e-5, atol=1e-6)
    full = residuals(Control(four[2].network, edges, 1.0))["mid_block_additional_residual"]
    torch.testing.assert_close(0.3 * full, alone[2]["mid_block_additional_residual"], rtol=1e-4, atol=1e-6)


def test_scale_0_and_no_control_are_the_same_picture(pipe, clip, controls):
    inversion = pipe.invert(clip, num_inference_steps=3)
    off = [dataclasses.replace(control, scale=0.0) for control in controls.values()]
    plain, steered = (pipe("a man", inversion=inversion, controls=each).latents for each in ((), off))
    assert torch.equal(plain, steered)


def test_a_control_acts_in_its_share_of_the_whole_schedule_at_any_depth(pipe, clip, controls, monkeypatch):
    seen = []
    predict = pipe.predict
    monkeypatch.setattr(
        pipe, "predict", lambda x, t, c, **r: seen.append((int(t), bool(r))) or predict(x, t, c, **r)
    )
    early = dataclasses.replace(controls["controlnet"], end=0.5)
    inversion = pipe.invert(clip, num_inference_steps=8, controls=[early])
    inverted = dict(seen)
    assert [inverted[t] for t in sorted(inverted, reverse=True)] == [True] * 4 + [False] * 4
    for depth, acting in ((1.0, 4), (0.75, 2), (0.5, 0)):
        seen.clear()
        pipe("a man", inversion=inversion, depth=depth, controls=[early])
        assert [r for _, r in seen] == [True] * acting + [False] * (round(8 * depth) - acting)
        assert all(inverted[t] == r for t, r in seen)


def test_an_inversion_is_steered_only_when_asked_and_knows_it(pipe, clip, controls):
    control = controls["t2i_adapter"]
    plain, steered = (pipe.invert(clip, num_inference_steps=3, controls=c) for c in ((), (control,)))
    assert not torch.equal(plain.trajectory[-1], steered.trajectory[-1])
    with_clip = {"clip": clip.fingerprint}
    steered.check_made_with(pipe.inverted_with([control]) | with_clip)
    plain.check_made_with(pipe.inverted_with() | with_clip)
    for inversion, now in (
        (plain, [control]),
        (steered, []),
        (steered, [dataclasses.replace(control, scale=0.5)]),
    ):
        with pytest.raises(AdapterError, match="was made with other controls"):
            inversion.check_made_with(pipe.inverted_with(now) | with_clip)


def test_an_inversion_with_a_control_comes_back_with_it(pipe, clip, controls):
    # steered both ways the clip returns as near as without; steered one way only it does not
    control = dataclasses.replace(controls["controlnet"], scale=0.5)

    def error(inverting, sampling):
        inversion = pipe.invert(clip, num_inference_steps=80, depth=0.25, controls=inverting)
        back = pipe("", inversion=inversion, guidance_scale=1, depth=0.25, controls=sampling)
        return float((back.latents - inversion.clean).square().mean().sqrt())

    plain, both, one = error((), ()), error((control,), (control,)), error((), (control,))
    assert both < 2 * plain
    assert one > 3 * both


@pytest.mark.parametrize("kind", ["controlnet", "t2i_adapter"])
def test_what_is_injected_comes_from_the_source_unsteered(pipe, clip, controls, kind, monkeypatch):
    inversion, seen, predict = pipe.invert(clip, num_inference_steps=2), [], pipe.predict

    def listening(latents, timestep, told, **residuals):
        seen.append((len(latents), residuals))
        return predict(latents, timestep, told, **residuals)

    monkeypatch.setattr(pipe, "predict", listening)
    how = {"inversion": inversion, "controls": [controls[kind]]}
    injected = pipe("a man", injection=Injection(1, 1), **how).latents
    frames = inversion.clean.shape[2]
    for rows, residuals in seen:
        assert rows == 3
        for each in torch.utils._pytree.tree_leaves(residuals):
            of_rows = each.unflatten(0, (3, frames))
            assert not of_rows[0].any()
            assert of_rows[1:].any()
    assert not torch.equal(injected, pipe("a man", **how).latents)


def test_maps_of_another_size_or_length_are_refused(pipe, clip, controls):
    control = controls["controlnet"]
    for pixels, said in (
        (control.maps.pixels[:2], "2 frames of 32x32"),
        (np.zeros((3, 16, 32, 3), np.uint8), "of 32x16"),
    ):
        wrong = dataclasses.replace(control, maps=Clip(pixels, 8.0))
        with pytest.raises(TavError, match=f"{said}.*the clip 3 of 32x32"):
            pipe("a man", latents=pipe.noise(clip), num_inference_steps=2, controls=[wrong])


@pytest.mark.parametrize(
    "wrong", [{"start": 0.5, "end": 0.5}, {"end": 1.5}, {"start": -0.1}, {"scale": float("nan")}]
)
def test_impossible_numbers_are_refused(controls, wrong):
    with pytest.raises(TavError, match="A control"):
        dataclasses.replace(controls["controlnet"], **wrong)
