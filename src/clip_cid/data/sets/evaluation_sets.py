"""The sets that models are measured on, read from any known layout and compared with the table of known sets.

A set is indexed and checked when it is opened, before any model runs; images are decoded later, one by one. Nothing is
unpacked to disk; only what a recipe names by URL is downloaded. `known_sets.toml` lists the sets that CLIP is measured
on; a set of any other name is the user's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from clip_cid import extras, log
from clip_cid.data.sets.class_names import words_of
from clip_cid.data.sets.known_sets import (
    KnownSet,
    MetricName,
    Prompts,
    few,
    find_known_set,
    load_prompts,
    match_keys,
    metric_of,
)
from clip_cid.data.sets.labelled_images import Contents, LabelledImages
from clip_cid.data.sets.near_layouts import near_layout
from clip_cid.data.sets.readers import ANY_SET, READERS, folders, tars
from clip_cid.data.sets.readers.class_list import HOW_TO_NAME
from clip_cid.data.sets.readers.contract import Request, SetFiles
from clip_cid.data.sets.readers.layout_parts import cropped
from clip_cid.data.sets.remote_sets import fetch_set, is_url
from clip_cid.errors import ConfigError, DataError
from clip_cid.file_digests import sha256_file
from clip_cid.remote.contract import AbsentError

SPLITS = ("train", "val", "test")
DIGITS = "builtin:digits"

_DIGIT_PROMPTS = ('a photo of the number: "{c}".', 'a low resolution photo of the digit "{c}".', "{c}")


class MissingSetError(DataError):
    """No files exist where the set should be; an evaluation of several sets leaves it out."""


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
    known_key: str | None = None
    """Its key in the table of known sets; None for a set of the user's own."""
    variant: str = ""
    """How it differs from what CLIP measured, in words; empty if it does not."""
    folds: tuple[Int[np.ndarray, " rows"], ...] | None = None
    """Rows of `train` that are trained on together: one probe each, and the score is their mean (STL10)."""
    superset_classes: Int[np.ndarray, " classes"] | None = None
    """For a set of some of ImageNet's classes: which of the 1,000 they are, one a class, in label order.
    ImageNet's accuracy on these compares with the set's. ObjectNet's 113 classes are 125 of ImageNet's, in
    ImageNet's order."""
    class_keys: tuple[str, ...] = ()
    """The set's own label of each class: a folder, a WordNet id, a number."""
    nameless: tuple[str, ...] = ()
    """Classes whose name is a WordNet id that is not known here: there is no word to prompt with."""

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
            DataError: The set has no templates; none is invented, since scores depend on them. Or a class has no name.
        """
        if self.nameless:
            raise DataError(
                f"{self.where}: {len(self.nameless)} of {len(self.class_names)} classes are WordNet ids without a name"
                f" here ({few(self.nameless)}), and zero-shot needs words.",
                fix=HOW_TO_NAME.format(Path(self.where) / tars.CLASSES),
            )
        if not self.templates:
            raise DataError(
                f"{self.where}: the set {self.name} has no prompts, which zero-shot needs.",
                fix=f"Write one template a line, such as `a photo of a {{c}}.`, to {self._template_file()}.",
            )
        return [template.replace("{c}", self.class_names[label]) for template in self.templates]

    def _template_file(self) -> Path:
        root = Path(self.where)
        is_of_tars = any((root / split / tars.SHARDS).exists() for split in SPLITS)
        return root / (tars.TEMPLATES if is_of_tars else folders.TEMPLATES)


def open_set(
    name: str,
    where: str,
    *,
    max_pixels: int,
    splits: Sequence[str] = SPLITS,
    cache_dir: Path | None = None,
    digest_of: Callable[[Path], str] = sha256_file,
) -> EvaluationSet:
    """Index and check a labelled set.

    Args:
        name: What the recipe calls it; a name of the table of known sets means that set (`find_known_set`).
        where: `builtin:digits`, a folder in one of the layouts of docs/evaluation_sets.md, or the address of one; on
            the web only of one with tars.
        max_pixels: An image that claims more pixels is refused when it is decoded.
        splits: Open these only, if they exist; `test` must.
        cache_dir: Where a set at an address is kept; ~/.cache/clip_cid when absent.
        digest_of: The SHA-256 of a file, of which the splits' fingerprints are made; perhaps remembered.

    Raises:
        MissingSetError: Nothing exists at `where`.
        DataError: The layout is not known, or the set contradicts itself or the table: classes,
            labels, shards, empty or cut files.
        ConfigError: No such built-in set.
    """
    wanted = tuple(split for split in SPLITS if split in splits)

    if where.startswith("builtin:"):
        opened = _open_digits(name, where)
    else:
        root = _folder(f"evaluate.sets.{name}", name, where, wanted, cache_dir)
        request = Request(name, root, find_known_set(name), wanted, max_pixels, digest_of)
        files = _read(request)
        known = request.known_set
        opened = _own_set(request, files) if known is None else _in_table(request, known, files)

    _check_classes(opened)
    return opened


def open_test_images(
    name: str, where: str, *, setting: str, max_pixels: int, cache_dir: Path | None = None
) -> LabelledImages:
    """The test images of a set, whatever its classes and prompts are.

    Args:
        name: As in `open_set`.
        where: As in `open_set`.
        setting: That names the set, for errors.
        max_pixels: As in `open_set`.
        cache_dir: As in `open_set`.

    Raises:
        MissingSetError: Nothing exists at `where`.
        DataError: The layout is not known, or there is no image.
        ConfigError: No such built-in set.
    """
    if where.startswith("builtin:"):
        return _open_digits(name, where).split("test")
    known, wanted = find_known_set(name), ("test",)
    root = _folder(f"{setting}.{name}", name, where, wanted, cache_dir)
    images = _read(Request(name, root, known, wanted, max_pixels, sha256_file)).splits["test"]
    if not len(images):
        raise DataError(f"{images.title}: the split has no image.", fix=f"Look at {where}.")
    return images if known is None else cropped(images, known.crop)


def _folder(what: str, name: str, where: str, splits: Sequence[str], cache_dir: Path | None) -> Path:
    """The folder of a set, perhaps of a copy of one at an address; `what` names it in errors."""
    known = find_known_set(name)
    try:
        root = fetch_set(where, splits, cache_dir) if is_url(where) else Path(where)
    except AbsentError as error:
        raise MissingSetError(f"{what}: {error.problem}", fix=error.fix) from error
    if root.is_file():
        raise DataError(f"{what}: {root} is a file; a set is a folder.", fix=_layouts(known, root.parent))
    if not root.is_dir():
        raise MissingSetError(f"{what}: nothing at {root}.", fix=_layouts(known, root))
    return root


def _layouts(known: KnownSet | None, root: Path) -> str:
    any_set = (
        f"{root}/{{train,test}}/0.tar with classnames.txt and nshards.txt (CLIP_benchmark's layout), "
        f"or {root}/{{train,test}}/CLASS/IMAGE.jpg"
    )
    if known is None:
        return f"Put the set there: {any_set}."
    return f"Put {known.title} there: {root}/{known.layout}; or {any_set}. Where to get it: {known.where}."


def _read(request: Request) -> SetFiles:
    own = () if request.known_set is None else tuple(READERS[name] for name in request.known_set.readers)
    for reader in (*own, *ANY_SET):
        files = reader(request)
        if files is not None and "test" in files.splits:
            return files
    near = near_layout(request.root)
    raise DataError(
        f"{request.root}: the set {request.name} has no test split in a layout that is known; {near.problem}.",
        fix=f"{near.fix} {_layouts(request.known_set, request.root)}".strip(),
    )


def _own_set(request: Request, files: SetFiles) -> EvaluationSet:
    words = words_of(request.name, files.names or files.classes, request.root / tars.CLASSES)
    return EvaluationSet(
        name=request.name,
        where=str(request.root),
        class_names=words.names,
        templates=files.templates,
        metric=metric_of(request.name),
        splits=files.splits,
        variant=words.note,
        class_keys=files.classes,
        nameless=words.nameless,
    )


def _in_table(request: Request, known: KnownSet, files: SetFiles) -> EvaluationSet:
    """A set of the table, with class names by the set's own labels; prompts beside the files win."""
    prompts = load_prompts(known.prompts)
    keys = match_keys(known, files.classes, str(request.root))

    notes = [*files.notes, _counted(request, known, files), *_folds_note(known, files)]
    if files.templates and files.templates != prompts.templates:
        notes.append(f"{len(files.templates)} prompts of its own, not CLIP's {len(prompts.templates)}")
    variant = "; ".join(note for note in notes if note)
    if variant:
        log.info(f"{request.name}: {variant}")

    return EvaluationSet(
        name=request.name,
        where=str(request.root),
        class_names=tuple(prompts.names[key] for key in keys),
        templates=files.templates or prompts.templates,
        metric=known.metric,
        splits={split: cropped(part, known.crop) for split, part in files.splits.items()},
        known_key=known.key,
        variant=variant,
        folds=files.folds,
        superset_classes=_superset(prompts, keys),
        class_keys=tuple(keys),
    )


