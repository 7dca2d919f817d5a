"""The 14 + 5 sets in the layouts they are published in: each image reaches the class its folder, list or record says."""

import contextlib
import json
import logging
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets as theirs
from PIL import Image
from scipy.io import savemat
from set_layouts import (
    LAYOUTS,
    as_bytes,
    birdsnap,
    cifar_batches,
    cifar_binary,
    cifar_planes,
    cifar_python,
    class_shown,
    dtd,
    eurosat,
    flowers102,
    imagenet_v2,
    keys_of,
    objectnet,
    oxford_pets,
    python2_pickle,
    stanford_cars,
    stl10,
    sun397,
    wnid_folders,
)
from tiny_sets import write_tar

from clip_cid.data.pairs.pair import BadSample
from clip_cid.data.sets.evaluation_sets import EvaluationSet, MissingSetError, open_set
from clip_cid.data.sets.known_sets import known_sets, load_prompts, spelled
from clip_cid.data.sets.readers.layout_parts import draw
from clip_cid.data.sets.readers.matlab import whole_numbers_of
from clip_cid.errors import DataError

IMAGENET_SETS = ("imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", "objectnet")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a layout, written once."""
    roots: dict[str, Path] = {}

    def folder(layout: str) -> Path:
        if layout not in roots:
            roots[layout] = tmp_path_factory.mktemp(layout)
            LAYOUTS[layout][1](roots[layout])
        return roots[layout]

    return folder


def opened(name: str, root: Path, **options: Any) -> EvaluationSet:
    return open_set(name, str(root), max_pixels=1_000_000, **options)


def classes_shown(found: EvaluationSet, split: str) -> list[tuple[int, str]]:
    """For every image the class its pixels are of, and the label it was given."""
    part = found.split(split)
    return [(class_shown(part.load(row)), found.class_keys[part.labels[row]]) for row in range(len(part))]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_image_gets_the_label_and_the_name_of_the_class_it_shows(layout: str, written: Any) -> None:
    task = LAYOUTS[layout][0]
    found = opened(task, written(layout))
    keys, names = keys_of(task), load_prompts(known_sets()[task].prompts).names
    assert (found.known_key, found.metric) == (task, known_sets()[task].metric)
    assert sorted(found.class_keys) == sorted(keys)
    for key, name in zip(found.class_keys, found.class_names, strict=True):
        assert name == names[key]
    splits = {"test"} if task in IMAGENET_SETS else {"train", "test"}
    assert set(found.splits) - {"val"} == splits
    assert ("val" in found.splits) == ("val" in known_sets()[task].counts)
    for split in found.splits:
        part = found.split(split)
        for row in range(0, len(part), max(1, len(part) // 400)):
            assert keys[class_shown(part.load(row))] == found.class_keys[part.labels[row]]
        assert len(set(part.labels.tolist())) == len(keys)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_in_every_layout_can_be_sent_to_worker_processes_and_have_a_steady_fingerprint(
    layout: str, written: Any
) -> None:
    task = LAYOUTS[layout][0]
    part = opened(task, written(layout), splits=("test",)).split("test")
    copy = pickle.loads(pickle.dumps(part))
    assert copy.load(1).tobytes() == part.load(1).tobytes()
    assert copy.name(1) == part.name(1)
    assert opened(task, written(layout), splits=("test",)).split("test").fingerprint == part.fingerprint


# --- The same folders as torchvision reads them --------------------------------------------------------------------------


# without the sums of the published files, which a miniature cannot have
_Cifar10 = type(
    "Cifar10",
    (theirs.CIFAR10,),
    {
        "train_list": [[f"data_batch_{number}", None] for number in range(1, 6)],
        "test_list": [["test_batch", None]],
        "meta": {"filename": "batches.meta", "key": "label_names", "md5": None},
    },
)
_Cifar100 = type(
    "Cifar100",
    (theirs.CIFAR100,),
    {
        "train_list": [["train", None]],
        "test_list": [["test", None]],
        "meta": {"filename": "meta", "key": "fine_label_names", "md5": None},
    },
)
_Stl10 = type(
    "Stl10",
    (theirs.STL10,),
    {
        "train_list": [["train_X.bin", None], ["train_y.bin", None], ["unlabeled_X.bin", None]],
        "test_list": [["test_X.bin", None], ["test_y.bin", None]],
    },
)
_Flowers = type(
    "Flowers",
    (theirs.Flowers102,),
    {"_file_dict": {"label": ("imagelabels.mat", None), "setid": ("setid.mat", None)}},
)


def _torchvision(layout: str, root: Path, split: str) -> Any:
    readers = {
        "food101": lambda: theirs.Food101(root, split=split),
        "cifar10-python": lambda: _Cifar10(root, train=split == "train"),
        "cifar100-python": lambda: _Cifar100(root, train=split == "train"),
        "stanford_cars": lambda: theirs.StanfordCars(root, split=split),
        "fgvc_aircraft": lambda: theirs.FGVCAircraft(root, split=split),
        "dtd": lambda: theirs.DTD(root, split=split),
        "oxford_pets": lambda: theirs.OxfordIIITPet(root, split="trainval" if split == "train" else "test"),
        "flowers102": lambda: _Flowers(root, split=split),
        "stl10": lambda: _Stl10(root, split=split),
        "imagenet": lambda: theirs.ImageFolder(root / ("train" if split == "train" else "val")),
    }
    return readers[layout]()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*numpy.core:DeprecationWarning", "ignore:.*dtype:Warning", "ignore:.*align")
@pytest.mark.parametrize(
    "layout",
    [
        *("food101", "cifar10-python", "cifar100-python", "stanford_cars", "fgvc_aircraft", "dtd", "oxford_pets"),
        *("flowers102", "stl10", "imagenet"),
    ],
)
def test_torchvision_reads_the_same_classes_from_the_same_folders(layout: str, written: Any) -> None:
    root, task = written(layout), LAYOUTS[layout][0]
    found = opened(task, root)
    for split in found.splits:
        other = _torchvision(layout, root, split)
        named = [str(number) for number in range(1, 103)] if task == "flowers102" else other.classes
        expected = Counter((class_shown(image), spelled(named[label])) for image, label in other)
        assert Counter((shown, spelled(key)) for shown, key in classes_shown(found, split)) == expected


def test_a_row_of_an_array_set_is_the_same_pixels_as_torchvisions(written: Any) -> None:
    root = written("stl10")
    ours, other = opened("stl10", root).split("train"), _Stl10(root, split="train")
    assert ours.load(0).tobytes() == other[0][0].tobytes()
    assert np.asarray(ours.load(0))[1, 0, 0] == 77  # down the column, not along the row


@pytest.mark.slow
def test_sun397_and_caltech_hold_what_torchvision_finds_without_a_split(written: Any) -> None:
    for layout, other in (("sun397", theirs.SUN397), ("caltech101", theirs.Caltech101)):
        found = opened(layout, written(layout))
        both = classes_shown(found, "train") + classes_shown(found, "test")
        listed: Any = other(written(layout))
        named = listed.classes if layout == "sun397" else listed.categories
        expected: set[tuple[int, str]] = set()
        for row in range(0, len(listed), 7):
            image, label = listed[row]
            with image:  # which torchvision leaves open
                expected.add((class_shown(image), spelled(named[label])))
        ours = {(shown, spelled(key[2:] if layout == "sun397" else key)) for shown, key in both}
        assert expected <= ours
        extra = 32 if layout == "caltech101" else 0  # the background, which torchvision leaves out and CLIP does not
        assert len(both) == len(listed) + extra


# --- Splits --------------------------------------------------------------------------------------------------------------


def test_caltech101_is_30_images_a_class_and_the_rest_and_says_who_drew_them(written: Any) -> None:
    found = opened("caltech101", written("caltech101"))
    assert np.bincount(found.split("train").labels).tolist() == [30] * 102
    assert np.bincount(found.split("test").labels).tolist() == [2] * 102
    assert "30 training images a class drawn here" in found.variant
    names = {split: {found.split(split).name(row) for row in range(len(found.split(split)))} for split in found.splits}
    assert not names["train"] & names["test"]


@pytest.mark.slow
def test_eurosat_is_1000_and_500_images_a_class_and_has_clips_counts(tmp_path: Path) -> None:
    eurosat(tmp_path)
    found = opened("eurosat", tmp_path)
    assert np.bincount(found.split("train").labels).tolist() == [1000] * 10
    assert np.bincount(found.split("test").labels).tolist() == [500] * 10
    assert found.variant == "1,000 + 500 images a class drawn here, CLIP's own draw is not published"
    (tmp_path / "eurosat" / "2750" / "River" / "River_1.jpg").unlink()
    (tmp_path / "eurosat" / "2750" / "River" / "River_2.jpg").unlink()
    with pytest.raises(DataError, match=r"River: 1,499 images, but the split needs 1,500 \(1,000 to train on\)"):
        opened("eurosat", tmp_path)


def test_a_draw_depends_on_names_alone_and_loses_no_image() -> None:
    files = [f"cat/{number}.jpg" for number in range(50)]
    train, test = draw(files, train=20, test=None)
    again, _ = draw(files[::-1], train=20, test=None)
    assert {files[row] for row in train} == {files[::-1][row] for row in again}
    assert sorted(train + test) == list(range(50))
    fewer, _ = draw(files[:49], train=20, test=None)  # an image that is lost changes one row at most
    assert len({files[row] for row in train} - {files[row] for row in fewer}) <= 1
    assert train[:4] == [0, 1, 3, 8]  # by sha256sum and sort of a shell; another draw would be another protocol


def test_sun397_without_its_partition_is_all_test_and_says_so(tmp_path: Path) -> None:
    sun397(tmp_path, partition=False)
    found = opened("sun397", tmp_path)
    assert set(found.splits) == {"test"}
    assert found.variant == "794 test images, CLIP used 19,850"


def test_stl10_has_its_official_folds_or_says_that_it_has_none(tmp_path: Path) -> None:
    stl10(tmp_path / "a")
    stl10(tmp_path / "b", folds=False)
    with_folds, without = opened("stl10", tmp_path / "a"), opened("stl10", tmp_path / "b")
    assert with_folds.folds is not None
    assert [fold.tolist() for fold in with_folds.folds[:2]] == [list(range(10)), list(range(1, 11))]
    assert len(with_folds.folds) == 10
    assert "folds" not in with_folds.variant
    assert without.folds is None
    assert "one probe on all 20 training images, not the mean of 10 folds" in without.variant
    assert opened("stl10", tmp_path / "b", splits=("test",)).folds is None


def test_a_fold_of_rows_that_do_not_exist_is_refused(tmp_path: Path) -> None:
    stl10(tmp_path)
    (tmp_path / "stl10_binary" / "fold_indices.txt").write_text("0 1 20\n" * 10)
    with pytest.raises(DataError, match="fold 0 has rows outside 0 to 19"):
        opened("stl10", tmp_path)


def test_birdsnap_goes_on_without_the_photographs_that_are_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = keys_of("birdsnap")[3]
    lost = [f"{key}/301.jpg", f"{keys_of('birdsnap')[4]}/400.jpg"]
    birdsnap(tmp_path, lost=lost[:1])
    with caplog.at_level(logging.WARNING, "clip_cid"):
        found = opened("birdsnap", tmp_path)
    assert "1 of the 1,000 images in images.txt are not in" in caplog.text
    assert "(1 of the 500 test images)" in caplog.text
    assert (len(found.split("train")), len(found.split("test"))) == (500, 499)
    assert found.variant == "500 training and 499 test images, CLIP used 42,283 and 2,149"


def test_birdsnap_without_images_names_the_script(tmp_path: Path) -> None:
    birdsnap(tmp_path)
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(DataError, match="no images/") as error:
        opened("birdsnap", tmp_path)
    assert "get_birdsnap.py" in error.value.fix


# --- ImageNet's relatives -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_imagenet_v2_folders_are_numbers_and_not_places_in_the_sorted_list(written: Any) -> None:
    found = opened("imagenetv2", written("imagenet_v2"))
    rows = [row for row in range(1000) if "/10/" in found.split("test").name(row)]
    assert [found.class_keys[found.split("test").labels[row]] for row in rows] == [keys_of("imagenet")[10]]
    in_sorted_order = theirs.ImageFolder(written("imagenet_v2") / "imagenetv2-matched-frequency-format-val")
    assert in_sorted_order.class_to_idx["10"] == 2  # what a plain folder reader would make of it


@pytest.mark.slow
def test_another_selection_of_imagenet_v2_is_named(tmp_path: Path) -> None:
    imagenet_v2(tmp_path, "imagenetv2-top-images-format-val")
    assert (
        "imagenetv2-top-images-format-val, not the matched-frequency images" in opened("imagenet-v2", tmp_path).variant
    )


@pytest.mark.slow
def test_imagenet_v2_with_a_folder_gone_is_refused(tmp_path: Path) -> None:
    imagenet_v2(tmp_path)
    shutil.rmtree(tmp_path / "imagenetv2-matched-frequency-format-val" / "500")
    with pytest.raises(DataError, match="999 folders; they should be 0 to 999, and 500 is not or is missing"):
        opened("imagenetv2", tmp_path)


@pytest.mark.slow
def test_a_subset_of_imagenet_says_which_of_the_thousand_classes_it_has(written: Any) -> None:
    whole = keys_of("imagenet")
    for name in ("imagenet_a", "imagenet_r"):
        found = opened(name, written(name))
        assert found.superset_classes is not None
        assert [whole[number] for number in found.superset_classes] == list(found.class_keys)
        assert len(found.class_keys) == 200
    assert opened("imagenet_v2", written("imagenet_v2")).superset_classes is None
    behind = opened("objectnet", written("objectnet")).superset_classes
    assert behind is not None
    assert len(set(behind.tolist())) == 125


def test_objectnet_loses_its_border_and_the_objects_imagenet_does_not_have(written: Any, tmp_path: Path) -> None:
    found = opened("objectnet", written("objectnet"))
    assert len(found.class_names) == 113
    image = found.split("test").load(0)
    assert image.size == (8, 6)
    assert np.asarray(image).std(axis=(0, 1)).max() == 0  # no red left
    objectnet(tmp_path)
    (tmp_path / "objectnet-1.0" / "images" / "spaceship").mkdir()
    with pytest.raises(DataError, match=r"1 are not its own \(spaceship\)"):
        opened("objectnet", tmp_path)
    Image.new("RGB", (4, 9)).save(tmp_path / "objectnet-1.0" / "images" / "banana" / "a.png")
    (tmp_path / "objectnet-1.0" / "images" / "spaceship").rmdir()
    part = opened("objectnet", tmp_path).split("test")
    (row,) = [row for row in range(len(part)) if "banana" in part.name(row)]
    with pytest.raises(BadSample, match="nothing but its border"):
        part.load(row)


# --- CLIP_benchmark's tars and class folders of a known set ---------------------------------------------------------------


def tars(root: Path, names: list[str], templates: list[str] | None = None, *, each: int = 1) -> Path:
    """Images of class `label`, number `label` in `names`."""
    for split in ("train", "test"):
        members: list[tuple[str, bytes]] = []
        for number in range(each * len(names)):
            label = number % len(names)
            image = as_bytes(Image.new("RGB", (8, 8), (25 * (label % 10), 25 * (label // 10), 0)))
            members += [(f"s{number:04d}.png", image), (f"s{number:04d}.cls", str(label).encode())]
        write_tar(root / split / "0.tar", members)
        (root / split / "nshards.txt").write_text("1")
    (root / "classnames.txt").write_text("\n".join(names))
    if templates is not None:
        (root / "zeroshot_classification_templates.txt").write_text("\n".join(templates))
    return root


def test_class_names_of_a_known_set_go_by_label_and_not_by_position(tmp_path: Path) -> None:
    """The trap of openai/CLIP#346: a list in another order than the labels'."""
    prompts = load_prompts("oxford_pets")
    cats_first = sorted(prompts.names.values())  # case-sensitive, as the list was published
    found = opened("wds/vtab/pets", tars(tmp_path, cats_first))
    assert [spelled(name) for name in found.class_names] == [spelled(name) for name in cats_first]
    assert found.class_keys[cats_first.index("american bulldog")] == "american_bulldog"
    assert found.prompts(0) == ["a photo of a Abyssinian, a type of pet."]
    assert found.templates == prompts.templates
    assert found.metric == "mean_per_class"


