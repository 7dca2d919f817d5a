"""The figures of a run, each with the CSV behind it; what has no input is left out and named."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clip_cid import log
from clip_cid.data.embeddings import EmbeddingStore
from clip_cid.figures import (
    cluster_sizes,
    cluster_strips,
    contact_sheet,
    distances,
    losses,
    radar,
    removed_sets,
    scores,
    weights,
)
from clip_cid.figures.pictures import Pictures
from clip_cid.figures.run_files import NoPicturesError, open_pictures
from clip_cid.method import clustering
from clip_cid.models.student import load_clip
from clip_cid.recipe import Recipe
from clip_cid.run_folder import RunFolder

_NO_BALANCE = "this recipe does not balance"
_NO_CLUSTERS = "this recipe does not cluster"
_NO_SCORES = "this recipe evaluates nothing of the kind"


class _LeftOut(Exception):
    """A figure has no input in this run; the message says which."""


def run(folder: RunFolder, out: Path, recipe: Recipe) -> dict[str, Any]:
    """Draw every figure that the run has files for."""
    inputs = _Inputs(folder, recipe)
    figures: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    with log.progress("draw", len(_FIGURES), unit="figures") as bar:
        for name, draw in _FIGURES.items():
            try:
                figures[name] = draw(inputs, out)
            except _LeftOut as reason:
                left_out[name] = str(reason)
            bar.advance(note=name)
    for reason in dict.fromkeys(left_out.values()):
        names = ", ".join(name for name, why in left_out.items() if why == reason)
        log.info(f"draw      no {names}: {reason}")
    return {"figures": figures, "left_out": left_out}


class _Inputs:
    """The run's files, opened when a figure asks for them."""

    def __init__(self, folder: RunFolder, recipe: Recipe) -> None:
        self.folder, self.recipe = folder, recipe

    @cached_property
    def store(self) -> EmbeddingStore:
        return EmbeddingStore.open(self.folder.stage("embed"))

    @cached_property
    def kept(self) -> np.ndarray:
        """The rows of the store that the clusters and the student see."""
        if not self.recipe.uses("balance"):
            return np.flatnonzero(self.store.ok)
        return np.load(self.folder.stage("balance") / "kept.npy")

    @cached_property
    def set_of(self) -> np.ndarray:
        if not self.recipe.uses("balance"):
            raise _LeftOut(_NO_BALANCE)
        return np.load(self.folder.stage("balance") / "set_of.npy")

    @cached_property
    def removed(self) -> tuple[np.ndarray, np.ndarray]:
        """The removed rows and their distances to the kept ones."""
        set_of, metric = self.set_of, self.recipe.balance.metric
        found = removed_sets.distances_to_kept(self.store.images, self.kept, set_of, metric=metric)
        if not len(found[0]):
            raise _LeftOut("no image is known to be removed for another")
        return found

    @cached_property
    def clusters(self) -> tuple[np.ndarray, np.ndarray]:
        """Centers, and the label of each kept row."""
        if not self.recipe.uses("cluster"):
            raise _LeftOut(_NO_CLUSTERS)
        folder = self.folder.stage("cluster")
        return np.load(folder / "centers.npy", mmap_mode="r"), np.load(folder / "labels.npy")

    @cached_property
    def scores(self) -> list[scores.Score]:
        if not self.recipe.uses("evaluate"):
            raise _LeftOut(_NO_SCORES)
        return scores.read_scores(self.folder.stage("evaluate") / "results.jsonl")

    def words(self, rows: list[int]) -> tuple[dict[int, str], dict[int, str]]:
        """Key and captions of each row."""
        distinct = sorted(set(rows))
        captions = {row: " / ".join(self.store.captions(row)) for row in distinct}
        return {row: self.store.keys[row] for row in distinct}, captions

    def pictures(self, keys: dict[int, str]) -> Pictures:
        try:
            return open_pictures(self.folder, self.recipe, {key: row for row, key in keys.items()})
        except NoPicturesError as reason:
            raise _LeftOut(str(reason)) from reason


def _cluster_sizes(inputs: _Inputs, out: Path) -> dict[str, Any]:
    centers, labels = inputs.clusters
    kept = cluster_sizes.count(labels, len(centers))
    left = np.setdiff1d(np.flatnonzero(inputs.store.ok), inputs.kept, assume_unique=True)
    if not len(left):
        return cluster_sizes.draw({"all pairs": kept}, out)
    block = inputs.recipe.machine.distance_block
    of_removed, _ = clustering.assign(inputs.store.images.select(left), centers, block_rows=block)
    both = kept + cluster_sizes.count(of_removed, len(centers))
    return cluster_sizes.draw({"before balance": both, "after balance": kept}, out)


