"""One space for the embeddings of several teachers: each turned so that its variance is even, and weighed equally."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float64


def even_rotation(covariance: Float64[np.ndarray, "dim dim"]) -> Float64[np.ndarray, "dim dim"]:
    r"""A rotation after which each coordinate has the same variance; `even_rotation` in docs/method.md.

    .. math:: R = (H \otimes Q)\, U^T, \quad \mathrm{diag}(R\, \Sigma\, R^T) = \mathrm{tr}(\Sigma) / D

    U has the principal axes. H is the Hadamard matrix of the largest power of two in D, so each coordinate gets as much
    of one axis as of another. Q turns the D / 2^k groups of axes that are left, whose variances are nearly equal
    because axes are dealt to them in turn, into groups of equal variance. Where D is a power of two this is PHI-S
    (arXiv 2410.01680) before its scale.

    Args:
        covariance: Sigma.

    Raises:
        ValueError: It is not a covariance: not symmetric, or not finite.
    """
    if not (np.isfinite(covariance).all() and np.allclose(covariance, covariance.T, atol=1e-12)):
        raise ValueError("covariance must be symmetric and finite")
    values, axes = np.linalg.eigh(covariance)
    values, axes = values[::-1], axes[:, ::-1]  # the largest first

    dim = len(values)
    power = dim & -dim
    groups = values.reshape(power, dim // power).mean(axis=0)
    return np.kron(_hadamard(power), _evening_rotation(groups)) @ axes.T


def equal_weights(variances: Sequence[float]) -> Float64[np.ndarray, " teachers"]:
    r"""Factors with which each teacher's rows have the same variance, and the joined row length one.

    .. math:: w_t^2 = \frac{1 / v_t}{\sum_s 1 / v_s}

    Args:
        variances: v of each teacher: the mean squared distance of its unit rows from their mean.

    Raises:
        ValueError: One is not above 0.
    """
    if not all(0 < value < math.inf for value in variances):
        raise ValueError(f"variances must be above 0, got {', '.join(f'{value:g}' for value in variances)}")
    inverse = 1 / np.array(variances, dtype=np.float64)
    return np.sqrt(inverse / inverse.sum())


def join_rows(
    rows: Sequence[Float[np.ndarray, "rows _"]],
    rotations: Sequence[Float[np.ndarray, "_ _"]],
    weights: Sequence[float] | Float64[np.ndarray, " teachers"],
) -> Float[np.ndarray, "rows dim"]:
    r"""Rows of several teachers as one unit row each; `joined_space` in docs/method.md.

    .. math:: z = (w_1 R_1 x_1, w_2 R_2 x_2, \dots), \quad \langle z, z' \rangle = \sum_t w_t^2 \langle x_t, x'_t \rangle

    The same R and w serve images and texts, so a cosine across the modalities is the weighted mean of the teachers'
    too. One teacher alone keeps all its cosines.

    Args:
        rows: Of each teacher, in the same order, of any length but zero.
        rotations: R of each.
        weights: w of each; their squares sum to one.
    """
    turned = [
        weight * (part / np.linalg.norm(part, axis=1, keepdims=True)) @ rotation.T
        for part, rotation, weight in zip(rows, rotations, weights, strict=True)
    ]
    return np.concatenate(turned, axis=1)


def _hadamard(size: int) -> Float64[np.ndarray, "size size"]:
    """Sylvester's, of rows of length one."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / math.sqrt(size)


def _evening_rotation(variances: Float64[np.ndarray, " groups"]) -> Float64[np.ndarray, "groups groups"]:
    """A rotation of uncorrelated coordinates after which all have their mean variance: one plane after another."""
    mean, count = float(variances.mean()), len(variances)
    covariance, rotation = np.diag(variances), np.eye(count)
    for _ in range(count - 1):
        spread = np.diag(covariance) - mean
        low, high = int(spread.argmin()), int(spread.argmax())
        if not (spread[low] < 0 < spread[high]):
            break

        # The turn in the plane of both that gives `low` the mean: a root of (high - mean) t^2 - 2 c t + (low - mean).
        shared = covariance[low, high]
        root = math.sqrt(shared**2 - spread[low] * spread[high])
        tangent = spread[low] / (shared - root) if shared < 0 else (shared + root) / spread[high]
        cosine = 1 / math.hypot(1, tangent)
        sine = tangent * cosine
        plane, both = np.array([[cosine, -sine], [sine, cosine]]), [low, high]
        rotation[both] = plane @ rotation[both]
        covariance[both] = plane @ covariance[both]
        covariance[:, both] = covariance[:, both] @ plane.T
    return rotation