def test_titles_labels_and_folders_are_spellings_of_the_same_class(tmp_path: Path) -> None:
    keys = keys_of("dtd")
    for number, spelling in enumerate((str.title, str.upper, lambda key: key.replace("-", "_"))):
        found = opened("dtd", tars(tmp_path / str(number), [spelling(key) for key in reversed(keys)]))
        assert list(found.class_keys) == keys[::-1]


def test_class_folders_of_a_known_set_take_its_names_and_prompts(tmp_path: Path) -> None:
    for split in ("train", "test"):
        wnid_folders(tmp_path / split, "imagenet_a")
    for readme in tmp_path.glob("*/README.txt"):
        readme.unlink()
    found = opened("imagenet-a", tmp_path)
    assert found.class_names[0] == load_prompts("imagenet").names[found.class_keys[0]]
    assert len(found.templates) == 80


def test_prompts_that_lie_with_a_known_set_are_used_and_named(tmp_path: Path) -> None:
    found = opened("cifar10", tars(tmp_path, keys_of("cifar10"), ["a {c}"]))
    assert found.prompts(1) == ["a automobile"]
    assert "1 prompts of its own, not CLIP's 18" in found.variant


def test_a_list_of_other_classes_under_a_known_name_is_refused(tmp_path: Path) -> None:
    names = [*keys_of("cifar10")[:-1], "bicycle"]
    with pytest.raises(DataError, match=r"1 are not its own \(bicycle\); 1 of its own are missing \(truck\)") as error:
        opened("cifar10", tars(tmp_path, names))
    assert "a name that is not CIFAR10's" in error.value.fix
    assert opened("my_cifar", tmp_path).known_key is None


