"""A suite runs what is missing and nothing twice, in one process or more, and writes tables, plot and sheets."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tav_peft.cli.main import app
from tav_peft.errors import TavError
from tav_peft.recipe import Recipe
from tav_peft.suite import run_suite, running
from tav_peft.suite.cases import KINDS, Case
from tav_peft.suite.loveu import read_cases
from tav_peft.suite.running import Suite, run

RECIPE = Recipe.load("pocket").override(
    ["clip.frames=2", "clip.size=32", "training.steps=2", "editing.num_inference_steps=2"]
)
METHODS = ("full", "no_inversion", "no_tuning", "sdedit_50")


@pytest.fixture
def suite(base, clip, tmp_path):
    """Two short clips on the tiny base, whose tokenizer spells most words in letters."""
    cases = []
    for name in ("one", "two"):
        frames = clip.write(tmp_path / "data" / "set" / "480p_frames" / name)
        cases.append(Case("set", name, "a man", dict.fromkeys(KINDS, f"{name} man"), frames))
    return Suite(cases, METHODS, RECIPE, base=str(base))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_every_case_is_edited_four_ways_by_every_method(suite, out):
    told = []
    rows = run(suite, out, progress=lambda *step: told.append(step))
    assert [(row["clip"], row["method"], row["kind"]) for row in rows] == [
        (case.name, method, kind) for case in suite.cases for method in METHODS for kind in KINDS
    ]
    assert [step[:2] for step in told] == [(n, 8) for n in range(1, 9)]
    assert told[-1][2] == 0
    assert {"textual_alignment", "warp_error", "directional_similarity"} <= set(rows[0]["scores"])
    for method in METHODS:
        frames = sorted((out / "submissions" / method / "set" / "two" / "style").iterdir())
        assert [frame.name for frame in frames] == ["00000.jpg", "00001.jpg"]


def test_each_method_edits_in_its_own_way(suite, out):
    run(suite, out)
    made = {
        m: np.asarray(Image.open(out / "submissions" / m / "set/one/style/00000.jpg")).astype(int)
        for m in METHODS
    }
    for one in METHODS:
        for two in METHODS:
            assert one == two or np.abs(made[one] - made[two]).max() > 3


def test_what_is_there_is_not_made_again(suite, out, monkeypatch):
    first = run(suite, out)
    monkeypatch.setattr(running, "TuneAVideoPipeline", None)  # nothing is loaded
    assert run(suite, out) == first


def test_a_row_that_is_missing_is_made_again_from_the_same_adapter(suite, out, monkeypatch):
    first = run(suite, out)
    (out / "rows" / "set" / "one" / "full-0.json").unlink()
    monkeypatch.setattr(running, "tune", None)  # nothing is tuned
    assert run(suite, out) == first


def test_a_folder_of_other_settings_is_refused(suite, out, base):
    run(suite, out)
    other = Suite(suite.cases, METHODS, RECIPE.override(["training.steps=3"]), base=str(base))
    with pytest.raises(TavError, match="holds a suite with another base, recipe or model"):
        run(other, out)


def test_an_unknown_method_names_the_known(suite):
    with pytest.raises(TavError, match=r"fool: no such method\. There are ideal, full"):
        Suite(suite.cases, ("fool",), RECIPE)


def size_of(picture):
    with Image.open(picture) as opened:
        return opened.size


def test_the_results_are_a_table_a_plot_and_a_sheet_for_each_kind(suite, out):
    made = run_suite(suite, out)
    assert made["edits"] == 32
    assert "32 edits: 2 clips, 1 seed, 4 methods" in made["table"].read_text()
    assert len(made["csv"].read_text().splitlines()) == 33
    assert size_of(made["plot"])[0] > 500
    assert [sheet.name for sheet in made["sheets"]] == [f"sheet-{kind}.png" for kind in KINDS]
    # the source and four methods, of two clips with four frames each
    assert size_of(made["sheets"][0]) == (6 + 8 * 70, 6 + 5 * 94)


def test_loveus_layout_goes_through_the_same_runner(loveu, tmp_path, out):
    case = read_cases(loveu)[0]
    recipe = RECIPE.override(["clip.size=64"])
    rows = run(Suite([case], ("no_tuning",), recipe), out)
    assert [row["prompt"] for row in rows] == list(case.prompts.values())
    assert (out / "submissions" / "no_tuning" / "DAVIS_480p" / case.name / "multiple" / "00001.jpg").exists()


@pytest.mark.slow
def test_two_processes_make_what_one_does(suite, out, tmp_path):
    assert run(suite, out, jobs=2) == run(suite, tmp_path / "alone")


@pytest.mark.slow
def test_the_command_runs_a_quick_suite(out):
    words = [
        "suite",
        "-o",
        str(out),
        "--quick",
        "--method",
        "full",
        "--method",
        "no_inversion",
        "--jobs",
        "2",
        "--json",
    ]
    few = ["--set", "training.steps=2", "--set", "editing.num_inference_steps=2"]
    done = CliRunner().invoke(app, [*words, *few])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["edits"] == 32
    assert "recognised object" in (out / "results.md").read_text()
