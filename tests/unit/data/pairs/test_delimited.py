"""Text tables: every line is a row, a part of a quoted value, or named in an error."""

import csv
import io
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clip_cid.data.pairs import delimited
from clip_cid.data.pairs.delimited import TableFault, find_header, find_reading, records
from clip_cid.data.pairs.pairs import Pairs, open_pairs
from clip_cid.errors import DataError
from clip_cid.recipe import PairsConfig

ISSUE = 'image{0}caption\n0.jpg{0}"Hello world\n1.jpg{0}second\n2.jpg{0}third" x\n3.jpg{0}fourth\n'


def open_table(folder: Path, name: str, content: str | bytes, **more: Any) -> Pairs:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for image in range(10):
        (path.parent / f"{image}.jpg").write_bytes(b"image")
    return open_pairs(PairsConfig(source=(str(path),), **more))


def captions(pairs: Pairs) -> list[str]:
    return [pairs.read(row).captions[0] for row in range(len(pairs))]


def read(path: Path, usual: str, image: str = "image") -> tuple[list[str], list[list[str]]]:
    """The names and rows of a table."""
    delimiter, names = find_header(path, usual, [image])
    rows = records(path, find_reading(path, delimiter, names, image), len(names))
    return names, [[cell.encode("latin-1").decode() for cell in row.cells] for row in rows]


# Quotes that are letters


def test_a_quote_that_is_never_closed_swallows_no_row_of_a_tsv(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = open_table(tmp_path, "p.tsv", ISSUE.format("\t"))
    assert captions(pairs) == ['"Hello world', "second", 'third" x', "fourth"]
    assert pairs.keys(0, 4) == [f"{number}.jpg" for number in range(4)]
    assert "p.tsv: quotes are read as letters; by the rules of CSV they are broken (line 4: text follows" in caplog.text


@pytest.mark.parametrize(
    "cells",
    [
        ['"Hello world', "second", 'third"', "fourth"],  # as a quoted value it would be whole
        ["first", '"open', "third"],
        ["first", "second", '"'],
        ['"a" b', '"c"', "d"],
        ['12" pipe', "a 5'6\" man", '"'],
        ['a \\" b', '"c', 'd\\"'],
        ['"a ""b', 'c"" d"', "e"],
        ['"', '"', '"'],
    ],
)
def test_quotes_of_a_tsv_are_letters_where_they_do_not_quote(tmp_path: Path, cells: list[str]) -> None:
    lines = [f"{row}.jpg\t{cell}\n" for row, cell in enumerate(cells)]
    assert captions(open_table(tmp_path, "p.tsv", "image\tcaption\n" + "".join(lines))) == cells


def test_a_tsv_that_quotes_is_read_as_its_writer_wrote_it(tmp_path: Path) -> None:
    cells = ['a "good" one', "two\nlines", "a\ttab", "plain", "", 'ends with "']
    text = io.StringIO()
    csv.writer(text, delimiter="\t").writerows(
        [["image", "caption"], *([f"{n}.jpg", cell] for n, cell in enumerate(cells))]
    )
    (tmp_path / "p.tsv").write_text(text.getvalue())
    assert [row[1] for row in read(tmp_path / "p.tsv", "\t")[1]] == cells


def test_one_damaged_row_does_not_put_quotes_around_all_others(tmp_path: Path) -> None:
    rows = [f'"{row}.jpg"\t"caption {row}"\n' for row in range(9)]
    rows[4] = '"4.jpg"\t"caption 4\n'
    for header in ('"image"\t"caption"\n', "image\tcaption\n"):
        with pytest.raises(DataError, match=r"p\.tsv: .*line (6|7): "):
            open_table(tmp_path, "p.tsv", header + "".join(rows))


# Quotes out of place in a .csv


def test_a_quote_that_is_never_closed_is_an_error_of_a_csv_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"p\.csv: .*line 4: text follows the closing quote .*line 2\): ' x'") as error:
        open_table(tmp_path, "p.csv", ISSUE.format(","))
    assert "doubled" in error.value.fix


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        # A second quote ends the value: read by the rules, rows 1 and 2 are within the caption of row 0.
        (
            'image,caption\n0.jpg,"Hello world\n1.jpg,second\n2.jpg,third"\n3.jpg,x\n',
            "line 2: .*other rows, such as line 3",
        ),
        ('image,caption\n0.jpg,"Hello world\n1.jpg,third"\n2.jpg,x\n', "line 2: .*other rows, such as line 3"),
        ('caption,image\n"Hello world,0.jpg\nsecond",1.jpg\nx,2.jpg\n', "line 2: .*other rows, such as line 2"),
        ('image,caption,note\n0.jpg,"Hello,n\n1.jpg,third",n\n2.jpg,x,n\n', "line 2: .*other rows, such as line 3"),
        ('note,image,caption\nn,a/0001,"Hello\nn,a/0002,third"\nn,a/0003,x\n', "line 2: .*other rows, such as line 3"),
        (
            'image,caption\n"0.jpg,one\n1.jpg",two\n2.jpg,x\n',
            "line 2: the name of the image continues on the next line",
        ),
        (
            'image,caption\n0.jpg,one\n1.jpg,"two\n2.jpg,three\n',
            "line 3: the quote that opens a value here is never closed",
        ),
        ('image,caption\n0.jpg,"one" two\n', "line 2: text follows the closing quote of a value: ' two'"),
        ('image,"caption\n0.jpg,one\n', "column 'caption' is not there"),
        ('image,caption\n0.jpg,one\n1.jpg,two,"three"\n', "line 3: Expected 2 columns, got 3"),
        ("image,caption\n0.jpg,one\n1.jpg\n", "line 3: Expected 2 columns, got 1"),
        (b"image,caption\n0.jpg,one\n" + bytes(512) + b"\n3.jpg,four\n", "line 3: 512 zero bytes"),
        (b'image,caption\n0.jpg,"one' + bytes(512) + b'"\n3.jpg,four\n', "line 2: 512 zero bytes"),
        ("image,caption\n0.jpg,one\n".encode("utf-16"), "line 1: the text is UTF-16"),
    ],
)
def test_a_csv_that_would_lose_rows_is_refused_with_the_line(tmp_path: Path, table: str | bytes, problem: str) -> None:
    with pytest.raises(DataError, match=f"p.csv: .*{problem}"):
        open_table(tmp_path, "p.csv", table)


