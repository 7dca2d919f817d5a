"""The batches of a run. The seed alone decides their pairs, order, crops and captions.

Batch number `step` is the same in every process and after every interruption: the order is a seeded
permutation for each epoch, and a hash of (seed, epoch, row) draws the crop and the caption of a pair.
With embedded views the crop is one of these, and the target is the embedding of that very crop.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.pairs.crops import Views
from clip_cid.data.pairs.decoding import decoded_batches
from clip_cid.data.pairs.images import decode_image
from clip_cid.data.pairs.pair import BadSample
from clip_cid.data.pairs.pairs import Pairs
from clip_cid.devices import Copies
from clip_cid.errors import ConfigError, DataError
from clip_cid.method.distill.center_pass import SoftCenters
from clip_cid.method.distill.objective import Targets
from clip_cid.method.unit_rows import Rows
from clip_cid.training.batch_order import ClusterTurns, Place, Windows, batch_places, epoch_size
from clip_cid.training.lines import Line, LineItem, Lines
from clip_cid.training.merged_captions import MergedCaptions
from clip_cid.training.ranks.distributed import ALONE, Ranks
from clip_cid.unit_length import is_unit

NO_CAPTION = -1
"""In place of the number of a caption."""

_DIGESTED_AT_ONCE = 1 << 22
_TRIES = 100  # this many broken images in a row mean a missing disk


@dataclasses.dataclass(frozen=True)
class Item:
    """A pair as the student sees it in one epoch."""

    image: Tensor
    text: Tensor
    index: int
    """The pair it is, as an index among the training rows."""
    caption: int
    """Which of the pair's captions it is, those it was given after its own; `NO_CAPTION` if it has none."""
    view: int
    """Which of the embedded views the image is; 0 without views."""
    bad: list[tuple[int, str]]
    """Rows that could not be used in its place, with the reason."""


class Items(NamedTuple):
    """The items of a batch, stacked; tensors, so that they travel between processes in shared memory."""

    images: Tensor
    texts: Tensor
    indices: Tensor
    captions: Tensor
    views: Tensor
    bad: list[tuple[int, str]]
    lines: Tensor | None
    """Texts without images; None if there are none. Likewise their indices."""
    line_indices: Tensor | None


@dataclasses.dataclass(frozen=True)
class SoftTargets:
    """`SoftCenters` of all training rows, in memory or mapped from files."""

    mean: Rows
    """(rows, dim)."""
    entropy: Rows
    """(rows, 1)."""
    sharpness: float

    def of(self, rows: Int[np.ndarray, " batch"]) -> SoftCenters:
        mean, entropy = torch.from_numpy(self.mean[rows]), torch.from_numpy(self.entropy[rows][:, 0])
        return SoftCenters(mean, entropy, self.sharpness)


class BankRows(NamedTuple):
    """Stored embeddings of a draw of all pairs, on the device of the losses."""

    images: Float[Tensor, "bank dim"]
    texts: Float[Tensor, "bank dim"] | None
    """None if no loss reads texts."""


