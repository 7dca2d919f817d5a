"""The page of a balance: `balance.html` in the run folder, which needs no other stage after it and no student."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clip_cid.errors import RunError
from clip_cid.file_digests import digest
from clip_cid.models.public_names import PublicWords, public_settings
from clip_cid.recipe import Recipe, as_yaml
from clip_cid.report import galleries, page
from clip_cid.report.cards import balance_cards
from clip_cid.report.drawing import of_balance
from clip_cid.report.drawing.stored_inputs import LeftOut, StoredInputs
from clip_cid.report.parts import by_stratum, page_pictures, place_figures, place_to_draw
from clip_cid.run_folder import RunFolder, StageRecord, atomic_file
from clip_cid.stage_names import BALANCE
from clip_cid.summaries import BalanceSummary, read_summary

PAGE = "balance.html"
_VERSION = 1
"""Raise it when the same results would give another page."""
_FIGURES = tuple(figure for figure in of_balance.FIGURES if figure.section)
_LONGEST_MARK = 200  # bytes


def write_balance_page(folder: RunFolder, recipe: Recipe) -> Path | None:
    """Write `balance.html`; None if the one that is there is of these results and settings.

    Raises:
        RunError: The balance stage has not finished, or its files are not as it left them.
    """
    record = folder.record(BALANCE)
    if record is None:
        raise RunError(f"{folder.path}: no finished balance here.", fix=f"Run `clip-cid balance {folder.path}`.")
    path, mark = folder.path / PAGE, _mark(record, recipe)
    if _ends_with(path, mark):
        return None

    folder.verify(BALANCE)
    words = PublicWords(recipe.model_dump(mode="json"), folder.path)
    with place_to_draw(path) as drawn:
        text = page.render(PAGE, _values(folder, record, recipe, drawn, words), words)
    with atomic_file(path) as temporary:
        temporary.write_text(f"{text}\n{mark}", encoding="utf-8")
    return path


def _mark(record: StageRecord, recipe: Recipe) -> str:
    """The last line of a page: a digest of what it was made from."""
    settings = [recipe.report.model_dump(mode="json"), recipe.draw.model_dump(mode="json"), recipe.pairs.source]
    return f"<!-- made from {digest([_VERSION, record.started, record.results, settings])} -->\n"


def _ends_with(path: Path, mark: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as handle:
        handle.seek(max(0, path.stat().st_size - _LONGEST_MARK))
        return handle.read().endswith(mark.encode())


def _values(folder: RunFolder, record: StageRecord, recipe: Recipe, drawn: Path, words: PublicWords) -> dict[str, Any]:
    summary = read_summary(BalanceSummary, record.summary)
    inputs, numbers, left_out = StoredInputs(folder, recipe), dict[str, Any](), dict[str, str]()
    for figure in _FIGURES:
        try:
            numbers[figure.name] = figure.draw(inputs, drawn)
        except LeftOut as reason:
            left_out[figure.name] = str(reason)
    with contextlib.suppress(LeftOut):
        of_balance.choose_examples(inputs, drawn)

    pictures = page_pictures(folder, drawn, recipe)
    return {
        "title": "What the balance removed",
        "run": folder.path.resolve().name,
        "blur": recipe.report.blur,
        "cards": balance_cards(summary, recipe),
        "balance": summary,
        "figures": place_figures(_FIGURES, drawn, numbers, words, images=recipe.report.images),
        "left_out": left_out,
        "numbers": numbers,
        "metric_name": recipe.balance.metric,
        "metric": recipe.balance.metric.replace("_", " "),
        "radius": recipe.balance.max_radius,
        "side": recipe.report.thumbnail_px,
        "removed_sets": by_stratum(galleries.removed_sets, drawn / "removed_sets.csv", pictures.thumbnails),
        "removed_pairs": galleries.removed_pairs(drawn / "removed_pairs.csv", pictures.thumbnails),
        "stage": record,
        "versions": record.versions,
        "settings": as_yaml(public_settings(record.settings)),
        "commands": _commands(folder, summary, recipe),
        "thumbnails": pictures.thumbnails,
        "no_pictures": pictures.missing,
    }


def _commands(folder: RunFolder, summary: BalanceSummary, recipe: Recipe) -> Sequence[tuple[str, str]]:
    """What to do with a balance: a command, and what it is for."""
    run = folder.path.resolve().name
    listed = (f"clip-cid subset {run} {run}-kept", "the kept images as lists of keys and rows; --shards copies them")
    trained = (f"clip-cid run {run}", "go on: the stages after the balance, with the settings of the run's recipe")
    if summary.threshold is None:
        return (listed, trained)

    smaller = 0.8 * summary.threshold[recipe.balance.metric]
    return (
        (
            f"clip-cid balance {run} --threshold {smaller:.2g}",
            "another threshold, in seconds up to balance.max_threshold; the tables above say what it removes",
        ),
        (f"clip-cid balance {run} --sweep", "the share that each threshold removes, as a table"),
        (
            f"clip-cid balance {run} --balance.max-radius {summary.threshold[recipe.balance.metric]:.2g}",
            "keep more of a set whose images are far from the kept one",
        ),
        listed,
        trained,
    )
