"""Which sets a person wants to see, in which order, a page at a time."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from clip_cid.data.balance.kinds import KINDS
from clip_cid.review.opened_run import OpenedRun
from clip_cid.review.sets_at import Sets

Order = Literal["size", "width", "weakest link", "distance to the threshold", "random"]
ORDERS: tuple[Order, ...] = get_args(Order)
PAGE = 24


@dataclass(frozen=True)
class Wanted:
    """The question of a page."""

    order: Order = "size"
    page: int = 0
    seed: int = 0
    """Of the random order."""
    text: str = ""
    """Sets with an image whose key or caption contains it."""
    source: str = ""
    """Sets with an image of this source."""
    kind: str = ""
    """Sets with an image of this kind, among those that the balance compared by their pixels."""
    least: int = 2
    most: int | None = None
    """Images of a set."""
    decided: bool | None = None
    """Whether a decision names an image of the set."""


class Page(NamedTuple):
    """A page of the sets that are wanted."""

    total: int
    numbers: list[int]
    widths: Float[np.ndarray, " sets"]
    """Of all sets, NaN where it is not known."""


def page_of(run: OpenedRun, sets: Sets, wanted: Wanted) -> Page:
    """The sets of one page, and how many there are on all of them."""
    widths = run.widths(sets)
    chosen = np.flatnonzero(_wanted(run, sets, wanted))
    order = np.argsort(_sort_values(sets, widths, wanted)[chosen], kind="stable")
    some = order[wanted.page * PAGE : (wanted.page + 1) * PAGE]
    return Page(len(chosen), chosen[some].tolist(), widths)


def _wanted(run: OpenedRun, sets: Sets, wanted: Wanted) -> Bool[np.ndarray, " sets"]:
    chosen = sets.size >= wanted.least
    if wanted.most is not None:
        chosen &= sets.size <= wanted.most
    if wanted.text:
        chosen &= sets.any_of(run.containing(wanted.text))
    if wanted.source:
        names, source_of = run.sources
        chosen &= sets.any_of(source_of == names.index(wanted.source)) if wanted.source in names else False
    if wanted.kind:
        chosen &= sets.any_of(run.kind_of == KINDS.index(wanted.kind))
    if wanted.decided is not None:
        chosen &= sets.any_of(run.decided.named) == wanted.decided
    return chosen


def _sort_values(
    sets: Sets, widths: Float[np.ndarray, " sets"], wanted: Wanted
) -> Float[np.ndarray, " sets"] | Int[np.ndarray, " sets"]:
    """Ascending is the order of the page; sets that are equal in it follow their lowest rows."""
    if wanted.order == "size":
        return -sets.size
    if wanted.order == "width":
        return -widths  # NaN comes last
    if wanted.order == "weakest link":
        return -sets.weakest
    if wanted.order == "distance to the threshold":
        return np.minimum(sets.squared - sets.weakest, sets.grows_at - sets.squared)
    return np.random.default_rng(wanted.seed).random(len(sets))
