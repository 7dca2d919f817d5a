"""Teacher embeddings of every pair, computed once (paper sections 3.1 to 3.3)."""

import collections
import contextlib
import hashlib
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clip_cid import log, units
from clip_cid.data.embeddings.importing import import_existing
from clip_cid.data.embeddings.store import EmbeddingStore, join
from clip_cid.data.embeddings.writer import ShardRows, StoreWriter
from clip_cid.data.pairs.images import decode_image
from clip_cid.data.pairs.pairs import BadSample, Pairs, Shard, fingerprint, open_pairs, reason_kind
from clip_cid.errors import DataError, RunError
from clip_cid.models.teacher import Teacher, load_teacher
from clip_cid.recipe import MachineConfig, Recipe
from clip_cid.run_folder import RunFolder, disk_full


def run(folder: RunFolder, out: Path, recipe: Recipe) -> dict[str, Any]:
    """Write the embedding store, or (`embed.existing`) take over one made elsewhere."""
    if recipe.embed.existing is not None:
        return _take_over(recipe.embed.existing, folder, out, recipe)
    pairs = _open(folder, recipe)
    teacher = load_teacher(recipe.embed, device=recipe.machine.device)
    writer = StoreWriter(
        out,
        teacher=teacher.identity,
        pairs=hashlib.sha256(json.dumps(fingerprint(recipe.pairs)).encode()).hexdigest(),
        dim=teacher.dim,
        fields=recipe.pairs.keep_fields,
        num_shards=len(pairs.shards),
    )
    log.info(
        f"embed     teacher {teacher.identity['reference']}: {teacher.dim} dimensions, {teacher.identity['precision']}"
    )
    before, started = writer.rows, time.monotonic()
    with _room(out, writer, pairs, dim=teacher.dim):
        _embed(pairs, teacher, writer, recipe)
        writer.finish()
    rate = (len(pairs) - before) / max(time.monotonic() - started, 1e-9)
    skipped = collections.Counter(reason_kind(entry["reason"]) for entry in writer.skipped)
    return _summary(EmbeddingStore.open(out)) | {"skipped": dict(skipped.most_common()), "images_per_s": round(rate, 1)}


class _Item(NamedTuple):
    """A row as a worker hands it over."""

    pixels: Tensor | None
    """Preprocessed; None when the row cannot be used."""
    captions: tuple[str, ...]
    fields: dict[str, str]
    size: tuple[int, int]
    reason: str
    """Why the row cannot be used."""


class _Batch(NamedTuple):
    rows: list[int]
    images: Tensor
    """Of the usable rows, in order."""
    items: list[_Item]
    error: tuple[str, str] | None
    """Problem and fix of a DataError in the worker (torch cannot carry our exceptions between processes)."""


class _PairImages(Dataset[tuple[int, _Item | DataError]]):
    """Reads, decodes and preprocesses rows, in worker processes."""

    def __init__(
        self, pairs: Pairs, preprocess: Callable[[Image.Image], Tensor], *, side: int, max_pixels: int
    ) -> None:
        self._pairs, self._preprocess = pairs, preprocess
        self._side, self._max_pixels = side, max_pixels

    def __getitem__(self, row: int) -> tuple[int, _Item | DataError]:
        try:
            return row, self._item(row)
        except DataError as error:
            return row, error

    def _item(self, row: int) -> _Item:
        captions: tuple[str, ...] = ()
        fields: dict[str, str] = {}
        try:
            pair = self._pairs.read(row)
            captions, fields = pair.captions, pair.fields
            image = decode_image(pair.image, max_pixels=self._max_pixels)
            _check_shape(image.size, self._side, self._max_pixels)
            return _Item(self._preprocess(image), captions, fields, image.size, "")
        except BadSample as error:
            return _Item(None, captions, fields, (0, 0), error.reason)


def _check_shape(size: tuple[int, int], side: int, max_pixels: int) -> None:
    """The shorter side is resized to the model's, so a very narrow image would grow into a bomb."""
    if max(size) / min(size) * side * side > max_pixels:
        raise BadSample(f"image is too narrow ({size[0]} x {size[1]} pixels)")


def _collate(items: list[tuple[int, _Item | DataError]]) -> _Batch:
    errors = [(item.problem, item.fix) for _, item in items if isinstance(item, DataError)]
    rows = [row for row, _ in items]
    good = [item for _, item in items if isinstance(item, _Item)]
    pixels = [item.pixels for item in good if item.pixels is not None]
    images = torch.stack(pixels) if pixels else torch.empty(0, 3, 1, 1)
    return _Batch(rows, images, [item._replace(pixels=None) for item in good], errors[0] if errors else None)