def _superset(prompts: Prompts, keys: list[str]) -> Int[np.ndarray, " classes"] | None:
    if prompts.superset is None:
        return None
    if len(prompts.superset) != len(keys):
        return np.array(prompts.superset, dtype=np.int64)
    position = dict(zip(prompts.names, prompts.superset, strict=True))
    return np.array([position[key] for key in keys], dtype=np.int64)


def _counted(request: Request, known: KnownSet, files: SetFiles) -> str:
    """How the numbers of images differ from CLIP's; empty if equal. Validation images count as training images."""
    test = len(files.splits["test"])
    training = [len(files.splits[split]) for split in ("train", "val") if split in files.splits]
    train = sum(training) if "train" in files.splits else None
    expected = sum(known.counts.get(split, 0) for split in ("train", "val") if request.wants(split))
    if test == known.counts["test"] and train in (None, expected):
        return ""

    for variant in known.variants:
        if variant.train is None and train == test == variant.test:
            raise DataError(
                f"{request.root}: train and test both hold all {test:,} images: a probe would be tested on its"
                " training images.",
                fix=f"Leave the train split out for zero-shot alone, or lay {known.title} out as {known.layout}.",
            )
        if test == variant.test and (train is None or train == variant.train):
            return variant.words

    words = f"{test:,} test images, CLIP used {known.counts['test']:,}"
    if train is not None:
        words = f"{train:,} training and {test:,} test images, CLIP used {expected:,} and {known.counts['test']:,}"
    log.warn(f"{request.name}: {words}; scores do not compare with published ones. {_known_counts(known)}")
    return words


