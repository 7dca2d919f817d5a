"""Room on the disk for a training: without this check a full disk would end it at a checkpoint, hours later."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from clip_cid import units
from clip_cid.errors import RunError
from clip_cid.recipe import DistillConfig, MachineConfig
from clip_cid.training.model import Distillation


def checkpoint_bytes(model: Distillation, settings: DistillConfig) -> int:
    """The weights that move, two moments of each that is trained, and the EMA of the student's."""
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    total = _bytes(value for name, value in model.state_dict().items() if name not in frozen)
    total += 2 * _bytes(value for value in model.parameters() if value.requires_grad)
    if settings.ema_decay:
        total += _bytes(value for value in model.student.parameters() if value.requires_grad)
    return total


def checkpoints_bytes(model: Distillation, settings: DistillConfig, machine: MachineConfig) -> int:
    """All checkpoints that lie on the disk at once: those kept, the one being written, and the best student."""
    best = student_bytes(model) if settings.validation.keep == "best" else 0
    return (machine.keep_checkpoints + 1) * checkpoint_bytes(model, settings) + best


def student_bytes(model: Distillation) -> int:
    return _bytes(model.student.state_dict().values())


def check_room(out: Path, checkpoints: Path, needed: int) -> None:
    """Refuse to train if the disk has no room for what the training writes.

    Args:
        out: The folder of the training.
        checkpoints: Those that are there already; newer ones take their place.
        needed: Bytes.

    Raises:
        RunError: Less is free.
    """
    present = sum(path.stat().st_size for path in checkpoints.rglob("*") if path.is_file())
    free = shutil.disk_usage(out).free
    if free < needed - present:
        raise RunError(
            f"{out}: {units.size(needed - present)} are needed for checkpoints and the student, but"
            f" {units.size(free)} are free.",
            fix="Free some room, lower machine.keep_checkpoints, or use a run folder on another disk.",
        )


def _bytes(values: Iterable[Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in values)
