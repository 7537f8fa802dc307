"""Tuning: the objective and the update are the paper's; nothing is lost when it stops."""

import itertools

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from tav_peft import tuning
from tav_peft.adapter import Adapter
from tav_peft.errors import TuningError
from tav_peft.recipe import ModelSection, Recipe
from tav_peft.tuning import tune

FEW = Recipe().override(["training.steps=5", "training.lr=1e-3", "training.save_every=2", "adapter.rank=2"])


def tuned(pipe, clip, *settings, **options):
    return tune(pipe, clip, "a man is skiing", FEW.override(settings), **options)


def losses_of(pipe, clip, *settings, **options):
    losses = []
    tuned(pipe, clip, *settings, progress=lambda step: losses.append(step.loss), **options)
    return losses


def stop_at(step):
    def progress(done):
        if done.step == step:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("which", ["pipe", "v_pipe", "sample"])
def test_the_first_loss_is_the_objective_computed_by_hand(which, request, clip):
    pipe = request.getfixturevalue("pipe" if which == "sample" else which)
    if which == "sample":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="sample")
    generator = torch.Generator().manual_seed(33)
    with torch.no_grad():
        frames = clip.tensor()[0].transpose(0, 1)
        posterior = pipe.vae.encode(frames).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        latents = latents.transpose(0, 1)[None] * 0.18215
        noise = torch.randn(latents.shape, generator=generator)
        t = torch.randint(0, 1000, (1,), generator=generator)
        schedule = DDPMScheduler.from_config(pipe.scheduler.config)
        alpha = schedule.alphas_cumprod[t].reshape(1, 1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        predicted = pipe.unet(noisy, t, pipe.encode_prompts(["a man is skiing"]).text).sample
        v = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        target = {"pipe": noise, "v_pipe": v, "sample": latents}[which]
        expected = (predicted - target).square().mean().item()
    assert losses_of(pipe, clip, "training.steps=1")[0] == pytest.approx(expected, rel=1e-4)


def test_the_first_update_is_adamw_on_the_absolute_weights(pipe, clip):
    # AdamW's first step moves each weight by lr·sign(gradient), after the decay of W, not of the update
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = pipe.unet.get_submodule(name).weight.detach().clone()
    decay = ["adapter.preset=paper", "adapter.dtype=fp32", "training.steps=1", "training.weight_decay=0.5"]
    update = tuned(pipe, clip, *decay).tensors[f"{name}.diff"]
    moved = (update + 1e-3 * 0.5 * weight).abs()  # less where a gradient is as small as AdamW's epsilon
    assert moved.max() < 1.001e-3
    assert moved.median() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("preset", ["paper", "hybrid", "lite"])
def test_every_tensor_of_the_adapter_has_learned_in_every_block(pipe, clip, preset):
    before = tuned(pipe, clip, f"adapter.preset={preset}", "training.steps=1", "training.lr=1e-12").weights
    after = tuned(pipe, clip, f"adapter.preset={preset}").weights
    assert list(before) == list(after)
    still = [name for name in after if torch.equal(before[name], after[name])]
    assert still == []
    assert any(name.startswith("down_blocks") for name in after)


def test_the_same_settings_give_the_same_bytes(pipe, clip, tmp_path):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        tuned(pipe, clip, output=file)
    assert files[0].read_bytes() == files[1].read_bytes()
    tuned(pipe, clip, "training.seed=34", output=files[1], overwrite=True)
    assert files[0].read_bytes() != files[1].read_bytes()


@pytest.mark.parametrize(("preset", "stop"), [("paper", 1), ("hybrid", 2), ("lite", 4)])
def test_a_stopped_tuning_resumes_to_the_same_bytes(pipe, clip, tmp_path, preset, stop):
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    tuned(pipe, clip, f"adapter.preset={preset}", output=whole)
    with pytest.raises(KeyboardInterrupt):
        tuned(pipe, clip, f"adapter.preset={preset}", output=parts, progress=stop_at(stop))
    assert not parts.exists()
    resumed = losses_of(pipe, clip, f"adapter.preset={preset}", output=parts)
    assert len(resumed) == 5 - stop
    assert parts.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "parts.trail" / "resume.safetensors").exists()


