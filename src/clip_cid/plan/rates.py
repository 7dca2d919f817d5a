"""How fast this machine is: measured for about a minute, beside what a check has measured."""

import dataclasses
import functools
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from clip_cid import tasks
from clip_cid.check import Report
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.pairs.images import decode_image
from clip_cid.data.pairs.pair import BadSample
from clip_cid.data.pairs.pairs import Pairs, open_pairs
from clip_cid.data.pairs.sources import find_sources
from clip_cid.deciding_settings import is_local
from clip_cid.method.balance.plan_choice import make_plan
from clip_cid.method.balance.semantic_balance import BalanceRule, balance
from clip_cid.method.cluster.clustering import assign
from clip_cid.method.unit_rows import UnitRows
from clip_cid.models.teacher import load_teacher
from clip_cid.recipe import Recipe
from clip_cid.run_folder import RunFolder
from clip_cid.stage_names import EMBED

_SECONDS = 3.0  # of each measurement, about
_ROWS = 4_096  # of the store that balance and clusters are tried on
_CENTERS = 2_048
_TEACHER_BATCH, _TEACHER_BATCHES = 32, 3
_SIDE_CUDA, _SIDE_CPU = 16_384, 1_024  # of the matrices that are multiplied
_FILE_BYTES, _FILES = 1 << 27, 200


@dataclasses.dataclass(frozen=True)
class Rates:
    """Seconds and bytes a second, on one device of this machine."""

    device: torch.device
    index: float
    """Seconds a pair."""
    pair_bytes: float
    """Of an encoded image and its captions."""
    teacher: float | None
    """Seconds a pair, decoding included; None if the teacher is not here, and arithmetic has to do."""
    teacher_how: str
    product: float
    """Multiplications and additions a second, of the kind that balance uses on CUDA; in float32 on a CPU."""
    balance_row: float
    """Seconds a row that balance takes beside the comparison of pairs."""
    assign_row: float
    """Seconds a row that is assigned to a center, whatever their number."""
    assign_center: float
    """Seconds a row and center."""
    rows_how: str
    """Which rows balance and clusters were tried on."""
    sha256: float
    """Bytes a second."""
    write: float
    """Bytes a second onto the disk of the run."""
    read: float
    opening: float
    """Seconds to open a file there."""
    pair_seconds: Callable[[int], float]
    """Seconds in which balance compares all pairs of so many rows."""


def first_source(recipe: Recipe) -> tuple[Pairs, float]:
    """The pairs of the first source, and the seconds it takes to index one of them."""
    sources = find_sources(recipe.pairs)
    one = recipe.pairs.model_copy(update={"source": (sources[0].name,)})

    def timed() -> tuple[Pairs, float]:
        started = time.perf_counter()
        pairs = open_pairs(one, index=None, cache_dir=recipe.machine.cache_dir)
        return pairs, time.perf_counter() - started

    pairs, seconds = timed()
    if seconds < _SECONDS:  # of few pairs the first time is that of the libraries
        pairs, seconds = timed()
    return pairs, seconds / len(pairs)


def measure(folder: RunFolder, recipe: Recipe, report: Report, pairs: Pairs, index: float, *, width: int) -> Rates:
    """Measure what a check does not.

    Args:
        folder: Whose disk and rows are used.
        recipe: The settings.
        report: Of a check.
        pairs: Some of the run's.
        index: Seconds it took to index one of them.
        width: Of the teacher's embeddings.
    """
    device = report.device
    teacher, teacher_how, pair_bytes = _teacher(recipe, report, pairs)
    product = _product(device)
    rows, rows_how = _some_rows(folder, report, width)
    balance_row = _balance_row(recipe, rows) if recipe.has_teacher else 0.0
    assign_row, assign_center = _assignment(rows, device) if recipe.has_teacher else (0.0, 0.0)
    write, read, opening = _disk(folder.path)
    return Rates(
        device=device,
        index=index,
        pair_bytes=pair_bytes,
        teacher=teacher,
        teacher_how=teacher_how,
        product=product,
        balance_row=balance_row,
        assign_row=assign_row,
        assign_center=assign_center,
        rows_how=rows_how,
        sha256=_sha256(),
        write=write,
        read=read,
        opening=opening,
        pair_seconds=functools.cache(lambda count: _pair_seconds(count, rows, recipe, device, product)),
    )


def _teacher(recipe: Recipe, report: Report, pairs: Pairs) -> tuple[float | None, str, float]:
    """Seconds of a pair with the teacher, how they are known, and the bytes of a pair."""
    chosen = range(min(_TEACHER_BATCH * _TEACHER_BATCHES, len(pairs)))
    read = [pair for pair in (_read(pairs, row) for row in chosen) if pair is not None]
    pair_bytes = float(np.mean([len(pair.image) + sum(map(len, pair.captions)) for pair in read] or [0]))
    if report.embed_seconds is not None:
        seconds = report.embed_seconds / (report.pairs + report.held_out)
        return seconds, "measured by the embed stage, with its workers", pair_bytes
    if recipe.embed.existing is not None or not is_local(recipe.embed.teacher):
        return None, "arithmetic: its FLOPs at the speed of the student's steps", pair_bytes

    encoder = load_teacher(recipe.embed, device=str(report.device))
    images, tries = 1 + recipe.embed.views, list[tuple[float, float]]()
    for start in range(0, len(read), _TEACHER_BATCH):
        batch = read[start : start + _TEACHER_BATCH]
        started = time.perf_counter()
        pixels = [encoder.preprocess(decode_image(pair.image, max_pixels=recipe.pairs.max_pixels)) for pair in batch]
        decoded = time.perf_counter()
        for _ in range(images):
            encoder.encode_images(torch.stack(pixels))
        encoder.encode_texts([pair.captions[0] if pair.captions else "" for pair in batch])
        _finish(report.device)
        tries.append(((decoded - started) * images / len(batch), (time.perf_counter() - decoded) / len(batch)))

    # The least of each: the first batch is slower.
    decoding, encoding = map(min, zip(*tries, strict=True))
    workers = recipe.machine.workers
    seconds = max(decoding / workers, encoding) if workers else decoding + encoding
    return seconds, f"measured: {len(tries)} batches of up to {_TEACHER_BATCH} pairs, {workers} workers", pair_bytes


