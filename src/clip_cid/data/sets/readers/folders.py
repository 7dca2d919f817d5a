"""Sets whose classes are folders: one's own train/test folders, ImageNet and its relatives, Caltech101, EuroSAT."""

from collections.abc import Sequence
from pathlib import Path

from clip_cid import log
from clip_cid.data.sets.known_sets import load_prompts
from clip_cid.data.sets.labelled_images import LabelledImages
from clip_cid.data.sets.readers.reading import (
    Asked,
    Found,
    class_folders,
    draw,
    home,
    images_in,
    known_classes,
)
from clip_cid.data.sets.readers.tars import read_templates
from clip_cid.errors import DataError

TEMPLATES = "templates.txt"
_FREQUENCY = "matched-frequency"


def read_folders(asked: Asked) -> Found | None:
    """{train,val,test}/CLASS/IMAGE; classes are the folders, sorted, and a folder `polka_dot` is the class `polka dot`."""
    present = [split for split in asked.splits if (asked.root / split).is_dir()]
    if "test" not in present:
        return None
    folders = {split: class_folders(asked.root / split) for split in present}
    for split, found in folders.items():
        if differ := sorted(set(found) ^ set(folders["test"])):
            raise DataError(
                f"{asked.root}: {split} has {len(found)} class folders and test has {len(folders['test'])}; "
                f"{differ[0]} is in one only.",
                fix="Both need the same class folders.",
            )
    classes = folders["test"]
    splits = {split: _split(asked, split, asked.root / split, classes) for split in present}
    names = tuple(name.replace("_", " ") for name in classes)
    return Found(tuple(classes), splits, names, read_templates(asked.root / TEMPLATES))


def read_imagenet(asked: Asked) -> Found | None:
    """{train,val}/WNID: the official validation images are what is tested on."""
    if not any((asked.root / "val" / wnid).is_dir() for wnid in known_classes(asked.known)):
        return None
    classes = class_folders(asked.root / "val")
    splits = {"test": _split(asked, "test", asked.root / "val", classes)}
    if asked.wants("train") and (asked.root / "train").is_dir():
        splits["train"] = _split(asked, "train", asked.root / "train", classes)
    return Found(tuple(classes), splits)


def read_wnid_folders(asked: Asked) -> Found | None:
    """WNID/IMAGE, test only (-A, -R, -Sketch)."""
    unpacked = asked.root / asked.known.layout.partition("/")[0]
    folder = next((path for path in (asked.root, unpacked) if _has_wnids(asked, path)), None)
    if folder is None:
        return None
    classes = class_folders(folder)
    return Found(tuple(classes), {"test": _split(asked, "test", folder, classes)})


def read_imagenet_v2(asked: Asked) -> Found | None:
    """0/ to 999/, where a folder's name is its class number, whatever its place in the sorted list."""
    inside = sorted(path for path in asked.root.glob("imagenetv2-*") if path.is_dir())
    matched = [path for path in inside if _FREQUENCY in path.name]
    folder = next((path for path in (asked.root, *matched, *inside) if (path / "0").is_dir()), None)
    if folder is None:
        return None
    wnids = known_classes(asked.known)
    found = class_folders(folder)
    if wrong := sorted(set(found) ^ {str(number) for number in range(len(wnids))}):
        raise DataError(
            f"{folder}: {len(found):,} folders; they should be 0 to {len(wnids) - 1}, and {wrong[0]} is not or is missing.",
            fix="Unpack the archive again.",
        )
    split = _split(asked, "test", folder, [str(number) for number in range(len(wnids))])
    other = "imagenetv2" in folder.name and _FREQUENCY not in folder.name
    return Found(wnids, {"test": split}, notes=(f"{folder.name}, not the matched-frequency images",) if other else ())


def read_objectnet(asked: Asked) -> Found | None:
    """images/OBJECT: the objects ImageNet has too; the other 200 folders are passed over."""
    folder = home(asked.root, "objectnet-1.0", "images", has="alarm_clock")
    if folder is None:
        return None
    prompts = load_prompts(asked.known.prompts)
    classes = [name for name in class_folders(folder) if name not in prompts.others]
    return Found(tuple(classes), {"test": _split(asked, "test", folder, classes)})


def read_caltech101(asked: Asked) -> Found | None:
    """101_ObjectCategories/CLASS, without a split of its own: it is drawn."""
    return _drawn(asked, home(asked.root, "caltech101", "101_ObjectCategories", has="BACKGROUND_Google"))


def read_eurosat(asked: Asked) -> Found | None:
    """2750/CLASS, without a split of its own: it is drawn."""
    return _drawn(asked, home(asked.root, "eurosat", "2750", has="AnnualCrop"))


def _drawn(asked: Asked, folder: Path | None) -> Found | None:
    task = asked.known
    if folder is None or task.draw is None:
        return None
    classes = class_folders(folder)
    rows: dict[str, tuple[list[str], list[int]]] = {split: ([], []) for split in ("train", "test")}
    for label, name in enumerate(classes):
        files, _ = images_in(folder, name)
        chosen = dict(zip(rows, draw(files, train=task.draw["train"], test=task.draw.get("test")), strict=True))
        for split, numbers in chosen.items():
            rows[split][0].extend(files[number] for number in numbers)
            rows[split][1].extend([label] * len(numbers))
    splits = {split: asked.files(split, folder, *found) for split, found in rows.items() if asked.wants(split)}
    return Found(tuple(classes), splits, notes=(task.always,))


def _has_wnids(asked: Asked, folder: Path) -> bool:
    return any((folder / wnid).is_dir() for wnid in known_classes(asked.known))


def _split(asked: Asked, split: str, folder: Path, classes: Sequence[str]) -> LabelledImages:
    files: list[str] = []
    labels: list[int] = []
    others: list[str] = []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            raise DataError(f"{folder}: no folder of the class {name}.", fix="Every split needs every class.")
        found, rest = images_in(folder, name)
        files += found
        labels += [label] * len(found)
        others += rest
    if others:
        log.warn(
            f"{asked.title(split)}: {len(others):,} files are not .jpg, .png or .webp and are left out, "
            f"the first {folder / others[0]}"
        )
    return asked.files(split, folder, files, labels)