def test_a_class_named_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"11 classes, but CIFAR10 has 10; one is named twice"):
        opened("cifar10", tars(tmp_path, [*keys_of("cifar10"), "Truck"]))


def test_a_set_behind_a_url_is_fetched_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    there, cache = tars(tmp_path / "there", keys_of("cifar10")), tmp_path / "cache"
    url = f"file://{there}"
    with caplog.at_level(logging.WARNING, "clip_cid"):
        found = open_set("cifar10", url, max_pixels=1000, cache_dir=cache)
    assert set(found.splits) == {"train", "test"}
    assert [class_shown(found.split("test").load(row)) for row in range(10)] == list(range(10))
    assert "val/nshards.txt" in caplog.text
    shutil.rmtree(there)
    again = open_set("cifar10", url, max_pixels=1000, cache_dir=cache)
    assert again.split("test").fingerprint == found.split("test").fingerprint


def test_the_page_of_a_repository_stands_for_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def ask(address: str) -> None:
        asked.append(address)
        raise DataError("no network", fix="")

    monkeypatch.setattr("clip_cid.remote.files.ask", ask)
    with pytest.raises(DataError, match="no network"):
        open_set("cifar10", "https://hub/datasets/a/wds_x/tree/main", max_pixels=1, cache_dir=tmp_path)
    assert asked == ["https://hub/datasets/a/wds_x/resolve/main/classnames.txt"]


