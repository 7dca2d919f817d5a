"""What a folder holds that is no set in a known layout, in words, and what to do about it."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from clip_cid.data.pairs.images import EXTENSIONS
from clip_cid.data.sets.known_sets import few

_SPLITS = ("train", "val", "test")
_OTHER_NAMES = ("validation", "valid", "testing", "tests", "eval", "evaluation", "dev", "val")
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.xz", ".tar.bz2", ".7z", ".rar")
_ENOUGH = 2_000  # entries of a folder that are looked at


class Near(NamedTuple):
    """What is there, as the end of a sentence, and what to do."""

    problem: str
    fix: str


def near_layout(root: Path) -> Near:
    """The nearest known thing that a folder is; at least the names of what lies in it."""
    for look in _LOOKS:
        if near := look(root):
            return near
    names = sorted(path.name for path in _entries(root))
    return Near(f"there is {few(names) or 'nothing'}", "")


def _parquet(root: Path) -> Near | None:
    tables = [path for path in _two_levels(root) if path.suffix in (".parquet", ".arrow")]
    if not tables:
        return None
    return Near(
        f"{len(tables)} {tables[0].suffix} files lie there ({few([str(path.relative_to(root)) for path in tables])}), as"
        " the Hugging Face Hub keeps sets",
        "Write the image of each row to test/CLASS/NUMBER.jpg; docs/evaluation_sets.md has the lines for it.",
    )


def _imagenet(root: Path) -> Near | None:
    flat = [path for path in _two_levels(root) if path.name.startswith("ILSVRC2012_val_")]
    kaggle = next((root / sub for sub in ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC") if (root / sub).is_dir()), None)
    if not flat and kaggle is None:
        return None
    what = f"{kaggle} is Kaggle's ImageNet" if kaggle else f"{flat[0].parent} holds ImageNet's validation images"
    return Near(what, "Name the set imagenet: its classes are then taken from LOC_val_solution.csv or from the devkit.")


def _other_split(root: Path) -> Near | None:
    folders = {path.name: path for path in _entries(root) if path.is_dir()}
    named = [name for name in folders if name.lower() in (*_OTHER_NAMES, "test")]
    if "test" in folders or not named:
        return None
    chosen = sorted(named, key=lambda name: name.lower() == "val")[0]
    return Near(
        f"it has {' and '.join(sorted(folders)[:4])}, but no test",
        f"Give the folder to test on the name test: ln -s {chosen} {root / 'test'}",
    )


def _inside(root: Path) -> Near | None:
    inside = [path for path in _entries(root) if path.is_dir() and (path / "test").is_dir()]
    if (root / "test").is_dir() or not inside:
        return None
    return Near(f"sets lie in the folders inside ({few([path.name for path in inside])})", f"Give {inside[0]}.")


def _classes_without_split(root: Path) -> Near | None:
    folders = [path for path in _entries(root) if path.is_dir() and path.name not in _SPLITS]
    classes = [path for path in folders if any(_is_image(file) for file in _entries(path))]
    if (root / "test").is_dir() or len(classes) < 2:
        return None
    return Near(
        f"{len(classes)} class folders ({few(sorted(path.name for path in classes))}) lie in it without a split",
        f"Move them into {root / 'test'}; images to train on belong into {root / 'train'}.",
    )


def _images_without_class(root: Path) -> Near | None:
    for folder in (root / "test", root):
        images = [path for path in _entries(folder) if _is_image(path)] if folder.is_dir() else []
        if images:
            more = f"{len(images):,}" if len(images) < _ENOUGH else f"more than {_ENOUGH - 1:,}"
            return Near(
                f"{more} images lie in {folder} without a folder of their class, the first {images[0].name}",
                f"Move each into the folder of its class: {root / 'test'}/CLASS/{images[0].name}.",
            )
    return None


def _archives(root: Path) -> Near | None:
    archives = sorted(path.name for path in _two_levels(root) if path.name.lower().endswith(_ARCHIVES))
    if not archives:
        return None
    return Near(
        f"archives lie there ({few(archives)})",
        "Unpack them. Tars of images and .cls files are read as they are in CLIP_benchmark's layout: test/0.tar,"
        " test/1.tar, ... with test/nshards.txt.",
    )


def _nothing_in_test(root: Path) -> Near | None:
    test = root / "test"
    if not test.is_dir():
        return None
    names = sorted(path.name for path in _entries(test))
    return Near(f"no class folder and no tar lies in {test}, only {few(names) or 'nothing'}", "")


_LOOKS: tuple[Callable[[Path], Near | None], ...] = (
    _parquet,
    _imagenet,
    _inside,
    _other_split,
    _classes_without_split,
    _images_without_class,
    _archives,
    _nothing_in_test,
)


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, without hidden entries; of a very large one a part."""
    try:
        return [path for path in islice(folder.iterdir(), _ENOUGH) if not path.name.startswith(".")]
    except OSError:
        return []


def _two_levels(root: Path) -> Iterator[Path]:
    for path in _entries(root):
        yield path
        if path.is_dir():
            yield from _entries(path)


def _is_image(path: Path) -> bool:
    return path.suffix.lower().removeprefix(".") in EXTENSIONS
