"""Who learns how fast: parameter groups of AdamW, and the learning rate as a function of the step."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clip_cid.errors import ConfigError
from clip_cid.recipe import DistillConfig
from clip_cid.training.ranks.distributed import Ranks
from clip_cid.training.ranks.parallel import local
from clip_cid.training.row_adam import RowAdam


def learning_rate_share(step: int, *, warmup_steps: int, steps: int) -> float:
    """Share of the peak learning rate at a step (from 0): linear warm-up to 1, then half a cosine towards 0.

    Raises:
        ValueError: The step is not one of the run, or the warm-up leaves no step at the peak.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step: must be in [0, {steps}), got {step}")
    if not 0 <= warmup_steps < steps:
        raise ValueError(f"warmup_steps: must be in [0, {steps}), got {warmup_steps}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], share: float) -> None:
    """Give every group this share of its own peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak_lr"]


def parameter_groups(student: nn.Module, objective: nn.Module, settings: DistillConfig) -> list[dict[str, object]]:
    """Groups of parameters that share a peak learning rate and a weight decay; frozen ones are in none.

    Vectors and scalars (biases, norms, scales) and the tables the student itself names in `no_weight_decay`
    (its positions) do not decay. Neither does the cluster head, whose rows are used at unit length: there decay would
    only change how far a step turns them. The head learns at its own rate.
    """
    named_by_student = getattr(student, "no_weight_decay", set)()
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    head: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim < 2 or name in named_by_student else decay).append(parameter)
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            group = head if name.startswith("head.") else plain if parameter.ndim < 2 else decay
            group.append(parameter)
    groups: list[dict[str, object]] = [
        {"name": "decay", "params": decay, "peak_lr": settings.lr, "weight_decay": settings.weight_decay},
        {"name": "no decay", "params": plain, "peak_lr": settings.lr, "weight_decay": 0.0},
        {"name": "head", "params": head, "peak_lr": settings.head_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizers(
    student: nn.Module, objective: nn.Module, settings: DistillConfig, *, steps: int
) -> list[torch.optim.Optimizer]:
    """AdamW over everything that learns but the head, which has an optimizer of its own: `RowAdam` where a step sees a sample.

    The head is never spread by FSDP, and float16's scaler cannot unscale gradients that are spread together with others.

    Raises:
        ConfigError: The warm-up is not shorter than the run. Nothing is shortened in silence, because the paper's
            2,000 steps say nothing about a small run.
    """
    if settings.warmup_steps >= steps:
        raise ConfigError(
            f"distill.warmup_steps: {settings.warmup_steps:,}, but the whole run has {steps:,} steps.",
            fix=f"Set distill.warmup_steps to {steps // 10} (a tenth of the run), or train for longer.",
        )
    groups = parameter_groups(student, objective, settings)
    device = next(student.parameters()).device
    how: dict[str, Any] = {"lr": settings.lr, "betas": (settings.beta1, settings.beta2), "eps": settings.eps}
    sparse = getattr(getattr(objective, "head", None), "sparse", False)
    fused = device.type in ("cpu", "cuda")
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([group for group in groups if group["name"] != "head"], fused=fused, **how)
    ]
    if head := [group for group in groups if group["name"] == "head"]:
        found.append(RowAdam(head, **how) if sparse else torch.optim.AdamW(head, fused=fused, **how))
    return found


def shorten_gradients(parameters: Sequence[tuple[nn.Parameter, bool]], longest: float, ranks: Ranks) -> Tensor:
    """Scale all gradients, dense or sparse, to a common length of at most `longest`; returns the length before.

    Args:
        parameters: Each with whether ranks hold different parts of it; of the others every rank has the same gradient.
        longest: May be infinite.
        ranks: Who hold the other parts.
    """
    squares = {False: torch.zeros(()), True: torch.zeros(())}
    gradients: list[Tensor] = []
    for parameter, spread in parameters:
        if parameter.grad is not None:
            gradient = local(parameter.grad)
            gradients.append(gradient)
            values = gradient.coalesce().values() if gradient.is_sparse else gradient
            squares[spread] = squares[spread].to(values.device) + torch.linalg.vector_norm(values).square()
    if any(spread for _, spread in parameters):
        squares[True] = ranks.sum(squares[True])
    length = (squares[True].to(squares[False].device) + squares[False]).sqrt()
    share = (longest / (length + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(share)
    return length


def scheduled(points: Sequence[tuple[float, float]], share: float) -> float:
    """The factor at a share of the run: straight between the points, level beyond the first and the last; 1 without any."""
    if not points:
        return 1.0
    shares, factors = zip(*points, strict=True)
    return float(np.interp(share, shares, factors))
