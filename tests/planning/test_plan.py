"""What a plan says, what it refuses, and what it chooses by itself."""

from dataclasses import replace

import pytest
import torch

from tav_peft.errors import BaseModelError, TavError
from tav_peft.planning import EFFICIENCY, Job, plan
from tav_peft.planning import device as devices
from tav_peft.planning import memory as memories
from tav_peft.planning.blueprint import Blueprint
from tav_peft.planning.check import check_memory
from tav_peft.planning.device import Speed, free_memory
from tav_peft.recipe import Recipe
from tav_peft.tuning import tune

CPU = torch.device("cpu")
TINY = Recipe.load("lite").override(
    ["training.steps=2", "adapter.dtype=fp32", "editing.num_inference_steps=4"]
)


def job(*settings, **given):
    return Job(TINY.override(settings), **{"frames": 8, "height": 64, "width": 64, **given})


def planned(base, *settings, **given):
    return plan(base, job(*settings, **given), CPU, timed=False)


@pytest.fixture
def free(monkeypatch):
    """Say how much memory is free."""

    def say(count):
        for module in (devices, memories):
            monkeypatch.setattr(module, "free_memory", lambda _: count)
        monkeypatch.setattr("tav_peft.planning.free_memory", lambda _: count)

    return say


def stage(told, name):
    return next(each for each in told.stages if each.name == name)


def test_the_weights_of_a_blueprint_are_those_of_the_base(base, pipe):
    models = (pipe.unet, pipe.vae, pipe.text_encoder)
    assert Blueprint.of(base).size == sum(p.numel() * 4 for m in models for p in m.parameters())


def test_two_text_encoders_are_counted(xl_base, xl_pipe):
    models = (xl_pipe.unet, xl_pipe.vae, xl_pipe.text_encoder, xl_pipe.text_encoder_2)
    assert Blueprint.of(xl_base).size == sum(p.numel() * 4 for m in models for p in m.parameters())
    assert planned(xl_base).memory > 0


def test_a_part_that_has_no_config_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(BaseModelError, match=r"unet/config\.json is missing or broken"):
        Blueprint.of(tmp_path)


def test_memory_of_a_tuning_grows_with_frames_and_the_rest_stays(base):
    eight, sixteen = (planned(base, frames=frames) for frames in (8, 16))
    above = [stage(each, "tune").memory - each.weights for each in (eight, sixteen)]
    assert above[1] / above[0] == pytest.approx(2, rel=0.1)
    assert stage(eight, "encode").memory == stage(sixteen, "encode").memory
    assert [stage(each, "encode").times for each in (eight, sixteen)] == [1, 1]  # small frames go together


def test_recomputation_takes_less_memory_and_more_operations(base):
    kept, again = (
        stage(planned(base, f"training.gradient_checkpointing={on}"), "tune") for on in ("false", "true")
    )
    assert again.memory < kept.memory
    assert kept.flops < again.flops


def test_windows_keep_memory_flat_and_are_counted(base):
    long, windowed = planned(base, frames=24), planned(base, "editing.window=8", frames=24)
    assert stage(windowed, "edit").memory < stage(long, "edit").memory
    assert (
        stage(windowed, "edit").times == 7 * stage(long, "edit").times
    )  # 23 frames in runs of 7 that share 4
    assert (
        stage(planned(base, "training.window=8", frames=24), "tune").memory
        == stage(planned(base), "tune").memory
    )


def test_injected_steps_have_a_row_more(base):
    shares = "editing.inject_attention=0.25", "editing.inject_features=0.75"
    plain, injected = planned(base), planned(base, *shares)
    edit, more = (stage(injected, name) for name in ("edit", "edit, injected"))
    assert more.times == 3 * edit.times
    assert edit.times + more.times == stage(plain, "edit").times
    assert more.flops == pytest.approx(1.5 * edit.flops, rel=0.01)
    half = planned(base, *shares, "editing.depth=0.5")  # the steps that a depth leaves out are of the share
    assert stage(half, "edit, injected").times == stage(half, "edit").times
    with pytest.raises(StopIteration):
        stage(planned(base, *shares, "editing.reuse_features=2"), "edit, injected")


def test_prompts_that_are_sampled_together_take_more_memory_and_fewer_steps(base):
    one, four = planned(base, prompts=4), planned(base, prompts=4, batch=4)
    assert stage(four, "edit").memory > stage(one, "edit").memory
    assert [stage(each, "edit").times for each in (one, four)] == [16, 4]
    assert stage(four, "decode").times == 4


def test_half_precision_halves_the_weights(base):
    assert planned(base, "training.precision=bf16").weights * 2 == planned(base).weights


