"""Run a suite: tune, edit and score every case by every method; what is there already is not made again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tav_peft.errors import TavError
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.pocket import truth
from tav_peft.recipe import EditingSection, Recipe
from tav_peft.scoring import score
from tav_peft.suite.cases import Case
from tav_peft.suite.loveu import write_edit
from tav_peft.suite.methods import METHODS, start_of
from tav_peft.tuning import tune
from tav_peft.video.clip import Clip
from tav_peft.whole import whole

SUBMISSIONS = "submissions"
Progress = Callable[[int, int, float], None]  # rows done, rows in all, seconds left


@dataclasses.dataclass(frozen=True)
class Suite:
    """What is run: cases by methods by seeds, on one base with one recipe, scored by named models."""

    cases: Sequence[Case]
    methods: Sequence[str]
    recipe: Recipe
    base: str = "pocket"
    seeds: int = 1
    clip_model: str = "pocket-clip"
    pick_model: str | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise TavError(f"{', '.join(unknown)}: no such method. There are {', '.join(METHODS)}.")

    def settings(self) -> dict[str, Any]:
        """Say what a stopped run must share with the one that goes on; cases, methods and seeds may be added."""
        recipe = self.recipe.model_dump(mode="json")
        return {
            "base": self.base,
            "recipe": recipe,
            "clip_model": self.clip_model,
            "pick_model": self.pick_model,
        }

    def rows(self) -> list[tuple[Case, str, int]]:
        """List what is made: a case by a method with a seed, each with its four edits."""
        return [(c, m, s) for c in self.cases for s in range(self.seeds) for m in self.methods]


def run(suite: Suite, out: Path, *, jobs: int = 1, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Run what is not there yet, in `jobs` processes of a case each, and return all rows.

    Edits are written in the layout of LOVEU-TGVE's submissions, `submissions/<method>/<set>/<name>/<kind>/00000.jpg`.

    Raises:
        TavError: when the folder holds a suite of other settings, or a case cannot be tuned or edited.

    """
    _keep_settings(suite, out)
    before, began = _done(suite, out), time.monotonic()

    def tell() -> None:
        done, total = _done(suite, out), len(suite.rows())
        pace = (time.monotonic() - began) / max(1, done - before)
        if progress is not None:
            progress(done, total, pace * (total - done))

    todo = [case for case in suite.cases if _left(suite, case, out)]
    if jobs == 1:
        for case in todo:
            run_case(suite, case, out, tell)
    elif todo:
        _in_processes(suite, todo, out, jobs, tell)
    return read_rows(suite, out)


@dataclasses.dataclass(frozen=True)
class _Bench:
    """A case on a pipeline, and where its results go."""

    suite: Suite
    case: Case
    out: Path
    pipe: TuneAVideoPipeline
    clip: Clip


class _Setup(NamedTuple):
    """What methods share: one tuned adapter, or the base in a variant."""

    settings: tuple[str, ...]
    tuned: bool
    seed: int


def run_case(suite: Suite, case: Case, out: Path, tell: Callable[[], None] = lambda: None) -> None:
    """Make the rows of one case that are not there yet."""
    pipe = TuneAVideoPipeline.from_pretrained(suite.base)
    pipe.set_progress_bar_config(disable=True)
    bench = _Bench(suite, case, out, pipe, case.clip(**suite.recipe.clip.model_dump()))
    setups: dict[_Setup, list[str]] = {}
    for name, seed in _left(suite, case, out):
        setups.setdefault(_Setup(METHODS[name].settings, METHODS[name].tuned, seed), []).append(name)
    for setup, names in setups.items():
        with _prepared(bench, setup) as recipe:
            starts: dict[str, Any] = {}
            for name in names:
                kind, steps = METHODS[name].start, recipe.editing.num_inference_steps
                if kind not in starts:
                    starts[kind] = start_of(METHODS[name], pipe, bench.clip, steps=steps, seed=setup.seed)
                about = {"set": case.group, "clip": case.name, "method": name, "seed": setup.seed}
                rows = [{**about, **row} for row in _edits(bench, name, starts[kind], recipe.editing)]
                with whole(_row_file(out, case, name, setup.seed), TavError) as part:
                    part.write_text(json.dumps(rows, indent=1))
                tell()


