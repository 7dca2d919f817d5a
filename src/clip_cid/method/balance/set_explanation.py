"""Why each image was removed: its distance to the kept one, and the longest link of its set."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from clip_cid.method.array_store import ArrayStore, MemoryStore
from clip_cid.method.balance.forest import Forest
from clip_cid.method.distances import from_squared, squared_distances
from clip_cid.method.jobs import Context, RunJob, counted_from, cut, in_parts
from clip_cid.method.unit_rows import UnitRows

EXACT_SIZE = 4096
"""Every pair of a group of at most this many rows is compared."""

_CELLS = 1 << 22  # numbers in a temporary array: 32 MB
_NUMBER_SECONDS = 2e-8  # of a core, for estimates only
_SWEEPS = 8  # two or three are enough nearly always; each one reads the group again


@dataclass(frozen=True, eq=False)
class Explanation:
    """Every group of two or more rows, and each of their rows.

    All distances are squared Euclidean distances of unit vectors.
    """

    group: Int[np.ndarray, " groups"]
    """The kept row of each group, ascending, by its number in `set_of`."""
    kept: Int[np.ndarray, " groups"]
    """The kept row."""
    size: Int[np.ndarray, " groups"]
    component: Int[np.ndarray, " groups"]
    """The connected set the group lies in: equal for the groups that share one; as numbered by `Forest.sets`."""
    component_size: Int[np.ndarray, " groups"]
    farthest: Float[np.ndarray, " groups"]
    """From the kept row to the farthest other one."""
    widest: Float[np.ndarray, " groups"]
    """Between the two rows that are farthest apart; a pair at that distance is always there."""
    widest_exact: Bool[np.ndarray, " groups"]
    """No pair is farther apart. False for groups above `EXACT_SIZE`, whose pairs were not all compared."""
    weakest: Float[np.ndarray, " groups"]
    """The longest link of the connected set's spanning tree: below this threshold the set falls apart."""
    weakest_left: Int[np.ndarray, " groups"]
    weakest_right: Int[np.ndarray, " groups"]
    row: Int[np.ndarray, " members"]
    """Every row of these groups, group by group, ascending within each."""
    owner: Int[np.ndarray, " members"]
    """The place of the row's group in the arrays above."""
    to_kept: Float[np.ndarray, " members"]
    """From the row to the kept one of its group, which is at 0 itself."""

    @property
    def removed(self) -> Bool[np.ndarray, " members"]:
        """Which of the members were removed."""
        return self.row != self.kept[self.owner]

    def with_rows(self, rows: Int[np.ndarray, " rows"]) -> "Explanation":
        """The same with row i renamed to `rows[i]`, for a balance of only some rows of a store."""
        names = ("kept", "weakest_left", "weakest_right", "row")
        return replace(self, **{name: rows[getattr(self, name)] for name in names})

    def set_columns(self, metric: str) -> dict[str, np.ndarray]:
        """One line a group, distances on this scale; `mean` is over the removed rows."""
        removed = self.removed
        to_kept = from_squared(self.to_kept[removed], metric)
        return {
            "set": self.group,
            "kept_row": self.kept,
            "size": self.size,
            "component": self.component,
            "component_size": self.component_size,
            "farthest": from_squared(self.farthest, metric),
            "mean": np.bincount(self.owner[removed], to_kept, len(self.group)) / (self.size - 1),
            "widest": from_squared(self.widest, metric),
            "widest_exact": self.widest_exact,
            "weakest_link": from_squared(self.weakest, metric),
            "weakest_left": self.weakest_left,
            "weakest_right": self.weakest_right,
        }

    def member_columns(self, metric: str) -> dict[str, np.ndarray]:
        """One line a member, distances on this scale."""
        distance = from_squared(self.to_kept, metric)
        return {"row": self.row, "set": self.group[self.owner], "kept": ~self.removed, "distance": distance}


