"""Which pairs are near in float64, and how the answer of a method compares with them."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from balance_methods import Found, Job, components

_SETTLED = 1e-3  # ten times the largest error of a float32 cosine at width 1280
_TIED = 1e-9  # docs/method.md, `balance_keep`
_CELLS = 1 << 22  # numbers in a temporary array


def true_pairs(job: Job, found: Found | None) -> dict[str, np.ndarray] | None:
    """Left and right of every true pair, the set of each row and the kept rows; made once from what FAISS found."""
    path = Path(job.path).with_suffix(f".truth-{job.threshold:g}.npz")
    if path.exists() and path.stat().st_mtime >= Path(job.path).stat().st_mtime:
        return dict(np.load(path))
    if found is None or found.candidates is None:
        return None

    # Of the candidates those that float64 finds near; float32 has settled those far from the threshold.
    stored = np.load(job.path, mmap_mode="r")
    left, right, cosine = found.candidates
    near = cosine >= 1 - job.threshold
    open_ = np.flatnonzero(np.abs(cosine - (1 - job.threshold)) < _SETTLED)
    portion = max(1, _CELLS // stored.shape[1])
    for at in range(0, len(open_), portion):
        some = open_[at : at + portion]
        near[some] = _half_squared(stored, left[some], right[some]) <= job.threshold
    left, right = left[near], right[near]

    sets = components(len(stored), left, right)
    truth = {"left": left, "right": right, "sets": sets, "kept": _nearest_to_mean(stored, sets)}
    temporary = path.with_suffix(f".{os.getpid()}.part.npz")
    np.savez(temporary, allow_pickle=False, **truth)
    os.replace(temporary, path)
    return truth


def _exact(stored: Any, rows: np.ndarray) -> np.ndarray:
    exact = stored[rows].astype(np.float64)
    return exact / np.sqrt((exact * exact).sum(axis=1, keepdims=True))


def _half_squared(stored: Any, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    difference = _exact(stored, left) - _exact(stored, right)
    return (difference * difference).sum(axis=1) / 2


def _nearest_to_mean(stored: Any, sets: np.ndarray) -> np.ndarray:
    """The rule of docs/method.md (`balance_keep`) without captions, one set at a time."""
    by_set = np.argsort(sets, kind="stable")
    kept = []
    for members in np.split(by_set, np.flatnonzero(np.diff(sets[by_set])) + 1):
        if len(members) > 2:
            vectors = _exact(stored, members)
            distance = np.linalg.norm(vectors - vectors.mean(axis=0), axis=1)
            members = members[distance <= distance.min() + _TIED]
        kept.append(members[0])  # two are equally near their mean: the lower row
    return np.sort(kept)


def judge(found: Found, truth: dict[str, np.ndarray] | None, rows: int) -> dict[str, Any]:
    # What the method says.
    judged: dict[str, Any] = {"removed": found.removed(rows)}
    if found.sets is not None:
        sets = _by_lowest_row(found.sets)
        judged |= {"sets_digest": digest(sets), "largest_set": int(np.bincount(sets).max())}
    if found.kept is not None:
        judged["kept_digest"] = digest(found.kept)
    if found.left is not None and found.right is not None:
        judged["pairs"] = len(found.left)
        if found.cell_order is not None:
            later = np.where(found.cell_order[found.left] > found.cell_order[found.right], found.left, found.right)
            judged["removed_by_its_rule"] = len(np.unique(later)) / rows
    if truth is None:
        return judged

    # How that compares with the true pairs.
    judged |= {"true_pairs": len(truth["left"]), "true_kept_digest": digest(truth["kept"])}
    if found.sets is not None:
        right_sets = judged["sets_digest"] == digest(_by_lowest_row(truth["sets"]))
        right_kept = found.kept is None or judged["kept_digest"] == judged["true_kept_digest"]
        judged["exact"] = bool(right_sets and right_kept)
    if found.left is not None and found.right is not None:
        true, listed = (
            np.sort(left.astype(np.int64) * rows + right)
            for left, right in ((truth["left"], truth["right"]), (found.left, found.right))
        )
        shared = len(np.intersect1d(true, listed, assume_unique=True))
        judged |= {"recall": shared / max(len(true), 1), "missed": len(true) - shared, "false": len(listed) - shared}
    elif found.sets is not None:
        joined = found.sets[truth["left"]] == found.sets[truth["right"]]
        judged |= {"recall": float(joined.mean()) if len(joined) else 1.0, "missed": int((~joined).sum())}
    return judged


def _by_lowest_row(sets: np.ndarray) -> np.ndarray:
    _, first, place = np.unique(sets, return_index=True, return_inverse=True)
    return first[place].astype(np.int64)


def digest(values: np.ndarray | None) -> str:
    return "" if values is None else hashlib.sha256(values.astype("<i8").tobytes()).hexdigest()[:12]
