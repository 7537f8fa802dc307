"""When to stop: a probe of reconstruction and edit between the steps of a tuning, and the step that it picks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from tav_peft.adapter import Adapter, StepProbe
from tav_peft.objective import target
from tav_peft.optimizing import TuningStep
from tav_peft.pipeline import TuneAVideoPipeline
from tav_peft.recipe import Recipe, TrainingSection
from tav_peft.shapes import Latents
from tav_peft.trail import Trail

PROBES = "probes"  # the tensor in the state to resume from: step, reconstruction and response of each
NOISES = (0.25, 0.5, 0.75)  # of the schedule's timesteps
_PROMPTS = 2  # of the recipe's edits; each costs a pass at each noise


class Watch:
    """Looks at what a tuning learns and loses, against the base: the clip back, and its edits.

    The clip's latents are noised to a few levels, by noise that is the same each time. How far the prediction with the
    caption is from the truth there says how well the clip would come back. How much of the difference that another
    prompt makes is still there, as the projection onto the difference it makes to the base, says how much of an edit
    would come: a UNet that only copies its clip predicts the same whatever the prompt. No pixels, and no other model.

    The other prompts are the recipe's first edits, or the empty one where it has none. It is made before anything is
    tuned; `mean` is of the clip's posterior, unscaled, and `autocast` what a prediction runs in.
    """

    def __init__(
        self,
        pipe: TuneAVideoPipeline,
        autocast: Callable[[], AbstractContextManager[None]],
        mean: Latents,
        caption: str,
        recipe: Recipe,
    ) -> None:
        latents = mean[:, :, : recipe.training.window].float() * pipe.vae.config.scaling_factor
        self._pipe, self._autocast = pipe, autocast
        self._schedule = DDPMScheduler.from_config(pipe.scheduler.config)
        prompts = [caption, *(recipe.edits[:_PROMPTS] or [""])]
        self._told = pipe.encode_prompts(prompts, size=pipe.pixel_size(latents))
        self._latents = latents.to(self._told.text.device)
        self._errors, self._changes = self._look()

    def measure(self, step: int) -> StepProbe:
        """Look at the UNet as it is after a step."""
        errors, changes = self._look()
        kept = [
            float((now * base).sum() / base.square().sum())
            for now, base in zip(changes, self._changes, strict=True)
        ]
        return StepProbe(
            step=step, reconstruction=sum(errors) / sum(self._errors), response=sum(kept) / len(kept)
        )

    @torch.no_grad()
    def _look(self) -> tuple[list[float], list[Tensor]]:
        """Give the error with the caption at each noise, and how the prediction changes with each other prompt."""
        errors, changes = [], []
        generator = torch.Generator().manual_seed(0)
        for share in NOISES:
            noise = torch.randn(self._latents.shape, generator=generator).to(self._latents.device)
            timestep = torch.tensor([int(share * self._schedule.config.num_train_timesteps)]).to(noise.device)
            noisy = self._schedule.add_noise(self._latents, noise, timestep).to(self._told.text.dtype)
            with self._autocast():  # a row at a time, so that no step of the tuning takes less memory
                own, *others = (
                    self._pipe.predict(noisy, timestep, self._told.rows(row)).float()
                    for row in range(len(self._told))
                )
            errors.append(float(F.mse_loss(own, target(self._schedule, self._latents, noise, timestep))))
            changes += [other - own for other in others]
        return errors, changes


class EarlyStopping:
    """Keeps the adapter of the best step so far and says when no better one is to be expected; off, it does nothing.

    The best is the one with the greatest `StepProbe.gain`. `agree` gives all processes of a tuning the same probe.
    """

    def __init__(
        self,
        settings: TrainingSection,
        trail: Trail | None,
        agree: Callable[[StepProbe], StepProbe] = lambda own: own,
    ) -> None:
        self._settings, self._trail, self._agree = settings, trail, agree
        self._watch: Watch | None = None
        self._probes: list[StepProbe] = []
        self._best: Adapter | None = None

    def begin(self, watch: Callable[[], Watch]) -> None:
        """Look at the base, if the settings ask for early stopping."""
        if self._settings.early_stopping:
            self._watch = watch()

    def watched(
        self, steps: Iterator[TuningStep], taken: int, adapter: Callable[[], Adapter]
    ) -> Iterator[TuningStep]:
        """Give the steps up to where no better one is to be expected, probing after each that is due.

        `taken` are the steps of before; the probe after the last of them may have been cut off.
        """
        self._look(taken, adapter)
        if self._is_over:
            return
        for done in steps:
            self._look(done.step, adapter)
            yield done
            if self._is_over:
                return

    def _look(self, step: int, adapter: Callable[[], Adapter]) -> None:
        due = step > 0 and (step % self._settings.probe_every == 0 or step == self._settings.steps)
        if self._watch is None or not due or step in (probe.step for probe in self._probes):
            return
        self._probes.append(self._agree(self._watch.measure(step)))
        is_best = self._best_step == step
        if not is_best and not self._is_over and step < self._settings.steps:
            return
        made = adapter()
        if is_best:
            self._best = made
        if self._trail is not None:  # of the last step too, for those who would have picked it
            made.save(self._trail.at_step(step))

    @property
    def _is_over(self) -> bool:
        wait = self._settings.patience * self._settings.probe_every
        return bool(self._probes) and self._probes[-1].step - self._best_step >= wait

    @property
    def chosen(self) -> Adapter | None:
        """The adapter of the best step, which tells all probes; None without early stopping."""
        if self._best is None:
            return None
        told = self._best.provenance.model_copy(update={"step_probes": tuple(self._probes)})
        return Adapter(self._best.tensors, self._best.peft_config, told)

    def state(self) -> dict[str, Tensor]:
        """Give what was probed, for the state to resume from."""
        if self._watch is None:
            return {}
        rows = [[probe.step, probe.reconstruction, probe.response] for probe in self._probes]
        return {PROBES: torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)}

    def restore(self, probes: Tensor | None) -> None:
        """Put back what `state` gave, and the best adapter from the trail.

        Raises:
            ValueError: when there is nothing to put back, or it is no list of probes.
            AdapterError: when the adapter is not there any more.

        """
        if (probes is None) != (self._watch is None):
            raise ValueError("its probes are missing")
        if probes is None:
            return
        if probes.ndim != 2 or probes.shape[1] != 3 or not bool(probes.isfinite().all()):
            raise ValueError("its probes are none")
        self._probes = [
            StepProbe(step=int(step), reconstruction=reconstruction, response=response)
            for step, reconstruction, response in probes.tolist()
        ]
        if self._probes and self._trail is not None:
            self._best = Adapter.load(self._trail.at_step(self._best_step))

    @property
    def _best_step(self) -> int:
        return max(self._probes, key=lambda probe: probe.gain).step
