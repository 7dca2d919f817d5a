"""Small steps that the readers of on-disk layouts share."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from clip_cid.data.pairs.images import EXTENSIONS
from clip_cid.data.sets.known_sets import KnownSet, few, load_prompts, spelled
from clip_cid.data.sets.labelled_images import CroppedImages, LabelledImages
from clip_cid.errors import DataError

AGAIN = "Unpack or copy the set again."


def home(root: Path, *folders: str, has: str) -> Path | None:
    """The folder that holds `has`: `root`, or a folder in it to which a library unpacks (or its last part)."""
    for skip in range(len(folders) + 1):
        folder = root.joinpath(*folders[skip:])
        if (folder / has).exists():
            return folder
    return None


def lines(path: Path) -> tuple[str, ...]:
    """The lines of a text file, none of which may be empty.

    Raises:
        DataError: It cannot be read, is no text, or a line is empty.
    """
    try:
        texts = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}).", fix="This layout needs the file.") from error

    if zeros := sum(text.count("\0") for text in texts):
        raise damaged(path, f"{zeros} zero bytes, so a part of it is lost")
    empty = [number for number, line in enumerate(texts, start=1) if not line.strip()]
    if empty or not texts:
        problem = f"line {empty[0]} is empty" if empty else "the file is empty"
        raise DataError(f"{path}: {problem}.", fix="One entry a line.")
    return tuple(line.strip() for line in texts)


def label_of(known: KnownSet) -> Callable[[str, str], int]:
    """A function from a class in the set's own spelling, and from where it is written, to its label."""
    labels = {spelled(key): number for number, key in enumerate(load_prompts(known.prompts).names)}

    def label(key: str, where: str) -> int:
        number = labels.get(spelled(key))
        if number is None:
            raise DataError(
                f"{where}: class {key!r} is none of the {len(labels)} of {known.title}.",
                fix=f"{AGAIN} A set of your own needs a name that is not {known.title}'s.",
            )
        return number

    return label


def class_folders(folder: Path) -> list[str]:
    """The folders in a folder, sorted; none is an error."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise DataError(f"{folder}: no class folder in it.", fix="Every class has a folder of images.")
    return names


def has_class_folders(folder: Path) -> bool:
    return any(path.is_dir() and not path.name.startswith(".") for path in folder.iterdir())


def images_in(folder: Path, name: str) -> tuple[list[str], list[str]]:
    """The images of one class folder, sorted, as paths from `folder`; and the other files."""
    files: list[str] = []
    others: list[str] = []
    for path in sorted((folder / name).iterdir()):
        if path.name.startswith("."):
            continue
        known = path.suffix.lower().removeprefix(".") in EXTENSIONS
        (files if known else others).append(f"{name}/{path.name}")
    return files, others


def draw(files: Sequence[str], *, train: int, test: int | None) -> tuple[list[int], list[int]]:
    """The rows of a class's files to train and to test on: the first by the SHA-256 of `CLASS/FILE`, the same anywhere.

    Raises:
        DataError: There are too few.
    """
    needed = train + (1 if test is None else test)
    if len(files) < needed:
        raise DataError(
            f"{files[0].rpartition('/')[0] if files else 'a class'}: {len(files):,} images, but the split needs "
            f"{needed:,} ({train:,} to train on).",
            fix=f"{AGAIN} A part of a set can be laid out as train/CLASS and test/CLASS folders.",
        )

    order = sorted(range(len(files)), key=lambda row: hashlib.sha256(files[row].encode()).digest())
    chosen, rest = sorted(order[:train]), order[train:]
    return chosen, sorted(rest if test is None else rest[:test])


def cropped(part: LabelledImages, border: int) -> LabelledImages:
    """The split without its images' borders."""
    if not border:
        return part
    contents = replace(part.contents, reading=f"{part.contents.reading}, {border} pixels of border cut off")
    return replace(part, contents=contents, images=CroppedImages(part.images, border))


def known_classes(known: KnownSet) -> tuple[str, ...]:
    """The set's own labels, in label order."""
    return tuple(load_prompts(known.prompts).names)


def damaged(path: Path, problem: str) -> DataError:
    return DataError(f"{path}: {problem}.", fix=AGAIN)


def check_labels_are(known: KnownSet, classes: Sequence[str], where: Path) -> list[int]:
    """The label behind each number of a file's own list of classes, which must be the known set's, each once."""
    label = label_of(known)
    labels = [label(key, str(where)) for key in classes]
    if missing := sorted(set(range(len(known_classes(known)))) - set(labels)):
        names = [known_classes(known)[number] for number in missing]
        raise damaged(where, f"{len(missing)} of {known.title}'s classes are missing ({few(names)})")
    return labels
