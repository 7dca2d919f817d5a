"""What a reader of one on-disk layout is asked and what it finds, and the small steps the readers share."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int

from clip_cid.data.sets.known_sets import Task, few, load_prompts, spelled
from clip_cid.data.sets.labelled_images import IMAGE_TYPES, CroppedImages, LabelledImages, file_split
from clip_cid.errors import DataError

AGAIN = "Unpack or copy the set again."


@dataclass(frozen=True)
class Asked:
    """The set to read."""

    name: str
    root: Path
    task: Task | None
    splits: tuple[str, ...]
    """Which of train, val and test; those that the layout does not have are left out of what is found."""
    max_pixels: int

    @property
    def known(self) -> Task:
        """The task, for readers that only a task names."""
        assert self.task is not None
        return self.task

    def wants(self, split: str) -> bool:
        return split in self.splits

    def title(self, split: str) -> str:
        return f"{self.name}/{split}"

    def files(self, split: str, root: Path, files: Sequence[str], labels: Sequence[int]) -> LabelledImages:
        return file_split(self.title(split), root, files, labels, max_pixels=self.max_pixels)


@dataclass(frozen=True)
class Found:
    """What a reader made of the files."""

    classes: tuple[str, ...]
    """As the files call them, in the order of the labels."""
    splits: dict[str, LabelledImages]
    names: tuple[str, ...] = ()
    """What to call the classes of a set of one's own, where that is not what the files say."""
    templates: tuple[str, ...] = ()
    """Prompts that lie with the set."""
    notes: tuple[str, ...] = ()
    """How this differs from CLIP's protocol."""
    folds: tuple[Int[np.ndarray, " rows"], ...] | None = None


Reader = Callable[[Asked], Found | None]
"""Reads a set, or says None: this is another layout."""


def home(root: Path, *folders: str, has: str) -> Path | None:
    """The folder that holds `has`: below `root` by the names a library unpacks it under, or `root` or a part of the way."""
    for skip in range(len(folders) + 1):
        found = root.joinpath(*folders[skip:])
        if (found / has).exists():
            return found
    return None


def lines(path: Path) -> tuple[str, ...]:
    """The lines of a text file, each of which means something.

    Raises:
        DataError: It cannot be read, or a line is empty.
    """
    try:
        found = path.read_text(encoding="utf-8").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}).", fix="This layout needs the file.") from error
    empty = [number for number, line in enumerate(found, start=1) if not line.strip()]
    if empty or not found:
        problem = f"line {empty[0]} is empty" if empty else "the file is empty"
        raise DataError(f"{path}: {problem}.", fix="One entry a line.")
    return tuple(line.strip() for line in found)


def label_of(task: Task) -> Callable[[str, str], int]:
    """A function of a class in the set's own spelling and of where it is written, that gives its label."""
    labels = {spelled(key): number for number, key in enumerate(load_prompts(task.prompts).names)}

    def label(key: str, where: str) -> int:
        found = labels.get(spelled(key))
        if found is None:
            raise DataError(
                f"{where}: class {key!r} is none of the {len(labels)} of {task.title}.",
                fix=f"{AGAIN} A set of your own needs a name that is not {task.title}'s.",
            )
        return found

    return label


def class_folders(folder: Path) -> list[str]:
    """The folders in a folder, sorted; none is an error."""
    found = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise DataError(f"{folder}: no class folder in it.", fix="Every class has a folder of images.")
    return found


def images_in(folder: Path, name: str) -> tuple[list[str], list[str]]:
    """The images of one class folder, sorted, as paths from `folder`; and the files that are none."""
    files: list[str] = []
    others: list[str] = []
    for path in sorted((folder / name).iterdir()):
        if path.name.startswith("."):
            continue
        known = path.suffix.lower().removeprefix(".") in IMAGE_TYPES
        (files if known else others).append(f"{name}/{path.name}")
    return files, others


def draw(files: Sequence[str], *, train: int, test: int | None) -> tuple[list[int], list[int]]:
    """Which of a class's files are to train and to test on: the first by the SHA-256 of `CLASS/FILE`, the same anywhere.

    Raises:
        DataError: There are too few.
    """
    needed = train + (1 if test is None else test)
    if len(files) < needed:
        raise DataError(
            f"{files[0].rpartition('/')[0] if files else 'a class'}: {len(files):,} images, of which the split needs "
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
    return replace(part, fingerprint=f"{part.fingerprint}-crop{border}", images=CroppedImages(part.images, border))


def known_classes(task: Task) -> tuple[str, ...]:
    """The set's own labels, in label order."""
    return tuple(load_prompts(task.prompts).names)


def damaged(path: Path, problem: str) -> DataError:
    return DataError(f"{path}: {problem}.", fix=AGAIN)


def check_labels_are(task: Task, found: Sequence[str], where: Path) -> list[int]:
    """The label behind each number of a file's own list of classes, which must be the task's, each once."""
    label = label_of(task)
    labels = [label(key, str(where)) for key in found]
    if missing := sorted(set(range(len(known_classes(task)))) - set(labels)):
        names = [known_classes(task)[number] for number in missing]
        raise damaged(where, f"{len(missing)} of {task.title}'s classes are missing ({few(names)})")
    return labels
