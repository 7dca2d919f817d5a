import csv
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest

from clip_cid import units
from clip_cid.figures import style
from clip_cid.models.public_names import PublicWords
from clip_cid.report import galleries, page
from clip_cid.report.suggestion import Suggestion
from clip_cid.report.thumbnails import Thumbnails

WORDS = PublicWords({})
NO_PICTURES = Thumbnails(None, side=0, budget=0)


def draw_line(path: Path, label: str = "x") -> Path:
    with style.new_figure(2.0) as figure:
        axes = figure.add_subplot()
        axes.plot([1, 2], [3, 4], color=style.BLUE, marker="o")
        axes.set_xlabel(label)
        style.save_svg(figure, path)
    return path


def test_equal_figures_are_equal_files_without_a_date(tmp_path: Path) -> None:
    first, second = draw_line(tmp_path / "a.svg").read_text(), draw_line(tmp_path / "b.svg").read_text()
    assert first == second
    assert not re.search(r"\d\d:\d\d", first)


def test_an_inline_figure_has_its_own_ids_and_no_address_outside(tmp_path: Path) -> None:
    one, two = (str(page.inline_svg(draw_line(tmp_path / f"{name}.svg"), "d", WORDS)) for name in ("one", "two"))
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (one, two)]
    assert ids[0]
    assert not ids[0] & ids[1]
    for text, names in ((one, ids[0]), (two, ids[1])):
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= names
        assert "http" not in text


def test_an_inline_figure_takes_the_colors_and_the_font_of_the_page(tmp_path: Path) -> None:
    text = str(page.inline_svg(draw_line(tmp_path / "one.svg"), "d", WORDS))
    assert "var(--blue)" in text
    assert not re.search(r"#[0-9a-f]{6}\b", text)
    assert "DejaVu" not in text


def test_descriptions_and_labels_cannot_leave_their_place(tmp_path: Path) -> None:
    text = str(page.inline_svg(draw_line(tmp_path / "one.svg", '</text><script>"'), '"><script>', WORDS))
    assert "<script" not in text


def test_every_color_of_a_figure_is_one_that_the_page_knows() -> None:
    sheet = (Path(page.__file__).parent / "report.css").read_text()
    assert all(f"--{name}:" in sheet for name in page._COLORS.values())
    assert set(style.model_colors(["a", "b", "c", "d", "e"]).values()) <= page._COLORS.keys()


def test_a_value_that_the_page_lacks_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        page.render("report.html", {"title": "only this"}, WORDS)


def test_pages_of_one_process_are_each_cut_by_their_own_words() -> None:
    """They share their templates, and nothing else."""
    values: dict[str, Any] = {
        "title": "a TOKEN1 and a TOKEN2",
        "run": "run",
        "blur": False,
        "side": 0,
        "no_pictures": None,
    }
    values["suggestion"] = Suggestion([], [])
    for own, other in (("TOKEN1", "TOKEN2"), ("TOKEN2", "TOKEN1")):
        words = PublicWords({"pairs": {"source": [f"https://host.example/x.tar?token={own}"]}})
        text = page.render("suggest.html", values, words)
        assert own not in text
        assert other in text


def test_columns_of_unequal_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'a': 2, 'b': 1"):
        style.write_csv(tmp_path / "t.csv", {"a": [1, 2], "b": [1]})


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-1+x", "@SUM(A1)", "\tx", " =1", "'=x", "''+x", "\uff1d1"])
def test_no_cell_is_a_formula_and_every_text_comes_back(tmp_path: Path, text: str) -> None:
    """A key, a caption or a name of a model, in cells and in the header."""
    path = tmp_path / "t.csv"
    style.write_csv(path, {text: [text, "plain", "'quoted'"]})
    with open(path, newline="", encoding="utf-8") as handle:
        cells = [cell for row in csv.reader(handle) for cell in row]
    assert cells == [f"'{text}", f"'{text}", "plain", "'quoted'"]
    assert style.read_csv(path) == {text: [text, "plain", "'quoted'"]}


def test_numbers_in_a_table_stay_as_they_are(tmp_path: Path) -> None:
    style.write_csv(tmp_path / "t.csv", {"x": [-0.25, "-0.25", "+7", -3, None, float("-inf")]})
    assert (tmp_path / "t.csv").read_text() == 'x\n-0.25\n-0.25\n+7\n-3\n""\n-inf\n'