def explain(
    images: UnitRows,
    kept: Int[np.ndarray, " kept"],
    set_of: Int[np.ndarray, " rows"],
    forest: Forest,
    squared: float,
    *,
    store: ArrayStore | None = None,
    run_job: RunJob | None = None,
) -> Explanation:
    """Measure every group of two or more rows.

    A group holds the rows of one kept row: the whole connected set, or its nearest part when a set has
    several kept rows.

    Args:
        images: The rows that were balanced.
        kept: Ascending.
        set_of: For each row, the place in `kept` of the row kept for it; a row with -1 is in no group.
        forest: Of the same rows; what joined them.
        squared: The threshold, a squared distance up to the forest's limit.
        store: Where arrays are kept that tasks read; in memory when None.
        run_job: Does the tasks; in this process, one by one, when None.

    Raises:
        ValueError: The arguments do not belong to each other.
    """
    _check(len(images), kept, set_of, forest)
    component_of = forest.sets(squared)
    apart = np.flatnonzero((set_of >= 0) & (component_of != component_of[kept[set_of]]))
    if len(apart):
        raise ValueError(
            f"forest must join each row to the one kept for it at squared {squared:.6g}, not so row {apart[0]}"
        )

    # The members of each group of two or more, one group after the other.
    all_sizes = np.bincount(set_of[set_of >= 0], minlength=len(kept))
    group = np.flatnonzero(all_sizes > 1)
    row = np.flatnonzero((set_of >= 0) & (all_sizes[set_of] > 1))
    row = row[np.argsort(set_of[row], kind="stable")]
    size = all_sizes[group]
    context = Context(images, None, MemoryStore() if store is None else store, run_job)
    to_kept, widest = _measure(context, row, size, kept[group])
    farthest = np.maximum.reduceat(to_kept, np.cumsum(size) - size) if len(group) else np.empty(0)

    # The longest link of each connected set: links ascend, and the last one written stays.
    component = component_of[kept[group]]
    links = forest.links(squared)
    last_link = np.full(int(component_of.max()) + 1, -1)
    last_link[component_of[forest.left[:links]]] = np.arange(links)
    weakest = last_link[component]

    return Explanation(
        group=group,
        kept=kept[group],
        size=size,
        component=component,
        component_size=np.bincount(component_of)[component],
        farthest=farthest,
        widest=np.maximum(widest, farthest),  # two ways to round one distance must not contradict each other
        widest_exact=size <= EXACT_SIZE,
        weakest=forest.squared[weakest],
        weakest_left=forest.left[weakest],
        weakest_right=forest.right[weakest],
        row=row,
        owner=np.repeat(np.arange(len(group)), size),
        to_kept=to_kept,
    )


def _measure(
    context: Context,
    row: Int[np.ndarray, " members"],
    size: Int[np.ndarray, " groups"],
    kept: Int[np.ndarray, " groups"],
) -> tuple[Float[np.ndarray, " members"], Float[np.ndarray, " groups"]]:
    """From each member to the kept row of its group, and the widest pair of each group."""
    images = context.images
    by_size = np.argsort(size, kind="stable")
    listed = size[by_size]
    starts = (np.cumsum(size) - size)[by_size]

    # Batches of groups of one size, and parts of batches.
    edges = _batch_edges(listed, images.dim)
    first_member = np.concatenate([[0], np.cumsum(listed)])[edges]
    parts = cut(np.diff(first_member), images.gathered_rows)
    arrays = {"row": row, "starts": starts, "sizes": listed, "kept": kept[by_size], "edges": edges, "parts": parts}
    measured = in_parts(
        context,
        "explain",
        _measure_part,
        arrays,
        np.diff(first_member[parts]).tolist(),
        row_seconds=_NUMBER_SECONDS * images.dim,
    )

    # Each part holds its members and then its groups, in the order of the batches.
    to_kept, widest = np.empty(len(row)), np.empty(len(size))
    for values, (start, stop) in zip(measured, itertools.pairwise(edges[parts].tolist()), strict=True):
        groups = slice(start, stop)
        members = counted_from(starts[groups], listed[groups])
        to_kept[members] = values[: len(members)]
        widest[by_size[groups]] = values[len(members) :]
    return to_kept, widest


