"""Sets that are binary files of raw pixels: CIFAR in both its forms, and STL10. No pickle can run code."""

import io
import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import UInt8

from clip_cid.data.sets.labelled_images import LabelledImages, PlaneImages, RecordImages, check_all_there
from clip_cid.data.sets.readers.contract import Request, SetFiles
from clip_cid.data.sets.readers.layout_parts import check_labels_are, damaged, home, known_classes, lines

_SIDE = 32
_PIXELS = 3 * _SIDE**2
_PYTHON = {
    "cifar10": ("cifar-10-batches-py", "batches.meta", "label_names", "labels"),
    "cifar100": ("cifar-100-python", "meta", "fine_label_names", "fine_labels"),
}
_BINARY = {
    "cifar10": ("cifar-10-batches-bin", "batches.meta.txt", 1),
    "cifar100": ("cifar-100-binary", "fine_label_names.txt", 2),  # the coarse label comes first
}
_BATCHES = {
    "cifar10": {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
    "cifar100": {"train": ("train",), "test": ("test",)},
}
_STL_SIDE, _STL_FOLDS = 96, "fold_indices.txt"


def read_cifar_python(request: Request) -> SetFiles | None:
    """The pickles that torchvision leaves, read by an unpickler that makes lists, texts and bytes only."""
    known = request.known
    place, meta, names, numbers = _PYTHON[known.key]
    folder = home(request.root, place, has=meta)
    if folder is None:
        return None

    labels = check_labels_are(known, _texts(_plain(folder / meta), names, folder / meta), folder / meta)
    splits = {}
    for split, batches in _BATCHES[known.key].items():
        if request.wants(split):
            check_all_there(folder, batches)
            parts = [_batch(folder / batch, numbers, labels) for batch in batches]
            pixels = np.concatenate([part for part, _ in parts])
            images = PlaneImages(pixels, _SIDE, request.title(split))
            targets = np.array([number for _, part in parts for number in part], dtype=np.int64)
            contents = request.contents(folder, batches, decoded=False)
            splits[split] = LabelledImages(request.title(split), targets, contents, images)
    return SetFiles(known_classes(known), splits)


def read_cifar_binary(request: Request) -> SetFiles | None:
    """Records of one or two label bytes and 3,072 pixel bytes."""
    known = request.known
    place, meta, heads = _BINARY[known.key]
    folder = home(request.root, place, has=meta)
    if folder is None:
        return None

    labels = check_labels_are(known, lines(folder / meta), folder / meta)
    splits = {
        split: _records(request, split, folder, [f"{batch}.bin" for batch in batches], heads, labels)
        for split, batches in _BATCHES[known.key].items()
        if request.wants(split)
    }
    return SetFiles(known_classes(known), splits)


def read_stl10(request: Request) -> SetFiles | None:
    """stl10_binary: images by columns, labels from 1, and the rows of the ten folds."""
    folder = home(request.root, "stl10_binary", has="test_X.bin")
    if folder is None:
        return None
    labels = check_labels_are(request.known, lines(folder / "class_names.txt"), folder / "class_names.txt")
    splits = {split: _stl_split(request, split, folder, labels) for split in ("train", "test") if request.wants(split)}
    folds = _folds(folder / _STL_FOLDS, len(splits["train"]), request.known.folds) if "train" in splits else None
    return SetFiles(known_classes(request.known), splits, folds=folds)


def _stl_split(request: Request, split: str, folder: Path, labels: list[int]) -> LabelledImages:
    pixels, classes = folder / f"{split}_X.bin", folder / f"{split}_y.bin"
    check_all_there(folder, [pixels.name, classes.name])
    numbers = np.fromfile(classes, np.uint8).astype(np.int64) - 1
    size = 3 * _STL_SIDE**2
    if len(numbers) * size != pixels.stat().st_size:
        raise damaged(
            pixels, f"{pixels.stat().st_size:,} bytes, where {len(numbers):,} images are {len(numbers) * size:,}"
        )
    rows = np.arange(len(numbers))
    images = RecordImages((pixels,), np.zeros_like(rows), rows, size, 0, _STL_SIDE, columns_first=True)
    contents = request.contents(folder, [pixels.name, classes.name], decoded=False)
    return LabelledImages(request.title(split), _named(numbers, labels, classes), contents, images)


def _folds(path: Path, rows: int, count: int | None) -> tuple[np.ndarray, ...] | None:
    if not path.exists():
        return None
    try:
        folds = tuple(np.array([int(text) for text in line.split()], dtype=np.int64) for line in lines(path))
    except ValueError as error:
        raise damaged(path, f"holds something that is not a row ({error})") from error
    for number, fold in enumerate(folds):
        if len(fold) == 0 or fold.min() < 0 or fold.max() >= rows:
            raise damaged(path, f"fold {number} has rows outside 0 to {rows - 1}")
    if len(folds) != count:
        raise damaged(path, f"{len(folds)} folds, where there should be {count}")
    return folds


def _records(
    request: Request, split: str, folder: Path, batches: list[str], heads: int, labels: list[int]
) -> LabelledImages:
    check_all_there(folder, batches)
    size = heads + _PIXELS

    counts: list[int] = []
    numbers: list[np.ndarray] = []
    for batch in batches:
        data = np.fromfile(folder / batch, np.uint8)
        if len(data) % size:
            raise damaged(folder / batch, f"{len(data):,} bytes are not whole records of {size:,}")
        counts.append(len(data) // size)
        numbers.append(_named(data.reshape(-1, size)[:, heads - 1].astype(np.int64), labels, folder / batch))

    file_of = np.repeat(np.arange(len(batches)), counts)
    record_of = np.concatenate([np.arange(count) for count in counts])
    images = RecordImages(tuple(folder / batch for batch in batches), file_of, record_of, size, heads, _SIDE)
    contents = request.contents(folder, batches, decoded=False)
    return LabelledImages(request.title(split), np.concatenate(numbers), contents, images)


def _named(numbers: np.ndarray, labels: list[int], path: Path) -> np.ndarray:
    """Labels in the order of the known set's classes, from numbers in the order of the file's own list."""
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(labels):
        worst = int(numbers.max() if numbers.max() >= len(labels) else numbers.min())
        raise damaged(path, f"class number {worst}, but the classes are 0 to {len(labels) - 1}")
    return np.array(labels, dtype=np.int64)[numbers]


# --- Pickles without code ---


class _Refused(Exception):
    """The pickle names something that is not plain data."""


class _Array:
    """Stands for a NumPy array: keeps what the pickle says of one and makes none."""

    state: tuple[Any, ...] = ()

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:  # version, shape, type, columns first, bytes
            raise _Refused("an array of an unknown form")
        self.state = state


class _Type:
    """Stands for a NumPy type of elements."""

    def __init__(self, code: object = "", *_flags: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        pass


def _new_array(*_arguments: object) -> _Array:
    return _Array()


def _new_bytes(text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise _Refused("bytes of an unknown form")
    return text.encode("latin1")


class _PlainUnpickler(pickle.Unpickler):
    """Knows the four names a pickled array needs, each as one of the stand-ins above, and refuses every other."""

    _known: ClassVar[dict[tuple[str, str], Any]] = {
        **{(f"numpy.{core}.multiarray", "_reconstruct"): _new_array for core in ("core", "_core")},
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Type,
        ("_codecs", "encode"): _new_bytes,
    }

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        stand_in = self._known.get((module_name, global_name))
        if stand_in is None:
            raise _Refused(f"it would run {module_name}.{global_name}")
        return stand_in


def _plain(path: Path) -> dict[str, Any]:
    """A pickled dictionary by the texts of its keys."""
    try:
        values = _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except _Refused as error:
        raise damaged(path, f"refused, since this pickle is not the data of CIFAR alone: {error}") from error
    except Exception as error:  # on damaged bytes the unpickler raises nearly everything there is
        raise damaged(path, f"is no pickle that can be read ({type(error).__name__}: {error})") from error
    if not isinstance(values, dict):
        raise damaged(path, "holds no dictionary")
    return {_text(key): value for key, value in values.items()}


def _text(value: object) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _texts(values: dict[str, Any], name: str, path: Path) -> list[str]:
    texts = values.get(name)
    if not isinstance(texts, list):
        raise damaged(path, f"has no list `{name}`")
    return [_text(text) for text in texts]


def _batch(path: Path, name: str, labels: list[int]) -> tuple[UInt8[np.ndarray, "images bytes"], np.ndarray]:
    values = _plain(path)
    numbers = values.get(name)
    if not isinstance(numbers, list) or not all(isinstance(number, int) for number in numbers):
        raise damaged(path, f"has no list of numbers `{name}`")

    pixels = values.get("data")
    data = pixels.state[4] if isinstance(pixels, _Array) and pixels.state and not pixels.state[3] else b""
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(data, bytes) or len(data) != len(numbers) * _PIXELS:
        raise damaged(path, f"its `data` is not {len(numbers):,} images of {_PIXELS:,} bytes")
    array = np.frombuffer(data, np.uint8).reshape(-1, _PIXELS)
    return array, _named(np.array(numbers, dtype=np.int64), labels, path)
