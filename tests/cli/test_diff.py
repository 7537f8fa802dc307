"""`tav diff` on real adapters: rows for a person, an object for a program, and 0 whether they differ or not."""

import json

import pytest

from tav_peft.tools.comparing import compare


@pytest.fixture
def files(make_adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_adapter("hybrid", rank=2).save(tmp_path / "a.safetensors")
    make_adapter("lite", rank=4, seed=1, temporal_seed=7).save(tmp_path / "b.safetensors")


def test_a_person_reads_headers_parts_and_updates(files, tav):
    result = tav("diff", "a.safetensors", "b.safetensors")
    assert result.exit_code == 0
    found, lines = compare("a.safetensors", "b.safetensors"), result.stdout.splitlines()
    cells = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert cells["temporal_init.seed"] == ["0", "7"]
    assert cells["peft_config.r"] == ["2", "4"]
    assert cells["st_attn"] == [f"{found.parts()['st_attn']:.4g}"]
    first = found.updates[0]
    assert cells[first.parameter] == [f"{first.distance:.4g}", f"{first.cosine:.4g}"]
    assert "7 parameters only in A, first down_blocks.0" in result.stdout
    assert "its weights are compared" in result.stderr


def test_a_program_gets_one_object(files, tav):
    told = json.loads(tav("diff", "a.safetensors", "b.safetensors", "--json").stdout)
    found = compare("a.safetensors", "b.safetensors")
    assert told["parts"] == found.parts()
    assert told["header"]["temporal_init.seed"] == [0, 7]
    assert told["updates"][3]["cosine"] == found.updates[3].cosine
    assert (told["equal"], told["t_attn"], len(told["only_a"])) == (False, "weights", 7)


def test_equal_adapters_are_called_equal(files, tav):
    result = tav("diff", "a.safetensors", "a.safetensors")
    assert (result.exit_code, result.stdout) == (0, "All updates are equal.\n")


def test_a_missing_file_is_told(files, tav):
    result = tav("diff", "a.safetensors", "c.safetensors")
    assert result.exit_code == 1
    assert "c.safetensors does not exist" in result.stderr
