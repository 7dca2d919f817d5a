"""Labelled sets: both layouts and the digits say the same kind of thing, and a set that contradicts itself is refused."""

import hashlib
import logging
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_sets import CLASSES, COLORS, TEMPLATES, folder_set, image, samples, tar_set, write_tar

from clip_cid.data.pairs.pair import BadSample
from clip_cid.data.sets.evaluation_sets import (
    DIGITS,
    EvaluationSet,
    MissingSetError,
    metric_of,
    open_set,
    open_test_images,
)
from clip_cid.errors import ConfigError, DataError


def opened(root: Path, name: str = "colors") -> EvaluationSet:
    return open_set(name, str(root), max_pixels=10_000)


def test_a_tar_set_and_a_folder_set_of_the_same_images_agree(tmp_path: Path) -> None:
    folders = opened(folder_set(tmp_path / "folders", each=3))
    tars = opened(tar_set(tmp_path / "tars", each=3))
    assert sorted(folders.class_names) == sorted(tars.class_names) == sorted(CLASSES)
    for labelled in (folders, tars):
        for split in ("train", "test"):
            part = labelled.split(split)
            assert sorted(part.labels.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
            for row, label in enumerate(part.labels):
                color = COLORS[labelled.class_names[label].replace(" ", "_")]
                mean = np.asarray(part.load(row)).mean(axis=(0, 1))
                assert np.abs(mean - color).max() < 20


def test_rows_follow_the_tars_in_number_order_not_in_name_order(tmp_path: Path) -> None:
    root = tar_set(tmp_path)
    for number in range(11):
        write_tar(
            root / "train" / f"{number}.tar",
            [("a.jpg", image((number * 20, 0, 0))), ("a.cls", str(number % 3).encode())],
        )
    (root / "train" / "nshards.txt").write_text("11")
    train = opened(root).split("train")
    assert train.labels.tolist() == [number % 3 for number in range(11)]
    reds = [np.asarray(train.load(row))[..., 0].mean() for row in range(11)]
    assert reds == sorted(reds)


def test_images_are_read_whatever_the_classes_are(tmp_path: Path) -> None:
    root = tar_set(tmp_path)
    with pytest.raises(DataError, match="of its own are missing"):
        opened(root, "cifar10")
    images = open_test_images("cifar10", str(root), setting="balance.against", max_pixels=10_000)
    ours = opened(root).split("test")
    assert len(images) == len(ours)
    assert all(np.array_equal(np.asarray(images.load(row)), np.asarray(ours.load(row))) for row in range(len(ours)))
    with pytest.raises(MissingSetError, match=r"balance\.against\.colors: nothing at"):
        open_test_images("colors", str(tmp_path / "no"), setting="balance.against", max_pixels=10_000)


def test_prompts_fill_in_the_class_name(tmp_path: Path) -> None:
    assert opened(tar_set(tmp_path)).prompts(1) == ["a photo of a green thing.", "green thing"]


def test_a_template_with_other_braces_is_left_as_it_is(tmp_path: Path) -> None:
    root = tar_set(tmp_path)
    (root / "zeroshot_classification_templates.txt").write_text("{x} {c} {{c}}")
    assert opened(root).prompts(0) == ["{x} red thing {red thing}"]


def test_a_set_without_prompts_is_refused_for_zero_shot_with_the_file_to_write(tmp_path: Path) -> None:
    folders, tars = opened(folder_set(tmp_path / "a")), tar_set(tmp_path / "b")
    (tars / "zeroshot_classification_templates.txt").unlink()
    with pytest.raises(DataError, match="has no prompts") as error:
        folders.prompts(0)
    assert str(tmp_path / "a" / "templates.txt") in error.value.fix
    with pytest.raises(DataError, match="has no prompts") as error:
        opened(tars).prompts(0)
    assert str(tars / "zeroshot_classification_templates.txt") in error.value.fix


def test_templates_beside_class_folders_are_used(tmp_path: Path) -> None:
    root = folder_set(tmp_path)
    (root / "templates.txt").write_text("\n".join(TEMPLATES))
    assert opened(root).prompts(0) == ["a photo of a blue thing.", "blue thing"]  # class folders are sorted


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        *((name, "mean_per_class") for name in ("fgvc_aircraft", "FGVC Aircraft", "oxford_pets", "vtab-pets", "caltech101")),
        *((name, "mean_per_class") for name in ("wds_vtab-caltech101", "flowers", "Oxford-Flowers102", "oxford-iiit-pet")),
        *((name, "top1") for name in ("cifar10", "cifar100", "food101", "birdsnap", "sun397", "cars", "dtd", "stl10")),
        *((name, "top1") for name in ("eurosat", "imagenet1k", "caltech256", "digits", "petshop")),
    ],
)  # fmt: skip
def test_mean_per_class_is_for_the_four_sets_of_clip_only(name: str, metric: str) -> None:
    assert metric_of(name) == metric


