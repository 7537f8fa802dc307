"""How large an adapter's updates are, and how many directions they need: the singular values of each."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from tav_peft.adapter import Adapter, check_values
from tav_peft.errors import AdapterError
from tav_peft.low_rank import singular_values, singular_values_of_factors
from tav_peft.merging.sources import open_updates
from tav_peft.presets import BLOCKS, PARTS, part_of
from tav_peft.recipe import Part
from tav_peft.updates import Updates
from tav_peft.whole import whole

Progress = Callable[[int, int], None]  # parameters done, parameters in all


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The update ΔW of one parameter of the UNet: its form, and its singular values from the largest.

    `rank` and `alpha` are those of the LoRA that it is, None where it is dense. The bias of T-Attn counts as a matrix of
    one column.
    """

    parameter: str
    part: Part
    shape: tuple[int, ...]
    rank: int | None
    alpha: float | None
    values: tuple[float, ...]

    @property
    def norm(self) -> float:
        """Frobenius norm ‖ΔW‖."""
        return math.sqrt(_squares(self.values))

    @property
    def spectral_norm(self) -> float:
        """Largest singular value: the most that a unit vector can change by."""
        return self.values[0]

    @property
    def stable_rank(self) -> float:
        """‖ΔW‖² over the squared largest singular value (Rudelson and Vershynin 2007), 0 where there is no update."""
        return _squares(self.values) / self.values[0] ** 2 if self.values[0] else 0.0

    @property
    def effective_rank(self) -> float:
        """The exponential of the entropy of σᵢ/Σσ (Roy and Vetterli 2007), 0 where there is no update."""
        total = sum(self.values)
        shares = [value / total for value in self.values if value > 0]
        return math.exp(-sum(p * math.log(p) for p in shares)) if shares else 0.0

    def energy(self, rank: int) -> float:
        """Share of Σσ² that the nearest update of this rank keeps."""
        return energy([self], rank)


def measure(adapter: Adapter | str | Path, *, progress: Progress | None = None) -> list[Spectrum]:
    """Take the singular values of every update of an adapter, or of a file of one, in the order of the UNet's blocks.

    Of a LoRA they come from its factors, exactly and without multiplying them out. Where several temporal attentions run
    side by side, which have no common start, T-Attn's own weights are measured. A file is read a tensor at a time.

    Raises:
        AdapterError: when the adapter is damaged.

    """
    updates = open_updates(adapter, "the adapter")
    spectra = []
    for done, parameter in enumerate(sorted(updates.layout, key=depth), 1):
        spectra.append(_spectrum(updates, parameter))
        if progress is not None:
            progress(done, len(updates.layout))
    return spectra


def energy(spectra: Iterable[Spectrum], rank: int) -> float:
    """Share of Σσ² of these updates together that their nearest updates of a rank keep; 1 where there is none."""
    pairs = [(_squares(each.values[:rank]), _squares(each.values)) for each in spectra]
    kept, total = (sum(column) for column in zip(*pairs, strict=True))
    return kept / total if total else 1.0


def norm(spectra: Iterable[Spectrum]) -> float:
    """Frobenius norm of these updates together."""
    return math.sqrt(sum(_squares(each.values) for each in spectra))


def ranks_of_interest(spectra: Sequence[Spectrum]) -> list[int]:
    """List 1, 2, 4, 8, … below and up to the number of singular values that any of them has."""
    most = max(len(each.values) for each in spectra)
    return [2**n for n in range((most - 1).bit_length() + 1) if 2**n <= most]


def depth(parameter: str) -> tuple[int | str, ...]:
    """Sort key for names of parameters: from the first down block to the last up block."""
    first, *path = parameter.split(".")
    groups = [*BLOCKS.values()]
    return groups.index(first), *(int(each) if each.isdecimal() else each for each in path)


def plot(spectra: Sequence[Spectrum], path: Path) -> None:
    """Draw the norms by depth, and the singular values of each update over their largest, as a PNG.

    Raises:
        AdapterError: when the disk refuses.

    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    matrices = [each for each in spectra if len(each.shape) > 1]
    blocks = list(dict.fromkeys(_block(each) for each in matrices))
    ends = [end for ends in PARTS.values() for end in ends]
    for number, end in enumerate(ends):
        own = [each for each in matrices if each.parameter == f"{_block(each)}.{end}.weight"]
        colour = f"C{number}"
        if own:
            left.plot(
                [blocks.index(_block(each)) for each in own], [each.norm for each in own], "o-", color=colour,
                markersize=3, linewidth=1, label=end,
            )  # fmt: skip
        for each in own:
            if each.spectral_norm:
                heights = [max(value / each.spectral_norm, 1e-8) for value in each.values]
                right.plot(range(1, len(heights) + 1), heights, color=colour, linewidth=0.6, alpha=0.7)
    words = (".transformer_blocks", ".attentions", "_blocks", "_block")
    names = [functools.reduce(lambda name, word: name.replace(word, ""), words, block) for block in blocks]
    left.set_xticks(range(len(blocks)), names, rotation=90, fontsize=6)
    left.set(ylabel="‖ΔW‖", ylim=(0, None), title="norm by depth")
    right.set(xlabel="n", ylabel="σₙ / σ₁", yscale="log", xscale="log", title="spectra")
    for axes in (left, right):
        axes.grid(alpha=0.25)
    left.legend(frameon=False, fontsize=7)
    with whole(path, AdapterError) as part:
        figure.savefig(part, format="png", dpi=130)


@torch.no_grad()
def _spectrum(updates: Updates, parameter: str) -> Spectrum:
    part, rank = part_of(parameter.rpartition(".")[0]), updates.rank(parameter)
    if rank is not None:
        factors = updates.factors(parameter)
        for each in factors:
            check_values(f"the LoRA on {parameter}", each, updates.name)
        values = singular_values_of_factors(factors)
    else:
        side_by_side = part == "t_attn" and updates.adapter.provenance.temporal_branches > 1
        update = updates.absolute(parameter) if side_by_side else updates[parameter]
        values = singular_values(check_values(parameter, update, updates.name))
    return Spectrum(
        parameter=parameter,
        part=part,
        shape=tuple(updates.layout[parameter].shape),
        rank=rank,
        alpha=None if rank is None else updates.alpha(parameter),
        values=tuple(values.tolist()),
    )


def _squares(values: Iterable[float]) -> float:
    return math.fsum(value * value for value in values)


def _block(spectrum: Spectrum) -> str:
    block, _, _ = spectrum.parameter.partition(".attn")
    return block
