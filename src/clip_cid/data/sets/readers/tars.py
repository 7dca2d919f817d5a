"""CLIP_benchmark's WebDataset folders: {train,val,test}/0.tar, 1.tar, ... of images and class numbers."""

from pathlib import Path
from typing import BinaryIO

import numpy as np

from clip_cid.data.pairs.images import EXTENSIONS
from clip_cid.data.pairs.plain_tar import plain_files
from clip_cid.data.sets.labelled_images import LabelledImages, Member, TarImages
from clip_cid.data.sets.readers.contract import Request, SetFiles
from clip_cid.data.sets.readers.layout_parts import lines
from clip_cid.errors import DataError

CLASSES, TEMPLATES, SHARDS = "classnames.txt", "zeroshot_classification_templates.txt", "nshards.txt"
TYPE = "dataset_type.txt"


def read_tars(request: Request) -> SetFiles | None:
    """Class names and templates lie beside the splits; labels count from 0 in the order of the class names."""
    root = request.root
    present = [split for split in request.splits if (root / split).is_dir()]
    if not any(_holds_tars(root / split) for split in present):
        return None
    _check_type(root)
    classes = lines(root / CLASSES)
    splits = {split: _split(request, root / split, split) for split in present}
    return SetFiles(classes, splits, templates=read_templates(root / TEMPLATES))


def _check_type(root: Path) -> None:
    """CLIP_benchmark's dataset_type.txt says what other tasks the tars are for; absent, it is classification."""
    kind = (root / TYPE).read_text(encoding="utf-8").strip().lower() if (root / TYPE).is_file() else "classification"
    if kind == "retrieval":
        raise DataError(
            f"{root}: {TYPE} says retrieval, so its tars hold images and captions, not labels.",
            fix=f"Name the tars under evaluate.retrieval: {root}/test/*.tar",
        )
    if kind != "classification":
        raise DataError(
            f"{root}: {TYPE} says {kind}, which is not measured here.",
            fix="Leave the set out; it needs one label an image.",
        )


def read_templates(path: Path) -> tuple[str, ...]:
    """The prompts of a set; none when the file is absent.

    Raises:
        DataError: A line has no `{c}`.
    """
    if not path.exists():
        return ()
    templates = lines(path)
    for number, template in enumerate(templates, start=1):
        if "{c}" not in template:
            raise DataError(
                f"{path}: line {number} has no {{c}} for the class name: {template!r}.",
                fix="Write {c} where it belongs.",
            )
    return templates


def _split(request: Request, folder: Path, split: str) -> LabelledImages:
    tars = _shards(folder)
    tar_of: list[int] = []
    members: list[Member] = []
    keys: list[str] = []
    labels: list[int] = []
    for number, tar in enumerate(tars):
        for key, image, label in _samples(tar):
            tar_of.append(number)
            members.append(image)
            keys.append(key)
            labels.append(label)

    images = TarImages(tars, np.array(tar_of, dtype=np.int32), tuple(members), tuple(keys), request.max_pixels)
    contents = request.contents(folder, [tar.name for tar in tars], decoded=True)
    return LabelledImages(request.title(split), np.array(labels, dtype=np.int64), contents, images)


def shard_count(folder: Path) -> int:
    """How many tars nshards.txt says a split has."""
    (text, *more) = lines(folder / SHARDS)
    if more or not text.isdecimal() or int(text) < 1:
        raise DataError(f"{folder / SHARDS}: {text!r} is not a number of tars.", fix="Write that number alone.")
    return int(text)


def _holds_tars(folder: Path) -> bool:
    return (folder / SHARDS).exists() or any(tar.stem.isdecimal() for tar in folder.glob("*.tar"))


def _shards(folder: Path) -> tuple[Path, ...]:
    """0.tar, 1.tar, ...: exactly as many as nshards.txt says."""
    count = shard_count(folder)
    expected = {f"{number}.tar" for number in range(count)}
    present = {path.name for path in folder.glob("*.tar")}
    if expected != present:
        wrong = [f"{tar} is missing" for tar in sorted(expected - present)] + [
            f"{tar} is extra" for tar in sorted(present - expected)
        ]
        raise DataError(
            f"{folder}: nshards.txt says {count}, but there are {len(present)} tars ({', '.join(wrong[:3])}).",
            fix="Copy the missing tars again, or correct nshards.txt.",
        )
    return tuple(folder / f"{number}.tar" for number in range(count))


def _samples(path: Path) -> list[tuple[str, Member, int]]:
    """Key, image member and label of every sample of one tar, in tar order."""
    images: dict[str, Member] = {}
    labels: dict[str, Member] = {}
    for member in plain_files(path, str(path)):
        folder, _, file = member.name.removeprefix("./").rpartition("/")
        stem, _, suffix = file.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        kind = images if suffix.lower() in EXTENSIONS else labels if suffix == "cls" else None
        if kind is None:
            continue  # side files, such as the .json of some exports
        if key in kind:
            raise DataError(f"{path}: two samples have the key {key}.", fix="Make the keys unique.")
        kind[key] = Member(member.offset_data, member.size)

    if images.keys() != labels.keys():
        odd = sorted(images.keys() ^ labels.keys())
        lacks = "a label (.cls)" if odd[0] in images else "an image (.jpg, .png, .webp, ...)"
        raise DataError(
            f"{path}: {len(odd)} of {len(images.keys() | labels.keys())} samples are not whole; {odd[0]} lacks"
            f" {lacks}.",
            fix="Export the set again.",
        )

    with open(path, "rb") as tar:
        return [(key, image, _label(tar, labels[key], path, key)) for key, image in images.items()]


def _label(tar: BinaryIO, member: Member, path: Path, key: str) -> int:
    tar.seek(member.offset)
    text = tar.read(member.size).decode("ascii", errors="replace").strip()
    if not text.isdecimal():
        raise DataError(f"{path}: {key}.cls holds {text[:20]!r}, not a class number.", fix="Export the set again.")
    return int(text)
