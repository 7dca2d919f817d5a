"""Join the pairs of a run by key with the results of its earlier stages, and check them before any step."""

from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float, Int

from clip_cid import log, units
from clip_cid.data.balance.captions_file import read_given_captions
from clip_cid.data.embeddings.caption_rows import CaptionRows
from clip_cid.data.embeddings.of_texts import open_texts
from clip_cid.data.embeddings.rows_of_pairs import rows_in_store
from clip_cid.data.embeddings.sharded_rows import row_type
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.npy_files import read_array_of_stage
from clip_cid.data.pairs.crops import Views, views_of
from clip_cid.data.pairs.pair import BadSample
from clip_cid.data.pairs.pairs import Pairs
from clip_cid.errors import DataError
from clip_cid.loss_table import rows_of
from clip_cid.recipe import Recipe
from clip_cid.run_folder import RunFolder
from clip_cid.stage_names import BALANCE, CLUSTER, TEXTS
from clip_cid.training.batches import TrainingPairs
from clip_cid.training.lines import Lines
from clip_cid.training.merged_captions import MergedCaptions
from clip_cid.training.ranks.distributed import ALONE, Ranks
from clip_cid.unit_length import is_unit

_COMPARED_CAPTIONS = 100
_ROWS_AT_ONCE = 1 << 22


def plain_pairs(pairs: Pairs) -> TrainingPairs:
    """All pairs, for plain CLIP training without a teacher."""
    usable = np.ones(len(pairs), dtype=bool)
    usable[_known_bad(pairs)] = False
    return TrainingPairs(pairs, _true_rows(usable), left_out=dict(pairs.known_bad))


def distilled_pairs(
    folder: RunFolder, recipe: Recipe, pairs: Pairs, store: EmbeddingStore, ranks: Ranks = ALONE
) -> TrainingPairs:
    """The kept pairs, joined by key with their targets from teacher and clustering; checked before any step.

    The main process alone reads the keys; the others get the rows.

    Raises:
        DataError: The pairs, the embeddings, the kept rows and the labels do not belong together, or a loss needs the
            teacher's texts if the store has images only.
    """
    texts = recipe.uses_teacher_texts
    if texts:
        _ = store.texts  # refuses a store without them now, not at the first step

    # The place of each pair among the kept rows; -1 if balance removed it, or if it has no embedding.
    kept = read_kept(folder, store) if recipe.balance.enabled else np.flatnonzero(store.ok)
    kind = row_type(store.rows)
    place = np.full(store.rows + 1, -1, dtype=kind)  # the last entry answers for -1, a pair the store does not have
    place[kept] = np.arange(len(kept), dtype=kind)
    store_rows = ranks.array_from_main(rows_in_store(pairs, store) if ranks.is_main else None)
    places = place[store_rows]
    places[_known_bad(pairs)] = -1
    del place

    # Of these pairs alone. Where the store has their order, one array serves for both rows.
    rows = _true_rows(places >= 0)
    places, store_rows = places[rows], store_rows[rows]
    if np.array_equal(rows, store_rows):
        store_rows = rows
    if len(rows) < len(kept):
        log.warn(
            f"{len(kept) - len(rows):,} of {len(kept):,} kept images are not among the pairs; the training"
            " leaves them out"
        )

    merged = _merged_captions(folder, store, store_rows, texts=texts) if recipe.distill.merged_captions else None
    if texts or (recipe.pairs.captions_are_optional and store.has_texts):
        _check_absent_captions(recipe, store.num_captions[store_rows], merged)

    # The targets from clustering and teacher, as far as they are read.
    labels = read_labels(folder, len(kept))[places] if recipe.uses_labels else None
    views, sizes = views_of(recipe.embed), None
    if views is not None:
        _check_views(store, views)
        sizes = store.sizes[store_rows]
    if not (recipe.uses_teacher_images or texts or recipe.distill.head_perplexity or recipe.uses_several_labels):
        return TrainingPairs(pairs, rows, labels=labels, merged=merged, views=views, sizes=sizes)
    num_captions = store.num_captions[store_rows] if texts else None
    if texts:
        _compare_captions(pairs, rows, store, store_rows)
    training = TrainingPairs(
        pairs, rows, labels, store, store_rows, num_captions, merged=merged, views=views, sizes=sizes
    )
    return _with_text_labels(training, folder, store, kept, places) if recipe.uses_text_clusters else training


