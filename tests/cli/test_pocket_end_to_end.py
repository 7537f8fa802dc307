"""The commands for real, on the embedded base: a clip in, an adapter and its edits out, in few steps."""

import json
import subprocess
import sys

import pytest

from tav_peft.pocket.clips import sample
from tav_peft.video.clip import Clip


@pytest.fixture(scope="module")
def tav(fork):
    def run(*arguments, cwd, code=0):
        done = fork(cwd, *arguments)
        assert done.code == code, done.said[-3000:]
        return done

    return run


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tav):
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "rabbit.mp4").write_bytes(sample("rabbit-grass").read_bytes())
    done = tav(
        "tune", "rabbit.mp4", "--prompt", "a rabbit is moving on the grass", "--base", "pocket",
        "--preset", "lite", "--steps", "3", "--json", "--keep-latents", cwd=folder,
    )  # fmt: skip
    return folder, json.loads(done.stdout)


def test_a_process_of_its_own_does_the_same(tuned, tav):
    folder, said = tuned
    command = [sys.executable, "-c", "from tav_peft.cli.main import main; main()", "info", said["adapter"]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=True)
    assert done.stdout == tav("info", said["adapter"], cwd=folder).stdout


def test_tune_writes_an_adapter_a_loss_plot_and_says_so(tuned, tav):
    folder, said = tuned
    assert (folder / said["adapter"]).stat().st_size == said["bytes"]
    assert (folder / said["loss_plot"]).exists()
    assert said["steps"] == 3


def test_edit_finds_the_clip_by_itself_and_writes_each_prompt(tuned, tav):
    folder, said = tuned
    done = tav(
        "edit", said["adapter"], "--prompt", "a panda is moving on the grass", "--prompt", "a car is moving on the road",
        "--steps", "2", "-o", "edits", "--json", cwd=folder,
    )  # fmt: skip
    edits = json.loads(done.stdout)["edits"]
    assert len(edits) == 2
    for edit in edits:
        clip = Clip.read(folder / edit["clip"])
        assert (clip.frames, clip.height, clip.width, clip.fps) == (8, 256, 256, 8.0)


def test_an_adapter_with_latents_edits_without_the_clip(tuned, tav, tmp_path):
    folder, said = tuned
    (tmp_path / "alone.safetensors").write_bytes((folder / said["adapter"]).read_bytes())
    tav("edit", "alone.safetensors", "--prompt", "a fox is moving on the grass", "--steps", "2", cwd=tmp_path)
    assert (
        len(list((tmp_path / "alone-edits").iterdir())) == 3
    )  # the video, its contact sheet, and what was asked for


def test_info_and_export_read_what_tune_wrote(tuned, tav):
    folder, said = tuned
    told = json.loads(tav("info", said["adapter"], "--json", cwd=folder).stdout)
    assert "pocket" in json.dumps(told)
    tav("export", said["adapter"], "--to", "peft", "-o", "as-peft", cwd=folder)
    assert (folder / "as-peft" / "adapter_config.json").exists()


def test_verify_finds_that_all_holds_until_a_bit_is_flipped(tuned, tav, tmp_path):
    folder, said = tuned
    told = json.loads(tav("verify", said["adapter"], "--strict", "--json", cwd=folder).stdout)
    assert {claim["name"]: claim["verdict"] for claim in told["claims"]} == {
        **dict.fromkeys(("file", "tensors", "header", "config", "base", "modules", "t_attn", "probe"), "holds"),
        "clip": "holds", "versions": "noted",
    }  # fmt: skip
    damaged = bytearray((folder / said["adapter"]).read_bytes())
    damaged[-1000] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(damaged)
    done = tav("verify", "damaged.safetensors", cwd=tmp_path, code=1)
    assert [line.split()[0] for line in done.stdout.splitlines() if "differs" in line] == ["tensors"]


