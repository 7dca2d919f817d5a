"""The words that a user's own classes are prompted by, and what is said where there are none."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny_sets import CLASSES, image, tar_set

from clip_cid.data.sets.evaluation_sets import EvaluationSet, open_set
from clip_cid.errors import DataError


def folders(root: Path, names: Sequence[str], *, splits: Sequence[str] = ("test",)) -> Path:
    """One image a class folder, with a prompt."""
    for split in splits:
        for number, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            (root / split / name / "0.jpg").write_bytes(image((10 * number, 0, 0)))
    (root / "templates.txt").write_text("a {c}")
    return root


def opened(root: Path, name: str = "mine") -> EvaluationSet:
    return open_set(name, str(root), max_pixels=10_000)


def named(root: Path, *lines: str) -> Path:
    (root / "classnames.txt").write_text("\n".join(lines))
    return root


def by_folder(found: EvaluationSet) -> dict[str, str]:
    return dict(zip(found.class_keys, found.class_names, strict=True))


# --- classnames.txt beside class folders ---


def test_class_names_beside_folders_name_the_sorted_folders_and_do_not_ask_for_tars(tmp_path: Path) -> None:
    root = named(folders(tmp_path, ["b1", "a7", "c0"], splits=("train", "test")), "cat", "dog", "cow")
    found = opened(root)
    assert by_folder(found) == {"a7": "cat", "b1": "dog", "c0": "cow"}
    assert found.prompts(0) == ["a cat"]
    assert set(found.splits) == {"train", "test"}
    assert found.variant == ""


@pytest.mark.parametrize("lines", [("cat", "dog"), ("cat", "dog", "cow", "hen")])
def test_a_list_of_another_length_than_the_folders_is_refused(lines: Sequence[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{len(lines)} class names, but there are 3 class folders") as error:
        opened(named(folders(tmp_path, ["0", "1", "2"]), *lines))
    assert "FOLDER<tab>NAME" in error.value.fix


@pytest.mark.parametrize("first", [0, 1])
def test_folders_that_count_up_go_by_their_number(first: int, tmp_path: Path) -> None:
    numbers = [str(first + number) for number in range(12)]
    found = opened(named(folders(tmp_path, numbers), *(f"name {number}" for number in numbers)))
    assert by_folder(found) == {number: f"name {number}" for number in numbers}


def test_numbered_folders_of_two_possible_orders_are_refused_and_can_be_named_one_by_one(tmp_path: Path) -> None:
    root = folders(tmp_path, ["class_2", "class_10", "class_30"])
    with pytest.raises(DataError, match="line 1 may name the folder class_10 or the folder class_2"):
        opened(named(root, "cat", "dog", "cow"))
    found = opened(named(root, "class_30\tcow", "class_2\tpolar bear", "class_10\tdog"))
    assert by_folder(found) == {"class_2": "polar bear", "class_10": "dog", "class_30": "cow"}


@pytest.mark.parametrize(
    "lines", [("a\tcat", "b\tdog", "b\tcow"), ("a\tcat", "b\tdog", "cow"), ("a\tcat", "b\tdog", "d\tcow")]
)
def test_a_list_by_folder_names_every_folder_once(lines: Sequence[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not both a class folder and a line that names it"):
        opened(named(folders(tmp_path, ["a", "b", "c"]), *lines))


def test_a_list_of_the_folders_themselves_in_another_order_names_each_folder_by_its_own_line(tmp_path: Path) -> None:
    found = opened(named(folders(tmp_path, ["polar_bear", "Ape", "cat"]), "Polar Bear", "cat", "ape"))
    assert by_folder(found) == {"polar_bear": "Polar Bear", "Ape": "ape", "cat": "cat"}


def test_a_list_that_gives_a_folder_the_name_of_another_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1 is 'cat', which is the folder cat, but it would name the folder ape"):
        opened(named(folders(tmp_path, ["ape", "cat", "dog"]), "cat", "monkey", "dog"))


def test_a_list_in_other_letters_and_with_a_mark_of_byte_order_is_read(tmp_path: Path) -> None:
    root = folders(tmp_path, ["a", "b", "c"])
    (root / "classnames.txt").write_text("猫\r\n犬\r\n牛\r\n", encoding="utf-8-sig")
    assert opened(root).class_names == ("猫", "犬", "牛")


def test_prompts_under_either_name_are_read_beside_folders(tmp_path: Path) -> None:
    root = named(folders(tmp_path, ["a", "b", "c"]), "cat", "dog", "cow")
    (root / "templates.txt").rename(root / "zeroshot_classification_templates.txt")
    assert opened(root).prompts(1) == ["a dog"]
    (root / "zeroshot_classification_templates.txt").unlink()
    with pytest.raises(DataError, match="has no prompts") as error:
        opened(root).prompts(1)
    assert str(root / "templates.txt") in error.value.fix


def test_numbered_folders_of_a_known_set_take_the_list_for_its_classes(tmp_path: Path) -> None:
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    root = named(folders(tmp_path, [str(number) for number in range(10)]), *classes)
    found = opened(root, "cifar10")
    assert found.known_key == "cifar10"
    assert list(found.class_names) == classes
    found.prompts(0)


# --- Names that are no words ---


@pytest.mark.parametrize(
    "names",
    [["0", "1", "2"], ["001", "002", "010"], ["class_0", "class_1", "class_2"], ["Label-3", "Label-4", "other"]],
)
def test_numbers_in_place_of_names_are_warned_of_and_said_of_every_result(
    names: Sequence[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "clip_cid"):
        found = opened(folders(tmp_path, names))
    assert "classes are named by numbers" in caplog.text
    assert f"Write the class names to {tmp_path / 'classnames.txt'}, one a line" in caplog.text
    assert "are named by numbers" in found.variant


def test_numbers_in_a_list_of_tars_are_warned_of_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "clip_cid"):
        opened(named(tar_set(tmp_path), "0", "1", "2"))
    assert "3 of 3 classes are named by numbers (0, 1, 2), which zero-shot prompts with" in caplog.text


@pytest.mark.parametrize("names", [CLASSES, ["737-800", "A320", "DC-10"], ["3 cats", "4 dogs", "5"]])
def test_words_with_numbers_in_them_are_words(
    names: Sequence[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "clip_cid"):
        assert opened(folders(tmp_path, names)).variant == ""
    assert caplog.text == ""


def test_wordnet_ids_are_prompted_by_their_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "clip_cid"):
        found = opened(folders(tmp_path, ["n02123045", "n01440764", "n00017222"]))
    # The first two are ImageNet's and named as CLIP prompts them; the third is in WordNet only.
    assert by_folder(found) == {"n00017222": "plant", "n01440764": "tench", "n02123045": "tabby cat"}
    assert found.prompts(1) == ["a tench"]
    assert "3 of 3 classes are named by their WordNet ids" in found.variant
    assert "n01440764 is tench" in caplog.text


@pytest.mark.parametrize("names", [["polka_dot", "polka dot", "plain"], ["n03773504", "n04008634", "n02123045"]])
def test_classes_of_one_name_are_warned_of(
    names: Sequence[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "clip_cid"):
        found = opened(folders(tmp_path, names))
    (shared,) = {text for text in found.class_names if found.class_names.count(text) > 1}
    assert f"classes share a name ({shared}), so zero-shot cannot tell them apart" in caplog.text
    assert f"classes share a name ({shared})" in found.variant


def test_a_wordnet_id_without_a_name_is_refused_for_zero_shot_only(tmp_path: Path) -> None:
    found = opened(folders(tmp_path, ["n99999999", "n01440764", "n02123045"]))
    with pytest.raises(DataError, match=r"1 of 3 classes are WordNet ids without a name here \(n99999999\)") as error:
        found.prompts(0)
    assert str(tmp_path / "classnames.txt") in error.value.fix
    named(tmp_path, "tench", "tabby", "nobody")
    assert opened(tmp_path).prompts(2) == ["a nobody"]
