"""The optimizers: parameter groups, AdamW, row-wise Adam for the cluster head, schedules, gradient clipping."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clip_cid.errors import ConfigError
from clip_cid.recipe import DistillConfig, settled
from clip_cid.training.ranks.distributed import Ranks


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


def refuse_long_warmup(settings: DistillConfig, steps: int) -> None:
    """Refuse a warm-up that is not shorter than the run.

    Nothing is shortened in silence, because the paper's 2,000 steps say nothing about a small run.

    Raises:
        ConfigError: It is as long or longer.
    """
    if (warmup := settled(settings.warmup_steps)) >= steps:
        raise ConfigError(
            f"distill.warmup_steps: {warmup:,}, but the whole run has {steps:,} steps.",
            fix=f"Set distill.warmup_steps to {steps // 10} (a tenth of the run), or train for longer.",
        )


def make_optimizers(
    student: nn.Module, objective: nn.Module, settings: DistillConfig, *, steps: int
) -> list[torch.optim.Optimizer]:
    """AdamW over everything that learns except the head.

    The head has an optimizer of its own, which is `RowAdam` where a step reads a sample of the centers.

    Raises:
        ConfigError: As `refuse_long_warmup`.
    """
    refuse_long_warmup(settings, steps)
    groups = parameter_groups(student, objective, settings)
    how: dict[str, Any] = {"lr": settings.lr, "betas": (settings.beta1, settings.beta2), "eps": settings.eps}
    fused = next(student.parameters()).device.type in ("cpu", "cuda")
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([group for group in groups if group["name"] != "head"], fused=fused, **how)
    ]

    sparse = getattr(getattr(objective, "head", None), "sparse", False)
    if head := [group for group in groups if group["name"] == "head"]:
        optimizers.append(RowAdam(head, **how) if sparse else torch.optim.AdamW(head, fused=fused, **how))
    return optimizers


class RowAdam(torch.optim.Optimizer):
    """Adam for a table where a step uses few rows: it neither reads nor moves the others and their moments.

    It takes sparse gradients (PartialFC's cluster head; `sampled_centers` in docs/method.md).

    A row's moments decay when it takes part, and its bias correction counts its own steps: with the
    table's count, as in `torch.optim.SparseAdam`, a row first met late would take steps of 0.7 to
    3.2 times the learning rate.

    Args:
        params: Tables (rows, dim) whose gradients are sparse in the rows, or groups of them.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second one.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the rows that have a gradient.

        Raises:
            ValueError: A gradient is dense: `torch.optim.AdamW` is for these.
        """
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is None:
                    continue
                if not table.grad.is_sparse:
                    raise ValueError("RowAdam needs a gradient that is sparse in the rows, got a dense one")
                self._move(table, table.grad.coalesce(), group)
        return loss

    @torch.no_grad()
    def _move(self, table: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[table]
        if not state:
            state["first"], state["second"] = torch.zeros_like(table), torch.zeros_like(table)
            state["steps"] = torch.zeros(len(table), dtype=torch.float32, device=table.device)

        # The moments of the rows that take part, and how many steps each row has taken.
        rows, values = grad.indices()[0], grad.values()
        beta1, beta2 = group["betas"]
        steps = state["steps"][rows] + 1
        first = state["first"][rows].lerp_(values, 1 - beta1)
        second = state["second"][rows].mul_(beta2).addcmul_(values, values, value=1 - beta2)
        for name, value in (("steps", steps), ("first", first), ("second", second)):
            state[name].index_copy_(0, rows, value)

        # Adam's step, with the bias correction of each row's own count.
        count = steps.double()[:, None]
        unbiased = (second / (1 - beta2**count).to(second.dtype)).sqrt_().add_(group["eps"])
        rate = (group["lr"] / (1 - beta1**count)).to(first.dtype)
        table.index_add_(0, rows, rate * first / unbiased, alpha=-1)


def clip_gradients(parameters: Sequence[tuple[nn.Parameter, bool]], max_norm: float, ranks: Ranks) -> Tensor:
    """Scale all gradients, dense or sparse, to a common norm of at most `max_norm`; returns the norm before.

    Args:
        parameters: Each with whether ranks hold different rows of it; of the others every rank has the same gradient.
        max_norm: May be infinite.
        ranks: Who hold the other rows.
    """
    # The norm of gradients that every rank has, and of those that are spread over the ranks.
    squares = {spread: torch.zeros((), device=ranks.device) for spread in (False, True)}
    gradients: list[Tensor] = []
    for parameter, spread in parameters:
        if (gradient := parameter.grad) is not None:
            gradients.append(gradient)
            values = gradient.coalesce().values() if gradient.is_sparse else gradient
            squares[spread] = squares[spread] + torch.linalg.vector_norm(values).square()
    if any(spread for _, spread in parameters):
        squares[True] = ranks.sum(squares[True])
    norm = (squares[True] + squares[False]).sqrt()

    share = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(share)
    return norm


def scheduled(points: Sequence[tuple[float, float]], share: float) -> float:
    """The factor at a share of the run: linear between the points, constant outside them; 1 without points."""
    if not points:
        return 1.0
    shares, factors = zip(*points, strict=True)
    return float(np.interp(share, shares, factors))
