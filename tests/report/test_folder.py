"""The report of a folder shows all that is in it, and says what is missing."""

import hashlib
import html
import json
import re
import shutil

import pytest
from typer.testing import CliRunner

from tav_peft.adapter import Adapter, FurtherClip
from tav_peft.cli.main import app
from tav_peft.errors import TavError
from tav_peft.pocket.clips import SHIPPED
from tav_peft.report.folder import report
from tav_peft.video.record import Record

PANDA, SNOW = "a panda is moving on the grass", "a panda is moving on the snow"


def text_of(folder, **options):
    return html.unescape(report(folder, **options).read_text())


def test_the_page_shows_the_clip_and_each_edit_with_what_is_known_of_it(folder):
    text = text_of(folder)
    titles = re.findall(r'aria-label="([^"]+)"', text)
    assert titles == ["the clip: a rabbit is moving on the grass", PANDA, SNOW]
    assert "guidance scale 4.0, depth 1.0" in text
    assert 'alt="loss of each step"' in text
    assert re.findall(r'(?:src="|href="|url\()(?!data:)', text) == []  # nothing outside of the file
    assert "<script" not in text


def test_edits_of_a_pocket_clip_are_scored_against_the_ideal(folder):
    text = text_of(folder)
    assert re.search(r"<th>motion error ↓(<td>(0|1|1\.414) px of 64){2}", text)
    assert re.search(r"<dt>frame consistency all<dd>mean cosine of all pairs.*?\[pocket-clip\]", text)


def test_hashes_and_recipe_are_those_of_the_files(folder):
    text = text_of(folder)
    for name in ("rabbit.safetensors", "panda.mp4", "snow.gif"):
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert f"<td>{name} (file)</td><td>{digest}</td>" in text
    assert "learning rate 0.001, seed" in text
    assert "steps: 100" in text


def test_the_frames_of_every_clip_are_hashed(folder):
    file = folder / "rabbit.safetensors"
    adapter = Adapter.load(file)
    first = adapter.provenance.clip
    further = FurtherClip(caption="a rabbit", clip=first.model_copy(update={"fingerprint": "f" * 64}))
    told = adapter.provenance.model_copy(update={"further_clips": (further,)})
    Adapter(adapter.tensors, adapter.peft_config, told).save(file)
    text = text_of(folder)
    assert f"<td>clip 1, rabbit-grass.mp4 (its frames)</td><td>{first.fingerprint}</td>" in text
    assert f"<td>clip 2, rabbit-grass.mp4 (its frames)</td><td>{'f' * 64}</td>" in text


def test_it_says_how_to_make_it_again(folder):
    text = text_of(folder)
    assert "tav tune rabbit-grass.mp4 --recipe recipe.yaml --prompt 'a rabbit is moving on the grass'" in text
    assert f"tav edit rabbit.safetensors --prompt '{PANDA}' --guidance 4.0 --depth 1.0 -o panda.mp4" in text
    assert f"tav edit rabbit.safetensors --prompt '{SNOW}' -o snow.gif" in text
    assert "demo again" in text_of(folder, command="demo again")


def test_only_what_an_edit_had_otherwise_is_said(folder):
    usual = {"guidance_interval": [0.0, 1.0], "reuse_features": 1, "merge_tokens": 0.0}
    Record(SNOW, usual | {"strength": 0.0}).write(folder / "snow.gif")
    assert f"--prompt '{SNOW}' --strength 0.0 -o snow.gif" in text_of(folder)
    Record(SNOW, {"guidance_interval": [0.0, 0.6], "reuse_features": 2, "merge_tokens": 0.5}).write(
        folder / "snow.gif"
    )
    said = "--guidance-interval 0.0-0.6 --reuse-features 2 --merge-tokens 0.5"
    assert f"--prompt '{SNOW}' {said} -o snow.gif" in text_of(folder)
    injected = {"inject_attention": 0.5, "inject_features": 0.0}
    Record(SNOW, injected).write(folder / "snow.gif")
    assert f"--prompt '{SNOW}' --inject-features 0.0 -o snow.gif" in text_of(
        folder
    )  # pocket's attention is 0.5
    Record(SNOW, injected | {"seed": 3, "precision": "bf16"}).write(folder / "snow.gif")
    assert f"--prompt '{SNOW}' --no-inversion --seed 3 --precision bf16 -o snow.gif" in text_of(folder)


def test_a_reconstruction_is_shown_with_its_psnr(folder):
    SHIPPED[0].edited(style="cartoon").render().write(folder / "reconstruction.mp4", scale=4)
    assert re.search(r"inverted and sampled back<small>PSNR to the clip \d\d\.\d dB", text_of(folder))


def test_prompts_of_another_world_are_scored_only_by_a_clip_that_is_named(folder):
    Record("spider man is surfing").write(folder / "snow.gif")
    text = text_of(folder)
    table = re.search(r'class="scores">(.*?)</table>', text)[1]
    assert PANDA in table
    assert "spider man" not in table
    table = re.search(r'class="scores">(.*?)</table>', text_of(folder, clip_model="pocket-clip"))[1]
    assert "spider man" in table


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(TavError, match="is no folder"):
        report(tmp_path / "none")
    shutil.copy(folder / "rabbit.safetensors", folder / "second.safetensors")
    with pytest.raises(TavError, match=r"2 adapters \(rabbit\.safetensors, second\.safetensors\)"):
        report(folder)
    assert report(folder, adapter_file=folder / "second.safetensors").exists()
    for record in folder.glob("*.json"):
        record.unlink()
    with pytest.raises(TavError, match="no video with a record of its prompt"):
        report(folder, adapter_file=folder / "rabbit.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TavError, match=r"has no adapter\. Say which with --adapter"):
        report(tmp_path / "empty")


def test_a_clip_that_is_not_there_is_left_out(folder):
    (folder / "rabbit-grass.mp4").unlink()
    text = text_of(folder)
    assert "the clip:" not in text
    assert PANDA in text


# -- the command ----------------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_says_where(folder):
    done = CliRunner().invoke(app, ["report", str(folder), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["report"] == str(folder / "index.html")
    assert told["bytes"] == (folder / "index.html").stat().st_size


def test_the_command_can_sample_the_clip_back_first(folder, base):
    done = CliRunner().invoke(
        app, ["report", str(folder), "--reconstruct", "--base", str(base), "--device", "cpu"]
    )
    assert done.exit_code == 0, done.output
    assert (folder / "reconstruction.mp4").exists()
    assert "inverted and sampled back" in (folder / "index.html").read_text()


def test_a_base_without_a_reconstruction_is_a_mistake(folder):
    done = CliRunner().invoke(app, ["report", str(folder), "--base", "pocket"], env={"COLUMNS": "300"})
    assert (done.exit_code, "Add --reconstruct" in done.output) == (2, True)
