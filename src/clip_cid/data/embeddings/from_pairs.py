"""Embeddings of pairs, shard by shard: workers decode, the encoder embeds, the writer keeps each finished shard."""

import collections
import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clip_cid import log
from clip_cid.data.embeddings.writer import ShardRows, StoreWriter
from clip_cid.data.pairs.decoding import decoded_batches
from clip_cid.data.pairs.images import decode_image
from clip_cid.data.pairs.pair import BadSample, reason_kind, remedy
from clip_cid.data.pairs.pairs import Pairs, Shard
from clip_cid.errors import DataError
from clip_cid.recipe import MachineConfig, PairsConfig


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

    def encode_images(self, images: Tensor) -> Tensor: ...

    def encode_texts(self, captions: list[str]) -> Tensor: ...


def embed_pairs(
    pairs: Pairs, encoder: Encoder, writer: StoreWriter, settings: PairsConfig, machine: MachineConfig
) -> None:
    """Embed every shard that `writer` does not have yet.

    Raises:
        DataError: Too many pairs cannot be used, or a source changed.
        RunError: A process that decodes images was killed.
    """
    todo = pairs.shards[len(writer.shards) :]
    _check_known_bad(pairs, todo, writer, settings)

    batches = decoded_batches(
        _PairImages(pairs, encoder.preprocess, side=encoder.image_side, max_pixels=settings.max_pixels),
        _rows_of_batches(todo, machine.embed_batch),
        _stack,
        workers=machine.workers,
        smaller_batch="machine.embed_batch",
        pin=encoder.device.type == "cuda",
    )
    remarks = collections.Counter[str]()
    progress = log.progress("embed", len(pairs), unit="images", start=writer.rows)
    with contextlib.closing(batches), progress as bar:
        for shard in todo:
            part = _ShardInProgress(pairs, shard, dim=encoder.dim, fields=settings.keep_fields)
            while part.filled < shard.rows:
                batch = next(batches)
                part.add(batch, encoder, machine.embed_batch)
                remarks.update(reason_kind(item.remark) for item in batch.items if item.remark)
                _check_bad_share(writer, part.skipped, len(pairs), settings)
                bar.advance(len(batch.items))
            writer.add(part.finished())

    for remark, count in remarks.items():
        log.warn(f"{count:,} pairs: {remark}")
    if not any(shard.ok for shard in writer.shards):
        raise DataError(
            f"None of the {len(pairs):,} pairs can be used; see {writer.write_skipped()}.", fix="Mend the pairs."
        )


class _Item(NamedTuple):
    """A decoded row."""

    row: int
    pixels: Tensor | None
    """Preprocessed; None when the row cannot be used."""
    captions: tuple[str, ...]
    fields: dict[str, str]
    size: tuple[int, int]
    reason: str
    """Why the row cannot be used; empty when it can."""
    remark: str = ""
    """As in `Pair`."""


class _Batch(NamedTuple):
    items: list[_Item]
    """One for each row; their pixels are in `images`."""
    images: Tensor
    """Of the usable rows, in order."""


class _PairImages:
    """Reads, decodes and preprocesses rows, in worker processes."""

    def __init__(
        self, pairs: Pairs, preprocess: Callable[[Image.Image], Tensor], *, side: int, max_pixels: int
    ) -> None:
        self._pairs, self._preprocess = pairs, preprocess
        self._side, self._max_pixels = side, max_pixels

    def __getitem__(self, row: int, /) -> _Item:
        captions: tuple[str, ...] = ()
        fields: dict[str, str] = {}
        try:
            pair = self._pairs.read(row)
            captions, fields = pair.captions, pair.fields
            image = decode_image(pair.image, max_pixels=self._max_pixels, side=self._side)
            return _Item(row, self._preprocess(image), captions, fields, image.size, "", pair.remark)
        except BadSample as error:
            return _Item(row, None, captions, fields, (0, 0), error.reason)


def _stack(items: list[_Item]) -> _Batch:
    pixels = [item.pixels for item in items if item.pixels is not None]
    images = torch.stack(pixels) if pixels else torch.empty(0, 3, 1, 1)
    return _Batch([item._replace(pixels=None) for item in items], images)


def _rows_of_batches(shards: Sequence[Shard], size: int) -> Generator[list[int]]:
    """Rows in order; no batch crosses from one shard into the next, so a resumed run has the same batches."""
    for shard in shards:
        end = shard.first_row + shard.rows
        for start in range(shard.first_row, end, size):
            yield list(range(start, min(start + size, end)))


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

    def add(self, batch: _Batch, encoder: Encoder, chunk: int) -> None:
        """Embed a batch, `chunk` captions at a time, and put its rows behind those that are there."""
        ok = np.array([not item.reason for item in batch.items], dtype=bool)
        rows = slice(self.filled, self.filled + len(ok))
        self.ok[rows] = ok

        if ok.any():
            usable = [item for item in batch.items if not item.reason]
            self.images[rows][ok] = _half(encoder.encode_images(batch.images))

            captions = [caption for item in usable for caption in item.captions]
            texts = np.concatenate(
                [_half(encoder.encode_texts(captions[at : at + chunk])) for at in range(0, len(captions), chunk)]
            )
            counts = np.array([len(item.captions) for item in usable])
            first = np.cumsum(counts) - counts
            self.texts[rows][ok] = texts[first]
            self.more_texts.append(np.delete(texts, first, axis=0))

        for item in batch.items:
            self._add_metadata(item)
        self.filled += len(ok)

    def _add_metadata(self, item: _Item) -> None:
        self.captions.append(item.captions)
        self.sizes.append(item.size)
        for name, values in self.fields.items():
            values.append(item.fields.get(name, ""))
        if item.reason:
            key = self.keys[item.row - self.shard.first_row]
            self.skipped.append({"row": item.row, "key": key, "shard": self.shard.name, "reason": item.reason})

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


def _half(embeddings: Tensor) -> np.ndarray:
    return embeddings.half().cpu().numpy()


def _check_known_bad(pairs: Pairs, todo: Sequence[Shard], writer: StoreWriter, settings: PairsConfig) -> None:
    """Stop before any work if the index alone shows that too many of the remaining pairs are bad."""
    first = todo[0].first_row if todo else len(pairs)
    ahead: list[dict[str, Any]] = []
    for row, reason in sorted(pairs.known_bad.items()):
        if row >= first:
            shard = next(shard for shard in reversed(pairs.shards) if shard.first_row <= row)
            ahead.append({"row": row, "key": pairs.key(row), "shard": shard.name, "reason": reason})
    _check_bad_share(writer, ahead, len(pairs), settings)


def _check_bad_share(writer: StoreWriter, unfinished: list[dict[str, Any]], total: int, settings: PairsConfig) -> None:
    """Stop as soon as more pairs are bad than are allowed, whatever the rest holds."""
    share = settings.max_bad_share
    if len(writer.skipped) + len(unfinished) <= share * total:
        return
    bad = [*writer.skipped, *unfinished]
    if not bad:  # no pairs at all, which is not this check's concern
        return

    (reason, count), *_ = collections.Counter(reason_kind(entry["reason"]) for entry in bad).most_common(1)
    path = writer.write_skipped(unfinished)
    raise DataError(
        f"{len(bad):,} of {total:,} pairs cannot be used so far, more than pairs.max_bad_share {share:g}; "
        f"most often: {reason} ({count:,}).",
        fix=f"Each is listed in {path}; {remedy(reason)}, or raise pairs.max_bad_share.",
    )
