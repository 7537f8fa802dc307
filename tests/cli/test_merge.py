"""`tav merge` on real adapters: a table for a person, an object for a program, and mistakes in one line."""

import json
import re

import pytest
import torch
from diffusers import UNet2DConditionModel

from tav_peft.adapter import Adapter
from tav_peft.cli import merge as cli_merge
from tav_peft.merging import merge
from tav_peft.merging.methods import METHODS
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.updates import Updates


@pytest.fixture
def files(make_adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, preset, seed in (("a", "hybrid", 1), ("b", "lite", 2)):
        make_adapter(preset, seed=seed).save(tmp_path / f"{name}.safetensors")
    make_adapter("hybrid", temporal_seed=7).save(tmp_path / "other.safetensors")
    return tmp_path


def test_the_result_is_the_librarys_with_a_weight_for_each_adapter(files, tav):
    result = tav("merge", "a.safetensors", "b.safetensors", "--weight", "0.7", "--weight", "-0.5,t_attn=1,up=0.8",
                 "--rank", "3", "--dtype", "fp16", "-o", "c.safetensors")  # fmt: skip
    assert (result.exit_code, result.stdout) == (0, "c.safetensors\n")
    weights = [0.7, {"all": -0.5, "t_attn": 1.0, "up": 0.8}]
    expected, report = merge(["a.safetensors", "b.safetensors"], weights, rank=3, dtype="fp16")
    expected.save("expected.safetensors")
    assert (files / "c.safetensors").read_bytes() == (files / "expected.safetensors").read_bytes()
    rows = [line.strip("│").split("│") for line in result.stderr.splitlines() if line.startswith("│")]
    table = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    assert list(table) == ["st_attn", "cross_attn", "t_attn", "all"]
    assert table["st_attn"][:2] == [f"{report.parts['st_attn'].error:.2%}", "LoRA, rank 3"]
    assert table["t_attn"][1] == "dense"


def test_a_dry_run_tells_all_and_writes_nothing(files, tav):
    before = sorted(files.iterdir())
    settings = (
        "--method",
        "dare_ties",
        "--density",
        "0.4",
        "--seed",
        "3",
        "--preset",
        "hybrid",
        "--rank",
        "2",
    )
    result = tav("merge", "a.safetensors", "b.safetensors", *settings, "--dry-run", "--json")
    told = json.loads(result.stdout)
    _, report = merge(
        ["a.safetensors", "b.safetensors"], method="dare_ties", density=0.4, seed=3, preset="hybrid", rank=2
    )
    assert told["output"] is None
    assert (told["error"], told["preset"], told["info"]["seed"]) == (report.error, "hybrid", 3)
    assert told["parts"]["st_attn"] == {"error": report.parts["st_attn"].error, "ranks": [2],
                                        "bytes": report.parts["st_attn"].bytes}  # fmt: skip
    assert told["modules"] == report.modules
    assert sorted(files.iterdir()) == before


def test_side_by_side_is_asked_for_by_name(files, tav):
    command = ("merge", "a.safetensors", "other.safetensors", "-o", "c.safetensors")
    refused = tav(*command)
    assert refused.exit_code == 1
    assert "of seed 0, that of other.safetensors from others, of seed 7" in refused.stderr
    result = tav(*command, "--t-attn", "concat")
    assert result.exit_code == 0
    assert re.search(r"t_attn .* dense, 2 side by side", result.stderr)


def test_info_tells_where_a_merged_adapter_comes_from(files, tav):
    tav(
        "merge",
        "a.safetensors",
        "b.safetensors",
        "--weight",
        "1",
        "--weight",
        "2,up=3",
        "-o",
        "c.safetensors",
    )
    told = dict(line.split(maxsplit=1) for line in tav("info", "c.safetensors").stdout.splitlines())
    assert told["provenance.merged_from.method"] == "linear"
    assert told["provenance.merged_from.adapters.2.name"] == "b.safetensors"
    assert told["provenance.merged_from.adapters.2.weights.up"] == "3.0"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "give a file to write, or --dry-run"),
        (("-o", "a.safetensors"), 2, "a.safetensors is already there"),
        (("-o", "c.safetensors", "--weight", "1"), 1, "2 adapters and 1 weights were given"),
        (("-o", "c.safetensors", "--weight", "1", "--weight", "up:2"), 1, "'up:2' is neither a number nor"),
        (("-o", "c.safetensors", "--method", "magic"), 1, "method 'magic': choose from linear"),
        (("-o", "c.safetensors", "--method", "svd", "--preset", "lite", "--rank", "0"), 2, "--rank"),
    ],
)
def test_a_mistake_is_told_and_nothing_is_written(arguments, code, message, files, tav):
    result = tav("merge", "a.safetensors", "b.safetensors", *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert not (files / "c.safetensors").exists()


def test_what_is_there_may_be_replaced(files, tav):
    assert tav("merge", "a.safetensors", "b.safetensors", "-o", "a.safetensors", "--overwrite").exit_code == 0
    assert Adapter.load(files / "a.safetensors").provenance.merged_from is not None


def test_the_help_names_every_method(tav):
    assert all(name in cli_merge._METHODS for name in METHODS)


# -- into a base -------------------------------------------------------------------------------------------


def test_into_a_base_writes_a_checkpoint_that_commands_load(files, base, tav):
    merging = ("a.safetensors", "b.safetensors", "--weight", "0.5", "--weight", "0.25")
    result = tav("merge", *merging, "--into", str(base), "-o", "baked")
    assert (result.exit_code, result.stdout) == (0, "baked\n")
    expected, _ = merge(["a.safetensors", "b.safetensors"], [0.5, 0.25], dtype="fp32")
    ours = TuneAVideoPipeline.from_pretrained("baked").unet.state_dict()
    pipe = TuneAVideoPipeline.from_pretrained(base)
    updates = Updates(expected, "merged")
    for name, tensor in pipe.unet.state_dict().items():
        torch.testing.assert_close(ours[name], tensor + updates[name] if name in updates else tensor)


def test_into_an_image_model_says_what_is_left_out(files, base, tav):
    result = tav("merge", "a.safetensors", "--into", str(base), "--layout", "image", "-o", "image", "--json")
    said = json.loads(result.stdout)
    assert (said["path"], said["layout"]) == ("image", "image")
    assert said["changed"] == len([name for name in UNet2DConditionModel.from_pretrained("image/unet").state_dict()
                                   if name.endswith(("attn1.to_q.weight", "attn2.to_q.weight"))])  # fmt: skip
    assert "Left out: " in result.stderr
    assert "tensors of t_attn; image tools have no temporal attention" in result.stderr


def test_into_the_originals_layout_writes_what_export_writes(files, base, tav):
    tav("merge", "a.safetensors", "--into", str(base), "--layout", "official", "-o", "merged")
    tav("export", "a.safetensors", "--to", "official", "--base", str(base), "-o", "exported")
    merged, exported = (
        torch.load(f"{folder}/unet/diffusion_pytorch_model.bin", weights_only=True)
        for folder in ("merged", "exported")
    )
    for name, tensor in exported.items():
        torch.testing.assert_close(merged[name], tensor)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--layout", "2d"), "2d is no layout. Choose from inflated, official, image."),
        (("--layout", "image", "--dtype", "fp16"), "an image model keeps its own precision"),
        (("--dry-run",), "a baked checkpoint is written: give -o, without --dry-run"),
    ],
)
def test_impossible_ways_into_a_base_are_refused(options, said, files, base, tav):
    result = tav("merge", "a.safetensors", "--into", str(base), *options, "-o", "out")
    assert result.exit_code == 2
    assert said in result.stderr
    assert not (files / "out").exists()
