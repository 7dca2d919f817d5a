"""Figures of what the balance removed."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ImageOps

from clip_cid.figures import contact_sheet, distances, removed_share, single_linkage
from clip_cid.report.drawing import linked_set, removed_sets
from clip_cid.report.drawing.figure import Figure, Numbers
from clip_cid.report.drawing.stored_inputs import LeftOut, StoredInputs

_PAIRS_OF_A_KIND = 5
_LEAF_PIXELS = 96
_KINDS = {
    "perceptual": "perceptual: nearly equal pixels",
    "semantic": "semantic: other pixels, nearly equal meaning",
}


class Examples(NamedTuple):
    """Sets and pairs to show, and the key of each row among them."""

    sets: list[removed_sets.RemovedSet]
    pairs: list[removed_sets.RemovedPair]
    keys: dict[int, str]


def _distances(inputs: StoredInputs, out: Path) -> Numbers:
    tables = inputs.removed
    return distances.draw(tables.distances, threshold=tables.threshold, metric=tables.metric, out=out)


def _removed_share(inputs: StoredInputs, out: Path) -> Numbers:
    tables = inputs.balanced
    # Links name rows of the store; shares are of its good rows, as in the balance stage.
    forest = inputs.forest._replace(rows=int(inputs.store.ok.sum()))
    return removed_share.draw(forest, threshold=tables.threshold, metric=tables.metric, out=out)


def _removed_share_caption(numbers: Numbers) -> str:
    return (
        "The share of the images that each threshold removes when every connected set keeps one image. It is exact,"
        f" because all pairs up to {numbers['limit']:.3g} are known. The line is the chosen threshold; the axes above"
        " show the same distances on the other two scales."
    )


def choose_examples(inputs: StoredInputs, out: Path) -> Examples:
    """Choose sets and pairs to show, and write them to `removed_sets.csv` and `removed_pairs.csv`."""
    tables, seed = inputs.removed, inputs.recipe.draw.seed
    sets = removed_sets.choose(tables, sets=inputs.recipe.draw.gallery_sets, seed=seed)
    pairs = removed_sets.choose_pairs(tables, pairs=_PAIRS_OF_A_KIND, seed=seed)

    keys, captions = inputs.words(
        [row for one in sets for row in (one.kept, *one.rows.tolist())]
        + [row for pair in pairs for row in (pair.kept, pair.row)]
    )
    removed_sets.write_table(sets, keys, captions, out / "removed_sets.csv")
    if pairs:
        removed_sets.write_pairs(pairs, keys, captions, out / "removed_pairs.csv")
    return Examples(sets, pairs, keys)


def _duplicates(inputs: StoredInputs, out: Path) -> Numbers:
    sets, pairs, keys = choose_examples(inputs, out)
    strips = [strip for kind in removed_sets.PAIR_KINDS if (strip := _pair_strip(kind, pairs, keys))]
    strips += [_set_strip(one, inputs.removed.threshold, keys) for one in sets]
    return contact_sheet.draw(strips, inputs.pictures(keys).get, out / "duplicates.png")


def _pair_strip(
    kind: str, pairs: Sequence[removed_sets.RemovedPair], keys: dict[int, str]
) -> contact_sheet.Strip | None:
    """Kept, removed, kept, removed: the paper's Fig. 2a (perceptual) or 2b (semantic)."""
    own = [pair for pair in pairs if pair.kind == kind]
    if not own:
        return None
    return contact_sheet.Strip(
        _KINDS[kind],
        keys=[keys[row] for pair in own for row in (pair.kept, pair.row)],
        notes=[note for pair in own for note in ("kept", f"{pair.distance:.3f}")],
        framed=range(0, 2 * len(own), 2),
    )


def _set_strip(one: removed_sets.RemovedSet, threshold: float, keys: dict[int, str]) -> contact_sheet.Strip:
    """The kept image and those removed for it."""
    widest = f"{'' if one.widest_exact else 'at least '}{one.widest:.3f}"
    return contact_sheet.Strip(
        f"{one.stratum}: {one.size:,} images, farthest {one.farthest:.3f}, widest pair {widest}"
        f" (threshold {threshold:g}), weakest link {one.weakest_link:.3f}",
        keys=[keys[row] for row in (one.kept, *one.rows.tolist())],
        notes=["kept", *map(removed_sets.distance_note, one.distances.tolist(), one.kinds)],
        framed=(0,),
    )


def _single_linkage(inputs: StoredInputs, out: Path) -> Numbers:
    tables = inputs.removed
    linked = linked_set.choose(tables, inputs.joined_forest)
    if linked is None:
        raise LeftOut(f"every set has more than {single_linkage.MOST_IMAGES} images")
    pictures = _leaf_pictures(inputs, linked.rows.tolist())
    return single_linkage.draw(linked, pictures, threshold=tables.threshold, metric=tables.metric, out=out)


def _leaf_pictures(inputs: StoredInputs, rows: list[int]) -> dict[int, np.ndarray]:
    """Row -> its picture as a small square; none at all if there are no pictures, since the tree says enough."""
    keys, _ = inputs.words(rows)
    try:
        pictures = inputs.pictures(keys)
    except LeftOut:
        return {}
    images = {row: image for row, key in keys.items() if (image := pictures.get(key)) is not None}
    return {row: np.asarray(ImageOps.fit(image, (_LEAF_PIXELS, _LEAF_PIXELS))) for row, image in images.items()}


FIGURES = (
    Figure(
        "distances",
        _distances,
        section="balance",
        description="Histogram of the removed images' distance to the kept one, with the threshold",
        caption="Distance of each removed image to the one kept for it. Bars beyond the threshold are images that"
        " joined their set through others.",
    ),
    Figure(
        "removed_share",
        _removed_share,
        section="balance",
        description="Share of the images removed by threshold, with the chosen one",
        caption=_removed_share_caption,
    ),
    Figure(
        "single_linkage",
        _single_linkage,
        section="balance",
        description="Tree of the links that join one set of duplicates, its pictures below, with the threshold",
        caption="The links that join one set, as a tree (single linkage). A threshold below a horizontal line would"
        " separate the images left and right under it. The kept image has a green frame; under each other image is its"
        " distance to the kept one.",
        of_data=True,
    ),
    Figure("duplicates", _duplicates),
)
