"""How fast pairs are read, beside webdataset's and datasets' own readers: samples for a second of one core.

The same photographs-like pictures are written as tars, as Parquet of the Hub's form, as a CSV beside files, and as a
folder. Readers take turns, and the least CPU time of all turns counts, so that other work on the machine does no harm.
All give one caption and either the bytes of the image or its pixels in RGB. Needs `pip install datasets`.

    python benchmarks/reading_speed.py [--pairs 2000] [--side 256] [--turns 5]
"""

import argparse
import contextlib
import csv
import importlib
import io
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from webdataset.compat import WebDataset

from clip_cid.data.pairs.images import decode_image
from clip_cid.data.pairs.pairs import Pairs, open_pairs
from clip_cid.recipe import PairsConfig

datasets: Any = importlib.import_module("datasets")  # which only this script needs
SHARDS = 4
Reader = Callable[[bool], Iterable[Any]]
"""Takes whether pixels are wanted, and gives every sample once."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    datasets.disable_progress_bars()

    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
        folder = Path(name)
        pictures = [picture(number, given.side) for number in range(given.pairs)]
        captions = [f"picture number {number} of many" for number in range(given.pairs)]
        write(folder, pictures, captions)
        print(f"{given.pairs:,} JPEGs, {sum(map(len, pictures)) / given.pairs / 1e3:.1f} kB each")
        print("\nCPU seconds before the first sample, once for the data")
        found = readers(folder, given.pairs)
        for pixels in (False, True):
            print(f"\nsamples for a CPU second, {'pixels in RGB' if pixels else 'bytes of the image'}")
            report(found, pixels, given.pairs, given.turns)


def picture(number: int, side: int) -> bytes:
    """Smooth color with some grain, which JPEG compresses about as a photograph."""
    random = np.random.default_rng(number)
    coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    grain = random.integers(-12, 13, (side, side, 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def write(folder: Path, pictures: list[bytes], captions: list[str]) -> None:
    for form in ("tars", "parquet", "files"):
        (folder / form).mkdir()
    each = -(-len(pictures) // SHARDS)
    for shard in range(SHARDS):
        rows = range(shard * each, min((shard + 1) * each, len(pictures)))
        with tarfile.open(folder / f"tars/{shard:05d}.tar", "w") as tar:
            for row in rows:
                for ending, data in (("jpg", pictures[row]), ("txt", captions[row].encode())):
                    member = tarfile.TarInfo(f"{row:06d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        images = [{"bytes": pictures[row], "path": f"{row:06d}.jpg"} for row in rows]
        features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
        table = datasets.Dataset.from_dict({"image": images, "caption": [captions[row] for row in rows]}, features)
        table.to_parquet(folder / f"parquet/train-{shard:05d}.parquet")

    for row, (data, caption) in enumerate(zip(pictures, captions, strict=True)):
        (folder / f"files/{row:06d}.jpg").write_bytes(data)
        (folder / f"files/{row:06d}.txt").write_text(caption)
    with (folder / "files/pairs.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerows([("image", "caption"), *((f"{row:06d}.jpg", caption) for row, caption in enumerate(captions))])


def readers(folder: Path, count: int) -> dict[str, Reader]:
    shuffled = np.random.default_rng(0).permutation(count).tolist()
    found: dict[str, Reader] = {}
    forms = {"tars": "tars/*.tar", "Hub Parquet": "parquet/*.parquet", "CSV": "files/pairs.csv", "folder": "files"}
    for form, source in forms.items():
        with opening(f"{form}, clip-cid: its index"):
            pairs = open_pairs(PairsConfig(source=(f"{folder}/{source}",)), index=folder / f"index-{form}")
        for order, rows in (("in order", range(count)), ("shuffled", shuffled)):
            found[f"{form}, clip-cid, {order}"] = lambda pixels, pairs=pairs, rows=rows: ours(pairs, rows, pixels)

    tars = sorted(str(path) for path in folder.glob("tars/*.tar"))
    found["tars, webdataset, in order"] = lambda pixels: of_webdataset(tars, pixels)
    files = sorted(str(path) for path in folder.glob("parquet/*.parquet"))
    with opening("Hub Parquet, datasets: its copy in Arrow"):
        loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "cache"))
    for order, rows in (("in order", range(count)), ("shuffled", shuffled)):
        found[f"Hub Parquet, datasets, {order}"] = lambda pixels, rows=rows: of_datasets(loaded, rows, pixels)
    found["Hub Parquet, datasets streaming, in order"] = lambda pixels: streamed("parquet", files, pixels)
    found["tars, datasets streaming, in order"] = lambda pixels: streamed("webdataset", tars, pixels)
    return dict(sorted(found.items()))


@contextlib.contextmanager
def opening(what: str) -> Iterator[None]:
    started = time.process_time()
    yield
    print(f"  {what:<44} {time.process_time() - started:10.2f}", flush=True)


def ours(pairs: Pairs, rows: Iterable[int], pixels: bool) -> Iterator[Any]:
    for row in rows:
        pair = pairs.read(row)
        yield decode_image(pair.image, max_pixels=10**8) if pixels else pair.image, pair.captions[0]


def of_webdataset(tars: list[str], pixels: bool) -> Iterable[Any]:
    samples: Any = WebDataset(tars, shardshuffle=False)
    return (samples.decode("pil") if pixels else samples).to_tuple("jpg", "txt")


def of_datasets(loaded: Any, rows: Iterable[int], pixels: bool) -> Iterator[Any]:
    table = loaded.cast_column("image", datasets.Image(decode=pixels))
    for row in rows:
        sample = table[row]
        yield _rgb(sample["image"]) if pixels else sample["image"]["bytes"], sample["caption"]


def streamed(form: str, files: list[str], pixels: bool) -> Iterator[Any]:
    samples = datasets.load_dataset(form, data_files=files, split="train", streaming=True)
    image, caption = ("image", "caption") if form == "parquet" else ("jpg", "txt")
    for sample in samples.cast_column(image, datasets.Image(decode=pixels)):
        yield _rgb(sample[image]) if pixels else sample[image], sample[caption]


def _rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def report(found: dict[str, Reader], pixels: bool, count: int, turns: int) -> None:
    least = dict.fromkeys(found, float("inf"))
    for _ in range(turns):
        for name, reader in found.items():
            started = time.process_time()
            samples = sum(1 for _ in reader(pixels))
            least[name] = min(least[name], time.process_time() - started)
            assert samples == count, name
    for name, seconds in least.items():
        print(f"  {name:<44} {count / seconds:10,.0f}", flush=True)


if __name__ == "__main__":
    main()
