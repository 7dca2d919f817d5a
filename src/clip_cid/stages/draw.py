"""The figures of a run, each with the CSV behind it; what has no input is left out and named."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ImageOps

from clip_cid import log
from clip_cid.errors import ClipCidError
from clip_cid.figures import (
    activation_maps,
    cluster_rounds,
    cluster_sizes,
    cluster_strips,
    contact_sheet,
    distances,
    embedding_map,
    gain,
    losses,
    patch_pca,
    radar,
    removed_sets,
    removed_share,
    scores,
    set_images,
    single_linkage,
    throughput,
    weights,
)
from clip_cid.figures.run_inputs import NO_CLUSTERS, NO_SCORES, LeftOut, RunInputs
from clip_cid.method.cluster import clustering
from clip_cid.models import patches
from clip_cid.models.student import Clip
from clip_cid.recipe import Recipe
from clip_cid.run_folder import RunFolder

_PAIRS_OF_A_KIND = 5
_PCA_CLASSES, _PCA_IMAGES, _PROMPTED_IMAGES = 3, 6, 6
_LEAF_PIXELS = 96


def run(folder: RunFolder, out: Path, recipe: Recipe) -> dict[str, Any]:
    """Draw every figure that the run has files for."""
    inputs = RunInputs(folder, recipe)
    figures: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    with log.progress("draw", len(_FIGURES), unit="figures") as bar:
        for name, draw in _FIGURES.items():
            try:
                figures[name] = draw(inputs, out)
            except LeftOut as reason:
                left_out[name] = str(reason)
            bar.advance(note=name)
    for reason in dict.fromkeys(left_out.values()):
        names = ", ".join(name for name, why in left_out.items() if why == reason)
        log.info(f"draw      no {names}: {reason}")
    return {"figures": figures, "left_out": left_out}


def _cluster_sizes(inputs: RunInputs, out: Path) -> dict[str, Any]:
    centers, labels = inputs.clusters
    kept = cluster_sizes.count(labels, len(centers))
    left = np.setdiff1d(np.flatnonzero(inputs.store.ok), inputs.kept, assume_unique=True)
    if not len(left):
        return cluster_sizes.draw({"all pairs": kept}, out)
    block = inputs.recipe.machine.distance_block
    of_removed, _ = clustering.assign(inputs.store.images.select(left), centers, block_rows=block)
    both = kept + cluster_sizes.count(of_removed, len(centers))
    return cluster_sizes.draw({"before balance": both, "after balance": kept}, out)


def _cluster_rounds(inputs: RunInputs, out: Path) -> dict[str, Any]:
    if not inputs.recipe.uses("cluster"):
        raise LeftOut(NO_CLUSTERS)
    record = inputs.folder.record("cluster")
    history = record.summary.get("history") if record is not None else None
    if not history:
        raise LeftOut("the clusters were made elsewhere")
    return cluster_rounds.draw(history, out)


def _distances(inputs: RunInputs, out: Path) -> dict[str, Any]:
    tables = inputs.removed
    return distances.draw(tables.distances, threshold=tables.threshold, metric=tables.metric, out=out)


def _duplicates(inputs: RunInputs, out: Path) -> dict[str, Any]:
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


def _removed_share(inputs: RunInputs, out: Path) -> dict[str, Any]:
    tables = inputs.balanced
    # Links name rows of the store; shares are of its good rows, as in the balance stage.
    forest = inputs.forest._replace(rows=int(inputs.store.ok.sum()))
    return removed_share.draw(forest, threshold=tables.threshold, metric=tables.metric, out=out)


def _single_linkage(inputs: RunInputs, out: Path) -> dict[str, Any]:
    tables = inputs.removed
    linked = single_linkage.choose(tables, inputs.forest)
    if linked is None:
        raise LeftOut(f"every set has more than {single_linkage.MOST_IMAGES} images")
    pictures = _leaf_pictures(inputs, linked.rows.tolist())
    return single_linkage.draw(linked, pictures, threshold=tables.threshold, metric=tables.metric, out=out)


def _leaf_pictures(inputs: RunInputs, rows: list[int]) -> dict[int, np.ndarray]:
    """Row -> its picture as a small square; none at all where there are no pictures, since the tree says enough."""
    keys, _ = inputs.words(rows)
    try:
        pictures = inputs.pictures(keys)
    except LeftOut:
        return {}
    found = {row: image for row, key in keys.items() if (image := pictures.get(key)) is not None}
    return {row: np.asarray(ImageOps.fit(image, (_LEAF_PIXELS, _LEAF_PIXELS))) for row, image in found.items()}


def _clusters(inputs: RunInputs, out: Path) -> dict[str, Any]:
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


def _embedding_map(inputs: RunInputs, out: Path) -> dict[str, Any]:
    settings, (_, labels) = inputs.recipe.draw, inputs.clusters
    sample = embedding_map.choose(labels, images=settings.map_images, seed=settings.seed)
    if len(sample.places) < embedding_map.MIN_IMAGES:
        raise LeftOut(f"fewer than {embedding_map.MIN_IMAGES} kept images")
    rows = inputs.kept[sample.places]
    points = embedding_map.lay_out(inputs.store.images[rows], seed=settings.seed)
    return embedding_map.draw(points, rows, labels[sample.places], sample.clusters, out)


def _patch_pca(inputs: RunInputs, out: Path) -> dict[str, Any]:
    """Foreground and colors of all models follow the teacher's, or the student's where the teacher has no patches."""
    models, left_out = inputs.patched
    labelled = inputs.labelled
    chosen = _chosen(inputs, classes=_PCA_CLASSES, each=_PCA_IMAGES)
    classes = [
        patch_pca.ClassPatches(
            name=labelled.class_names[images[0].label],
            images=[one.row for one in images],
            pictures=_as_seen(models[scores.STUDENT], images),
            models=_components(models, images),
        )
        for images in chosen
    ]
    return {"set": labelled.name, "models": patch_pca.draw(classes, out), "left_out": left_out}


def _chosen(inputs: RunInputs, *, classes: int, each: int) -> list[list[set_images.LabelledImage]]:
    found = set_images.choose(inputs.labelled, classes=classes, each=each, seed=inputs.recipe.draw.seed)
    if not found:
        raise LeftOut(f"no test image of the set {inputs.labelled.name} can be decoded")
    return found


def _components(
    models: dict[str, Clip], images: list[set_images.LabelledImage]
) -> dict[str, patch_pca.PatchComponents]:
    found: dict[str, patch_pca.PatchComponents] = {}
    for name, clip in models.items():
        tokens = patches.patch_tokens(clip, set_images.pixels(clip, images)).float().cpu().numpy()
        found[name] = patch_pca.components(tokens, like=next(iter(found.values()), None))
    return found


def _activation_maps(inputs: RunInputs, out: Path) -> dict[str, Any]:
    """Images of different classes, each held against the first prompt of its class."""
    models, left_out = inputs.patched
    labelled = inputs.labelled
    if not labelled.templates:
        raise LeftOut(f"the set {labelled.name} has no prompts")
    images = [one for found in _chosen(inputs, classes=_PROMPTED_IMAGES, each=1) for one in found]
    prompts = [labelled.prompts(one.label)[0] for one in images]
    maps = {name: _prompted(clip, images, prompts) for name, clip in models.items()}
    shown = [
        activation_maps.PromptedImage(
            image=one.row,
            label=labelled.class_names[one.label],
            prompt=prompts[place],
            picture=picture,
            maps={name: found[place] for name, (found, _) in maps.items()},
            cosines={name: float(cosines[place]) for name, (_, cosines) in maps.items()},
        )
        for place, (one, picture) in enumerate(zip(images, _as_seen(models[scores.STUDENT], images), strict=True))
    ]
    summary = activation_maps.draw(shown, out)
    return {"set": labelled.name, "prompts": prompts, "models": summary, "left_out": left_out}


def _prompted(clip: Clip, images: list[set_images.LabelledImage], prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    model: Any = clip.model
    with torch.inference_mode():
        texts = model.encode_text(clip.tokenizer(prompts).to(clip.device), normalize=True)
    found = patches.grad_cam(clip, set_images.pixels(clip, images), texts.clone())
    maps, cosines = (values.float().cpu().numpy() for values in found)
    return maps, cosines


def _as_seen(clip: Clip, images: list[set_images.LabelledImage]) -> list[np.ndarray]:
    return [set_images.as_seen(clip, given) for given in set_images.pixels(clip, images)]


def _losses(inputs: RunInputs, out: Path) -> dict[str, Any]:
    metrics = losses.read_metrics(inputs.folder.stage("distill") / "metrics.jsonl")
    if not losses.loss_parts(metrics):
        raise LeftOut("no step of the training's log has a finite loss")
    return losses.draw(metrics, out)


def _scores(task: str) -> Callable[[RunInputs, Path], dict[str, Any]]:
    def draw(inputs: RunInputs, out: Path) -> dict[str, Any]:
        if not any(score.task == task for score in inputs.scores):
            raise LeftOut(NO_SCORES)
        return scores.draw([score for score in inputs.scores if score.task == task], inputs.differences, task, out)

    return draw


def _gain(inputs: RunInputs, out: Path) -> dict[str, Any]:
    baseline = scores.reference_model(scores.model_order(inputs.scores))
    if baseline is None:
        raise LeftOut("there is no model but the teacher to compare the student with")
    if not inputs.differences.headlines(baseline):
        raise LeftOut(NO_SCORES)
    return {"baseline": baseline, "lines": gain.draw(inputs.differences, baseline, out)}


def _throughput(inputs: RunInputs, out: Path) -> dict[str, Any]:
    metrics = losses.read_metrics(inputs.folder.stage("distill") / "metrics.jsonl")
    if not set(throughput.COLUMNS) <= metrics.keys():
        raise LeftOut("the training's log does not tell its speed")
    return throughput.draw(metrics, out)


def _radar(inputs: RunInputs, out: Path) -> dict[str, Any]:
    """Of the linear probe, as in the paper; of zero-shot where the probe has too few sets."""
    if len(scores.model_order(inputs.scores)) < 2:
        raise LeftOut("there is one model only")
    for task in ("linear_probe", "zero_shot"):
        found = [score for score in inputs.scores if score.task == task]
        if len(radar.common_rows(found)) >= radar.MIN_SETS:
            return {"task": task, **radar.draw(found, out)}
    raise LeftOut(f"fewer than {radar.MIN_SETS} sets with a score of every model")


def _weights(inputs: RunInputs, out: Path) -> dict[str, Any]:
    models: dict[str, np.ndarray] = {}
    layers: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for name in inputs.references:
        if name == scores.TEACHER:
            continue
        try:
            parameters = inputs.clip(name).model.state_dict()
        except ClipCidError as error:
            if name == scores.STUDENT:
                raise
            left_out[name] = error.problem
            continue
        layer = weights.last_layer(parameters)
        if layer is None:
            left_out[name] = "its image tower has no mlp.c_proj."
        else:
            models[name], layers[name] = parameters[layer].cpu().double().numpy().ravel(), layer
    if scores.STUDENT not in models:
        raise LeftOut("the student's image tower has no mlp.c_proj")
    return {"layers": layers, "models": weights.draw(models, out), "left_out": left_out}


_FIGURES: dict[str, Callable[[RunInputs, Path], dict[str, Any]]] = {
    "activation_maps": _activation_maps,
    "cluster_rounds": _cluster_rounds,
    "cluster_sizes": _cluster_sizes,
    "clusters": _clusters,
    "distances": _distances,
    "duplicates": _duplicates,
    "embedding_map": _embedding_map,
    "gain": _gain,
    "losses": _losses,
    "patch_pca": _patch_pca,
    "radar": _radar,
    "removed_share": _removed_share,
    "scores_knn": _scores("knn"),
    "scores_linear_probe": _scores("linear_probe"),
    "scores_retrieval": _scores("retrieval"),
    "scores_zero_shot": _scores("zero_shot"),
    "single_linkage": _single_linkage,
    "throughput": _throughput,
    "weights": _weights,
}
