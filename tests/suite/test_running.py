"""A suite runs what is missing and nothing twice, in one process or more, and writes tables, plot and sheets."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tav_peft.adapter import Adapter
from tav_peft.cli.main import app
from tav_peft.errors import TavError
from tav_peft.recipe import Recipe
from tav_peft.suite import one_case, rows, run_suite
from tav_peft.suite.cases import KINDS, Case
from tav_peft.suite.loveu import read_cases
from tav_peft.suite.methods import Method
from tav_peft.suite.rows import Suite
from tav_peft.suite.running import run
from tav_peft.trail import Trail
from tav_peft.video.clip import Clip

RECIPE = Recipe.load("pocket").override(
    ["clip.frames=2", "clip.size=32", "training.steps=2", "editing.num_inference_steps=2"]
)
METHODS = ("full", "no_inversion", "no_tuning", "sdedit_50")
METHOD = Method("steps", ("training.steps=3", "training.save_every=1"))


@pytest.fixture(scope="module")
def suite(base, tmp_path_factory):
    """Two short clips on the tiny base, whose tokenizer spells most words in letters."""
    data, cases = tmp_path_factory.mktemp("data"), []
    pixels = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
    for name in ("one", "two"):
        frames = Clip(pixels, 8.0).write(data / "set" / "480p_frames" / name)
        cases.append(Case("set", name, "a man", dict.fromkeys(KINDS, f"{name} man"), frames))
    return Suite(cases, METHODS, RECIPE, base=str(base))


@pytest.fixture(scope="module")
def ran(suite, tmp_path_factory):
    """Where the suite ran once, its rows, and what it told meanwhile."""
    out, told = tmp_path_factory.mktemp("ran") / "out", []
    return out, run(suite, out, progress=lambda *step: told.append(step)), told


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def again(ran, out):
    """What ran, to be changed."""
    shutil.copytree(ran[0], out)
    return out


def test_every_case_is_edited_four_ways_by_every_method(suite, ran):
    out, rows, told = ran
    assert [(row["clip"], row["method"], row["kind"]) for row in rows] == [
        (case.name, method, kind) for case in suite.cases for method in METHODS for kind in KINDS
    ]
    assert [step[:2] for step in told] == [(n, 8) for n in range(1, 9)]
    assert told[-1][2] == 0
    assert {"textual_alignment", "warp_error", "directional_similarity"} <= set(rows[0]["scores"])
    for method in METHODS:
        frames = sorted((out / "submissions" / method / "set" / "two" / "style").iterdir())
        assert [frame.name for frame in frames] == ["00000.jpg", "00001.jpg"]


def test_each_method_edits_in_its_own_way(ran):
    made = {
        m: np.asarray(Image.open(ran[0] / "submissions" / m / "set/one/style/00000.jpg")).astype(int)
        for m in METHODS
    }
    for one in METHODS:
        for two in METHODS:
            assert one == two or np.abs(made[one] - made[two]).max() > 3


def test_what_is_there_is_not_made_again(suite, ran, again, monkeypatch):
    monkeypatch.setattr(one_case, "TuneAVideoPipeline", None)  # nothing is loaded
    assert run(suite, again) == ran[1]


def test_a_row_that_is_missing_is_made_again_from_the_same_adapter(suite, ran, again, monkeypatch):
    (again / "rows" / "set" / "one" / "full-0.json").unlink()
    monkeypatch.setattr(one_case, "tune", None)  # nothing is tuned
    assert run(suite, again) == ran[1]


def test_a_folder_of_other_settings_is_refused(suite, again):
    other = dataclasses.replace(suite, recipe=RECIPE.override(["training.steps=3"]))
    with pytest.raises(TavError, match="holds a suite with another base, recipe or model"):
        run(other, again)


def test_a_suite_from_before_recipes_had_a_setting_goes_on(suite, ran, again, monkeypatch):
    told = json.loads((again / "suite.json").read_text())
    del told["recipe"]["editing"]["merge_tokens"]
    (again / "suite.json").write_text(json.dumps(told))
    monkeypatch.setattr(one_case, "TuneAVideoPipeline", None)  # nothing is loaded
    assert run(suite, again) == ran[1]


def test_some_methods_are_made_on_a_few_clips_only_and_others_there_with_seeds_of_their_own(suite):
    few = dataclasses.replace(suite, methods=("full", "sdedit_50", "no_tuning"), few=["two"])
    assert [(case.name, method, seed) for case, method, seed in few.rows()] == [
        ("one", "full", 0), ("one", "no_tuning", 0), ("two", "full", 0), ("two", "full", 1), ("two", "full", 2),
        ("two", "sdedit_50", 0), ("two", "no_tuning", 0),
    ]  # fmt: skip


def test_steps_are_taken_from_the_trail_of_one_tuning(suite, out, monkeypatch):
    steps = {f"steps_{n}": dataclasses.replace(METHOD, step=n) for n in (1, 2, 3)}
    monkeypatch.setattr(one_case, "METHODS", steps | one_case.METHODS)
    monkeypatch.setattr(rows, "METHODS", steps | one_case.METHODS)
    tuned, tune = [], one_case.tune
    monkeypatch.setattr(one_case, "tune", lambda *a, **k: tuned.append(k["output"]) or tune(*a, **k))
    run(dataclasses.replace(suite, cases=suite.cases[:1], methods=tuple(steps)), out)
    assert len(tuned) == 1
    made = [Adapter.load(Trail(tuned[0]).at_step(n)) for n in (1, 2)] + [Adapter.load(tuned[0])]
    assert [each.provenance.step for each in made] == [1, 2, 3]
    frames = [Image.open(out / "submissions" / name / "set/one/object/00000.jpg") for name in steps]
    assert len({frame.tobytes() for frame in frames}) == 3


def test_a_method_tunes_in_the_precision_of_its_recipe_and_edits_in_its_own(suite, out, monkeypatch):
    tuned, edited, opened = [], [], one_case.TuneAVideoPipeline.from_pretrained
    tune, start_of = one_case.tune, one_case.start_of
    monkeypatch.setattr(one_case, "tune", lambda *a, **k: tuned.append(a[0].unet.dtype) or tune(*a, **k))
    monkeypatch.setattr(
        one_case, "start_of", lambda *a, **k: edited.append(a[1].unet.dtype) or start_of(*a, **k)
    )
    loads = []
    loading = SimpleNamespace(from_pretrained=lambda *a, **k: loads.append(k["dtype"]) or opened(*a, **k))
    monkeypatch.setattr(one_case, "TuneAVideoPipeline", loading)
    run(dataclasses.replace(suite, cases=suite.cases[:1], methods=("bf16_tuning", "bf16")), out)
    assert tuned == [torch.bfloat16]
    assert edited == [torch.float32, torch.bfloat16]
    assert loads == [torch.float32, torch.bfloat16]


def test_on_a_gpu_edits_are_made_in_half_precision(suite, out, monkeypatch):
    def opened(*_args, **options):
        raise TavError(f"opened in {options['dtype']}")

    monkeypatch.setattr(one_case, "TuneAVideoPipeline", SimpleNamespace(from_pretrained=opened))
    with pytest.raises(TavError, match=r"opened in torch\.float16"):
        run(dataclasses.replace(suite, device="cuda:1"), out)


def test_two_methods_that_ask_for_the_same_edit_share_it(suite, out, monkeypatch):
    calls, edits = [], one_case.score
    monkeypatch.setattr(one_case, "score", lambda *a, **k: calls.append(a[1]) or edits(*a, **k))
    two = "editing.two_changes={depth: 0.5, guidance_scale: 3}"
    plain = ["editing.strength=1", "editing.inject_attention=0", "editing.inject_features=0"]
    recipe = suite.recipe.override([*plain, two])
    case = dataclasses.replace(suite.cases[0], caption="a man on a car")
    prompts = {**dict.fromkeys(KINDS, "one man on a car"), "multiple": "one man on one car"}
    case = dataclasses.replace(case, prompts=prompts)
    both = dataclasses.replace(suite, cases=[case], methods=("full", "automatic"), recipe=recipe)
    made = run(both, out)
    assert len(calls) == 5  # only two changes at once are edited otherwise
    assert [row["scores"] for row in made[:3]] == [row["scores"] for row in made[4:7]]


IN_PROCESSES = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from tav_peft.suite.running import begin_process

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=context, initializer=begin_process)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600)
    time.sleep(600)
"""


def test_the_processes_of_a_killed_run_end_with_it(tmp_path):
    (tmp_path / "run.py").write_text(IN_PROCESSES)
    with subprocess.Popen([sys.executable, tmp_path / "run.py"], stdout=subprocess.PIPE, text=True) as run:
        worker = int(run.stdout.readline())
        assert not ended(worker)
        run.kill()
    until = time.monotonic() + 20
    while not ended(worker) and time.monotonic() < until:
        time.sleep(0.1)
    assert ended(worker)


def ended(process):
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_an_unknown_method_names_the_known(suite):
    with pytest.raises(TavError, match=r"fool: no such method\. There are ideal, full"):
        Suite(suite.cases, ("fool",), RECIPE)


def size_of(picture):
    with Image.open(picture) as opened:
        return opened.size


def test_the_results_are_a_table_a_plot_and_a_sheet_for_each_kind(suite, again):
    made = run_suite(suite, again)
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
def test_two_processes_make_what_one_does(suite, ran, out):
    assert run(suite, out, jobs=2) == ran[1]


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