def _known_counts(known: KnownSet) -> str:
    counts = [f"{variant.test:,} test images ({variant.words})" for variant in known.variants if variant.words]
    return f"Also known: {'; '.join(counts)}." if counts else "No other counts are known."


def _folds_note(known: KnownSet, files: SetFiles) -> list[str]:
    if known.folds is None or files.folds is not None or "train" not in files.splits:
        return []
    return [f"one probe on all {len(files.splits['train']):,} training images, not the mean of {known.folds} folds"]


def _check_classes(opened: EvaluationSet) -> None:
    """Labels and class names agree, no split is empty, and every tested class has training images."""
    count = len(opened.class_names)
    if count < 2:
        raise DataError(f"{opened.where}: only {count} class.", fix="Classification needs at least 2.")

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
            fix="Labels count from 0 in the order of classnames.txt; correct the one that is wrong.",
        )


def _check_trained(opened: EvaluationSet, classes: dict[str, set[int]]) -> None:
    count, present = len(opened.class_names), set[int]().union(*classes.values())
    if absent := sorted(set(range(count)) - present):
        raise DataError(
            f"{opened.where}: {count} class names but images of {len(present)} classes; none of"
            f" {_few(opened, absent)}.",
            fix="Make classnames.txt and the labels agree: scores of a shifted list of names mean nothing.",
        )

    for name, own in classes.items():
        if untrained := sorted(own - classes["train"]):
            raise DataError(
                f"{opened.splits[name].title}: {len(untrained)} classes have {name} images but no training image "
                f"({_few(opened, untrained)}).",
                fix="Complete the train split, or leave it out: the set is then measured zero-shot only.",
            )


def _few(opened: EvaluationSet, labels: list[int]) -> str:
    """The first three class names, for a message."""
    return few([opened.class_names[label] for label in labels])


# --- scikit-learn's digits ---


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

    The split is drawn once, stratified, with scikit-learn's seed 0, and never changes. The prompts
    are the ones CLIP used for MNIST and two more.
    """
    if where != DIGITS:
        raise ConfigError(f"evaluate.sets.{name}: no built-in set {where!r}.", fix=f"There is {DIGITS}.")
    extras.require(DIGITS, extras.EVALUATE)
    from sklearn.datasets import load_digits
    from sklearn.model_selection import StratifiedShuffleSplit

    grey, target = load_digits(return_X_y=True)  # 0 to 16
    pixels = np.round(grey.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = target.astype(np.int64)

    train, test = next(StratifiedShuffleSplit(1, test_size=0.5, random_state=0).split(labels, labels))
    splits = {
        split: LabelledImages(
            f"{name}/{split}",
            labels[rows],
            Contents(Path(), (), reading=f"{DIGITS}-{split}-1"),
            _DigitImages(pixels[rows], split),
        )
        for split, rows in (("train", train), ("test", test))
    }
    classes = tuple("0123456789")
    return EvaluationSet(name, where, classes, _DIGIT_PROMPTS, metric_of(name), splits, class_keys=classes)
