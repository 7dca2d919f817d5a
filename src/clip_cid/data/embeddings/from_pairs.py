"""Embeddings of pairs, shard by shard: workers decode, the encoder embeds, the writer keeps each finished shard."""

import collections
import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Float16
from PIL import Image
from torch import Tensor

from clip_cid import log
from clip_cid.data.embeddings.files import read_table
from clip_cid.data.embeddings.finished_shards import FinishedShard, FinishedShards
from clip_cid.data.embeddings.writer import ShardRows, StoreWriter
from clip_cid.data.pairs.contents import (
    ContentsInProgress,
    RowDigest,
    ShardContents,
    digest_of_pair,
    recall_contents,
    shard_contents,
)
from clip_cid.data.pairs.crops import Views
from clip_cid.data.pairs.decoding import decoded_batches
from clip_cid.data.pairs.images import decode_image
from clip_cid.data.pairs.pair import BadSample, reason_kind, remedy
from clip_cid.data.pairs.pairs import Pairs, Shard
from clip_cid.devices import one_ahead
from clip_cid.errors import DataError
from clip_cid.file_digests import FileDigests
from clip_cid.recipe import STORE_COLUMNS, MachineConfig, PairsConfig

_Embedding = Callable[[], Float16[np.ndarray, "rows dim"]]
"""Waits for embeddings that have begun, and gives them."""