def test_a_hidden_row_is_known_by_its_file_too(tmp_path: Path) -> None:
    (tmp_path / "beta").write_bytes(b"image")
    with pytest.raises(DataError, match="other rows, such as line 3"):
        open_table(tmp_path, "p.csv", 'image,caption\nalpha,"Hello\nbeta,third"\n')


@pytest.mark.parametrize(
    "caption",
    [
        "two\nlines",
        "Hello, world\nsecond line, with a comma",
        "one, two\n\nthree, four, five\n",
        'he said "no, never"\nand left, at 10, by car',
        "a\r\nb, c\rd, e",
        ",\n,",
        '"\n"',
    ],
)
@pytest.mark.parametrize("columns", [("image", "caption"), ("caption", "image"), ("image", "caption", "note")])
def test_captions_of_several_lines_are_as_pandas_wrote_them(
    tmp_path: Path, caption: str, columns: tuple[str, ...]
) -> None:
    rows = [
        {"image": f"{row}.jpg", "caption": text, "note": "n"} for row, text in enumerate(["first", caption, "last"])
    ]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    assert captions(open_table(tmp_path, "p.csv", text.getvalue())) == ["first", caption.strip(), "last"]


def test_values_that_could_hide_rows_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def said(content: str) -> str:
        caplog.clear()
        open_table(tmp_path, "p.csv", content)
        return caplog.text

    hidden = 'image,caption\n0.jpg,first\nab12,"Hello\ncd9f,second\nffe1,third"\n'
    assert "1 quoted value with line ends and commas, the first from line 3, each read as one" in said(hidden)
    two = 'image,caption\n0.jpg,"a,\nb"\n1.jpg,"c\nd"\n2.jpg,"e\n,f"\n'
    assert "2 quoted values with line ends and commas, the first from line 2" in said(two)
    assert "quoted value" not in said('image,caption\n0.jpg,"a\nb"\n1.jpg,"c, d"\n')


