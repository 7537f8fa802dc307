"""One case of a suite: tuned, edited and scored by each method that is not there yet."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tav_peft.errors import TavError
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.pocket import truth
from tav_peft.pocket.clips import PocketClip
from tav_peft.recipe import EditingSection, Precision, Recipe
from tav_peft.scoring import score
from tav_peft.shapes import DTYPES, precision_on
from tav_peft.suite.cases import Case
from tav_peft.suite.loveu import write_edit
from tav_peft.suite.methods import METHODS, start_of
from tav_peft.suite.rows import Suite, adapter_file, row_file, rows_left
from tav_peft.suite.temporal_start import TemporalStart, started_from
from tav_peft.trail import Trail
from tav_peft.tuning import tune
from tav_peft.video.clip import Clip
from tav_peft.whole import whole

SUBMISSIONS = "submissions"


@dataclasses.dataclass(frozen=True)
class _Bench:
    """A case, where its results go, and the pipelines that it was needed on."""

    suite: Suite
    case: Case
    out: Path
    clip: Clip
    pipes: dict[Precision, TuneAVideoPipeline] = dataclasses.field(default_factory=dict)

    def pipe(self, precision: Precision) -> TuneAVideoPipeline:
        """Give the base with weights of a precision, loaded once."""
        if precision not in self.pipes:
            pipe = TuneAVideoPipeline.from_pretrained(self.suite.base, dtype=DTYPES[precision])
            pipe.set_progress_bar_config(disable=True)
            self.pipes[precision] = pipe.to(self.suite.device)
        return self.pipes[precision]


class _Setup(NamedTuple):
    """What methods share: one tuned adapter, or the base in a variant."""

    settings: tuple[str, ...]
    tuned: bool
    temporal: TemporalStart
    step: int | None
    strength: float
    precision: Precision
    seed: int


def run_case(suite: Suite, case: Case, out: Path, tell: Callable[[], None] = lambda: None) -> None:
    """Make the rows of one case that are not there yet."""
    bench = _Bench(suite, case, out, case.clip(**suite.recipe.clip.model_dump()))
    setups: dict[_Setup, list[str]] = {}
    for name, seed in rows_left(suite, case, out):
        own, precision = METHODS[name], METHODS[name].precision or precision_on(suite.device)
        strength = own.strength_of(suite.recipe.editing)
        setup = _Setup(own.settings, own.tuned, own.temporal, own.step, strength, precision, seed)
        setups.setdefault(setup, []).append(name)
    for setup, names in setups.items():
        with _prepared(bench, setup) as (pipe, recipe):
            starts: dict[str, Any] = {}
            made: _Made = {}
            for name in names:
                kind, steps = METHODS[name].start, recipe.editing.num_inference_steps
                if kind not in starts:
                    starts[kind] = start_of(METHODS[name], pipe, bench.clip, steps=steps, seed=setup.seed)
                about = {"set": case.group, "clip": case.name, "method": name, "seed": setup.seed}
                rows = [
                    {**about, **row} for row in _edits(bench, pipe, name, starts[kind], recipe.editing, made)
                ]
                with whole(row_file(out, case, name, setup.seed), TavError) as part:
                    part.write_text(json.dumps(rows, indent=1))
                tell()


_Made = dict[Any, tuple[Clip, dict[str, Any]]]  # edits and their scores, which methods of one setup may share


def _edits(
    bench: _Bench, pipe: TuneAVideoPipeline, name: str, start: Any, how: EditingSection, made: _Made
) -> Iterator[dict[str, Any]]:
    """Make, keep and score the edits of a case by a method."""
    method, case = METHODS[name], bench.case
    for kind, prompt in case.prompts.items():
        depth, guidance, injection = method.of(kind, prompt, case.caption, how)
        depth = depth if start[0] else 1.0
        ideal = truth.asked_of(case.truth, prompt) if case.truth else None
        if method.start == "drawn" and ideal is None:
            continue
        key = (kind, method.start, depth, guidance, injection, *method.sampling.items())
        if key not in made:
            if method.start == "drawn":
                assert ideal is not None
                edit = ideal.render()
            else:
                (edit,) = pipe(
                    prompt, inversion=start[0], latents=start[1], num_inference_steps=how.num_inference_steps,
                    guidance_scale=guidance, depth=depth, negative_prompt=how.negative_prompt, like=bench.clip,
                    injection=injection, **method.sampling,
                ).clips  # fmt: skip
            made[key] = edit, _scored(bench, edit, prompt, ideal)
        edit, scores = made[key]
        write_edit(bench.out / SUBMISSIONS / name, case, kind, edit)
        yield {"kind": kind, "prompt": prompt, "depth": depth, "guidance": guidance, "scores": scores}


def _scored(bench: _Bench, edit: Clip, prompt: str, ideal: PocketClip | None) -> dict[str, Any]:
    scores = score(
        edit, prompt, source=bench.clip, caption=bench.case.caption, ideal=ideal,
        clip_model=bench.suite.clip_model, pick_model=bench.suite.pick_model,
    )  # fmt: skip
    return {each.name: each.in_json() for each in scores}


@contextlib.contextmanager
def _prepared(bench: _Bench, setup: _Setup) -> Iterator[tuple[TuneAVideoPipeline, Recipe]]:
    """Load the adapter of these settings, tuned now if it is not there; or give the base in their variant."""
    first, pipe = bench.suite.recipe.training.seed, bench.pipe(setup.precision)
    recipe = bench.suite.recipe.override([*setup.settings, f"training.seed={first + setup.seed}"])
    if not setup.tuned:
        with pipe.unet.as_variant(recipe.model):
            yield pipe, recipe
        return
    pipe.load_adapter(_adapter(bench, setup, recipe), "suite", strength=setup.strength)
    try:
        yield pipe, recipe
    finally:
        pipe.unload_adapter("suite")


def _adapter(bench: _Bench, setup: _Setup, recipe: Recipe) -> Path:
    """Give the file of the adapter that a setup asks for, tuned now if it is not there."""
    case = bench.case
    settings = [*setup.settings, *([] if setup.temporal == "drawn" else [setup.temporal])]
    file = adapter_file(bench.out, case, settings, setup.seed)
    if not file.exists():
        pipe = bench.pipe(recipe.training.precision)
        with started_from(pipe.unet, setup.temporal, recipe.training.seed):
            tune(pipe, bench.clip, case.caption, recipe, output=file)
    return Trail(file).at_step(setup.step) if setup.step not in (None, recipe.training.steps) else file
