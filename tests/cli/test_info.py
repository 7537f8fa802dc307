"""`tav info`: what an adapter is, for a person and for a program."""

import json
import re

import pytest

from tav_peft.formats import peft
from tav_peft.tools.spectra import measure, norm


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


def test_every_update_has_a_row_and_every_part_a_sum(adapter, tav):
    spectra = measure(adapter)
    lines = tav("info", "a[1].safetensors", "--modules").stdout.split("\n\n")[1].splitlines()
    head, *rows = (re.split(r"  +", line) for line in lines)
    assert head[:4] == ["update", "shape", "form", "‖ΔW‖"]
    assert head[-1] == "kept by 32"
    assert [row[0] for row in rows] == [
        *(s.parameter for s in spectra),
        "st_attn",
        "cross_attn",
        "t_attn",
        "all",
    ]
    assert rows[0][1:4] == ["16x16", "rank 4, alpha 4", f"{spectra[0].norm:.4g}"]
    assert rows[-1][1:3] == ["49 updates", f"{norm(spectra):.4g}"]


def test_a_program_gets_all_singular_values(adapter, tav, tmp_path):
    result = tav("info", "a[1].safetensors", "--modules", "--json", "--plot", "a.png")
    told, spectra = json.loads(result.stdout), measure(adapter)
    assert [row["values"] for row in told["updates"]] == [list(s.values) for s in spectra]
    assert told["updates"][0]["energy"]["2"] == spectra[0].energy(2)
    assert told["totals"]["all"]["norm"] == norm(spectra)
    assert told["plot"] == "a.png"
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert "updates" not in json.loads(tav("info", "a[1].safetensors", "--json").stdout)


def test_a_picture_that_is_there_is_kept(adapter, tav, tmp_path):
    (tmp_path / "a.png").write_bytes(b"mine")
    result = tav("info", "a[1].safetensors", "--plot", "a.png")
    assert result.exit_code == 2
    assert "a.png is already there" in result.stderr
    assert (tmp_path / "a.png").read_bytes() == b"mine"