def test_quotes_escaped_by_backslashes_are_read_where_the_whole_file_is_so(tmp_path: Path) -> None:
    table = 'image,caption\n0.jpg,"he said \\"no, never\\""\n1.jpg,"C:\\\\x, \\n"\n2.jpg,a \\" b\n'
    assert captions(open_table(tmp_path, "p.csv", table)) == ['he said "no, never"', "C:\\x, \\n", 'a \\" b']
    (tmp_path / "q.csv").write_text(table)
    with open(tmp_path / "q.csv", newline="") as file:  # but for the escape in the last row, which is not in quotes
        expected = list(csv.reader(file, doublequote=False, escapechar="\\"))
    assert read(tmp_path / "q.csv", ",")[1][0] == expected[1]
    with pytest.raises(DataError, match="line 2: text follows the closing quote"):
        open_table(tmp_path, "p.csv", table + '3.jpg,"and ""doubled"" ones"\n')


# Lines, marks, delimiters


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends_of_all_systems_and_a_byte_order_mark_change_nothing(
    tmp_path: Path, end: str, mark: str, last: bool
) -> None:
    table = mark + end.join(["image,caption", "0.jpg,one", "", '1.jpg,"two, three"']) + (end if last else "")
    assert captions(open_table(tmp_path, "p.csv", table)) == ["one", "two, three"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_an_end_of_another_system_within_a_line_is_a_letter(tmp_path: Path, end: str) -> None:
    table = end.join(["image,caption", "0.jpg,one\rtwo", '1.jpg,"three\r, four"', "2.jpg,five"])
    assert captions(open_table(tmp_path, "p.csv", table)) == ["one\rtwo", "three\r, four", "five"]


@pytest.mark.parametrize(("name", "delimiter"), [("p.csv", "\t"), ("p.csv", ";"), ("p.csv", "|"), ("p.tsv", ",")])
def test_columns_that_are_not_there_are_listed_by_the_delimiter_of_the_file(
    tmp_path: Path, name: str, delimiter: str
) -> None:
    table = f"filepath{delimiter}title{delimiter}note\n0.jpg{delimiter}one{delimiter}x\n"
    with pytest.raises(DataError, match=r"'image' is not there; the table has filepath, title, note\."):
        open_table(tmp_path, name, table)


def test_spaces_around_names_of_columns_count_only_where_they_must(tmp_path: Path) -> None:
    flickr = "image| number| caption\n0.jpg| 0| A dog , running .\n"
    assert captions(open_table(tmp_path, "results.csv", flickr)) == ["A dog , running ."]
    both = "image, caption,caption\n0.jpg,spaced,exact\n"
    assert captions(open_table(tmp_path, "both.csv", both)) == ["exact"]


@pytest.mark.parametrize(("name", "delimiter"), [("p.csv", "\t"), ("p.csv", ";"), ("p.csv", "|"), ("p.tsv", ",")])
def test_the_delimiter_is_the_one_that_gives_the_columns(tmp_path: Path, name: str, delimiter: str) -> None:
    table = f"image{delimiter}caption{delimiter}note, more\n0.jpg{delimiter}one{delimiter}x\n"
    names = {",": f"image{delimiter}caption{delimiter}note\n0.jpg{delimiter}one{delimiter}x\n"}
    assert captions(open_table(tmp_path, name, names.get(delimiter, table))) == ["one"]


def test_a_tab_separated_csv_reads_quotes_as_letters_too(tmp_path: Path) -> None:
    assert captions(open_table(tmp_path, "p.csv", ISSUE.format("\t"))) == [
        '"Hello world',
        "second",
        'third" x',
        "fourth",
    ]


def test_a_table_without_the_columns_names_those_it_has(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column 'image' is not there; the table has Image, text"):
        open_table(tmp_path, "p.csv", "Image,text\n0.jpg,x\n")


def test_a_long_line_and_a_long_value_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "_LONGEST", 1000)
    with pytest.raises(DataError, match="line 3: more than 1,000 bytes on one line"):
        open_table(tmp_path, "p.csv", f"image,caption\n0.jpg,x\n1.jpg,{'x' * 2000}\n")
    with pytest.raises(DataError, match="line 2: a quoted value has more than 1,000 bytes"):
        open_table(tmp_path, "p.csv", 'image,caption\n0.jpg,"x\n' + "1.jpg,x\n" * 1000)


# Python's csv module as the oracle

cells = st.text(alphabet='ab "\n,;\t|é\\', max_size=8)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(cells, cells), max_size=6),
    delimiter=st.sampled_from(",;|"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_what_a_csv_writer_wrote_comes_back(
    rows: Sequence[tuple[str, str]], delimiter: str, quoting: Any, end: str, tmp_path: Path
) -> None:
    path = tmp_path / "p.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=end)
        writer.writerow(["image", "one", "two"])
        writer.writerows([f"{row:03d}.jpg", *values] for row, values in enumerate(rows))
    names, found = read(path, delimiter)
    assert names == ["image", "one", "two"]
    assert found == [[f"{row:03d}.jpg", *values] for row, values in enumerate(rows)]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.text(alphabet='ab "', max_size=6), min_size=1, max_size=8))
