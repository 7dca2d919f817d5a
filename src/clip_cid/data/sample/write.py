"""The embedded sample: captioned artificial scenes with known duplicates, for the demo and the tests.

A long-tailed mix of objects, colors, textures, places, counts and backgrounds. Some pairs are planted
duplicates: perceptual ones (a picture saved again, cut or brightened a little) and semantic ones (the same
scene drawn again). The json field `dup` names the true group of every pair, `object` and `background` name
the main things it shows, and `kind` says original, perceptual or semantic.
"""

import io
import itertools
import json
import random
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageEnhance

from clip_cid.data.sample.captions import BRIEF_SHARE, caption
from clip_cid.data.sample.drawing import SIZE, draw_scene
from clip_cid.data.sample.scenes import Scene, SceneBook
from clip_cid.data.sample.sets import LABELLED_SETS, LabelledSet
from clip_cid.errors import DataError
from clip_cid.new_folder import new_folder

VERSION = 3
"""Raised when the same seed would give other files."""

FEWEST_PAIRS = 20
_DUPLICATES = 0.4
_PERCEPTUAL = 0.5
_POPULARITY = 1.0
_SEVERAL_CAPTIONS = 0.4
_SHARD = 2_000
_MARK = "sample.json"

Members = dict[str, bytes]


@dataclass(frozen=True)
class SampleSummary:
    """The contents of a sample; `sample.json` in its folder holds the same."""

    version: int
    seed: int
    pairs: int
    originals: int
    perceptual: int
    semantic: int
    heldout: int
    sets: dict[str, int]
    """Labelled set -> its number of classes."""

    def __str__(self) -> str:
        sets = ", ".join(f"{name} ({classes:,} classes)" for name, classes in self.sets.items())
        return (
            f"{self.pairs:,} pairs: {self.originals:,} scenes, {self.perceptual:,} times one saved again and"
            f" {self.semantic:,} times one drawn anew; {self.heldout:,} more in heldout; labelled sets {sets}"
        )


@dataclass(frozen=True)
class _Entry:
    """One pair to write: its scene's number, and whether it shows that scene first, as a copy, or drawn again."""

    group: int
    kind: str


def write_sample(out: Path, *, pairs: int = 6_000, seed: int = 0) -> SampleSummary:
    """Write the sample to a new folder; does nothing when `out` already holds this very sample.

    Leaves `pairs/pairs-0000.tar` ..., `heldout/pairs-0000.tar` ... (pairs of scenes that occur nowhere else) and
    `sets/<name>/` in CLIP_benchmark's WebDataset layout. The same arguments give the same bytes.

    Args:
        out: The folder to make. It appears whole or not at all.
        pairs: How many pairs to write, duplicates included; at least `FEWEST_PAIRS`.
        seed: Another seed gives other scenes, drawings and captions.

    Raises:
        ValueError: Fewer than `FEWEST_PAIRS`.
        DataError: `out` holds something else, or a sample of other arguments.
    """
    if pairs < FEWEST_PAIRS:
        raise ValueError(f"pairs must be at least {FEWEST_PAIRS}, got {pairs}")
    if (existing := _existing(out, pairs=pairs, seed=seed)) is not None:
        return existing

    with new_folder(out) as part:
        summary = _fill(part, pairs=pairs, seed=seed)
        (part / _MARK).write_text(json.dumps(asdict(summary), indent=1) + "\n", encoding="utf-8")
    return summary