def test_a_missing_set_says_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(MissingSetError, match=r"evaluate\.sets\.colors: nothing at") as error:
        opened(tmp_path / "gone")
    assert f"{tmp_path / 'gone'}/{{train,test}}/0.tar" in error.value.fix


def test_a_label_without_a_class_name_is_named(tmp_path: Path) -> None:
    root = tar_set(tmp_path)
    (root / "classnames.txt").write_text("red thing\ngreen thing\n")
    with pytest.raises(DataError, match=r"s0002: label 2, but .* names 2 classes \(0 to 1\); 2 of 6"):
        opened(root)


def test_a_class_name_without_an_image_is_named(tmp_path: Path) -> None:
    root = tar_set(tmp_path)
    (root / "classnames.txt").write_text("\n".join([*CLASSES, "unicorn"]))
    with pytest.raises(DataError, match="4 class names but images of 3 classes; none of unicorn"):
        opened(root)


def test_a_class_that_only_the_test_images_have_is_named(tmp_path: Path) -> None:
    root = tar_set(tmp_path)
    write_tar(root / "train" / "0.tar", samples(2)[:4])  # classes 0 and 1
    with pytest.raises(DataError, match=r"1 classes have test images but no training image \(blue thing\)"):
        opened(root)


def test_a_set_of_one_class_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test" / "cat").mkdir(parents=True)
    (tmp_path / "test" / "cat" / "0.jpg").write_bytes(image((0, 0, 0)))
    with pytest.raises(DataError, match="only 1 class"):
        opened(tmp_path)


def test_a_class_that_only_training_has_is_said_and_accepted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tar_set(tmp_path)
    write_tar(root / "test" / "0.tar", samples(2)[:4])  # classes 0 and 1
    with caplog.at_level(logging.WARNING, "clip_cid"):
        opened(root)
    assert "1 of 3 classes have no test image (blue thing)" in caplog.text


def test_class_folders_that_differ_between_splits_are_named(tmp_path: Path) -> None:
    root = folder_set(tmp_path)
    (root / "test" / "red_thing").rename(root / "test" / "rad_thing")
    with pytest.raises(DataError, match="train has 3 class folders and test has 3; rad_thing is in one only"):
        opened(root)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("2", "1.tar is missing"), ("0", "'0' is not a number of tars"), ("many", "'many' is not"), ("", "file is empty")],
)
def test_a_number_of_shards_that_is_wrong_is_named(tmp_path: Path, text: str, problem: str) -> None:
    root = tar_set(tmp_path)
    (root / "test" / "nshards.txt").write_text(text)
    with pytest.raises(DataError, match=problem):
        opened(root)


def test_an_extra_shard_is_named(tmp_path: Path) -> None:
    root = tar_set(tmp_path)
    write_tar(root / "test" / "1.tar", samples(1))
    with pytest.raises(DataError, match=r"nshards.txt says 1, but there are 2 tars \(1.tar is extra\)"):
        opened(root)


def test_a_set_without_a_test_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no test split"):
        opened(tar_set(tmp_path, splits=("train",)))


