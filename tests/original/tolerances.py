"""How near each kind of recorded number must be, and why; the one place that says so.

A distance is the largest absolute difference divided by the standard deviation of what was recorded (`absolute` rules
leave the division out). It is held against the recording's noise floor, `noise_floor.json`: how far the ORIGINAL code
is from its own float32 record when it runs in float64. So a floor is the rounding of one float32 run. Ours is another
such run with the sums in another order (fused attention, keys projected before they are gathered), thus an error of the
same size, and the floor is measured on few calls: at other shapes the record itself is up to 3.6 floors from float64.
Hence the allowance of `TIMES` floors; measured are at most 4.2. A mistake of structure is no question of rounding: to
leave out T-Attn, to take GroupNorm by frame, or to swap two frames moves a result by a thousand floors and more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    absolute: bool = False

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
# The record's gradients are 12 forward floors from float64 in sd1-tiny, 4 in sd2-tiny (our code in float64 says so)
_GRADIENT = 12

RULES = {
    "exact": Rule(0, "token ids, noise of the same generator, latents that another file has too"),
    "text": Rule(1.2e-6, "ten of float32's last places through the text encoder; both libraries measured"),
    "vae": Rule(3.3e-5, "no floor recorded; measured, through some thirty convolutions of the decoder"),
    "noise schedule": Rule(1.2e-7, "elementwise, so equal but for the last place, 2^-23; measured is 0"),
    "forward": Rule(2.5e-5, "the larger floor of the two calls that were measured", _forward),
    "trace": Rule(2.5e-5, "no module has a floor of its own, so that of the whole", _forward),
    "inversion": Rule(2e-5, "the floor of its last latents", _entry("inversion final")),
    "sampling": Rule(
        8e-5, "each step's floor; for other calls, the guided one's at its end", _entry(_SAMPLING)
    ),
    "sampling step": Rule(4e-5, "from recorded latents: the floor of the first step", _entry(_SAMPLING)),
    "PNDM sampling": Rule(
        _PNDM * 8e-5, "DDIM's, times what its formula may add up", _entry(_SAMPLING, _PNDM)
    ),
    "video": Rule(7e-5, "its floor", _entry("video")),
    "loss": Rule(6e-7, "float64, or the original done again", times=TIMES_TRAINING, absolute=True),
    "tuned weight": Rule(1.3e-6, "float64, or the original done again", times=TIMES_TRAINING, absolute=True),
    "tuned update": Rule(
        6.3e-4, "all weights together, over the update's length", times=TIMES_TRAINING, absolute=True
    ),
    "gradient norm": Rule(2.5e-5, "relative; as a forward", _forward, times=TIMES_TRAINING, absolute=True),
    "gradient": Rule(
        _GRADIENT * 2.5e-5,
        "each tensor by itself; twelve forwards",
        lambda measured: _forward(measured, _GRADIENT),
        times=TIMES_TRAINING,
    ),
}
