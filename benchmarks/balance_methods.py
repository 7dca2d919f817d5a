"""The ways to find duplicates that `balance_speed.py` compares: ours, FAISS, numpy, SemDeDup and SemHash."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

Method = Literal["faiss", "numpy", "clip-cid", "semdedup-n1000", "semdedup-256", "semhash"]
METHODS: tuple[Method, ...] = get_args(Method)
NEEDS: dict[Method, tuple[str, ...]] = {
    "faiss": ("faiss",),
    "numpy": (),
    "clip-cid": ("clip_cid",),
    "semdedup-n1000": ("faiss",),
    "semdedup-256": ("faiss",),
    "semhash": ("semhash", "usearch"),
}
BLOCK = 4096
WIDER = 1e-5  # of a cosine: far above float32's error, so that no true pair is missed before float64 decides


@dataclass(frozen=True)
class Job:
    method: Method
    path: str
    threshold: float
    seed: int
    kmeans_iterations: int
    pin: bool
    only_memory: bool = False
    limit_mib: int | None = None


@dataclass
class Found:
    """What a method says: sets, and what else it has."""

    sets: np.ndarray | None = None
    """The set of each row, numbered in any way."""
    kept: np.ndarray | None = None
    left: np.ndarray | None = None
    right: np.ndarray | None = None
    """Pairs, left < right."""
    cell_order: np.ndarray | None = None
    """SemDeDup: the place of each row in the order of its cluster."""
    candidates: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    """Pairs a little beyond the threshold, too, with their cosines in float32."""

    def removed(self, rows: int) -> float:
        if self.kept is not None:
            return 1 - len(self.kept) / rows
        assert self.sets is not None
        return 1 - len(np.unique(self.sets)) / rows


def _prepare_clip_cid(job: Job) -> Callable[[Any], Found]:
    import clip_cid

    def run(rows: Any) -> Found:
        found = clip_cid.balance(rows, threshold=job.threshold, metric="cosine")
        return Found(sets=found.set_of, kept=found.kept)

    return run


def _prepare_faiss(job: Job) -> Callable[[np.ndarray], Found]:
    import faiss
    import scipy.sparse.csgraph  # noqa: F401  imported here so that it is outside the clock

    least = np.float32(1 - job.threshold)

    def run(rows: np.ndarray) -> Found:
        index = faiss.IndexFlatIP(rows.shape[1])
        index.add(rows)
        lefts, rights, cosines = [], [], []
        for start in range(0, len(rows), BLOCK):
            limits, value, column = index.range_search(rows[start : start + BLOCK], float(least - WIDER))
            row = start + np.repeat(np.arange(len(limits) - 1), np.diff(limits.astype(np.int64)))
            above = np.flatnonzero(column > row)
            lefts.append(row[above].astype(np.int32))
            rights.append(column[above].astype(np.int32))
            cosines.append(value[above])
        left, right, cosine = np.concatenate(lefts), np.concatenate(rights), np.concatenate(cosines)
        near = cosine >= least
        sets = components(len(rows), left[near], right[near])
        return Found(sets=sets, left=left[near], right=right[near], candidates=(left, right, cosine))

    return run


def _prepare_numpy(job: Job) -> Callable[[np.ndarray], Found]:
    import scipy.sparse.csgraph  # noqa: F401

    def run(rows: np.ndarray) -> Found:
        left, right = near_pairs(rows, np.float32(1 - job.threshold))
        return Found(sets=components(len(rows), left, right), left=left, right=right)

    return run


def _prepare_semdedup(job: Job) -> Callable[[np.ndarray], Found]:
    import faiss
    import scipy.sparse.csgraph  # noqa: F401

    least = np.float32(1 - job.threshold)

    def run(rows: np.ndarray) -> Found:
        clusters = min(256 if job.method == "semdedup-256" else max(16, round(len(rows) / 1000)), len(rows) // 2)
        settings = {"niter": job.kmeans_iterations, "spherical": True, "seed": job.seed, "min_points_per_centroid": 1}
        kmeans = faiss.Kmeans(rows.shape[1], clusters, **settings)
        kmeans.train(rows)
        cosine, cluster = (each[:, 0] for each in kmeans.index.search(rows, 1))
        by_cluster = np.lexsort((cosine, cluster))  # "hard": the farthest from the center first, so it is kept
        pairs = [
            tuple(np.sort([members[i], members[j]], axis=0))
            for members in np.split(by_cluster, np.flatnonzero(np.diff(cluster[by_cluster])) + 1)
            for i, j in [near_pairs(rows[members], least)]
        ]
        left, right = (np.concatenate(side).astype(np.int32) for side in zip(*pairs, strict=True))
        order = np.empty(len(rows), dtype=np.int64)
        order[by_cluster] = np.arange(len(rows))
        return Found(sets=components(len(rows), left, right), left=left, right=right, cell_order=order)

    return run


def _prepare_semhash(job: Job) -> Callable[[np.ndarray], Found]:
    from semhash import SemHash  # pyright: ignore[reportMissingImports]  not among our dependencies

    class NoEncoder:
        """Semhash wants one, and does not use it where embeddings are given."""

        def encode(self, *_: Any, **__: Any) -> np.ndarray:
            raise NotImplementedError

    def run(rows: np.ndarray) -> Found:
        records = [{"row": str(row)} for row in range(len(rows))]
        made = SemHash.from_embeddings(rows, records, NoEncoder(), columns=["row"], ann_backend="usearch")
        kept = made.self_deduplicate(threshold=1 - job.threshold).selected
        return Found(kept=np.sort([int(record["row"]) for record in kept]))

    return run


PREPARE: dict[Method, Callable[[Job], Callable[[Any], Found]]] = {
    "faiss": _prepare_faiss,
    "numpy": _prepare_numpy,
    "clip-cid": _prepare_clip_cid,
    "semdedup-n1000": _prepare_semdedup,
    "semdedup-256": _prepare_semdedup,
    "semhash": _prepare_semhash,
}


def near_pairs(rows: np.ndarray, least: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """All i < j with a float32 cosine of at least `least`."""
    lefts, rights = [np.empty(0, dtype=np.int32)], [np.empty(0, dtype=np.int32)]
    for top in range(0, len(rows), BLOCK):
        for start in range(top, len(rows), BLOCK):
            cosines = rows[top : top + BLOCK] @ rows[start : start + BLOCK].T
            if top == start:
                np.fill_diagonal(cosines, -2)
            hits = np.flatnonzero(cosines.max(axis=1) >= least)
            at, column = np.nonzero(cosines[hits] >= least)
            left, right = (top + hits[at]).astype(np.int32), (start + column).astype(np.int32)
            above = slice(None) if top != start else left < right
            lefts.append(left[above])
            rights.append(right[above])
    return np.concatenate(lefts), np.concatenate(rights)


def components(rows: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    graph = coo_matrix((np.ones(len(left), dtype=np.int8), (left, right)), shape=(rows, rows))
    return connected_components(graph, directed=False)[1]


def unit32(stored: Any) -> np.ndarray:
    rows = np.empty(stored.shape, dtype=np.float32)
    for start in range(0, len(rows), BLOCK):
        exact = stored[start : start + BLOCK].astype(np.float64)
        rows[start : start + BLOCK] = exact / np.linalg.norm(exact, axis=1, keepdims=True)
    return rows


def missing_packages(method: Method) -> str:
    """The packages a method needs and that are not installed."""
    return ", ".join(name for name in NEEDS[method] if importlib.util.find_spec(name) is None)
