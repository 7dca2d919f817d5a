"""The centers that spherical k-means starts from."""

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int

from clip_cid.method.array_store import ArrayStore
from clip_cid.method.cluster.kmeans_rounds import kmeans_rounds
from clip_cid.method.cluster.nearest_centers import CenterSearch
from clip_cid.method.cluster.range_tasks import MakeArrays, RangeJob, Ranges, Shared, cut_rows
from clip_cid.method.jobs import cut
from clip_cid.method.packed_arrays import unpacked
from clip_cid.method.unit_rows import UnitRows

_RANDOM_BELOW = 64  # centers; fewer start as random rows
_ROUNDS = 10  # of k-means, at each of the two levels
_POINTS_PER_CENTER, _POINTS_PER_GROUP = 100, 256  # rows of the samples


def two_level_start(
    images: UnitRows,
    num_centers: int,
    *,
    seed: int,
    device: str = "cpu",
    numbers: Int[np.ndarray, " rows"] | None = None,
    shared: Shared | None = None,
) -> Float32[np.ndarray, "centers dim"]:
    """The centers to start from, spread over about sqrt(K) groups of a sample; `two_level_start` in docs/method.md.

    A group with n_g of the n rows of the sample gets K n_g / n centers, rounded so that they add up. K-means
    within the group places them, and each then starts as the row nearest to it. The mean of few rows would
    keep these rows, even if another grouping were better. At both levels a row is compared with about
    sqrt(K) centers only. Fewer than 64 centers start as random rows.

    Args:
        images: The rows to start from.
        num_centers: K.
        seed: Of all that is random.
        device: Where products are computed.
        numbers: Which of all rows they are, where tasks do the work; all when None.
        shared: Who does the tasks. This process does everything when None.
    """
    random = np.random.default_rng([seed, 0])
    if num_centers < _RANDOM_BELOW:
        return _random_rows(images, num_centers, random)

    sample = images
    if len(images) > _POINTS_PER_CENTER * num_centers:
        chosen = _draw(len(images), _POINTS_PER_CENTER * num_centers, random)
        sample, numbers = images.part(chosen), chosen if numbers is None else numbers[chosen]

    # The groups are clusters of a part of the sample, which is read once.
    groups = round(math.sqrt(num_centers))
    coarse = sample.read(_draw(len(sample), min(len(sample), _POINTS_PER_GROUP * groups), random))
    group_centers = _kmeans(coarse, _random_rows(coarse, groups, random), device)
    if shared is None:
        members = _Groups(sample, group_centers, device)
    else:
        members = _GroupsByTasks(shared, sample, numbers, group_centers, device)

    # What is random is drawn here, so that the groups can be done in any order.
    shares = _shares(members.sizes, num_centers)
    starts = [
        _draw(size, share, random) if share else np.empty(0, dtype=np.int64)
        for size, share in zip(members.sizes.tolist(), shares.tolist(), strict=True)
    ]
    return members.centers(starts)


class _Groups:
    """The rows of each group, in this process."""

    def __init__(self, sample: UnitRows, group_centers: Float32[np.ndarray, "groups dim"], device: str) -> None:
        self._sample, self._device = sample, device
        group_of, _ = _search(group_centers, device).assign(sample)
        self.sizes: Int[np.ndarray, " groups"] = np.bincount(group_of, minlength=len(group_centers))
        self._members = np.split(np.argsort(group_of, kind="stable"), np.cumsum(self.sizes)[:-1])

    def centers(self, starts: Sequence[Int[np.ndarray, " _"]]) -> Float32[np.ndarray, "centers dim"]:
        """The centers of all groups, of each so many as rows it starts from."""
        return np.concatenate(
            [
                _centers_of_group(self._sample.gathered(rows), start, self._device)
                for rows, start in zip(self._members, starts, strict=True)
                if len(start)
            ]
        )


class _GroupsByTasks:
    """The same by tasks. Those that group a range of rows leave a copy of the rows, by group.

    So the rows of a group lie together in each copy, and the tasks that place its centers read some runs and no
    single rows.
    """

    def __init__(
        self,
        shared: Shared,
        sample: UnitRows,
        numbers: Int[np.ndarray, " rows"] | None,
        group_centers: Float32[np.ndarray, "groups dim"],
        device: str,
    ) -> None:
        self._shared, self._device = shared, device
        named = None if numbers is None else shared.keep("start-rows", numbers)
        ranges = Ranges(cut_rows(len(sample), len(group_centers)), named, sample.fit_float32)
        groups = shared.keep("start-groups", group_centers)
        begin = functools.partial(_begin_grouping, ranges=ranges, group_centers=groups, device=device)
        self._copies = shared.run(RangeJob("group", f"copy-by-{groups}", ranges.sizes, begin, device))
        shared.scratch.extend([*self._copies.arrays, groups, *([] if named is None else [named])])
        self.sizes: Int[np.ndarray, " groups"] = np.sum(
            [unpacked(shared.store.view(name))[0] for name in self._copies.arrays], axis=0
        )

    def centers(self, starts: Sequence[Int[np.ndarray, " _"]]) -> Float32[np.ndarray, "centers dim"]:
        """The centers of all groups, of each so many as rows it starts from."""
        shared = self._shared
        counts = np.array([len(start) for start in starts])
        drawn = shared.keep("start-drawn", np.concatenate([counts, *starts]))

        # Whole groups, of about as many rows together as a range has.
        edges = cut(self.sizes, self._copies.sizes[0]).tolist()
        sizes = tuple(int(self.sizes[first:stop].sum()) for first, stop in itertools.pairwise(edges))
        begin = functools.partial(
            _begin_placing, copies=self._copies.arrays, edges=edges, drawn=drawn, device=self._device
        )
        job = shared.run(RangeJob("place", f"centers-by-{drawn}", sizes, begin, self._device))
        shared.scratch.extend([drawn, *job.arrays])
        return np.concatenate([unpacked(shared.store.load(name))[0] for name in job.arrays])


