"""Where repeats end: the words by made-up counts, and a run with planted duplicates."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from fabricated_run import COPIES, GROUPS, make_recipe, make_run

from clip_cid.errors import RunError
from clip_cid.report.suggestion import Part, sentences, suggest
from clip_cid.run_folder import RunFolder


def parts(links: Sequence[int], same: Sequence[int] | None = None, *, compared: int = 10) -> list[Part]:
    shares = same or [0] * len(links)
    return [Part(at / 10, (at + 1) / 10, count, compared, shares[at], ()) for at, count in enumerate(links)]


@pytest.mark.parametrize(
    ("links", "words"),
    [
        ([50, 30, 5, 12, 40], "Around 0.25 there are fewer links"),
        ([1, 5, 9, 20, 40], "without a gap"),
        ([40, 20, 9, 5, 1], "without a gap"),
        ([10, 6, 11], "without a gap"),  # not half of what is nearer
        ([12, 6, 12], "Around 0.15 there are fewer links"),
        ([3], "without a gap"),
    ],
)
def test_a_gap_has_twice_as_many_links_before_and_behind_it(links: list[int], words: str) -> None:
    assert words in " ".join(sentences(parts(links), "cosine"))


def test_copies_end_where_less_than_half_of_the_pairs_have_nearly_equal_pixels() -> None:
    told = " ".join(sentences(parts([9, 9, 9, 9], [10, 5, 4, 0]), "squared_euclidean"))
    assert "Up to 0.2 (squared euclidean) half or more" in told
    assert "few plain copies" in " ".join(sentences(parts([9, 9], [4, 0]), "cosine"))
    assert "copies" not in " ".join(sentences(parts([9, 9], compared=0), "cosine"))


@pytest.mark.slow
def test_every_link_is_in_one_part_and_the_page_shows_pairs_of_each(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    folder = make_run(tmp_path, recipe)
    found = suggest(folder, recipe)
    links = GROUPS * (COPIES - 1)
    assert sum(part.links for part in found.parts) == sum(part.compared for part in found.parts) == links
    assert found.parts[0].start == 0
    columns, lines = found.table()
    assert len(lines) == len(found.parts)
    assert columns[0] == "distance"
    text = (folder.path / "suggest.html").read_text()
    assert text.count("data:image/webp;base64,") == 2 * links
    assert "<script" not in text

    hidden = recipe.model_copy(update={"report": recipe.report.model_copy(update={"images": False})})
    suggest(folder, hidden)
    assert "data:image" not in (folder.path / "suggest.html").read_text()


def test_without_a_balance_there_is_nothing_to_suggest(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="balance has not run, so there is nothing to suggest"):
        suggest(RunFolder(tmp_path), make_recipe(tmp_path))
