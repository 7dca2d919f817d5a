"""Sets whose classes are folders: one's own train/test folders, ImageNet and its relatives, Caltech101, EuroSAT."""

from collections.abc import Sequence
from pathlib import Path

from clip_cid import log
from clip_cid.data.pairs.images import EXTENSIONS
from clip_cid.data.sets.known_sets import few, load_prompts
from clip_cid.data.sets.labelled_images import LabelledImages
from clip_cid.data.sets.readers.class_list import names_beside
from clip_cid.data.sets.readers.contract import Request, SetFiles
from clip_cid.data.sets.readers.layout_parts import (
    class_folders,
    draw,
    has_class_folders,
    home,
    images_in,
    known_classes,
)
from clip_cid.data.sets.readers.tars import CLASSES, read_templates
from clip_cid.data.sets.readers.tars import TEMPLATES as TAR_TEMPLATES
from clip_cid.errors import DataError

TEMPLATES = "templates.txt"
_FREQUENCY = "matched-frequency"


def read_folders(request: Request) -> SetFiles | None:
    """{train,val,test}/CLASS/IMAGE; classes are the sorted folders; folder `polka_dot` is class `polka dot`.

    A classnames.txt above the splits names the classes instead.
    """
    present = [split for split in request.splits if (request.root / split).is_dir()]
    if "test" not in present or not has_class_folders(request.root / "test"):
        return None

    folders = {split: class_folders(request.root / split) for split in present}
    for split, names in folders.items():
        if differ := sorted(set(names) ^ set(folders["test"])):
            raise DataError(
                f"{request.root}: {split} has {len(names)} class folders and test has {len(folders['test'])}; "
                f"{differ[0]} is in one only.",
                fix="Both need the same class folders.",
            )

    classes = folders["test"]
    splits = {split: split_of_folders(request, split, request.root / split, classes) for split in present}
    given = names_beside(request.root / CLASSES, classes, request.name)
    if request.known_set is not None:  # its own names go by its labels
        return SetFiles(given or tuple(classes), splits, templates=_templates(request.root))
    return SetFiles(
        tuple(classes), splits, given or tuple(name.replace("_", " ") for name in classes), _templates(request.root)
    )


def _templates(root: Path) -> tuple[str, ...]:
    """Prompts beside the splits, under the name that CLIP_benchmark gives them or ours."""
    return read_templates(root / TEMPLATES) or read_templates(root / TAR_TEMPLATES)


def read_imagenet(request: Request) -> SetFiles | None:
    """{train,val}/WNID: the official validation images are the test split."""
    places = (place for place in imagenet_places(request.root) if _has_wnids(request, place / "val"))
    place = next(places, None)
    if place is None:
        return None
    classes = class_folders(place / "val")
    splits = {"test": split_of_folders(request, "test", place / "val", classes)}
    if request.wants("train") and (place / "train").is_dir():
        splits["train"] = split_of_folders(request, "train", place / "train", classes)
    return SetFiles(tuple(classes), splits)


def imagenet_places(root: Path) -> list[Path]:
    """Where ImageNet's `train` and `val` may lie: in the folder named, or where Kaggle's archive has them."""
    return [root, *(root / sub for sub in ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC"))]


def read_wnid_folders(request: Request) -> SetFiles | None:
    """WNID/IMAGE, test only (-A, -R, -Sketch)."""
    unpacked = request.root / request.known.layout.partition("/")[0]
    folder = next((path for path in (request.root, unpacked) if _has_wnids(request, path)), None)
    if folder is None:
        return None
    classes = class_folders(folder)
    return SetFiles(tuple(classes), {"test": split_of_folders(request, "test", folder, classes)})


def read_imagenet_v2(request: Request) -> SetFiles | None:
    """0/ to 999/, where a folder's name is its class number, whatever its place in the sorted list."""
    inside = sorted(path for path in request.root.glob("imagenetv2-*") if path.is_dir())
    matched = [path for path in inside if _FREQUENCY in path.name]
    folder = next((path for path in (request.root, *matched, *inside) if (path / "0").is_dir()), None)
    if folder is None:
        return None

    wnids = known_classes(request.known)
    names = class_folders(folder)
    if wrong := sorted(set(names) ^ {str(number) for number in range(len(wnids))}):
        raise DataError(
            f"{folder}: {len(names):,} folders; they should be 0 to {len(wnids) - 1}, and {wrong[0]} is not or"
            " is missing.",
            fix="Unpack the archive again.",
        )

    split = split_of_folders(request, "test", folder, [str(number) for number in range(len(wnids))])
    other = "imagenetv2" in folder.name and _FREQUENCY not in folder.name
    return SetFiles(
        wnids, {"test": split}, notes=(f"{folder.name}, not the matched-frequency images",) if other else ()
    )


def read_objectnet(request: Request) -> SetFiles | None:
    """images/OBJECT: the objects that ImageNet has too; the other 200 folders are left out."""
    folder = home(request.root, "objectnet-1.0", "images", has="alarm_clock")
    if folder is None:
        return None
    prompts = load_prompts(request.known.prompts)
    classes = [name for name in class_folders(folder) if name not in prompts.others]
    return SetFiles(tuple(classes), {"test": split_of_folders(request, "test", folder, classes)})


def read_caltech101(request: Request) -> SetFiles | None:
    """101_ObjectCategories/CLASS, without a split of its own: it is drawn."""
    return _drawn(request, home(request.root, "caltech101", "101_ObjectCategories", has="BACKGROUND_Google"))


def read_eurosat(request: Request) -> SetFiles | None:
    """2750/CLASS, without a split of its own: it is drawn."""
    return _drawn(request, home(request.root, "eurosat", "2750", has="AnnualCrop"))


def _drawn(request: Request, folder: Path | None) -> SetFiles | None:
    known = request.known
    if folder is None or known.draw is None:
        return None

    classes = class_folders(folder)
    rows: dict[str, tuple[list[str], list[int]]] = {split: ([], []) for split in ("train", "test")}
    for label, name in enumerate(classes):
        files, _ = images_in(folder, name)
        chosen = dict(zip(rows, draw(files, train=known.draw["train"], test=known.draw.get("test")), strict=True))
        for split, numbers in chosen.items():
            rows[split][0].extend(files[number] for number in numbers)
            rows[split][1].extend([label] * len(numbers))

    splits = {split: request.files(split, folder, *drawn) for split, drawn in rows.items() if request.wants(split)}
    return SetFiles(tuple(classes), splits, notes=(known.always,))


def _has_wnids(request: Request, folder: Path) -> bool:
    return any((folder / wnid).is_dir() for wnid in known_classes(request.known))


def split_of_folders(request: Request, split: str, folder: Path, classes: Sequence[str]) -> LabelledImages:
    files: list[str] = []
    labels: list[int] = []
    others: list[str] = []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            raise DataError(f"{folder}: no folder of the class {name}.", fix="Every split needs every class.")
        images, rest = images_in(folder, name)
        files += images
        labels += [label] * len(images)
        others += rest

    if others and not files:
        raise DataError(
            f"{folder}: none of {len(others):,} files in the class folders is an image of a known type"
            f" ({few(sorted({Path(file).suffix or file for file in others}))}).",
            fix=f"Images are read from .{', .'.join(EXTENSIONS)}, directly in the folder of their class.",
        )
    if others:
        log.warn(
            f"{request.title(split)}: {len(others):,} files are not .{', .'.join(EXTENSIONS)} and are left out, "
            f"the first {folder / others[0]}"
        )
    return request.files(split, folder, files, labels)