def test_invert_writes_a_trajectory(tuned, tav):
    folder, said = tuned
    tav(
        "invert",
        "rabbit.mp4",
        "--adapter",
        said["adapter"],
        "--steps",
        "2",
        "-o",
        "inv.safetensors",
        cwd=folder,
    )
    assert (folder / "inv.safetensors").stat().st_size > 8 * 4 * 16 * 16 * 4 * 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("edit", "missing.safetensors", "--prompt", "x"), "does not exist"),
        (("edit", "rabbit.mp4", "--prompt", "x"), "not a whole safetensors file"),
        (("tune", "missing.mp4", "--prompt", "x", "--base", "pocket"), "missing.mp4"),
        (
            ("tune", "rabbit.mp4", "--prompt", "x", "--base", "nowhere", "--recipe", "pocket"),
            "No base at nowhere",
        ),
        (
            ("tune", "rabbit.mp4", "--prompt", "a " * 60, "--base", "pocket", "-o", "new.safetensors"),
            "tokens",
        ),
        (("tune", "rabbit.mp4", "--prompt", "x", "--base", "pocket", "--frames", "900"), "frames"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_1(tuned, tav, arguments, said):
    folder, _ = tuned
    done = tav(*arguments, cwd=folder, code=1)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.fixture(scope="module")
def inverted(tuned, tav):
    folder, said = tuned
    done = tav(
        "invert", "rabbit.mp4", "--adapter", said["adapter"], "--steps", "5", "--method", "fixed_point",
        "-o", "rabbit.inversion", "--json", cwd=folder,
    )  # fmt: skip
    return folder, said["adapter"], json.loads(done.stdout)


def test_an_inversion_says_what_it_cost_and_how_well_it_comes_back(inverted, tav):
    _, _, said = inverted
    found = said["reconstruction"]
    assert found["ceiling"] > 30  # what pocket's autoencoder makes of the clip
    assert found["gap"] == pytest.approx(found["ceiling"] - found["psnr"], abs=0.02)
    assert 0 < found["gap"] < 3
    assert 5 <= said["unet_passes"] <= 25


def test_edit_starts_from_an_inversion_that_was_made_before(inverted, tav):
    folder, adapter, _ = inverted
    asked = ("edit", adapter, "--prompt", "a panda is moving on the grass", "--inversion", "rabbit.inversion")
    steered = (
        "--control",
        "canny",
        "--controlnet",
        "pocket-t2i-adapter",
    )  # of what the inversion has of the clip
    edit = json.loads(tav(*asked, *steered, "-o", "from-inversion", "--json", cwd=folder).stdout)["edits"][0]
    assert Clip.read(folder / edit["clip"]).frames == 8
    tav(*asked[:4], *steered, "--no-inversion", "--steps", "2", "-o", "from-noise", cwd=folder)
    for options, said in (
        (("--strength", "0.7"), "was made with another adapter, or at another strength"),
        (("--steps", "7"), "has 5 steps, 7 were asked for"),
    ):
        refused = tav(*asked, *options, "-o", "refused", cwd=folder, code=1)
        assert said in " ".join(refused.stderr.split())
    assert not (folder / "refused").exists()


def test_edits_are_steered_by_the_clips_edges_and_kept_outside_of_a_word(tuned, tav):
    folder, said = tuned
    command = (
        "edit", said["adapter"], "--prompt", "a panda is moving on the snow", "--steps", "3", "--json",
        "--control", "canny", "--controlnet", "pocket-t2i-adapter=0.8@0-0.9",
        "--control", "lineart", "--controlnet", "pocket-controlnet=0.5", "--control-inversion",
    )  # fmt: skip
    first = json.loads(tav(*command, "--mask-word", "rabbit", "-o", "steered", cwd=folder).stdout)
    assert first["controlnet"] == ["pocket-t2i-adapter=0.8@0-0.9", "pocket-controlnet=0.5"]
    assert (folder / first["edits"][0]["clip"]).exists()
    assert not first["from_cache"]
    refused = tav(
        *command, "--mask-word", "fox", cwd=folder, code=1
    )  # told after the inversion, from the cache
    assert refused.stderr.strip().splitlines()[-1].endswith("does not have 'fox'. Give a word of it.")


def test_the_cache_is_used_listed_and_cleared(tuned, tav):
    folder, said = tuned
    edit = ("edit", said["adapter"], "--prompt", "a panda", "--steps", "2", "--depth", "0.5", "--json")
    assert [json.loads(tav(*edit, cwd=folder).stdout)["from_cache"] for _ in range(2)][1]
    assert "ddim, 2 steps" in tav("cache", "ls", cwd=folder).stdout
    cleared = json.loads(tav("cache", "clear", "--json", cwd=folder).stdout)
    assert cleared["removed"] > 0
    assert cleared["bytes"] > 0
    assert "0 inversions" in tav("cache", "ls", cwd=folder).stderr


def test_control_draws_what_a_network_would_read(tuned, tav):
    folder, _ = tuned
    (path,) = tav("control", "rabbit.mp4", "--kind", "flow", "--size", "64", cwd=folder).stdout.split()
    shown = Clip.read(folder / path)
    assert (shown.frames, shown.width) == (8, 64)
    assert shown.pixels.max() > 100
    assert (
        "'depth' is no control" in tav("control", "rabbit.mp4", "--kind", "depth", cwd=folder, code=1).stderr
    )
