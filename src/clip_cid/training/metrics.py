"""The numbers of a step: for metrics.jsonl, and for the report of a step that is not finite."""

import math
from typing import Any

import torch

from clip_cid import tasks, units
from clip_cid.data.pairs.pairs import Pairs
from clip_cid.training.model import step_seed
from clip_cid.training.step import Learner, Measured


def step_numbers(measured: Measured, learner: Learner) -> dict[str, float | None]:
    """Loss, gradient and learning rate of a step; every loss by name, so that one that fails shows."""
    return {
        "loss": finite(measured.loss),
        **{f"loss/{name}": finite(part) for name, part in measured.parts.items()},
        "lr": measured.lr,
        "grad_norm": finite(measured.grad_norm),
        **{f"grad_norm/{name}": finite(norm) for name, norm in measured.part_norms.items()},
        **{f"weight/{name}": finite(weight) for name, weight in measured.weights.items()},
        "logit_scale": learner.model.student.logit_scale.detach().exp().item(),
    }


def sick_step(measured: Measured, learner: Learner, *, step: int, rows: list[int], pairs: Pairs) -> dict[str, Any]:
    """The data to inspect a step that is not finite, and to repeat it.

    Args:
        measured: The step in numbers.
        learner: As it is before the step.
        step: How many steps are done.
        rows: The pairs of the batch, over all ranks.
        pairs: All of them.
    """
    return {
        "step": step + 1,
        "seed": step_seed(learner.settings.seed, step),
        "what": measured.sick_part,
        "loss": str(measured.loss),
        "grad_norm": str(measured.grad_norm),
        "lr": measured.lr,
        "parts": {name: str(part) for name, part in measured.parts.items()},
        **{f"weight/{name}": str(weight) for name, weight in measured.weights.items()},
        "logit_scale": str(learner.model.student.logit_scale.detach().exp().item()),
        **{name: str(value) for name, value in learner.model.objective.diagnostics().items()},
        "pairs": [{"row": row, "key": pairs.key(row)} for row in rows],
    }


def finite(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def peak_memory(device: torch.device) -> dict[str, float]:
    """The peak memory of this process (and, on CUDA, of this device) so far, in GiB."""
    peak = {"memory_gib": units.gib(tasks.peak_memory())}
    if device.type == "cuda":
        peak["device_memory_gib"] = units.gib(torch.cuda.max_memory_allocated(device))
    return peak
