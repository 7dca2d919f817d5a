"""Reading teacher embeddings: the store knows the key, the captions and the vectors of each row."""

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import SupportsIndex, overload

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int, Integer

from clip_cid.data.embeddings.files import (
    AGAIN,
    STORE_FILE,
    StoreInfo,
    check_shard,
    check_unit,
    read_captions,
    read_column,
    read_info,
    read_texts,
)
from clip_cid.data.embeddings.sharded_rows import ShardedRows, checked_rows
from clip_cid.data.npy_files import new_npy
from clip_cid.errors import DataError
from clip_cid.loss_table import LOSSES

_BLOCK_ROWS = 16_384


class Keys(Sequence[str]):
    """The keys of all rows, packed; a Python string is made only for a key that is read."""

    def __init__(self, packed: pa.LargeStringArray) -> None:
        self.packed = packed

    def __len__(self) -> int:
        return len(self.packed)

    @overload
    def __getitem__(self, index: SupportsIndex) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> str | list[str]:
        if isinstance(index, slice):
            rows = range(*index.indices(len(self)))
            if rows.step == 1:
                return self.packed.slice(rows.start, len(rows)).to_pylist()
            return self.packed.take(pa.array(rows, pa.int64())).to_pylist()
        return self.packed[operator.index(index)].as_py()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _BLOCK_ROWS):
            yield from self.packed.slice(start, _BLOCK_ROWS).to_pylist()