def _existing(out: Path, *, pairs: int, seed: int) -> SampleSummary | None:
    """The sample in `out` if it is the wanted one, None if the place is free."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    fix = "Give another folder for the sample, or remove this one."
    if not (out / _MARK).is_file():
        raise DataError(f"{out}: already there, and not a sample (no {_MARK} in it).", fix=fix)

    try:
        recorded = json.loads((out / _MARK).read_text(encoding="utf-8"))
        summary = SampleSummary(**recorded)
    except (ValueError, TypeError) as error:
        raise DataError(f"{out / _MARK}: not the description of a sample ({error}).", fix=fix) from error

    wanted = {"version": VERSION, "seed": seed, "pairs": pairs}
    other = [f"{name} {recorded[name]}, not {value}" for name, value in wanted.items() if recorded[name] != value]
    if other:
        raise DataError(f"{out}: already holds another sample ({'; '.join(other)}).", fix=fix)
    return summary


def _fill(folder: Path, *, pairs: int, seed: int) -> SampleSummary:
    entries = _plan(pairs, random.Random(f"{seed}/plan"))
    kinds = [entry.kind for entry in entries]
    heldout = max(10, pairs // 16)

    book, rng = SceneBook(), random.Random(f"{seed}/scenes")
    scenes = [book.new(rng) for _ in range(kinds.count("original") + heldout)]
    fresh = len(scenes) - heldout
    samples = (_pair(row, entry, scenes[entry.group], seed) for row, entry in enumerate(entries))
    _write_shards(folder / "pairs", samples, pairs)

    # A brief caption fits many pictures, and retrieval asks for one.
    firsts = (
        _pair(row, _Entry(fresh + row, "original"), scenes[fresh + row], seed, brief_share=0.0)
        for row in range(heldout)
    )
    _write_shards(folder / "heldout", firsts, heldout)

    for name, labelled in LABELLED_SETS.items():
        _write_set(folder / "sets" / name, labelled, random.Random(f"{seed}/{name}"), book, pairs)
    return SampleSummary(
        version=VERSION,
        seed=seed,
        pairs=pairs,
        originals=kinds.count("original"),
        perceptual=kinds.count("perceptual"),
        semantic=kinds.count("semantic"),
        heldout=heldout,
        sets={name: len(labelled.classes) for name, labelled in LABELLED_SETS.items()},
    )


def _plan(pairs: int, rng: random.Random) -> list[_Entry]:
    """Which scene each pair shows and how, in a random order. A few scenes have many copies, most have none."""
    copies = round(pairs * _DUPLICATES)
    originals = pairs - copies
    popularity = [rank**-_POPULARITY for rank in range(1, originals + 1)]

    copied = rng.choices(rng.sample(range(originals), originals), popularity, k=copies)
    entries = [_Entry(group, "original") for group in range(originals)]
    entries += [_Entry(group, "perceptual" if rng.random() < _PERCEPTUAL else "semantic") for group in copied]
    rng.shuffle(entries)
    return entries


def _pair(row: int, entry: _Entry, scene: Scene, seed: int, *, brief_share: float = BRIEF_SHARE) -> tuple[str, Members]:
    """Key and files of one pair. Its own random numbers make it independent of all others."""
    first = random.Random(f"{seed}/scene {entry.group}")
    own = random.Random(f"{seed}/pair {row}")
    drawing = own if entry.kind == "semantic" else first
    captions = _captions(scene, drawing, brief_share)
    picture = draw_scene(scene, drawing)
    suffix, image = ("jpg", _jpeg(picture, 90)) if entry.kind != "perceptual" else _saved_again(picture, own)

    fields: dict[str, Any] = {
        "source": "clip-cid sample",
        "dup": f"scene-{entry.group:06d}",
        "object": scene.thing.object,
        "background": scene.background,
        "kind": entry.kind,
    }
    if len(captions) > 1:
        fields["captions"] = captions
    fields["scene"] = asdict(scene)

    text = json.dumps(fields, separators=(",", ":"))
    return f"{row:06d}", {suffix: image, "txt": captions[0].encode(), "json": text.encode()}


def _captions(scene: Scene, rng: random.Random, brief_share: float) -> list[str]:
    """One caption, or for some pairs several different ones."""
    wanted = rng.randint(2, 5) if rng.random() < _SEVERAL_CAPTIONS else 1
    return list(dict.fromkeys(caption(scene, rng, brief_share=brief_share) for _ in range(wanted)))


def _saved_again(picture: Image.Image, rng: random.Random) -> tuple[str, bytes]:
    """A near-pixel copy: up to a pixel cut from each side, a little brighter or darker, compressed harder."""
    left, top, right, bottom = (rng.randint(0, 1) for _ in range(4))
    cut = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(left, top, SIZE - right, SIZE - bottom))
    copy = ImageEnhance.Brightness(cut).enhance(rng.uniform(0.92, 1.08))
    if rng.random() < 0.2:
        buffer = io.BytesIO()
        copy.save(buffer, "WEBP", quality=rng.randint(60, 90), method=0)
        return "webp", buffer.getvalue()
    return "jpg", _jpeg(copy, rng.randint(60, 90))


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def _write_set(folder: Path, labelled: LabelledSet, rng: random.Random, book: SceneBook, pairs: int) -> None:
    """One labelled set: its classes are equally frequent, and none of its scenes is among the pairs."""
    folder.mkdir(parents=True)
    _write_lines(folder / "classnames.txt", labelled.classes)
    _write_lines(folder / "zeroshot_classification_templates.txt", labelled.templates)
    largest = max(2, min(labelled.largest, labelled.largest * pairs // 4_000))
    for split in ("train", "test"):
        labels = [label for label in range(len(labelled.classes)) for _ in range(largest)]
        rng.shuffle(labels)
        samples = (
            (
                f"{split}-{row:05d}",
                {"jpg": _jpeg(draw_scene(_unseen(labelled, label, rng, book), rng), 90), "cls": b"%d" % label},
            )
            for row, label in enumerate(labels)
        )
        _write_tar(folder / split / "0.tar", samples)
        _write_lines(folder / split / "nshards.txt", ["1"])


def _unseen(labelled: LabelledSet, label: int, rng: random.Random, book: SceneBook) -> Scene:
    while (scene := labelled.scene(label, rng)) in book:
        pass
    return scene


def _write_shards(folder: Path, samples: Iterator[tuple[str, Members]], rows: int) -> None:
    for shard, start in enumerate(range(0, rows, _SHARD)):
        _write_tar(folder / f"pairs-{shard:04d}.tar", itertools.islice(samples, min(_SHARD, rows - start)))


def _write_tar(path: Path, samples: Iterable[tuple[str, Members]]) -> None:
    """A WebDataset shard whose bytes depend on nothing but the samples: no times, no owners."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
