"""What pocket's trainings share: processes that average gradients, checkpoints to resume from, a cosine schedule."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn


def join() -> tuple[int, int]:
    """Join the other training processes if torchrun started several; return (rank, world size)."""
    if "RANK" not in os.environ:
        return 0, 1
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def cosine(step: int, steps: int, warm_up: int = 100, floor: float = 0.02) -> float:
    """Scale of the learning rate: linear warm-up, then half a cosine down to `floor`."""
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def trapezoid(step: int, steps: int, warm_up: int = 200, cool_down: float = 0.25) -> float:
    """Scale of the learning rate: linear warm-up, constant, linear to 0 over the last `cool_down` of the steps.

    Unlike a cosine it stays right when training is resumed with another number of steps.
    """
    return min(1.0, (step + 1) / warm_up, (steps - step) / (cool_down * steps))


def average_gradients(parameters: list[nn.Parameter], world: int) -> None:
    """Average gradients over the processes in one message."""
    if world == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    torch.distributed.all_reduce(flat)
    flat /= world
    offset = 0
    for p in parameters:
        p.grad.copy_(flat[offset : offset + p.numel()].view_as(p))
        offset += p.numel()


def train(
    module: nn.Module,
    loss_of: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    folder: Path,
    schedule: Callable[[int, int], float] = cosine,
    betas: tuple[float, float] = (0.9, 0.99),
    ema_decay: float = 0.999,
    minutes: float = 1e9,
    save_every: int = 200,
) -> Iterator[tuple[int, float]]:
    """Train `module` on `loss_of(step)`, resuming from `folder`; yields (step, loss) and keeps an average of the weights.

    The checkpoint holds the weights, their exponential moving average and the optimizer's state.
    """
    rank, world = join() if not torch.distributed.is_initialized() else _ranks()
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=0.01)
    average = {name: p.detach().clone() for name, p in module.named_parameters()}
    checkpoint = folder / "checkpoint.pt"
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        average, first = state["average"], state["step"]
    started = time.monotonic()
    for step in range(first, steps):
        scale = schedule(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        torch.manual_seed(step * world + rank)
        loss = loss_of(step * world + rank)
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        average_gradients(parameters, world)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        keep = min(ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, p in module.named_parameters():
                average[name].lerp_(p, 1 - keep)
        out_of_time = time.monotonic() - started > 60 * minutes
        if world > 1:
            flag = torch.tensor(float(out_of_time))
            torch.distributed.all_reduce(flag)
            out_of_time = flag.item() > 0
        if rank == 0 and ((step + 1) % save_every == 0 or step + 1 == steps or out_of_time):
            state = {
                "module": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average,
                "step": step + 1,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
        yield step + 1, loss.item()
        if out_of_time:
            break


def _ranks() -> tuple[int, int]:
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
