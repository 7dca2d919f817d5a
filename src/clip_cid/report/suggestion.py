"""Where repeats end: the links of a balance by their distance, with pairs of pictures from 0 to the largest one."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from clip_cid import units
from clip_cid.data.balance.kinds import KINDS, classify
from clip_cid.errors import RunError
from clip_cid.method.distances import from_squared
from clip_cid.models.public_names import PublicWords
from clip_cid.new_folder import drop_left
from clip_cid.recipe import Recipe
from clip_cid.report import galleries, page
from clip_cid.report.drawing.stored_inputs import LeftOut, StoredInputs
from clip_cid.report.thumbnails import Thumbnails
from clip_cid.run_folder import RunFolder, atomic_file

PAGE = "suggest.html"
_PARTS, _COMPARED, _SHOWN = 12, 40, 6
_BUDGET = 3_000_000  # bytes of thumbnails in base64
_HALF = 0.5
_PERCEPTUAL, _SEMANTIC = KINDS.index("perceptual"), KINDS.index("semantic")


@dataclass(frozen=True)
class Part:
    """The links between two distances."""

    start: float
    stop: float
    links: int
    compared: int
    """Pairs at random whose pictures could be read."""
    same: int
    """Of these with nearly equal pixels."""
    pairs: Sequence[galleries.Picture]
    """Some of them, two pictures each, nearest first."""

    @property
    def share(self) -> float | None:
        return self.same / self.compared if self.compared else None


@dataclass(frozen=True)
class Suggestion:
    """What the links say about a threshold."""

    parts: Sequence[Part]
    sentences: Sequence[str]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and lines, one a part."""
        lines = [
            [
                f"{part.start:.4g} to {part.stop:.4g}",
                f"{part.links:,}",
                f"{part.compared:,}",
                "" if part.share is None else units.percent(part.share, 0),
            ]
            for part in self.parts
        ]
        return ["distance", "links", "compared", "nearly equal pixels"], lines


def suggest(folder: RunFolder, recipe: Recipe) -> Suggestion:
    """Look at the links of a finished balance up to its limit; also writes `suggest.html`.

    Raises:
        RunError: The kept rows were made elsewhere, or no two images are within the limit.
    """
    inputs = StoredInputs(folder, recipe)
    try:
        forest, metric = inputs.forest, inputs.balanced.metric
    except LeftOut as reason:
        raise RunError(
            f"{folder.path}: {reason}, so there is nothing to suggest a threshold from.",
            fix=f"Run `clip-cid balance {folder.path}` on the embeddings, without balance.existing.",
        ) from reason
    if not len(forest.left):
        raise RunError(
            f"{folder.path}: no two images are within the largest distance that was looked at.",
            fix="Give a larger one: --balance.max-threshold 0.15.",
        )

    distances = from_squared(forest.squared, metric)
    limit = float(from_squared(np.array([forest.limit]), metric)[0])
    edges = np.linspace(0, limit, _PARTS + 1)
    part_of = np.minimum(np.searchsorted(edges[1:], distances), _PARTS - 1)
    drawn = _drawn(part_of, seed=recipe.draw.seed)

    kinds = classify(
        folder, recipe, inputs.store.keys, forest.left[drawn], forest.right[drawn], images=len(drawn), seed=0
    )
    number = np.zeros(len(drawn), dtype=np.int8) if kinds is None else kinds.number
    pictures = _pairs(inputs, forest.left[drawn], forest.right[drawn], distances[drawn], part_of[drawn])
    parts = [
        Part(
            start=float(edges[at]),
            stop=float(edges[at + 1]),
            links=int((part_of == at).sum()),
            compared=int(np.isin(number[part_of[drawn] == at], (_PERCEPTUAL, _SEMANTIC)).sum()),
            same=int((number[part_of[drawn] == at] == _PERCEPTUAL).sum()),
            pairs=pictures.get(at, ()),
        )
        for at in range(_PARTS)
    ]
    suggestion = Suggestion(parts, sentences(parts, metric))
    _write_page(folder, recipe, suggestion)
    return suggestion


