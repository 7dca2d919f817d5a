"""The exponential moving average (EMA) of the weights, which is often the better student."""

import contextlib
from collections.abc import Generator, Mapping

import torch
from torch import Tensor, nn


class EMA:
    """The EMA of what learns in a student, beside it.

    At first it follows quickly: the decay of a step is at most (1 + steps) / (10 + steps), so the random start
    loses its weight.

    Args:
        student: Its parameters now; names and places stay those of this module.
        decay: How much of the EMA a step keeps.
    """

    def __init__(self, student: nn.Module, *, decay: float) -> None:
        self._decay, self._steps = decay, 0
        self._learned = {name: value for name, value in student.named_parameters() if value.requires_grad}
        self._mean = {name: value.detach().clone() for name, value in self._learned.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights of another step."""
        self._steps += 1
        weight = 1 - min(self._decay, (1 + self._steps) / (10 + self._steps))
        for name, mean in self._mean.items():
            mean.lerp_(self._learned[name].detach(), weight)

    @contextlib.contextmanager
    def in_place(self) -> Generator[None]:
        """The student has the EMA's weights for as long as the block lasts."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def state_dict(self) -> dict[str, object]:
        return {"steps": self._steps, "mean": self._mean}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        steps, mean = state["steps"], state["mean"]
        assert isinstance(steps, int)
        assert isinstance(mean, dict)
        assert mean.keys() == self._mean.keys()
        self._steps = steps
        for name, value in self._mean.items():
            value.copy_(mean[name])

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, mean in self._mean.items():
            now: Tensor = self._learned[name].detach().clone()
            self._learned[name].copy_(mean)
            mean.copy_(now)