def test_a_split_that_is_not_there_is_named_when_it_is_asked_for(tmp_path: Path) -> None:
    labelled = opened(tar_set(tmp_path, splits=("test",)))
    with pytest.raises(DataError, match="has no train split, only test"):
        labelled.split("train")


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    tars, folders = tar_set(tmp_path / "a"), folder_set(tmp_path / "b", each=0)
    write_tar(tars / "test" / "0.tar", [])
    for root in (tars, folders):
        with pytest.raises(DataError, match="the split has no image"):
            opened(root)
    (tmp_path / "c" / "test").mkdir(parents=True)
    with pytest.raises(DataError, match="no class folder"):
        opened(tmp_path / "c")


@pytest.mark.parametrize("where", ["in the header", "in an image", "between two files", "before the end mark"])
def test_a_truncated_tar_is_refused_wherever_it_was_cut(tmp_path: Path, where: str) -> None:
    root = tar_set(tmp_path)
    path = root / "test" / "0.tar"
    whole = path.read_bytes()
    size = len(samples(2, seed=1000)[0][1])  # the first image's member: a header and this
    image_end = 512 + -(-size // 512) * 512
    cuts = {"in the header": image_end + 100, "in an image": 700, "between two files": image_end}
    content = whole[: cuts[where]] if where in cuts else whole.rstrip(b"\0")
    path.write_bytes(content + bytes(-len(content) % 512 if where == "before the end mark" else 0))
    with pytest.raises(DataError, match=r"0\.tar: cut short at byte"):
        opened(root)


def test_damage_in_the_middle_of_a_tar_is_not_taken_for_its_end(tmp_path: Path) -> None:
    root = tar_set(tmp_path)
    path = root / "test" / "0.tar"
    data = bytearray(path.read_bytes())
    image_end = 512 + -(-len(samples(2, seed=1000)[0][1]) // 512) * 512
    data[image_end : image_end + 512] = b"x" * 512
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"damaged or cut short at byte {image_end:,}"):
        opened(root)


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ([("a.jpg", image((0, 0, 0)))], "a lacks a label"),
        ([("a.cls", b"0")], "a lacks an image"),
        ([("a.jpg", b"x"), ("a.cls", b"cat")], "a.cls holds 'cat', not a class number"),
        ([("a.jpg", b"x"), ("a.cls", b"-1")], "holds '-1'"),
        ([("a.jpg", b"x"), ("a.cls", b"0"), ("a.png", b"y")], "two samples have the key a"),
    ],
)
def test_a_sample_that_is_not_whole_is_named(tmp_path: Path, members: list[tuple[str, bytes]], problem: str) -> None:
    root = tar_set(tmp_path)
    write_tar(root / "test" / "0.tar", members)
    with pytest.raises(DataError, match=problem):
        opened(root)


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("classnames.txt", "red thing\n\nblue thing", "line 2 is empty"),
        ("zeroshot_classification_templates.txt", "a photo.\n{c}", "line 1 has no {c}"),
        ("zeroshot_classification_templates.txt", "a {c}\n{c}\0\0\0", "3 zero bytes, so a part of it is lost"),
        ("classnames.txt", "red thing\n\0\0\0\0\nblue thing", "4 zero bytes"),
        ("test/nshards.txt", "\0\0", "2 zero bytes"),
    ],
)
def test_a_text_file_with_a_wrong_line_is_named(tmp_path: Path, file: str, text: str, problem: str) -> None:
    root = tar_set(tmp_path)
    (root / file).write_text(text)
    with pytest.raises(DataError, match=problem):
        opened(root)


def test_a_corrupt_image_is_a_bad_sample_of_its_row_only(tmp_path: Path) -> None:
    members = samples(2)
    members[2] = (members[2][0], b"not an image")
    root = tar_set(tmp_path / "tars")
    write_tar(root / "test" / "0.tar", members)
    test = opened(root).split("test")
    assert len(test) == 6
    assert test.load(0).mode == "RGB"
    with pytest.raises(BadSample):
        test.load(1)
    assert test.name(1) == f"{root / 'test' / '0.tar'}: s0001"


def test_an_image_of_too_many_pixels_is_a_bad_sample(tmp_path: Path) -> None:
    small = open_set("colors", str(tar_set(tmp_path)), max_pixels=24 * 24 - 1)
    with pytest.raises(BadSample):
        small.split("test").load(0)


