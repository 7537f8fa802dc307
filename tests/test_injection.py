"""Feature injection: the edit sees the source's queries, keys and features in the steps that ask for them."""

import contextlib
import functools

import numpy as np
import pytest
import torch

from tav_peft.errors import TavError
from tav_peft.injection import (
    Injection,
    Injector,
    attention_modules,
    feature_modules,
    first_row_for_all,
)  # fmt: skip
from tav_peft.video.clip import Clip
from tav_peft.windows import Windows


@pytest.fixture
def injector(pipe, inversion):
    nothing = pipe.encode_prompts([""], size=pipe.pixel_size(inversion.clean))
    return Injector(Injection(1, 1), pipe.unet, inversion, pipe.timesteps(4), nothing, pipe.predict)


@torch.no_grad()
def test_the_source_itself_is_predicted_as_ever_and_anything_else_is_pulled_to_it(pipe, inversion, injector):
    timestep, source = pipe.timesteps(4)[2], inversion.trajectory[3][None]
    plain = pipe.predict(source, timestep, injector.nothing)
    told = pipe.encode_prompts(["", ""])
    both = injector(torch.cat([source, source]), timestep, told)
    torch.testing.assert_close(both, plain.expand(2, -1, -1, -1, -1), rtol=0, atol=1e-5)
    other = torch.cat([source + 0.3, source - 0.3])
    assert (injector(other, timestep, told) - pipe.predict(other, timestep, told)).abs().max() > 1e-3


@torch.no_grad()
def test_queries_keys_and_features_are_the_source_s_in_every_row(pipe, inversion, injector):
    timestep, source = pipe.timesteps(4)[2], inversion.trajectory[3][None]
    modules = attention_modules(pipe.unet) + feature_modules(pipe.unet)
    assert [name for name, module in pipe.unet.named_modules() if module in modules] == [
        "up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q",
        "up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_k",
        "up_blocks.1.resnets.1.conv2",
    ]
    outputs = []
    with first_row_for_all(modules, 3), listening(modules, outputs):
        pipe.predict(
            torch.cat([source, source + 0.3, -source]), timestep, pipe.encode_prompts(["", "a man", "a dog"])
        )
    alone = []
    with listening(modules, alone):
        pipe.predict(source, timestep, injector.nothing)
    assert len(outputs) == len(alone) == 3
    for all_rows, one in zip(outputs, alone, strict=True):
        for row in all_rows.unflatten(0, (3, -1)):
            torch.testing.assert_close(row, one, rtol=0, atol=1e-5)


@contextlib.contextmanager
def listening(modules, into):
    """Keep the outputs of modules for a while."""
    handles = [module.register_forward_hook(lambda _, __, output: into.append(output)) for module in modules]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("injection", "rows"),
    [
        (Injection(0, 0), [2, 2, 2, 2]),
        (Injection(0.5, 0), [3, 3, 2, 2]),
        (Injection(0.25, 0.75), [3, 3, 3, 2]),
    ],
)
def test_the_shares_are_of_all_steps_from_the_noise_end(pipe, inversion, monkeypatch, injection, rows):
    seen, predict = [], pipe.predict
    monkeypatch.setattr(pipe, "predict", lambda x, *a, **k: seen.append(len(x)) or predict(x, *a, **k))
    made = pipe("a man", inversion=inversion, injection=injection).latents
    assert seen == rows
    plain = pipe("a man", inversion=inversion).latents
    assert torch.equal(made, plain) == (set(rows) == {2})


def test_of_half_a_depth_the_left_out_steps_count_too(pipe, inversion):
    plain = pipe("a man", inversion=inversion, depth=0.5).latents
    assert torch.equal(
        plain, pipe("a man", inversion=inversion, depth=0.5, injection=Injection(0.5, 0.5)).latents
    )
    assert not torch.equal(
        plain, pipe("a man", inversion=inversion, depth=0.5, injection=Injection(0.75, 0)).latents
    )


def test_several_prompts_at_once_are_each_as_alone(pipe, inversion):
    together = pipe(["a man", "a dog"], inversion=inversion, injection=Injection(), batch_size=2).latents
    for row, prompt in enumerate(["a man", "a dog"]):
        alone = pipe(prompt, inversion=inversion, injection=Injection()).latents
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-4)


@torch.no_grad()
def test_each_window_sees_the_source_s_own_frames(pipe, clip):
    longer = Clip(np.concatenate([clip.pixels, clip.pixels[::-1]]), 8.0)
    windows = {"window": 4, "overlap": 1}
    inversion = pipe.invert(longer, num_inference_steps=4, **windows)
    timestep, source = pipe.timesteps(4)[2], inversion.trajectory[3][None]
    nothing = pipe.encode_prompts([""])
    predict = functools.partial(Windows(4, 1).predict, pipe.predict)
    injected = Injector(Injection(1, 1), pipe.unet, inversion, pipe.timesteps(4), nothing, predict)
    plain = predict(source, timestep, nothing)
    torch.testing.assert_close(injected(source, timestep, nothing), plain, rtol=0, atol=1e-5)
    how = {"inversion": inversion, **windows}
    other, held = (pipe("a man", injection=each, **how).latents for each in (None, Injection(1, 1)))
    assert (held - other).abs().max() > 1e-3


def test_afterwards_the_unet_is_as_it_was(pipe, inversion):
    before = pipe("a man", inversion=inversion).latents
    pipe("a man", inversion=inversion, injection=Injection(1, 1))
    assert torch.equal(pipe("a man", inversion=inversion).latents, before)


def test_what_cannot_be_is_refused(pipe, inversion):
    with pytest.raises(TavError, match=r"features 1\.5: give a share"):
        Injection(0.5, 1.5)
    with pytest.raises(TavError, match="comes from the inversion"):
        pipe("a man", latents=inversion.clean, injection=Injection())
