"""Real pairs and labelled sets: prepare the folders the `mixed` recipes read, and measure what the recipes do not.

    python benchmarks/mixed_data.py prepare SOURCE          data/mixed -> SOURCE; captions for the labelled train splits;
                                                            halves of these splits to choose by; the classes in prompts
    python benchmarks/mixed_data.py duplicates RUN          removed share, precision and recall of the sets by threshold
    python benchmarks/mixed_data.py floor                   what pixels alone reach on the labelled sets

SOURCE holds `pairs/*.tar`, `emoji/*.tar` and `downstream/<set>/{train,test}/*.tar` (CLIP_benchmark's layout).
"""

import io
import json
import shutil
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.method.balance.pair_agreement import agreement
from clip_cid.method.balance.semantic_balance import balance
from clip_cid.method.distances import threshold_on

DATA, LABELLED = Path("data/mixed"), Path("data/mixed-labelled")
CHOICE, NAMES = Path("data/mixed-choice"), Path("data/mixed-names.txt")
CHOICE_IMAGES = 4_000  # of a set
THRESHOLDS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.08, 0.10, 0.15, 0.20, 0.25, 0.30)


def prepare(source: Path) -> None:
    """Link the data, and write the labelled train splits in two ways.

    As pairs, each image with its class in every template. And as sets to choose by before any test image is looked at:
    half of the images to learn from, half to measure on.
    """
    DATA.parent.mkdir(exist_ok=True)
    if not DATA.exists():
        DATA.symlink_to(source.resolve(), target_is_directory=True)
    LABELLED.mkdir(exist_ok=True)
    prompts: dict[str, None] = {}
    for folder in sorted((DATA / "downstream").iterdir()):
        classes = (folder / "classnames.txt").read_text().splitlines()
        templates = (folder / "zeroshot_classification_templates.txt").read_text().splitlines()
        with tarfile.open(LABELLED / f"{folder.name}.tar", "w") as out:
            for shard in sorted((folder / "train").glob("*.tar")):
                _with_captions(shard, out, classes, templates)
        _halves(folder, CHOICE / folder.name)
        prompts |= dict.fromkeys(template.replace("{c}", name) for name in classes for template in templates)
    NAMES.write_text("".join(f"{prompt}\n" for prompt in prompts))


def _halves(labelled: Path, out: Path) -> None:
    """The train split as a set: of each class every other image is in its test split."""
    files = [file for shard in sorted((labelled / "train").glob("*.tar")) for file in _samples(shard)][:CHOICE_IMAGES]
    seen: Counter[bytes] = Counter()
    for split in ("train", "test"):
        (out / split).mkdir(parents=True, exist_ok=True)
        (out / split / "nshards.txt").write_text("1\n")
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        shutil.copy(labelled / name, out / name)
    with tarfile.open(out / "train/0.tar", "w") as train, tarfile.open(out / "test/0.tar", "w") as test:
        for key, image, label in files:
            half = test if seen[label] % 2 else train
            seen[label] += 1
            for suffix, contents in (("jpg", image), ("cls", label)):
                _add(half, f"{key}.{suffix}", contents)


def _samples(shard: Path) -> Iterator[tuple[str, bytes, bytes]]:
    """Key, image and class of each sample; keys are of the whole split."""
    with tarfile.open(shard) as tar:
        files = {member.name: tar.extractfile(member) for member in tar if member.isfile()}
        data = {name: handle.read() for name, handle in files.items() if handle is not None}
    for name in data:
        if name.endswith(".cls"):
            key = name.removesuffix(".cls")
            yield f"{shard.stem}-{key}", data[f"{key}.jpg"], data[name]


def _with_captions(shard: Path, out: tarfile.TarFile, classes: list[str], templates: list[str]) -> None:
    for key, image, label in sorted(_samples(shard)):
        captions = [template.replace("{c}", classes[int(label)]) for template in templates]
        fields = json.dumps({"source": shard.parent.parent.name, "captions": captions}).encode()
        for suffix, contents in (("jpg", image), ("txt", captions[0].encode()), ("json", fields)):
            _add(out, f"{key.partition('-')[2]}.{suffix}", contents)


def _add(tar: tarfile.TarFile, name: str, contents: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(contents)
    tar.addfile(member, io.BytesIO(contents))


def duplicates(run: Path) -> None:
    """One line a threshold: share removed, and the sets against the emoji's own groups, within and across vendors."""
    store = EmbeddingStore.open(run / "embed")
    source, group = (np.asarray(store.field(name)) for name in ("source", "dup"))
    emoji = np.flatnonzero(store.ok & (group != ""))
    within = np.char.add(np.char.add(source[emoji], ":"), group[emoji])
    rows = np.flatnonzero(store.ok)
    texts = store.texts.select(rows)
    print(
        "| cosine | Euclidean | removed | emoji removed | photos removed | precision | recall in one vendor | recall across |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for threshold in THRESHOLDS:
        found = balance(store.images.select(rows), threshold=threshold, text_embeddings=texts)
        set_of = np.full(store.rows, -1)
        set_of[rows] = found.set_of
        kept = np.zeros(store.rows, dtype=bool)
        kept[rows[found.kept]] = True
        photos = np.setdiff1d(rows, emoji)
        across, one = agreement(set_of[emoji], group[emoji]), agreement(set_of[emoji], within)
        cells = [1 - kept[some].mean() for some in (rows, emoji, photos)] + [
            across.precision,
            one.recall,
            across.recall,
        ]
        scale = threshold_on("cosine", threshold, "euclidean")
        print(f"| {threshold:.2f} | {scale:.3f} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")


def floor() -> None:
    """Nearest neighbours and logistic regression on 16 x 16 pixels and a colour histogram."""
    print("| set | 5-NN | logistic regression |\n|---|---|---|")
    for folder in sorted((DATA / "downstream").iterdir()):
        (train_x, train_y), (test_x, test_y) = (_pixels(folder / split) for split in ("train", "test"))
        scores = []
        for model in (KNeighborsClassifier(5), LogisticRegression(C=0.01, max_iter=500)):
            scores.append(make_pipeline(StandardScaler(), model).fit(train_x, train_y).score(test_x, test_y))
        print(f"| {folder.name} | " + " | ".join(f"{score:.3f}" for score in scores) + " |", flush=True)


def _pixels(split: Path) -> tuple[np.ndarray, np.ndarray]:
    features: list[np.ndarray] = []
    labels: list[int] = []
    for shard in sorted(split.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                handle = tar.extractfile(member)
                if handle is None:
                    continue
                if member.name.endswith(".cls"):
                    labels.append(int(handle.read()))
                    continue
                picture = Image.open(io.BytesIO(handle.read())).convert("RGB")
                small = np.asarray(picture.resize((16, 16), Image.Resampling.BILINEAR), dtype=np.float32) / 255
                histogram = [np.histogram(small[..., channel], bins=8, range=(0, 1))[0] / 256 for channel in range(3)]
                features.append(np.concatenate([small.ravel(), *histogram]))
    return np.stack(features), np.asarray(labels)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["prepare", source]:
            prepare(Path(source))
        case ["duplicates", run]:
            duplicates(Path(run))
        case ["floor"]:
            floor()
        case _:
            sys.exit(__doc__)
