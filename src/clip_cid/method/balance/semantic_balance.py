"""Image semantic balance (paper section 3.1): join near-duplicates into sets, keep one image of each."""

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int, UInt64
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import breadth_first_order

from clip_cid import units
from clip_cid.method.array_likes import ArrayLike, as_whole_number
from clip_cid.method.array_store import ArrayStore
from clip_cid.method.balance.decided_sets import DecidedRows, cut_links, keep_decided
from clip_cid.method.balance.forest import Forest
from clip_cid.method.balance.kept_rows import Keep, check_keep, keep_one_of_each
from clip_cid.method.balance.known_pairs import KnownPairs
from clip_cid.method.balance.near_pairs import near_forest
from clip_cid.method.balance.near_targets import NearTargets, without_near
from clip_cid.method.balance.pair_plan import Layout, Plan, lay_out
from clip_cid.method.balance.preferred_rows import Rule, keep_preferred
from clip_cid.method.distances import LARGEST, Metric, from_squared, threshold_for, threshold_on
from clip_cid.method.jobs import RunJob
from clip_cid.method.unit_rows import Rows, UnitRows

_MOST_NAMED = 10  # rows
_LIKE_A_SIMILARITY = 0.5  # a cosine distance above this joins images that have little in common


@dataclass(frozen=True, eq=False)
class Balance:
    """One row of every set."""

    kept: Int[np.ndarray, " kept"]
    """Rows kept, ascending, int64."""
    set_of: Int[np.ndarray, " rows"]
    """The set of each row, int64: `kept[set_of[i]]` is the row kept for row i; -1 for a row of a set that was decided
    to be removed whole."""
    threshold: float
    """Distance at or below which two rows were joined."""
    metric: Metric
    """The scale of `threshold`."""
    forest: Forest
    """Answers every threshold up to its limit without the embeddings."""
    squared_threshold: float
    """The threshold as a squared Euclidean distance, which decides."""
    row_hashes: UInt64[np.ndarray, "rows 2"]
    """A digest of each row's stored bytes, by which a later balance recognizes it."""
    cut: Int[np.ndarray, " cut"] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """The links of the forest that decisions cut, by their places: they join nothing."""

    @property
    def joined(self) -> Forest:
        """The forest that makes the sets: without the links that were cut."""
        return self.forest.without(self.cut)

    def __repr__(self) -> str:
        rows, share = len(self.set_of), units.percent(self.removed_share)
        return (
            f"Balance({len(self.kept):,} of {rows:,} rows kept, {share} removed; {self.metric} <= {self.threshold:g})"
        )

    @property
    def removed(self) -> Int[np.ndarray, " removed"]:
        """Rows removed, ascending, int64; `kept[set_of[removed]]` are those kept for them."""
        return np.setdiff1d(np.arange(len(self.set_of)), self.kept)

    @property
    def removed_share(self) -> float:
        return 1 - len(self.kept) / len(self.set_of)

    def explain(self, row: int | None = None) -> str:
        """In words what was removed and why; of a row, whether it is kept and what links it to the one kept for it.

        Raises:
            ValueError: There is no such row.
        """
        rows = len(self.set_of)
        if row is None:
            return self._explain_all()
        if not 0 <= as_whole_number(row, name="row") < rows:
            raise ValueError(f"row must be in [0, {rows:,}), got {row:,}")

        kept_for = int(self.kept[self.set_of[row]])
        if kept_for != row:
            links = ", ".join(
                f"{left} and {right} at {distance:.4g}" for left, right, distance in self._way(row, kept_for)
            )
            return (
                f"Row {row} is removed, and row {kept_for} is kept for it. What links them: {links}"
                f" ({self.metric}, all at most {self.threshold:g})."
            )
        others = np.flatnonzero(self.set_of == self.set_of[row])
        others = others[others != row]
        if not len(others):
            return f"Row {row} is kept, and none is removed for it."
        named = ", ".join(map(str, others[:_MOST_NAMED])) + (", ..." if len(others) > _MOST_NAMED else "")
        return f"Row {row} is kept, and {units.counted(len(others), 'row')} removed for it: {named}."

    def _explain_all(self) -> str:
        sizes = np.bincount(self.set_of)
        several = units.counted(int((sizes > 1).sum()), "set")
        return (
            f"{len(self.kept):,} of {len(self.set_of):,} rows are kept; {len(self.removed):,} are removed"
            f" ({units.percent(self.removed_share)}). They were in {several} of two rows or more, the largest of"
            f" {sizes.max():,}. Rows at a {self.metric} distance of {self.threshold:g} or less are joined."
        )

    def _way(self, row: int, kept: int) -> list[tuple[int, int, float]]:
        """The links of the forest from a row to the kept one of its set, with their distances."""
        links = self.forest.links(self.squared_threshold)
        left, right = self.forest.left[:links], self.forest.right[:links]
        graph = coo_matrix((np.ones(links), (left, right)), shape=(self.forest.rows,) * 2).tocsr()
        _, before = breadth_first_order(graph, kept, directed=False, return_predecessors=True)

        way: list[tuple[int, int, float]] = []
        while row != kept:
            low, high = sorted((row, int(before[row])))
            squared = self.forest.squared[:links][(left == low) & (right == high)]
            way.append((row, int(before[row]), float(from_squared(squared, self.metric)[0])))
            row = int(before[row])
        return way


