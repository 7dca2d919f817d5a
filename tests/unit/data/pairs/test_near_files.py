"""A table that names images otherwise than they lie on the disk: what is there is told, and nothing is guessed."""

import io
import json
import re
import subprocess
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from clip_cid.data.pairs.pair import BadSample, reason_kind
from clip_cid.data.pairs.pairs import open_pairs
from clip_cid.errors import DataError
from clip_cid.recipe import parse_recipe


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), "teal").save(file, "JPEG")
    return file.getvalue()


def pairs_of(folder: Path, on_disk: list[str], table: str, name: str = "pairs.csv", **settings: object):
    for image in on_disk:
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        (folder / image).write_bytes(picture())
    (folder / name).write_text(table, encoding="utf-8")
    values = {"source": [str(folder / name)], **settings}
    return open_pairs(parse_recipe({"pairs": values}, where="test").pairs)


NFC, NFD = (unicodedata.normalize(form, "caf\u00e9.jpg") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("on_disk", "named", "says"),
    [
        ("1.jpg", "1", "but '1.jpg' is there"),
        ("000001.jpg", "1", "but '000001.jpg' is there"),
        ("img_007.jpg", "img_7.jpg", "but 'img_007.jpg' is there"),
        ("1.jpg", "1.png", "but '1.jpg' is there"),
        ("1.JPG", "1.jpg", "but '1.JPG' is there"),
        ("1.jpg", " 1.jpg ", "but '1.jpg' is there"),
        ("a/1.jpg", "a\\1.jpg", "but 'a/1.jpg' is there"),
        ("images/1.jpg", "1.jpg", "but it lies in the folder 'images': move the table there"),
        (NFD, NFC, f"but {NFD!r} is there"),
        (NFC, NFD, f"but {NFC!r} is there"),
        ("1.jpg", "https://x.y/1.jpg", "it is an address: fetch the image first"),
        ("a b#1.jpg", "a%20b%231.jpg", "but 'a b#1.jpg' is there"),
        ("2.jpg", "1.jpg", "No such file or directory)"),
    ],
)
def test_the_file_that_was_meant_is_told(tmp_path: Path, on_disk: str, named: str, says: str):
    pairs = pairs_of(tmp_path, [on_disk], f"image,caption\n{named},a dog\n")
    with pytest.raises(BadSample) as error:
        pairs.read(0)
    assert says in error.value.reason
    assert reason_kind(error.value.reason) == "image ... cannot be read"


def test_a_link_that_leads_nowhere_is_told(tmp_path: Path):
    pairs = pairs_of(tmp_path, [], "image,caption\n1.jpg,a dog\n")
    (tmp_path / "1.jpg").symlink_to("/gone/1.jpg")
    with pytest.raises(BadSample, match=r"it is a link to '/gone/1\.jpg'"):
        pairs.read(0)


def test_of_two_files_that_look_alike_none_is_told(tmp_path: Path):
    pairs = pairs_of(tmp_path, ["01.jpg", "001.jpg"], "image,caption\n1,a\n")
    with pytest.raises(BadSample, match="No such file or directory"):
        pairs.read(0)


def test_captions_in_a_txt_are_a_table(tmp_path: Path):
    table = 'image,caption\n1.jpg,a dog\n1.jpg,"a dog, big"\n2.jpg,a cat\n'  # Flickr8k's captions.txt
    pairs = pairs_of(tmp_path, ["1.jpg", "2.jpg"], table, "captions.txt", repeated_rows="merge")
    assert [pairs.read(row).captions for row in range(2)] == [("a dog", "a dog, big"), ("a cat",)]


@pytest.mark.parametrize(
    ("table", "name", "problem", "fix"),
    [
        ("1.jpg,a\n2.jpg,b\n", "p.csv", "the table has 1.jpg, a", "The first line of a text table names the columns"),
        ("1.jpg#0\ta\n", "token.txt", "the table has 1.jpg#0, a", "The first line of a text table names the columns"),
        ("image,caption\n1.jpg,a dog, big\n", "p.csv", "line 2: Expected 2 columns, got 3", "holds commas stands in"),
        ("image|caption\n1.jpg\n", "p.csv", "line 2: Expected 2 columns, got 1", "holds bars stands in quotes"),
        ("{}", "p.jsonl.zst", "not a known format", ".jsonl or .parquet table"),
        ("x", "p.xlsx", "not a known format", "pandas.read_excel(FILE)"),
        ("{}", "captions_val2017.json", "not a known format", "docs/data.md has those for COCO"),
    ],
)
def test_a_table_that_cannot_be_read_says_what_to_do(tmp_path: Path, table: str, name: str, problem: str, fix: str):
    with pytest.raises(DataError) as error:
        pairs_of(tmp_path, ["1.jpg"], table, name)
    assert problem in error.value.problem
    assert fix in error.value.fix


def test_the_lines_of_the_page_make_tables_of_coco_and_flickr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = (Path(__file__).parents[4] / "docs" / "data.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"(?ms)^```(python|bash)\n(.*?)^```", page))
    monkeypatch.chdir(tmp_path)
    for folder in ("val2017", "images"):
        (tmp_path / folder).mkdir()
        for image in ("1.jpg", "2.jpg"):
            (tmp_path / folder / image).write_bytes(picture())

    images = [{"id": 7, "file_name": "1.jpg"}, {"id": 9, "file_name": "2.jpg"}]
    captions = [
        {"image_id": 7, "caption": "a dog"},
        {"image_id": 9, "caption": "cat"},
        {"image_id": 7, "caption": "it"},
    ]
    Path("captions_val2017.json").write_text(json.dumps({"images": images, "annotations": captions}))
    exec(blocks["python"], {})
    Path("Flickr8k.token.txt").write_text("1.jpg#0\ta dog\n1.jpg#1\tit\n2.jpg#0\tcat\n")
    subprocess.run(["bash", "-c", blocks["bash"]], check=True)

    for table in ("val2017/captions.csv", "images/captions.tsv"):
        values = {"pairs": {"source": [table], "repeated_rows": "merge"}}
        pairs = open_pairs(parse_recipe(values, where="test").pairs)
        assert [pairs.read(row).captions for row in range(len(pairs))] == [("a dog", "it"), ("cat",)]


def test_an_image_and_its_caption_may_spell_accents_in_two_ways(tmp_path: Path):
    (tmp_path / NFD).write_bytes(picture())
    (tmp_path / NFC).with_suffix(".txt").write_text("a cup")
    (tmp_path / "e\u0301.txt").write_text("alone")
    (tmp_path / "\u00e8.jpg").write_bytes(picture())
    (tmp_path / "e\u0300.txt").write_text("a letter")
    pairs = open_pairs(parse_recipe({"pairs": {"source": [str(tmp_path)]}}, where="test").pairs)
    assert sorted(pairs.read(row).captions[0] for row in range(len(pairs))) == ["a cup", "a letter"]


def test_captions_beside_images_are_found_whatever_case_their_extension_has(tmp_path: Path) -> None:
    for name in ("a", "b", "caf\u00e9"):
        (tmp_path / f"{name}.JPG").write_bytes(picture())
    (tmp_path / "a.TXT").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "b.Txt").write_text("not this one")
    (tmp_path / (unicodedata.normalize("NFD", "caf\u00e9") + ".TxT")).write_text("three")
    pairs = open_pairs(parse_recipe({"pairs": {"source": [str(tmp_path)]}}, where="test").pairs)
    assert [pairs.read(row).captions for row in range(3)] == [("one",), ("two",), ("three",)]
