"""The page of a balance, which is there as soon as the balance is."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from fabricated_run import COPIES, GROUPS, ROWS, make_recipe, make_run

from clip_cid.errors import RunError
from clip_cid.recipe import Recipe
from clip_cid.report.balance_page import write_balance_page
from clip_cid.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunFolder, Recipe]:
    """Embedded and balanced, and nothing else."""
    recipe = make_recipe(tmp_path, draw={"gallery_sets": 3})
    folder = make_run(tmp_path, recipe)
    for stage in ("cluster", "distill", "evaluate"):
        shutil.rmtree(folder.path / stage)
    return folder, recipe


def written(run: tuple[RunFolder, Recipe]) -> str:
    path = write_balance_page(*run)
    assert path is not None
    assert path == run[0].path / "balance.html"
    return path.read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.slow
def test_a_balance_without_any_later_stage_has_a_page_of_its_own(run: tuple[RunFolder, Recipe]) -> None:
    text = written(run)
    removed = GROUPS * (COPIES - 1)
    assert f">{removed}</dd>" in text
    assert f"{100 * removed / (ROWS - 1):.1f} % of the usable ones" in text
    for heading in ("The largest sets", "Sets at the threshold", "Sets drawn at random", "What to do next"):
        assert f">{heading}<" in text
    for figure in ("distances", "removed_share", "single_linkage"):
        assert f'id="{figure}"' in text
    assert "clip-cid subset run run-kept" in text

    # One file: nothing is fetched, and nothing runs.
    assert text.count("data:image/webp;base64,") >= 3 * COPIES
    assert "<script" not in text
    assert not re.findall(r"https?://", text)
    assert [path.name for path in run[0].path.glob("*balance*html*")] == ["balance.html"]


@pytest.mark.slow
def test_the_page_is_written_again_only_for_other_results_or_settings(
    run: tuple[RunFolder, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, recipe = run
    first = written(run)
    assert write_balance_page(*run) is None

    hidden = recipe.model_copy(update={"report": recipe.report.model_copy(update={"images": False})})
    without = written((folder, hidden))
    assert "data:image" not in without
    assert "report.images is off" in without
    assert written(run) == first

    record = folder.record("balance")
    assert record is not None
    monkeypatch.setattr(RunFolder, "record", lambda *_: replace(record, started="2027-01-01T00:00:00+00:00"))
    assert "2027-01-01" in written(run)

    (folder.path / "balance.html").write_text("of somebody who was killed")
    assert "2027-01-01" in written(run)


@pytest.mark.slow
def test_pairs_that_are_gone_leave_numbers_and_the_reason(run: tuple[RunFolder, Recipe]) -> None:
    shutil.rmtree(run[0].path.parent / "pairs")
    text = written(run)
    assert "No pictures on this page:" in text
    assert "<th>widest pair</th>" in text


def test_without_a_balance_there_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no finished balance here"):
        write_balance_page(RunFolder(tmp_path), Recipe())
    assert not list(tmp_path.iterdir())
