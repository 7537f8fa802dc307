"""DDIM inversion against diffusers' own sampler, whose steps it undoes."""

import pytest
import torch
from diffusers import DDIMScheduler

from tav_peft.errors import AdapterError
from tav_peft.inversion import Inversion, inverse_step, invert, predicted_noise, timestep_pairs
from tav_peft.tensor_file import write_tensors

KINDS = ("epsilon", "v_prediction", "sample")


def scheduler(prediction_type="epsilon", **settings):
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        prediction_type=prediction_type, **({"set_alpha_to_one": False, "steps_offset": 1} | settings),
    )  # fmt: skip


def meaning(noise, latents, alpha, kind):
    """What a model of that kind puts out at the latents to mean this noise."""
    clean = (latents - (1 - alpha) ** 0.5 * noise) / alpha**0.5
    if kind == "v_prediction":
        return alpha**0.5 * noise - (1 - alpha) ** 0.5 * clean
    return clean if kind == "sample" else noise


def sampled(predict, sampler, latents, steps):
    """Diffusers' own sampling, from the noise end."""
    sampler.set_timesteps(steps)
    for t in sampler.timesteps:
        latents = sampler.step(predict(latents, int(t)), t, latents).prev_sample
    return latents


class Gaussian:
    """The ideal model of latents drawn from N(mean, spread²), in double precision.

    The noise in x = √a·z + √(1-a)·e is expected to be √(1-a)·(x - √a·mean) / (a·spread² + 1 - a).
    """

    def __init__(self, sampler, spread=0.5, mean=0.3):
        self.alphas, self.kind = sampler.alphas_cumprod.double(), sampler.config.prediction_type
        self.spread, self.mean, self.passes = spread, mean, 0

    def __call__(self, x, timestep):
        self.passes += 1
        a = float(self.alphas[timestep])
        noise = (1 - a) ** 0.5 * (x - a**0.5 * self.mean) / (a * self.spread**2 + 1 - a)
        return meaning(noise, x, a, self.kind)


def returned(kind, latents, steps, *, taken_as=None, **options):
    """Invert latents under the ideal model, sample back, and give the error (RMS) and the passes of the inversion."""
    sampler = scheduler(kind)
    model = Gaussian(sampler)
    end = invert(model, latents, scheduler(taken_as or kind), steps, **options)[-1:]
    passes = model.passes
    return float((sampled(model, sampler, end, steps) - latents).square().mean().sqrt()), passes


def test_the_timesteps_are_the_originals():
    pairs = timestep_pairs(scheduler(), 10)
    assert [t for t, _, _ in pairs] == [1, 101, 201, 301, 401, 501, 601, 701, 801, 901]
    alphas = scheduler().alphas_cumprod
    # the first step starts at the end of the sampler's last
    assert pairs[0][1] == pytest.approx(float(alphas[0]))
    assert pairs[3][1:] == pytest.approx((float(alphas[201]), float(alphas[301])))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [21, 501, 981])
def test_a_step_back_undoes_diffusers_step(kind, t, noise):
    sampler = scheduler(kind)
    sampler.set_timesteps(50)
    x, output = noise(1, 4, 2, 8, 8), noise(1, 4, 2, 8, 8, seed=1)
    cleaner = sampler.step(output, t, x).prev_sample
    alpha, alpha_next = float(sampler.alphas_cumprod[t - 20]), float(sampler.alphas_cumprod[t])
    back = inverse_step(cleaner, predicted_noise(output, x, alpha_next, kind), alpha, alpha_next)
    assert torch.allclose(back, x, atol=2e-5)


def test_a_step_to_the_same_noise_level_changes_nothing(noise):
    x = noise(1, 4, 1, 4, 4)
    assert torch.equal(inverse_step(x, noise(1, 4, 1, 4, 4, seed=1), 0.3, 0.3), x)


def test_an_unknown_prediction_type_is_refused(noise):
    with pytest.raises(AdapterError, match="flow"):
        predicted_noise(noise(1, 4, 1, 4, 4), noise(1, 4, 1, 4, 4), 0.5, "flow")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["ddim", "fixed_point"])
def test_inversion_is_undone_exactly_when_the_prediction_does_not_depend_on_the_latents(kind, method, noise):
    clean, sampler = noise(1, 4, 2, 8, 8).double(), scheduler(kind)

    def predict(x, t):
        output = noise(*x.shape, seed=t).double()  # noise, or a velocity
        return meaning(output, x, float(sampler.alphas_cumprod[t]), kind) if kind == "sample" else output

    trajectory = invert(predict, clean, sampler, 20, method=method)
    assert len(trajectory) == 21
    back = sampled(predict, sampler, trajectory[-1:], 20)
    torch.testing.assert_close(back, clean, rtol=0, atol=1e-5)  # diffusers keeps its alphas in float32


# -- an ideal model, whose noise depends on the latents --------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_of_ddim_is_of_first_order_in_the_step(kind, noise):
    clean = noise(1, 4, 2, 8, 8).double()
    coarse, fine = (returned(kind, clean, steps)[0] for steps in (50, 200))
    assert 3 < coarse / fine < 6
    assert fine < 0.02


def test_the_ideal_v_model_comes_back_and_is_not_taken_for_noise_as_the_original_does(noise):
    clean = noise(1, 4, 2, 8, 8).double()
    for steps in (25, 100):  # more of them mend nothing
        ours, _ = returned("v_prediction", clean, steps)
        theirs, _ = returned("v_prediction", clean, steps, taken_as="epsilon")
        assert ours < 5 / steps
        assert theirs > 0.5


