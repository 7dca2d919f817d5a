"""Which row of a store each pair has."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from clip_cid.data.embeddings.key_mismatch import explain_mismatch
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.pairs.pairs import Pairs
from clip_cid.errors import DataError

_KEYS_AT_ONCE = 100_000


def join(
    pairs_keys: Sequence[str], store: EmbeddingStore, *, max_absent_share: float = 0.01
) -> Int[np.ndarray, " pairs"]:
    """The row of the store for each pair, by key; -1 if the store has none.

    A key that is repeated among the pairs is joined at its first place only; the others are bad pairs.

    Raises:
        DataError: More than `max_absent_share` of the pairs' keys are not in the store.
    """
    packed = pa.array(pairs_keys, type=pa.large_string())
    rows = rows_by_key(packed, store)

    absent = int((rows < 0).sum())
    if absent > max_absent_share * len(rows) or absent == len(rows):
        raise _absent(packed.filter(pa.array(rows < 0)), len(rows), store)

    _, first = np.unique(rows, return_index=True)
    once = np.full(len(rows), -1, dtype=np.int64)
    once[first] = rows[first]
    return once


def rows_by_key(keys: pa.LargeStringArray, store: EmbeddingStore) -> Int[np.ndarray, " keys"]:
    """The row of the store for each key; -1 if it has none."""
    # Keys are unique among good rows only; if a bad row has the key of a good one, the good one is meant.
    order = np.concatenate([np.flatnonzero(store.ok), np.flatnonzero(~store.ok)])
    lookup = pc.SetLookupOptions(value_set=store.keys.packed.take(pa.array(order)))
    places = pc.call_function("index_in", [keys], lookup).fill_null(-1).to_numpy(zero_copy_only=False)
    return np.where(places < 0, -1, order[places] if len(order) else -1)


def _absent(missing: pa.LargeStringArray, total: int, store: EmbeddingStore) -> DataError:
    """The error, with what the keys would have to lose to match, if that is known."""
    first = missing[0].as_py() if len(missing) else None
    problem = (
        f"{store.path}: {len(missing):,} of {total:,} pairs have no embedding here, such as {first!r}; "
        f"the store's keys look like {store.keys[0] if store.rows else None!r}"
    )

    if store.has_made_keys:
        return DataError(
            f"{problem}, file and row, because these embeddings came without metadata.",
            fix="Give them a metadata.parquet (or one .parquet for each file, with its name): a column key that holds"
            " the key of the pair of each row, in the order of the rows. If the rows are all pairs in their order:"
            " embed.match: order.",
        )

    if (mismatch := explain_mismatch(missing, store.keys.packed)) is None:
        return DataError(
            f"{problem}.",
            fix="Give the pairs the embeddings were made from (keys must be equal; pairs.key_column or pairs.key_field"
            " names them), or run the embed stage on these pairs.",
        )
    return DataError(
        f"{problem}; {mismatch}.",
        fix=f"Keys must be equal: write {mismatch.pair_key!r} for {mismatch.store_key!r} and so on into column"
        f" {store.info.key_column!r} of the metadata of the embeddings. For pairs in a table, pairs.key_column can name"
        f" a column with {mismatch.store_key!r} instead; for tars and folders, pairs.key_field a field of their .json.",
    )


def rows_in_store(pairs: Pairs, store: EmbeddingStore, *, max_absent_share: float = 0.01) -> Int[np.ndarray, " pairs"]:
    """The row of the store for each pair; -1 if it has none.

    Raises:
        DataError: The keys do not match.
    """
    starts = range(0, len(pairs), _KEYS_AT_ONCE)
    blocks = ((start, min(start + _KEYS_AT_ONCE, len(pairs))) for start in starts)

    # A store of these very pairs has their order. Only another store needs a join, which holds all keys in memory.
    if len(pairs) == store.rows and all(pairs.keys(*block) == store.keys[slice(*block)] for block in blocks):
        return np.arange(len(pairs))
    return join(pairs.keys(0, len(pairs)), store, max_absent_share=max_absent_share)