def test_no_row_of_a_tsv_without_line_ends_in_values_vanishes(values: list[str], tmp_path: Path) -> None:
    path = tmp_path / "p.tsv"
    path.write_text("image\tcaption\n" + "".join(f"{row}.jpg\t{value}\n" for row, value in enumerate(values)))
    try:
        _, found = read(path, "\t")
    except TableFault:
        quoted = sum(len(value) > 1 and value[0] == value[-1] == '"' for value in values)
        assert 2 * quoted > len(values)  # most rows are quoted, so quotes are no letters, and one is out of place
        return
    assert [row[0] for row in found] == [f"{row}.jpg" for row in range(len(values))]
    with open(path, newline="") as file:
        quoted = list(csv.reader(file, delimiter="\t"))[1:]
    assert [row[1] for row in found] in (values, [row[-1] for row in quoted])


def mutated(data: bytes, draw: random.Random) -> bytes:
    """The bytes with some taken out, put in, zeroed or moved."""
    at, size = draw.randrange(len(data)), draw.choice([1, 1, 1, 2, 16, 64])
    return {
        "cut": data[:at],
        "out": data[:at] + data[at + size :],
        "in": data[:at] + draw.choice([b'"', b"\n", b"\r", b",", b"\t", b'""', b"\\", b"\xff", b"\0"]) + data[at:],
        "zero": data[:at] + bytes(min(size, len(data) - at)) + data[at + size :],
        "twice": data[: at + size] + data[at:],
    }[draw.choice(["cut", "out", "in", "in", "in", "zero", "twice"])]


@pytest.mark.parametrize(("name", "delimiter"), [("p.csv", ","), ("p.tsv", "\t")])
def test_damage_to_a_table_is_an_error_or_every_line_is_accounted_for(
    tmp_path: Path, name: str, delimiter: str
) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerow(["image", "caption"])
    for row in range(12):
        writer.writerow([f"{row:02d}.jpg", ["plain", 'a "b" c', "x, y", "two\nlines", "é"][row % 5]])
    whole = text.getvalue().encode()

    path, draw = tmp_path / name, random.Random(0)
    for _ in range(600):
        data = mutated(whole, draw)
        path.write_bytes(data)
        try:
            names, found = read(path, delimiter)
        except (TableFault, ValueError):  # ValueError: the columns or the letters are gone
            continue
        for row in found:
            assert not any(f"{image:02d}.jpg" in row[1] for image in range(12)), data

        # The header, each row, each line within a value and each blank line are one line of the file.
        lines = re.sub("\r+\n", "\n", data.decode("latin-1")).split("\n")
        values = [re.sub("\r+\n", "\n", cell).split("\n") for row in [names, *found] for cell in row]
        blank = lines.count("") - sum(value[1:-1].count("") for value in values)
        assert 1 + len(found) + sum(len(value) - 1 for value in values) + blank == len(lines), data