class _ShardBatches:
    """Rows in order; a batch never crosses from one shard into the next, so a resumed run has the same batches."""

    def __init__(self, shards: tuple[Shard, ...], batch: int) -> None:
        self._shards, self._batch = shards, batch

    def __iter__(self) -> Iterator[list[int]]:
        for shard in self._shards:
            end = shard.first_row + shard.rows
            for start in range(shard.first_row, end, self._batch):
                yield list(range(start, min(start + self._batch, end)))

    def __len__(self) -> int:
        return sum(-(-shard.rows // self._batch) for shard in self._shards)


class _ShardInProgress:
    """The rows of one shard as they come in."""

    def __init__(self, pairs: Pairs, shard: Shard, *, dim: int, fields: tuple[str, ...]) -> None:
        self.shard, self.filled = shard, 0
        self.keys = pairs.keys(shard.first_row, shard.first_row + shard.rows)
        self.images = np.zeros((shard.rows, dim), dtype=np.float16)
        self.texts = np.zeros_like(self.images)
        self.more_texts: list[np.ndarray] = []
        self.ok = np.zeros(shard.rows, dtype=bool)
        self.captions: list[tuple[str, ...]] = []
        self.sizes: list[tuple[int, int]] = []
        self.fields: dict[str, list[str]] = {name: [] for name in fields}
        self.skipped: list[dict[str, Any]] = []

    def take(self, batch: _Batch, teacher: Teacher, chunk: int) -> None:
        """Embed a batch and put its rows behind those that are there."""
        ok = np.array([not item.reason for item in batch.items], dtype=bool)
        rows = slice(self.filled, self.filled + len(ok))
        self.ok[rows] = ok
        if ok.any():
            self.images[rows][ok] = _half(teacher.encode_images(batch.images))
            captions = [caption for item in batch.items if not item.reason for caption in item.captions]
            texts = np.concatenate(
                [_half(teacher.encode_texts(captions[at : at + chunk])) for at in range(0, len(captions), chunk)]
            )
            counts = np.array([len(item.captions) for item in batch.items if not item.reason])
            first = np.cumsum(counts) - counts
            self.texts[rows][ok] = texts[first]
            self.more_texts.append(np.delete(texts, first, axis=0))
        for row, item in zip(batch.rows, batch.items, strict=True):
            self._note(row, item)
        self.filled += len(ok)

    def _note(self, row: int, item: _Item) -> None:
        self.captions.append(item.captions)
        self.sizes.append(item.size)
        for name, values in self.fields.items():
            values.append(item.fields.get(name, ""))
        if item.reason:
            key = self.keys[row - self.shard.first_row]
            self.skipped.append({"row": row, "key": key, "shard": self.shard.name, "reason": item.reason})

    def finished(self) -> ShardRows:
        return ShardRows(
            name=self.shard.name,
            images=self.images,
            texts=self.texts,
            more_texts=np.concatenate([self.images[:0], *self.more_texts]),
            ok=self.ok,
            keys=self.keys,
            captions=self.captions,
            sizes=self.sizes,
            fields=self.fields,
            skipped=self.skipped,
        )


def _embed(pairs: Pairs, teacher: Teacher, writer: StoreWriter, recipe: Recipe) -> None:
    """All shards that are not finished yet."""
    todo = pairs.shards[len(writer.shards) :]
    first = todo[0].first_row if todo else len(pairs)
    ahead = [_skip(pairs, row, reason) for row, reason in sorted(pairs.known_bad.items()) if row >= first]
    _check_bad_share(writer, ahead, len(pairs), recipe)
    batches = iter(_loader(pairs, todo, teacher, recipe))
    with log.progress("embed", len(pairs), unit="images", start=writer.rows) as bar:
        for shard in todo:
            part = _ShardInProgress(pairs, shard, dim=teacher.dim, fields=recipe.pairs.keep_fields)
            while part.filled < shard.rows:
                batch = _next(batches)
                part.take(batch, teacher, recipe.machine.embed_batch)
                _check_bad_share(writer, part.skipped, len(pairs), recipe)
                bar.advance(len(batch.rows))
            writer.add(part.finished())
    if not any(shard.ok for shard in writer.shards):
        raise DataError(
            f"None of the {len(pairs):,} pairs can be used; see {writer.write_skipped()}.", fix="Mend the pairs."
        )


def _loader(pairs: Pairs, shards: tuple[Shard, ...], teacher: Teacher, recipe: Recipe) -> DataLoader[Any]:
    machine: MachineConfig = recipe.machine
    return DataLoader(
        _PairImages(pairs, teacher.clip.preprocess, side=teacher.clip.image_side, max_pixels=recipe.pairs.max_pixels),
        batch_sampler=_ShardBatches(shards, machine.embed_batch),
        num_workers=machine.workers,
        collate_fn=_collate,
        pin_memory=teacher.clip.device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_parent,
    )


def _next(batches: Iterator[_Batch]) -> _Batch:
    try:
        batch = next(batches)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RunError(
            f"A process that decodes images was killed ({' '.join(str(error).split())[:200]}).",
            fix="Memory or /dev/shm ran out: lower machine.workers (0 decodes in this process) or machine.embed_batch.",
        ) from error
    if batch.error is not None:
        problem, fix = batch.error
        raise DataError(problem, fix=fix)
    return batch


def _check_bad_share(writer: StoreWriter, unfinished: list[dict[str, Any]], total: int, recipe: Recipe) -> None:
    """Stop as soon as the rest cannot bring the share of bad pairs down any more."""
    share = recipe.pairs.max_bad_share
    bad = [*writer.skipped, *unfinished] if len(writer.skipped) + len(unfinished) > share * total else []
    if bad:
        (reason, count), *_ = collections.Counter(reason_kind(entry["reason"]) for entry in bad).most_common(1)
        path = writer.write_skipped(unfinished)
        raise DataError(
            f"{len(bad):,} of {total:,} pairs cannot be used so far, more than pairs.max_bad_share {share:g}; "
            f"most often: {reason} ({count:,}).",
            fix=f"Each is listed in {path}; mend the pairs, or raise pairs.max_bad_share.",
        )


def _skip(pairs: Pairs, row: int, reason: str) -> dict[str, Any]:
    shard = next(shard for shard in reversed(pairs.shards) if shard.first_row <= row)
    return {"row": row, "key": pairs.key(row), "shard": shard.name, "reason": reason}


@contextlib.contextmanager
def _room(out: Path, writer: StoreWriter, pairs: Pairs, *, dim: int) -> Iterator[None]:
    """Refuse to start where the rest of the store has no room, and say so where the room ends on the way."""

    def needed() -> int:
        return (len(pairs) - writer.rows) * dim * 2 * 2  # float16; image and first caption

    free = shutil.disk_usage(out).free
    if free < needed():
        raise RunError(
            f"{out}: {units.size(needed())} are needed for the embeddings, but {units.size(free)} are free.",
            fix="Free some room, or use a run folder on another disk.",
        )
    try:
        yield
    except OSError as error:
        if not disk_full(error):
            raise
        done, total = len(writer.shards), len(pairs.shards)
        raise RunError(
            f"{out}: the disk is full after {done:,} of {total:,} shards ({error}).",
            fix=f"Free at least {units.size(max(needed(), 1_000_000))} and run the same command again;"
            " the finished shards are kept.",
        ) from error


def _take_over(existing: Path, folder: RunFolder, out: Path, recipe: Recipe) -> dict[str, Any]:
    import_existing(existing, out, normalize=recipe.embed.normalize)
    store = EmbeddingStore.open(out)
    if recipe.pairs.source:
        pairs = _open(folder, recipe)
        rows = join(pairs.keys(0, len(pairs)), store, max_absent_share=recipe.pairs.max_bad_share)
        log.info(f"embed     {(rows >= 0).sum():,} of {len(pairs):,} pairs have an embedding in {existing}")
    return _summary(store) | {"skipped": {"not embedded": store.rows - int(store.ok.sum())}, "images_per_s": None}


def _summary(store: EmbeddingStore) -> dict[str, Any]:
    return {
        "images": store.rows,
        "ok": int(store.ok.sum()),
        "dim": store.dim,
        "teacher": store.info.teacher["reference"],
        "bytes": sum(file.bytes for shard in store.info.shards for file in shard.files.values()),
    }


def _open(folder: RunFolder, recipe: Recipe) -> Pairs:
    return open_pairs(recipe.pairs, index=folder.index, cache_dir=recipe.machine.cache_dir)


def _half(embeddings: Tensor) -> np.ndarray:
    return embeddings.half().cpu().numpy()


def _leave_signals_to_the_parent(_: int) -> None:
    """Ctrl-C reaches every process of the group; the main one ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
