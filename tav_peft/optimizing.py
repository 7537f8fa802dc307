"""The optimizer's way: its steps, what each depends on, and where it leaves finite numbers."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tav_peft.errors import TuningError
from tav_peft.processes import sum_over_processes
from tav_peft.recipe import TrainingSection

_MOMENTS = ("exp_avg", "exp_avg_sq")
_SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
_MOST_SKIPPED = 20  # halvings in a row take torch's first loss scale, 65536, below 1
_FIXES = "Lower training.lr, or set training.precision to fp32."


@dataclasses.dataclass(frozen=True)
class TuningStep:
    """How far a tuning has come; told after every step."""

    step: int
    steps: int
    loss: float
    seconds_per_step: float


class Optimization:
    """Parameters by name, AdamW (Loshchilov & Hutter 2019) on them, and the losses of the steps they have taken.

    `generator` is what the steps draw from. In fp16 the accelerator scales the loss, and leaves out an update whose
    gradients overflow; `updates` counts those that were made. In several processes each adds up the gradients of its own
    losses, and all take the step with the sum.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        settings: TrainingSection,
        accelerator: Accelerator,
        generator: torch.Generator,
    ) -> None:
        self.losses: list[float] = []
        self.updates = 0
        self._parameters, self._settings, self._generator = parameters, settings, generator
        self._accelerator = accelerator
        self._optimizer = torch.optim.AdamW(
            parameters.values(),
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
        )
        self._drawn = generator.get_state()  # as of the last whole step

    def steps(self, draw: Callable[[], Sequence[Callable[[], Tensor]]]) -> Iterator[TuningStep]:
        """Take the steps that are left, of which every one ends in a state to save.

        `draw` gives what a step adds up: functions that return losses, each already a share of the step's.

        Raises:
            TuningError: where the loss or a gradient is no finite number, or gradients overflow again and again.

        """
        prepared, settings = self._accelerator.prepare_optimizer(self._optimizer), self._settings
        skipped = 0
        for step in range(len(self.losses) + 1, settings.steps + 1):
            started = time.perf_counter()
            value = self._backward(draw(), step)
            norm = self._accelerator.clip_grad_norm_(list(self._parameters.values()), settings.max_grad_norm)
            if self._accelerator.scaler is None and not math.isfinite(float(norm)):
                raise TuningError(f"The gradients are not finite at step {step}. {_FIXES}")
            prepared.step()
            prepared.zero_grad(set_to_none=True)
            skipped = skipped + 1 if prepared.step_was_skipped else 0
            if skipped > _MOST_SKIPPED:
                raise TuningError(
                    f"The gradients overflow fp16 in {skipped} steps in a row, up to step {step}, at any scale of the "
                    "loss. Set training.precision to bf16 or fp32."
                )
            self.updates += not skipped
            self.losses.append(value)
            self._drawn = self._generator.get_state()
            yield TuningStep(step, settings.steps, value, time.perf_counter() - started)

    def _backward(self, losses: Sequence[Callable[[], Tensor]], step: int) -> float:
        """Add up the gradients of the losses, over all processes too, and return the losses' sum."""
        total = 0.0
        for loss_of in losses:
            with self._accelerator.autocast():
                loss = loss_of()
            self._accelerator.backward(loss)
            total += loss.item()
        if self._accelerator.num_processes > 1:
            gradients = [parameter.grad for parameter in self._parameters.values()]
            total = sum_over_processes(self._accelerator, gradients, total)
        if not math.isfinite(total):  # and so in every process
            raise TuningError(f"The loss is {total} at step {step}. {_FIXES}")
        return total

    @property
    def is_whole(self) -> bool:
        """Tell whether every parameter has taken all updates; Ctrl-C may come in the middle of one."""
        return all(int(state["step"]) == self.updates for state in self._optimizer.state.values())

    def state(self) -> dict[str, Tensor]:
        """Give everything that the next step depends on, as named tensors."""
        tensors = {
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "updates": torch.tensor(self.updates),
            "generator": self._drawn,
        }
        for name, parameter in self._parameters.items():
            tensors[f"parameter/{name}"] = parameter.detach()
            none = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            for moment in _MOMENTS:
                tensors[f"{moment}/{name}"] = self._optimizer.state.get(parameter, {}).get(moment, none)
        if self._accelerator.scaler is not None:
            known = self._accelerator.scaler.state_dict()
            tensors["scaler"] = torch.tensor([float(known[key]) for key in _SCALER], dtype=torch.float64)
        return tensors

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave.

        Raises:
            ValueError: when these are not the tensors of such a state; nothing is changed then.

        """
        expected = self.state()
        for name in expected.keys() ^ tensors.keys():
            raise ValueError(f"{name} is missing or has no place")
        for name, like in expected.items():
            shape = like.shape if name != "losses" else tensors[name].flatten().shape
            if (tensors[name].shape, tensors[name].dtype) != (shape, like.dtype):
                raise ValueError(f"{name} has another shape or dtype")
        losses, updates = tensors["losses"].tolist(), int(tensors["updates"])
        if not 0 <= updates <= len(losses) <= self._settings.steps:
            raise ValueError(f"{updates} updates in {len(losses)} of {self._settings.steps} steps")
        self._generator.set_state(tensors["generator"])
        self.losses, self.updates, self._drawn = losses, updates, tensors["generator"]
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[f"parameter/{name}"])
            if updates:
                moments = {key: tensors[f"{key}/{name}"].to(parameter.device) for key in _MOMENTS}
                self._optimizer.state[parameter] = {"step": torch.tensor(float(updates)), **moments}
        if "scaler" in tensors:
            known = dict(zip(_SCALER, tensors["scaler"].tolist(), strict=True))
            whole = {key: int(known[key]) for key in ("growth_interval", "_growth_tracker")}
            self._accelerator.scaler.load_state_dict({**known, **whole})