def read_rows(suite: Suite, out: Path) -> list[dict[str, Any]]:
    """Read all rows that are there: set, clip, method, seed, kind, prompt, depth, guidance, and scores by name."""
    files = [_row_file(out, *row) for row in suite.rows()]
    return [row for file in files if file.is_file() for row in json.loads(file.read_text())]


def _edits(bench: _Bench, name: str, start: Any, how: EditingSection) -> Iterator[dict[str, Any]]:
    """Make, keep and score the edits of a case by a method."""
    (inversion, noise), suite, case = start, bench.suite, bench.case
    for kind, prompt in case.prompts.items():
        depth, guidance = METHODS[name].of(kind, how.depth, how.guidance_scale)
        depth = depth if inversion else 1.0
        ideal = truth.asked_of(case.truth, prompt) if case.truth else None
        if METHODS[name].start == "drawn":
            if ideal is None:
                continue
            edit = ideal.render()
        else:
            (edit,) = bench.pipe(
                prompt, inversion=inversion, latents=noise, num_inference_steps=how.num_inference_steps,
                guidance_scale=guidance, depth=depth, negative_prompt=how.negative_prompt, like=bench.clip,
            ).clips  # fmt: skip
        write_edit(bench.out / SUBMISSIONS / name, case, kind, edit)
        scores = score(
            edit, prompt, source=bench.clip, caption=case.caption, ideal=ideal,
            clip_model=suite.clip_model, pick_model=suite.pick_model,
        )  # fmt: skip
        told = {each.name: each.in_json() for each in scores}
        yield {"kind": kind, "prompt": prompt, "depth": depth, "guidance": guidance, "scores": told}


@contextlib.contextmanager
def _prepared(bench: _Bench, setup: _Setup) -> Iterator[Recipe]:
    """Load the adapter of these settings, tuned now if it is not there; or give the base in their variant."""
    first, pipe, case = bench.suite.recipe.training.seed, bench.pipe, bench.case
    recipe = bench.suite.recipe.override([*setup.settings, f"training.seed={first + setup.seed}"])
    if not setup.tuned:
        with pipe.unet.as_variant(recipe.model):
            yield recipe
        return
    stem = re.sub(r"[^\w.=]+", "-", "_".join(setup.settings) or "recipe")
    file = bench.out / "adapters" / case.group / case.name / f"{stem}-{setup.seed}.safetensors"
    if not file.exists():
        tune(pipe, bench.clip, case.caption, recipe, output=file)
    pipe.load_adapter(file, "suite")
    try:
        yield recipe
    finally:
        pipe.unload_adapter("suite")


def _in_processes(
    suite: Suite, cases: Sequence[Case], out: Path, jobs: int, tell: Callable[[], None]
) -> None:
    """Give each process a case at a time; the first that fails stops the run, and what is done stays."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        running: list[Future[None]] = [pool.submit(run_case, suite, case, out) for case in cases]
        try:
            while not all(each.done() for each in running):
                tell()
                time.sleep(2)
                for each in running:
                    if each.done():
                        each.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    for each in running:
        each.result()
    tell()


def _keep_settings(suite: Suite, out: Path) -> None:
    file, own = out / "suite.json", suite.settings()
    if not file.exists():
        with whole(file, TavError) as part:
            part.write_text(json.dumps(own, indent=1))
    elif json.loads(file.read_text()) != json.loads(json.dumps(own)):
        raise TavError(f"{out} holds a suite with another base, recipe or model. Choose another folder.")


def _row_file(out: Path, case: Case, method: str, seed: int) -> Path:
    return out / "rows" / case.group / case.name / f"{method}-{seed}.json"


def _left(suite: Suite, case: Case, out: Path) -> list[tuple[str, int]]:
    """List the methods and seeds of a case that are not there yet."""
    return [(m, s) for c, m, s in suite.rows() if c.key == case.key and not _row_file(out, c, m, s).exists()]


def _done(suite: Suite, out: Path) -> int:
    return sum(_row_file(out, *row).exists() for row in suite.rows())