@pytest.mark.parametrize("call", [1, 4])
def test_a_tuning_stopped_in_the_middle_of_a_step_resumes_to_the_same_bytes(
    pipe, clip, tmp_path, monkeypatch, call
):
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    tuned(pipe, clip, output=whole)
    forward, calls = pipe.unet.forward, []

    def stop(*arguments, **options):
        calls.append(1)
        if len(calls) == call:  # noise and timestep of this step are drawn already
            raise KeyboardInterrupt
        return forward(*arguments, **options)

    monkeypatch.setattr(pipe.unet, "forward", stop)
    with pytest.raises(KeyboardInterrupt):
        tuned(pipe, clip, output=parts)
    monkeypatch.undo()
    assert len(losses_of(pipe, clip, output=parts)) == 6 - call
    assert parts.read_bytes() == whole.read_bytes()


def test_a_half_done_update_is_not_kept(pipe, clip, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    tuned(pipe, clip, output=whole)

    class Interrupted(torch.optim.AdamW):
        def step(self, *arguments):
            super().step(*arguments)
            if self.state[self.param_groups[0]["params"][0]]["step"] == 4:
                raise KeyboardInterrupt  # the weights have moved, the step is not counted yet

    monkeypatch.setattr(torch.optim, "AdamW", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuned(pipe, clip, output=parts)
    monkeypatch.undo()
    assert len(losses_of(pipe, clip, output=parts)) == 3  # from the two that were saved
    assert parts.read_bytes() == whole.read_bytes()


def test_a_killed_tuning_goes_on_from_the_last_save(pipe, clip, tmp_path):
    class Killed(BaseException):
        pass

    def kill(done):
        if done.step == 3:
            raise Killed

    file = tmp_path / "a.safetensors"
    with pytest.raises(Killed):
        tuned(pipe, clip, output=file, progress=kill)
    assert len(losses_of(pipe, clip, output=file)) == 3  # steps 3, 4 and 5: 2 were saved


def test_an_unfinished_tuning_of_other_settings_is_not_taken_over(pipe, clip, tmp_path):
    file = tmp_path / "a.safetensors"
    with pytest.raises(KeyboardInterrupt):
        tuned(pipe, clip, output=file, progress=stop_at(2))
    with pytest.raises(TuningError, match=r"unfinished tuning with other settings.*--restart"):
        tuned(pipe, clip, "training.lr=2e-3", output=file)
    assert len(losses_of(pipe, clip, "training.lr=2e-3", output=file, restart=True)) == 5


def test_a_result_is_replaced_only_when_asked(pipe, clip, tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_text("mine")
    with pytest.raises(TuningError, match="exists already"):
        tuned(pipe, clip, output=file)
    assert file.read_text() == "mine"
    tuned(pipe, clip, output=file, overwrite=True)
    assert Adapter.load(file).provenance.step == 5


def test_the_trail_holds_earlier_adapters_and_the_plot(pipe, clip, tmp_path):
    tuned(pipe, clip, output=tmp_path / "a.safetensors")
    steps = sorted(file.name for file in (tmp_path / "a.trail").iterdir())
    assert steps == ["step-00002.safetensors", "step-00004.safetensors"]
    assert Adapter.load(tmp_path / "a.trail" / steps[0]).provenance.step == 2
    assert (tmp_path / "a.loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("preset", ["paper", "hybrid", "lite"])
def test_the_pipeline_is_left_as_it_was(pipe, clip, preset):
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    flags = {name: p.requires_grad for name, p in pipe.unet.named_parameters()}
    tuned(pipe, clip, f"adapter.preset={preset}", "training.gradient_checkpointing=true")
    after = pipe.unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name: p.requires_grad for name, p in pipe.unet.named_parameters()} == flags
    assert not pipe.unet.training
    assert not pipe.unet.is_gradient_checkpointing


def test_gradient_checkpointing_changes_no_loss(pipe, clip):
    plain, checkpointed = (
        losses_of(pipe, clip, "adapter.preset=paper", f"training.gradient_checkpointing={on}")
        for on in ("false", "true")
    )
    assert checkpointed == pytest.approx(plain, rel=1e-5)


def test_bf16_tunes_near_fp32(pipe, clip):
    exact, rough = losses_of(pipe, clip), losses_of(pipe, clip, "training.precision=bf16")
    assert exact != rough
    assert rough == pytest.approx(exact, rel=0.05)


def test_fp16_on_a_cpu_is_refused(pipe, clip):
    with pytest.raises(TuningError, match="fp16 needs a GPU"):
        tuned(pipe, clip, "training.precision=fp16")


def test_a_diverged_tuning_stops_with_its_step_and_keeps_the_trail(pipe, clip, tmp_path):
    def break_it(done):
        if done.step == 3:
            next(p for p in pipe.unet.parameters() if p.requires_grad).data.fill_(float("nan"))

    with pytest.raises(TuningError, match=r"The loss is nan at step 4\. Lower training\.lr"):
        tuned(pipe, clip, output=tmp_path / "a.safetensors", progress=break_it)
    assert Adapter.load(tmp_path / "a.trail" / "step-00002.safetensors").provenance.step == 2


def test_the_adapter_says_where_it_comes_from(pipe, clip):
    told = tuned(pipe, clip).provenance
    assert (told.caption, told.clip.fingerprint, told.clip.indices) == (
        "a man is skiing",
        clip.fingerprint,
        (0, 2, 4),
    )
    assert told.base.architecture["cross_attention_dim"] == 32
    assert told.recipe["training"]["lr"] == 1e-3
    assert told.editing["guidance_scale"] == 12.5
    assert "/" not in told.recipe["base"]


def test_latents_travel_only_when_asked(pipe, clip):
    assert tuned(pipe, clip).latents is None
    kept = tuned(pipe, clip, "adapter.dtype=fp32", keep_latents=True).latents
    assert torch.equal(kept, pipe.encode_clip(clip))


def test_parts_and_blocks_are_tuned_alone(pipe, clip):
    names = list(tuned(pipe, clip, "adapter.parts=[cross_attn]", "adapter.blocks=[up]").weights)
    assert names
    assert all(name.startswith("up_blocks") and ".attn2.to_q." in name for name in names)


def test_adapters_must_be_off_for_a_new_tuning(pipe, clip, make_adapter):
    pipe.load_adapter(make_adapter(), adapter_name="old")
    with pytest.raises(TuningError, match=r"Adapters are loaded \(old\)"):
        tuned(pipe, clip)


def test_an_output_that_is_no_safetensors_file_is_refused(pipe, clip, tmp_path):
    with pytest.raises(TuningError, match=r"one \.safetensors file"):
        tuned(pipe, clip, output=tmp_path / "a.bin")


def test_a_variant_is_tuned_and_the_unet_is_its_own_again(pipe, clip):
    own = ModelSection(attention="causal")
    pipe.unet.variant = own
    losses = losses_of(pipe, clip, "training.steps=1")
    seen = []
    full = tuned(pipe, clip, "model.attention=full", progress=lambda _: seen.append(pipe.unet.variant))
    assert full.provenance.model == seen[0] == ModelSection(attention="full")
    assert pipe.unet.variant == own
    others = [losses_of(pipe, clip, "training.steps=1", f"model.{field}")
              for field in ("attention=full", "attention=causal", "attention=frame", "group_norm=frame")]  # fmt: skip
    assert len({*losses, *itertools.chain(*others)}) == 5


def test_an_unfinished_tuning_of_another_variant_is_not_taken_over(pipe, clip, tmp_path):
    file = tmp_path / "a.safetensors"
    with pytest.raises(KeyboardInterrupt):
        tuned(pipe, clip, output=file, progress=stop_at(2))
    assert pipe.unet.variant == ModelSection()
    with pytest.raises(TuningError, match="other settings"):
        tuned(pipe, clip, "model.attention=full", output=file)


def test_a_probe_that_fails_costs_no_tuning(pipe, clip, tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    whole = tuned(pipe, clip)
    monkeypatch.setattr(tuning, "probed", fail)
    with pytest.raises(MemoryError):
        tuned(pipe, clip, output=tmp_path / "a.safetensors")
    saved = Adapter.load(tmp_path / "a.safetensors")
    assert saved.provenance.probe is None
    assert all(torch.equal(saved.tensors[name], tensor) for name, tensor in whole.tensors.items())
