"""Several clips of one subject: a step learns from all of them, and several processes do what one does."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tav_peft.adapter import Adapter
from tav_peft.recipe import Recipe
from tav_peft.tuning import tune

SETTINGS = ("training.steps=4", "training.lr=1e-3", "training.save_every=2", "adapter.preset=lite", "adapter.rank=2",
            "adapter.dtype=fp32", "clip.size=null", "clip.frames=null")  # fmt: skip
PROMPTS = ("a man is skiing", "a man is surfing")


@pytest.fixture
def other(clip):
    return dataclasses.replace(clip, pixels=np.ascontiguousarray(clip.pixels[:2, ::-1]), indices=(0, 2))


def launched(folder, count, base, script=None):
    """Tune on both clips in `count` processes, as a user starts them."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    tav = script or Path(sys.executable).with_name("tav")
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count), "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *(launch if count > 1 else []), str(tav), "tune", "one.mp4", "two.mp4", *prompts, *sets,
         "--base", str(base), "-o", "out.safetensors"],
        cwd=folder, capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "400", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    return done, folder / "out.safetensors"


@pytest.fixture
def clips(tmp_path, clip, other):
    for name in ("alone", "together"):
        clip.write(tmp_path / name / "one.mp4")
        other.write(tmp_path / name / "two.mp4")
    return tmp_path


def test_a_step_learns_from_the_mean_of_the_clips(pipe, clip, other):
    losses = {}

    def run(name, clip, prompt, also=()):
        losses[name] = []
        recipe = Recipe().override([*SETTINGS, "training.lr=1e-12"])  # where it begins, it stays
        tune(pipe, clip, prompt, recipe, also=also, progress=lambda step: losses[name].append(step.loss))

    run("both", clip, PROMPTS[0], [(other, PROMPTS[1])])
    run("twice", clip, PROMPTS[0], [(clip, PROMPTS[0])])
    run("one", clip, PROMPTS[0])
    assert losses["both"][0] != pytest.approx(losses["one"][0], rel=1e-3)
    # the same clip twice is drawn twice a step: its steps are the means of pairs of one's
    assert losses["twice"][0] == pytest.approx((losses["one"][0] + losses["one"][1]) / 2, rel=1e-4)
    assert losses["twice"][1] == pytest.approx((losses["one"][2] + losses["one"][3]) / 2, rel=1e-4)


def test_two_processes_make_the_adapter_that_one_makes(clips, base):
    alone, one = launched(clips / "alone", 1, base)
    together, two = launched(clips / "together", 2, base)
    assert alone.returncode == together.returncode == 0, alone.stderr + together.stderr
    assert together.stdout.split() == ["out.safetensors"]  # one of them speaks
    assert "2 processes" in together.stderr
    expected, made = Adapter.load(one), Adapter.load(two)
    start = {name: t for name, t in expected.tensors.items() if name.endswith("lora_B.weight")}
    assert start  # these begin at zero
    for name, tensor in expected.tensors.items():
        assert torch.allclose(made.tensors[name], tensor, rtol=1e-4, atol=1e-6), name
    assert all(tensor.abs().max() > 1e-4 for tensor in start.values())
    said = made.provenance
    assert [said.caption, *(each.caption for each in said.further_clips)] == list(PROMPTS)
    assert [said.clip.name, *(each.clip.name for each in said.further_clips)] == ["one.mp4", "two.mp4"]
    assert said.further_clips[0].clip.frames == 2
    assert (two.parent / "out.trail" / "step-00002.safetensors").exists()


def test_two_processes_go_on_where_they_were_stopped(clips, base):
    done, straight = launched(clips / "alone", 2, base)
    assert done.returncode == 0, done.stderr
    code = """
import sys
from tav_peft import tuning
from tav_peft.cli import main, tune
real = tuning.tune
def short(*given, progress, **options):
    def stop(step):
        progress(step)
        if step.step == 3:
            raise RuntimeError("stopped")
    return real(*given, progress=stop, **options)
tuning.tune = short
sys.argv = ["tav", *sys.argv[1:]]
main.main()
"""
    script = clips / "together" / "tav"
    script.write_text(code)
    stopped, file = launched(clips / "together", 2, base, script=script)
    assert stopped.returncode != 0
    assert not file.exists()
    resumed, file = launched(clips / "together", 2, base)
    assert resumed.returncode == 0, resumed.stderr
    assert Adapter.load(file).fingerprint == Adapter.load(straight).fingerprint


def test_more_processes_than_clips_are_refused(clips, base):
    done, file = launched(clips / "together", 3, base)
    assert done.returncode != 0
    assert "There are 3 processes and 2 clips" in done.stderr
    assert not file.exists()
