"""Labelled image sets: CLIP_benchmark's WebDataset folders, plain image folders, and scikit-learn's digits.

A set is indexed and checked when it is opened, before any model runs; images are decoded later, one by one. Nothing is
downloaded and nothing is unpacked to disk.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from clip_cid import log
from clip_cid.data.images import decode_image
from clip_cid.data.pairs import BadSample
from clip_cid.data.tar_index import plain_files
from clip_cid.errors import ConfigError, DataError

MetricName = Literal["top1", "mean_per_class"]

SPLITS = ("train", "val", "test")
DIGITS = "builtin:digits"

_IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
# The sets CLIP scores by the mean of the classes' accuracies, in the spellings in use; every other set is scored by top-1.
_MEAN_PER_CLASS = {
    *("aircraft", "fgvcaircraft"),
    *("pets", "oxfordpets", "oxfordiiitpet", "oxfordiiitpets"),
    *("caltech101",),
    *("flowers", "flowers102", "oxfordflowers", "oxfordflowers102"),
}
_DIGIT_PROMPTS = ('a photo of the number: "{c}".', 'a low resolution photo of the digit "{c}".', "{c}")


class MissingSetError(DataError):
    """The set is not there at all; an evaluation of several sets goes on without it."""


@runtime_checkable
class _Images(Protocol):
    """Where the images of one split come from."""

    def name(self, row: int) -> str: ...

    def load(self, row: int) -> Image.Image: ...


@dataclass(frozen=True)
class LabelledImages:
    """One split of a set: image `row` belongs to class `labels[row]`. Pickles, so that worker processes can decode."""

    title: str
    """Set and split, such as `cifar10/test`."""
    labels: Int[np.ndarray, " images"]
    fingerprint: str
    """Changes when the files behind the split change (names, sizes, times)."""
    images: _Images

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, row: int) -> str:
        """What to call an image in a message: its file, or its tar and key."""
        return self.images.name(row)

    def load(self, row: int) -> Image.Image:
        """The decoded RGB image.

        Raises:
            BadSample: It cannot be decoded.
        """
        return self.images.load(row)


@dataclass(frozen=True)
class EvaluationSet:
    """A labelled set with its class names, its prompts and the metric its scores are given in."""

    name: str
    where: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    """Prompts with `{c}` for the class name; empty when the set came without any."""
    metric: MetricName
    splits: dict[str, LabelledImages]

    def split(self, name: str) -> LabelledImages:
        """The images of `train`, `val` or `test`.

        Raises:
            DataError: The set has no such split.
        """
        if name not in self.splits:
            raise DataError(
                f"{self.where}: the set {self.name} has no {name} split, only {', '.join(self.splits)}.",
                fix=f"Add the folder {Path(self.where) / name}, or leave out what needs it.",
            )
        return self.splits[name]

    def prompts(self, label: int) -> list[str]:
        """Every template filled with the name of class `label`.

        Raises:
            DataError: The set came without templates; none is made up, since scores depend on them.
        """
        if not self.templates:
            raise DataError(
                f"{self.where}: the set {self.name} has no prompts, which zero-shot needs.",
                fix=f"Write one template a line, such as `a photo of a {{c}}.`, to {self._template_file()}.",
            )
        return [template.replace("{c}", self.class_names[label]) for template in self.templates]

    def _template_file(self) -> Path:
        root = Path(self.where)
        return root / (_TAR_TEMPLATES if (root / _TAR_CLASSES).exists() else _FOLDER_TEMPLATES)


_TAR_CLASSES, _TAR_TEMPLATES, _FOLDER_TEMPLATES = (
    "classnames.txt",
    "zeroshot_classification_templates.txt",
    "templates.txt",
)


def open_set(name: str, where: str, *, max_pixels: int, splits: Sequence[str] = SPLITS) -> EvaluationSet:
    """Index and check a labelled set.

    Args:
        name: What the recipe calls it; decides the metric (`metric_of`).
        where: `builtin:digits`, or a folder in one of the two layouts.
        max_pixels: An image that claims more pixels is refused when it is decoded.
        splits: Open these only, where they exist; `test` must.

    Raises:
        MissingSetError: There is nothing at `where`.
        DataError: The set contradicts itself: class counts, labels, shards, empty or cut files.
        ConfigError: No such built-in set.
    """
    if where.startswith("builtin:"):
        opened = _open_digits(name, where)
    else:
        root = Path(where)
        if not root.is_dir():
            raise MissingSetError(f"evaluate.sets.{name}: nothing at {root}.", fix=_layouts(root))
        present = [split for split in SPLITS if split in splits and (root / split).is_dir()]
        if "test" not in present:
            raise DataError(f"{root}: the set {name} has no test split.", fix=_layouts(root))
        is_tars = (root / _TAR_CLASSES).exists() or any((root / split / "nshards.txt").exists() for split in present)
        opened = (_open_tars if is_tars else _open_folders)(name, root, present, max_pixels)
    _check_classes(opened)
    return opened


def metric_of(name: str) -> MetricName:
    """The metric CLIP gives a set's score in: mean per class for Aircraft, Pets, Caltech101 and Flowers102, else top-1."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    for prefix in ("wds", "vtab"):
        plain = plain.removeprefix(prefix)
    return "mean_per_class" if plain in _MEAN_PER_CLASS else "top1"


