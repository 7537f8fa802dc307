"""One query projection in another tool's file: what its tensors are as an adapter's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tav_peft.adapter import check_values
from tav_peft.errors import AdapterError
from tav_peft.formats import decompositions
from tav_peft.formats.loaded_base import LoadedBase
from tav_peft.formats.lora_config import LoraConfigText
from tav_peft.formats.lora_tensors import form_of
from tav_peft.tensor_file import FileTensors

# which side of each factor is the rank
_RANKS = {
    "A": 0, "B": 1, **{f"hada_w{n}_{side}": axis for n in (1, 2) for side, axis in (("a", 1), ("b", 0))},
    **{f"lokr_w{n}_{side}": axis for n in (1, 2) for side, axis in (("a", 1), ("b", 0))},
}  # fmt: skip


class LoraModule:
    """The tensors of one query projection in another tool's file, by kind, read when they are asked for.

    `configs` are all that say something of its rank and alpha beside the tensors. `shape` is the weight's, (out, in).

    Raises:
        AdapterError: when the tensors do not fit each other, a config, or the base; or are a DoRA, and there is no base.

    """

    def __init__(
        self,
        name: str,
        kinds: Mapping[str, str],
        file: FileTensors,
        configs: Sequence[LoraConfigText],
        base: LoadedBase | None,
    ) -> None:
        self.name, self.kinds, self._file, self._configs = name, kinds, file, configs
        self._label = file.path.name
        form = form_of(kinds, name, self._label)
        self.form = f"{form} with DoRA" if "magnitude" in kinds else form
        self._plain = form
        self._base = None if base is None else base.unet.get_parameter(f"{name}.weight")
        if any(config.dora != ("magnitude" in kinds) for config in configs):
            raise AdapterError(
                f"{self._label}: its config and its tensors differ on whether {name} is a DoRA."
            )
        self._check_shapes()
        self._alpha = None if form == "full" else self._agreed_alpha()
        if "magnitude" in kinds and self._base is None:
            raise AdapterError(
                f"{self._label} is a DoRA, whose update depends on the base's weights. Name the base with --base."
            )

    @property
    def is_lora(self) -> bool:
        """Whether A and B with a scale are all there is, and do not just hold a dense update."""
        return self.form == "lora" and not self.is_dense

    @functools.cached_property
    def is_dense(self) -> bool:
        """Whether a tensor is the dense update itself: a `diff`, or B where scale·A is the identity."""
        if self.form == "full":
            return True
        if self.form != "lora" or self.rank != self._like("A").shape[1]:
            return False
        A = self._read("A")
        factor = A[0, 0].item()
        return factor * self.scale == 1 and torch.equal(A, factor * torch.eye(len(A), dtype=A.dtype))

    @functools.cached_property
    def rank(self) -> int:
        """Rank of a LoRA or LoHa, or of the first factor of a LoKr that has one (1 where none has)."""
        ranked = ("A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
        return next((self._like(kind).shape[0] for kind in ranked if kind in self.kinds), 1)

    @property
    def alpha(self) -> float:
        """The alpha for which alpha/rank is the scale."""
        return self.rank if self._alpha is None else self._alpha

    def _agreed_alpha(self) -> float:
        """Give the file's number, its config's where they are the same, or the rank where there is none."""
        said = [config.alpha(self.name) for config in self._configs]
        if "alpha" in self.kinds:
            number = self._read("alpha").reshape(-1)
            if len(number) != 1:
                raise AdapterError(f"{self._label}: {self.kinds['alpha']} is no single number.")
            # a config has more digits than the tensor
            if any(torch.tensor(alpha, dtype=number.dtype) != number[0] for alpha in said):
                raise AdapterError(
                    f"{self._label} contradicts itself: {self.kinds['alpha']} is {number[0].item():g}, its config says "
                    f"{said[0]:g}. Ask who made it which is right."
                )
            said = said or [number[0].item()]
        if len({float(f"{alpha:.12g}") for alpha in said}) > 1:
            raise AdapterError(f"{self._label} contradicts itself: of {self.name} it says the alphas {said}.")
        alpha = float(said[0]) if said else float(self.rank)
        if not alpha > 0:
            raise AdapterError(
                f"{self._label}: the alpha of {self.name} is {alpha:g}, which tools read differently. Give one above 0."
            )
        return alpha

    @property
    def scale(self) -> float:
        """The factor of the product."""
        if self._plain == "lokr" and {"lokr_w1", "lokr_w2"} <= set(self.kinds) and not self._configs:
            return 1.0  # without a rank LyCORIS has none, whatever alpha says; PEFT has its config's
        rank = self._configs[0].rank(self.name) if self._plain == "lokr" and self._configs else self.rank
        return self.alpha / rank

    def lora(self) -> dict[str, tuple[Tensor, Callable[[], Tensor]]]:
        """Give its A and B as ours, unread."""
        return {
            f"{self.name}.lora_{kind}.weight": (self._like(kind), functools.partial(self._read, kind))
            for kind in "AB"
        }

    def dense(self) -> dict[str, tuple[Tensor, Callable[[], Tensor]]]:
        """Give its dense update as ours, not yet multiplied out."""
        if self.is_dense:
            kind = "diff" if self.form == "full" else "B"
            return {f"{self.name}.diff": (self._like(kind), functools.partial(self._read, kind))}
        return {f"{self.name}.diff": (torch.empty(self.shape, device="meta"), self._multiplied)}

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that is updated: (out, in)."""
        like = {kind: self._like(kind).shape for kind in self.kinds}
        if self._plain == "lora":
            return like["B"][0], like["A"][1]
        if self._plain == "loha":
            return like["hada_w1_a"][0], like["hada_w1_b"][1]
        if self._plain == "full":
            return tuple(like["diff"])
        rows, columns = 1, 1
        for n in (1, 2):
            whole = like.get(f"lokr_w{n}")
            rows *= whole[0] if whole else like[f"lokr_w{n}_a"][0]
            columns *= whole[1] if whole else like[f"lokr_w{n}_b"][1]
        return rows, columns

    def _multiplied(self) -> Tensor:
        update = self._product()
        if "magnitude" in self.kinds:
            assert self._base is not None
            update = decompositions.dora(self._base.double().cpu(), update, self._read("magnitude").double())
        return check_values(self.name, update.float(), self._label)

    def _product(self) -> Tensor:
        at = {kind: self._read(kind).double() for kind in self.kinds if kind not in ("alpha", "magnitude")}
        if self._plain == "full":
            return at["diff"]
        if self._plain == "lora":
            return decompositions.lora(at["A"], at["B"], self.scale)
        if self._plain == "loha":
            return decompositions.loha(
                **{k.removeprefix("hada_"): t for k, t in at.items()}, scale=self.scale
            )
        w1, w2 = (
            at[f"lokr_w{n}"] if f"lokr_w{n}" in at else at[f"lokr_w{n}_a"] @ at[f"lokr_w{n}_b"]
            for n in (1, 2)
        )
        return decompositions.lokr(w1, w2, self.scale)

    def _check_shapes(self) -> None:
        shapes = {
            kind: tuple(self._like(kind).shape) for kind in self.kinds if kind not in ("alpha", "magnitude")
        }
        fit = all(len(shape) == 2 for shape in shapes.values())
        fit = fit and len({shapes[kind][axis] for kind, axis in _RANKS.items() if kind in shapes}) <= 1
        if fit and self._plain == "loha":
            fit = (shapes["hada_w1_a"][0], shapes["hada_w1_b"][1]) == (
                shapes["hada_w2_a"][0], shapes["hada_w2_b"][1],
            )  # fmt: skip
        if fit and "magnitude" in self.kinds:
            rows, columns = self.shape
            fit = tuple(self._like("magnitude").shape) in ((rows,), (rows, 1), (1, columns))
        if not fit or not all(self._like(kind).is_floating_point() for kind in self.kinds):
            said = ", ".join(f"{kind} {list(self._like(kind).shape)}" for kind in self.kinds)
            raise AdapterError(
                f"{self._label}: the tensors of {self.name} ({said}) do not fit each other. The file is damaged; "
                "ask for it again."
            )
        if self._base is not None and tuple(self._base.shape) != tuple(self.shape):
            raise AdapterError(
                f"{self._label}: {self.name} has shape {tuple(self.shape)}, this base needs {tuple(self._base.shape)}. "
                "Name the base that it was made for."
            )
        stated = {config.rank(self.name) for config in self._configs if self._plain in ("lora", "loha")}
        if stated - {self.rank}:
            raise AdapterError(
                f"{self._label} contradicts itself: {self.name} has rank {self.rank}, its config says {stated.pop()}."
            )

    def _like(self, kind: str) -> Tensor:
        return self._file.layout[self.kinds[kind]]

    def _read(self, kind: str) -> Tensor:
        name = self.kinds[kind]
        return check_values(name, self._file[name], self._label)
