"""The tensors of a merged adapter, made one parameter at a time, and measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tav_peft.adapter import LATENTS
from tav_peft.errors import AdapterError
from tav_peft.low_rank import Factors, truncate, truncate_factors
from tav_peft.merging.methods import METHODS, SUMS, concatenate, linear
from tav_peft.merging.plan import MergePlan, MergeSettings, Target
from tav_peft.merging.sources import Source
from tav_peft.tensor_file import LazyTensors
from tav_peft.unet import philox, temporal_init
from tav_peft.unet.branches import stacked_shape

Progress = Callable[[int, int], None]  # parameters done, parameters in all
DRAWS = "dare-1"  # changes whenever the dropped entries would


class MergedTensors(LazyTensors):
    """The tensors of a merged adapter, made from those of its sources when they are asked for.

    `errors` collects for each parameter of the UNet the squared norms of what its stored update lacks or has too much,
    and of the exact one: the sum of the sources' updates by weight. `latents` are carried along.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        plan: MergePlan,
        settings: MergeSettings,
        *,
        latents: Tensor | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._sources, self._plan, self._settings = sources, plan, settings
        self._latents, self._progress = latents, progress
        self._targets = {name: target for target in plan.targets for name in target.layout(plan.dtype)}
        self._made: dict[str, Tensor] = {}
        self.errors = self._lost()
        self.layout = {
            name: like for target in plan.targets for name, like in target.layout(plan.dtype).items()
        }
        if latents is not None:
            self.layout[LATENTS] = torch.empty_like(latents, device="meta")

    def __getitem__(self, name: str) -> Tensor:
        if name == LATENTS and self._latents is not None:
            return self._latents
        if name not in self._made:
            # the tensors of one parameter are made together, and asked for one after the other
            self._made = self._make(self._targets[name])
            if self._progress is not None:
                done = sum(target.parameter in self.errors for target in self._plan.targets)
                self._progress(done, len(self._plan.targets))
        return self._made[name]

    def _lost(self) -> dict[str, tuple[float, float]]:
        """Count what the plan has no place for as an error: the biases of T-Attn where it becomes a LoRA."""
        kept = {target.parameter for target in self._plan.targets}
        sums: dict[str, Tensor] = {}
        for each in self._sources:
            for parameter in each.updates.layout.keys() - kept:
                term = each.weight(parameter) * each.updates[parameter]
                sums[parameter] = sums.get(parameter, torch.zeros(())) + term
        return {name: 2 * (float(total.double().square().sum()),) for name, total in sums.items()}

    @torch.no_grad()
    def _make(self, target: Target) -> dict[str, Tensor]:
        first = torch.zeros(())  # what the stored tensor is counted from
        if self._plan.branches > 1 and target.part == "t_attn":
            exact = update = self._side_by_side(target)
        else:
            having = [each for each in self._sources if target.parameter in each.updates.layout]
            updates = [each.updates[target.parameter] for each in having]
            weights = [each.weight(target.parameter) for each in having]
            exact = linear([torch.zeros(target.shape), *updates], [0.0, *weights])
            if target.rank is not None:
                factors = self._factors(target, target.rank, having, weights, updates)
                return self._stored_factors(target, exact, factors)
            update = self._combined(target, having, weights, updates)
            if target.part == "t_attn":
                first = temporal_init.initial(target.parameter, target.shape, self._seed)
        (name,) = target.layout(self._plan.dtype)
        stored = self._stored(name, first + update)
        self._measure(target, exact, stored.float() - first)
        return {name: stored}

    @property
    def _seed(self) -> int:
        seeds = [each.provenance.temporal_init.seed for each in self._sources if each.has_temporal]
        return seeds[0]

    def _combined(
        self, target: Target, having: Sequence[Source], weights: list[float], updates: list[Tensor]
    ) -> Tensor:
        if not updates:
            return torch.zeros(target.shape)
        options: dict[str, object] = {}
        if self._settings.uses("density"):
            options["density"] = self._settings.density
        if self._settings.uses("draws"):
            options["draws"] = [self._draws(target, self._sources.index(each)) for each in having]
        return METHODS[self._settings.method](updates, weights, **options)

    def _draws(self, target: Target, number: int) -> Tensor:
        """Draw from U[0, 1) for each entry, on every machine the same."""
        stream = f"{DRAWS}:{self._settings.seed}:{number}:{target.parameter}"
        return philox.unit(stream, target.shape.numel()).add_(1).div_(2).reshape(target.shape)

    def _factors(
        self,
        target: Target,
        rank: int,
        having: Sequence[Source],
        weights: list[float],
        updates: list[Tensor],
    ) -> Factors:
        low = all(each.updates.rank(target.parameter) is not None for each in having)
        if not having:
            return torch.zeros(target.shape[0], rank), torch.zeros(rank, target.shape[1])
        if self._settings.method in SUMS and low:
            factors = concatenate([each.updates.factors(target.parameter) for each in having], weights)
            return factors if len(factors[1]) <= rank else truncate_factors(factors, rank)
        return truncate(self._combined(target, having, weights, updates), rank)

    def _side_by_side(self, target: Target) -> Tensor:
        """Stack the heads of temporal attentions: what comes out is the sum of what each gives by weight.

        Queries, keys and values are stacked by rows. The output adds the heads up, so its columns are stacked, and they
        and the bias carry the weight.
        """
        width, is_out, terms = min(target.shape), ".to_out." in target.parameter, []
        for each in self._sources:
            if not each.has_temporal:
                continue
            term = torch.zeros(stacked_shape(target.parameter, width, each.provenance.temporal_branches))
            if target.parameter in each.updates.layout:
                term = each.updates.absolute(target.parameter)
            terms.append(each.weight(target.parameter) * term if is_out else term)
        if target.parameter.endswith("bias"):
            return torch.stack(terms).sum(dim=0)
        return torch.cat(terms, dim=1 if is_out else 0)

    def _stored_factors(self, target: Target, exact: Tensor, factors: Factors) -> dict[str, Tensor]:
        names = [f"{target.module}.lora_{kind}.weight" for kind in "BA"]
        B, A = (self._stored(name, each) for name, each in zip(names, factors, strict=True))
        self._measure(target, exact, B.float() @ A.float())
        return dict(zip(names, (B, A), strict=True))

    def _stored(self, name: str, value: Tensor) -> Tensor:
        stored = value.to(self._plan.dtype).contiguous()
        if not torch.isfinite(stored).all():
            raise AdapterError(
                f"{name} does not fit into {self._plan.dtype} with these weights. Choose smaller ones, or dtype fp32."
            )
        return stored

    def _measure(self, target: Target, exact: Tensor, stored: Tensor) -> None:
        wrong, asked = (stored - exact).double().square().sum(), exact.double().square().sum()
        self.errors[target.parameter] = float(wrong), float(asked)
