"""The pipeline: bases it takes and refuses, inversion, and edits."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from tav_peft.errors import AdapterError, BaseModelError, TavError
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.recipe import ModelSection
from tav_peft.unet.inflation import InflatedUNet

# numpy 2 asks diffusers' Euler and DPM-Solver schedulers for a keyword that torch's tensors do not take
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


def test_the_unet_is_called_as_an_inflated_one(pipe, noise):
    assert isinstance(pipe.unet, InflatedUNet)
    assert pipe.unet(noise(1, 4, 2, 8, 8), 10, noise(1, 24, 32)).sample.shape == (1, 4, 2, 8, 8)


def test_several_prompts_share_one_inversion_and_each_is_as_it_would_be_alone(pipe, inversion):
    both = pipe(["a man", "a man is skiing"], inversion=inversion, guidance_scale=3)
    for row, prompt in enumerate(["a man", "a man is skiing"]):
        alone = pipe(prompt, inversion=inversion, guidance_scale=3)
        assert torch.equal(both.latents[row], alone.latents[0])
    assert not torch.equal(both.latents[0], both.latents[1])


def test_edits_keep_size_length_and_frame_rate(pipe, inversion, clip):
    (edit,) = pipe("a man", inversion=inversion).clips
    assert (edit.frames, edit.height, edit.width, edit.fps) == (3, 32, 32, clip.fps)


def test_less_depth_takes_fewer_steps_and_stays_nearer_to_the_clip(pipe, inversion):
    told = []
    near = pipe(
        "a man", inversion=inversion, depth=0.25, progress=lambda done, total: told.append((done, total))
    )
    far = pipe("a man", inversion=inversion, depth=1.0)
    assert told == [(1, 1)]
    distance = [(out.latents - inversion.clean).abs().mean() for out in (near, far)]
    assert distance[0] < distance[1]


def test_guidance_is_the_weighted_difference_of_both_predictions(pipe, inversion):
    pipe.scheduler.set_timesteps(4)
    start, t = inversion.trajectory[-1:], pipe.scheduler.timesteps[0]
    states = pipe.encode_prompts(["", "a man"])
    with torch.no_grad():
        without, with_text = (pipe.predict(start, t, states.rows(i)) for i in (0, 1))
    expected = pipe.scheduler.step(without + 5 * (with_text - without), t, start).prev_sample
    seen = []
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda *a, **k: seen.append(step(*a, **k)) or seen[-1]
    pipe("a man", inversion=inversion, guidance_scale=5)
    assert torch.allclose(seen[0].prev_sample, expected, atol=1e-4)


def test_guidance_1_is_the_prompt_alone(pipe, inversion):
    calls = []
    forward = pipe.unet.forward
    pipe.unet.forward = lambda x, *a, **k: calls.append(len(x)) or forward(x, *a, **k)
    pipe("a man", inversion=inversion, guidance_scale=1)
    assert calls == [1] * 4


def test_a_negative_prompt_changes_the_edit(pipe, inversion):
    plain, other = (pipe("a man", inversion=inversion, negative_prompt=n).latents for n in ("", "skiing"))
    assert not torch.equal(plain, other)


def test_edits_start_from_given_noise_too(pipe, noise):
    out = pipe("a man", latents=noise(1, 4, 2, 8, 8), num_inference_steps=2)
    assert out.clips[0].frames == 2


def test_noise_is_of_a_clips_size_and_the_same_for_the_same_seed(pipe, clip, make_adapter):
    noise = pipe.noise(clip, 7)
    assert noise.shape == pipe.encode_clip(clip).shape
    assert torch.equal(noise, pipe.noise(make_adapter().provenance.clip, 7))  # which has the clip's size
    assert not torch.equal(noise, pipe.noise(clip))
    two = pipe(["a man", "a man"], latents=noise, num_inference_steps=2, fps=12.5)
    assert torch.equal(*two.latents)
    assert [made.fps for made in two.clips] == [12.5, 12.5]


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, PNDMScheduler])
def test_other_schedulers_of_diffusers_sample_as_well(pipe, inversion, kind):
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    out = pipe("a man", inversion=inversion, guidance_scale=2)
    assert torch.isfinite(out.latents).all()


@pytest.mark.parametrize("depth", [1.0, 0.5, 0.125])
@pytest.mark.parametrize(
    ("kind", "ends_clean"),
    [
        (DDIMScheduler, False),
        (PNDMScheduler, False),
        (EulerDiscreteScheduler, True),
        (DPMSolverMultistepScheduler, True),
    ],
)
def test_every_scheduler_starts_at_the_noise_that_the_inversion_reached(
    pipe, clip, noise, monkeypatch, kind, ends_clean, depth
):
    # a model that sees the same noise e everywhere makes x_t = sqrt(a_t) x + sqrt(1 - a_t) e for any sampler
    e = noise(1, 4, 3, 8, 8)
    same = UNet2DConditionOutput(sample=e.expand(2, -1, -1, -1, -1))
    monkeypatch.setattr(
        pipe.unet, "forward", lambda x, *_, **__: UNet2DConditionOutput(sample=same.sample[: len(x)])
    )
    inversion = pipe.invert(clip, num_inference_steps=8, depth=depth)
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    if kind is PNDMScheduler and depth < 1:
        with pytest.raises(TavError, match=r"PNDMScheduler cannot start at a depth below 1.*Use DDIM, Euler"):
            pipe("a", inversion=inversion, depth=depth)
        return
    told = []
    back = pipe(
        ["a", "man"],
        inversion=inversion,
        depth=depth,
        guidance_scale=3,
        progress=lambda *step: told.append(step),
    ).latents
    assert [done for done, _ in told] == list(range(1, told[0][1] + 1))
    a = pipe.scheduler.alphas_cumprod[0]  # where DDIM's last step ends; others go on to no noise at all
    expected = (inversion.clean - (1 - a).sqrt() * e) / a.sqrt() if ends_clean else inversion.clean
    torch.testing.assert_close(back, expected.expand(2, -1, -1, -1, -1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("which", ["pipe", "v_pipe"])
def test_an_inversion_is_undone_by_sampling_without_guidance_the_better_the_finer_it_is(which, request, clip):
    pipe = request.getfixturevalue(which)
    errors = []
    for steps in (20, 80):
        inversion = pipe.invert(clip, num_inference_steps=steps, depth=0.2)
        back = pipe("", inversion=inversion, guidance_scale=1, depth=0.2).latents
        moved = (inversion.trajectory[-1] - inversion.clean).abs().mean()
        errors.append((back - inversion.clean).abs().mean() / moved)
    assert errors[1] < 0.25
    assert errors[1] < 0.4 * errors[0]  # of first order in the step, so about a quarter


@pytest.mark.parametrize("which", ["pipe", "v_pipe"])
def test_the_fixed_point_comes_back_nearer_than_ddim_and_tells_its_passes(which, request, clip):
    pipe = request.getfixturevalue(which)
    calls = []
    forward = pipe.unet.forward
    pipe.unet.forward = lambda *a, **k: calls.append(1) or forward(*a, **k)
    errors = []
    # fine steps: a random UNet answers small changes with large ones, and a coarse step has no fixed point there
    for method, iterations in (("ddim", 1), ("fixed_point", 1), ("fixed_point", 12)):
        calls.clear()
        inversion = pipe.invert(
            clip, num_inference_steps=300, depth=0.01, method=method, iterations=iterations, tolerance=1e-5
        )
        assert inversion.info["unet_passes"] == len(calls)
        back = pipe("", inversion=inversion, guidance_scale=1, depth=0.01).latents
        errors.append(float((back - inversion.clean).square().mean().sqrt()))
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 3e-5  # measured are 5e-6 and 4e-6


def test_a_model_of_velocity_inverts_as_the_model_of_noise_that_it_is_made_of(pipe, clip, monkeypatch):
    """v = sqrt(a) e - sqrt(1 - a) x0 of the same UNet: another output, the same denoiser."""
    # to the end, where it does not matter any more whether the noise or the velocity of a guess was taken
    exactly = {
        "num_inference_steps": 300,
        "depth": 0.01,
        "method": "fixed_point",
        "iterations": 30,
        "tolerance": 1e-6,
    }
    noise, exact = pipe.invert(clip, num_inference_steps=20), pipe.invert(clip, **exactly)
    alphas, forward = pipe.scheduler.alphas_cumprod, pipe.unet.forward

    def velocity(x, timestep, *args, **kwargs):
        a, e = alphas[int(timestep)], forward(x, timestep, *args, **kwargs).sample
        return UNet2DConditionOutput(
            sample=a.sqrt() * e - (1 - a).sqrt() * (x - (1 - a).sqrt() * e) / a.sqrt()
        )

    monkeypatch.setattr(pipe.unet, "forward", velocity)
    wrong = pipe.invert(clip, num_inference_steps=20)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    right = pipe.invert(clip, num_inference_steps=20)
    assert right.info["prediction_type"] == "v_prediction"
    torch.testing.assert_close(pipe.invert(clip, **exactly).trajectory, exact.trajectory, rtol=0, atol=1e-5)
    assert (wrong.trajectory[-1] - noise.trajectory[-1]).abs().max() > 0.5
    errors = [
        (pipe("", inversion=one, guidance_scale=1).latents - one.clean).abs().mean() for one in (right, wrong)
    ]
    assert errors[0] < 0.1 * errors[1]


def test_an_inversion_says_which_base_and_adapters_it_was_made_with(pipe, make_adapter, clip):
    plain = pipe.invert(clip, num_inference_steps=1).info
    assert (plain["base"], plain["adapters"], plain["clip"]) == ("tiny", [], clip.fingerprint)
    first, second = make_adapter(seed=1), make_adapter("hybrid", seed=2)
    pipe.load_adapter(first, adapter_name="one")
    pipe.load_adapter(second, adapter_name="two", strength={"t_attn": 0.5})
    told = {
        each["fingerprint"]: each["strength"]
        for each in pipe.invert(clip, num_inference_steps=1).info["adapters"]
    }
    assert told[first.fingerprint] == {"st_attn": 1.0, "cross_attn": 1.0, "t_attn": 1.0}
    assert told[second.fingerprint] == {"st_attn": 1.0, "cross_attn": 1.0, "t_attn": 0.5}
    pipe.set_adapters(["one", "two"], [0.0, 0.0])
    assert pipe.invert(clip, num_inference_steps=1).info == plain  # off, they do nothing
    pipe.unet.variant = ModelSection(attention="full")
    assert pipe.inverted_with()["model"] == {"attention": "full", "group_norm": "joint"}


def test_a_generator_is_given_only_to_schedulers_that_take_one(pipe, inversion):
    plain = pipe("a man", inversion=inversion).latents
    assert torch.equal(pipe("a man", inversion=inversion, generator=torch.Generator()).latents, plain)
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    pipe("a man", inversion=inversion, generator=torch.Generator())


def test_a_pipeline_put_together_by_hand_inverts_and_has_no_name(pipe, flat, clip):
    by_hand = TuneAVideoPipeline(pipe.vae, pipe.text_encoder, pipe.tokenizer, flat, pipe.scheduler)
    assert by_hand.base_name == "unnamed"
    trajectories = [p.invert(clip, num_inference_steps=2).trajectory for p in (by_hand, pipe)]
    assert torch.equal(*trajectories)


def test_latents_are_inverted_as_the_clip_they_came_from(pipe, clip):
    latents = pipe.encode_clip(clip)
    a, b = (pipe.invert(x, num_inference_steps=2).trajectory for x in (clip, latents))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda p, i: p("a " * 30, inversion=i), "has 32 tokens, this base reads 24"),
        (lambda p, i: p("a", inversion=i, num_inference_steps=7), "has 4 steps, 7 were asked for"),
        (lambda p, i: p("a", inversion=i, num_inference_steps=0), "0 steps"),
        (lambda p, i: p("a", inversion=i, depth=0.0), "more than 0 and at most 1"),
        (lambda p, i: p("a", inversion=i, depth=1.5), "more than 0 and at most 1"),
        (lambda p, _: p("a"), "either an inversion"),
        (lambda p, i: p.invert(i.clean[0]), r"Latents of shape \(4, 3, 8, 8\)"),
        (lambda p, i: p.invert(i.clean, num_inference_steps=0), "0 steps"),
        (lambda p, i: p.invert(i.clean, iterations=0), "0 iterations: give at least 1"),
        (
            lambda p, i: p.invert(i.clean, method="null"),
            "'null' is no way to invert: give one of ddim, fixed_point",
        ),
        (lambda p, i: p.invert(i.clean, num_inference_steps=1000), "1000 steps: give between 1 and 999"),
    ],
)
def test_impossible_calls_say_what_is_allowed(pipe, inversion, call, said):
    with pytest.raises(TavError, match=said):
        call(pipe, inversion)


def test_a_shallow_inversion_does_not_serve_a_deep_edit(pipe, clip):
    shallow = pipe.invert(clip, num_inference_steps=4, depth=0.5)
    with pytest.raises(TavError, match=r"goes to depth 0\.5, 1 was asked for"):
        pipe("a", inversion=shallow)


def test_a_clip_whose_size_the_base_cannot_take_is_refused(pipe, clip):
    odd = type(clip)(clip.pixels[:, :30], clip.fps)
    with pytest.raises(TavError, match="multiples of 4"):
        pipe.encode_clip(odd)


# -- adapters on the pipeline ------------------------------------------------------------------------------


def test_an_adapter_comes_from_a_file_a_folder_or_a_value(pipe, make_adapter, tmp_path, inversion):
    from tav_peft.formats import peft

    adapter = make_adapter("hybrid")
    places = [adapter, adapter.save(tmp_path / "a.safetensors"), peft.write(adapter, tmp_path / "folder")]
    results = []
    for place in places:
        pipe.load_adapter(place)
        results.append(pipe("a man", inversion=inversion).latents)
        pipe.unload_adapter()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_strengths_are_set_by_name_and_the_others_go_off(pipe, make_adapter, inversion):
    plain = pipe("a man", inversion=inversion).latents
    pipe.load_adapter(make_adapter(seed=1), adapter_name="one")
    one = pipe("a man", inversion=inversion).latents
    pipe.load_adapter(make_adapter(seed=2), adapter_name="two")
    pipe.set_adapters("one")
    assert torch.equal(pipe("a man", inversion=inversion).latents, one)
    pipe.set_adapters(["one", "two"], [0.0, 0.0])
    assert torch.equal(pipe("a man", inversion=inversion).latents, plain)
    assert pipe.adapters == ["one", "two"]
    with pytest.raises(TavError, match="2 adapters and 1 strengths"):
        pipe.set_adapters(["one", "two"], [1.0])
    with pytest.raises(AdapterError, match=r"No adapter named 'six' is loaded\. Loaded: one, two"):
        pipe.unload_adapter("six")


def test_stacking_on_another_base_is_allowed_and_said(pipe, make_adapter, caplog):
    pipe.load_adapter(make_adapter())  # its recorded fingerprint is made up
    assert "was tuned on another base (tiny)" in caplog.text


# -- bases -------------------------------------------------------------------------------------------------


def test_an_inpainting_unet_is_refused(pipe, flat):
    unet = UNet2DConditionModel.from_config({**flat.config, "in_channels": 9})
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    with pytest.raises(BaseModelError, match="The UNet takes 9 channels, the VAE makes 4"):
        TuneAVideoPipeline(unet=unet, **parts)


def test_a_depth_without_an_inversion_is_refused(pipe, noise):
    with pytest.raises(TavError, match="needs an inversion"):
        pipe("a man", latents=noise(1, 4, 2, 8, 8), num_inference_steps=2, depth=0.5)


@pytest.mark.parametrize(
    "kind", [None, DDPMScheduler, EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler]
)
@pytest.mark.parametrize("guidance", [1, 4])
def test_how_many_prompts_are_sampled_at_a_time_changes_no_result(pipe, noise, kind, guidance):
    # those that add noise draw it from a stream for each prompt
    if kind is not None:
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    prompts, x = ["a man", "skiing", "a man is skiing"], noise(1, 4, 3, 8, 8)

    def made(batch_size):
        generator = torch.Generator().manual_seed(5)
        return pipe(
            prompts, latents=x, num_inference_steps=3, guidance_scale=guidance, batch_size=batch_size,
            generator=generator, negative_prompt="a",
        ).latents  # fmt: skip

    one = made(1)
    assert (one[0] - one[1]).abs().max() > 0.1
    for batch_size in (2, 3, 7):
        torch.testing.assert_close(made(batch_size), one, rtol=1e-4, atol=1e-4)


def test_a_batch_shares_steering_and_mask(pipe, inversion):
    mask = torch.zeros(1, 8, 8)
    mask[:, :, :4] = 1
    one, two = (
        pipe(["a man", "skiing"], inversion=inversion, mask=mask, batch_size=n).latents for n in (1, 2)
    )
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert torch.equal(two[..., 4:], inversion.clean[..., 4:].expand(2, -1, -1, -1, -1))


def test_a_batch_of_nothing_is_refused(pipe, inversion):
    with pytest.raises(TavError, match="batch_size 0: give at least 1"):
        pipe("a man", inversion=inversion, batch_size=0)