@dataclass(frozen=True)
class BalanceRule:
    """The rule that joins sets and chooses the kept rows; the arguments of `balance` of the same names.

    Raises:
        ValueError: A distance is out of its limits, or `max_threshold` is below `threshold`.
    """

    threshold: float = 0.07
    metric: Metric = "cosine"
    max_threshold: float | None = None
    target_removed: float | None = None
    keep: Keep | tuple[Rule, ...] = "nearest_centroid"
    max_radius: float | None = None

    def __post_init__(self) -> None:
        squared, limit, _ = (
            self._squared,
            self.limit,
            self.squared_radius,
        )  # each raises where a distance is out of bounds
        if self.target_removed is None and limit < squared:
            raise ValueError(f"max_threshold must be at least the threshold {self.threshold}, got {self.max_threshold}")

    @property
    def limit(self) -> float:
        """The squared distance up to which pairs have to be known."""
        largest = self.max_threshold
        if largest is None and self.target_removed is None:
            return self._squared
        if largest is None:
            largest = min(2 * self.threshold, 0.99 * LARGEST[self.metric])
        return threshold_on(self.metric, largest, "squared_euclidean")

    @property
    def squared_radius(self) -> float | None:
        return None if self.max_radius is None else threshold_on(self.metric, self.max_radius, "squared_euclidean")

    def squared_threshold(self, forest: Forest) -> float:
        """The squared distance at or below which two rows are joined.

        Raises:
            ShareOutOfReach: No threshold up to the limit removes the target.
        """
        return self._squared if self.target_removed is None else forest.squared_for(self.target_removed)

    @property
    def _squared(self) -> float:
        return threshold_on(self.metric, self.threshold, "squared_euclidean")


def balance(
    embeddings: Rows | ArrayLike,
    *,
    threshold: float = 0.07,
    metric: Metric = "cosine",
    max_threshold: float | None = None,
    target_removed: float | None = None,
    keep: Keep = "nearest_centroid",
    max_radius: float | None = None,
    text_embeddings: Rows | ArrayLike | None = None,
    normalize: bool = False,
    device: str = "cpu",
    plan: Plan | None = None,
    on_plan: Callable[[Layout], Any] | None = None,
    on_progress: Callable[[int], Any] | None = None,
) -> Balance:
    """Join rows within `threshold` of each other into sets and keep one row of each.

    `balance_edge`, `balance_sets` and `balance_keep` in docs/method.md. Two rows are joined when the float64
    distance of their unit vectors is at most `threshold`. Sets are the connected components, so two rows of
    one set may be farther apart. A set keeps the row nearest its centroid; of rows equally near within 1e-9
    the one with the better image-text cosine, then the lowest. `plan` and `device` do not change the result.

    Args:
        embeddings: (rows, dim), an array, tensor, data frame or list of rows, or anything with a shape and rows by
            slice and by row numbers.
        threshold: On the scale of `metric`; a distance, not a similarity.
        metric: cosine is 1 - cos; the others are of the unit vectors.
        max_threshold: The forest answers every threshold up to this one; `threshold` when None, twice that with
            `target_removed`.
        target_removed: Take the smallest threshold up to `max_threshold` that removes this share of the rows instead.
        keep: Which row of a set: the one nearest the centroid (the paper's rule), or the one whose caption fits best.
        max_radius: Keep more rows of a set, until every removed one is within this distance of the one kept for it.
        text_embeddings: The caption of each row in the same space: for ties, and for `best_caption`.
        normalize: Accept rows that are not unit vectors; a zero or non-finite row is refused all the same.
        device: Where the products of blocks are computed, for torch.
        plan: How near pairs are looked for; chosen from a sample when None.
        on_plan: Called with what was chosen, before the work begins.
        on_progress: Called with the rows' worth of work done since the last call; in all, the number of rows.

    Raises:
        ValueError: An argument is out of its limits, or a row is not a unit vector.
    """
    rule = BalanceRule(threshold, metric, max_threshold, target_removed, keep, max_radius)
    images = UnitRows(embeddings, name="embeddings", any_length=normalize)
    texts = None
    if text_embeddings is not None:
        texts = UnitRows(text_embeddings, name="text_embeddings", any_length=normalize)
    check_keep(images, texts, keep)

    layout = None if plan is None else lay_out(images, plan)
    result = balance_rows(images, texts, rule, layout=layout, device=device, on_plan=on_plan, on_progress=on_progress)
    if (warning := similarity_warning(rule, result)) is not None:
        warnings.warn(warning, stacklevel=2)
    return result


