"""The rows of a cluster head that learns, beside the other state of a checkpoint: each rank writes its own."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_cid.method.distill.cluster_distillation import CenterHead
from clip_cid.training.ranks.distributed import Ranks
from clip_cid.training.ranks.head_shards import WEIGHT, load_rows, num_rows, save_shard


class HeadRows:
    """Saves and loads the rows and their optimizer state; does nothing if no head learns.

    A checkpoint can be resumed with any number of ranks.

    Args:
        head: All centers or this rank's part of them.
        optimizers: One of them has the head.
        folder: Of the checkpoints; the rows of `step-000400.pt` lie in `step-000400.head`.
        ranks: Who have the other rows.
    """

    def __init__(
        self, head: CenterHead | None, optimizers: list[torch.optim.Optimizer], folder: Path, ranks: Ranks
    ) -> None:
        self._head = head if head is not None and head.weight.requires_grad else None
        self._optimizers, self._folder, self._ranks = optimizers, folder, ranks

    @property
    def names(self) -> set[str]:
        """The part of the model's state that is kept here."""
        return set() if self._head is None else {"objective.head.weight"}

    def save(self, step: int) -> None:
        """Write this rank's rows; when it returns, every rank's are there."""
        if self._head is not None:
            if self._ranks.is_main:
                self._of(step).mkdir(parents=True, exist_ok=True)
            self._ranks.wait()
            save_shard(
                self._ranks.find(self._of(step)),
                self._head,
                self._by_row(self._optimizer().state.get(self._head.weight, {})),
                step=step,
            )
            self._ranks.wait()
            if self._ranks.is_main:
                # what an attempt with another number of ranks has left, killed before its checkpoint was whole
                for path in self._of(step).glob("head-*"):
                    if not path.stem.endswith(f"-of-{self._ranks.size:05d}"):
                        path.unlink()

    def load(self, step: int) -> None:
        """Load this rank's rows.

        Raises:
            RunError: As `load_rows`.
        """
        if self._head is None:
            return
        first = 0 if self._head.shard is None else self._head.shard.first
        rows = load_rows(self._of(step), first, first + len(self._head.weight))
        with torch.no_grad():
            self._head.weight.copy_(rows.pop(WEIGHT))
        device = self._head.weight.device
        if rows:
            self._optimizer().state[self._head.weight].update({name: value.to(device) for name, value in rows.items()})

    def of_all(self, step: int) -> dict[str, Tensor]:
        """The rows of all ranks, as they were saved; by the name that the head's weight has in the objective.

        Raises:
            RunError: As `load_rows`.
        """
        if self._head is None:
            return {}
        folder = self._of(step)
        return {"head.weight": load_rows(folder, 0, num_rows(folder))[WEIGHT]}

    def without_rows(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """An optimizer's state, less what is kept here."""
        state = optimizer.state_dict()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for number, parameter in enumerate(parameters):
            if self._head is not None and parameter is self._head.weight and number in state["state"]:
                kept = state["state"][number]
                by_row = self._by_row(kept)
                state["state"] = {
                    **state["state"],
                    number: {name: value for name, value in kept.items() if name not in by_row},
                }
        return state

    def drop_old(self) -> None:
        """Remove the rows of deleted checkpoints."""
        if self._ranks.is_main:
            for folder in self._folder.glob("step-*.head"):
                if not folder.with_suffix(".pt").exists():
                    shutil.rmtree(folder)

    def _of(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}.head"

    def _optimizer(self) -> torch.optim.Optimizer:
        assert self._head is not None
        weight = self._head.weight
        having = (
            optimizer
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            if any(parameter is weight for parameter in group["params"])
        )
        return next(having)

    def _by_row(self, state: dict[str, Any]) -> dict[str, Tensor]:
        assert self._head is not None
        rows = len(self._head.weight)
        return {
            name: value
            for name, value in state.items()
            if isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows
        }