def _layouts(root: Path) -> str:
    return (
        f"Put the set there: {root}/{{train,test}}/0.tar with classnames.txt and nshards.txt (CLIP_benchmark's layout), "
        f"or {root}/{{train,test}}/CLASS/IMAGE.jpg."
    )


def _check_classes(opened: EvaluationSet) -> None:
    """Labels and class names say the same, no split is empty, and nothing is tested that is not trained."""
    count = len(opened.class_names)
    if count < 2:
        raise DataError(f"{opened.where}: only {count} class.", fix="There is nothing to tell apart with fewer than 2.")
    for part in opened.splits.values():
        _check_labels(part, count, opened.where)
    classes = {name: set(part.labels.tolist()) for name, part in opened.splits.items()}
    if "train" in classes:
        _check_trained(opened, classes)
    untested = sorted(set(range(count)) - classes["test"])
    if untested:
        log.warn(
            f"{opened.name}: {len(untested)} of {count} classes have no test image ({_few(opened, untested)}); "
            f"means per class are over the other {count - len(untested)}."
        )


def _check_labels(part: LabelledImages, count: int, where: str) -> None:
    if len(part) == 0:
        raise DataError(f"{part.title}: the split has no image.", fix=f"Look at {where}.")
    outside = np.flatnonzero((part.labels < 0) | (part.labels >= count))
    if len(outside):
        row = int(outside[0])
        raise DataError(
            f"{part.name(row)}: label {part.labels[row]}, but {where} names {count} classes (0 to {count - 1}); "
            f"{len(outside):,} of {len(part):,} labels are outside.",
            fix="Labels count from 0 in the order of classnames.txt; mend whichever is wrong.",
        )


def _check_trained(opened: EvaluationSet, classes: dict[str, set[int]]) -> None:
    count, seen = len(opened.class_names), set[int]().union(*classes.values())
    if unseen := sorted(set(range(count)) - seen):
        raise DataError(
            f"{opened.where}: {count} class names but images of {len(seen)} classes; none of {_few(opened, unseen)}.",
            fix="Make classnames.txt and the labels agree: scores of a shifted list of names mean nothing.",
        )
    for name, found in classes.items():
        if untrained := sorted(found - classes["train"]):
            raise DataError(
                f"{opened.splits[name].title}: {len(untrained)} classes have {name} images but no training image "
                f"({_few(opened, untrained)}).",
                fix="Complete the train split, or leave it out: the set is then measured zero-shot only.",
            )


def _few(opened: EvaluationSet, labels: list[int]) -> str:
    """The first three class names, for a message."""
    return ", ".join(opened.class_names[label] for label in labels[:3]) + (", ..." if len(labels) > 3 else "")


# --- CLIP_benchmark's WebDataset folders -------------------------------------------------------------------------------


class _Member(NamedTuple):
    offset: int
    size: int


@dataclass(frozen=True)
class _TarImages:
    """Images inside tars, each read with one seek."""

    tars: tuple[Path, ...]
    tar_of: Int[np.ndarray, " images"]
    members: tuple[_Member, ...]
    keys: tuple[str, ...]
    max_pixels: int

    def name(self, row: int) -> str:
        return f"{self.tars[self.tar_of[row]]}: {self.keys[row]}"

    def load(self, row: int) -> Image.Image:
        with open(self.tars[self.tar_of[row]], "rb") as tar:
            tar.seek(self.members[row].offset)
            data = tar.read(self.members[row].size)
        return decode_image(data, max_pixels=self.max_pixels)


