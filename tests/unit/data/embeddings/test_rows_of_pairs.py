"""The join by key, a block of keys at a time, against a dictionary."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_cid.data.embeddings import rows_of_pairs as module
from clip_cid.data.embeddings.rows_of_pairs import join, rows_by_key
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.errors import DataError

keys_of = st.lists(st.sampled_from("abcdefgh"), max_size=12)


class Keyed(EmbeddingStore):
    """The keys of a store, in shards of three rows."""

    def __init__(self, keys: list[str], ok: list[bool]) -> None:
        self.path, self.rows = Path("store"), len(keys)
        self._packed = pa.array(keys, pa.large_string())
        self.ok = np.array(ok, dtype=bool)
        self.info = SimpleNamespace(pairs="ours", key_column="key")

    def key_blocks(self, rows: int) -> Iterator[tuple[int, pa.LargeStringArray]]:
        step = -(-rows // 3) * 3
        for start in range(0, self.rows, step):
            yield start, self._packed[start : start + step]


def expected(keys: list[str], stored: list[str], ok: list[bool]) -> list[int]:
    """The good row of each key, else its first bad one, else -1."""
    row_of: dict[str, int] = {}
    for good in (True, False):
        for row, key in enumerate(stored):
            if ok[row] == good:
                row_of.setdefault(key, row)
    return [row_of.get(key, -1) for key in keys]


@given(st.data())
def test_the_join_is_that_of_a_dictionary_whatever_the_blocks(data: st.DataObject):
    stored, keys = data.draw(keys_of.filter(bool)), data.draw(keys_of.filter(bool))
    ok = data.draw(st.lists(st.booleans(), min_size=len(stored), max_size=len(stored)))
    good = [key for key, is_good in zip(stored, ok, strict=True) if is_good]
    found = expected(keys, stored, ok)
    once = [row if row not in found[:place] else -1 for place, row in enumerate(found)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_JOINED_AT_ONCE", data.draw(st.integers(1, 14)))
        patch.setattr(module, "_COMPARED_AT_ONCE", data.draw(st.integers(1, 14)))
        store, packed = Keyed(stored, ok), pa.array(keys, pa.large_string())
        if len(set(good)) < len(good):
            if {key for key in good if good.count(key) > 1} <= set(keys):  # a block need not see what no pair has
                with pytest.raises(DataError, match="rows repeat the key of another"):
                    rows_by_key(packed, store)
            return
        assert rows_by_key(packed, store).tolist() == found
        if set(found) != {-1}:
            assert join(keys, store, max_absent_share=1).tolist() == once
        absent = [key for key, row in zip(keys, found, strict=True) if row < 0]
        if absent and not set(absent) & set(stored):
            with pytest.raises(DataError, match=f"{len(absent)} of {len(keys)} pairs have no embedding here") as error:
                join(keys, store, max_absent_share=0)
            assert f"such as {absent[0]!r}" in error.value.problem
