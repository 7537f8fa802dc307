"""Run a suite: tune, edit and score every case by every method; what is there already is not made again."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tav_peft.errors import TavError
from tav_peft.recipe import Recipe
from tav_peft.suite.cases import Case
from tav_peft.suite.one_case import run_case
from tav_peft.suite.rows import Suite, read_rows, rows_done, rows_left
from tav_peft.whole import whole

Progress = Callable[[int, int, float], None]  # rows done, rows in all, seconds left


def run(suite: Suite, out: Path, *, jobs: int = 1, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Run what is not there yet, in `jobs` processes of a case each, and return all rows.

    Edits are written in the layout of LOVEU-TGVE's submissions, `submissions/<method>/<set>/<name>/<kind>/00000.jpg`.

    Raises:
        TavError: when the folder holds a suite of other settings, or a case cannot be tuned or edited.

    """
    _keep_settings(suite, out)
    before, began = rows_done(suite, out), time.monotonic()

    def tell() -> None:
        done, total = rows_done(suite, out), len(suite.rows())
        pace = (time.monotonic() - began) / max(1, done - before)
        if progress is not None:
            progress(done, total, pace * (total - done))

    todo = [case for case in suite.cases if rows_left(suite, case, out)]
    if jobs == 1:
        for case in todo:
            run_case(suite, case, out, tell)
    elif todo:
        _in_processes(suite, todo, out, jobs, tell)
    return read_rows(suite, out)


def _in_processes(
    suite: Suite, cases: Sequence[Case], out: Path, jobs: int, tell: Callable[[], None]
) -> None:
    """Give each process a case at a time; the first that fails stops the run, and what is done stays."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=begin_process) as pool:
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


def begin_process() -> None:
    """Give a process one thread, and have it end with the one that started it, however that one ends."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # nothing is half written: files take their names when they are whole


def _keep_settings(suite: Suite, out: Path) -> None:
    file, own = out / "suite.json", suite.settings()
    if not file.exists():
        with whole(file, TavError) as part:
            part.write_text(json.dumps(own, indent=1))
    elif _as_now(json.loads(file.read_text())) != json.loads(json.dumps(own)):
        raise TavError(f"{out} holds a suite with another base, recipe or model. Choose another folder.")


def _as_now(kept: dict[str, Any]) -> dict[str, Any]:
    """Give the settings of a suite with a recipe that has all that recipes have now, which it did without."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        return kept | {"recipe": Recipe.model_validate(kept["recipe"]).model_dump(mode="json")}
    return kept