def _open_tars(name: str, root: Path, present: Sequence[str], max_pixels: int) -> EvaluationSet:
    classes = _lines(root / _TAR_CLASSES)
    templates = _templates(root / _TAR_TEMPLATES)
    splits = {split: _tar_split(f"{name}/{split}", root / split, max_pixels) for split in present}
    return EvaluationSet(name, str(root), classes, templates, metric_of(name), splits)


def _tar_split(title: str, folder: Path, max_pixels: int) -> LabelledImages:
    tars = _shards(folder)
    tar_of: list[int] = []
    members: list[_Member] = []
    keys: list[str] = []
    labels: list[int] = []
    for number, tar in enumerate(tars):
        for key, image, label in _tar_samples(tar):
            tar_of.append(number)
            members.append(image)
            keys.append(key)
            labels.append(label)
    images = _TarImages(tars, np.array(tar_of, dtype=np.int32), tuple(members), tuple(keys), max_pixels)
    return LabelledImages(title, np.array(labels, dtype=np.int64), _fingerprint(folder, tars), images)


def _shards(folder: Path) -> tuple[Path, ...]:
    """0.tar, 1.tar, ...: exactly as many as nshards.txt says."""
    (text, *more) = _lines(folder / "nshards.txt")
    if more or not text.isdecimal() or int(text) < 1:
        raise DataError(f"{folder / 'nshards.txt'}: {text!r} is not a number of tars.", fix="Write that number alone.")
    expected = {f"{number}.tar" for number in range(int(text))}
    found = {path.name for path in folder.glob("*.tar")}
    if expected != found:
        wrong = [f"{tar} is missing" for tar in sorted(expected - found)] + [
            f"{tar} is extra" for tar in sorted(found - expected)
        ]
        raise DataError(
            f"{folder}: nshards.txt says {text}, but there are {len(found)} tars ({', '.join(wrong[:3])}).",
            fix="Copy the missing tars again, or correct nshards.txt.",
        )
    return tuple(folder / f"{number}.tar" for number in range(int(text)))


def _tar_samples(path: Path) -> list[tuple[str, _Member, int]]:
    """Key, image member and label of every sample of one tar, in tar order."""
    images: dict[str, _Member] = {}
    labels: dict[str, _Member] = {}
    for member in plain_files(path, str(path)):
        folder, _, file = member.name.removeprefix("./").rpartition("/")
        stem, _, suffix = file.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        kind = images if suffix.lower() in _IMAGE_TYPES else labels if suffix == "cls" else None
        if kind is None:
            continue  # side files, such as the .json of some exports
        if key in kind:
            raise DataError(f"{path}: two samples have the key {key}.", fix="Make the keys unique.")
        kind[key] = _Member(member.offset_data, member.size)
    if images.keys() != labels.keys():
        odd = sorted(images.keys() ^ labels.keys())
        lacks = "a label (.cls)" if odd[0] in images else "an image (.jpg, .png or .webp)"
        raise DataError(
            f"{path}: {len(odd)} of {len(images.keys() | labels.keys())} samples are not whole; {odd[0]} lacks {lacks}.",
            fix="Export the set again.",
        )
    with open(path, "rb") as tar:
        return [(key, image, _read_label(tar, labels[key], path, key)) for key, image in images.items()]


def _read_label(tar: BinaryIO, member: _Member, path: Path, key: str) -> int:
    tar.seek(member.offset)
    text = tar.read(member.size).decode("ascii", errors="replace").strip()
    if not text.isdecimal():
        raise DataError(f"{path}: {key}.cls holds {text[:20]!r}, not a class number.", fix="Export the set again.")
    return int(text)


def _lines(path: Path) -> tuple[str, ...]:
    """The lines of a text file, each of which means something."""
    try:
        lines = path.read_text(encoding="utf-8").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}).", fix="CLIP_benchmark's layout needs this file.") from error
    empty = [number for number, line in enumerate(lines, start=1) if not line.strip()]
    if empty or not lines:
        problem = f"line {empty[0]} is empty" if empty else "the file is empty"
        raise DataError(f"{path}: {problem}.", fix="One entry a line.")
    return tuple(line.strip() for line in lines)


