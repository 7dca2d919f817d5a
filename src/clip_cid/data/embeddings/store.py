"""Reading teacher embeddings: rows of memory-mapped shards, and the store that knows what each row is."""

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int, Integer

from clip_cid.data.embeddings.files import (
    AGAIN,
    STORE_FILE,
    StoreInfo,
    check_shard,
    check_unit,
    read_column,
    read_info,
)
from clip_cid.data.pairs.pairs import Pairs
from clip_cid.errors import DataError

_BLOCK_ROWS = 16_384
_KEYS_AT_ONCE = 100_000
_OPEN_FILES = 256  # a process may hold some 65,000 maps; a large store has more shards than that


class ShardedRows:
    """(rows, dim) over memory-mapped .npy shards: `[slice]` and `[int array]` give a fresh array, `select` a view.

    Copies to other processes carry paths only.
    """

    def __init__(
        self,
        files: Sequence[Path],
        rows: Sequence[int],
        *,
        dim: int,
        dtype: np.dtype[Any],
        chosen: Int[np.ndarray, " chosen"] | None = None,
    ) -> None:
        self._files, self._counts = tuple(files), tuple(rows)
        self._starts = np.cumsum([0, *self._counts], dtype=np.int64)
        self._dim, self._chosen = dim, chosen
        self.dtype = dtype
        self._maps: dict[int, np.ndarray] = {}

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self._dim

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._chosen is None else len(self._chosen)

    def __getitem__(self, index: slice | Integer[np.ndarray, " n"]) -> Float[np.ndarray, "n dim"]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if self._chosen is not None:
                return self._gather(self._chosen[index])
            return self._range(start, max(start, stop)) if step == 1 else self._gather(np.arange(start, stop, step))
        rows = checked_rows(index, len(self))
        return self._gather(rows if self._chosen is None else self._chosen[rows])

    def select(self, rows: Integer[np.ndarray, " n"]) -> "ShardedRows":
        """A view of some rows, in this order; nothing is read yet."""
        rows = checked_rows(rows, len(self))
        chosen = rows if self._chosen is None else self._chosen[rows]
        return ShardedRows(self._files, self._counts, dim=self._dim, dtype=self.dtype, chosen=chosen)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def _range(self, start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, self._dim), dtype=self.dtype)
        at, shard = start, int(np.searchsorted(self._starts, start, side="right")) - 1
        while at < stop:
            first, last = int(self._starts[shard]), int(self._starts[shard + 1])
            until = min(stop, last)
            if until > at:
                out[at - start : until - start] = self._map(shard)[at - first : until - first]
            at, shard = until, shard + 1
        return out

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        """Any rows in any order; each shard is visited once, front to back."""
        out = np.empty((len(rows), self._dim), dtype=self.dtype)
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        edges = np.searchsorted(ordered, self._starts)
        for shard in np.flatnonzero(np.diff(edges)):
            part = slice(edges[shard], edges[shard + 1])
            out[order[part]] = self._map(int(shard))[ordered[part] - self._starts[shard]]
        return out

    def _map(self, shard: int) -> np.ndarray:
        found = self._maps.pop(shard, None)
        if found is None:
            found = np.load(self._files[shard], mmap_mode="r", allow_pickle=False)
            if len(self._maps) >= _OPEN_FILES:
                del self._maps[next(iter(self._maps))]
        self._maps[shard] = found  # at the end, so that the first is the least recently used
        return found