def test_other_files_in_a_class_folder_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folder_set(tmp_path)
    (root / "test" / "red_thing" / "notes.txt").write_text("")
    (root / "test" / "red_thing" / ".hidden").write_text("")
    with caplog.at_level(logging.WARNING, "clip_cid"):
        assert len(opened(root).split("test")) == 6
    assert "1 files are not .jpg, .png, .jpeg, .webp" in caplog.text


def test_the_fingerprint_changes_with_the_files_and_not_with_the_reader(tmp_path: Path) -> None:
    root = tar_set(tmp_path / "colors")
    first = opened(root).split("test").fingerprint
    assert opened(root).split("test").fingerprint == first
    os.utime(root / "test" / "0.tar", (1, 1))
    copy = shutil.copytree(root, tmp_path / "elsewhere" / "copy")
    assert opened(root).split("test").fingerprint == opened(copy).split("test").fingerprint == first
    write_tar(root / "test" / "0.tar", samples(3))
    assert opened(root).split("test").fingerprint != first


def test_the_fingerprint_reads_a_file_only_where_its_digest_is_not_known(tmp_path: Path) -> None:
    root, read = folder_set(tmp_path, splits=("test",)), list[Path]()

    def digest_of(path: Path) -> str:
        read.append(path)
        return path.name

    part = open_set("colors", str(root), max_pixels=10_000, digest_of=digest_of).split("test")
    assert read == []
    assert part.fingerprint == part.fingerprint
    assert read == [root / "test" / name / f"{copy}.jpg" for name in sorted(COLORS) for copy in range(2)]


def test_a_file_that_cannot_be_read_has_a_fingerprint_too(tmp_path: Path) -> None:
    root = folder_set(tmp_path)
    part, whole = (opened(root).split("test") for _ in range(2))
    assert whole.fingerprint
    (root / "test" / "red_thing" / "0.jpg").unlink()
    assert part.fingerprint != whole.fingerprint  # and the image is left out, with a word


def test_another_limit_on_pixels_is_another_fingerprint(tmp_path: Path) -> None:
    root = tar_set(tmp_path)
    strict = open_set("colors", str(root), max_pixels=9_999).split("test")
    assert opened(root).split("test").fingerprint != strict.fingerprint


def test_splits_can_be_sent_to_worker_processes(tmp_path: Path) -> None:
    for labelled in (opened(tar_set(tmp_path / "a")), opened(folder_set(tmp_path / "b")), opened(Path(DIGITS))):
        part = labelled.split("test")
        copy = pickle.loads(pickle.dumps(part))
        assert copy.load(1).tobytes() == part.load(1).tobytes()


def test_the_digits_are_split_once_and_for_all() -> None:
    digits = opened(Path(DIGITS), name="digits")
    train, test = digits.split("train"), digits.split("test")
    assert (len(train), len(test)) == (898, 899)
    assert np.abs(np.bincount(train.labels) - np.bincount(test.labels)).max() <= 1
    order = train.labels.tobytes() + test.labels.tobytes()  # a row drawn otherwise would change it
    assert hashlib.sha256(order).hexdigest()[:16] == "209a207983f3883c"
    assert digits.class_names == digits.class_keys == tuple("0123456789")
    assert (digits.known_key, digits.variant, digits.folds) == (None, "", None)
    assert digits.metric == "top1"
    assert len(digits.prompts(3)) == 3


def test_the_digits_show_what_they_are_called() -> None:
    """The mean image of a class is nearer to that class's training mean than to any other's."""
    digits = opened(Path(DIGITS))
    means = {}
    for split in ("train", "test"):
        part = digits.split(split)
        pixels = np.stack([np.asarray(part.load(row).convert("L").resize((8, 8)), float) for row in range(len(part))])
        means[split] = np.stack([pixels[part.labels == label].mean(axis=0).ravel() for label in range(10)])
    distances = np.linalg.norm(means["test"][:, None] - means["train"][None], axis=2)
    assert distances.argmin(axis=1).tolist() == list(range(10))


def test_an_unknown_built_in_set_is_refused() -> None:
    with pytest.raises(ConfigError, match="no built-in set 'builtin:digit'") as error:
        open_set("d", "builtin:digit", max_pixels=1000)
    assert DIGITS in error.value.fix
