"""The state to resume a training exactly: after a kill at any instant the final weights are the same.

The state is a list of parts. Each part saves and loads itself, and saving and resuming use the same list, so
no part can be missing in one of them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from clip_cid.training.model import Distillation
from clip_cid.training.ranks.head_rows import HeadRows
from clip_cid.training.step import Learner


@runtime_checkable
class Part(Protocol):
    """A part of the trainer's state: of plain values, lists, dicts and tensors."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


class Weights:
    """The weights that move, except those in files of their own.

    A frozen head may be gigabytes, and comes from the centers again. The rows of a head that learns are in `HeadRows`.
    """

    def __init__(self, model: Distillation, head_rows: HeadRows) -> None:
        self._model, self._head_rows = model, head_rows

    def state_dict(self) -> dict[str, Tensor]:
        elsewhere = self._elsewhere()
        return {name: value for name, value in self._model.state_dict().items() if name not in elsewhere}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        own = self._model.state_dict()
        assert own.keys() - state.keys() == self._elsewhere()
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)

    def _elsewhere(self) -> set[str]:
        frozen = {name for name, parameter in self._model.named_parameters() if not parameter.requires_grad}
        return frozen | self._head_rows.names


class Moments:
    """An optimizer's state, except the rows in files of their own."""

    def __init__(self, optimizer: torch.optim.Optimizer, head_rows: HeadRows) -> None:
        self._optimizer, self._head_rows = optimizer, head_rows

    def state_dict(self) -> dict[str, Any]:
        return self._head_rows.without_rows(self._optimizer)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state)


@dataclasses.dataclass
class Progress:
    """How far the training is."""

    step: int = 0
    """How many steps are done."""
    skipped_steps: int = 0
    last_line: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    """The last training line of metrics.jsonl."""

    def state_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.skipped_steps, self.last_line = state["step"], state["skipped_steps"], state["last_line"]


def learner_parts(learner: Learner, head_rows: HeadRows) -> dict[str, Part]:
    """The parts of a learner that a checkpoint holds, by name."""
    parts: dict[str, Part] = {"model": Weights(learner.model, head_rows), "scaler": learner.scaler}
    for number, optimizer in enumerate(learner.optimizers):
        parts[f"optimizer {number}"] = Moments(optimizer, head_rows)
    if learner.ema is not None:
        parts["ema"] = learner.ema
    if learner.gradient_norms is not None:
        parts["gradient norms"] = learner.gradient_norms
    return parts
