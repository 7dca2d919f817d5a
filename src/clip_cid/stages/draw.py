"""The figures of a run, each with the CSV behind it; what has no input is left out and named."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clip_cid import log
from clip_cid.data.balance_tables import BalanceTables
from clip_cid.data.embeddings import EmbeddingStore
from clip_cid.data.forest_file import FOREST_FILE, read_forest
from clip_cid.data.pictures import NoPicturesError, Pictures, open_pictures
from clip_cid.figures import (
    cluster_rounds,
    cluster_sizes,
    cluster_strips,
    contact_sheet,
    distances,
    losses,
    radar,
    removed_sets,
    removed_share,
    scores,
    weights,
)
from clip_cid.method import clustering
from clip_cid.models.student import load_clip
from clip_cid.recipe import Recipe
from clip_cid.run_folder import RunFolder

_NO_BALANCE = "this recipe does not balance"
_NO_CLUSTERS = "this recipe does not cluster"
_NOT_KNOWN = "no image is known to be removed for another"
_NO_SCORES = "this recipe evaluates nothing of the kind"
_PAIRS_OF_A_KIND = 5


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
    def balanced(self) -> BalanceTables:
        """The sets of the balance stage."""
        if not self.recipe.uses("balance"):
            raise _LeftOut(_NO_BALANCE)
        folder = self.folder.stage("balance")
        if not BalanceTables.exist(folder):
            raise _LeftOut(_NOT_KNOWN)
        return BalanceTables(folder)

    @cached_property
    def removed(self) -> BalanceTables:
        """The same where at least one image was removed."""
        if not len(self.balanced.distances):
            raise _LeftOut(_NOT_KNOWN)
        return self.balanced

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


def _cluster_rounds(inputs: _Inputs, out: Path) -> dict[str, Any]:
    if not inputs.recipe.uses("cluster"):
        raise _LeftOut(_NO_CLUSTERS)
    record = inputs.folder.record("cluster")
    history = record.summary.get("history") if record is not None else None
    if not history:
        raise _LeftOut("the clusters were made elsewhere")
    return cluster_rounds.draw(history, out)


def _distances(inputs: _Inputs, out: Path) -> dict[str, Any]:
    tables = inputs.removed
    return distances.draw(tables.distances, threshold=tables.threshold, metric=tables.metric, out=out)


def _duplicates(inputs: _Inputs, out: Path) -> dict[str, Any]:
    tables, seed = inputs.removed, inputs.recipe.draw.seed
    chosen = removed_sets.choose(tables, sets=inputs.recipe.draw.gallery_sets, seed=seed)
    pairs = removed_sets.choose_pairs(tables, pairs=_PAIRS_OF_A_KIND, seed=seed)
    keys, captions = inputs.words(
        [row for found in chosen for row in (found.kept, *found.rows.tolist())]
        + [row for pair in pairs for row in (pair.kept, pair.row)]
    )
    removed_sets.write_table(chosen, keys, captions, out / "removed_sets.csv")
    if pairs:
        removed_sets.write_pairs(pairs, keys, captions, out / "removed_pairs.csv")
    strips = [strip for kind in removed_sets.PAIR_KINDS if (strip := _pair_strip(kind, pairs, keys))]
    strips += [_set_strip(found, tables.threshold, keys) for found in chosen]
    return contact_sheet.draw(strips, inputs.pictures(keys).get, out / "duplicates.png")


def _pair_strip(
    kind: str, pairs: Sequence[removed_sets.RemovedPair], keys: dict[int, str]
) -> contact_sheet.Strip | None:
    """Kept, removed, kept, removed: the paper's Fig. 2a (perceptual) or 2b (semantic)."""
    own = [pair for pair in pairs if pair.kind == kind]
    if not own:
        return None
    return contact_sheet.Strip(
        {"perceptual": "perceptual: nearly equal pixels", "semantic": "semantic: other pixels, nearly equal meaning"}[
            kind
        ],
        keys=[keys[row] for pair in own for row in (pair.kept, pair.row)],
        notes=[note for pair in own for note in ("kept", f"{pair.distance:.3f}")],
        framed=range(0, 2 * len(own), 2),
    )


def _set_strip(found: removed_sets.RemovedSet, threshold: float, keys: dict[int, str]) -> contact_sheet.Strip:
    """The kept image and those removed for it."""
    widest = f"{'' if found.widest_exact else 'at least '}{found.widest:.3f}"
    return contact_sheet.Strip(
        f"{found.stratum}: {found.size:,} images, farthest {found.farthest:.3f}, widest pair {widest}"
        f" (threshold {threshold:g}), weakest link {found.weakest_link:.3f}",
        keys=[keys[row] for row in (found.kept, *found.rows.tolist())],
        notes=["kept", *map(removed_sets.distance_note, found.distances.tolist(), found.kinds)],
        framed=(0,),
    )


def _removed_share(inputs: _Inputs, out: Path) -> dict[str, Any]:
    tables = inputs.balanced
    # Links name rows of the store; shares are of its good rows, as in the balance stage.
    forest = read_forest(inputs.folder.stage("balance") / FOREST_FILE)._replace(rows=int(inputs.store.ok.sum()))
    return removed_share.draw(forest, threshold=tables.threshold, metric=tables.metric, out=out)


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
    "cluster_rounds": _cluster_rounds,
    "cluster_sizes": _cluster_sizes,
    "clusters": _clusters,
    "distances": _distances,
    "duplicates": _duplicates,
    "losses": _losses,
    "removed_share": _removed_share,
    "scores_zero_shot": _scores("zero_shot"),
    "scores_linear_probe": _scores("linear_probe"),
    "scores_retrieval": _scores("retrieval"),
    "radar": _radar,
    "weights": _weights,
}
