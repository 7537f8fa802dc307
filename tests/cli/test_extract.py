"""`tav extract` on a tiny model that was tuned for it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tav_peft.adapter import Adapter

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def models(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "base")
    shutil.copytree(base, "tuned")
    tensors = load_file(tmp_path / "base" / UNET)
    generator = torch.Generator().manual_seed(0)
    for name in sorted(tensors):
        if name.endswith("attn2.to_q.weight") or name == "conv_out.bias":
            tensors[name] = tensors[name] + torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, tmp_path / "tuned" / UNET)


def test_a_person_is_told_the_energy_and_what_is_left_out(models, tav):
    result = tav(
        "extract", "tuned", "--base", "base", "--energy", "0.9", "--prompt", "a dog", "-o", "a.safetensors"
    )
    assert (result.exit_code, result.stdout) == (0, "a.safetensors\n")
    made = Adapter.load("a.safetensors")
    assert (made.provenance.caption, made.provenance.base.name) == ("a dog", "base")
    rows = [line.split() for line in result.stderr.splitlines()]
    assert sum(row[:1] == ["cross_attn"] for row in rows) == 1
    assert "1 of the " in result.stderr
    assert "first conv_out.bias" in result.stderr
    assert "Only the UNet was compared" in result.stderr


def test_a_program_gets_one_object(models, tav):
    result = tav("extract", "tuned", "--base", "base", "--rank", "3", "-o", "a.safetensors", "--json")
    told = json.loads(result.stdout)
    assert (told["output"], told["preset"], told["left_out"]["tensors"]) == ("a.safetensors", "hybrid", 1)
    assert {row["rank"] for row in told["report"]["updates"]} == {3}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [((), 1, "Without a rank or a share of energy"), (("--energy", "1.5"), 1, "energy 1.5: give a share"),
     (("--rank", "2", "--base", "nowhere/at/all"), 1, "No base at nowhere/at/all")],
)  # fmt: skip
def test_a_mistake_is_told_and_nothing_is_written(arguments, code, message, models, tav, tmp_path):
    result = tav("extract", "tuned", "--base", "base", "-o", "a.safetensors", *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert not (tmp_path / "a.safetensors").exists()
