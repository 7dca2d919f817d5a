"""What the page asks, answered as plain values: no HTTP here, and no HTML."""

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from clip_cid.data.balance.decisions import Decision
from clip_cid.data.balance.kinds import KINDS
from clip_cid.method.balance.decided_sets import DecidedRows
from clip_cid.method.balance.forest import Forest, ShareOutOfReach
from clip_cid.method.balance.kept_rows import distances_to
from clip_cid.method.distances import LARGEST, Metric, threshold_on
from clip_cid.method.unit_rows import UnitRows
from clip_cid.review.listing import ORDERS, Wanted, page_of
from clip_cid.review.opened_run import OpenedRun
from clip_cid.review.sets_at import Sets

Answer = dict[str, Any]

MEMBERS = 120
"""Images of a set on one page."""

_CHANGING = 4  # pairs shown on each side of a threshold
_FIRST = 6  # pictures on the card of a set
_CURVE = 160  # points
_TREE = 400  # links of a tree that is drawn
_ROUNDING = 1e-12  # the limit on another scale and back
_CAPTION = 300  # characters


class Answers:
    """The answers about one run."""

    def __init__(self, run: OpenedRun) -> None:
        self._run = run
        self._reading = threading.Lock()  # the store is read by one thread at a time

    def about(self) -> Answer:
        """What does not change while the page is open."""
        run = self._run
        forest = run.forest
        steps = np.linspace(0, 1, _CURVE + 1)
        limit = run.scales(forest.limit).on[run.metric]
        points = [
            min(threshold_on(run.metric, limit * step, "squared_euclidean"), forest.limit)
            for step in steps[1:].tolist()
        ]
        return {
            "name": run.folder.path.resolve().name,
            "images": run.ok,
            "metric": run.metric,
            "squared": run.squared,
            "limit": forest.limit,
            "limit_on_scale": limit,
            "curve": [0.0, *(run.decided.at.counts(point).links / run.ok for point in points)],
            "orders": ORDERS,
            "sources": run.sources[0],
            "kinds": [kind for kind in KINDS if kind],
            "file": str(run.log.path),
            "max_radius": run.recipe.balance.max_radius,
        }

    def threshold(self, squared: float) -> Answer:
        """Everything that moves with the slider, exactly.

        Raises:
            ValueError: The threshold is below 0 or beyond the forest's limit.
        """
        run = self._run
        squared = _checked(squared, run)
        at = run.decided.at
        links, sets = at.counts(squared)
        below = range(links - 1, max(-1, links - 1 - _CHANGING), -1)
        above = range(links, min(links + _CHANGING, len(at.forest.squared)))
        return {
            "squared": squared,
            "on": run.scales(squared).on,
            "removed": links,
            "share": links / run.ok,
            "sets": sets,
            "joined_last": [_link(at.forest, link) for link in below],
            "joined_next": [_link(at.forest, link) for link in above],
        }

    def threshold_on(self, scale: Metric, value: float) -> Answer:
        """The same, of a value on a scale.

        Raises:
            ValueError: As `threshold`, or out of the scale.
        """
        if value == 0:
            return self.threshold(0.0)
        if not 0 < value < LARGEST[scale]:
            raise ValueError(f"a {scale} distance is above 0 and below {LARGEST[scale]:g}, got {value:g}")
        squared, limit = threshold_on(scale, value, "squared_euclidean"), self._run.forest.limit
        return self.threshold(min(squared, limit) if squared <= limit * (1 + _ROUNDING) else squared)

    def threshold_for(self, share: float) -> Answer:
        """The same, of the smallest threshold that removes this share.

        Raises:
            ValueError: No threshold up to the limit does.
        """
        forest = self._run.decided.at.forest
        try:
            return self.threshold(forest.squared_for(share * self._run.ok / forest.rows))
        except ShareOutOfReach as error:
            largest = error.largest * forest.rows / self._run.ok
            raise ValueError(f"the largest distance of this balance removes {100 * largest:.2f} %") from error

    def sets(self, squared: float, wanted: Wanted) -> Answer:
        """A page of sets.

        Raises:
            ValueError: As `threshold`.
        """
        with self._reading:
            return self._page(self._run.sets(_checked(squared, self._run)), wanted)

    def _page(self, sets: Sets, wanted: Wanted) -> Answer:
        run = self._run
        page = page_of(run, sets, wanted)
        kept_for, named = run.kept_for(sets, page.numbers), run.decided.named
        cards = [self._card(sets, number, page.widths[number], kept_for, named) for number in page.numbers]
        kept = run.kept_count(sets)
        return {
            "total": page.total,
            "all": len(sets),
            "squared": sets.squared,
            "page": wanted.page,
            "kept": kept,
            "sets": cards,
        }

    def set_of(self, squared: float, row: int, page: int = 0) -> Answer:
        """One set with its images, tree and decisions; of a row that is alone, the row.

        Raises:
            ValueError: There is no such row, or as `threshold`.
        """
        run = self._run
        if not (0 <= row < run.store.rows and run.store.ok[row]):
            raise ValueError(f"there is no image {row}")
        with self._reading:
            return self._whole_set(squared, row, page)

    def _whole_set(self, squared: float, row: int, page: int) -> Answer:
        run = self._run
        sets = run.sets(_checked(squared, run))
        number = int(sets.set_of_row[row])
        rows = sets.members(number) if number >= 0 else np.array([row])
        kept_for = run.kept_for(sets, [number], most=None) if number >= 0 else self._alone(row)
        width = float(run.widths(sets)[number]) if number >= 0 else math.nan
        images = UnitRows(run.store.images.select(rows), name="images", any_length=False)

        # The kept ones first, then the others from the farthest: what a person doubts comes early.
        owner = np.array([kept_for[one] for one in rows.tolist()])
        places = np.searchsorted(rows, np.where(owner >= 0, owner, rows))
        to_kept = np.where(owner >= 0, distances_to(images, np.arange(len(rows)), places), np.nan)
        order = np.lexsort((rows, -np.nan_to_num(to_kept, nan=-1.0), owner != rows))
        shown = order[page * MEMBERS : (page + 1) * MEMBERS]
        view, decided = run.decided.at, run.decided.rows
        links = view.links_among(rows, sets.squared) if number >= 0 else np.zeros(0, dtype=np.int64)
        return {
            "row": int(rows[0]),
            "size": len(rows),
            "page": page,
            "pages": -(-len(rows) // MEMBERS),
            "width": None if math.isnan(width) else width,
            "weakest": float(sets.weakest[number]) if number >= 0 else None,
            "grows_at": _finite(float(sets.grows_at[number])) if number >= 0 else None,
            "images": [
                self._member(int(rows[at]), int(owner[at]), float(to_kept[at]), decided) for at in shown.tolist()
            ],
            "links": [_link(view.forest, link) for link in links[:_TREE].tolist()],
            "all_links": len(links),
            "decisions": self._decisions_about(set(rows.tolist())),
        }

    def decisions(self) -> Answer:
        """Every decision that holds, the latest first, and what of them is not here."""
        decided = self._run.decided
        lines = [_described(line) for line in reversed(decided.decisions.lines)]
        return {
            "count": len(lines),
            "latest": lines[:50],
            "gone": len(decided.gone),
            "gone_key": decided.gone[0].key if decided.gone else None,
            "apart": len(decided.rows.apart),
            "keep": len(decided.rows.keep),
            "remove": len(decided.rows.remove),
        }

    def _alone(self, row: int) -> dict[int, int]:
        return {row: -1 if row in self._run.decided.obeyed.remove else row}

    def _card(
        self, sets: Sets, number: int, width: float, kept_for: dict[int, int], named: Bool[np.ndarray, " rows"]
    ) -> Answer:
        rows = sets.members(number).tolist()
        kept = sorted({kept_for[row] for row in rows if kept_for.get(row, -1) >= 0})
        first = [*kept[:_FIRST], *(row for row in rows[: 2 * _FIRST] if row not in kept)][:_FIRST]
        return {
            "row": rows[0],
            "size": len(rows),
            "width": None if math.isnan(width) else float(width),
            "weakest": float(sets.weakest[number]),
            "grows_at": _finite(float(sets.grows_at[number])),
            "kept": kept[:_FIRST],
            "kept_count": len(kept),
            "known": rows[0] in kept_for,
            "rows": first,
            "caption": self._caption(first[0]),
            "decided": bool(named[rows].any()),
        }

    def _member(self, row: int, owner: int, to_kept: float, decided: DecidedRows) -> Answer:
        return {
            "row": row,
            "key": self._run.store.keys[row],
            "caption": self._caption(row),
            "kept_for": owner,
            "to_kept": None if math.isnan(to_kept) else to_kept,
            "kind": KINDS[self._run.kind_of[row]],
            "source": self._run.sources[0][self._run.sources[1][row]],
            "decided": "keep" if row in decided.keep else "remove" if row in decided.remove else "",
        }

    def _caption(self, row: int) -> str:
        caption = self._run.caption(row)
        return caption if len(caption) <= _CAPTION else caption[: _CAPTION - 1] + "…"

    def _decisions_about(self, rows: set[int]) -> list[Answer]:
        if not self._run.decided.named[sorted(rows)].any():
            return []
        keys = {self._run.store.keys[row] for row in rows}
        lines = self._run.decided.decisions.lines
        return [_described(line) for line in lines if any(image.key in keys for image in line.images)]


def _link(forest: Forest, link: int) -> Answer:
    return {
        "left": int(forest.left[link]),
        "right": int(forest.right[link]),
        "squared": float(forest.squared[link]),
        "place": link,
    }


def _described(line: Decision) -> Answer:
    return {
        "id": line.id,
        "decision": line.kind,
        "keys": [image.key for image in line.images[:4]],
        "images": len(line.images),
        "at": line.at,
    }


def _checked(squared: float, run: OpenedRun) -> float:
    if not 0 <= squared <= run.forest.limit:
        raise ValueError(
            f"the threshold must be from 0 to {run.scales(run.forest.limit).on[run.metric]:.6g} ({run.metric}), up to"
            " which this balance knows all pairs"
        )
    return squared


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def numbers(values: Sequence[Any]) -> list[int]:
    """Row numbers that a page sent.

    Raises:
        ValueError: They are something else.
    """
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        raise ValueError("rows: must be whole numbers")
    return list(values)