class Keys(Sequence[str]):
    """The keys of all rows, packed: a Python string is made only when one is asked for."""

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
        self._captions: dict[int, pa.Array] = {}

    @classmethod
    def open(cls, path: Path) -> "EmbeddingStore":
        """Open a store and check that every file is there, whole, and of the right shape.

        Raises:
            DataError: It is not a store, is unfinished, or a file is missing, cut short or of another shape.
        """
        store = cls(path, read_info(path))
        for shard in store.info.shards:
            check_shard(store._root, shard, dim=store.dim, dtype=store.info.dtype)
        return store

    @property
    def has_texts(self) -> bool:
        """Whether there are text embeddings; a store taken over from elsewhere may have images only."""
        return all("text" in shard.files for shard in self.info.shards)

    @property
    def texts(self) -> ShardedRows:
        """The embedding of each first caption.

        Raises:
            DataError: The store has images only.
        """
        if not self.has_texts:
            raise DataError(
                f"{self.path}: this store has image embeddings only; the instance loss needs the captions' too "
                "(balance, cluster and the cluster losses do not).",
                fix="Set distill.weights.instance: 0, or take over embeddings that have their text_emb, or let the embed "
                "stage compute both.",
            )
        return self._texts

    @functools.cached_property
    def ok(self) -> Bool[np.ndarray, " rows"]:
        """Whether a row has its embeddings; in a store made elsewhere, all rows."""
        found = np.ones(self.rows, dtype=bool)
        for index, shard in enumerate(self.info.shards):
            if shard.ok == shard.rows:
                continue
            rows = slice(int(self._starts[index]), int(self._starts[index + 1]))
            found[rows] = read_column(self._file(index, "metadata"), "ok").to_numpy(zero_copy_only=False)
            if (count := int(found[rows].sum())) != shard.ok:
                raise DataError(
                    f"{self._file(index, 'metadata')}: {count:,} rows are ok, but {STORE_FILE} says {shard.ok:,}.",
                    fix=AGAIN,
                )
        return found

    @functools.cached_property
    def keys(self) -> Keys:
        """The key of each row; unique among the rows that are ok.

        Raises:
            DataError: A key is missing or repeated.
        """
        parts: list[pa.Array] = []
        for index in range(len(self.info.shards)):
            path = self._file(index, "metadata")
            column = read_column(path, self.info.key_column)
            if column.null_count:
                raise DataError(f"{path}: {column.null_count:,} rows have no {self.info.key_column}.", fix=AGAIN)
            parts.append(column.cast(pa.large_string()))
        packed = pa.concat_arrays(parts) if parts else pa.array([], type=pa.large_string())
        _check_unique(packed.filter(pa.array(self.ok)), self.path)
        return Keys(packed)

    def captions(self, row: SupportsIndex) -> tuple[str, ...]:
        """The captions of a row, in the order of their embeddings; one empty caption where the store has none."""
        row = operator.index(row)
        if not 0 <= row < self.rows:
            raise IndexError(f"row: must be in [0, {self.rows}), got {row}")
        if self.info.captions_column is None:
            return ("",)
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        found = self._shard_captions(shard)[row - int(self._starts[shard])].as_py()
        return tuple(found) if isinstance(found, list) else (found or "",)

    def field(self, name: str) -> list[str]:
        """A column of the metadata for all rows, as strings; "" where a row has none.

        Raises:
            DataError: A shard does not have it.
        """
        found: list[str] = []
        for index in range(len(self.info.shards)):
            column = read_column(self._file(index, "metadata"), name).cast(pa.large_string())
            found += column.fill_null("").to_pylist()
        return found

    def classes(self, name: str) -> tuple[Int[np.ndarray, " rows"], list[str]]:
        """A column of the metadata as numbers of its different values, -1 where a row has none, and these values in order.

        Only a number a row is held, not the texts.

        Raises:
            DataError: A shard does not have it.
        """
        columns = (read_column(self._file(index, "metadata"), name) for index in range(len(self.info.shards)))
        encoded = [column.cast(pa.large_string()).fill_null("").dictionary_encode() for column in columns]
        chunks = pa.chunked_array(encoded).unify_dictionaries().chunks
        values = np.array(chunks[0].dictionary.to_pylist(), dtype=object)
        order = np.argsort(values, kind="stable")
        names: list[str] = values[order[values[order] != ""]].tolist()
        number_of = {value: number for number, value in enumerate(names)}
        numbers = np.array([number_of.get(value, -1) for value in values], dtype=np.int32)
        return numbers[np.concatenate([chunk.indices.to_numpy() for chunk in chunks])], names

    @functools.cached_property
    def num_captions(self) -> Int[np.ndarray, " rows"]:
        """How many captions of each row have an embedding: 0 for a row that is not ok, or in a store without texts."""
        counts = self.ok.astype(np.int32) * np.int32(self.has_texts)
        for index, shard in enumerate(self.info.shards):
            if shard.more:
                lengths = self._shard_captions(index).value_lengths().to_numpy(zero_copy_only=False)
                rows = slice(int(self._starts[index]), int(self._starts[index + 1]))
                counts[rows] *= lengths.astype(np.int32)
                further = int(counts[rows].sum()) - shard.ok
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
                f"but caption number {chosen[wrong[0]] + 1} was asked for.",
                fix="The pairs have other captions than when they were embedded; run the embed stage on these pairs.",
            )
        out = texts[rows]
        further = np.flatnonzero(chosen > 0)
        if len(further):
            out[further] = self._more_texts[self._first_more[rows[further]] + chosen[further] - 1]
        return out

    def check_values(self, progress: Callable[[int], None] | None = None) -> None:
        """Read every embedding; `progress` is called with numbers of finished rows.

        Raises:
            DataError: An ok row is not finite or not of length 1.
        """
        kinds = {"image": self.images} | ({"text": self._texts} if self.has_texts else {})
        for index, shard in enumerate(self.info.shards):
            first = int(self._starts[index])
            for start in range(0, shard.rows, _BLOCK_ROWS):
                stop = min(start + _BLOCK_ROWS, shard.rows)
                rows = slice(first + start, first + stop)
                for kind, vectors in kinds.items():
                    check_unit(vectors[rows], self.ok[rows], where=str(self._file(index, kind)), first_row=start)
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

    @functools.cached_property
    def _first_more(self) -> np.ndarray:
        """Where the further captions of each row begin among those of all rows."""
        further = np.maximum(self.num_captions - 1, 0).astype(np.int64)
        return np.cumsum(further) - further

    def _sharded(self, kind: str) -> ShardedRows:
        shards = [(index, shard) for index, shard in enumerate(self.info.shards) if kind in shard.files]
        files = [self._file(index, kind) for index, _ in shards]
        rows = [shard.more if kind == "more_text" else shard.rows for _, shard in shards]
        return ShardedRows(files, rows, dim=self.dim, dtype=np.dtype(self.info.dtype))

    def _file(self, shard: int, kind: str) -> Path:
        return self._root / self.info.shards[shard].files[kind].path

    def _shard_captions(self, shard: int) -> pa.Array:
        if shard not in self._captions:
            if len(self._captions) >= 8:
                self._captions.clear()
            self._captions[shard] = read_column(self._file(shard, "metadata"), self.info.captions_column or "captions")
        return self._captions[shard]


