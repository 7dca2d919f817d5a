"""Figures of the clusters and of the space they are in."""

from pathlib import Path

import numpy as np

from clip_cid.figures import cluster_rounds, cluster_sizes, contact_sheet, embedding_map
from clip_cid.method.cluster import clustering
from clip_cid.report.drawing import cluster_strips
from clip_cid.report.drawing.figure import Figure, Numbers
from clip_cid.report.drawing.run_inputs import NO_CLUSTERS, RunInputs
from clip_cid.report.drawing.stored_inputs import LeftOut
from clip_cid.stage_names import CLUSTER
from clip_cid.summaries import ClusterSummary, read_summary


def _cluster_sizes(inputs: RunInputs, out: Path) -> Numbers:
    centers, labels = inputs.clusters
    kept = cluster_sizes.count(labels, len(centers))
    left = np.setdiff1d(np.flatnonzero(inputs.store.ok), inputs.kept, assume_unique=True)
    if not len(left):
        return cluster_sizes.draw({"all pairs": kept}, out)

    block = inputs.recipe.machine.distance_block
    of_removed, _ = clustering.assign(inputs.store.images.select(left), centers, block_rows=block)
    both = kept + cluster_sizes.count(of_removed, len(centers))
    return cluster_sizes.draw({"before balance": both, "after balance": kept}, out)


def _cluster_rounds(inputs: RunInputs, out: Path) -> Numbers:
    inputs.of_stage(CLUSTER, NO_CLUSTERS)
    record = inputs.folder.record(CLUSTER)
    summary = None if record is None else read_summary(ClusterSummary, record.summary)
    if summary is None or not summary.history:
        raise LeftOut("the clusters were made elsewhere")
    return cluster_rounds.draw(summary.history, out)


def _clusters(inputs: RunInputs, out: Path) -> Numbers:
    centers, labels = inputs.clusters
    field = inputs.recipe.cluster.truth_field
    classes = None if field is None else inputs.store.classes(field)
    chosen = cluster_strips.choose(inputs.store.images, inputs.kept, labels, centers, classes)

    keys, captions = inputs.words([row for strip in chosen for row in strip.rows.tolist()])
    cluster_strips.write_table(chosen, keys, captions, out / "clusters.csv")

    strips = [
        contact_sheet.Strip(
            f"{strip.stratum}: cluster {strip.cluster} of {strip.size:,} images"
            + ("" if strip.common is None else f", {strip.common[1]:.0%} {strip.common[0]!r}")
            + ("" if strip.gap is None else ": nearest to the center, and farthest"),
            keys=[keys[row] for row in strip.rows.tolist()],
            notes=[f"{cosine:.3f}" for cosine in strip.cosines],
            gap=strip.gap,
        )
        for strip in chosen
    ]
    return contact_sheet.draw(strips, inputs.pictures(keys).get, out / "clusters.png")


def _embedding_map(inputs: RunInputs, out: Path) -> Numbers:
    settings, (_, labels) = inputs.recipe.draw, inputs.clusters
    sample = embedding_map.choose(labels, images=settings.map_images, seed=settings.seed)
    if len(sample.places) < embedding_map.MIN_IMAGES:
        raise LeftOut(f"fewer than {embedding_map.MIN_IMAGES} kept images")
    rows = inputs.kept[sample.places]
    points = embedding_map.lay_out(inputs.store.images[rows], seed=settings.seed)
    return embedding_map.draw(points, rows, labels[sample.places], sample.clusters, out)


def _embedding_map_caption(numbers: Numbers) -> str:
    return (
        f"{numbers['images']:,} kept images by t-SNE of their teacher embeddings. The largest clusters are in color: up"
        " to half of the images are drawn from them, the others from all kept images. Neighbors on the map are"
        " neighbors in the embeddings; the distance between groups means little."
    )


FIGURES = (
    Figure(
        "cluster_sizes",
        _cluster_sizes,
        section="clusters",
        description="Images in each cluster by rank, before and after balance, on logarithmic axes",
        caption="Images in each cluster, largest cluster first, on the same centers.",
        small_description="Images in each cluster by rank, before and after balance",
        small_caption="Cluster sizes on logarithmic axes.",
    ),
    Figure(
        "cluster_rounds",
        _cluster_rounds,
        section="clusters",
        description="Objective of k-means by round",
        caption="Objective of k-means (Eq. 1), the mean squared distance to the own center, over the training sample.",
    ),
    Figure(
        "embedding_map",
        _embedding_map,
        section="clusters",
        description="Map of some kept images, those of the largest clusters in color",
        caption=_embedding_map_caption,
    ),
    Figure("clusters", _clusters),
)
