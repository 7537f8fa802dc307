"""The DreamBooth script and its benchmark in few steps: a base that loads, and a row for each way."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.pocket.world import OBJECTS

ROOT = Path(__file__).parents[1]
FEW = ["--steps", "2", "--batch", "1", "--prior", "robot", "--prior-pictures", "2", "--sampling-steps", "1"]


def script(name, *arguments):
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def picture(file):
    with Image.open(file) as image:
        return image.copy()


@pytest.fixture(scope="module")
def dreambooth(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dreambooth") / "new"
    script("training/dreambooth.py", folder, *FEW)
    return folder


def test_its_folder_loads_as_a_base_with_only_the_unet_changed(dreambooth):
    made, pocket = (TuneAVideoPipeline.from_pretrained(base) for base in (dreambooth, "pocket"))
    for part, same in (("unet", False), ("text_encoder", True), ("vae", True)):
        pair = [getattr(pipe, part).state_dict() for pipe in (made, pocket)]
        assert list(pair[0]) == list(pair[1])
        assert all(torch.equal(tensor, pair[1][name]) for name, tensor in pair[0].items()) == same
    assert made.base_fingerprint != pocket.base_fingerprint
    assert [made.tokenizer.tokenize(word) for word in ("zwx", "robot")] == [
        ["z", "w", "x</w>"],
        ["robot</w>"],
    ]


def test_it_says_what_it_was_made_from(dreambooth):
    about = dreambooth / "dreambooth"
    told = json.loads((about / "dreambooth.json").read_text())
    assert (told["name"], told["class"], told["steps"], told["folder"]) == ("zwx robot", "robot", 2, "new")
    assert told["name"] not in OBJECTS
    assert told["samples"][0] == "a zwx robot is moving on the grass"
    assert picture(about / "subject.png").mode == "RGBA"
    assert picture(about / "pictures.png").size == (6 * 132, 132)
    assert picture(about / "samples.png").size == (8 * 132, len(told["samples"]) // 8 * 132)


@pytest.mark.slow
def test_tuning_the_text_encoder_too_is_asked_for(tmp_path):
    script("training/dreambooth.py", tmp_path / "new", *FEW, "--text-encoder")
    made, pocket = (TuneAVideoPipeline.from_pretrained(base) for base in (tmp_path / "new", "pocket"))
    pair = [pipe.text_encoder.state_dict() for pipe in (made, pocket)]
    assert not all(torch.equal(tensor, pair[1][name]) for name, tensor in pair[0].items())


@pytest.mark.slow
def test_the_benchmark_measures_every_way_of_every_edit_and_draws_them(dreambooth, tmp_path):
    table, sheet = tmp_path / "table.csv", tmp_path / "sheet.png"
    said = script(
        "benchmarks/dreambooth.py", dreambooth, table, "--sheet", sheet, "--clips", "rabbit-grass", "--seeds", "1",
        "--set", "training.steps=1", "editing.num_inference_steps=2",
    )  # fmt: skip
    with table.open() as file:
        rows = list(csv.DictReader(file))
    ways = ["source", "ideal", "d", "a", "b", "c"]
    assert {(row["way"], row["edit"]) for row in rows} == {
        (way, edit) for way in ways for edit in ("subject", "subject and background")
    }
    figures = {row["way"]: row for row in rows if row["edit"] == "subject"}
    assert float(figures["ideal"]["motion_error_px"]) == 0.0
    assert float(figures["ideal"]["right_subject"]) == 1.0
    assert float(figures["source"]["right_subject"]) == 0.0
    assert "| subject | ideal |" in said
    assert picture(sheet).height > 11 * 128
