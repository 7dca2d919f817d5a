"""The centers that spherical k-means starts from."""

import math

import numpy as np
from jaxtyping import Float32, Int

from clip_cid.method.cluster.kmeans_rounds import kmeans_rounds
from clip_cid.method.cluster.nearest_centers import CenterSearch
from clip_cid.method.unit_rows import UnitRows

_RANDOM_BELOW = 64  # centers; fewer start as random rows
_ROUNDS = 10  # of k-means, at each of the two levels
_POINTS_PER_CENTER, _POINTS_PER_GROUP = 100, 256  # rows of the samples


def two_level_start(
    images: UnitRows, num_centers: int, *, seed: int, device: str = "cpu"
) -> Float32[np.ndarray, "centers dim"]:
    """The centers to start from, spread over about sqrt(K) groups of a sample; `two_level_start` in docs/method.md.

    A group with n_g of the n rows of the sample gets K n_g / n centers, rounded so that they add up. K-means
    within the group places them, and each then starts as the row nearest to it. The mean of few rows would
    keep these rows, even if another grouping were better. At both levels a row is compared with about
    sqrt(K) centers only. Fewer than 64 centers start as random rows.
    """
    random = np.random.default_rng([seed, 0])
    if num_centers < _RANDOM_BELOW:
        return _random_rows(images, num_centers, random)

    sample = images
    if len(images) > _POINTS_PER_CENTER * num_centers:
        sample = images.part(_draw(len(images), _POINTS_PER_CENTER * num_centers, random))

    # The groups are clusters of a part of the sample.
    groups = round(math.sqrt(num_centers))
    coarse = sample.part(_draw(len(sample), min(len(sample), _POINTS_PER_GROUP * groups), random))
    group_centers = _kmeans(coarse, groups, random, device)
    group_of, _ = _search(group_centers, device).assign(sample)
    sizes = np.bincount(group_of, minlength=groups)
    members = np.split(np.argsort(group_of, kind="stable"), np.cumsum(sizes)[:-1])

    centers: list[np.ndarray] = []
    for rows, share in zip(members, _shares(sizes, num_centers), strict=True):
        if share:
            group = sample.part(rows)
            centers.append(_nearest_rows(group, _kmeans(group, int(share), random, device), device))
    return np.concatenate(centers)


def _kmeans(
    images: UnitRows, num_centers: int, random: np.random.Generator, device: str
) -> Float32[np.ndarray, "centers dim"]:
    centers = _random_rows(images, num_centers, random)
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
