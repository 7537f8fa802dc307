"""`tav info`: what an adapter is, for a person and for a program."""

import json

import pytest

from tav_peft.formats import peft


@pytest.fixture
def adapter(make_adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = make_adapter("hybrid", rank=4)
    made.save(tmp_path / "a[1].safetensors")
    return made


def test_a_person_reads_names_and_values_without_what_is_empty(adapter, tav):
    lines = [line.split(maxsplit=1) for line in tav("info", "a[1].safetensors").stdout.splitlines()]
    told = dict(lines)
    assert told["file"] == "a[1].safetensors"
    assert told["parts.t_attn.bytes"] == str(adapter.summary()["parts"]["t_attn"]["bytes"])
    assert told["provenance.caption"] == "a square"
    assert told["provenance.clip.indices"] == "0, 2, 4"
    assert "provenance.merged_from" not in told


def test_a_program_reads_one_object(adapter, tav):
    told = json.loads(tav("info", "a[1].safetensors", "--json").stdout)
    assert (told["file"], told["preset"], told["alpha"]) == ("a[1].safetensors", "hybrid", 4)
    assert told["provenance"] == adapter.provenance.model_dump(mode="json")


def test_of_a_folder_it_tells_the_same(adapter, tav, tmp_path):
    peft.write(adapter, tmp_path / "folder")
    told, folder = (json.loads(tav("info", name, "--json").stdout) for name in ("a[1].safetensors", "folder"))
    assert {**told, "file": ""} == {**folder, "file": ""}


def test_what_is_no_adapter_is_told_with_the_reason(adapter, tav, tmp_path):
    whole = (tmp_path / "a[1].safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-7])
    result = tav("info", "cut.safetensors")
    assert result.exit_code == 1
    assert "cut.safetensors is not a whole safetensors file" in result.stderr