def _read(pairs: Pairs, row: int) -> Any:
    try:
        return pairs.read(row)
    except BadSample:
        return None


def _some_rows(folder: RunFolder, report: Report, width: int) -> tuple[Float[np.ndarray, "rows dim"], str]:
    """Rows of the store; where there is none, random ones, none of which is near to another."""
    random = np.random.default_rng(0)
    if report.teacher is not None and not any(state.stage.name == EMBED for state in report.undone):
        store = EmbeddingStore.open(folder.stage(EMBED))
        good = np.flatnonzero(store.ok)
        chosen = np.sort(random.permutation(good)[:_ROWS])
        return store.images[chosen].astype(np.float32), f"sampled: {len(chosen):,} rows of the store"
    rows = random.standard_normal((_ROWS, width), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows, f"arithmetic: {_ROWS:,} random rows, for want of embeddings"


def _balance_row(recipe: Recipe, rows: Float[np.ndarray, "rows dim"]) -> float:
    settings = recipe.balance
    some = rows[:_ROWS]
    return _seconds(lambda: balance(some, threshold=settings.threshold, metric=settings.metric)) / len(some)


def _assignment(rows: Float[np.ndarray, "rows dim"], device: torch.device) -> tuple[float, float]:
    """Seconds a row, and seconds a row and center: the line through two numbers of centers."""
    many = min(_CENTERS, len(rows) // 2)
    few = max(many // 8, 1)
    on = "cuda" if device.type == "cuda" else "cpu"
    some, centers = rows[: min(len(rows), _ROWS)], rows[:many]
    by_few, by_many = (_seconds(lambda k=k: assign(some, centers[:k], device=on)) / len(some) for k in (few, many))
    slope = max(by_many - by_few, 0.0) / (many - few)
    return max(by_few - slope * few, 0.0), slope


def _product(device: torch.device) -> float:
    side, kind = (_SIDE_CUDA, torch.float16) if device.type == "cuda" else (_SIDE_CPU, torch.float32)
    matrix = torch.ones(side, side, device=device, dtype=kind)

    def multiply() -> None:
        _ = matrix @ matrix
        _finish(device)

    return side**3 / _seconds(multiply)


def _pair_seconds(
    count: int, rows: Float[np.ndarray, "rows dim"], recipe: Recipe, device: torch.device, product: float
) -> float:
    """As balance itself estimates it, from rows like these; on CUDA it multiplies all pairs."""
    width = rows.shape[1]
    if device.type == "cuda":
        return count * count / 2 * width / product
    limit = BalanceRule(threshold=recipe.balance.threshold, metric=recipe.balance.metric).limit
    like = UnitRows(_Likeness(rows, count), name="rows", any_length=True, lengths=np.broadcast_to(np.ones(1), count))
    layout = make_plan(like, limit)
    if layout.estimate is None:
        return count * count / 2 * width / product
    cores = recipe.machine.balance_processes or recipe.machine.threads or tasks.available_cores()
    return layout.estimate.seconds / cores


class _Likeness:
    """So many rows like those of a sample, which no memory holds.

    Whatever rows are asked for, those of the sample are given in their order: what is drawn from all has no row twice.
    """

    def __init__(self, rows: Float[np.ndarray, "rows dim"], count: int) -> None:
        self._rows, self.shape = rows, (count, rows.shape[1])

    def __getitem__(self, index: slice | Int[np.ndarray, " n"]) -> Float[np.ndarray, "n dim"]:
        count = len(range(*index.indices(self.shape[0]))) if isinstance(index, slice) else len(index)
        return self._rows[np.arange(count) % len(self._rows)]


def _sha256() -> float:
    data = bytes(_FILE_BYTES // 8)
    return len(data) / _seconds(lambda: hashlib.sha256(data).digest())


def _disk(run: Path) -> tuple[float, float, float]:
    """Bytes written and read a second, and the seconds to open a file, in a folder that is removed again."""
    beside = next(parent for parent in (run.absolute(), *run.absolute().parents) if parent.is_dir())
    data = np.random.default_rng(0).bytes(_FILE_BYTES)
    with tempfile.TemporaryDirectory(prefix=".clip-cid-plan-", dir=beside) as scratch:
        large = Path(scratch, "large")
        started = time.perf_counter()
        with large.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
            written = time.perf_counter() - started
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # else the memory is read

        started = time.perf_counter()
        with large.open("rb") as handle:
            while handle.read(1 << 22):
                pass
        read = time.perf_counter() - started

        for number in range(_FILES):
            Path(scratch, f"{number}").write_bytes(b"x")
        started = time.perf_counter()
        for number in range(_FILES):
            Path(scratch, f"{number}").read_bytes()
        opening = (time.perf_counter() - started) / _FILES
    return _FILE_BYTES / written, _FILE_BYTES / read, opening


def _seconds(work: Callable[[], Any]) -> float:
    """The least of some tries, after one that does not count."""
    work()
    tries: list[float] = []
    while not tries or (sum(tries) < _SECONDS and len(tries) < 5):
        started = time.perf_counter()
        work()
        tries.append(time.perf_counter() - started)
    return min(tries)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
