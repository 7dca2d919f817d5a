"""The set of duplicates to show as a tree, and the links that join it."""

import numpy as np
from jaxtyping import Int

from clip_cid.data.balance.forest_file import ForestArrays
from clip_cid.data.balance.tables import BalanceTables
from clip_cid.figures import single_linkage
from clip_cid.method.distances import from_squared, to_squared

_ROUNDING = 1e-9  # the threshold came from a squared distance and goes back to one


def choose(tables: BalanceTables, forest: ForestArrays) -> single_linkage.LinkedSet | None:
    """The largest connected set of at most 14 images, the first of these; None if all are larger.

    Args:
        tables: Of the balance.
        forest: Its spanning forest, over the same rows.
    """
    sets = tables.sets
    fitting = sets["component_size"] <= single_linkage.MOST_IMAGES
    if not fitting.any():
        return None
    chosen = int(np.where(fitting, sets["component_size"], 0).argmax())

    # The links within the threshold, and the images that they join to the kept one.
    squared = float(to_squared(np.array([tables.threshold]), tables.metric)[0])
    links = int(np.searchsorted(forest.squared, squared * (1 + _ROUNDING), side="right"))
    left, right = forest.left[:links], forest.right[:links]
    rows, inside = _joined_to(int(sets["kept_row"][chosen]), left, right)

    # Of the joined images those removed, and how far each is from the kept one.
    own = tables.members(sets["set"][sets["component"] == sets["component"][chosen]].tolist())
    removed = own["row"][~own["kept"]]
    places = np.searchsorted(rows, removed)
    kept = np.ones(len(rows), dtype=bool)
    kept[places] = False
    distances = np.zeros(len(rows))
    distances[places] = own["distance"][~own["kept"]]

    return single_linkage.LinkedSet(
        rows=rows,
        kept=kept,
        distances=distances,
        left=np.searchsorted(rows, left[inside]),
        right=np.searchsorted(rows, right[inside]),
        heights=from_squared(forest.squared[inside], tables.metric),
    )


def _joined_to(
    row: int, left: Int[np.ndarray, " links"], right: Int[np.ndarray, " links"]
) -> tuple[Int[np.ndarray, " images"], Int[np.ndarray, " inside"]]:
    """All rows that links join to this one, ascending, and these links.

    It is meant for a small set, because each hop is a pass over all links.
    """
    rows = np.array([row], dtype=np.int64)
    while True:
        inside = np.flatnonzero(np.isin(left, rows) | np.isin(right, rows))
        reached = np.unique(np.concatenate([rows, left[inside], right[inside]]))
        if len(reached) == len(rows):
            return rows, inside
        rows = reached
