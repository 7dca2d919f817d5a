"""Sets whose archive lists the images of each split, laid out as torchvision unpacks them; and Birdsnap."""

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from clip_cid import log
from clip_cid.data.sets.readers.contract import Request, SetFiles
from clip_cid.data.sets.readers.folders import imagenet_places, split_of_folders
from clip_cid.data.sets.readers.layout_parts import check_labels_are, damaged, home, known_classes, label_of, lines
from clip_cid.data.sets.readers.matlab import rows_of, whole_numbers_of
from clip_cid.errors import DataError

_Listing = Iterable[tuple[str, int]]
"""A file, as a path from the folder of the images, and its label."""


def read_flat_imagenet(request: Request) -> SetFiles | None:
    """ImageNet's validation images in one folder, as in their archive; the list is Kaggle's or the devkit's."""
    flat = ((place, val) for place in imagenet_places(request.root) for val in (place / "val", place))
    place, val = next(((place, val) for place, val in flat if _is_flat(val)), (None, None))
    if place is None or val is None:
        return None

    rows = _validation_classes(request.root, place)
    label = label_of(request.known)
    files, labels = [file for file, _ in rows], [label(wnid, str(request.root)) for _, wnid in rows]
    splits = {"test": request.files("test", val, files, labels)}
    if request.wants("train") and (place / "train").is_dir():
        classes = known_classes(request.known)
        splits["train"] = split_of_folders(request, "train", place / "train", classes)
    return SetFiles(known_classes(request.known), splits)


def _is_flat(folder: Path) -> bool:
    return next(folder.glob("ILSVRC2012_val_*.JPEG"), None) is not None


def _validation_classes(root: Path, place: Path) -> list[tuple[str, str]]:
    """File and WordNet id of every validation image."""
    for folder in (root, place, place.parent):
        solution = folder / "LOC_val_solution.csv"
        devkit = home(folder, "ILSVRC2012_devkit_t12", "data", has="ILSVRC2012_validation_ground_truth.txt")
        if solution.is_file():
            return _of_solution(solution)
        if devkit is not None:
            return _of_devkit(devkit)
    raise DataError(
        f"{root}: ImageNet's validation images lie in one folder, and no list says their classes.",
        fix=f"Put Kaggle's LOC_val_solution.csv or the folder ILSVRC2012_devkit_t12 into {root}, or move the images to"
        " val/WNID/.",
    )


def _of_solution(path: Path) -> list[tuple[str, str]]:
    """Kaggle's list: `ImageId,PredictionString`, and in the latter the WordNet id and a box for each object."""
    rows = [line.partition(",") for line in lines(path)[1:]]
    if short := [number for number, (_, _, boxes) in enumerate(rows, start=2) if not boxes.strip()]:
        raise damaged(path, f"line {short[0]} has no class")
    return [(f"{image}.JPEG", boxes.split()[0]) for image, _, boxes in rows]


def _of_devkit(folder: Path) -> list[tuple[str, str]]:
    """The authors' list: a class number a line, in the order of the images; meta.mat has the WordNet ids."""
    path, meta = folder / "ILSVRC2012_validation_ground_truth.txt", folder / "meta.mat"
    try:
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows_of(meta, "synsets")}
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise damaged(meta, f"has no number and WordNet id a row ({error})") from error
    numbers = lines(path)
    if wrong := [line for line in numbers if not line.isdecimal() or int(line) not in wnids]:
        raise damaged(path, f"{wrong[0]!r} is none of the {len(wnids):,} class numbers of meta.mat")
    return [(f"ILSVRC2012_val_{row:08d}.JPEG", wnids[int(line)]) for row, line in enumerate(numbers, start=1)]