@runtime_checkable
class Encoder(Protocol):
    """Gives unit embeddings, such as `models.teacher.Teacher`."""

    @property
    def dim(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def image_side(self) -> int: ...

    @property
    def preprocess(self) -> Callable[[Image.Image], Tensor]: ...

    @property
    def preprocess_crop(self) -> Callable[[Image.Image], Tensor]: ...

    def begin_images(self, images: Tensor) -> _Embedding: ...

    def begin_texts(self, captions: list[str]) -> _Embedding: ...


def embed_pairs(
    pairs: Pairs,
    encoder: Encoder,
    writer: StoreWriter,
    finished: FinishedShards,
    digests: FileDigests,
    settings: PairsConfig,
    machine: MachineConfig,
    made_on: str,
) -> int:
    """Add every shard that `writer` does not have yet; returns the rows that were embedded for it.

    Args:
        pairs: The pairs.
        encoder: The teacher.
        writer: Of the store.
        finished: Shards that other stores hold; those of the same contents are taken over.
        digests: Where the contents of each shard are remembered.
        settings: Of the pairs.
        machine: Batches and processes.
        made_on: The hardware of the encoder.

    Raises:
        DataError: Too many pairs cannot be used, or a source changed.
        RunError: A process that decodes images was killed.
    """
    first = len(writer.shards)
    reused = _shards_to_reuse(pairs, first, finished, digests)
    todo = [_work_on(shard, reused.get(number), writer.views) for number, shard in enumerate(pairs.shards)][first:]
    _say_reused(pairs, reused, todo)

    decoded = _batches(todo, pairs, encoder, writer.views, settings, machine)
    batches = _begun_batches(decoded, encoder, machine.embed_batch)
    remarks = collections.Counter[str]()
    progress = log.progress("embed", len(pairs), unit="images", start=writer.rows)
    with contextlib.closing(decoded), progress as bar:
        for number, shard in enumerate(pairs.shards[first:], start=first):
            if number in reused:
                work = todo[number - first]
                views = _views_of(reused[number], work, writer.views, batches, encoder.dim, bar.advance)
                _take(writer, reused[number], pairs, number, digests, settings.keep_fields, views)
                check_bad_share(writer, [], len(pairs), settings)
                bar.advance(0 if work.views else shard.rows)
                continue

            part = _ShardInProgress(pairs, shard, dim=encoder.dim, fields=settings.keep_fields, views=writer.views)
            while part.filled < shard.rows:
                batch = next(batches)
                part.add(batch)
                remarks.update(reason_kind(item.remark) for item in batch.items if item.remark)
                check_bad_share(writer, part.skipped, len(pairs), settings)
                bar.advance(len(batch.items))
            writer.add(part.finished(part.contents.keep(pairs, number, digests), made_on))

    warn_of(remarks)
    if not any(shard.ok for shard in writer.shards):
        raise DataError(
            f"None of the {len(pairs):,} pairs can be used; see {writer.write_skipped()}.", fix="Mend the pairs."
        )
    return sum(work.shard.rows for work in todo if work.images)


def embed_shard(
    pairs: Pairs,
    number: int,
    encoder: Encoder,
    views: Views | None,
    settings: PairsConfig,
    machine: MachineConfig,
    made_on: str,
) -> tuple[ShardRows, collections.Counter[str]]:
    """One shard alone, with the same bits as `embed_pairs`; and how many of its pairs have which remark."""
    shard, remarks = pairs.shards[number], collections.Counter[str]()
    part = _ShardInProgress(pairs, shard, dim=encoder.dim, fields=settings.keep_fields, views=views)
    decoded = _batches([_work_on(shard, None, views)], pairs, encoder, views, settings, machine)
    with contextlib.closing(decoded):
        for batch in _begun_batches(decoded, encoder, machine.embed_batch):
            part.add(batch)
            remarks.update(reason_kind(item.remark) for item in batch.items if item.remark)
    return part.finished(part.contents.of_shard, made_on), remarks


def warn_of(remarks: collections.Counter[str]) -> None:
    """Say what is remarkable about pairs that are used nevertheless."""
    for remark, count in remarks.items():
        log.warn(f"{count:,} pairs: {remark}")


def _batches(
    todo: Sequence["_Work"],
    pairs: Pairs,
    encoder: Encoder,
    views: Views | None,
    settings: PairsConfig,
    machine: MachineConfig,
) -> Generator["_Batch"]:
    """The decoded images of what is to be embedded, in order."""
    return decoded_batches(
        _PairImages(pairs, encoder, views, max_pixels=settings.max_pixels),
        _places_of_batches(todo, machine.embed_batch),
        _stack,
        workers=machine.workers,
        smaller_batch="machine.embed_batch",
        pin=encoder.device.type == "cuda",
    )


class _Work(NamedTuple):
    """What is to be embedded of a shard."""

    shard: Shard
    whole: bool
    """The images, and all their captions."""
    views: range
    """These of their crops."""

    @property
    def images(self) -> int:
        """Forward passes of an image tower for each row."""
        return self.whole + len(self.views)


def _work_on(shard: Shard, finished: FinishedShard | None, wanted: Views | None) -> _Work:
    """All of a shard, or what a finished one lacks."""
    count = 0 if wanted is None else wanted.count
    held = 0 if finished is None else finished.usable_views(wanted)
    return _Work(shard, finished is None, range(held, count))


def _say_reused(pairs: Pairs, reused: dict[int, FinishedShard], todo: Sequence[_Work]) -> None:
    if not reused:
        return
    crops = sum(len(work.views) * work.shard.rows for work in todo if not work.whole)
    more = f"; {crops:,} crops of their images are embedded for them" if crops else ""
    log.info(f"embed     {len(reused):,} of {len(pairs.shards):,} shards are embedded already and taken over{more}")


def shards_to_embed(
    pairs: Pairs, first: int, finished: FinishedShards, digests: FileDigests, *, read: bool
) -> list[int]:
    """The numbers of the shards, from `first` on, that no finished store holds.

    Args:
        pairs: The pairs.
        first: Shards before this one are done.
        finished: The shards of finished stores.
        digests: Where the contents of each shard are remembered.
        read: Read a shard whose contents are not known; else it counts as held by none.
    """
    known = {
        number: shard_contents(pairs, number, digests) if read else recall_contents(pairs, number, digests)
        for number in range(first, len(pairs.shards))
    }
    return [number for number, same in known.items() if same is None or finished.find(same.rows) is None]


def _shards_to_reuse(
    pairs: Pairs, first: int, finished: FinishedShards, digests: FileDigests
) -> dict[int, FinishedShard]:
    """Number of a shard of the pairs -> a finished shard of the same contents."""
    if not len(finished):
        return {}
    reused: dict[int, FinishedShard] = {}
    for number in range(first, len(pairs.shards)):
        same = finished.find(shard_contents(pairs, number, digests).rows)
        if same is not None and same.shard.rows == pairs.shards[number].rows:
            reused[number] = same
    return reused


def _views_of(
    finished: FinishedShard,
    work: _Work,
    wanted: Views | None,
    batches: Iterator["_BegunBatch"],
    dim: int,
    advance: Callable[[int], None],
) -> Float[np.ndarray, "rows views dim"] | None:
    """The views of a finished shard, those that it lacks computed now; None if its own are all and only those wanted.

    `advance` is told the rows that are done.

    Raises:
        DataError: The images are no longer those that were embedded.
    """
    if wanted is None or finished.views == wanted:
        return None
    views = np.zeros((work.shard.rows, wanted.count, dim), dtype=np.float16)
    if held := work.views.start:
        stored = np.load(finished.store / finished.shard.files["view"].path, mmap_mode="r", allow_pickle=False)
        views[:, :held] = stored[:, :held]
    if work.views:
        _embed_views(views[:, held:], finished, work.shard, batches, advance)
    return views


def _embed_views(
    out: Float[np.ndarray, "rows views dim"],
    finished: FinishedShard,
    shard: Shard,
    batches: Iterator["_BegunBatch"],
    advance: Callable[[int], None],
) -> None:
    """Fill in the views of the rows that are ok in a finished shard."""
    ok = np.ones(shard.rows, dtype=bool)
    ok[[entry["row"] for entry in finished.skipped]] = False

    contents, filled = ContentsInProgress(), 0
    while filled < shard.rows:
        batch = next(batches)
        readable = np.array([not item.reason for item in batch.items], dtype=bool)
        rows = slice(filled, filled + len(readable))
        if lost := np.flatnonzero(ok[rows] & ~readable).tolist():
            raise _changed(shard, f"row {filled + lost[0]:,} cannot be used any more: {batch.items[lost[0]].reason}")
        if readable.any():
            out[rows][readable] = batch.images()
        for item in batch.items:
            contents.add(item.digest)
        filled += len(readable)
        advance(len(readable))

    out[~ok] = 0
    if contents.of_rows != finished.shard.contents:
        raise _changed(shard, "its images or captions were changed meanwhile")


def _changed(shard: Shard, what: str) -> DataError:
    return DataError(
        f"{shard.name}: the views of its images cannot be embedded beside what is embedded already; {what}.",
        fix="If pairs.max_pixels is lower than it was, raise it, or embed all anew with --force; else run the embed"
        " stage again.",
    )


def _take(
    writer: StoreWriter,
    finished: FinishedShard,
    pairs: Pairs,
    number: int,
    digests: FileDigests,
    fields: tuple[str, ...],
    views: np.ndarray | None,
) -> None:
    """Take a finished shard over; its metadata are written anew if other fields are kept, or fields have changed."""
    contents, shard = shard_contents(pairs, number, digests), pairs.shards[number]
    metadata = None
    if finished.shard.contents_with_fields != contents.with_fields:
        metadata = read_table(finished.store / finished.shard.files["metadata"].path).select(STORE_COLUMNS)
        values = [_fields_of(pairs, row) for row in range(shard.first_row, shard.first_row + shard.rows)]
        for name in fields:
            column = pa.array([value.get(name, "") for value in values], pa.string())
            metadata = metadata.append_column(name, column)
    writer.take(finished, shard.name, metadata=metadata, with_fields=contents.with_fields, views=views)


def _fields_of(pairs: Pairs, row: int) -> dict[str, str]:
    try:
        return pairs.read(row).fields
    except BadSample:
        return {}


class _Place(NamedTuple):
    """A row, and what is wanted of it."""

    row: int
    whole: bool
    views: range


class _Item(NamedTuple):
    """A decoded row."""

    row: int
    pixels: Tensor | None
    """Preprocessed: the image if it is wanted, then its crops; None when the row cannot be used."""
    whole: bool
    """Whether its captions are wanted, too."""
    captions: tuple[str, ...]
    fields: dict[str, str]
    size: tuple[int, int]
    reason: str
    """Why the row cannot be used; empty when it can."""
    digest: RowDigest
    """Of what was read."""
    remark: str = ""
    """As in `Pair`."""


class _Batch(NamedTuple):
    items: list[_Item]
    """One for each row; their pixels are in `images`."""
    images: Tensor
    """(rows, images, 3, height, width) of the usable rows, in order."""


class _PairImages:
    """Reads, decodes and preprocesses rows, in worker processes."""

    def __init__(self, pairs: Pairs, encoder: Encoder, views: Views | None, *, max_pixels: int) -> None:
        self._pairs, self._views = pairs, views
        self._preprocess, self._preprocess_crop = encoder.preprocess, encoder.preprocess_crop
        self._side, self._max_pixels = encoder.image_side, max_pixels

    def __getitem__(self, place: _Place, /) -> _Item:
        row = place.row
        captions: tuple[str, ...] = ()
        fields: dict[str, str] = {}
        digest = digest_of_pair(self._pairs.key(row), None)
        try:
            pair = self._pairs.read(row)
            captions, fields, digest = pair.captions, pair.fields, digest_of_pair(pair.key, pair)
            image = decode_image(pair.image, max_pixels=self._max_pixels, side=self._side)
            pixels = self._pixels(image, place)
            return _Item(row, pixels, place.whole, captions, fields, image.size, "", digest, pair.remark)
        except BadSample as error:
            return _Item(row, None, place.whole, captions, fields, (0, 0), error.reason, digest)

    def _pixels(self, image: Image.Image, place: _Place) -> Tensor:
        images = [self._preprocess(image)] if place.whole else []
        if self._views is not None:
            key = self._pairs.key(place.row)
            images += [self._preprocess_crop(self._views.crop(image, key, number)) for number in place.views]
        return torch.stack(images)


def _stack(items: list[_Item]) -> _Batch:
    pixels = [item.pixels for item in items if item.pixels is not None]
    images = torch.stack(pixels) if pixels else torch.empty(0, 1, 3, 1, 1)
    return _Batch([item._replace(pixels=None) for item in items], images)


def _places_of_batches(todo: Sequence[_Work], size: int) -> Generator[list[_Place]]:
    """Rows in order, and `size` images at most unless one row has more.

    No batch crosses from one shard into the next, so a resumed run has the same batches.
    """
    for shard, whole, views in (work for work in todo if work.images):
        end, rows = shard.first_row + shard.rows, max(size // (whole + len(views)), 1)
        for start in range(shard.first_row, end, rows):
            yield [_Place(row, whole, views) for row in range(start, min(start + rows, end))]


class _BegunBatch(NamedTuple):
    """A batch that is being embedded."""

    items: list[_Item]
    """One for each row."""
    shape: tuple[int, int, int]
    """Usable rows, images of each, and the width of an embedding."""
    of_images: list[_Embedding]
    of_texts: list[_Embedding]
    """Of all captions of the usable rows, if these are wanted."""

    def images(self) -> Float16[np.ndarray, "rows images dim"]:
        """The embeddings of all images of the usable rows, waited for."""
        return _joined(self.of_images, self.shape[2]).reshape(self.shape)

    def texts(self) -> Float16[np.ndarray, "captions dim"]:
        """Likewise of the captions."""
        return _joined(self.of_texts, self.shape[2])


def _joined(parts: list[_Embedding], dim: int) -> Float16[np.ndarray, "rows dim"]:
    return np.concatenate([np.zeros((0, dim), dtype=np.float16), *(part() for part in parts)])


def _begun_batches(batches: Iterator[_Batch], encoder: Encoder, chunk: int) -> Iterator[_BegunBatch]:
    """Each batch as soon as its work is begun; on a device when that of the next one is, too.

    So the device has work while the host waits for the embeddings of a batch, and writes them.
    """
    return one_ahead(batches, functools.partial(_begin, encoder, chunk), encoder.device)


def _begin(encoder: Encoder, chunk: int, batch: _Batch) -> _BegunBatch:
    """Embed a batch, `chunk` images or captions at a time."""
    rows, images = batch.images.shape[:2]
    pixels = batch.images.flatten(0, 1).split(chunk) if rows else ()
    captions = [caption for item in batch.items if item.whole and not item.reason for caption in item.captions]
    chunks = [captions[at : at + chunk] for at in range(0, len(captions), chunk)]
    return _BegunBatch(
        batch.items,
        (rows, images, encoder.dim),
        [encoder.begin_images(some) for some in pixels],
        [encoder.begin_texts(some) for some in chunks],
    )


class _ShardInProgress:
    """The rows of one shard as they come in."""

    def __init__(self, pairs: Pairs, shard: Shard, *, dim: int, fields: tuple[str, ...], views: Views | None) -> None:
        self.shard, self.filled = shard, 0
        self.keys = pairs.keys(shard.first_row, shard.first_row + shard.rows)
        self.images = np.zeros((shard.rows, dim), dtype=np.float16)
        self.texts = np.zeros_like(self.images)
        self.views = None if views is None else np.zeros((shard.rows, views.count, dim), dtype=np.float16)
        self.more_texts: list[np.ndarray] = []
        self.ok = np.zeros(shard.rows, dtype=bool)
        self.captions: list[tuple[str, ...]] = []
        self.sizes: list[tuple[int, int]] = []
        self.fields: dict[str, list[str]] = {name: [] for name in fields}
        self.skipped: list[dict[str, Any]] = []
        self.contents = ContentsInProgress()

    def add(self, batch: _BegunBatch) -> None:
        """Put the embeddings of a batch behind those that are there."""
        ok = np.array([not item.reason for item in batch.items], dtype=bool)
        rows = slice(self.filled, self.filled + len(ok))
        self.ok[rows] = ok

        if ok.any():
            usable = [item for item in batch.items if not item.reason]
            images, texts = batch.images(), batch.texts()
            self.images[rows][ok] = images[:, 0]
            if self.views is not None:
                self.views[rows][ok] = images[:, 1:]

            counts = np.array([len(item.captions) for item in usable])
            captioned = counts > 0  # the texts of the others stay all zeros
            first = (np.cumsum(counts) - counts)[captioned]
            self.texts[rows][np.flatnonzero(ok)[captioned]] = texts[first]
            self.more_texts.append(np.delete(texts, first, axis=0))

        for item in batch.items:
            self._add_metadata(item)
        self.filled += len(ok)

    def _add_metadata(self, item: _Item) -> None:
        self.contents.add(item.digest)
        self.captions.append(item.captions)
        self.sizes.append(item.size)
        for name, values in self.fields.items():
            values.append(item.fields.get(name, ""))
        if item.reason:
            key = self.keys[item.row - self.shard.first_row]
            self.skipped.append({"row": item.row, "key": key, "shard": self.shard.name, "reason": item.reason})

    def finished(self, contents: ShardContents, made_on: str) -> ShardRows:
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
            contents=contents.rows,
            contents_with_fields=contents.with_fields,
            views=self.views,
            made_on=made_on,
        )


def check_known_bad(pairs: Pairs, writer: StoreWriter, settings: PairsConfig) -> None:
    """Stop before any work if the index alone shows that too many of the remaining pairs are bad.

    Raises:
        DataError: They are.
    """
    first = writer.rows
    ahead: list[dict[str, Any]] = []
    for row, reason in sorted(pairs.known_bad.items()):
        if row >= first:
            shard = next(shard for shard in reversed(pairs.shards) if shard.first_row <= row)
            ahead.append({"row": row, "key": pairs.key(row), "shard": shard.name, "reason": reason})
    check_bad_share(writer, ahead, len(pairs), settings)


def check_bad_share(writer: StoreWriter, unfinished: list[dict[str, Any]], total: int, settings: PairsConfig) -> None:
    """Stop as soon as more pairs are bad than are allowed, whatever the rest holds."""
    share = settings.max_bad_share
    if len(writer.skipped) + len(unfinished) <= share * total:
        return
    bad = [*writer.skipped, *unfinished]
    if not bad:  # no pairs at all, which is not this check's concern
        return

    (reason, count), *_ = collections.Counter(reason_kind(entry["reason"]) for entry in bad).most_common(1)
    first = next(entry["reason"] for entry in bad if reason_kind(entry["reason"]) == reason)
    example = "" if first == reason else f", the first: {first}"
    path = writer.write_skipped(unfinished)
    raise DataError(
        f"{len(bad):,} of {total:,} pairs cannot be used so far, more than pairs.max_bad_share {share:g}; "
        f"most often: {reason} ({count:,}){example}.",
        fix=f"Each is listed in {path}; {remedy(first)}, or raise pairs.max_bad_share.",
    )