def _known_bad(pairs: Pairs) -> Int[np.ndarray, " bad"]:
    return np.fromiter(pairs.known_bad, dtype=np.int64, count=len(pairs.known_bad))


def _true_rows(chosen: Bool[np.ndarray, " rows"]) -> Int[np.ndarray, " chosen"]:
    """The rows that are chosen, block by block, so that no array of all is held in more than its type needs."""
    rows, filled = np.empty(np.count_nonzero(chosen), dtype=row_type(len(chosen))), 0
    for start in range(0, len(chosen), _ROWS_AT_ONCE):
        some = np.flatnonzero(chosen[start : start + _ROWS_AT_ONCE])
        rows[filled : filled + len(some)] = some + start
        filled += len(some)
    return rows


def _merged_captions(
    folder: RunFolder, store: EmbeddingStore, store_rows: Int[np.ndarray, " rows"], *, texts: bool
) -> MergedCaptions:
    """The captions that these pairs were given by the balance; with `texts` those that have an embedding.

    Raises:
        DataError: They cannot be read, or do not say whose they are.
    """
    given = read_given_captions(folder.stage(BALANCE))
    merged = MergedCaptions.of(given, store_rows, store.num_captions if texts else None)
    log.info(
        f"distill   {np.count_nonzero(merged.counts):,} of {len(store_rows):,} pairs also read"
        f" {units.counted(int(merged.counts.sum()), 'caption')} of their removed near-duplicates"
    )
    return merged


def _with_text_labels(
    training: TrainingPairs,
    folder: RunFolder,
    store: EmbeddingStore,
    kept: Int[np.ndarray, " kept"],
    places: Int[np.ndarray, " rows"],
) -> TrainingPairs:
    """The same pairs with the cluster of each caption; `places` are theirs among the kept rows."""
    captions = CaptionRows(store, kept)
    text_labels = read_labels(folder, len(captions), texts=True)
    return replace(training, text_labels=text_labels, first_texts=captions.starts[places])


def _check_views(store: EmbeddingStore, views: Views) -> None:
    if store.info.views != views:
        raise DataError(
            f"{store.path}: the recipe asks for views {views}, but here are {store.info.views or 'none'}.",
            fix="Run the embed stage with this recipe.",
        )
    log.info(
        f"distill   of each image the student sees one of {views.count:,} embedded views in an epoch;"
        " distill.crop_scale does not count"
    )


def read_lines(folder: RunFolder, recipe: Recipe, store: EmbeddingStore) -> Lines:
    """The texts without images, with the teacher's embeddings.

    Raises:
        DataError: They are damaged, or of another teacher than the images.
    """
    path = folder.stage(TEXTS)
    found = open_texts(path)
    ours, theirs = (teacher.get("weights_sha256") for teacher in (found.teacher, store.info.teacher))
    if ours != theirs or found.embeddings.shape[1] != store.dim:
        raise DataError(
            f"{path}: texts embedded in {found.embeddings.shape[1]:,} dimensions by the teacher"
            f" {found.teacher.get('reference')}, but the pairs in {store.dim:,} by {store.info.teacher.get('reference')}"
            " of other weights.",
            fix=f"Make one of them again: `clip-cid texts {folder.path} --force`, or embed.",
        )
    return Lines(found.texts, found.embeddings, recipe.distill.lines_per_step)


def read_kept(folder: RunFolder, store: EmbeddingStore) -> Int[np.ndarray, " kept"]:
    """Rows of the store that balance kept.

    Raises:
        DataError: They are not rows of this store that have embeddings.
    """
    path = folder.stage(BALANCE) / "kept.npy"
    kept = read_array_of_stage(path, mmap_mode="r")
    if kept.ndim != 1 or kept.dtype != np.int64 or not len(kept) or kept[0] < 0 or kept[-1] >= store.rows:
        raise DataError(f"{path}: not rows of a store of {store.rows:,}.", fix="Run the balance stage again.")
    if (kept[1:] <= kept[:-1]).any() or not store.ok[kept].all():
        raise DataError(f"{path}: not ascending rows that have embeddings.", fix="Run the balance stage again.")
    return kept