def read_food101(request: Request) -> SetFiles | None:
    """food-101: meta/{train,test}.json list the images of every class."""
    folder = home(request.root, "food-101", has="meta/test.json")
    if folder is None:
        return None
    label = label_of(request.known)

    def listing(split: str) -> _Listing:
        path = folder / "meta" / f"{split}.json"
        try:
            listed: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
            pairs = [(f"{file}.jpg", name) for name, files in listed.items() for file in files]
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise damaged(path, f"is not a list of images by class ({error})") from error
        return [(file, label(name, str(path))) for file, name in pairs]

    return _listed(request, folder / "images", listing, ("train", "test"))


def read_stanford_cars(request: Request) -> SetFiles | None:
    """stanford_cars: MATLAB files number the classes from 1 in the order of cars_meta.mat."""
    folder = home(request.root, "stanford_cars", has="cars_test_annos_withlabels.mat")
    if folder is None:
        return None
    meta = folder / "devkit" / "cars_meta.mat"
    labels = check_labels_are(request.known, [str(name) for name in rows_of(meta, "class_names")], meta)
    lists = {"train": folder / "devkit" / "cars_train_annos.mat", "test": folder / "cars_test_annos_withlabels.mat"}

    def listing(split: str) -> _Listing:
        path = lists[split]
        try:
            rows = [(str(row["fname"]), int(row["class"])) for row in rows_of(path, "annotations")]
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise damaged(path, f"has no file and class a row ({error})") from error
        return [(f"cars_{split}/{file}", _numbered(number, labels, path)) for file, number in rows]

    return _listed(request, folder, listing, ("train", "test"))


def read_fgvc_aircraft(request: Request) -> SetFiles | None:
    """fgvc-aircraft-2013b/data: images_variant_*.txt of an image number and its variant a line."""
    folder = home(request.root, "fgvc-aircraft-2013b", "data", has="images_variant_test.txt")
    if folder is None:
        return None
    label = label_of(request.known)

    def listing(split: str) -> _Listing:
        path = folder / f"images_variant_{split}.txt"
        rows = [line.partition(" ") for line in lines(path)]
        return [(f"{image}.jpg", label(variant.strip(), str(path))) for image, _, variant in rows]

    return _listed(request, folder / "images", listing, ("train", "val", "test"))


def read_dtd(request: Request) -> SetFiles | None:
    """dtd/dtd: labels/*1.txt are partition 1 of ten."""
    folder = home(request.root, "dtd", "dtd", has="labels/test1.txt")
    if folder is None:
        return None
    label = label_of(request.known)

    def listing(split: str) -> _Listing:
        path = folder / "labels" / f"{split}1.txt"
        return [(line, label(line.rpartition("/")[0], str(path))) for line in lines(path)]

    return _listed(request, folder / "images", listing, ("train", "val", "test"))


def read_oxford_pets(request: Request) -> SetFiles | None:
    """oxford-iiit-pet: an image's name is its breed and a number; the breed is the label."""
    folder = home(request.root, "oxford-iiit-pet", has="annotations/test.txt")
    if folder is None:
        return None
    label = label_of(request.known)
    lists = {"train": folder / "annotations" / "trainval.txt", "test": folder / "annotations" / "test.txt"}

    def listing(split: str) -> _Listing:
        path = lists[split]
        images = [line.split()[0] for line in lines(path) if not line.startswith("#")]
        return [(f"{image}.jpg", label(image.rpartition("_")[0], str(path))) for image in images]

    return _listed(request, folder / "images", listing, ("train", "test"))


def read_flowers102(request: Request) -> SetFiles | None:
    """flowers-102: setid.mat lists image numbers, imagelabels.mat has the class of every image, both from 1."""
    folder = home(request.root, "flowers-102", has="setid.mat")
    if folder is None:
        return None
    names = {"train": "trnid", "val": "valid", "test": "tstid"}
    path = folder / "imagelabels.mat"
    classes = whole_numbers_of(path, "labels")
    labels = list(range(len(known_classes(request.known))))

    def listing(split: str) -> _Listing:
        images = whole_numbers_of(folder / "setid.mat", names[split])
        if images and not 1 <= min(images) <= max(images) <= len(classes):
            raise damaged(folder / "setid.mat", f"{names[split]} has images that imagelabels.mat has no class of")
        return [(f"image_{image:05d}.jpg", _numbered(classes[image - 1], labels, path)) for image in images]

    return _listed(request, folder / "jpg", listing, ("train", "val", "test"))