def _measure_part(
    arrays: Mapping[str, np.ndarray], images: UnitRows, texts: UnitRows | None, part: int
) -> Float[np.ndarray, " members_and_groups"]:
    """What is measured of some batches: of each member, then of each group."""
    first_batch, last_batch = arrays["parts"][part : part + 2].tolist()
    edges = arrays["edges"][first_batch : last_batch + 1].tolist()
    starts, sizes = (arrays[name][edges[0] : edges[-1]] for name in ("starts", "sizes"))
    row, kept = arrays["row"][counted_from(starts, sizes)], arrays["kept"][edges[0] : edges[-1]]
    images = images.gathered(row)
    is_kept = row == np.repeat(kept, sizes)

    to_kept, widest, first = np.empty(len(row)), np.empty(len(sizes)), 0
    for start, stop in itertools.pairwise(edges):
        groups, width = slice(start - edges[0], stop - edges[0]), int(sizes[start - edges[0]])
        own = slice(first, first + (stop - start) * width)
        place = is_kept[own].reshape(-1, width).argmax(axis=1)

        if width > EXACT_SIZE:
            members = np.arange(own.start, own.stop)
            to_kept[own], widest[groups] = _sweep(images, members, own.start + int(place[0]))
        else:
            vectors = images[own].reshape(-1, width, images.dim)
            of_kept = vectors[np.arange(len(vectors)), place]
            distances = squared_distances(vectors, of_kept[:, None])
            to_kept[own] = distances.ravel()
            widest[groups] = distances.max(axis=1) if width == 2 else _widest(vectors)
        first = own.stop

    return np.concatenate([to_kept, widest])


def _check(rows: int, kept: Int[np.ndarray, " kept"], set_of: Int[np.ndarray, " rows"], forest: Forest) -> None:
    if len(set_of) != rows or forest.rows != rows:
        raise ValueError(f"set_of and forest must be of {rows} rows, got {len(set_of)} and {forest.rows}")
    if set_of.min() < -1 or set_of.max() >= len(kept):
        raise ValueError(f"set_of must be -1 to {len(kept) - 1}, got {set_of.min()} to {set_of.max()}")
    if kept.min() < 0 or kept.max() >= rows or (set_of[kept] != np.arange(len(kept))).any():
        raise ValueError("kept must hold one row of each set, in the order of the sets")


def _batch_edges(sizes: Int[np.ndarray, " groups"], dim: int) -> Int[np.ndarray, " edges"]:
    """Where to cut groups, in the order of their sizes, into batches of one size that fit into memory."""
    ends = np.flatnonzero(np.diff(sizes, append=0)) + 1
    edges = [0]
    for stop in ends.tolist():
        size = int(sizes[stop - 1])
        at_once = 1 if size > EXACT_SIZE else max(1, _CELLS // dim // size)
        edges += [*range(edges[-1] + at_once, stop, at_once), stop]
    return np.array(edges)


def _widest(vectors: Float[np.ndarray, "groups size dim"]) -> Float[np.ndarray, " groups"]:
    """The largest distance between two rows of each group: chosen by the cosines, measured by the difference."""
    groups, size, _ = vectors.shape
    each = np.arange(groups)
    widest = np.zeros(groups)

    step = max(1, _CELLS // groups // size)
    for start in range(0, size, step):
        left, right = vectors[:, start : start + step], vectors[:, start:]  # the rest of the matrix is its mirror image
        cosines = left @ right.transpose(0, 2, 1)
        i, j = np.divmod(cosines.reshape(groups, -1).argmin(axis=1), right.shape[1])
        np.maximum(widest, squared_distances(left[each, i], right[each, j]), out=widest)
    return widest


def _sweep(images: UnitRows, rows: Int[np.ndarray, " size"], kept: int) -> tuple[Float[np.ndarray, " size"], float]:
    """Distances to the kept row, and a lower bound of the widest pair, of a group too large to compare all pairs.

    From the kept row to the row farthest from it, from that one to the one farthest from it, and so on while it helps.
    In Euclidean terms the bound is at least half of the widest distance.
    """
    to_kept = _distances_to(images, rows, kept)
    widest, at = float(to_kept.max()), int(to_kept.argmax())
    for _ in range(_SWEEPS):
        distances = _distances_to(images, rows, int(rows[at]))
        if distances.max() <= widest:
            break
        widest, at = float(distances.max()), int(distances.argmax())
    return to_kept, widest


def _distances_to(images: UnitRows, rows: Int[np.ndarray, " size"], one: int) -> Float[np.ndarray, " size"]:
    origin = images[np.array([one])]
    distances = np.empty(len(rows))
    portion = max(1, _CELLS // images.dim)
    for start in range(0, len(rows), portion):
        some = slice(start, start + portion)
        distances[some] = squared_distances(images[rows[some]], origin)
    return distances