def _begin_grouping(
    store: ArrayStore, images: UnitRows, *, ranges: Ranges, group_centers: str, device: str
) -> MakeArrays:
    """Rows of each group, and the lengths and the stored rows by group, in their order."""
    rows_of, centers = ranges.open(store, images), store.load(group_centers)
    search = _search(centers, device)

    def make(task: int) -> list[np.ndarray]:
        rows = rows_of(task)
        group_of, _ = search.assign(rows)
        order = np.argsort(group_of, kind="stable")
        return [np.bincount(group_of, minlength=len(centers)), rows.lengths[order], rows.raw(order)]

    return make


def _begin_placing(
    store: ArrayStore, images: UnitRows, *, copies: Sequence[str], edges: Sequence[int], drawn: str, device: str
) -> MakeArrays:
    """The centers of some groups."""
    views = [unpacked(store.view(name)) for name in copies]
    ends = [np.concatenate([[0], np.cumsum(sizes)]) for sizes, _, _ in views]
    groups = len(ends[0]) - 1
    numbers = store.load(drawn)
    counts = numbers[:groups]
    starts = np.split(numbers[groups:], np.cumsum(counts)[:-1])

    def rows_of(group: int) -> UnitRows:
        """The rows of a group, in their order."""
        runs = [slice(*end[group : group + 2].tolist()) for end in ends]
        lengths, rows = (
            np.concatenate([view[part][run] for view, run in zip(views, runs, strict=True)]) for part in (1, 2)
        )
        return UnitRows(rows, name=images.name, any_length=True, lengths=lengths)

    def make(task: int) -> list[np.ndarray]:
        placed = [
            _centers_of_group(rows_of(group), starts[group], device)
            for group in range(edges[task], edges[task + 1])
            if counts[group]
        ]
        return [np.concatenate([np.empty((0, images.dim), dtype=np.float32), *placed])]

    return make


def _centers_of_group(
    group: UnitRows, start: Int[np.ndarray, " centers"], device: str
) -> Float32[np.ndarray, "centers dim"]:
    """The rows of a group that its centers start as, whose own start are these of its rows."""
    centers = _kmeans(group, group[start].astype(np.float32), device)
    return _nearest_rows(group, centers, device)


def _kmeans(
    images: UnitRows, centers: Float32[np.ndarray, "centers dim"], device: str
) -> Float32[np.ndarray, "centers dim"]:
    for new_centers, _ in kmeans_rounds(images, centers, rounds=_ROUNDS, device=device):
        centers = new_centers
    return centers


def _nearest_rows(
    images: UnitRows, centers: Float32[np.ndarray, "centers dim"], device: str
) -> Float32[np.ndarray, "centers dim"]:
    """The row of each cluster nearest to its center; a center without rows stays."""
    labels, cosines = _search(centers, device).assign(images)
    order = np.lexsort((-cosines, labels))
    clusters, firsts = np.unique(labels[order], return_index=True)

    nearest = centers.copy()
    nearest[clusters] = images.float32(order[firsts])
    return nearest


def _search(centers: Float32[np.ndarray, "centers dim"], device: str) -> CenterSearch:
    return CenterSearch(UnitRows(centers, name="centers", any_length=True), device=device)


def _shares(sizes: Int[np.ndarray, " groups"], total: int) -> Int[np.ndarray, " groups"]:
    """`total` divided in proportion to the sizes: rounded down, the rest to the largest remainders."""
    exact = sizes * (total / sizes.sum())
    shares = np.minimum(np.floor(exact).astype(np.int64), sizes)
    rest = total - int(shares.sum())
    has_room = np.flatnonzero(shares < sizes)
    shares[has_room[np.argsort((shares - exact)[has_room], kind="stable")][:rest]] += 1
    return shares


def _random_rows(images: UnitRows, count: int, random: np.random.Generator) -> Float32[np.ndarray, "count dim"]:
    return images[_draw(len(images), count, random)].astype(np.float32)


def _draw(rows: int, count: int, random: np.random.Generator) -> Int[np.ndarray, " count"]:
    return np.sort(random.choice(rows, size=count, replace=False))
