"""`tav cast` on real adapters."""

import json

import pytest
import torch

from tav_peft.adapter import Adapter
from tav_peft.tools.casting import cast


@pytest.fixture
def file(make_adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_adapter("hybrid").save(tmp_path / "a.safetensors")


def test_the_result_is_the_librarys_and_the_rounding_is_told(file, tav):
    result = tav("cast", "a.safetensors", "--dtype", "fp16", "-o", "b.safetensors")
    assert (result.exit_code, result.stdout) == (0, "b.safetensors\n")
    expected, report = cast("a.safetensors", "fp16")
    made = Adapter.load("b.safetensors")
    assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in made.tensors.items())
    assert f"{report.error:.2g}" in result.stderr
    assert "The largest rounding is" in result.stderr


def test_a_program_gets_one_object(file, tav):
    told = json.loads(tav("cast", "a.safetensors", "--dtype", "bf16", "-o", "b.safetensors", "--json").stdout)
    _, report = cast("a.safetensors", "bf16")
    assert (told["output"], told["error"], told["tensors"]) == ("b.safetensors", report.error, report.tensors)


def test_info_tells_what_was_done(file, tav):
    tav("cast", "a.safetensors", "--dtype", "fp16", "-o", "b.safetensors")
    lines = tav("info", "b.safetensors").stdout.splitlines()
    told = dict(line.split(maxsplit=1) for line in lines)
    assert told["provenance.derived_from.1.tool"] == "cast"
    assert told["provenance.derived_from.1.settings.dtype"] == "fp16"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [(("--dtype", "fp8", "-o", "b.safetensors"), 1, "dtype 'fp8': choose from"),
     (("--dtype", "fp16", "-o", "a.safetensors"), 2, "a.safetensors is already there")],
)  # fmt: skip
def test_a_mistake_is_told_and_nothing_is_written(arguments, code, message, file, tav):
    before = file.read_bytes()
    result = tav("cast", "a.safetensors", *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert [*file.parent.iterdir()] == [file]
    assert file.read_bytes() == before