def similarity_warning(rule: BalanceRule, result: Balance) -> str | None:
    """A sentence about a cosine threshold that looks like a similarity and removes most rows; None if none does."""
    rows, kept = len(result.set_of), len(result.kept)
    given = rule.metric == "cosine" and rule.target_removed is None
    if not given or not _LIKE_A_SIMILARITY < rule.threshold < 1 or 2 * kept >= rows:
        return None
    return (
        f"the threshold {rule.threshold:g} is a distance, 1 - cos, and keeps {kept:,} of {rows:,} rows; if it was meant"
        f" as a similarity, did you mean 1 - {rule.threshold:g} = {1 - rule.threshold:.4g}?"
    )


def balance_rows(
    images: UnitRows,
    texts: UnitRows | None,
    rule: BalanceRule,
    *,
    layout: Layout | None = None,
    device: str = "cpu",
    known: KnownPairs | None = None,
    store: ArrayStore | None = None,
    run_job: RunJob | None = None,
    decided: DecidedRows | None = None,
    near: Sequence[NearTargets] = (),
    on_plan: Callable[[Layout], Any] | None = None,
    on_progress: Callable[[int], Any] | None = None,
) -> Balance:
    """Balance the rows: in memory for `balance`, in a folder and with several processes for the stage.

    Args:
        images: The rows.
        texts: Their captions; `check_keep` has accepted them.
        rule: What makes a set, and which of its rows is kept.
        layout: Like all that follow an argument of `near_forest`; none of them changes the result.
        device: Where products are computed, for torch.
        known: Links and rows whose pairs need not be compared.
        store: Where arrays are kept, in a folder even over an interruption; in memory when None.
        run_job: Does the tasks; in this process, one by one, when None.
        decided: What a person has decided about rows. The threshold is found without it.
        near: Rows near targets up to the limit; those within the threshold are removed.
        on_plan: Called with the layout.
        on_progress: Called with the rows' worth of work done.

    Raises:
        ShareOutOfReach: No threshold up to the limit removes the target.
        KeptAndNear: A row that is decided to be kept is near a target.
    """
    forest, row_hashes = near_forest(
        images,
        rule.limit,
        layout=layout,
        device=device,
        known=known,
        store=store,
        run_job=run_job,
        on_plan=on_plan,
        on_progress=on_progress,
    )

    squared = rule.squared_threshold(forest)
    threshold = rule.threshold if rule.target_removed is None else threshold_for(squared, rule.metric)
    decided = without_near(decided, near, squared)
    cut = cut_links(forest, (decided or DecidedRows()).apart)
    labels = forest.without(cut).sets(squared)
    kept, set_of = choose_kept(images, texts, rule, labels, decided, store=store, run_job=run_job)
    return Balance(kept, set_of, float(threshold), rule.metric, forest, squared, row_hashes, cut)


def choose_kept(
    images: UnitRows,
    texts: UnitRows | None,
    rule: BalanceRule,
    labels: Int[np.ndarray, " rows"],
    decided: DecidedRows | None,
    *,
    store: ArrayStore | None = None,
    run_job: RunJob | None = None,
) -> tuple[Int[np.ndarray, " kept"], Int[np.ndarray, " rows"]]:
    """Rows kept of these sets, and for each row its place among them, as `balance_rows` chooses."""
    if isinstance(rule.keep, tuple):
        choose = functools.partial(keep_preferred, images, texts, rules=rule.keep, squared_radius=rule.squared_radius)
    else:
        choose = functools.partial(
            keep_one_of_each,
            images,
            texts,
            keep=rule.keep,
            squared_radius=rule.squared_radius,
            store=store,
            run_job=run_job,
        )
    if decided is None:
        return choose(labels)
    return keep_decided(images, labels, decided, choose, squared_radius=rule.squared_radius)
