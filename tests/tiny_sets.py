"""Labelled sets, pairs and a random CLIP small enough to make anew in each test."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clip_cid.models.clip import Clip
from clip_cid.models.student import build_student

COLORS = {"red_thing": (220, 30, 30), "green_thing": (30, 200, 40), "blue_thing": (40, 40, 230)}
CLASSES = [name.replace("_", " ") for name in COLORS]
TEMPLATES = ["a photo of a {c}.", "{c}"]

_CONFIG = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def tiny_clip(folder: Path, *, seed: int = 0, embed_dim: int = 12, **vision_cfg: object) -> Clip:
    """A random model; `vision_cfg` replaces the whole of the ViT's."""
    config = {**_CONFIG, "embed_dim": embed_dim, "vision_cfg": vision_cfg or _CONFIG["vision_cfg"]}
    path = folder / "tiny.json"
    path.write_text(json.dumps(config))
    clip = build_student(str(path), embed_dim=None, seed=seed)
    clip.model.eval()
    with torch.no_grad():
        for name, weight in clip.model.named_parameters():
            if name.endswith("bias"):  # fresh biases are zero, and what is multiplied by zero is not tested
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))
    return clip


def image(color: Sequence[int], seed: int = 0) -> bytes:
    """A JPEG of one color with a little noise."""
    noise = np.random.default_rng(seed).integers(-20, 20, size=(24, 24, 3))
    pixels = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def samples(each: int, *, seed: int = 0) -> list[tuple[str, bytes]]:
    """`each` images of every class as tar members, classes in turn."""
    members: list[tuple[str, bytes]] = []
    for number in range(each * len(COLORS)):
        label = number % len(COLORS)
        color = list(COLORS.values())[label]
        members += [(f"s{number:04d}.jpg", image(color, seed + number)), (f"s{number:04d}.cls", str(label).encode())]
    return members


def tar_set(root: Path, *, each: int = 2, splits: Sequence[str] = ("train", "test")) -> Path:
    """CLIP_benchmark's layout, one tar a split."""
    for number, split in enumerate(splits):
        write_tar(root / split / "0.tar", samples(each, seed=1000 * number))
        (root / split / "nshards.txt").write_text("1\n")
    (root / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    return root


def folder_set(root: Path, *, each: int = 2, splits: Sequence[str] = ("train", "test")) -> Path:
    """Plain folders, without prompts."""
    for number, split in enumerate(splits):
        for label, (name, color) in enumerate(COLORS.items()):
            folder = root / split / name
            folder.mkdir(parents=True)
            for copy in range(each):
                (folder / f"{copy}.jpg").write_bytes(image(color, 1000 * number + 10 * label + copy))
    return root


def pair_tar(path: Path, captions: Mapping[str, Sequence[str]]) -> Path:
    """Pairs with several captions each, in the json."""
    members: list[tuple[str, bytes]] = []
    for number, (key, texts) in enumerate(captions.items()):
        color = list(COLORS.values())[number % len(COLORS)]
        members += [
            (f"{key}.jpg", image(color, number)),
            (f"{key}.txt", texts[0].encode()),
            (f"{key}.json", json.dumps({"captions": list(texts)}).encode()),
        ]
    write_tar(path, members)
    return path
