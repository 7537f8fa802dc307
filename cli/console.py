"""The two streams: results on stdout, progress and everything said to a person on stderr."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.text import Text

if TYPE_CHECKING:
    from tav_peft.optimizing import TuningStep

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def say(message: str) -> None:
    """Tell a person what happens; brackets in it are text, not markup."""
    err.print(Text(message), soft_wrap=True)


def complain(message: str) -> None:
    """Tell a person what is wrong, in red where there is colour."""
    err.print(Text(message, style="red"), soft_wrap=True)


def print_rows(rows: Mapping[str, Any]) -> None:
    """Print names and values in two columns."""
    width = max(map(len, rows), default=0)
    for name, value in rows.items():
        out.print(Text.assemble((f"{name:<{width}}", "bold"), f"  {value}"), soft_wrap=True)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, to: Console = out) -> None:
    """Print columns under their names, the first to the left and the others to the right; no line is wrapped or cut."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for number, row in enumerate([head, *rows]):
        first, *others = (
            cell.ljust(w) if not n else cell.rjust(w)
            for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        to.print(Text("  ".join([first, *others]), style="bold" if not number else ""), soft_wrap=True)


def show_table(title: str, rows: Mapping[str, Any]) -> None:
    """Show a person names and values, under a title."""
    from rich.table import Table

    table = Table(title=escape(title), show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(escape(name), escape(str(value)))
    err.print(table)


def print_json(values: Mapping[str, Any]) -> None:
    """Print one JSON object; paths become strings."""
    print(json.dumps(values, indent=2, default=str))


def size_text(count: int) -> str:
    """Spell a number of bytes: 1.3 MB."""
    scaled, units = float(count), ["bytes", "kB", "MB", "GB"]
    while scaled >= 1000 and len(units) > 1:
        scaled, units = scaled / 1000, units[1:]
    return f"{scaled:.{0 if units[0] == 'bytes' else 1}f} {units[0]}"


def time_text(seconds: float) -> str:
    """Spell a time: 0.4 s, 12 s, 3 min, 2.5 h."""
    if seconds < 100:
        return f"{seconds:.{1 if seconds < 10 else 0}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Update(Protocol):
    """Moves a bar: how many are done, of how many, and a note beside it."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Move it."""


@contextmanager
def progress_bar(description: str) -> Iterator[Update]:
    """Draw a bar on stderr while the block runs, moved by the function it gives."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    beside = TextColumn("{task.fields[note]}", markup=False)
    with Progress("{task.description}", BarColumn(), MofNCompleteColumn(), beside, console=err) as progress:
        task = progress.add_task(escape(description), total=None, note="")

        def update(done: int, total: int, note: str = "") -> None:
            progress.update(task, completed=done, total=total, note=note)

        yield update


class TuningBar:
    """Shows a tuning's steps on a bar (loss, steps a second, time left) and keeps the last loss."""

    def __init__(self, update: Update) -> None:
        self._update = update
        self.loss: float | None = None

    def __call__(self, step: "TuningStep") -> None:
        """Show a step."""
        self.loss = step.loss
        # from the step's own pace: a resumed tuning starts in the middle of the bar
        left = timedelta(seconds=round((step.steps - step.step) * step.seconds_per_step))
        pace = 1 / max(step.seconds_per_step, 1e-9)
        self._update(step.step, step.steps, f"loss {step.loss:.4f}  {pace:.2f} it/s  {left} left")


@contextmanager
def tuning_bar() -> Iterator[TuningBar]:
    """Draw the progress of a tuning while the block runs."""
    with progress_bar("tuning") as update:
        yield TuningBar(update)


def report(paths: Sequence[Path], details: Mapping[str, Any], as_json: bool) -> None:
    """Say where results are: a line for each path, or everything as one JSON object."""
    if as_json:
        print_json(details)
    else:
        for path in paths:
            out.print(Text(str(path)), soft_wrap=True)