def join(
    pairs_keys: Sequence[str], store: EmbeddingStore, *, max_absent_share: float = 0.01
) -> Int[np.ndarray, " pairs"]:
    """The row of the store for each pair, by key; -1 where the store has none.

    A key that is repeated among the pairs is joined at its first place only, as the pairs count the others as bad.

    Raises:
        DataError: More than `max_absent_share` of the pairs' keys are not in the store.
    """
    packed = pa.array(pairs_keys, type=pa.large_string())
    # Keys are unique among good rows only; where a bad row has the key of a good one, the good one is meant.
    order = np.concatenate([np.flatnonzero(store.ok), np.flatnonzero(~store.ok)])
    lookup = pc.SetLookupOptions(value_set=store.keys.packed.take(pa.array(order)))
    places = pc.call_function("index_in", [packed], lookup).fill_null(-1).to_numpy(zero_copy_only=False)
    rows = np.where(places < 0, -1, order[places] if len(order) else -1)
    absent = int((rows < 0).sum())
    if absent > max_absent_share * len(rows) or absent == len(rows):
        missing = packed[int(np.argmax(rows < 0))].as_py() if len(rows) else None
        sample = store.keys[0] if store.rows else None
        raise DataError(
            f"{store.path}: {absent:,} of {len(rows):,} pairs have no embedding here, such as {missing!r}; "
            f"the store's keys look like {sample!r}.",
            fix="Give the pairs the embeddings were made from (keys must be equal), or run the embed stage on these pairs.",
        )
    _, first = np.unique(rows, return_index=True)
    once = np.full(len(rows), -1, dtype=np.int64)
    once[first] = rows[first]
    return once


def rows_in_store(pairs: Pairs, store: EmbeddingStore, *, max_absent_share: float = 0.01) -> Int[np.ndarray, " pairs"]:
    """The row of the store for each pair; -1 where it has none.

    Raises:
        DataError: The keys do not match.
    """
    starts = range(0, len(pairs), _KEYS_AT_ONCE)
    blocks = ((start, min(start + _KEYS_AT_ONCE, len(pairs))) for start in starts)
    # A store of these very pairs has their order, so a join, which holds all keys in memory, is for other stores only.
    if len(pairs) == store.rows and all(pairs.keys(*block) == store.keys[slice(*block)] for block in blocks):
        return np.arange(len(pairs))
    return join(pairs.keys(0, len(pairs)), store, max_absent_share=max_absent_share)


def checked_rows(rows: Integer[np.ndarray, " n"], count: int) -> Int[np.ndarray, " n"]:
    """Row numbers as int64; -1, the sign of an absent row, is not the last one here.

    Raises:
        IndexError: A row is outside [0, count).
    """
    rows = np.asarray(rows)
    if rows.ndim != 1 or (len(rows) and rows.dtype.kind not in "iu"):
        raise IndexError(f"rows: must be a 1-d array of integers, got {rows.ndim}-d {rows.dtype}")
    if len(rows) and not (rows.min() >= 0 and rows.max() < count):
        raise IndexError(f"rows: must be in [0, {count}), got {rows.min()} to {rows.max()}")
    return rows.astype(np.int64, copy=False)


def _check_unique(keys: pa.Array, path: Path) -> None:
    repeated = len(keys) - len(keys.unique())
    if repeated:
        counts = keys.value_counts()
        several = np.flatnonzero(counts.field("counts").to_numpy() > 1)
        raise DataError(
            f"{path}: {repeated:,} rows repeat the key of another, such as "
            f"{counts.field('values')[several[0]].as_py()!r}.",
            fix="Embeddings are joined to pairs by key; make them from pairs with unique keys.",
        )