@dataclasses.dataclass(frozen=True)
class TrainingPairs:
    """The training data: rows of the pairs, and the targets of each from teacher and clustering."""

    pairs: Pairs
    rows: Int[np.ndarray, " rows"]
    """Rows of `pairs`."""
    labels: Int[np.ndarray, " rows"] | None = None
    """The cluster of each; None when neither a loss nor `distill.per_cluster` reads it. Likewise for what follows."""
    store: EmbeddingStore | None = None
    """The teacher's embeddings."""
    store_rows: Int[np.ndarray, " rows"] | None = None
    """Where the store has each of `rows`."""
    num_captions: Int[np.ndarray, " rows"] | None = None
    """How many captions of each the teacher has read: one of these is chosen."""
    merged: MergedCaptions | None = None
    """The captions of removed near-duplicates, which are chosen from as well; None where they are not read."""
    text_labels: Int[np.ndarray, " captions"] | None = None
    """The cluster of each caption, of all kept pairs."""
    first_texts: Int[np.ndarray, " rows"] | None = None
    """Where the captions of each begin among these."""
    several_labels: Rows | None = None
    """The cluster of each and the next nearest centers, if a loss asks for several."""
    soft_centers: SoftTargets | None = None
    """What the divergence needs of the teacher, if that was computed once for all."""
    lines: Lines | None = None
    """Texts without images, to be read beside these; None when no loss reads them."""
    views: Views | None = None
    """The embedded crops, one of which the student sees of an image in an epoch; None for random crops."""
    sizes: Int[np.ndarray, "rows 2"] | None = None
    """Width and height of each image as its views were embedded."""
    left_out: dict[int, str] = dataclasses.field(default_factory=dict[int, str])
    """Rows left out of `rows` because they are known to be broken; no earlier stage has listed them."""

    def __len__(self) -> int:
        return len(self.rows)

    def epoch_size(self, per_cluster: int | None) -> int:
        """How many of them an epoch holds, with at most `per_cluster` of each cluster."""
        if per_cluster is None:
            return len(self)
        assert self.labels is not None, "the join reads them where a cluster gives few"
        return epoch_size(self.labels, per_cluster)

    @property
    def labels_of_losses(self) -> Rows | None:
        """What the losses read: several labels where there are some, else the cluster."""
        return self.labels if self.several_labels is None else self.several_labels

    def take(self, index: Int[np.ndarray, " taken"]) -> "TrainingPairs":
        """Some of them, before anything is computed of all."""
        assert self.soft_centers is None
        assert self.several_labels is None
        taken = {
            name: None if (values := getattr(self, name)) is None else values[index]
            for name in ("rows", "labels", "store_rows", "num_captions", "sizes", "first_texts")
        }
        merged = None if self.merged is None else self.merged.take(index)
        return dataclasses.replace(self, merged=merged, **taken)


def add_rows(digest: Any, rows: Int[np.ndarray, " rows"]) -> None:
    """Add row numbers to a hashlib digest, the same whatever type they are held in."""
    for start in range(0, len(rows), _DIGESTED_AT_ONCE):
        digest.update(rows[start : start + _DIGESTED_AT_ONCE].astype(np.int64).data)


