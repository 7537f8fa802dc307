"""DDIM inversion against diffusers' own sampler, whose steps it undoes."""

import pytest
import torch
from diffusers import DDIMScheduler

from tav_peft.errors import AdapterError
from tav_peft.inversion import Inversion, ddim_coefficients, inverse_step, invert, timestep_pairs
from tav_peft.tensor_file import write_tensors

KINDS = ("epsilon", "v_prediction", "sample")


def scheduler(prediction_type="epsilon"):
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip


def test_the_timesteps_are_the_originals():
    pairs = timestep_pairs(scheduler(), 10)
    assert [t for t, _, _ in pairs] == [1, 101, 201, 301, 401, 501, 601, 701, 801, 901]
    alphas = scheduler().alphas_cumprod
    assert pairs[0][1] == pytest.approx(
        float(alphas[0])
    )  # the first step starts at the end of the sampler's last
    assert pairs[3][1:] == pytest.approx((float(alphas[201]), float(alphas[301])))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [21, 501, 981])
def test_a_step_back_undoes_diffusers_step(kind, t, noise):
    sampler = scheduler(kind)
    sampler.set_timesteps(50)
    x, output = noise(1, 4, 2, 8, 8), noise(1, 4, 2, 8, 8, seed=1)
    cleaner = sampler.step(output, t, x).prev_sample
    alphas = sampler.alphas_cumprod
    back = inverse_step(cleaner, output, float(alphas[t - 20]), float(alphas[t]), kind)
    assert torch.allclose(back, x, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_to_the_same_noise_level_changes_nothing(kind):
    a, b = ddim_coefficients(0.3, 0.3, kind)
    assert a == pytest.approx(1)
    assert b == pytest.approx(0, abs=1e-12)


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(AdapterError, match="flow"):
        ddim_coefficients(0.5, 0.4, "flow")


@pytest.mark.parametrize("kind", KINDS[:2])
def test_inversion_then_sampling_gives_the_clip_back_when_the_model_does_not_depend_on_the_latents(
    kind, noise
):
    clean, sampler = noise(1, 4, 2, 8, 8), scheduler(kind)

    def predict(x, t):
        return noise(*x.shape, seed=t)

    trajectory = invert(predict, clean, sampler, 20)
    assert len(trajectory) == 21
    x = trajectory[-1][None]
    sampler.set_timesteps(20)
    for t in sampler.timesteps:
        x = sampler.step(predict(x, int(t)), t, x).prev_sample
    assert torch.allclose(x, clean, atol=1e-3)


def test_only_the_asked_steps_are_gone_through_and_told(noise):
    told, clean = [], noise(1, 4, 1, 4, 4)
    trajectory = invert(
        lambda x, _: x,
        clean,
        scheduler(),
        10,
        steps=4,
        progress=lambda done, total: told.append((done, total)),
    )
    assert len(trajectory) == 5
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_depth_picks_the_row_and_the_steps_that_are_left(noise):
    inversion = Inversion(noise(11, 4, 2, 4, 4), 10)
    latents, left = inversion.at(0.5)
    assert torch.equal(latents, inversion.trajectory[5:6])
    assert left == 5
    assert inversion.at(1.0)[1] == 10
    assert inversion.at(0.001)[1] == 1


def test_a_saved_inversion_comes_back(tmp_path, noise):
    inversion = Inversion(noise(4, 4, 2, 4, 4), 3, {"fps": 8.0})
    back = Inversion.load(inversion.save(tmp_path / "i.safetensors"))
    assert torch.equal(back.trajectory, inversion.trajectory)
    assert (back.num_inference_steps, back.info) == (3, {"fps": 8.0})


def test_an_adapter_is_no_inversion(tmp_path, make_adapter):
    with pytest.raises(AdapterError, match="no inversion"):
        Inversion.load(make_adapter().save(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("header", ["{", "[]", "{}", '{"steps": "many"}'])
def test_a_damaged_header_is_refused(header, tmp_path, noise):
    path = write_tensors(
        tmp_path / "i.safetensors", {"trajectory": noise(2, 4, 1, 2, 2)}, {"tav_peft_inversion": header}
    )
    with pytest.raises(AdapterError, match="its header is not that of an inversion"):
        Inversion.load(path)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("epsilon", {"set_alpha_to_one": True}),
        ("epsilon", {"timestep_spacing": "trailing", "steps_offset": 0}),
        ("epsilon", {"timestep_spacing": "linspace"}),
        ("v_prediction", {"timestep_spacing": "trailing", "steps_offset": 0, "rescale_betas_zero_snr": True}),
    ],
    ids=lambda given: given if isinstance(given, str) else " ".join(given),
)
def test_every_spacing_of_timesteps_is_undone(kind, settings, noise):
    sampler = DDIMScheduler.from_config(scheduler(kind).config, **settings)
    clean, output = noise(1, 4, 2, 8, 8).double(), noise(1, 4, 2, 8, 8, seed=1).double()
    x = invert(lambda *_: output, clean, sampler, 10)[-1:]
    sampler.set_timesteps(10)
    for t in sampler.timesteps:
        x = sampler.step(output, t, x).prev_sample
    torch.testing.assert_close(x, clean, rtol=0, atol=1e-5)  # diffusers keeps its alphas in float32