def _distances(inputs: _Inputs, out: Path) -> dict[str, Any]:
    settings = inputs.recipe.balance
    return distances.draw(inputs.removed[1], threshold=settings.threshold, metric=settings.metric, out=out)


def _duplicates(inputs: _Inputs, out: Path) -> dict[str, Any]:
    removed, settings = inputs.removed, inputs.recipe.balance
    chosen = removed_sets.choose(
        *(inputs.store.images, inputs.kept, inputs.set_of, *removed),
        metric=settings.metric,
        threshold=settings.threshold,
        sets=inputs.recipe.draw.gallery_sets,
        seed=inputs.recipe.draw.seed,
    )
    keys, captions = inputs.words([row for found in chosen for row in (found.kept, *found.rows.tolist())])
    removed_sets.write_table(chosen, keys, captions, out / "removed_sets.csv")
    strips = [
        contact_sheet.Strip(
            f"{found.stratum}: {found.size:,} images, widest pair {found.widest:.3f}",
            keys=[keys[row] for row in (found.kept, *found.rows.tolist())],
            notes=["kept", *(f"{distance:.3f}" for distance in found.distances)],
            framed=True,
        )
        for found in chosen
    ]
    return contact_sheet.draw(strips, inputs.pictures(keys).get, out / "duplicates.png")


def _clusters(inputs: _Inputs, out: Path) -> dict[str, Any]:
    centers, labels = inputs.clusters
    chosen = cluster_strips.choose(inputs.store.images, inputs.kept, labels, centers)
    keys, captions = inputs.words([row for strip in chosen for row in strip.rows.tolist()])
    cluster_strips.write_table(chosen, keys, captions, out / "clusters.csv")
    strips = [
        contact_sheet.Strip(
            f"{strip.stratum}: cluster {strip.cluster} of {strip.size:,} images",
            keys=[keys[row] for row in strip.rows.tolist()],
            notes=[f"{cosine:.3f}" for cosine in strip.cosines],
        )
        for strip in chosen
    ]
    return contact_sheet.draw(strips, inputs.pictures(keys).get, out / "clusters.png")


def _losses(inputs: _Inputs, out: Path) -> dict[str, Any]:
    return losses.draw(losses.read_metrics(inputs.folder.stage("distill") / "metrics.jsonl"), out)


def _scores(task: str) -> Callable[[_Inputs, Path], dict[str, Any]]:
    def draw(inputs: _Inputs, out: Path) -> dict[str, Any]:
        if not any(score.task == task for score in inputs.scores):
            raise _LeftOut(_NO_SCORES)
        return scores.draw([score for score in inputs.scores if score.task == task], task, out)

    return draw


def _radar(inputs: _Inputs, out: Path) -> dict[str, Any]:
    """Of the linear probe, as in the paper; of zero-shot where the probe has too few sets."""
    if len(scores.model_order(inputs.scores)) < 2:
        raise _LeftOut("there is one model only")
    for task in ("linear_probe", "zero_shot"):
        found = [score for score in inputs.scores if score.task == task]
        if len(radar.common_rows(found)) >= radar.MIN_SETS:
            return {"task": task, **radar.draw(found, out)}
    raise _LeftOut(f"fewer than {radar.MIN_SETS} sets with a score of every model")


def _weights(inputs: _Inputs, out: Path) -> dict[str, Any]:
    compare = inputs.recipe.evaluate.compare
    baseline = scores.reference_model(list(compare))
    references = {scores.STUDENT: f"local-dir:{inputs.folder.stage('distill') / 'student'}"}
    if baseline is not None:
        references[baseline] = compare[baseline]
    models: dict[str, np.ndarray] = {}
    layers: dict[str, str] = {}
    for name, reference in references.items():
        parameters = load_clip(reference).model.state_dict()
        layer = weights.last_layer(parameters)
        if layer is not None:
            models[name], layers[name] = parameters[layer].double().numpy().ravel(), layer
    if scores.STUDENT not in models:
        raise _LeftOut("the student's image tower has no mlp.c_proj")
    return {"layers": layers, "models": weights.draw(models, out)}


_FIGURES: dict[str, Callable[[_Inputs, Path], dict[str, Any]]] = {
    "cluster_sizes": _cluster_sizes,
    "clusters": _clusters,
    "distances": _distances,
    "duplicates": _duplicates,
    "losses": _losses,
    "scores_zero_shot": _scores("zero_shot"),
    "scores_linear_probe": _scores("linear_probe"),
    "scores_retrieval": _scores("retrieval"),
    "radar": _radar,
    "weights": _weights,
}