@pytest.mark.parametrize(
    ("value", "text"), [(0.1, "0.1"), (1, "1"), (2000, "2,000"), (1e6, "1M"), (2.5e9, "2.5B"), (0, "0")]
)
def test_ticks_are_written_as_people_write_numbers(value: float, text: str) -> None:
    assert style.short_number(value) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0.0123, "+1.2"), (-0.05, "\N{MINUS SIGN}5.0"), (-0.0001, "0.0"), (0, "0.0")]
)
def test_differences_are_points_with_a_sign(share: float, text: str) -> None:
    assert units.signed_points(share) == text


def test_long_captions_are_cut_and_empty_ones_become_the_key() -> None:
    (long, empty) = galleries.sample({"a": "x" * 5000, "b": ""}, NO_PICTURES)
    assert len(long.caption) == 300
    assert long.caption.endswith("…")
    assert empty.caption == "b"


@pytest.mark.parametrize(("members", "folded"), [(2, 0), (12, 0), (13, 1), (40, 28)])
def test_sets_beyond_twelve_fold(tmp_path: Path, members: int, folded: int) -> None:
    facts = {"farthest": 0.06, "widest_pair": 0.09, "widest_exact": False, "weakest_link": 0.05, "component_size": 70}
    names = ("stratum", "set", "size", *facts, "place", "row", "distance", "kind", "key", "caption")
    with open(tmp_path / "t.csv", "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(names)
        writer.writerows(
            ("largest", 7, 50, *facts.values(), place, place, place / 100, "semantic", f"k{place}", "c")
            for place in range(members)
        )
    (found,) = galleries.removed_sets(tmp_path / "t.csv", NO_PICTURES)
    assert len(found.pictures) + len(found.folded) == members
    assert len(found.folded) == folded
    assert found.more == 50 - members
    assert [one.kept for one in found.pictures] == [True] + [False] * (len(found.pictures) - 1)
    assert found.span == (0.01, (members - 1) / 100)
    assert found.facts == galleries.SetFacts(0.06, 0.09, False, 0.05, 70)
    assert found.pictures[0].note == "kept"
    assert found.pictures[1].note == "0.010 semantic"


@pytest.mark.parametrize("caption", ["two\rlines", "two\r\nlines", "two\nlines", 'a "word", and more', "x" * 200_000])
def test_a_table_gives_back_any_caption(tmp_path: Path, caption: str) -> None:
    columns = {"stratum": ["largest"] * 2, "cluster": [3] * 2, "size": [2] * 2, "class": [""] * 2}
    of_each = {"place": [0, 1], "row": [5, 8], "cosine": [0.9, 0.8], "key": ["a", "b"], "caption": [caption, "next"]}
    style.write_csv(tmp_path / "t.csv", columns | of_each)
    assert galleries.rows_by_key(tmp_path / "t.csv") == {"a": 5, "b": 8}
    (found,) = galleries.clusters(tmp_path / "t.csv", NO_PICTURES)
    plain = caption.replace("\r\n", "\n").replace("\r", "\n")
    assert [one.caption for one in found.pictures] == [galleries.short(plain), "next"]


def test_a_typical_pair_is_the_middle_one() -> None:
    def pictures(count: int) -> list[galleries.Picture]:
        return [galleries.Picture(f"{pair}{role}", "", None) for pair in range(count) for role in ("kept", "removed")]

    found = galleries.typical_pairs({"five": pictures(5), "four": pictures(4), "one": pictures(1)})
    captions = {kind: (example.kept.caption, example.removed.caption, example.of) for kind, example in found.items()}
    assert captions == {
        "five": ("2kept", "2removed", 5),
        "four": ("1kept", "1removed", 4),
        "one": ("0kept", "0removed", 1),
    }


@pytest.mark.parametrize("most", [4, 6, 12])
@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("count", range(2, 61, 2))
def test_rows_of_pictures_are_as_few_as_can_be_and_about_equally_long(count: int, most: int, together: int) -> None:
    each = page.columns(count, most, together)
    assert together <= each <= most
    assert each % together == 0
    rows = -(-count // each)
    assert rows == -(-count // most)
    last = count - (rows - 1) * each
    assert last >= each - rows * together, "no picture stands alone under a full row"


def test_eleven_and_twelve_pictures_are_one_row_where_there_is_room() -> None:
    assert [page.columns(count, 12) for count in (1, 11, 12, 13)] == [1, 11, 12, 7]
    assert [page.columns(count, 4) for count in (5, 9, 12)] == [3, 3, 4]
