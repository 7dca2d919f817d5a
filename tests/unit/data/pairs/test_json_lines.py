"""JSON lines, against the same rows in other tables."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_cid.data.pairs.pair import BadSample, Pair
from clip_cid.data.pairs.pairs import Pairs, open_pairs
from clip_cid.errors import DataError
from clip_cid.recipe import PairsConfig

NAMES = ["a b#1%.JPG", "\u732b/\u00e9.jpg", "deep/er/3.png"]


def images(folder: Path, names: list[str] = NAMES) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def opened(path: Path, text: str | bytes, **settings: Any) -> Pairs:
    data = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return open_pairs(PairsConfig(source=(str(path),), **settings), index=path.parent / "index")


def all_of(pairs: Pairs) -> list[Pair]:
    return [pairs.read(row) for row in range(len(pairs))]


@pytest.mark.parametrize("name", ["p.jsonl", "p.ndjson.gz", "P.JSONL"])
def test_rows_are_those_of_the_same_table_as_csv_and_as_parquet(tmp_path: Path, name: str) -> None:
    images(tmp_path)
    columns = {
        "image": NAMES,
        "caption": ['a "cat",\nsitting', " \u732b ", "three"],
        "id": ["0012", "9223372036854775808", "x/y"],
        "group": ["g", "", "h"],
    }
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    with open(tmp_path / "p.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([list(columns), *(row.values() for row in rows)])
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")

    settings: dict[str, Any] = {"key_column": "id", "keep_fields": ("group",)}
    of_lines = all_of(opened(tmp_path / name, "\n".join(map(json.dumps, rows)), **settings))
    assert of_lines[0] == Pair("0012", NAMES[0].encode(), ('a "cat",\nsitting',), {"group": "g"})
    for other in ("p.csv", "p.parquet"):
        assert all_of(open_pairs(PairsConfig(source=(str(tmp_path / other),), **settings))) == of_lines


def test_a_mark_windows_line_ends_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    images(tmp_path)
    text = b'\xef\xbb\xbf\r\n{"image": "a b#1%.JPG", "caption": "one"}\r\n \r\n\r\n{"caption": "\xe2\x80\xa8two",'
    pairs = opened(tmp_path / "p.jsonl", text + b' "image": "deep/er/3.png"}')
    assert [pair.captions for pair in all_of(pairs)] == [("one",), ("two",)]


def test_captions_may_be_lists_text_or_absent_from_row_to_row(tmp_path: Path) -> None:
    images(tmp_path)
    captions = [["one", None, " "], "two", []]
    rows = [{"image": name, "caption": caption} for name, caption in zip(NAMES, captions, strict=True)]
    pairs = opened(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)))
    assert [pairs.read(row).captions for row in range(2)] == [("one",), ("two",)]
    assert pairs.known_bad == {2: "no caption (empty caption)"}
    pairs = opened(tmp_path / "p.jsonl", '{"image": "a b#1%.JPG", "caption": NaN}', captions="optional")
    assert pairs.read(0).captions == ()


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"image": 7, "caption": "a"}, "image is a number, not a path"),
        ({"image": {"path": "1.jpg"}, "caption": "a"}, "image is an object, not a path"),
        ({"image": None, "caption": "a"}, "no image (empty image)"),
        ({"caption": "a"}, "no image (empty image)"),
        ({"image": "1.jpg", "caption": {"en": "a"}}, "caption is an object, not text"),
        ({"image": "1.jpg", "caption": ["a", True]}, "caption is true or false, not text"),
        ({"image": "1.jpg", "caption": "a", "id": 1.5}, "the key is a number, not text or a whole number"),
        ({"image": "1.jpg", "caption": "a", "id": ["x"]}, "the key is a list, not text or a whole number"),
        ({"image": "1.jpg", "caption": "a", "id": ""}, "no key"),
    ],
)
def test_a_value_of_another_type_makes_its_own_row_bad(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    images(tmp_path)
    row = {"id": 12345678901234567890, **row}
    good = [{"id": number, "image": name, "caption": "fine"} for number, name in enumerate(NAMES)]
    pairs = opened(tmp_path / "p.jsonl", "\n".join(map(json.dumps, [good[0], row, *good[1:]])), key_column="id")
    assert pairs.known_bad == {1: problem}
    assert [pairs.key(row) for row in (0, 2, 3)] == ["0", "1", "2"]


def test_text_that_is_no_utf_8_makes_its_own_row_bad(tmp_path: Path) -> None:
    images(tmp_path)
    lines = [
        b'{"image": "a b#1%.JPG", "caption": "caf\xe9"}',
        b'{"image": "deep/er/3.png", "caption": "\\ud800"}',
        b'{"image": "\xe9.jpg", "caption": "a"}',
    ]
    pairs = opened(
        tmp_path / "p.jsonl", b"\n".join([*lines, b'{"image": "\xe7\x8c\xab/\xc3\xa9.jpg", "caption": "a"}'])
    )
    assert pairs.known_bad == {2: "the key is not UTF-8"}
    for row in range(2):
        with pytest.raises(BadSample, match="caption 1 is not UTF-8"):
            pairs.read(row)
    assert pairs.read(3).captions == ("a",)


@pytest.mark.parametrize(
    ("name", "text", "problem", "fix"),
    [
        ("p.jsonl", '{"image": "1.jpg", "caption": "a"}\n{"image": "1.j', "line 2: no JSON object", "Each line is one"),
        ("p.jsonl", '[{"image": "1.jpg"}]', "line 1: a list, not a JSON object", "Each line is one JSON object"),
        ("p.jsonl", '"1.jpg"', "line 1: a text, not a JSON object", "Each line is one JSON object"),
        ("p.jsonl", "[" * 100_000, "line 1: no JSON object", "Each line is one JSON object"),
        ("p.jsonl", b"\xff\xfe{\0", "line 1: no JSON object", "Each line is one JSON object"),
        (
            "p.jsonl",
            '{"file_name": "1.jpg", "text": "a"}',
            "column 'image' is not there; the table has file_name",
            "Set",
        ),
        ("p.jsonl", '{"image": "1.jpg", "captions": "a"}', "column 'caption' is not there", "did you mean captions?"),
        ("p.jsonl", '{"image": "data:image/png;base64,' + "A" * 300 + '", "caption": "a"}', "holds pictures", "Write"),
        ("p.jsonl", " \n", "an empty table, without a single pair", "Give sources"),
    ],
)
def test_a_file_that_cannot_be_read_says_what_to_do(
    tmp_path: Path, name: str, text: str | bytes, problem: str, fix: str
) -> None:
    with pytest.raises(DataError) as error:
        opened(tmp_path / name, text)
    assert problem in error.value.problem
    assert fix in error.value.fix
    assert "\n" not in error.value.problem


def test_a_packed_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    packed = gzip.compress("\n".join(json.dumps({"image": f"{row}", "caption": "a"}) for row in range(99)).encode())
    for data in (packed[:-20], packed[:1] + b"?" + packed[2:], b""):
        (tmp_path / "p.jsonl.gz").write_bytes(data)
        with pytest.raises(
            DataError, match=r"p.jsonl.gz: (this table cannot be read \(not a whole .gz|an empty table)"
        ):
            open_pairs(PairsConfig(source=(str(tmp_path / "p.jsonl.gz"),)))


def test_a_field_that_first_comes_late_is_a_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_cid.data.pairs.tables.SHARD_ROWS", 2)
    rows: list[dict[str, Any]] = [{"image": f"{row}.jpg", "caption": "a"} for row in range(5)]
    rows[4]["group"] = {"is": [1, "\u00e9"]}
    pairs = opened(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)), keep_fields=("group",))
    assert [shard.rows for shard in pairs.shards] == [2, 2, 1]
    (tmp_path / "4.jpg").write_bytes(b"")
    assert pairs.read(4).fields == {"group": '{"is": [1, "\u00e9"]}'}


def test_a_field_that_is_there_twice_is_refused_but_for_fields_inside_another(tmp_path: Path) -> None:
    images(tmp_path)
    line = json.dumps({"image": NAMES[0], "caption": "one"})
    with pytest.raises(DataError, match=r"line 2: the field 'caption' is there twice") as error:
        opened(tmp_path / "p.jsonl", f'{line}\n{line[:-1]}, "caption": "two"}}\n')
    assert "a list holds several captions" in error.value.fix
    pairs = opened(tmp_path / "p.jsonl", f'{line[:-1]}, "about": {{"a": 1, "a": 2}}}}\n', keep_fields=("about",))
    assert pairs.read(0).captions == ("one",)


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_rows_of_one_image_are_merged_and_kept_rows_copied_as_they_are(tmp_path: Path, name: str) -> None:
    images(tmp_path)
    lines = [
        b'{"image":"a b#1%.JPG",  "caption": "one"}\r\n',
        b"\n",
        b'{"image": "deep/er/3.png", "caption": ["two", "zwei"]}\n',
        b'{"caption": "eins", "image": "a b#1%.JPG"}',
    ]
    pairs = opened(tmp_path / name, b"".join(lines), repeated_rows="merge")
    assert [pair.captions for pair in all_of(pairs)] == [("one", "eins"), ("two", "zwei")]
    assert pairs.has_rows
    (tmp_path / "out").mkdir()
    (file,) = pairs.copy_rows(np.array([0]), tmp_path / "out")
    data = file.read_bytes()
    assert (gzip.decompress(data) if name.endswith("gz") else data) == lines[0] + lines[3] + b"\n"

    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match="this table is not as it was indexed"):
        pairs.copy_rows(np.array([0]), tmp_path / "out")


def test_rows_without_a_usable_image_are_not_merged(tmp_path: Path) -> None:
    images(tmp_path)
    rows = [{"image": 1, "caption": "a"}, {"image": 1, "caption": "b"}, {"image": NAMES[0], "caption": "c"}]
    pairs = opened(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)), repeated_rows="merge")
    assert (len(pairs), set(pairs.known_bad)) == (3, {0, 1})
