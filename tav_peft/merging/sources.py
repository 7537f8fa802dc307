"""The adapters of a merge: opened, checked to go together, and remembered in the result's provenance."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from tav_peft import formats
from tav_peft.adapter import (
    Adapter,
    ClipInfo,
    MergedAdapter,
    MergeInfo,
    Provenance,
    check_values,
    library_versions,
)
from tav_peft.errors import AdapterError
from tav_peft.merging.plan import MergePlan, MergeSettings
from tav_peft.merging.weights import Weight, check_rules, rules_of, weight_of
from tav_peft.sharing.fetching import fetch
from tav_peft.tensor_file import hash_tensors
from tav_peft.unet import temporal_init
from tav_peft.updates import Updates


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """An adapter of a merge: its updates, its weights, and the hash of its tensors."""

    updates: Updates
    rules: dict[str, float]
    fingerprint: str

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.updates.name

    @property
    def provenance(self) -> Provenance:
        """Where it comes from."""
        return self.updates.adapter.provenance

    @property
    def has_temporal(self) -> bool:
        """Whether it updates T-Attn."""
        return "t_attn" in self.updates.adapter.subset.parts

    def weight(self, parameter: str) -> float:
        """Weight of its update of a parameter."""
        return weight_of(self.rules, parameter.rpartition(".")[0])


def open_sources(
    adapters: Sequence[Adapter | str | Path], weights: Sequence[Weight] | None, settings: MergeSettings
) -> list[Source]:
    """Open adapters for a merge, those of our files without reading them whole, and check everything about them.

    Raises:
        AdapterError: when one is damaged, they do not go together, or the weights do not fit.

    """
    if not adapters:
        raise AdapterError("No adapters were given to merge. Give one or more.")
    if weights is not None and len(weights) != len(adapters):
        raise AdapterError(
            f"{len(adapters)} adapters and {len(weights)} weights were given. Give one weight for each."
        )
    opened = [open_updates(each, f"adapter {n}") for n, each in enumerate(adapters, 1)]
    _check_together(opened, settings)
    sources = []
    for updates, weight in zip(opened, weights or [1.0] * len(opened), strict=True):
        rules = rules_of(weight)
        check_rules(rules, {name.rpartition(".")[0] for name in updates}, updates.name)
        sources.append(Source(updates, rules, _fingerprint(updates)))
    return sources


def open_updates(given: Adapter | str | Path, name: str) -> Updates:
    """Take an adapter's updates, from a file of ours without reading it whole; `name` is what one without a file has.

    Raises:
        AdapterError: when it is damaged, or its T-Attn starts from what only a newer version can draw.

    """
    if isinstance(given, Adapter):
        return _with_known_start(Updates(given, name))
    path = fetch(given)
    return _with_known_start(Updates(formats.open_adapter(path), path.name))


def _with_known_start(updates: Updates) -> Updates:
    init = updates.adapter.provenance.temporal_init
    if "t_attn" in updates.adapter.subset.parts and init.name != temporal_init.NAME:
        raise AdapterError(
            f"{updates.name}: its T-Attn starts from {init.name!r}, this tav-peft knows {temporal_init.NAME!r}. "
            "Update tav-peft."
        )
    return updates


def _fingerprint(updates: Updates) -> str:
    tensors = updates.adapter.tensors
    for name in tensors:
        check_values(name, tensors[name], updates.name)
    return hash_tensors(tensors)


def _check_together(opened: Sequence[Updates], settings: MergeSettings) -> None:
    first = opened[0].adapter.provenance
    for other in opened[1:]:
        theirs = other.adapter.provenance
        for key, value in first.base.architecture.items():
            if theirs.base.architecture.get(key) != value:
                raise AdapterError(
                    f"{opened[0].name} was tuned for a base with {key} {value}, {other.name} for one with "
                    f"{theirs.base.architecture.get(key)}. Only adapters for the same architecture can be merged."
                )
        if theirs.model != first.model:
            raise AdapterError(
                f"{opened[0].name} was tuned with {first.model}, {other.name} with {theirs.model}. "
                "A UNet treats frames one way at a time; only adapters of the same variant can be merged."
            )
    _check_temporal([each for each in opened if "t_attn" in each.adapter.subset.parts], settings)


def _check_temporal(opened: Sequence[Updates], settings: MergeSettings) -> None:
    if settings.t_attn == "concat":
        return
    for each in opened:
        if each.adapter.provenance.temporal_branches > 1:
            raise AdapterError(
                f"{each.name} has several temporal attentions side by side, which have no update to merge. "
                "Ask for t_attn concat, which adds them beside the others."
            )
        one, other = opened[0].adapter.provenance.temporal_init, each.adapter.provenance.temporal_init
        if one != other:
            raise AdapterError(
                f"The T-Attn of {opened[0].name} counts from initial weights of seed {one.seed}, that of {each.name} "
                f"from others, of seed {other.seed}: no sum of their weights does what either does. Ask for t_attn "
                "concat, which lets both run side by side exactly, or tune with the same temporal seed."
            )


# -- what is remembered ----------------------------------------------------------------------------------


def warnings_of(sources: Sequence[Source], plan: MergePlan) -> tuple[str, ...]:
    """Say what a person should know about a result before using it."""
    told = []
    first = sources[0]
    for other in sources[1:]:
        if other.provenance.base.fingerprint != first.provenance.base.fingerprint:
            told.append(
                f"{first.name} was tuned on the base {first.provenance.base.name}, {other.name} on another one, "
                f"{other.provenance.base.name}; their updates are stacked as they are."
            )
    dense = [each.name for each in sources if "t_attn" in each.updates.adapter.subset.dense_parts]
    if dense and "t_attn" in plan.subset.lora_parts:
        told.append(f"The output bias of T-Attn in {', '.join(dense)} has no LoRA form and is left out.")
    return tuple(told)


def info_of(sources: Sequence[Source], settings: MergeSettings) -> MergeInfo:
    """Record how the sources were merged."""
    return MergeInfo(
        method=settings.method,
        density=settings.density if settings.uses("density") else None,
        seed=settings.seed if settings.uses("draws") else None,
        rank=settings.rank,
        adapters=tuple(
            MergedAdapter(
                name=each.name,
                fingerprint=each.fingerprint,
                caption=each.provenance.caption,
                clip=each.provenance.clip.name,
                weights=each.rules,
            )
            for each in sources
        ),
    )


def provenance_of(sources: Sequence[Source], plan: MergePlan, info: MergeInfo) -> Provenance:
    """Say where a result comes from: the first adapter's base and recipe, all captions and clips."""
    temporal = next((each for each in sources if each.has_temporal), sources[0])
    first = sources[0].provenance
    return Provenance(
        caption=_joined([each.provenance.caption for each in sources], "; "),
        base=first.base,
        clip=_clip_of(sources),
        temporal_init=temporal.provenance.temporal_init,
        model=first.model,
        subset=dataclasses.asdict(plan.subset),
        step=max(each.provenance.step for each in sources),
        recipe=first.recipe,
        versions=library_versions(),
        merged_from=info,
        temporal_branches=plan.branches,
    )


def latents_of(sources: Sequence[Source]) -> Tensor | None:
    """Give the clip's latents, if all adapters are of one clip and one of them carries it."""
    if not _clip_of(sources).fingerprint:
        return None
    return next((x for each in sources if (x := each.updates.adapter.latents) is not None), None)


def preview_of(sources: Sequence[Source]) -> bytes | None:
    """Give the clip's preview, if all adapters are of one clip and one of them carries it."""
    if not _clip_of(sources).fingerprint:
        return None
    return next((x for each in sources if (x := each.updates.adapter.preview) is not None), None)


def _clip_of(sources: Sequence[Source]) -> ClipInfo:
    first = sources[0].provenance.clip
    if len({each.provenance.clip.fingerprint for each in sources}) == 1:
        return first
    names = _joined([each.provenance.clip.name for each in sources], ", ")
    return first.model_copy(update={"name": names, "fingerprint": ""})


def _joined(texts: Iterable[str], between: str) -> str:
    return between.join(dict.fromkeys(text for text in texts if text))
