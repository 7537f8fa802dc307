"""`tav recipes`: the list, and one to copy."""

import json

import pytest

from tav_peft.recipe import Recipe, shipped, shipped_text


def test_the_list_has_each_recipe_with_its_description(tav):
    lines = tav("recipes").stdout.splitlines()
    assert len(lines) == len(shipped()) > 0
    for name, line in zip(shipped(), lines, strict=True):
        assert line.split(maxsplit=1) == [name, Recipe.load(name).description]


@pytest.mark.parametrize("name", shipped())
def test_a_recipe_is_printed_as_it_was_written(tav, name):
    assert tav("recipes", name).stdout == shipped_text(name)


def test_json_is_one_object(tav):
    assert list(json.loads(tav("recipes", "--json").stdout)["recipes"]) == shipped()
    assert json.loads(tav("recipes", "lite", "--json").stdout) == Recipe.load("lite").model_dump(mode="json")


def test_a_recipe_that_is_not_there_is_exit_code_1(tav):
    result = tav("recipes", "lit")
    assert result.exit_code == 1
    assert "Did you mean 'lite'?" in result.stderr
