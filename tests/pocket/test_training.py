"""The trainings of pocket's company in few steps: what they write is what the pipeline loads."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from tav_peft.bases import locate
from tav_peft.control import networks
from tav_peft.control.maps import maps_of
from tav_peft.control.steering import Control
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.pocket.clips import SHIPPED

ROOT = Path(__file__).parents[2]


def script(name, *arguments):
    command = [sys.executable, str(ROOT / "training" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def pocket():
    return TuneAVideoPipeline.from_pretrained("pocket")


def test_pocket_trains_on_from_its_own_weights_on_overlapping_objects(tmp_path):
    few = ("--scenes", 25, "--batch", 1, "--steps", 1)
    script("train_unet.py", tmp_path, "--base", "pocket", "--pairs", 1, *few)
    shipped = Path(locate("pocket"))
    script("assemble.py", tmp_path, "--vae", shipped / "vae", "--output", tmp_path / "model")
    trained = StableDiffusionPipeline.from_pretrained(tmp_path / "model").unet.state_dict()
    before = StableDiffusionPipeline.from_pretrained(shipped).unet.state_dict()
    moved = [(trained[name] - before[name]).abs().max().item() for name in before]
    assert 0 < max(moved) < 1e-4  # one step of the warm-up


@pytest.mark.parametrize("kind", ["t2i_adapter", pytest.param("controlnet", marks=pytest.mark.slow)])
def test_a_trained_control_network_steers_pocket_and_a_training_goes_on_where_it_was(pocket, tmp_path, kind):
    few = ("--kind", kind, "--batch", 2, "--scenes", 25)
    script("train_control.py", tmp_path, *few, "--steps", 2)
    first = networks.load_network(tmp_path / "model")
    script("train_control.py", tmp_path, *few, "--steps", 3)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3
    network = networks.load_network(tmp_path / "model")
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), network.parameters(), strict=True))
    clip = SHIPPED[0].render()
    control = Control(network, maps_of("canny", clip))
    plain, steered = (
        pocket("a fox", latents=pocket.noise(clip), num_inference_steps=1, controls=controls).latents
        for controls in ((), (control,))
    )
    assert not torch.equal(plain, steered)


@pytest.mark.slow
def test_a_lora_and_a_word_of_pocket_are_files_that_the_pipeline_loads(tmp_path):
    for kind in ("lora", "textual_inversion"):
        script(
            "personalise.py",
            tmp_path / kind,
            "--kind",
            kind,
            "--steps",
            2,
            "--batch",
            1,
            "--sampling-steps",
            1,
        )
        assert (tmp_path / kind / "samples.png").exists()
    pipe = TuneAVideoPipeline.from_pretrained("pocket")
    pipe.load_lora_weights(tmp_path / "lora", "style")
    pipe.load_textual_inversion(tmp_path / "textual_inversion" / "learned_embeds.safetensors")
    assert pipe.adapters == ["style"]
    assert len(pipe.tokenizer("<zwx>").input_ids) == 3