@pytest.mark.parametrize(
    ("kinds", "options"),
    [
        (("epsilon", "sample"), {"method": "ddim"}),
        (KINDS, {"method": "fixed_point", "iterations": 200, "tolerance": 1e-12}),
    ],
)
def test_models_that_mean_the_same_noise_have_the_same_inversion_whatever_they_predict(kinds, options, noise):
    clean = noise(1, 4, 2, 8, 8).double()
    first, *others = (invert(Gaussian(scheduler(k)), clean, scheduler(k), 25, **options)[-1] for k in kinds)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("steps", "times"), [(10, 1.9), (200, 2.5)])
def test_ddim_by_velocities_comes_back_nearer_than_by_the_noise_they_mean(steps, times, noise):
    clean = noise(1, 4, 2, 8, 8).double()
    by_velocity, by_noise = (returned(kind, clean, steps)[0] for kind in ("v_prediction", "epsilon"))
    assert by_noise / by_velocity == pytest.approx(times, abs=0.1)


def test_ddim_by_velocities_is_exact_for_latents_of_unit_spread(noise):
    clean, sampler = noise(1, 4, 2, 8, 8).double(), scheduler("v_prediction")
    model = Gaussian(sampler, spread=1.0, mean=0.0)
    back = sampled(model, sampler, invert(model, clean, sampler, 10)[-1:], 10)
    torch.testing.assert_close(back, clean, rtol=0, atol=1e-5)  # diffusers keeps its alphas in float32


@pytest.mark.parametrize("kind", KINDS)
def test_the_fixed_point_is_the_exact_inverse(kind, noise):
    clean = noise(1, 4, 2, 8, 8).double()
    error, _ = returned(kind, clean, 10, method="fixed_point", iterations=200, tolerance=1e-12)
    assert error < 1e-5  # diffusers keeps its alphas in float32


def test_beginning_where_the_former_noise_leads_beats_ddim_at_the_same_cost(noise):
    clean = noise(1, 4, 2, 8, 8).double()
    plain, warm = (
        returned("epsilon", clean, 25),
        returned("epsilon", clean, 25, method="fixed_point", iterations=1),
    )
    assert plain[1] == warm[1] == 25
    assert warm[0] < 0.5 * plain[0]


def test_a_step_ends_when_a_pass_moves_it_by_no_more_than_the_tolerance(noise):
    clean = noise(1, 4, 2, 8, 8).double()
    passes = [
        returned("epsilon", clean, 10, method="fixed_point", iterations=6, tolerance=tolerance)[1]
        for tolerance in (0.0, 1e-3, 10.0)
    ]
    assert passes[0] == 60
    assert 10 < passes[1] < 60
    assert passes[2] == 10


def test_half_precision_loses_what_its_rows_lose_and_no_more(noise):
    """Running in bfloat16 itself, 100 small steps would each be rounded away by up to its 2^-9."""
    clean = noise(1, 4, 2, 8, 8).bfloat16()
    model = Gaussian(scheduler())
    exact = invert(model, clean.double(), scheduler(), 100)[-1]
    half = invert(lambda x, t: model(x.double(), t), clean, scheduler(), 100)[-1]
    assert half.dtype == torch.bfloat16
    assert (half.double() - exact).abs().max() < 2 * 2**-9 * exact.abs().max()


# -- how far, and how it is kept -------------------------------------------------------------------------------


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
    assert inversion.depth == 1
    assert Inversion(noise(4, 4, 2, 4, 4), 10).depth == 0.3


def test_a_saved_inversion_comes_back(tmp_path, noise):
    inversion = Inversion(noise(4, 4, 2, 4, 4), 3, {"fps": 8.0})
    back = Inversion.load(inversion.save(tmp_path / "i.safetensors"))
    assert torch.equal(back.trajectory, inversion.trajectory)
    assert (back.num_inference_steps, back.info) == (3, {"fps": 8.0})


MADE = {
    "controls": [],
    "base": "tiny",
    "name": "a.mp4",
    "base_fingerprint": "b",
    "prediction_type": "epsilon",
    "model": {"attention": "full"},
    "clip": "c",
} | {"adapters": [{"fingerprint": "a", "strength": {"t_attn": 1.0}}]}


def test_an_inversion_serves_what_it_was_made_with_even_after_it_was_saved(tmp_path, noise):
    inversion = Inversion(noise(4, 4, 2, 4, 4), 3).noted(**MADE).noted(method="ddim")
    Inversion.load(inversion.save(tmp_path / "i.safetensors")).check_made_with(MADE)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base_fingerprint": "x"}, "another base. Make it again"),
        ({"prediction_type": "v_prediction"}, "another prediction type. Make"),
        ({"model": {}}, "another attention or GroupNorm. Make"),
        ({"adapters": []}, "another adapter, or at another strength. Make"),
        ({"adapters": [{"fingerprint": "a", "strength": {"t_attn": 0.5}}]}, "at another strength. Make"),
        ({"clip": "x", "base_fingerprint": "x"}, "with another base, another clip. Make"),
    ],
)
def test_an_inversion_does_not_serve_anything_else(changes, said, noise):
    inversion = Inversion(noise(4, 4, 2, 4, 4), 3, MADE)
    with pytest.raises(AdapterError, match=said):
        inversion.check_made_with(MADE | changes)


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
    sampler = scheduler(kind, **settings)
    clean, constant = noise(1, 4, 2, 8, 8).double(), noise(1, 4, 2, 8, 8, seed=1).double()

    def predict(x, t):
        return constant

    back = sampled(predict, sampler, invert(predict, clean, sampler, 10)[-1:], 10)
    torch.testing.assert_close(back, clean, rtol=0, atol=1e-5)  # diffusers keeps its alphas in float32
