"""Which row of a store each pair has."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from clip_cid.data.embeddings.key_mismatch import TRIED_KEYS, explain_mismatch
from clip_cid.data.embeddings.sharded_rows import row_type
from clip_cid.data.embeddings.store import EmbeddingStore, check_unique
from clip_cid.data.pairs.pair import DUPLICATE
from clip_cid.data.pairs.pairs import Pairs
from clip_cid.errors import DataError

_COMPARED_AT_ONCE = 100_000
_JOINED_AT_ONCE = 1 << 26  # keys of either side, at some 100 bytes each; every key of one is looked up in the other

_KeysBetween = Callable[[int, int], pa.LargeStringArray]


def rows_in_store(pairs: Pairs, store: EmbeddingStore, *, max_absent_share: float = 0.01) -> Int[np.ndarray, " pairs"]:
    """The row of the store for each pair; -1 if it has none.

    Raises:
        DataError: The keys do not match.
    """
    if not _has_order_of(pairs, store):
        return _join(len(pairs), pairs.packed_keys, store, max_absent_share)

    # What is repeated here is repeated among the pairs, which know it.
    repeated = [row for row, reason in pairs.known_bad.items() if reason.startswith(DUPLICATE)]
    if store.ok[np.array(repeated, dtype=np.int64)].any():
        check_unique(store.keys.packed.filter(pa.array(store.ok)), store.path)
    return np.arange(len(pairs), dtype=row_type(len(pairs)))


def join(
    pairs_keys: Sequence[str], store: EmbeddingStore, *, max_absent_share: float = 0.01
) -> Int[np.ndarray, " pairs"]:
    """The row of the store for each pair, by key; -1 if the store has none.

    A key that is repeated among the pairs is joined at its first place only; the others are bad pairs.

    Raises:
        DataError: More than `max_absent_share` of the pairs' keys are not in the store.
    """
    packed = pa.array(pairs_keys, type=pa.large_string())
    return _join(len(packed), lambda start, stop: packed[start:stop], store, max_absent_share)


def rows_by_key(keys: pa.LargeStringArray, store: EmbeddingStore) -> Int[np.ndarray, " keys"]:
    """The row of the store for each key; -1 if it has none.

    Raises:
        DataError: Good rows of the store have the same key.
    """
    rows = np.full(len(keys), -1, dtype=row_type(store.rows))
    for first, stored in store.key_blocks(_JOINED_AT_ONCE):
        # Keys are unique among good rows only; if a bad row has the key of a good one, the good one is meant.
        ok = store.ok[first : first + len(stored)]
        check_unique(stored.filter(pa.array(ok)), store.path)
        order = np.concatenate([np.flatnonzero(ok), np.flatnonzero(~ok)])

        lookup = pc.SetLookupOptions(value_set=stored.take(pa.array(order)))
        places = pc.call_function("index_in", [keys], lookup).fill_null(-1).to_numpy(zero_copy_only=False)
        here = np.flatnonzero(places >= 0)
        found = first + order[places[here]]

        # An earlier block may have the key, too: as above, the good row is meant, and there must be only one.
        before = rows[here]
        was_good, is_good = (before >= 0) & store.ok[before], store.ok[found]
        twice = keys.take(pa.array(here[was_good & is_good]))
        check_unique(pa.concat_arrays([twice, twice]), store.path)
        rows[here] = np.where((before < 0) | (is_good & ~was_good), found, before)
    return rows


def _has_order_of(pairs: Pairs, store: EmbeddingStore) -> bool:
    """Whether the keys of the store are those of the pairs, row by row, as in a store of these very pairs."""
    return len(pairs) == store.rows and all(
        keys.equals(pairs.packed_keys(first, first + len(keys))) for first, keys in store.key_blocks(_COMPARED_AT_ONCE)
    )


def _join(
    count: int, keys_between: _KeysBetween, store: EmbeddingStore, max_absent_share: float
) -> Int[np.ndarray, " pairs"]:
    """The row of the store for each pair, by key, as in `join`; not all keys are in memory."""
    rows = np.empty(count, dtype=row_type(store.rows))
    for start in range(0, count, _JOINED_AT_ONCE):
        stop = min(start + _JOINED_AT_ONCE, count)
        rows[start:stop] = rows_by_key(keys_between(start, stop), store)
    pa.default_memory_pool().release_unused()  # Arrow would keep the memory of the keys

    absent = np.flatnonzero(rows < 0)
    if len(absent) > max_absent_share * count or len(absent) == count:
        raise _absent(_first_keys(absent, count, keys_between), len(absent), count, _keys_of(store))

    # Backwards, so that the first place of a row is the last one written.
    places = np.arange(count, dtype=row_type(count))
    first = np.empty(store.rows + 1, dtype=places.dtype)  # the last entry is of the pairs without a row, -1
    first[rows[::-1]] = places[::-1]
    return np.where((rows >= 0) & (first[rows] == places), rows, -1)


def _first_keys(rows: Int[np.ndarray, " rows"], count: int, keys_between: _KeysBetween) -> pa.LargeStringArray:
    """The keys of the first of some rows, as many as an explanation looks at."""
    rows, parts = rows[:TRIED_KEYS], [pa.array([], pa.large_string())]
    for start in range(0, count, _COMPARED_AT_ONCE):
        stop = min(start + _COMPARED_AT_ONCE, count)
        here = rows[slice(*np.searchsorted(rows, [start, stop]))]
        if len(here):
            parts.append(keys_between(start, stop).take(pa.array(here - start)))
    return pa.concat_arrays(parts)


class KeysOf(NamedTuple):
    """The keys of embeddings, as far as errors speak of them."""

    where: str
    """The embeddings."""
    first: pa.LargeStringArray
    """Some of the keys, or all."""
    column: str
    made: bool
    """Whether they are file and row, for want of others."""


def refuse_other_keys(pairs: Pairs, keys: KeysOf, *, max_absent_share: float) -> None:
    """As `rows_in_store`, before the embeddings are taken over; `keys` has all of them.

    Raises:
        DataError: The keys do not match.
    """
    ours, wanted = pairs.packed_keys(0, len(pairs)), pc.SetLookupOptions(value_set=keys.first)
    absent = ours.filter(pc.call_function("invert", [pc.call_function("is_in", [ours], wanted)]))
    if len(absent) > max_absent_share * len(ours) or len(absent) == len(ours):
        raise _absent(absent[:TRIED_KEYS], len(absent), len(ours), keys)


def _keys_of(store: EmbeddingStore) -> KeysOf:
    return KeysOf(str(store.path), store.first_keys(TRIED_KEYS), store.info.key_column, store.has_made_keys)


def _absent(missing: pa.LargeStringArray, absent: int, total: int, keys: KeysOf) -> DataError:
    """The error, with what the keys would have to lose to match, if that is known."""
    first, stored = missing[0].as_py() if len(missing) else None, keys.first[:TRIED_KEYS]
    problem = (
        f"{keys.where}: {absent:,} of {total:,} pairs have no embedding here, such as {first!r}; "
        f"the store's keys look like {stored[0].as_py() if len(stored) else None!r}"
    )

    if keys.made:
        return DataError(
            f"{problem}, file and row, because these embeddings came without metadata.",
            fix="Give them a metadata.parquet (or one .parquet for each file, with its name): a column key that holds"
            " the key of the pair of each row, in the order of the rows. If the rows are all pairs in their order:"
            " embed.match: order.",
        )

    if (mismatch := explain_mismatch(missing, stored)) is None:
        return DataError(
            f"{problem}.",
            fix="Give the pairs the embeddings were made from (keys must be equal; pairs.key_column or pairs.key_field"
            " names them), or run the embed stage on these pairs.",
        )
    return DataError(
        f"{problem}; {mismatch}.",
        fix=f"Keys must be equal: write {mismatch.pair_key!r} for {mismatch.store_key!r} and so on into column"
        f" {keys.column!r} of the metadata of the embeddings. For pairs in a table, pairs.key_column can name"
        f" a column with {mismatch.store_key!r} instead; for tars and folders, pairs.key_field a field of their .json.",
    )
