"""How fast this machine is: measured for about a minute, beside what a check has measured."""

import contextlib
import dataclasses
import functools
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from clip_cid import tasks
from clip_cid.check import Report
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.pairs.images import decode_image
from clip_cid.data.pairs.pair import BadSample, Pair
from clip_cid.data.pairs.pairs import Pairs, open_pairs
from clip_cid.data.pairs.sources import find_sources
from clip_cid.deciding_settings import is_local
from clip_cid.method.balance.pair_plan import Layout
from clip_cid.method.balance.plan_choice import make_plan
from clip_cid.method.balance.semantic_balance import BalanceRule, balance
from clip_cid.method.cluster.clustering import assign
from clip_cid.method.unit_rows import UnitRows
from clip_cid.models.teacher import load_teacher
from clip_cid.recipe import Recipe
from clip_cid.run_folder import RunFolder
from clip_cid.stage_names import EMBED

_SECONDS = 3.0  # of each measurement, about
_ROWS, _NUMBERS = 65_536, 1 << 25  # of the store that balance is tried on; from 20,000 rows on it plans as for many
_ROWS_ASSIGNED = 4_096
_CENTERS = 2_048
_TEACHER_BATCHES, _TEACHER_BATCH_CPU = 3, 32
_LOOKED_AT = 100  # pairs
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
    captions: float
    """Of a pair."""
    teacher: float | None
    """Seconds a pair, decoding included; None if the teacher is not here, and arithmetic has to do."""
    teacher_how: str
    product: float
    """Multiplications and additions a second, of the kind that balance uses on CUDA; in float32 on a CPU."""
    balance: Callable[[int], float]
    """Seconds of a balance of so many rows."""
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
    teacher, teacher_how = _teacher(recipe, report, pairs)
    looked_at = _some_pairs(pairs, range(min(_LOOKED_AT, len(pairs))))
    pair_bytes = float(np.mean([len(pair.image) + sum(map(len, pair.captions)) for pair in looked_at] or [0]))
    captions = float(np.mean([len(pair.captions) for pair in looked_at] or [1]))
    product = _product(device)
    rows, rows_how = _some_rows(folder, report, width)
    assign_row, assign_center = _assignment(rows, device) if recipe.has_teacher else (0.0, 0.0)
    write, read, opening = _disk(folder.path)
    return Rates(
        device=device,
        index=index,
        pair_bytes=pair_bytes,
        captions=captions,
        teacher=teacher,
        teacher_how=teacher_how,
        product=product,
        balance=_balance(recipe, rows, device, product) if recipe.has_teacher else lambda _: 0.0,
        assign_row=assign_row,
        assign_center=assign_center,
        rows_how=rows_how,
        sha256=_sha256(),
        write=write,
        read=read,
        opening=opening,
    )


def _teacher(recipe: Recipe, report: Report, pairs: Pairs) -> tuple[float | None, str]:
    """Seconds of a pair with the teacher, and how they are known."""
    if report.embed_seconds is not None:
        return report.embed_seconds / (report.pairs + report.held_out), "measured by the embed stage, with its workers"
    if recipe.embed.existing is not None or not is_local(recipe.embed.teacher):
        return None, "arithmetic: its FLOPs at the speed of the student's steps"

    encoder = load_teacher(recipe.embed, device=str(report.device))
    size = recipe.machine.embed_batch if report.device.type == "cuda" else _TEACHER_BATCH_CPU
    size = min(size, max(len(pairs) // _TEACHER_BATCHES, 1))
    images, tries = 1 + recipe.embed.views, list[tuple[float, float]]()
    for start in range(0, _TEACHER_BATCHES * size, size):
        started = time.perf_counter()
        read = _some_pairs(pairs, range(start, min(start + size, len(pairs))))
        pixels = [encoder.preprocess(decode_image(pair.image, max_pixels=recipe.pairs.max_pixels)) for pair in read]
        decoded = time.perf_counter()
        if not read:
            continue
        for _ in range(images):
            encoder.encode_images(torch.stack(pixels))
        encoder.encode_texts([caption for pair in read for caption in pair.captions or ("",)])
        _finish(report.device)
        tries.append(((decoded - started) * images / len(read), (time.perf_counter() - decoded) / len(read)))
    if not tries:
        return None, "arithmetic: none of the first pairs can be read"

    decoding, encoding = (statistics.median(seconds) for seconds in zip(*tries, strict=True))
    workers = recipe.machine.workers
    seconds = max(decoding / workers, encoding) if workers else decoding + encoding
    return seconds, f"measured: {len(tries)} batches of {size} pairs, {workers} workers"


def _some_pairs(pairs: Pairs, rows: Iterable[int]) -> list[Pair]:
    """Those of some rows that can be used."""
    read: list[Pair] = []
    for row in rows:
        with contextlib.suppress(BadSample):
            read.append(pairs.read(row))
    return read


def _some_rows(folder: RunFolder, report: Report, width: int) -> tuple[Float[np.ndarray, "rows dim"], str]:
    """Rows of the store; where there is none, random ones, none of which is near to another."""
    random, most = np.random.default_rng(0), min(_ROWS, _NUMBERS // width)
    if report.teacher is not None and not any(state.stage.name == EMBED for state in report.undone):
        store = EmbeddingStore.open(folder.stage(EMBED))
        good = np.flatnonzero(store.ok)
        chosen = np.sort(random.permutation(good)[:most])
        return store.images[chosen].astype(np.float32), f"sampled: {len(chosen):,} rows of the store"
    rows = random.standard_normal((most, width), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows, f"arithmetic: {most:,} random rows, for want of embeddings"


def _balance(
    recipe: Recipe, rows: Float[np.ndarray, "rows dim"], device: torch.device, product: float
) -> Callable[[int], float]:
    """Seconds of a balance of so many rows like these: as it estimates itself, corrected by one that is made.

    On CUDA it multiplies all pairs and estimates nothing, as it does of few rows; then a row takes what it took here.
    """
    rule = BalanceRule(threshold=recipe.balance.threshold, metric=recipe.balance.metric)
    layouts: list[Layout] = []
    started = time.perf_counter()
    balance(rows, threshold=rule.threshold, metric=rule.metric, on_plan=layouts.append)
    seconds = time.perf_counter() - started
    estimate, width = layouts[0].estimate, rows.shape[1]
    cores = recipe.machine.balance_processes or recipe.machine.threads or tasks.available_cores()

    def of_all_pairs(count: int) -> float:
        return count * count / 2 * width / product

    @functools.cache
    def seconds_of(count: int) -> float:
        if device.type != "cuda" and estimate is not None:
            like = np.broadcast_to(np.ones(1), count)
            images = UnitRows(_Likeness(rows, count), name="rows", any_length=True, lengths=like)
            if (expected := make_plan(images, rule.limit).estimate) is not None:
                return expected.seconds * seconds / estimate.seconds / cores
        return of_all_pairs(count) + max(seconds - of_all_pairs(len(rows)), 0.0) / len(rows) * count

    return seconds_of


def _assignment(rows: Float[np.ndarray, "rows dim"], device: torch.device) -> tuple[float, float]:
    """Seconds a row, and seconds a row and center: the line through two numbers of centers."""
    many = min(_CENTERS, len(rows) // 2)
    few = max(many // 8, 1)
    on = "cuda" if device.type == "cuda" else "cpu"
    some, centers = rows[:_ROWS_ASSIGNED], rows[:many]
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
