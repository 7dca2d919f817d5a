"""An alarm for the collapse that the paper warns of."""

import math
from typing import NamedTuple

from clip_cid import units

_DECAY = 0.95  # of the running means: single batches are noisy
_KL_DECAY = 0.8  # one batch's divergence is steady, and falls by orders of magnitude: a longer mean would follow late
_ONE_POINT = 0.95
_OWN_CENTER, _LOST = 0.1, 1 / 3  # a smaller share and a smaller fall are within the noise of batches of a few dozen
_NEAR_CHANCE = 10
_AGREES = 0.05
_DRIFTED = 0.1
_NO_BETTER = 0.8


class _Smoothed(NamedTuple):
    """A number over the steps: its running mean, and the greatest value of that mean."""

    now: float
    greatest: float


class CollapseAlarm:
    r"""Reports once that the numbers of `signs_of_collapse` in docs/method.md look like a collapse; stops nothing.

    Three signs, all on running means:

    - *one point*: the student's image embeddings have a mean of length above 0.95, though `patience` steps have
      passed. At first this is so for any student.
    - *own center lost*: the share of images whose own center is first has fallen to a third of its best, which was
      above 10 %.
    - *empty agreement*: `L_kl` has fallen to 5 % of its greatest while the centers moved by a tenth
      of their length, and the own center is first less than 80 % as often as at best, or hardly
      more often than by chance (10 times). Student and teacher then agree because the head no
      longer separates images. A student that knows only the teacher's mean keeps a far larger
      `L_kl`, a student that follows the teacher has the own center first, and a frozen head cannot
      do it.

    On the made-up data of `benchmarks/cluster_head.py collapse` the thresholds separate the
    collapsing variants from the healthy ones. A head that gives way only in part, as on the real
    embeddings there, is reported late or not at all. All runs of `benchmarks/cluster_head.py
    settings` stay silent (docs/results.md).

    Args:
        patience: Steps before a mean near length 1 counts; twice the warm-up is a good choice.
    """

    def __init__(self, *, patience: int) -> None:
        self.patience = patience
        self.fired = False
        self._step = 0
        self._smoothed: dict[str, _Smoothed] = {}

    def update(
        self,
        step: int,
        *,
        mean_image_norm: float | None = None,
        own_center: float | None = None,
        cluster_kl: float | None = None,
        head_drift: float | None = None,
        centers: float | None = None,
    ) -> str | None:
        """Take a step's numbers, any of which may be absent; not every step need be given.

        Args:
            step: Steps done so far; above that of the call before.
            mean_image_norm: Length of the mean of the student's image embeddings.
            own_center: Share of images whose own center is the student's first.
            cluster_kl: `L_kl`, unweighted.
            head_drift: How far the centers moved, as a share of their length; absent counts as far.
            centers: How many centers took part; without it chance counts as 0.

        Returns:
            The sign with its numbers, the first time there is one; None before and after.
        """
        self._step = step
        self._take("norm", mean_image_norm)
        self._take("kl", cluster_kl, decay=_KL_DECAY)
        self._take("own", own_center, start=0.0)  # else one lucky first batch would be the best
        if self.fired:
            return None

        chance = 0.0 if not centers else 1 / centers
        drift = math.inf if head_drift is None else head_drift
        message = self._one_point() or self._empty_agreement(drift, chance) or self._own_center_lost()
        self.fired = message is not None
        return message

    def state_dict(self) -> dict[str, float]:
        """Its whole state in plain numbers, for a checkpoint."""
        numbers = {
            f"{name}_{field}": value
            for name, smoothed in self._smoothed.items()
            for field, value in smoothed._asdict().items()
        }
        return {"step": self._step, "fired": int(self.fired), **numbers}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take over the state of another alarm."""
        self._step, self.fired = int(state["step"]), bool(state["fired"])
        names = [name.removesuffix("_now") for name in state if name.endswith("_now")]
        self._smoothed = {name: _Smoothed(state[f"{name}_now"], state[f"{name}_greatest"]) for name in names}

    def _take(self, name: str, value: float | None, *, decay: float = _DECAY, start: float | None = None) -> None:
        if value is None:
            return
        first = value if start is None else start
        before = self._smoothed.get(name, _Smoothed(first, first))
        now = decay * before.now + (1 - decay) * value
        self._smoothed[name] = _Smoothed(now, max(before.greatest, now))

    def _one_point(self) -> str | None:
        norm = self._smoothed.get("norm")
        if norm is None or self._step < self.patience or not norm.now > _ONE_POINT:
            return None
        return f"one point: the mean of the student's image embeddings has length {norm.now:.3f} (above {_ONE_POINT:g})"

    def _own_center_lost(self) -> str | None:
        own = self._smoothed.get("own")
        if own is None or not own.greatest > _OWN_CENTER or not own.now < _LOST * own.greatest:
            return None
        before, now = units.percent(own.greatest), units.percent(own.now)
        return f"own center lost: first for {now} of the images, after {before}"

    def _empty_agreement(self, drift: float, chance: float) -> str | None:
        own, kl = self._smoothed.get("own"), self._smoothed.get("kl")
        if own is None or kl is None or not kl.now < _AGREES * kl.greatest or not drift > _DRIFTED:
            return None
        if own.now > max(_NO_BETTER * own.greatest, _NEAR_CHANCE * chance):
            return None
        moved = "" if math.isinf(drift) else f"; the centers moved by {units.percent(drift, 0)} of their length"
        return (
            f"empty agreement: L_kl fell from {kl.greatest:.3g} to {kl.now:.3g}, but only"
            f" {units.percent(own.now)} of the images"
            f" have their own center first{moved}"
        )
