"""A suite's numbers: a CSV of every edit, and means with confidence intervals over clips."""

from __future__ import annotations

import csv
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tav_peft.errors import TavError
from tav_peft.suite.methods import METHODS
from tav_peft.whole import whole

RESAMPLES = 4000
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A statistic of some edits with the interval that holds it at 95 %, and over how many clips."""

    value: float
    low: float
    high: float
    clips: int

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def statistic_of(measure: str) -> Callable[..., Any]:
    """Give what is taken of a measure's values: of distances the median, as a few lost objects would rule the mean."""
    return np.nanmedian if measure == "motion_error" else np.nanmean


def estimate(rows: Iterable[Row], measure: str) -> Estimate | None:
    """Estimate a measure over edits; the interval is from resampling clips, whose edits belong together.

    Percentile bootstrap (Efron 1979) of `RESAMPLES` draws from a fixed seed. None where no row has the measure.
    """
    values = _by_clip(rows, measure)
    if not values:
        return None
    statistic, table = statistic_of(measure), _padded(values, list(values))
    return _interval(statistic(table), statistic(_resampled(table), axis=1), len(values))


def difference(rows: Iterable[Row], others: Iterable[Row], measure: str) -> Estimate | None:
    """Estimate how much higher a measure is in `others` than in `rows`, the same clips resampled in both."""
    one, two = _by_clip(rows, measure), _by_clip(others, measure)
    both = [key for key in one if key in two]
    if not both:
        return None
    statistic, tables = statistic_of(measure), [_padded(each, both) for each in (one, two)]
    first, second = ([statistic(table), statistic(_resampled(table), axis=1)] for table in tables)
    return _interval(second[0] - first[0], second[1] - first[1], len(both))


def write_csv(path: Path, rows: Sequence[Row]) -> Path:
    """Write a line for each edit, a column for each score.

    Raises:
        TavError: when the disk refuses.

    """
    names = _measures(rows)
    plain = ("set", "clip", "method", "seed", "kind", "prompt", "depth", "guidance")
    with whole(path, TavError) as part, part.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow([*plain, *names])
        for row in rows:
            values = [row["scores"].get(name, {}).get("value") for name in names]
            table.writerow(
                [*(row[name] for name in plain), *("" if v is None else round(v, 4) for v in values)]
            )
    return path


def markdown(rows: Sequence[Row], *, against: str = "full") -> str:
    """Write the tables: measures by method, the main ones by kind of edit, what differs at 95 %, and the rules."""
    methods, names = list(dict.fromkeys(row["method"] for row in rows)), _measures(rows)
    clips, seeds = _clips(rows), len({row["seed"] for row in rows})
    parts = [
        f"{len(rows)} edits: {clips} clips, {seeds} seed{'s' if seeds > 1 else ''}, {len(methods)} methods. In brackets "
        "is what resampling the clips gives in 95 % of the draws. The motion error is a median, all else are means.",
        _table(methods, ["clips", *names], functools.partial(_measured, rows)),
    ]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    for name in ("motion_error", "recognised_object"):
        if name in names:
            parts.append(f"**{_spaced(name)}**, by kind of edit:")
            parts.append(_table(methods, kinds, functools.partial(_of_kind, rows, name)))
    if against in methods and len(methods) > 1:
        parts.append(
            f"Differences from the {METHODS[against].title}, clip by clip; in bold where 0 is not in the interval:"
        )
        others = [method for method in methods if method != against]
        parts.append(_table(others, names, functools.partial(_difference, rows, against)))
    repeated = [method for method in methods if len({row["seed"] for row in _of(rows, method=method)}) > 1]
    if repeated:
        parts.append(
            "Standard deviation between seeds, of what the clips have together, where there are several:"
        )
        parts.append(_table(repeated, names, functools.partial(_between_seeds, rows)))
    return "\n\n".join([*parts, _rules(rows, names)]) + "\n"


def _clips(rows: Sequence[Row]) -> int:
    return len({(row["set"], row["clip"]) for row in rows})


def _measured(rows: Sequence[Row], method: str, column: str) -> Estimate | int | None:
    own = _of(rows, method=method)
    return _clips(own) if column == "clips" else estimate(own, column)


def _between_seeds(rows: Sequence[Row], method: str, measure: str) -> str | None:
    """Say how much a measure differs by seed, on the clips that were edited with all of them."""
    own = _of(rows, method=method)
    seeds = sorted({row["seed"] for row in own})
    whole = {
        clip
        for clip in {(row["set"], row["clip"]) for row in own}
        if len({row["seed"] for row in own if (row["set"], row["clip"]) == clip}) == len(seeds)
    }
    values = [
        estimate([row for row in own if row["seed"] == seed and (row["set"], row["clip"]) in whole], measure)
        for seed in seeds
    ]
    if any(value is None for value in values):
        return None
    return f"{np.std([value.value for value in values if value], ddof=1):.2g}"


def _of_kind(rows: Sequence[Row], measure: str, method: str, kind: str) -> Estimate | None:
    return estimate(_of(rows, method=method, kind=kind), measure)


def _difference(rows: Sequence[Row], against: str, method: str, measure: str) -> str | None:
    found = difference(_of(rows, method=against), _of(rows, method=method), measure)
    if found is None:
        return None
    return f"**{found}**" if found.low > 0 or found.high < 0 else str(found)


def _rules(rows: Sequence[Row], names: Sequence[str]) -> str:
    lines = []
    for name in names:
        said = next(row["scores"][name] for row in rows if name in row["scores"])
        model = f" [{said['model']}]" if said["model"] else ""
        unit = f" ({said['unit']})" if said["unit"] else ""
        lines.append(f"- {_spaced(name)}{unit}: {said['rule']}{model}")
    return "\n".join(lines)


def _table(methods: Sequence[str], columns: Sequence[str], cell: Callable[[str, str], Any]) -> str:
    lines = [f"| method | {' | '.join(map(_spaced, columns))} |", f"|---|{'---|' * len(columns)}"]
    for method in methods:
        cells = ("" if (found := cell(method, column)) is None else str(found) for column in columns)
        lines.append(f"| {METHODS[method].title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _of(rows: Iterable[Row], **wanted: str) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _measures(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["scores"]))


def _by_clip(rows: Iterable[Row], measure: str) -> dict[tuple[str, str], Any]:
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        value = row["scores"].get(measure, {}).get("value")
        if value is not None:
            found.setdefault((row["set"], row["clip"]), []).append(value)
    return {key: np.array(values) for key, values in found.items()}


def _padded(values: Mapping[Any, Any], clips: Sequence[Any]) -> Any:
    """Lay the values of each clip into a row, NaN where it has fewer than others."""
    table = np.full((len(clips), max(len(values[clip]) for clip in clips)), np.nan)
    for row, clip in zip(table, clips, strict=True):
        row[: len(values[clip])] = values[clip]
    return table


def _resampled(table: Any) -> Any:
    """Draw as many clips as there are, again and again, each time the same: (draws, values)."""
    picked = np.random.default_rng(0).integers(0, len(table), (RESAMPLES, len(table)))
    return table[picked].reshape(RESAMPLES, -1)


def _interval(value: Any, draws: Any, clips: int) -> Estimate:
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high), clips)


def _spaced(name: str) -> str:
    return name.replace("_", " ")
