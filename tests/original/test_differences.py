"""Where we differ from the original on purpose: each line of docs/fidelity.md that no other test holds."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler

from tav_peft import objective, tuning
from tav_peft.recipe import Recipe
from tav_peft.unet.inflation import is_temporal

from .recordings import CARRIED, recording
from .tolerances import table
from .training import drawn

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
SD1 = recording(CARRIED / "sd1-tiny")


def test_the_original_begins_with_a_random_output_bias_and_we_with_none():
    outputs = [name for name in SD1.facts["trainable"]["names"] if ".attn_temp.to_out.0." in name]
    ours = SD1.pipe().unet.state_dict()
    for name in outputs:
        theirs = drawn(SD1, "train_official", f"init.{name}")
        assert bool(theirs.any()) == name.endswith("bias"), name
        assert not ours[name].any(), name
    assert len(outputs) == 20


def test_we_sample_with_ddim_where_the_checkpoint_names_pndm(tmp_path):
    assert isinstance(PNDMScheduler.from_pretrained(SD1.scheduler), PNDMScheduler)
    assert '"PNDMScheduler"' in (SD1.scheduler / "scheduler_config.json").read_text()
    assert type(SD1.pipe().scheduler) is DDIMScheduler


def test_latents_are_scaled_by_the_number_in_the_vaes_config(pipe, clip):
    mean, _ = pipe.encode_moments(clip)
    pipe.vae.register_to_config(scaling_factor=0.5)
    assert torch.equal(pipe.encode_clip(clip), mean * 0.5)


def test_inversion_goes_through_the_samplers_timesteps_whatever_the_offset(pipe, clip):
    seen: dict[str, list[int]] = {"inverted": [], "sampled": []}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, steps_offset=0)
    pipe = type(pipe)(pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, pipe.scheduler)
    phase = "inverted"
    pipe.unet.register_forward_pre_hook(lambda _module, args: seen[phase].append(int(args[1])))
    inversion = pipe.invert(clip, num_inference_steps=4)
    phase = "sampled"
    pipe("a man", inversion=inversion)
    assert seen["inverted"] == [1, 251, 501, 751] == seen["sampled"][::-1]


def test_clip_and_text_are_encoded_once_but_latents_are_drawn_at_each_step(pipe, clip):
    calls = {"vae": 0, "text": 0}
    latents: list[torch.Tensor] = []
    pipe.vae.encoder.register_forward_hook(
        lambda _, given, __: calls.update(vae=calls["vae"] + len(given[0]))
    )
    pipe.text_encoder.register_forward_hook(lambda *_: calls.update(text=calls["text"] + 1))
    schedule = objective.DDPMScheduler

    class Watched(schedule):
        def add_noise(self, original: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            latents.append(original)
            return super().add_noise(original, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "DDPMScheduler", Watched)
        tuning.tune(pipe, clip, "a man", Recipe().override(["training.steps=3"]))
    assert calls == {"vae": clip.frames, "text": 1}
    assert len(latents) == 3
    assert not torch.equal(latents[0], latents[1])


def test_the_clip_is_inverted_from_the_mean_of_its_posterior(pipe, clip):
    mean, _ = pipe.encode_moments(clip)
    clean = pipe.invert(clip, num_inference_steps=2).clean
    assert torch.equal(clean, mean * pipe.vae.config.scaling_factor)


def test_an_adapter_holds_what_was_tuned_and_nothing_else(pipe, clip):
    adapter = tuning.tune(pipe, clip, "a man", Recipe().override(["training.steps=1"]))
    temporal = {name for name in adapter.tensors if is_temporal(name)}
    queries = set(adapter.tensors) - temporal
    assert temporal
    assert queries
    assert all(name.endswith(("attn1.to_q.diff", "attn2.to_q.diff")) for name in queries)


def test_the_document_states_the_tolerances_that_are_used():
    assert "\n".join(table()) in DOCS


def test_every_test_that_the_document_names_is_there():
    named = set(re.findall(r"`(test_\w+)`", DOCS))
    there = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(named) > 15
    assert named <= there