def read_sun397(request: Request) -> SetFiles | None:
    """SUN397: partition 1 where its lists are there, else every image is in the test split."""
    folder = home(request.root, "SUN397", has="ClassName.txt")
    if folder is None:
        return None
    label = label_of(request.known)
    check_labels_are(request.known, lines(folder / "ClassName.txt"), folder / "ClassName.txt")

    lists = next((path for path in (folder / "Partitions", folder) if (path / "Testing_01.txt").exists()), None)
    if lists is None:
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("sun_*.jpg"))
        labels = [label(file.rpartition("/")[0], str(folder)) for file in files]
        return SetFiles(known_classes(request.known), {"test": request.files("test", folder, files, labels)})

    names = {"train": lists / "Training_01.txt", "test": lists / "Testing_01.txt"}

    def listing(split: str) -> _Listing:
        rows = [line.lstrip("/") for line in lines(names[split])]
        return [(row, label(row.rpartition("/")[0], str(names[split]))) for row in rows]

    return _listed(request, folder, listing, ("train", "test"))


def read_birdsnap(request: Request) -> SetFiles | None:
    """Birdsnap: images.txt lists all photographs; those that could not be fetched are left out and counted."""
    folder = home(request.root, "birdsnap", has="test_images.txt")
    if folder is None or not (folder / "images.txt").exists():
        return None
    label = label_of(request.known)
    images = next((path for path in (folder / "images", folder / "download" / "images") if path.is_dir()), None)
    if images is None:
        raise DataError(
            f"{folder}: the lists of Birdsnap are there, but no images/.",
            fix="Run get_birdsnap.py of the archive; it fetches the photographs that are still online.",
        )

    test = set(lines(folder / "test_images.txt")[1:])
    listed = _birdsnap_images(folder / "images.txt")
    here = [file for file in listed if (images / file).is_file()]
    if len(here) < len(listed):
        log.warn(
            f"{request.name}: {len(listed) - len(here):,} of the {len(listed):,} images in images.txt are not in"
            f" {images} "
            f"and are left out ({len(test - set(here)):,} of the {len(test):,} test images)"
        )

    splits = {"train": [file for file in here if file not in test], "test": [file for file in here if file in test]}
    where = str(folder / "images.txt")

    def listing(split: str) -> _Listing:
        return [(file, label(file.rpartition("/")[0], where)) for file in splits[split]]

    return _listed(request, images, listing, ("train", "test"))


def _birdsnap_images(path: Path) -> list[str]:
    header, *rows = csv.reader(lines(path), delimiter="\t", quoting=csv.QUOTE_NONE)
    if "path" not in header:
        raise damaged(path, f"its first line names no column `path`, only {', '.join(header[:5])}")
    column = header.index("path")
    if short := [number for number, row in enumerate(rows, start=2) if len(row) <= column]:
        raise damaged(path, f"line {short[0]} has no path")
    return [row[column] for row in rows]


def _listed(request: Request, root: Path, listing: Callable[[str], _Listing], has: tuple[str, ...]) -> SetFiles:
    splits = {}
    for split in has:
        if request.wants(split):
            rows = list(listing(split))
            splits[split] = request.files(split, root, [file for file, _ in rows], [label for _, label in rows])
    return SetFiles(known_classes(request.known), splits)


def _numbered(number: int, labels: list[int], path: Path) -> int:
    """The label of a class numbered from 1."""
    if not 1 <= number <= len(labels):
        raise damaged(path, f"class {number}, but the classes are 1 to {len(labels)}")
    return labels[number - 1]
