"""Miniatures of the 14 + 5 sets in the layout each is published in. Every image has the color of its class, so that a
test can ask the pixels which class the writer meant."""

import io
import json
import os
import random
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat

from clip_cid.data.sets.known_sets import known_sets, load_prompts


def keys_of(task: str) -> list[str]:
    return list(load_prompts(known_sets()[task].prompts).names)


def color(number: int) -> tuple[int, int, int]:
    return 25 * (number % 10), 25 * (number // 10 % 10), 25 * (number // 100)


def class_shown(image: Image.Image) -> int:
    """The number behind the color in the middle of an image."""
    pixels = np.asarray(image.convert("RGB")).astype(float)
    middle = pixels[pixels.shape[0] // 2, pixels.shape[1] // 2]
    ones, tens, hundreds = (round(value / 25) for value in middle)
    return ones + 10 * tens + 100 * hundreds


class Painter:
    """Writes an image of a class as often as asked, at the cost of a link."""

    def __init__(self, root: Path) -> None:
        self._root, self._made = root, dict[tuple[int, str], Path]()

    def __call__(self, path: Path, number: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = path.suffix.lower()
        first = self._made.setdefault((number, kind), path)
        if first is not path:
            os.link(first, path)
            return
        Image.new("RGB", (8, 8), color(number)).save(path, "PNG" if kind == ".png" else "JPEG", quality=95)


def food101(root: Path) -> None:
    base, paint, keys = root / "food-101", Painter(root), keys_of("food101")
    for split, number in (("train", 100), ("test", 200)):
        listed = {key: [f"{key}/{number}"] for key in random.Random(0).sample(keys, len(keys))}
        (base / "meta").mkdir(parents=True, exist_ok=True)
        (base / "meta" / f"{split}.json").write_text(json.dumps(listed))
        for label, key in enumerate(keys):
            paint(base / "images" / key / f"{number}.jpg", label)


def stanford_cars(root: Path) -> None:
    base, paint, keys = root / "stanford_cars", Painter(root), keys_of("stanford_cars")
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(keys, dtype=object).reshape(1, -1)})
    fields = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
    for split, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = np.zeros((1, len(keys)), dtype=[(field, object) for field in fields])
        for row, label in enumerate(random.Random(split).sample(range(len(keys)), len(keys))):
            name = f"{row + 1:05d}.jpg"
            rows[0, row] = (1, 1, 2, 2, label + 1, name)
            paint(base / f"cars_{split}" / name, label)
        savemat(base / file, {"annotations": rows})


def fgvc_aircraft(root: Path) -> None:
    base, paint, keys = root / "fgvc-aircraft-2013b" / "data", Painter(root), keys_of("fgvc_aircraft")
    (base / "images").mkdir(parents=True)
    (base / "variants.txt").write_text("\n".join(keys) + "\n")
    for place, split in enumerate(("train", "val", "test")):
        images = [(f"{1_000_000 * (place + 1) + label:07d}", label) for label in range(len(keys))]
        (base / f"images_variant_{split}.txt").write_text("".join(f"{name} {keys[label]}\n" for name, label in images))
        for name, label in images:
            paint(base / "images" / f"{name}.jpg", label)


def dtd(root: Path) -> None:
    base, paint, keys = root / "dtd" / "dtd", Painter(root), keys_of("dtd")
    (base / "labels").mkdir(parents=True)
    for place, split in enumerate(("train", "val", "test")):
        rows = [f"{key}/{key}_{place:04d}.jpg" for key in keys]
        (base / "labels" / f"{split}1.txt").write_text("\n".join(rows) + "\n")
        (base / "labels" / f"{split}2.txt").write_text(rows[0])  # another partition, which must not be read
        for label, row in enumerate(rows):
            paint(base / "images" / row, label)


def oxford_pets(root: Path, *, each: int = 1) -> None:
    base, paint, keys = root / "oxford-iiit-pet", Painter(root), keys_of("oxford_pets")
    (base / "annotations").mkdir(parents=True)
    numbers = {key: number for number, key in enumerate(sorted(keys, key=str.lower), start=1)}
    for split, start in (("trainval", 1), ("test", 101)):
        images = [(f"{key}_{start + number}", label) for label, key in enumerate(keys) for number in range(each)]
        rows = [f"{image} {numbers[keys[label]]} 1 1\n" for image, label in images]
        (base / "annotations" / f"{split}.txt").write_text("".join(rows))
        for image, label in images:
            paint(base / "images" / f"{image}.jpg", label)


def caltech101(root: Path) -> None:
    paint = Painter(root)
    for label, key in enumerate(keys_of("caltech101")):
        for number in range(1, 33):
            paint(root / "caltech101" / "101_ObjectCategories" / key / f"image_{number:04d}.jpg", label)
    (root / "caltech101" / "101_ObjectCategories" / "BACKGROUND_Google" / "tmp").write_text("")  # as in the archive


def flowers102(root: Path) -> None:
    base, paint, count = root / "flowers-102", Painter(root), 102
    (base / "jpg").mkdir(parents=True)
    labels = [label for label in range(count) for _ in range(4)]
    random.Random(0).shuffle(labels)
    splits: dict[str, list[int]] = {"trnid": [], "valid": [], "tstid": []}
    seen = [0] * count
    for image, label in enumerate(labels, start=1):
        splits[("trnid", "valid", "tstid", "tstid")[seen[label]]].append(image)
        seen[label] += 1
        paint(base / "jpg" / f"image_{image:05d}.jpg", label)
    savemat(base / "imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8) + 1})
    savemat(base / "setid.mat", {name: np.array([rows], dtype=np.uint16) for name, rows in splits.items()})


def sun397(root: Path, *, partition: bool = True) -> None:
    base, paint, keys = root / "SUN397", Painter(root), keys_of("sun397")
    for label, key in enumerate(keys):
        for name in ("sun_a.jpg", "sun_b.jpg"):
            paint(base / key.lstrip("/") / name, label)
    (base / "ClassName.txt").write_text("\n".join(random.Random(0).sample(keys, len(keys))) + "\n")
    if partition:
        (base / "Partitions").mkdir()
        for split, name in (("Training", "sun_a.jpg"), ("Testing", "sun_b.jpg")):
            (base / "Partitions" / f"{split}_01.txt").write_text("".join(f"{key}/{name}\n" for key in keys))


def eurosat(root: Path) -> None:
    paint = Painter(root)
    for label, key in enumerate(keys_of("eurosat")):
        for number in range(1, 1502):
            paint(root / "eurosat" / "2750" / key / f"{key}_{number}.jpg", label)


def birdsnap(root: Path, *, lost: Sequence[str] = ()) -> None:
    """`lost`: photographs that could not be fetched."""
    paint, keys = Painter(root), keys_of("birdsnap")
    rows = [(key, f"{key}/{100 * label + image}.jpg") for label, key in enumerate(keys) for image in range(2)]
    header = "url\tmd5\tpath\tspecies_id\tbb_x1\n"
    text = "".join(f"address\t0\t{path}\t{keys.index(key) + 1}\t3\n" for key, path in rows)
    root.mkdir(parents=True, exist_ok=True)
    (root / "images.txt").write_text(header + text)
    (root / "test_images.txt").write_text("path\n" + "".join(f"{path}\n" for _, path in rows[1::2]))
    for key, path in rows:
        if path not in lost:
            paint(root / "images" / path, keys.index(key))


def stl10(root: Path, *, folds: bool = True) -> None:
    base, keys = root / "stl10_binary", keys_of("stl10")
    base.mkdir(parents=True)
    for split, each in (("train", 2), ("test", 1)):
        labels = [label for _ in range(each) for label in range(len(keys))]
        planes = [np.full((96, 96), value, np.uint8) for label in labels for value in color(label)]
        planes[0][0, 1] = 77  # first row of the file's first plane: the second pixel down the first column
        np.concatenate([plane.ravel() for plane in planes]).tofile(base / f"{split}_X.bin")
        (np.array(labels, dtype=np.uint8) + 1).tofile(base / f"{split}_y.bin")
    (base / "unlabeled_X.bin").write_bytes(b"")
    (base / "class_names.txt").write_text("\n".join(keys) + "\n")
    if folds:
        rows = [" ".join(str((start + step) % 20) for step in range(10)) for start in range(10)]
        (base / "fold_indices.txt").write_text(" \n".join(rows) + " \n")


def cifar_batches(task: str, each: int = 1) -> dict[str, list[int]]:
    """Labels by batch."""
    count = 10 if task == "cifar10" else 100
    labels = list(range(count)) * each
    if task == "cifar100":
        return {"train": labels[::-1], "test": labels}
    return {**{f"data_batch_{number}": labels[::-1] for number in range(1, 6)}, "test_batch": labels}


def cifar_planes(labels: Iterable[int]) -> np.ndarray:
    """3,072 bytes an image: red, green, blue planes."""
    return np.array([[value for part in color(label) for value in [part] * 1024] for label in labels], dtype=np.uint8)


def cifar_python(root: Path, task: str) -> None:
    keys = keys_of(task)
    folder, meta, names, field = {
        "cifar10": ("cifar-10-batches-py", "batches.meta", "label_names", "labels"),
        "cifar100": ("cifar-100-python", "meta", "fine_label_names", "fine_labels"),
    }[task]
    (root / folder).mkdir(parents=True)
    (root / folder / meta).write_bytes(python2_pickle({names: keys}))
    for batch, labels in cifar_batches(task).items():
        entries = {
            "batch_label": batch,
            field: labels,
            "data": cifar_planes(labels),
            "filenames": ["a.png"] * len(labels),
        }
        (root / folder / batch).write_bytes(python2_pickle(entries))


def cifar_binary(root: Path, task: str) -> None:
    folder, meta = {
        "cifar10": ("cifar-10-batches-bin", "batches.meta.txt"),
        "cifar100": ("cifar-100-binary", "fine_label_names.txt"),
    }[task]
    (root / folder).mkdir(parents=True)
    (root / folder / meta).write_text("\n".join(keys_of(task)) + "\n\n")
    for batch, labels in cifar_batches(task).items():
        heads = np.array([[9, label] if task == "cifar100" else [label] for label in labels], dtype=np.uint8)
        np.concatenate([heads, cifar_planes(labels)], axis=1).tofile(root / folder / f"{batch}.bin")


def python2_pickle(entries: dict[str, Any]) -> bytes:
    """A dictionary as Python 2 pickles it at protocol 2, which is how CIFAR was published."""
    return b"\x80\x02}" + b"".join(_pickled(key) + _pickled(value) + b"s" for key, value in entries.items()) + b"."


def _pickled(value: Any) -> bytes:
    if isinstance(value, str):
        return b"U" + bytes([len(value)]) + value.encode()
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(_pickled, value)) + b"e"
    kind = (
        b"cnumpy\ndtype\n"
        + _pickled("u1")
        + b"K\x00K\x01\x87R(K\x03"
        + _pickled("|")
        + b"NNN"
        + _pickled(-1) * 2
        + b"K\x00tb"
    )
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + _pickled("b") + b"\x87R"
    shape = _pickled(value.shape[0]) + _pickled(value.shape[1]) + b"\x86"
    return empty + b"(K\x01" + shape + kind + b"\x89" + _pickled(value.tobytes()) + b"tb"


def imagenet(root: Path) -> None:
    paint = Painter(root)
    for label, wnid in enumerate(keys_of("imagenet")):
        paint(root / "train" / wnid / f"{wnid}_1.JPEG", label)
        paint(root / "val" / wnid / f"ILSVRC2012_val_{label:08d}.JPEG", label)


def imagenet_v2(root: Path, folder: str = "imagenetv2-matched-frequency-format-val") -> None:
    paint = Painter(root)
    for label in range(1000):
        paint(root / folder / str(label) / "a.jpeg", label)


def wnid_folders(root: Path, task: str) -> None:
    paint = Painter(root)
    for label, wnid in enumerate(keys_of(task)):
        paint(root / wnid / "a.jpg", label)
    (root / "README.txt").write_text("in the archive")


def objectnet(root: Path) -> None:
    """Images with the red border the authors drew; the other 200 folders are there too."""
    base = root / "objectnet-1.0" / "images"
    prompts = load_prompts("objectnet")
    for label, folder in enumerate([*prompts.names, *sorted(prompts.others)]):
        image = Image.new("RGB", (12, 10), (255, 0, 0))
        image.paste(color(label), (2, 2, 10, 8))
        (base / folder).mkdir(parents=True)
        image.save(base / folder / "a.png")


LAYOUTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "food101": ("food101", food101),
    "cifar10-python": ("cifar10", lambda root: cifar_python(root, "cifar10")),
    "cifar10-binary": ("cifar10", lambda root: cifar_binary(root, "cifar10")),
    "cifar100-python": ("cifar100", lambda root: cifar_python(root, "cifar100")),
    "cifar100-binary": ("cifar100", lambda root: cifar_binary(root, "cifar100")),
    "birdsnap": ("birdsnap", birdsnap),
    "sun397": ("sun397", sun397),
    "stanford_cars": ("stanford_cars", stanford_cars),
    "fgvc_aircraft": ("fgvc_aircraft", fgvc_aircraft),
    "dtd": ("dtd", dtd),
    "oxford_pets": ("oxford_pets", oxford_pets),
    "caltech101": ("caltech101", caltech101),
    "flowers102": ("flowers102", flowers102),
    "stl10": ("stl10", stl10),
    "eurosat": ("eurosat", eurosat),
    "imagenet": ("imagenet", imagenet),
    "imagenet_v2": ("imagenet_v2", imagenet_v2),
    "imagenet_a": ("imagenet_a", lambda root: wnid_folders(root, "imagenet_a")),
    "imagenet_r": ("imagenet_r", lambda root: wnid_folders(root / "imagenet-r", "imagenet_r")),
    "imagenet_sketch": ("imagenet_sketch", lambda root: wnid_folders(root / "sketch", "imagenet_sketch")),
    "objectnet": ("objectnet", objectnet),
}
"""Layout -> task, and what writes it."""


def as_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