def test_a_url_that_does_not_answer_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"classnames\.txt: cannot be fetched"):
        open_set("cifar10", f"file://{tmp_path}/gone", max_pixels=1000, cache_dir=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


# --- Counts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_miniature_is_never_taken_for_the_set_itself(layout: str, written: Any) -> None:
    task = LAYOUTS[layout][0]
    if task != "eurosat":  # whose miniature has as many images as CLIP used
        assert "CLIP used" in opened(task, written(layout)).variant


def _sized(task: str, monkeypatch: pytest.MonkeyPatch, **counts: Any) -> None:
    table = dict(known_sets())
    table[task] = table[task].model_copy(update=counts)
    monkeypatch.setattr("clip_cid.data.sets.evaluation_sets.find_known_set", lambda _name: table[task])


def test_clips_own_counts_are_the_protocol_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dtd(tmp_path)
    _sized("dtd", monkeypatch, counts={"train": 47, "val": 47, "test": 47})
    with caplog.at_level(logging.WARNING, "clip_cid"):
        assert opened("dtd", tmp_path).variant == ""
        assert opened("dtd", tmp_path, splits=("test",)).variant == ""
    assert not caplog.text


def test_training_and_validation_images_count_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CLIP_benchmark's copies have one train split of both; to train without the second half is another protocol."""
    tars(tmp_path, keys_of("dtd"))
    short = known_sets()["dtd"].variants[0].model_copy(update={"train": 47, "test": 47})
    _sized("dtd", monkeypatch, counts={"train": 24, "val": 23, "test": 47})
    assert opened("dtd", tmp_path).variant == ""
    _sized("dtd", monkeypatch, counts={"train": 47, "val": 47, "test": 47}, variants=(short,))
    assert opened("dtd", tmp_path).variant == "trained without the 1,880 validation images"


@pytest.mark.slow
def test_a_known_variant_is_named_and_not_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sun397(tmp_path, partition=False)
    known = known_sets()["sun397"].variants[0].model_copy(update={"test": 794})
    _sized("sun397", monkeypatch, variants=(known,))
    with caplog.at_level(logging.WARNING, "clip_cid"):
        assert opened("sun397", tmp_path).variant == "all 108,754 images, not partition 1"
    assert not caplog.text


def test_a_copy_whose_training_images_are_its_test_images_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a reader that ignores `split` leaves behind."""
    tars(tmp_path, keys_of("cifar10"), each=2)
    variant = known_sets()["sun397"].variants[0].model_copy(update={"test": 20, "words": "all 20 images"})
    _sized("cifar10", monkeypatch, variants=(variant,))
    with pytest.raises(DataError, match="train and test both hold all 20 images"):
        opened("cifar10", tmp_path)
    assert opened("cifar10", tmp_path, splits=("test",)).variant == "all 20 images"


def test_unknown_counts_are_warned_of_with_the_known_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sun397(tmp_path, partition=False)
    with caplog.at_level(logging.WARNING, "clip_cid"):
        opened("sun397", tmp_path)
    assert "794 test images, CLIP used 19,850; scores do not compare" in caplog.text
    assert "108,754 test images (all 108,754 images, not partition 1)" in caplog.text


# --- Bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", known_sets())
def test_a_missing_set_and_an_unknown_layout_say_what_to_put_where(task: str, tmp_path: Path) -> None:
    row = known_sets()[task]
    with pytest.raises(MissingSetError, match="nothing at") as error:
        opened(task, tmp_path / "gone")
    assert f"{tmp_path / 'gone'}/{row.layout}" in error.value.fix
    assert row.where in error.value.fix
    (tmp_path / "something").mkdir()
    with pytest.raises(DataError, match="no test split in a layout that is known") as other:
        opened(task, tmp_path)
    assert row.layout in other.value.fix


def test_a_file_of_a_list_that_is_not_there_is_named(tmp_path: Path) -> None:
    dtd(tmp_path)
    (tmp_path / "dtd" / "dtd" / "images" / "banded" / "banded_0002.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 47 files are missing, the first banded/banded_0002\.jpg"):
        opened("dtd", tmp_path)


def test_a_class_no_list_has_is_named(tmp_path: Path) -> None:
    oxford_pets(tmp_path)
    path = tmp_path / "oxford-iiit-pet" / "annotations" / "test.txt"
    path.write_text(path.read_text() + "unicorn_7 38 1 1\n")
    with pytest.raises(DataError, match=r"test\.txt: class 'unicorn' is none of the 37 of Oxford-IIIT Pets"):
        opened("pets", tmp_path)


def test_a_class_number_out_of_range_is_named(tmp_path: Path) -> None:
    flowers102(tmp_path)
    path = tmp_path / "flowers-102" / "imagelabels.mat"
    savemat(path, {"labels": np.full((1, 408), 103, dtype=np.uint8)})
    with pytest.raises(DataError, match="class 103, but the classes are 1 to 102"):
        opened("flowers102", tmp_path)
    savemat(path, {"labels": np.ones((1, 10), dtype=np.uint8)})
    with pytest.raises(DataError, match=r"images that imagelabels\.mat has no class of"):
        opened("flowers102", tmp_path)
    path.write_bytes(b"MATLAB 5.0 MAT-file, cut")
    with pytest.raises(DataError, match="has no readable variable `labels`"):
        opened("flowers102", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["flowers102", "stanford_cars"])
def test_a_damaged_matlab_file_is_an_error_and_no_crash(task: str, tmp_path: Path) -> None:
    """SciPy's reader ends the whole process on some of these."""
    {"flowers102": flowers102, "stanford_cars": stanford_cars}[task](tmp_path)
    random = np.random.default_rng(0)
    for path in sorted(tmp_path.rglob("*.mat")):
        whole = path.read_bytes()
        for place in random.integers(128, 600, size=2).tolist():
            path.write_bytes(whole[:place] + bytes(120) + whole[place + 120 :])
            with contextlib.suppress(DataError):  # or the damage is in what is not read
                opened(task, tmp_path)
        path.write_bytes(whole)
    opened(task, tmp_path)


@pytest.mark.parametrize("value", [np.array([1.5, 2.0]), np.array([np.nan, 1.0]), np.array(["a", "b"], dtype=object)])
def test_what_is_no_whole_number_in_a_matlab_file_is_named(value: np.ndarray, tmp_path: Path) -> None:
    savemat(tmp_path / "setid.mat", {"trnid": value})
    with pytest.raises(DataError, match="not a whole number"):
        whole_numbers_of(tmp_path / "setid.mat", "trnid")


def test_a_list_of_classes_that_lacks_one_is_named(tmp_path: Path) -> None:
    stanford_cars(tmp_path)
    meta = tmp_path / "stanford_cars" / "devkit" / "cars_meta.mat"
    savemat(meta, {"class_names": np.array(keys_of("stanford_cars")[:-1], dtype=object).reshape(1, -1)})
    with pytest.raises(DataError, match=r"1 of Stanford Cars's classes are missing \(smart fortwo"):
        opened("cars", tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"apple_pie": 3}'])
def test_a_list_that_is_no_list_is_named(tmp_path: Path, content: str, written: Any) -> None:
    shutil.copytree(written("food101"), tmp_path, dirs_exist_ok=True)
    path = tmp_path / "food-101" / "meta" / "test.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"test\.json: is not a list of images by class"):
        opened("food101", tmp_path)


def test_a_corrupt_image_in_a_list_is_a_bad_sample_of_its_row(tmp_path: Path) -> None:
    dtd(tmp_path)
    path = tmp_path / "dtd" / "dtd" / "images" / "banded" / "banded_0002.jpg"
    path.unlink()  # a link
    path.write_bytes(b"no image")
    part = opened("dtd", tmp_path).split("test")
    (row,) = [row for row in range(47) if part.name(row) == str(path)]
    with pytest.raises(BadSample):
        part.load(row)


def test_binary_files_cut_short_are_refused(tmp_path: Path) -> None:
    stl10(tmp_path)
    cifar_binary(tmp_path, "cifar10")
    for path, name in (
        (tmp_path / "stl10_binary" / "test_X.bin", "stl10"),
        (tmp_path / "cifar-10-batches-bin" / "test_batch.bin", "cifar10"),
    ):
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(DataError, match=path.name):
            opened(name, tmp_path)


def test_a_record_of_a_class_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    cifar_binary(tmp_path, "cifar10")
    path = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    path.write_bytes(b"\x0b" + path.read_bytes()[1:])
    with pytest.raises(DataError, match="class number 11, but the classes are 0 to 9"):
        opened("cifar10", tmp_path)


# --- Pickles ---------------------------------------------------------------------------------------------------------------

_FLAG = "a pickle ran code"


class _Hostile:
    """Would write a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self._path, _FLAG))


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_would_run_something_is_refused_and_does_not_run(tmp_path: Path, protocol: int) -> None:
    cifar_python(tmp_path, "cifar10")
    flag = tmp_path / "flag"
    labels = cifar_batches("cifar10")["test_batch"]
    entries = {"data": cifar_planes(labels), "labels": labels, "more": _Hostile(flag)}
    for file in ("test_batch", "batches.meta"):
        path = tmp_path / "cifar-10-batches-py" / file
        whole = path.read_bytes()
        path.write_bytes(pickle.dumps(entries, protocol=protocol))
        with pytest.raises(DataError, match=rf"{file}: refused, .*it would run"):
            opened("cifar10", tmp_path)
        path.write_bytes(whole)
    assert not flag.exists()
    pickle.loads(pickle.dumps(_Hostile(flag), protocol=protocol))
    assert flag.read_text() == _FLAG  # the pickle is one that would


@pytest.mark.parametrize(
    "attack",
    [
        b"cos\nsystem\n(Vtrue\ntR.",
        b"cbuiltins\neval\n(V1\ntR.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
        b"cnumpy\nload\n(Vx\ntR.",
        b"cnumpy.core.multiarray\nfromfile\n(Vx\ntR.",
        b"cnumpy\nndarray\n(dVx\nI1\nsb.",
        b"\x80\x02}U\x04dataR.",
        b"",
    ],
)
def test_other_pickles_are_refused(tmp_path: Path, attack: bytes) -> None:
    cifar_python(tmp_path, "cifar10")
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(attack)
    with pytest.raises(DataError, match=r"test_batch: "):
        opened("cifar10", tmp_path)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_copy_that_python_3_pickled_is_read_too(tmp_path: Path, protocol: int) -> None:
    cifar_python(tmp_path, "cifar10")
    path, before = tmp_path / "cifar-10-batches-py" / "test_batch", opened("cifar10", tmp_path).split("test")
    labels = cifar_batches("cifar10")["test_batch"]
    path.write_bytes(pickle.dumps({"data": cifar_planes(labels), "labels": labels}, protocol=protocol))
    after = opened("cifar10", tmp_path).split("test")
    assert [after.load(row).tobytes() for row in range(10)] == [before.load(row).tobytes() for row in range(10)]


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ({"labels": [1]}, "is not 1 images of 3,072 bytes"),
        ({"labels": [1, 2], "data": cifar_planes([1])}, "is not 2 images of 3,072 bytes"),
        ({"data": cifar_planes([1])}, "no list of numbers `labels`"),
        ({"labels": ["x"], "data": cifar_planes([1])}, "no list of numbers `labels`"),
        ({"labels": [10], "data": cifar_planes([1])}, "class number 10, but the classes are 0 to 9"),
    ],
)
def test_a_batch_that_does_not_hold_together_is_refused(tmp_path: Path, entries: dict[str, Any], problem: str) -> None:
    cifar_python(tmp_path, "cifar10")
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(python2_pickle(entries))
    with pytest.raises(DataError, match=problem):
        opened("cifar10", tmp_path)


def test_the_two_forms_of_cifar_hold_the_same_images(written: Any) -> None:
    for task in ("cifar10", "cifar100"):
        python, binary = (opened(task, written(f"{task}-{form}")) for form in ("python", "binary"))
        for split in ("train", "test"):
            assert python.split(split).labels.tolist() == binary.split(split).labels.tolist()
            rows = range(len(python.split(split)))
            assert [python.split(split).load(row).tobytes() for row in rows] == [
                binary.split(split).load(row).tobytes() for row in rows
            ]


def test_the_json_of_food101_is_what_decides_the_class(written: Any) -> None:
    listed = json.loads((written("food101") / "food-101" / "meta" / "test.json").read_text())
    found = opened("food101", written("food101"))
    rows = {found.split("test").name(row): found.split("test").labels[row] for row in range(101)}
    for key, files in listed.items():
        for file in files:
            path = written("food101") / "food-101" / "images" / f"{file}.jpg"
            assert found.class_keys[rows[str(path)]] == key
