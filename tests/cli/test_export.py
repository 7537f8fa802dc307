"""`tav export`: formats by name."""

import json
from pathlib import Path


def test_a_format_is_chosen_by_name(library, tav):
    result = tav("export", "a.safetensors", "--to", "peft", "-o", "folder", "--json")
    assert json.loads(result.stdout) == {"exported": "folder", "format": "peft"}
    assert library.exports == [Path("folder")]


def test_an_unknown_format_is_told_with_the_known_ones(library, tav):
    result = tav("export", "a.safetensors", "--to", "pefd", "-o", "folder")
    assert result.exit_code == 2
    assert "pefd is no format. Choose from peft, official." in result.stderr


def test_what_is_there_is_kept_unless_it_may_be_replaced(library, tav):
    Path("folder").mkdir()
    command = ("export", "a.safetensors", "--to", "peft", "-o", "folder")
    assert [tav(*command).exit_code, tav(*command, "--overwrite").exit_code] == [2, 0]


def test_a_whole_model_is_written_on_the_base_that_is_named_or_recorded(library, tav):
    command = ("export", "a.safetensors", "--to", "official", "-o", "folder")
    assert [tav(*command).exit_code, tav(*command, "--base", "sd").exit_code] == [0, 0]
    assert library.bases == ["pocket", "sd"]
    assert library.exports == [Path("folder")] * 2


def test_a_base_where_none_is_written_is_refused(library, tav):
    result = tav("export", "a.safetensors", "--to", "peft", "--base", "sd", "-o", "folder")
    assert result.exit_code == 2
    assert "peft has nothing of the base in it" in result.stderr
    assert library.exports == []
