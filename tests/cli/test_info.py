"""`tav info`: what an adapter is, for a person and for a program."""

import json


def test_a_person_reads_names_and_values_without_what_is_empty(library, tav):
    lines = [line.split(maxsplit=1) for line in tav("info", "a[1].safetensors").stdout.splitlines()]
    told = dict(lines)
    assert told["file"] == "a[1].safetensors"
    assert told["parts.t_attn.bytes"] == "10"
    assert told["provenance.caption"] == "a rabbit on grass"
    assert told["provenance.recipe.clip.size"] == "64, 64"
    assert "alpha" not in told


def test_a_program_reads_one_object(library, tav):
    told = json.loads(tav("info", "a.safetensors", "--json").stdout)
    assert (told["file"], told["preset"], told["alpha"]) == ("a.safetensors", "lite", None)
    assert told["provenance"]["recipe"]["training"]["steps"] == 200
