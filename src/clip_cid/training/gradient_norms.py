"""The norms of the gradients of the losses, measured now and then, as a running mean."""

import dataclasses
from collections.abc import Mapping

_KEEP = 0.9  # of the mean at each measurement: one batch alone is noise, ten measurements are forgotten


@dataclasses.dataclass
class GradientNorms:
    """The norm of the gradient of each loss in the embeddings, unweighted; equal on all ranks."""

    every: int
    """Steps between two measurements."""
    mean: dict[str, float] = dataclasses.field(default_factory=dict[str, float])
    """By loss; empty before the first measurement."""

    def is_due(self, step: int) -> bool:
        """Whether this step measures: step 0, every so many, and any while nothing was measured."""
        return not self.mean or step % self.every == 0

    def add(self, norms: Mapping[str, float]) -> None:
        """Take a measurement into the mean, which becomes another dict."""
        self.mean = {name: _KEEP * self.mean.get(name, norm) + (1 - _KEEP) * norm for name, norm in norms.items()}

    def state_dict(self) -> dict[str, float]:
        return dict(self.mean)

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.mean = dict(state)
