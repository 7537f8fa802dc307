"""How near each kind of recorded number must be, and why; the one place that says so.

A distance is the largest absolute difference divided by the standard deviation σ of what was recorded, unless the rule
has another unit. It is held against the recording's noise floor, `noise_floor.json`: how far the ORIGINAL code is from
its own float32 record when it runs in float64. So a floor is the rounding of one float32 run. Ours is another such run
with the sums in another order (fused attention, keys projected before they are gathered), thus an error of the same
size, and the floor is measured on few calls: at other shapes the record itself is up to 2.4 floors from float64. Hence
the allowance of `TIMES` floors; measured are at most 4.2. A mistake of structure is no question of rounding, but of
twenty thousand floors and more; mistakes.py makes some on purpose, and smaller ones for double_precision.py to find.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

TIMES = 10
# Losses and weights after five steps need less: each step begins from weights that are still those of the record, so
# nothing builds up; measured are at most 1.1 floors.
TIMES_TRAINING = 5


@dataclass(frozen=True)
class Rule:
    """How near one kind of number must be.

    `floor` takes a recording's noise_floor.json to a number. `usual` stands for it where a recording has none, and is
    the larger one of the two public recordings, or what `why` says.
    """

    usual: float
    why: str
    floor: Callable[[dict[str, Any]], float] | None = None
    times: int = TIMES
    unit: Literal["σ", "absolute", "relative"] = "σ"

    def noise_floor(self, measured: dict[str, Any]) -> float | None:
        """The recording's own floor, None where it does not have one."""
        return self.floor(measured) if self.floor and measured else None

    def tolerance(self, floor: float | None) -> float:
        """The largest distance allowed."""
        return self.times * (self.usual if floor is None else floor)


def _forward(measured: dict[str, Any], times: float = 1) -> float:
    calls = [entry for name, entry in measured.items() if name.startswith("forward ")]
    return times * max(call["max_abs_over_std"] for call in calls)


def _entry(name: str, times: float = 1) -> Callable[[dict[str, Any]], float]:
    return lambda measured: times * measured[name]["max_abs_over_std"]


_SAMPLING = "sampling final (same float32 start)"
# PNDM's step weighs four predictions with 55, 59, 37 and 9 twenty-fourths: their rounding may add up to this many
_PNDM = (55 + 59 + 37 + 9) / 24
# the record's gradients are 12 forward floors from our code in float64 in sd1-tiny, 4 in sd2-tiny
_GRADIENT = 12

_AGAIN = "the original done again, or in float64, whichever is further"

RULES = {
    "exact": Rule(0, "none: token ids, noise of the same generator, latents that another file has too"),
    "text": Rule(1.2e-6, "ten times 2^-23, the last place of float32; measured is nine"),
    "vae": Rule(3.3e-5, "what was measured, after some thirty convolutions of the decoder"),
    "noise schedule": Rule(1.2e-7, "2^-23, the last place, as it is elementwise; measured is 0"),
    "forward": Rule(2.5e-5, "the larger one of the two calls that have one", _forward),
    "trace": Rule(2.5e-5, "that of the whole call, as no module has its own", _forward),
    "inversion": Rule(2e-5, "that of its last latents", _entry("inversion final")),
    "sampling": Rule(
        8e-5, "each step's own; of other calls, that at the end of the guided one", _entry(_SAMPLING)
    ),
    "sampling step": Rule(
        4e-5, "that of the first step, which begins from the record too", _entry(_SAMPLING)
    ),
    "PNDM sampling": Rule(
        _PNDM * 8e-5,
        "DDIM's, times the 6.7 that the sizes of its four weights add up to",
        _entry(_SAMPLING, _PNDM),
    ),
    "video": Rule(7e-5, "its own", _entry("video")),
    "loss": Rule(6e-7, _AGAIN, times=TIMES_TRAINING, unit="absolute"),
    "tuned weight": Rule(
        1.3e-6, f"{_AGAIN}; an update is up to 1.5e-4", times=TIMES_TRAINING, unit="absolute"
    ),
    "tuned update": Rule(
        6.3e-4,
        "all weights together, over the length of the update; float64",
        times=TIMES_TRAINING,
        unit="relative",
    ),
    "gradient norm": Rule(2.5e-5, "as a forward", _forward, times=TIMES_TRAINING, unit="relative"),
    "gradient": Rule(
        _GRADIENT * 2.5e-5,
        f"each tensor by itself; {_GRADIENT} forwards: so far is the record from our code in float64",
        lambda measured: _forward(measured, _GRADIENT),
        times=TIMES_TRAINING,
    ),
}


def table() -> list[str]:
    """Every rule as a row of a table."""
    head = ["| kind | allowed | unit | the floor is | where a recording has none |", "|---|---|---|---|---|"]
    return head + [
        f"| {kind} | {f'{rule.times} floors' if rule.usual else 'equal'} | {rule.unit if rule.usual else ''} "
        f"| {rule.why} | {rule.usual:.1e} |"
        for kind, rule in RULES.items()
    ]
