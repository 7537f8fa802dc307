"""Headers and recipes that nobody would write, drawn by Hypothesis: read, or refused in words that name the file."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tav_peft.adapter import Adapter, parse_config, parse_provenance
from tav_peft.errors import AdapterError, RecipeError
from tav_peft.formats.lora_config import LoraConfigText
from tav_peft.header import read_header
from tav_peft.recipe import Recipe
from tav_peft.tensor_file import read_tensors, write_tensors

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(
    ["../../x", "/etc/passwd", "nan", "lite", "LORA", "(", "\0", "9" * 5000]
)  # fmt: skip
ANY = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
NESTED = "[" * 100_000
few = settings(max_examples=120, deadline=None, database=None, derandomize=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("drawn")


@pytest.fixture(scope="module")
def recorded():
    from pathlib import Path

    path = Path(__file__).parents[1] / "recorded" / "format-1" / "lite.safetensors"
    tensors, metadata = read_tensors(path)
    return tensors, metadata, json.loads(metadata["tav_peft"]), json.loads(metadata["peft_config"])


def one_line(error, name):
    assert name in str(error)
    assert "\n" not in str(error)


@few
@given(st.data())
def test_a_header_with_any_value_in_any_place(recorded, data):
    _, _, provenance, config = recorded
    for given_, read in ((provenance, parse_provenance), (config, None)):
        key = data.draw(st.sampled_from(sorted(given_)) | st.text(max_size=8))
        text = json.dumps({**given_, key: data.draw(ANY)})
        try:
            if read is not None:
                read(text, "a.safetensors")
            else:
                parse_config(text, parse_provenance(json.dumps(provenance), "a"), "a.safetensors")
                LoraConfigText(text, "a.safetensors")
        except AdapterError as error:
            one_line(error, "a.safetensors")


@few
@given(st.text(max_size=200))
@example(NESTED)
@example('{"format_version": ' + "9" * 5000 + "}")
def test_a_header_of_any_text(folder, recorded, text):
    tensors, _, _, _ = recorded
    for entry in ("tav_peft", "peft_config", "modelspec.thumbnail"):
        metadata = {name: value for name, value in recorded[1].items() if not name.endswith("sha256")}
        path = write_tensors(folder / "a.safetensors", tensors, {**metadata, entry: text})
        read_header(path)
        try:
            Adapter.load(path)
        except AdapterError as error:
            one_line(error, "a.safetensors")
        else:
            assert json.loads(text) == json.loads(recorded[1][entry])


@few
@given(
    st.dictionaries(st.sampled_from(["training", "adapter", "clip", "name", "edits", "x"]), ANY, max_size=3)
)
def test_a_recipe_of_any_values(folder, values):
    path = folder / "drawn.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")  # which YAML reads too, but for a few
    _reads_or_refuses(path)


@few
@given(st.text(alphabet=" abtrn:-[]{}&*!|>'\"\n\t#%@`,?0.é\u2028", max_size=80))
@example(NESTED)
@example("a: &a [*a, *a]")
@example("training: {steps: !!python/object/apply:os.system [true]}")
def test_a_recipe_of_any_text(folder, text):
    path = folder / "drawn.yaml"
    path.write_text(text, encoding="utf-8")
    _reads_or_refuses(path)


def _reads_or_refuses(path):
    try:
        recipe = Recipe.load(path)
    except RecipeError as error:
        assert "drawn.yaml" in str(error)  # noqa: PT017  (it may be read as well)
        return
    again = path.with_name("again.yaml")
    again.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.load(again) == recipe
