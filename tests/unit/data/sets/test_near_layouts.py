"""Layouts that are nearly known ones: read where that is safe, else named with what to do."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.io import savemat
from set_layouts import Painter, class_shown, keys_of
from tiny_sets import COLORS, folder_set, image, tar_set

from clip_cid.data.pairs.images import EXTENSIONS, decode_image
from clip_cid.data.sets.evaluation_sets import EvaluationSet, open_set
from clip_cid.errors import DataError

WNIDS = keys_of("imagenet")
PAGE = Path(__file__).parents[4] / "docs" / "evaluation_sets.md"


def opened(root: Path, name: str = "mine", **options: object) -> EvaluationSet:
    return open_set(name, str(root), max_pixels=1_000_000, **options)  # pyright: ignore[reportArgumentType]


def refused(root: Path, name: str = "mine") -> str:
    with pytest.raises(DataError) as error:
        opened(root, name)
    return str(error.value)


# --- Images of every type that is decoded ---


@pytest.mark.parametrize("suffix", EXTENSIONS)
def test_images_of_every_type_are_read(suffix: str, tmp_path: Path) -> None:
    root = folder_set(tmp_path, splits=("test",))
    for name, color in COLORS.items():
        for old in (root / "test" / name).iterdir():
            old.unlink()
        picture = Image.new("L" if suffix == "pgm" else "RGB", (8, 8), color[0] if suffix == "pgm" else color)
        picture.save(root / "test" / name / f"a.{suffix.upper()}", Image.registered_extensions()[f".{suffix}"])
    test = opened(root).split("test")
    assert len(test) == 3
    for row in range(3):
        assert test.load(row).mode == "RGB"
        expected = decode_image(Path(test.name(row)).read_bytes(), max_pixels=100)
        assert test.load(row).tobytes() == expected.tobytes()


def test_class_folders_of_nothing_that_is_read_say_what_they_hold(tmp_path: Path) -> None:
    for name in COLORS:
        (tmp_path / "test" / name).mkdir(parents=True)
        (tmp_path / "test" / name / "a.heic").write_bytes(b"x")
    assert "none of 3 files in the class folders is an image of a known type (.heic)" in refused(tmp_path)


# --- ImageNet as its archives leave it ---


def solution(root: Path, order: list[int]) -> None:
    rows = [f"ILSVRC2012_val_{row:08d},{WNIDS[label]} 85 1 499 272 " for row, label in enumerate(order, start=1)]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(rows)]))


def devkit(root: Path, order: list[int], *, seed: int = 3) -> None:
    """The authors' class numbers are in another order than the WordNet ids, and meta.mat lists more than the 1,000."""
    numbers = np.random.default_rng(seed).permutation(1000) + 1
    rows = np.zeros(1001, dtype=[("ILSVRC2012_ID", object), ("WNID", object), ("words", object)])
    for place, wnid in enumerate(WNIDS):
        rows[place] = (int(numbers[place]), wnid, "words")
    rows[1000] = (1001, "n00001740", "entity")
    (root / "data").mkdir(parents=True)
    savemat(root / "data" / "meta.mat", {"synsets": rows.reshape(-1, 1)})
    text = "".join(f"{numbers[label]}\n" for label in order)
    (root / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text(text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("val", "write"),
    [
        ("ILSVRC/Data/CLS-LOC/val", lambda root, order: solution(root, order)),
        ("val", lambda root, order: devkit(root / "ILSVRC2012_devkit_t12", order)),
        (".", lambda root, order: devkit(root / "ILSVRC2012_devkit_t12", order)),
        ("Data/CLS-LOC/val", lambda root, order: devkit(root, order)),
    ],
)
def test_flat_validation_images_get_the_classes_of_their_list(
    val: str, write: Callable[[Path, list[int]], None], tmp_path: Path
) -> None:
    order = np.random.default_rng(0).permutation(1000).tolist()
    paint = Painter(tmp_path)
    for row, label in enumerate(order, start=1):
        paint(tmp_path / val / f"ILSVRC2012_val_{row:08d}.JPEG", label)
    write(tmp_path, order)
    found = opened(tmp_path, "imagenet")
    test = found.split("test")
    assert list(found.class_keys) == WNIDS
    for row in range(0, 1000, 7):
        assert class_shown(test.load(row)) == test.labels[row]


@pytest.mark.slow
def test_kaggles_folder_sorted_by_class_is_read_too(tmp_path: Path) -> None:
    paint, place = Painter(tmp_path), tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    for label, wnid in enumerate(WNIDS):
        for split in ("train", "val"):
            paint(place / split / wnid / "a.JPEG", label)
    found = opened(tmp_path, "imagenet")
    assert set(found.splits) == {"train", "test"}
    for split in found.splits.values():
        assert class_shown(split.load(500)) == split.labels[500]


def test_flat_validation_images_without_a_list_say_which_file_is_missing(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(image((0, 0, 0)))
    message = refused(tmp_path, "imagenet")
    assert "no list says their classes" in message
    assert "LOC_val_solution.csv or the folder ILSVRC2012_devkit_t12" in message
    assert "Name the set imagenet" in refused(tmp_path, "mine")


def test_a_list_of_images_that_are_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(image((0, 0, 0)))
    solution(tmp_path, [0, 1, 2])
    assert "2 of 3 files are missing" in refused(tmp_path, "imagenet")


# --- What is named with what to do ---


def _parquet(root: Path) -> str:
    (root / "data").mkdir(parents=True)
    (root / "data" / "test-00000-of-00001.parquet").write_bytes(b"PAR1")
    return r"1 \.parquet files lie there \(data/test-00000-of-00001\.parquet\), as the Hugging Face Hub keeps sets"


def _arrow(root: Path) -> str:
    (root / "test").mkdir(parents=True)
    (root / "test" / "data-00000-of-00001.arrow").write_bytes(b"")
    return r"1 \.arrow files lie there"


def _no_split(root: Path) -> str:
    folder_set(root, splits=("x",))
    for folder in (root / "x").iterdir():
        folder.rename(root / folder.name)
    (root / "x").rmdir()
    return r"3 class folders \(blue_thing, green_thing, red_thing\) lie in it without a split.*Move them into .*/test"


def _validation_only(root: Path) -> str:
    folder_set(root, splits=("train", "val"))
    return "it has train and val, but no test.*ln -s val"


def _capital(root: Path) -> str:
    folder_set(root, splits=("Train", "Test"))
    return "it has Test and Train, but no test.*ln -s Test"


def _one_deeper(root: Path) -> str:
    folder_set(root / "colors")
    return r"sets lie in the folders inside \(colors\).*Give .*/colors\."


def _flat(root: Path) -> str:
    (root / "test").mkdir(parents=True)
    for number in range(3):
        (root / "test" / f"cat_{number}.png").write_bytes(image((0, 0, 0)))
    return "3 images lie in .*/test without a folder of their class"


def _archive(root: Path) -> str:
    root.mkdir(parents=True)
    (root / "colors.zip").write_bytes(b"PK")
    return r"archives lie there \(colors\.zip\).*Unpack"


def _own_shards(root: Path) -> str:
    root.mkdir(parents=True)
    (root / "test-000000.tar").write_bytes(b"")
    return r"archives lie there \(test-000000\.tar\).*CLIP_benchmark's layout: test/0\.tar"


def _something(root: Path) -> str:
    root.mkdir(parents=True)
    (root / "labels.npy").write_bytes(b"")
    return r"there is labels\.npy\."


NEAR = (
    _parquet,
    _arrow,
    _no_split,
    _validation_only,
    _capital,
    _one_deeper,
    _flat,
    _archive,
    _own_shards,
    _something,
)


@pytest.mark.parametrize("write", NEAR)
@pytest.mark.parametrize("name", ["mine", "cifar10"])
def test_what_is_nearly_a_set_is_named_with_what_to_do(write: Callable[[Path], str], name: str, tmp_path: Path) -> None:
    expected = write(tmp_path / "set")
    message = refused(tmp_path / "set", name)
    assert "no test split in a layout that is known; " in message
    assert re.search(expected, message, re.DOTALL), message


def test_a_file_in_the_place_of_a_set_is_not_a_missing_set(tmp_path: Path) -> None:
    (tmp_path / "colors.tar").write_bytes(b"")
    assert "colors.tar is a file; a set is a folder" in refused(tmp_path / "colors.tar")


def test_a_list_of_class_names_alone_makes_no_set_of_tars(tmp_path: Path) -> None:
    root = tar_set(tmp_path)
    for split in ("train", "test"):
        for file in (root / split).iterdir():
            file.unlink()
    assert "no class folder and no tar lies in" in refused(root)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("retrieval\n", r"Name the tars under evaluate\.retrieval: .*/test/\*\.tar"), ("multilabel", "not measured here")],
)
def test_tars_for_another_task_are_named_by_their_type(kind: str, expected: str, tmp_path: Path) -> None:
    root = tar_set(tmp_path)
    (root / "dataset_type.txt").write_text("classification\n")
    opened(root)
    (root / "dataset_type.txt").write_text(kind)
    assert re.search(expected, refused(root))


def test_the_lines_for_parquet_in_the_docs_write_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hub" / "data").mkdir(parents=True)
    pictures = [{"bytes": image(color), "path": None} for color in COLORS.values()]
    table = pa.table({"image": pictures, "label": [0, 1, 2]})
    features = {"info": {"features": {"label": {"names": ["red/rose", "green", "blue"], "_type": "ClassLabel"}}}}
    table = table.replace_schema_metadata({b"huggingface": json.dumps(features).encode()})
    pq.write_table(table, tmp_path / "hub" / "data" / "test-00000-of-00001.parquet")

    (lines,) = re.findall(r"```python\n(import json\n.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    found = opened(tmp_path / "set")
    assert found.class_names == ("blue", "green", "red or rose")
    shown = Image.open(io.BytesIO(pictures[0]["bytes"])).tobytes()
    assert found.split("test").load(2).tobytes() == shown