def test_time_is_the_work_at_the_measured_speed(base, monkeypatch):
    monkeypatch.setattr(Speed, "measure", lambda *_: Speed(1e9, 1e9, float("inf"), 0.0))
    told = plan(base, job(), CPU)
    assert told.seconds == pytest.approx(sum(each.seconds for each in told.stages))
    at_full_speed = 2 * stage(told, "tune").flops / 1e9
    assert stage(told, "tune").seconds == pytest.approx(at_full_speed / EFFICIENCY["tune"])
    assert planned(base).seconds is None


def test_a_device_is_measured_in_plain_numbers():
    speed = Speed.measure(CPU, torch.float32)
    assert 1e8 < speed.matmul < 1e15
    assert 1e8 < speed.convolution < 1e15
    assert 1e8 < speed.moved < 1e13
    assert 1e-8 < speed.kernel < 1e-2


@pytest.mark.parametrize(("limit", "left"), [("max", 4096000), ("3000000", 1000000)])
def test_free_memory_is_the_kernels_or_what_a_container_leaves(limit, left, tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemFree:  100 kB\nMemAvailable:   4000 kB\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("2000000\n")
    monkeypatch.setattr(devices, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(devices, "_CGROUP", tmp_path)
    assert free_memory(CPU) == left
    assert free_memory(torch.device("mps")) is None


# -- what does not fit -------------------------------------------------------------------------------------


def test_what_fits_begins(base, free):
    free(1 << 40)
    assert check_memory(Blueprint.of(base), job(), CPU, anyway="--go-on").fits


def test_what_does_not_fit_is_refused_with_what_would(base, free):
    needed = planned(base, "training.gradient_checkpointing=true", prompts=0, frames=32)
    free(round(0.8 * needed.memory))
    with pytest.raises(TavError) as told:
        check_memory(Blueprint.of(base), job(prompts=0, frames=32), CPU, anyway="--go-on")
    text = str(told.value)
    assert "Tuning 32 frames of 64x64 needs about" in text
    assert "are free" in text
    assert "--go-on begins regardless" in text
    frames = int(text.split("--frames ")[1].split()[0])
    assert (
        planned(base, "training.gradient_checkpointing=true", prompts=0, frames=frames).memory
        <= 0.9 * 0.8 * needed.memory
    )
    assert check_memory(Blueprint.of(base), job(prompts=0, frames=32), CPU).recompute


def test_recomputation_is_named_where_it_was_switched_off(base, free):
    kept = planned(base, "training.gradient_checkpointing=false", prompts=0)
    free(round(kept.memory))
    with pytest.raises(TavError, match=r"--set training\.gradient_checkpointing=true \("):
        check_memory(
            str(base), job("training.gradient_checkpointing=false", prompts=0), CPU, anyway="--go-on"
        )


def test_edits_are_told_of_batches_and_windows(base, free):
    given = job(frames=24, prompts=4, batch=4)
    given = replace(given, tunes=False)
    one = planned(base, frames=24, prompts=4, tunes=False).memory
    twelve = planned(base, "editing.window=12", frames=24, prompts=4, batch=4, tunes=False).memory
    free(round(max(one, twelve) / 0.9) + 2)
    with pytest.raises(TavError, match=r"Editing 24 frames .*--batch 1 \(.*--window 12 \("):
        check_memory(Blueprint.of(base), given, CPU, anyway="--go-on")


def test_where_nothing_fits_that_is_said(base, free):
    free(1000)
    with pytest.raises(TavError, match="None of fewer frames or a smaller size fits either"):
        check_memory(Blueprint.of(base), job(prompts=0), CPU, anyway="--go-on")


# -- automatic recomputation -------------------------------------------------------------------------------


@pytest.mark.parametrize(("room", "again"), [(1 << 40, False), (1000, True), (None, False)])
def test_activations_are_recomputed_where_they_do_not_fit(room, again, base, free):
    free(room)
    assert planned(base, prompts=0).recompute is again
    for setting in (True, False):
        assert planned(base, f"training.gradient_checkpointing={str(setting).lower()}").recompute is setting


def test_a_tuning_recomputes_by_itself_and_its_adapter_is_the_same(pipe, clip, free, monkeypatch):
    seen = []
    enable = type(pipe.unet).enable_gradient_checkpointing
    monkeypatch.setattr(
        type(pipe.unet), "enable_gradient_checkpointing", lambda unet: seen.append(unet) or enable(unet)
    )
    tensors = []
    for room in (1 << 40, 1000):
        free(room)
        tensors.append(tune(pipe, clip, "a man", TINY).tensors)
        seen = [unet for unet in seen if unet is pipe.unet]
    assert len(seen) == 1
    assert not pipe.unet.is_gradient_checkpointing
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), name
