"""`tav suite`: many clips edited by many methods, scored, with tables, plots and contact sheets."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated

from typer import Option

from tav_peft.cli import console, options

SETTINGS = ("editing.num_inference_steps=25",)
QUICK_SETTINGS = ("training.steps=50", "editing.num_inference_steps=15")


def command(  # noqa: PLR0913  (a parameter is an option)
    output: Annotated[Path, Option("--output", "-o", help="A folder; a stopped run in it goes on.")],
    *,
    data: Annotated[
        Path | None,
        Option(help="LOVEU-TGVE-2023's folder: its CSV and frames. Not given: pocket's sixteen clips."),
    ] = None,
    quick: Annotated[
        bool, Option("--quick", help="Four of pocket's clips, seven methods, fewer steps.")
    ] = False,
    method: Annotated[
        list[str] | None, Option(help="A row of the table, by name; repeatable. Not given: all.")
    ] = None,
    base: Annotated[str, Option(help="As of tav tune.")] = "pocket",
    recipe: Annotated[str, Option(help="A shipped recipe or a file.")] = "pocket",
    settings: Annotated[
        list[str] | None,
        Option("--set", help="A setting of the recipe, such as training.steps=100; repeatable."),
    ] = None,
    seeds: Annotated[int, Option(min=1, help="How many seeds of tuning and noise.")] = 1,
    clip_model: Annotated[str, Option(help="As of tav score.")] = "pocket-clip",
    pick_model: Annotated[str | None, Option(help="As of tav score.")] = None,
    thorough: Annotated[
        bool,
        Option("--thorough", help="All of the methods on all clips; of pocket's, most are on four only."),
    ] = False,
    device: options.Device = None,
    jobs: Annotated[int, Option(min=1, help="Processes, each with one thread and a clip at a time.")] = 1,
    as_json: options.AsJson = False,
) -> None:
    """Edit many clips by the paper's method and by what it is compared with, and say what holds, with intervals."""
    from tav_peft.recipe import Recipe
    from tav_peft.suite import run_suite
    from tav_peft.suite.loveu import read_cases
    from tav_peft.suite.methods import METHODS, QUICK
    from tav_peft.suite.pocket_cases import QUICK as QUICK_CLIPS
    from tav_peft.suite.pocket_cases import pocket_cases
    from tav_peft.suite.rows import Suite

    options.hush()
    cases = read_cases(data) if data else pocket_cases()
    if quick:
        cases = cases[:4] if data else [case for case in cases if case.name in QUICK_CLIPS]
    suite = Suite(
        cases, tuple(method or (QUICK if quick else METHODS)),
        Recipe.load(recipe).override([*(QUICK_SETTINGS if quick else () if data else SETTINGS), *(settings or ())]),
        base, seeds, clip_model, pick_model, None if data or thorough or quick else QUICK_CLIPS,
        options.place_of(device),
    )  # fmt: skip
    with console.progress_bar("editing") as moved:

        def tell(done: int, total: int, left: float) -> None:
            moved(done, total, f"{timedelta(seconds=round(left))} left" if done else "")

        made = run_suite(suite, output, jobs=jobs, progress=tell)
    console.report([made["table"], made["plot"], *made["sheets"]], made, as_json)