@dataclasses.dataclass(frozen=True)
class Batch:
    """The part of a batch that one rank reads in one step."""

    rows: Int[np.ndarray, " batch"]
    """Rows of the pairs, to inspect a batch that failed."""
    bad: list[tuple[int, str]]
    """Rows that could not be read, with the reason; the next readable row stands in."""
    images: Float[Tensor, "batch channels height width"]
    texts: Int[Tensor, "batch context"]
    teacher_image: Float[Tensor, "batch dim"] | None = None
    teacher_text: Float[Tensor, "batch dim"] | None = None
    labels: Int[Tensor, "batch ..."] | None = None
    soft_centers: SoftCenters | None = None
    """What the divergence needs of the teacher, if that was computed once for all."""
    text_labels: Int[Tensor, " batch"] | None = None
    """The cluster of each caption that was chosen."""
    bank: BankRows | None = None
    """For the losses that compare with more than the batch."""
    captioned: Bool[Tensor, " batch"] | None = None
    """Whether each image has a caption; None where all must have."""
    lines: Int[Tensor, "lines context"] | None = None
    """Texts without images."""
    teacher_lines: Float[Tensor, "lines dim"] | None = None

    @property
    def targets(self) -> Targets:
        images, texts = self.bank or (None, None)
        return Targets(
            self.teacher_image,
            self.teacher_text,
            self.labels,
            self.soft_centers,
            bank_images=images,
            bank_texts=texts,
            captioned=self.captioned,
            teacher_lines=self.teacher_lines,
            text_labels=self.text_labels,
        )

    def to(self, copies: Copies) -> "Batch":
        """The batch where these copies go."""
        moved: dict[str, Tensor | SoftCenters | BankRows] = {
            field.name: copies(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        if self.soft_centers is not None:
            moved["soft_centers"] = self.soft_centers.to(copies)
        if self.bank is not None:
            texts = self.bank.texts
            moved["bank"] = BankRows(copies(self.bank.images), None if texts is None else copies(texts))
        return dataclasses.replace(self, **moved)


class PairDataset:
    """A pair or a line at a place: decoded, cropped and tokenized, the same in any process."""

    def __init__(
        self,
        training: TrainingPairs,
        *,
        transform: Callable[[Image.Image], Tensor],
        tokenizer: Callable[[list[str]], Tensor],
        max_pixels: int,
        seed: int,
    ) -> None:
        self._pairs, self._rows, self._num_captions = training.pairs, training.rows, training.num_captions
        self._merged, self._lines = training.merged, training.lines
        self._views, self._sizes = training.views, training.sizes
        self._transform, self._tokenizer = transform, tokenizer
        self._max_pixels, self._seed = max_pixels, seed

    def __getitem__(self, place: Place | Line, /) -> Item | LineItem:
        """The pair at a place or, if it cannot be read, the next one that can; or the line.

        Raises:
            DataError: None of the next pairs can be read, a source changed, or an image is not the one whose views were
                embedded.
        """
        if isinstance(place, Line):
            assert self._lines is not None
            return LineItem(self._tokenizer([self._lines.text(place.index)])[0], place.index)

        bad: list[tuple[int, str]] = []
        for index in range(place.index, place.index + min(_TRIES, len(self._rows))):
            index %= len(self._rows)
            try:
                return self._read(index, place.epoch, bad)
            except BadSample as error:
                bad.append((int(self._rows[index]), error.reason))

        row, reason = bad[-1]
        raise DataError(
            f"{len(bad):,} pairs in succession cannot be read; the last is row {row:,}: {reason}.",
            fix="Check that the disk with the images is still there.",
        )

    def _read(self, index: int, epoch: int, bad: list[tuple[int, str]]) -> Item:
        row = int(self._rows[index])
        pair = self._pairs.read(row)
        picture = decode_image(pair.image, max_pixels=self._max_pixels)
        crop, draw = _seeds(self._seed, epoch, row)
        text, caption = self._caption(pair.captions, index, draw)
        view = 0
        if self._views is not None:
            view = view_number(self._views.count, self._seed, epoch, row)
            self._check_size(picture, pair.key, index)
            picture = self._views.crop(picture, pair.key, view)
        with _drawing_from(crop):
            image = self._transform(picture)
        return Item(image, self._tokenizer([text])[0], index, caption, view, bad)

    def _caption(self, captions: Sequence[str], index: int, draw: int) -> tuple[str, int]:
        """One of the pair's captions, or of those it was given, and its number."""
        own = embedded = len(captions)
        if self._num_captions is not None:
            embedded = int(self._num_captions[index])
            own = min(own, embedded)
        given = 0 if self._merged is None else int(self._merged.counts[index])
        if not own + given:
            return "", NO_CAPTION
        chosen = draw % (own + given)
        if chosen < own or self._merged is None:
            return captions[chosen], chosen
        return self._merged.text(index, chosen - own), embedded + chosen - own

    def _check_size(self, picture: Image.Image, key: str, index: int) -> None:
        assert self._sizes is not None
        width, height = self._sizes[index].tolist()
        if picture.size != (width, height):
            raise DataError(
                f"{key!r} has {picture.size[0]:,} x {picture.size[1]:,} pixels, but the views of its image were embedded"
                f" from {width:,} x {height:,}.",
                fix="A view is seen as it was embedded: give the very images that were embedded, or run the embed stage"
                " on these pairs.",
            )


class Batches:
    """The batches of a run, from any step on, with the targets of each pair.

    Each rank reads its own part of every batch: together they read the rows that one process would.

    Args:
        training: The pairs.
        dataset: How they are read.
        batch_size: Over all ranks.
        seed: Of the order.
        workers: Processes that read.
        pin: Whether batches lie in pinned memory.
        ranks: Who train together.
        bank: Gives the draw of a step, if a loss reads one.
        per_cluster: At most so many pairs of a cluster in an epoch; all when absent.
        shuffle_window: How many pairs of shards in random order are shuffled together; all when absent.
    """

    def __init__(
        self,
        training: TrainingPairs,
        dataset: PairDataset,
        *,
        batch_size: int,
        seed: int,
        workers: int,
        pin: bool,
        ranks: Ranks = ALONE,
        bank: Callable[[int], BankRows] | None = None,
        per_cluster: int | None = None,
        shuffle_window: int | None = None,
    ) -> None:
        """See the class.

        Raises:
            ConfigError: The ranks cannot share the batch equally.
        """
        if batch_size % ranks.size:
            raise ConfigError(
                f"distill.batch_size: {batch_size:,} pairs cannot be shared equally by {ranks.size} processes.",
                fix=f"Set distill.batch_size to {batch_size // ranks.size * ranks.size or ranks.size:,}.",
            )
        if shuffle_window is not None and shuffle_window < batch_size:  # of `auto`, which the recipe did not know
            raise ConfigError(
                f"distill.shuffle_window: {shuffle_window:,} pairs are shuffled together, fewer than a batch of"
                f" {batch_size:,} holds.",
                fix=f"Set it to some twenty batches, {20 * batch_size:,}, or leave it out.",
            )
        if training.lines is not None:
            training.lines.refuse_uneven(ranks)

        self.training = training
        self.batch_size = batch_size
        self.epoch_size = training.epoch_size(per_cluster)
        """Pairs in an epoch."""
        self._turns: ClusterTurns | None = None
        if per_cluster is not None and training.labels is not None:
            self._turns = ClusterTurns(training.labels, per_cluster=per_cluster, seed=seed)
        self._windows: Windows | None = None
        if shuffle_window is not None:
            first_rows = [*(shard.first_row for shard in training.pairs.shards), len(training.pairs)]
            self._windows = Windows(np.searchsorted(training.rows, first_rows), shuffle_window)
        self._dataset, self._seed, self._workers, self._pin, self._ranks = dataset, seed, workers, pin, ranks
        self._bank = bank

    def between(self, first_step: int, steps: int) -> Generator[Batch]:
        """This rank's part of the batches of the steps `first_step`, ..., `steps - 1`.

        Raises:
            DataError: The pairs cannot be read any more, or a teacher vector is not of unit length.
        """
        places = batch_places(
            self.epoch_size,
            self.batch_size,
            seed=self._seed,
            first_step=first_step,
            rows_of=None if self._turns is None else self._turns.rows_of,
            windows=self._windows,
        )
        own = self._own(places)
        if (lines := self.training.lines) is not None:
            of_lines = lines.between(first_step, seed=self._seed, ranks=self._ranks)
            own = ([*pairs, *some] for pairs, some in zip(own, of_lines, strict=False))
        yield from self._read(own, range(first_step, steps))

    def in_order(self) -> Iterator[Batch]:
        """This rank's part of all full batches of one pass, in the order of the rows, with one bank: for validation."""
        count = len(self.training) // self.batch_size
        places = (
            [Place(0, number * self.batch_size + place) for place in range(self.batch_size)] for number in range(count)
        )
        yield from self._read(self._own(places), [0] * count)

    def _own(self, places: Iterator[list[Place]]) -> Iterator[list[Place | Line]]:
        share = self.batch_size // self._ranks.size
        return ([*batch[self._ranks.rank * share :][:share]] for batch in places)

    def _read(self, places: Iterator[list[Place | Line]], draws: Sequence[int]) -> Iterator[Batch]:
        """The batches at the next places, one for each of `draws`: the step whose draw is its bank."""
        decoded = decoded_batches(
            self._dataset,
            itertools.islice(places, len(draws)),
            stack,
            workers=self._workers,
            smaller_batch="distill.batch_size",
            pin=self._pin,
        )
        with contextlib.closing(decoded):
            for items, draw in zip(decoded, draws, strict=True):
                yield self._complete(items, draw)

    def _complete(self, items: Items, draw: int) -> Batch:
        """Add the targets of each pair from teacher and clustering, and the bank."""
        training, index = self.training, items.indices.numpy()
        batch = Batch(training.rows[index], items.bad, items.images, items.texts)
        if (labels := training.labels_of_losses) is not None:
            batch = dataclasses.replace(batch, labels=torch.from_numpy(labels[index].astype(np.int64)))
        if training.store is not None and training.store_rows is not None:
            rows = training.store_rows[index]
            images = (
                training.store.images[rows]
                if training.views is None
                else training.store.view_for(rows, items.views.numpy())
            )
            batch = dataclasses.replace(batch, teacher_image=unit_teacher_rows(images, rows, "image"))
            if training.num_captions is not None:
                captions = items.captions.numpy()
                if training.merged is not None:
                    rows, captions = training.merged.embedded_at(index, rows, captions, training.num_captions[index])
                batch = dataclasses.replace(batch, teacher_text=_teacher_texts(training.store, rows, captions))

        if training.text_labels is not None and training.first_texts is not None:
            chosen = training.text_labels[training.first_texts[index] + items.captions.numpy()]
            batch = dataclasses.replace(batch, text_labels=torch.from_numpy(chosen.astype(np.int64)))
        if training.pairs.captions_are_optional:
            batch = dataclasses.replace(batch, captioned=items.captions != NO_CAPTION)
        if training.soft_centers is not None:
            batch = dataclasses.replace(batch, soft_centers=training.soft_centers.of(index))
        if training.lines is not None and items.line_indices is not None:
            batch = dataclasses.replace(
                batch, lines=items.lines, teacher_lines=_teacher_lines(training.lines, items.line_indices.numpy())
            )
        return batch if self._bank is None else dataclasses.replace(batch, bank=self._bank(draw))


def _teacher_texts(
    store: EmbeddingStore, rows: Int[np.ndarray, " batch"], captions: Int[np.ndarray, " batch"]
) -> Float[Tensor, "batch dim"]:
    """The embeddings of the captions; zeros where there is none."""
    captioned = captions != NO_CAPTION
    found = unit_teacher_rows(store.text_for(rows[captioned], captions[captioned]), rows[captioned], "text")
    if captioned.all():
        return found
    texts = torch.zeros(len(rows), store.dim)
    texts[torch.from_numpy(captioned)] = found
    return texts


def _teacher_lines(lines: Lines, index: Int[np.ndarray, " lines"]) -> Float[Tensor, "lines dim"] | None:
    return None if lines.embeddings is None else unit_teacher_rows(lines.embeddings[index], index, "text")


@contextlib.contextmanager
def _drawing_from(seed: int) -> Generator[None]:
    """Torch and Python draw from this seed, and later on as if nothing had been drawn: open_clip's transform uses both."""
    state = random.getstate()
    random.seed(seed)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        random.setstate(state)


def stack(items: list[Item | LineItem]) -> Items:
    """The items of a batch as one."""
    pairs = [item for item in items if isinstance(item, Item)]
    lines = [item for item in items if isinstance(item, LineItem)]
    return Items(
        images=torch.stack([item.image for item in pairs]),
        texts=torch.stack([item.text for item in pairs]),
        indices=torch.tensor([item.index for item in pairs]),
        captions=torch.tensor([item.caption for item in pairs]),
        views=torch.tensor([item.view for item in pairs]),
        bad=[bad for item in pairs for bad in item.bad],
        lines=torch.stack([item.text for item in lines]) if lines else None,
        line_indices=torch.tensor([item.index for item in lines]) if lines else None,
    )


def _seeds(seed: int, epoch: int, row: int) -> tuple[int, int]:
    """Two independent 32-bit numbers (for the crop, for the caption) that depend on nothing else."""
    digest = hashlib.blake2b(f"{seed} {epoch} {row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4]), int.from_bytes(digest[4:])


def view_number(count: int, seed: int, epoch: int, row: int) -> int:
    """Which view of an image an epoch shows.

    Drawn anew in each epoch, and not in turn: with `distill.per_cluster` an image comes in every k-th epoch, and would
    miss most of its turns if k and `count` have a common factor.
    """
    digest = hashlib.blake2b(f"{seed} {epoch} {row} view".encode(), digest_size=8).digest()
    return int.from_bytes(digest) % count


def unit_teacher_rows(
    vectors: Float[np.ndarray, "batch dim"], rows: Int[np.ndarray, " batch"], what: str
) -> Float[Tensor, "batch dim"]:
    """Stored float16 rows as float32 of length 1; a length too far from 1 means a wrong vector."""
    single = vectors.astype(np.float32)
    norms = np.linalg.norm(single, axis=1, keepdims=True)
    wrong = np.flatnonzero(~is_unit(norms[:, 0]))
    if len(wrong):
        raise DataError(
            f"The teacher's {what} embedding of row {rows[wrong[0]]:,} has length {norms[wrong[0], 0]:.4g}, not 1.",
            fix="The embedding store is damaged; run `clip-cid verify`, then the embed stage again.",
        )
    return torch.from_numpy(single / norms)
