"""The appendix's map of the embeddings: t-SNE of some kept images, colored by cluster."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from clip_cid.figures import style

MIN_IMAGES = 30
_PERPLEXITY = 30
# A shape for each color, for color-blind readers and for print in gray.
_MARKS = tuple(
    zip((style.BLUE, style.VERMILLION, style.GREEN, style.ORANGE, style.PURPLE, style.SKY), "osD^vP", strict=True)
)


@dataclass(frozen=True)
class Sample:
    """Some of the kept images, as places in the list of all kept ones, ascending."""

    places: Int[np.ndarray, " images"]
    clusters: Mapping[int, int]
    """The clusters to color, largest first -> how many kept images are in them."""


def choose(labels: Int[np.ndarray, " kept"], *, images: int, seed: int) -> Sample:
    """Up to `images` kept images: half evenly from the six largest clusters, the rest from all kept images.

    Of a million clusters a sample drawn evenly over all images would hardly meet the same one twice.
    """
    random = np.random.default_rng(seed)
    sizes = np.bincount(labels)
    largest = np.argsort(-sizes, kind="stable")[: len(_MARKS)]
    largest = largest[sizes[largest] > 0]
    each = max(1, images // (2 * len(_MARKS)))
    chosen = [random.permutation(np.flatnonzero(labels == cluster))[:each] for cluster in largest]
    # Twice as many as needed, so that enough remain without those already chosen; a permutation of all
    # rows would take gigabytes.
    order = random.choice(len(labels), size=min(len(labels), 2 * images), replace=False)
    rest = order[~np.isin(order, np.concatenate(chosen))]
    places = np.concatenate([*chosen, rest[: max(0, images - sum(map(len, chosen)))]])
    return Sample(np.sort(places), {int(cluster): int(sizes[cluster]) for cluster in largest})


def lay_out(embeddings: Float[np.ndarray, "images dim"], *, seed: int) -> Float[np.ndarray, "images 2"]:
    """t-SNE from a PCA start.

    It uses one thread: the number of threads changes the order of the sums, and so the whole map.

    Raises:
        ValueError: There are fewer than 30 images.
    """
    if len(embeddings) < MIN_IMAGES:
        raise ValueError(f"embeddings: needs at least {MIN_IMAGES} images, got {len(embeddings)}")
    perplexity = min(_PERPLEXITY, (len(embeddings) - 1) / 3)
    model = TSNE(perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed, n_jobs=1)
    with threadpool_limits(1):
        return model.fit_transform(embeddings.astype(np.float32))


def draw(
    points: Float[np.ndarray, "images 2"],
    rows: Int[np.ndarray, " images"],
    labels: Int[np.ndarray, " images"],
    clusters: Mapping[int, int],
    out: Path,
) -> dict[str, Any]:
    """Write `embedding_map.svg` and `.csv`: one point an image, in color for the images of `clusters`."""
    columns = {"row": rows.tolist(), "x": points[:, 0].tolist(), "y": points[:, 1].tolist(), "cluster": labels.tolist()}
    style.write_csv(out / "embedding_map.csv", columns)

    with style.new_figure(4.4) as figure:
        axes = figure.add_subplot()
        others = ~np.isin(labels, list(clusters))
        axes.scatter(*points[others].T, s=6, color=style.MUTED, alpha=0.4, linewidths=0, label="others")
        for cluster, mark in zip(clusters, _MARKS, strict=False):
            _cluster(axes, points[labels == cluster], cluster, *mark)
        axes.set(xticks=[], yticks=[], aspect="equal")
        axes.margins(0.01)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        figure.legend(loc="outside upper left", ncols=4, handletextpad=0.2, columnspacing=1.2, markerscale=1.6)
        style.save_svg(figure, out / "embedding_map.svg")

    return {
        "images": len(rows),
        "clusters": [
            {"cluster": cluster, "images": size, "shown": int((labels == cluster).sum())}
            for cluster, size in clusters.items()
        ],
    }


def _cluster(axes: Axes, points: Float[np.ndarray, "images 2"], cluster: int, color: str, marker: str) -> None:
    axes.scatter(*points.T, s=13, color=color, marker=marker, linewidths=0, label=f"cluster {cluster}")