def read_labels(folder: RunFolder, num_kept: int, *, texts: bool = False) -> Int[np.ndarray, " kept"]:
    """The cluster of each kept image, or of each caption of these.

    Raises:
        DataError: There is not one label for each, or one names no center.
    """
    path = folder.stage(CLUSTER) / ("text_labels.npy" if texts else "labels.npy")
    labels = read_array_of_stage(path)
    centers = read_array_of_stage(path.with_name(_centers_file(texts)), mmap_mode="r")
    if labels.dtype.kind not in "iu":
        raise DataError(f"{path}: {labels.dtype}, not numbers of clusters.", fix="Run the cluster stage again.")
    if labels.shape != (num_kept,):
        raise DataError(
            f"{path}: {labels.size:,} labels, but {num_kept:,} {'captions' if texts else 'images'} were kept.",
            fix="Run the cluster stage again.",
        )
    num_centers = centers.shape[0] if centers.ndim else 0
    if len(labels) and not (labels.min() >= 0 and labels.max() < num_centers):
        raise DataError(
            f"{path}: {num_centers:,} centers, but labels up to {labels.max():,}.",
            fix="Run the cluster stage again, on these embeddings.",
        )
    return labels


def read_centers(folder: RunFolder, store: EmbeddingStore, *, texts: bool = False) -> Float[np.ndarray, "centers dim"]:
    """The cluster centers of the images or of the texts, in the teacher's space.

    Raises:
        DataError: They are of another width, or not unit vectors.
    """
    path = folder.stage(CLUSTER) / _centers_file(texts)
    centers = read_array_of_stage(path)
    again = "Run the cluster stage again, on these embeddings."
    if centers.ndim != 2 or centers.shape[1] != store.dim or centers.dtype.kind != "f":
        raise DataError(
            f"{path}: {centers.dtype} of shape {centers.shape}, but embeddings of width {store.dim}.", fix=again
        )
    if not is_unit(np.linalg.norm(centers, axis=1)).all():
        raise DataError(f"{path}: not all centers are unit vectors.", fix=again)
    return centers.astype(np.float32)


def _centers_file(texts: bool) -> str:
    return "text_centers.npy" if texts else "centers.npy"


def _check_absent_captions(
    recipe: Recipe, num_captions: Int[np.ndarray, " rows"], merged: MergedCaptions | None
) -> None:
    """Say how many pairs have no caption, nor were given one.

    Raises:
        DataError: They must have one of their own, or none has one and a loss reads texts.
    """
    if merged is not None and recipe.pairs.captions_are_optional:
        num_captions = num_captions + merged.counts
    absent = int((num_captions == 0).sum())
    if not absent:
        return
    if not recipe.pairs.captions_are_optional:
        raise DataError(
            f"{absent:,} of {len(num_captions):,} pairs have no embedding of a caption.",
            fix="Set pairs.captions: optional, so that they teach the image tower alone.",
        )
    if absent == len(num_captions):
        refuse_readers_of_captions(recipe, absent)
    log.info(f"distill   {absent:,} of {len(num_captions):,} images have no caption and teach the image tower alone")


def refuse_readers_of_captions(recipe: Recipe, pairs: int) -> None:
    """For pairs without a single caption.

    Raises:
        DataError: A loss reads captions, or the teacher's embeddings of them.
    """
    losses = rows_of(recipe.distill.weights.switched_on)
    if readers := [loss.name for loss in losses if loss.reads_captions or loss.reads_teacher_texts]:
        raise DataError(
            f"None of {pairs:,} pairs has a caption, but {', '.join(readers)} read one.",
            fix="Set the weights of these losses to 0; cluster_cls, cluster_kl and cosine_image need no caption.",
        )


def _compare_captions(
    pairs: Pairs, rows: Int[np.ndarray, " rows"], store: EmbeddingStore, store_rows: Int[np.ndarray, " rows"]
) -> None:
    """Check some pairs: their captions must be those that the teacher has read."""
    for index in np.unique(np.linspace(0, len(rows) - 1, min(_COMPARED_CAPTIONS, len(rows))).astype(np.int64)):
        try:
            ours = pairs.read(int(rows[index])).captions
        except BadSample:
            continue  # the training reads it again, and counts it
        embedded = store.captions(int(store_rows[index]))[: int(store.num_captions[store_rows[index]])]
        theirs = tuple(caption.strip() for caption in embedded)
        if ours[: len(theirs)] != theirs:
            own = repr(ours[0]) if ours else "none"
            raise DataError(
                f"{pairs.key(int(rows[index]))!r} has the caption {own}, but its embedding is of {theirs[0]!r}.",
                fix="The captions changed after they were embedded; run the embed stage on these pairs.",
            )