class EmbeddingStore:
    """A finished store: `open` checks its structure, `check_values` every number."""

    def __init__(self, path: Path, info: StoreInfo) -> None:
        self.path, self.info, self.dim = path, info, info.dim
        self._root = Path(info.root) if info.root else path
        self._starts = np.cumsum([0, *(shard.rows for shard in info.shards)], dtype=np.int64)
        self.rows = int(self._starts[-1])
        self.images, self._texts = self._sharded("image"), self._sharded("text")
        self._more_texts = self._sharded("more_text")
        self._views = self._sharded("view")
        self._captions: dict[int, pa.Array] = {}

    def __repr__(self) -> str:
        kinds = "images and captions" if self.has_texts else "images"
        return f"EmbeddingStore({str(self.path)!r}: {self.rows:,} rows of {kinds}, {self.dim:,} wide)"

    @classmethod
    def open(cls, path: Path | str) -> "EmbeddingStore":
        """Open a store and check that every file is there, whole, and of the right shape.

        Raises:
            DataError: It is not a store, is unfinished, or a file is missing, cut short or of another shape.
        """
        path = Path(path)
        store = cls(path, read_info(path))
        for shard in store.info.shards:
            check_shard(store._root, shard, dim=store.dim, dtype=store.info.dtype, views=store.info.views)
        return store

    @property
    def has_texts(self) -> bool:
        """Whether there are text embeddings; a store taken over from elsewhere may have images only."""
        return all("text" in shard.files for shard in self.info.shards)

    @property
    def has_made_keys(self) -> bool:
        """Whether the keys are file and row, for want of metadata."""
        return (
            self.info.pairs is None
            and self.rows > 0
            and self.first_keys(1)[0].as_py() == f"{self.info.shards[0].name}/0"
        )

    @property
    def texts(self) -> ShardedRows:
        """The embedding of each first caption.

        Raises:
            DataError: The store has images only.
        """
        if not self.has_texts:
            readers = ", ".join(f"distill.weights.{loss.name}: 0" for loss in LOSSES if loss.reads_teacher_texts)
            raise DataError(
                f"{self.path}: this store has image embeddings only; the instance loss needs the captions' too "
                "(balance, cluster and the cluster losses do not).",
                fix=f"Switch off the losses that read them ({readers}), or take over embeddings that have their"
                " text_emb, or let the embed stage compute both.",
            )
        return self._texts

    @functools.cached_property
    def ok(self) -> Bool[np.ndarray, " rows"]:
        """Whether a row has its embeddings; in a store made elsewhere, all rows."""
        ok = np.ones(self.rows, dtype=bool)
        for index, shard in enumerate(self.info.shards):
            if shard.ok == shard.rows:
                continue

            rows = slice(int(self._starts[index]), int(self._starts[index + 1]))
            ok[rows] = read_column(self._file(index, "metadata"), "ok").to_numpy(zero_copy_only=False)
            if (count := int(ok[rows].sum())) != shard.ok:
                raise DataError(
                    f"{self._file(index, 'metadata')}: {count:,} rows are ok, but {STORE_FILE} says {shard.ok:,}.",
                    fix=AGAIN,
                )
        return ok

    @functools.cached_property
    def keys(self) -> Keys:
        """The key of each row; unique among the rows that are ok.

        Raises:
            DataError: A key is missing or repeated.
        """
        packed = _joined([keys for _, keys in self.key_blocks(1)])
        self._check_unique(packed)
        return Keys(packed)

    def map_keys(self, folder: Path) -> None:
        """From here on the keys lie in files of a folder, some 20 bytes a row, and not in memory.

        Raises:
            DataError: A key is missing or repeated.
        """
        packed = _on_disk((keys for _, keys in self.key_blocks(1)), folder / "keys")
        self._check_unique(packed)
        self.keys = Keys(packed)

    def key_blocks(self, rows: int) -> Iterator[tuple[int, pa.LargeStringArray]]:
        """The first row and the keys of consecutive whole shards, at least so many rows of them; the last may be fewer.

        Whether a key is repeated in another block, nobody has looked.

        Raises:
            DataError: A key is missing.
        """
        waiting, first = list[pa.LargeStringArray](), 0
        for index, end in enumerate(self._starts[1:].tolist()):
            path = self._file(index, "metadata")
            column = read_texts(path, self.info.key_column)
            if column.null_count:
                raise DataError(f"{path}: {column.null_count:,} rows have no {self.info.key_column}.", fix=self._mend)
            waiting.append(column)
            if end - first >= rows or end == self.rows:
                yield first, _joined(waiting)
                waiting, first = [], end

    def keys_of(self, rows: Sequence[int]) -> list[str]:
        """The keys of some rows, ascending; only their shards are read, and nobody looks whether one is repeated."""
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        keys: list[str] = []
        for shard, own in itertools.groupby(zip(shards.tolist(), rows, strict=True), operator.itemgetter(0)):
            column = read_texts(self._file(shard, "metadata"), self.info.key_column)
            keys += [column[row - int(self._starts[shard])].as_py() for _, row in own]
        return keys

    def first_keys(self, rows: int) -> pa.LargeStringArray:
        """The keys of the first rows, at most so many."""
        return next((keys[:rows] for _, keys in self.key_blocks(rows)), _joined([]))

    def _check_unique(self, packed: pa.LargeStringArray) -> None:
        check_unique(packed if self.ok.all() else packed.filter(pa.array(self.ok)), self.path)

    def captions(self, row: SupportsIndex) -> tuple[str, ...]:
        """The captions of a row, in the order of their embeddings; one empty caption if the store has none."""
        row = operator.index(row)
        if not 0 <= row < self.rows:
            raise IndexError(f"row: must be in [0, {self.rows}), got {row}")
        if self.info.captions_column is None:
            return ("",)
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        captions = self._shard_captions(shard)[row - int(self._starts[shard])].as_py()
        return tuple(caption or "" for caption in captions) if isinstance(captions, list) else (captions or "",)

    def mapped_captions(self, folder: Path) -> pa.LargeListArray:
        """The captions of every row, in files of a folder and not in memory; an absent text is an empty one.

        Rows at random are so read at the same cost, however many shards there are.
        """
        folder.mkdir(parents=True, exist_ok=True)
        ends = new_npy(folder / "captions.npy", np.int64, (self.rows + 1,))

        def texts() -> Iterator[pa.LargeStringArray]:
            for index, first in enumerate(self._starts[:-1].tolist()):
                counts, column = self._flat_captions(index)
                ends[first + 1 : first + 1 + len(counts)] = ends[first] + np.cumsum(counts)
                yield column

        packed = _on_disk(texts(), folder / "captions")
        return pa.LargeListArray.from_arrays(pa.array(ends), packed)

    def _flat_captions(self, shard: int) -> tuple[Int[np.ndarray, " rows"], pa.LargeStringArray]:
        """How many captions each row of a shard has, and all of them."""
        if self.info.captions_column is None:
            captions = pa.array([""] * self.info.shards[shard].rows, pa.large_string())
        else:
            captions = read_captions(self._file(shard, "metadata"), self.info.captions_column)
        if not pa.types.is_list(captions.type):
            return np.ones(len(captions), dtype=np.int64), captions.fill_null("")
        counts = captions.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        return counts, captions.flatten().cast(pa.large_string()).fill_null("")

    def first_captions(self) -> pa.LargeStringArray:
        """The first caption of each row, packed; empty where there is none."""
        parts: list[pa.Array] = []
        for index, shard in enumerate(self.info.shards):
            if self.info.captions_column is None:
                parts.append(pa.array([""] * shard.rows, pa.large_string()))
                continue
            captions = read_captions(self._file(index, "metadata"), self.info.captions_column)
            if pa.types.is_list(captions.type):
                lengths = captions.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
                starts = pa.array(captions.offsets.to_numpy()[:-1], mask=lengths == 0)
                captions = captions.values.take(starts)
            parts.append(captions.cast(pa.large_string()).fill_null(""))
        return pa.concat_arrays(parts) if parts else pa.array([], type=pa.large_string())

    def field(self, name: str) -> list[str]:
        """A column of the metadata for all rows, as strings; "" where a row has none.

        Raises:
            DataError: A shard does not have it.
        """
        values: list[str] = []
        for index in range(len(self.info.shards)):
            values += read_texts(self._file(index, "metadata"), name).fill_null("").to_pylist()
        return values

    def classes(self, name: str) -> tuple[Int[np.ndarray, " rows"], list[str]]:
        """A column of the metadata as class numbers (-1 where a row has none), and the sorted class names.

        Only one number a row is in memory, not the texts.

        Raises:
            DataError: A shard does not have it.
        """
        columns = (read_texts(self._file(index, "metadata"), name) for index in range(len(self.info.shards)))
        encoded = [column.fill_null("").dictionary_encode() for column in columns]
        chunks = pa.chunked_array(encoded).unify_dictionaries().chunks

        values = np.array(chunks[0].dictionary.to_pylist(), dtype=object)
        order = np.argsort(values, kind="stable")
        names: list[str] = values[order[values[order] != ""]].tolist()
        number_of = {value: number for number, value in enumerate(names)}
        numbers = np.array([number_of.get(value, -1) for value in values], dtype=np.int32)

        return numbers[np.concatenate([chunk.indices.to_numpy() for chunk in chunks])], names

    @functools.cached_property
    def num_captions(self) -> Int[np.ndarray, " rows"]:
        """How many captions of each row have an embedding.

        It is 0 for a row that is not ok or has no caption, and in a store without texts.
        """
        counts = self.ok.astype(np.int32) * np.int32(self.has_texts)
        for index, shard in enumerate(self.info.shards):
            if shard.more or shard.without_text:
                lengths = self._shard_captions(index).value_lengths().to_numpy(zero_copy_only=False)
                rows = slice(int(self._starts[index]), int(self._starts[index + 1]))
                counts[rows] *= lengths.astype(np.int32)

                # The shard's record must say the same.
                further = int(np.maximum(counts[rows] - 1, 0).sum())
                absent = int((self.ok[rows] & (counts[rows] == 0)).sum())
                if absent != shard.without_text:
                    raise DataError(
                        f"{self._file(index, 'metadata')}: {absent:,} rows have no caption, but {STORE_FILE} says"
                        f" {shard.without_text:,}.",
                        fix=AGAIN,
                    )
                if further != shard.more:
                    raise DataError(
                        f"{self._file(index, 'more_text')}: {shard.more:,} embeddings of further captions, "
                        f"but the metadata has {further:,} such captions.",
                        fix=AGAIN,
                    )
        return counts

    def text_for(
        self, rows: Integer[np.ndarray, " n"], caption_index: Integer[np.ndarray, " n"] | int
    ) -> Float[np.ndarray, "n dim"]:
        """The embedding of one caption of each row: 0 is the first, the one in `texts`.

        Raises:
            DataError: A row has no embedding of that caption, or the store has images only.
        """
        texts, rows = self.texts, checked_rows(rows, self.rows)
        chosen = np.broadcast_to(np.asarray(caption_index), rows.shape)

        counts = self.num_captions[rows]
        wrong = np.flatnonzero((chosen < 0) | (chosen >= counts))
        if len(wrong):
            row = int(rows[wrong[0]])
            raise DataError(
                f"{self.path}: row {row:,} ({self.keys[row]!r}) has embeddings of {counts[wrong[0]]} captions, "
                f"but not of caption number {chosen[wrong[0]] + 1}.",
                fix="The pairs have other captions than when they were embedded; run the embed stage on these pairs.",
            )

        out = texts[rows]
        further = np.flatnonzero(chosen > 0)
        if len(further):
            out[further] = self._more_texts[self._first_more[rows[further]] + chosen[further] - 1]
        return out

    @functools.cached_property
    def sizes(self) -> Int[np.ndarray, "rows 2"]:
        """Width and height in pixels of each image that was embedded; 0 for a row that is not ok.

        Raises:
            DataError: The metadata do not say.
        """
        sizes = np.zeros((self.rows, 2), dtype=np.int32)
        for index in range(len(self.info.shards)):
            rows = slice(int(self._starts[index]), int(self._starts[index + 1]))
            for place, name in enumerate(("width", "height")):
                column = read_column(self._file(index, "metadata"), name)
                sizes[rows, place] = column.to_numpy(zero_copy_only=False)
        return sizes

    def view_for(
        self, rows: Integer[np.ndarray, " n"], numbers: Integer[np.ndarray, " n"]
    ) -> Float[np.ndarray, "n dim"]:
        """The embedding of one view of each of some rows.

        Raises:
            DataError: The store has no views.
            IndexError: A row or a view is outside.
        """
        if (views := self.info.views) is None:
            raise DataError(
                f"{self.path}: this store has no views of its images.", fix="Set embed.views, and run the embed stage."
            )
        return self._views[checked_rows(rows, self.rows) * views.count + checked_rows(numbers, views.count)]

    def check_values(self, progress: Callable[[int], None] | None = None) -> None:
        """Read every embedding; `progress` is called with numbers of finished rows.

        Raises:
            DataError: An ok row is not finite or not of length 1.
        """
        kinds = {"image": self.images} | ({"text": self._texts} if self.has_texts else {})
        views = self.info.views.count if self.info.views is not None else 0
        for index, shard in enumerate(self.info.shards):
            first = int(self._starts[index])
            for start in range(0, shard.rows, _BLOCK_ROWS):
                stop = min(start + _BLOCK_ROWS, shard.rows)
                rows = slice(first + start, first + stop)
                for kind, vectors in kinds.items():
                    good = self.num_captions[rows] > 0 if kind == "text" else self.ok[rows]
                    check_unit(vectors[rows], good, where=str(self._file(index, kind)), first_row=start)
                if views:
                    vectors = self._views[rows.start * views : rows.stop * views]
                    where = f"{self._file(index, 'view')} ({views:,} views a row)"
                    check_unit(vectors, self.ok[rows].repeat(views), where=where, first_row=start * views)
                if progress is not None:
                    progress(stop - start)

            if shard.more:
                self._check_more(index)

    def _check_more(self, index: int) -> None:
        path = self._file(index, "more_text")
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        for start in range(0, len(vectors), _BLOCK_ROWS):
            block = np.asarray(vectors[start : start + _BLOCK_ROWS])
            check_unit(block, np.ones(len(block), dtype=bool), where=str(path), first_row=start)

    @property
    def _mend(self) -> str:
        """What to do about wrong metadata: ours is made again, that of others is mended where it is."""
        return AGAIN if self.info.pairs is not None else "Mend the metadata at its source, or leave it out."

    @functools.cached_property
    def _first_more(self) -> np.ndarray:
        """Where the further captions of each row begin among those of all rows."""
        further = np.maximum(self.num_captions - 1, 0).astype(np.int64)
        return np.cumsum(further) - further

    def _sharded(self, kind: str) -> ShardedRows:
        shards = [(index, shard) for index, shard in enumerate(self.info.shards) if kind in shard.files]
        files = [self._file(index, kind) for index, _ in shards]
        each = self.info.views.count if kind == "view" and self.info.views is not None else 1
        rows = [shard.more if kind == "more_text" else shard.rows * each for _, shard in shards]
        return ShardedRows(files, rows, dim=self.dim, dtype=np.dtype(self.info.dtype))

    def _file(self, shard: int, kind: str) -> Path:
        return self._root / self.info.shards[shard].files[kind].path

    def _shard_captions(self, shard: int) -> pa.Array:
        if shard not in self._captions:
            if len(self._captions) >= 8:
                self._captions.clear()
            path, name = self._file(shard, "metadata"), self.info.captions_column or "captions"
            self._captions[shard] = read_captions(path, name)
        return self._captions[shard]