def _templates(path: Path) -> tuple[str, ...]:
    """The prompts of a set; none when the file is absent."""
    if not path.exists():
        return ()
    templates = _lines(path)
    for number, template in enumerate(templates, start=1):
        if "{c}" not in template:
            raise DataError(
                f"{path}: line {number} has no {{c}} for the class name: {template!r}.",
                fix="Write {c} where it belongs.",
            )
    return templates


def _fingerprint(folder: Path, files: Sequence[Path]) -> str:
    stats = [(str(file.relative_to(folder)), (status := file.stat()).st_size, status.st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


# --- Plain image folders -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _FileImages:
    files: tuple[Path, ...]
    max_pixels: int

    def name(self, row: int) -> str:
        return str(self.files[row])

    def load(self, row: int) -> Image.Image:
        try:
            data = self.files[row].read_bytes()
        except OSError as error:
            raise BadSample(f"cannot be read ({error.strerror})") from error
        return decode_image(data, max_pixels=self.max_pixels)


def _open_folders(name: str, root: Path, present: Sequence[str], max_pixels: int) -> EvaluationSet:
    """Classes are the folders, sorted; a folder `polka_dot` is the class `polka dot`."""
    folders = {split: _class_folders(root / split) for split in present}
    for split, found in folders.items():
        if differ := sorted(set(found) ^ set(folders["test"])):
            raise DataError(
                f"{root}: {split} has {len(found)} class folders and test has {len(folders['test'])}; "
                f"{differ[0]} is in one only.",
                fix="Both need the same class folders.",
            )
    splits = {split: _folder_split(f"{name}/{split}", root / split, folders["test"], max_pixels) for split in present}
    classes = tuple(folder.replace("_", " ") for folder in folders["test"])
    return EvaluationSet(name, str(root), classes, _templates(root / _FOLDER_TEMPLATES), metric_of(name), splits)


def _class_folders(folder: Path) -> list[str]:
    found = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise DataError(f"{folder}: no class folder in it.", fix=_layouts(folder.parent))
    return found


def _folder_split(title: str, folder: Path, classes: Sequence[str], max_pixels: int) -> LabelledImages:
    files: list[Path] = []
    labels: list[int] = []
    others: list[Path] = []
    for label, name in enumerate(classes):
        for path in sorted((folder / name).iterdir()):
            if path.suffix.lower().removeprefix(".") in _IMAGE_TYPES:
                files.append(path)
                labels.append(label)
            elif not path.name.startswith("."):
                others.append(path)
    if others:
        log.warn(f"{title}: {len(others):,} files are not .jpg, .png or .webp and are left out, the first {others[0]}")
    images = _FileImages(tuple(files), max_pixels)
    return LabelledImages(title, np.array(labels, dtype=np.int64), _fingerprint(folder, files), images)


# --- scikit-learn's digits ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _DigitImages:
    pixels: UInt8[np.ndarray, "images 8 8"]
    split: str

    def name(self, row: int) -> str:
        return f"{DIGITS} {self.split} image {row}"

    def load(self, row: int) -> Image.Image:
        return Image.fromarray(self.pixels[row]).resize((64, 64), Image.Resampling.BICUBIC).convert("RGB")


def _open_digits(name: str, where: str) -> EvaluationSet:
    """1,797 handwritten digits of 8 x 8 grey pixels, shown at 64 x 64: 898 to train on, 899 to test on.

    The split is drawn once, stratified, with scikit-learn's seed 0, and never changes. The prompts are the ones CLIP used
    for MNIST and two more.
    """
    if where != DIGITS:
        raise ConfigError(f"evaluate.sets.{name}: no built-in set {where!r}.", fix=f"There is {DIGITS}.")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import StratifiedShuffleSplit

    grey, target = load_digits(return_X_y=True)  # 0 to 16
    pixels = np.round(grey.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = target.astype(np.int64)
    train, test = next(StratifiedShuffleSplit(1, test_size=0.5, random_state=0).split(labels, labels))
    splits = {
        split: LabelledImages(f"{name}/{split}", labels[rows], f"{DIGITS}-{split}-1", _DigitImages(pixels[rows], split))
        for split, rows in (("train", train), ("test", test))
    }
    return EvaluationSet(name, where, tuple("0123456789"), _DIGIT_PROMPTS, metric_of(name), splits)