def sentences(parts: Sequence[Part], metric: str) -> list[str]:
    """What the parts say, and how far that goes."""
    scale = metric.replace("_", " ")
    told: list[str] = []
    same = [part for part in parts if part.share is not None and part.share >= _HALF]
    if same:
        told.append(
            f"Up to {same[-1].stop:.3g} ({scale}) half or more of the compared pairs have nearly equal pixels: copies."
        )
    elif any(part.compared for part in parts):
        told.append("At no distance half of the compared pairs have nearly equal pixels: there are few plain copies.")

    gap = _gap([part.links for part in parts])
    if gap is None:
        told.append("The links become more with the distance without a gap, so the curve alone names no threshold.")
    else:
        told.append(
            f"Around {(parts[gap].start + parts[gap].stop) / 2:.3g} there are fewer links than nearer and farther, as where"
            " repeats end and different images begin to be near."
        )
    told.append(
        "Which pairs with other pixels are repeats to you, no number says: look at the pairs, and take the distance at which"
        " they no longer are."
    )
    return told


def _gap(links: Sequence[int]) -> int | None:
    """The part with the fewest links, if there are twice as many in one before it and in one behind it."""
    inner = range(1, len(links) - 1)
    least = min(inner, key=lambda at: links[at], default=None)
    if least is None or 2 * links[least] > min(max(links[:least]), max(links[least + 1 :])):
        return None
    return least


def _drawn(part_of: Int[np.ndarray, " links"], *, seed: int) -> Int[np.ndarray, " drawn"]:
    """Up to so many links of each part at random, in the order of the links."""
    order = np.random.default_rng(seed).permutation(len(part_of))
    order = order[np.argsort(part_of[order], kind="stable")]
    sizes = np.bincount(part_of, minlength=_PARTS)
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(order[place < _COMPARED])


def _pairs(
    inputs: StoredInputs,
    left: Int[np.ndarray, " drawn"],
    right: Int[np.ndarray, " drawn"],
    distances: Float[np.ndarray, " drawn"],
    part_of: Int[np.ndarray, " drawn"],
) -> dict[int, list[galleries.Picture]]:
    """Part -> the pictures of some pairs; none at all if the images are not to be shown or not there."""
    shown = np.concatenate(
        [np.flatnonzero(part_of == at)[:: max(1, (part_of == at).sum() // _SHOWN)][:_SHOWN] for at in range(_PARTS)]
    )
    keys, captions = inputs.words([*left[shown].tolist(), *right[shown].tolist()])
    if not inputs.recipe.report.images:
        return {}
    try:
        opened = inputs.pictures(keys)
    except LeftOut:
        return {}
    thumbnails = Thumbnails(opened, side=inputs.recipe.report.thumbnail_px, budget=_BUDGET)

    pictures: dict[int, list[galleries.Picture]] = {}
    for at in shown.tolist():
        for row, note in ((int(left[at]), f"{distances[at]:.3f}"), (int(right[at]), "")):
            caption = galleries.short(captions[row]) or keys[row]
            pictures.setdefault(int(part_of[at]), []).append(
                galleries.Picture(caption, note, thumbnails.get(keys[row]))
            )
    return pictures


def _write_page(folder: RunFolder, recipe: Recipe, suggestion: Suggestion) -> None:
    path = folder.path / PAGE
    drop_left(path)
    words = PublicWords(recipe.model_dump(mode="json"), folder.path)
    values = {
        "title": "Where repeats end",
        "run": folder.path.resolve().name,
        "blur": recipe.report.blur,
        "side": recipe.report.thumbnail_px,
        "suggestion": suggestion,
        "figures": {},
        "no_pictures": None if any(part.pairs for part in suggestion.parts) else "none could be read",
    }
    with atomic_file(path) as temporary:
        temporary.write_text(page.render(PAGE, values, words), encoding="utf-8")