def _joined(keys: list[pa.LargeStringArray]) -> pa.LargeStringArray:
    return pa.concat_arrays(keys) if keys else pa.array([], type=pa.large_string())


def check_unique(keys: pa.LargeStringArray, path: Path) -> None:
    """See that no key of a store's good rows comes twice.

    Raises:
        DataError: One does.
    """
    ordered = _digests(keys)
    ordered.sort()
    several = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    if not len(several):
        return

    # Only these need comparing.
    counts = keys.filter(pa.array(np.isin(_digests(keys), several))).value_counts()
    repeats = counts.field("counts").to_numpy() - 1
    if repeated := int(repeats.sum()):
        raise DataError(
            f"{path}: {repeated:,} rows repeat the key of another, such as "
            f"{counts.field('values')[np.flatnonzero(repeats)[0]].as_py()!r}.",
            fix="Embeddings are joined to pairs by key; make them from pairs with unique keys.",
        )


def _digests(keys: pa.LargeStringArray) -> Int[np.ndarray, " keys"]:
    """A digest of each key, equal for equal keys within this process."""
    digests = np.empty(len(keys), dtype=np.int64)
    for start in range(0, len(keys), _BLOCK_ROWS):
        some = keys.slice(start, _BLOCK_ROWS).to_pylist()
        digests[start : start + len(some)] = np.fromiter(map(hash, some), dtype=np.int64, count=len(some))
    return digests


def _on_disk(parts: Iterable[pa.LargeStringArray], path: Path) -> pa.LargeStringArray:
    """The texts of all parts as one array whose buffers are mapped files, which begin with this path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts, offsets = path.with_suffix(".texts"), path.with_suffix(".offsets")
    count = 0
    with texts.open("wb") as text_file, offsets.open("wb") as offset_file:
        end = 0
        offset_file.write(np.int64(end).tobytes())
        for part in parts:
            _, starts, letters = part.buffers()
            bounds = np.frombuffer(starts, dtype=np.int64)[part.offset : part.offset + len(part) + 1]
            if letters is not None:
                text_file.write(letters.slice(int(bounds[0]), int(bounds[-1] - bounds[0])))
            offset_file.write((bounds[1:] - bounds[0] + end).tobytes())
            end += int(bounds[-1] - bounds[0])
            count += len(part)

    mapped = [pa.memory_map(str(path)).read_buffer() if path.stat().st_size else None for path in (offsets, texts)]
    return pa.LargeStringArray.from_buffers(count, *mapped)
