"""Keys that differ from the store's by a habit of some tool: the habit is named, with the number of matches."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_cid.data.embeddings.importing import import_existing
from clip_cid.data.embeddings.key_mismatch import explain_mismatch
from clip_cid.data.embeddings.rows_of_pairs import join
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.errors import DataError

ROWS = 9


def packed(keys: list[str]) -> pa.Array:
    return pa.array(keys, pa.large_string())


NUMBERS = range(ROWS)
HABITS = {
    "folder": ([f"images/{n}" for n in NUMBERS], [f"{n}" for n in NUMBERS], ["the folder they have in common"]),
    "extension": ([f"{n}.jpg" for n in NUMBERS], [f"{n}" for n in NUMBERS], ["the extension"]),
    "other extension": ([f"{n}.jpg" for n in NUMBERS], [f"{n}.webp" for n in NUMBERS], ["the extension"]),
    "folder and extension": (
        [f"{n}" for n in NUMBERS],
        [f"/data/train/{n}.png" for n in NUMBERS],
        ["the folder they have in common", "the extension"],
    ),
    "absolute": (
        [f"{name}/{n}.jpg" for name in "abc" for n in range(3)],
        [f"/data/{name}/{n}.jpg" for name in "abc" for n in range(3)],
        ["the folder they have in common"],
    ),
    "many folders": ([f"{n // 3}/{n}" for n in NUMBERS], [f"{n}" for n in NUMBERS], ["folders"]),
    "zeros": ([f"{n:09d}" for n in NUMBERS], [f"{n}" for n in NUMBERS], ["zeros at the start of a number"]),
    "zeros and shard": (
        [f"00000/{n:09d}" for n in NUMBERS],
        [f"{n}" for n in NUMBERS],
        ["zeros at the start of a number", "the folder they have in common"],
    ),
    "floats": ([f"{n}" for n in NUMBERS], [f"{n}.0" for n in NUMBERS], ["the .0 of a number"]),
    "./": ([f"./{n}.jpg" for n in NUMBERS], [f"{n}.jpg" for n in NUMBERS], ["./ or / at the start"]),
    "case": ([f"IMG{n}.JPG" for n in NUMBERS], [f"img{n}.jpg" for n in NUMBERS], ["upper and lower case"]),
    "backslashes": (["a\\0", "b\\1"], ["a/0", "b/1"], ["\\ in place of /"]),
    "spaces": ([f"{n} " for n in NUMBERS], [f"{n}" for n in NUMBERS], ["spaces at the ends"]),
    "accents": (["caf\u00e9"], ["cafe\u0301"], ["the form of accents"]),
    "address": (["my cat.jpg"], ["my%20cat.jpg"], ["the codes of an address, such as %20"]),
}


@pytest.mark.parametrize("habit", HABITS)
@pytest.mark.parametrize("swapped", [False, True])
def test_the_fewest_differences_are_named_with_the_number_of_matches(habit: str, swapped: bool) -> None:
    pairs, stored, differences = HABITS[habit]
    if swapped:
        pairs, stored = stored, pairs
    mismatch = explain_mismatch(packed(pairs), packed(stored))
    assert mismatch is not None
    assert list(mismatch.differences) == differences
    assert mismatch.matches == len(pairs)
    assert pairs.index(mismatch.pair_key) == stored.index(mismatch.store_key)


@pytest.mark.parametrize(
    ("pairs", "stored"), [([], ["a"]), (["a"], []), (["a"], ["b"]), (["a/1", "b/1"], ["1"]), (["1"], ["a/1", "b/1"])]
)
def test_other_keys_and_keys_that_would_match_several_are_no_match(pairs: list[str], stored: list[str]) -> None:
    assert explain_mismatch(packed(pairs), packed(stored)) is None


@given(st.lists(st.text(max_size=6), max_size=6, unique=True), st.lists(st.text(max_size=6), max_size=6, unique=True))
def test_any_keys_are_answered(pairs: list[str], stored: list[str]) -> None:
    mismatch = explain_mismatch(packed(pairs), packed(stored))
    assert mismatch is None or 1 <= mismatch.matches <= min(len(pairs), len(stored))


def store(tmp_path: Path, keys: list[str] | None) -> EmbeddingStore:
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "x.npy", np.eye(ROWS, dtype=np.float16))
    if keys is not None:
        pq.write_table(pa.table({"key": keys}), tmp_path / "in" / "x.parquet")
    import_existing(tmp_path / "in", tmp_path / "out")
    return EmbeddingStore.open(tmp_path / "out")


def test_the_error_says_how_many_would_match_and_what_to_write(tmp_path: Path) -> None:
    pairs = [f"images/{n:03d}.jpg" for n in NUMBERS]
    with pytest.raises(DataError, match="9 of 9 pairs have no embedding here") as error:
        join(pairs, store(tmp_path, [f"{n}" for n in NUMBERS]))
    assert "9 of them would match one key each: 'images/000.jpg' is '0' there" in error.value.problem
    assert "without zeros at the start of a number, the folder they have in common and the extension" in str(
        error.value
    )
    assert "write 'images/000.jpg' for '0' and so on into column 'key'" in error.value.fix
    assert "pairs.key_column" in error.value.fix


def test_only_missing_keys_are_explained(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"2 of 9 pairs have no embedding .* without the extension, 2 of them would match"
    ):
        join([*"0123456", "7.jpg", "8.jpg"], store(tmp_path, [f"{n}" for n in NUMBERS]))


def test_embeddings_without_keys_are_told_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"look like 'x/0', file and row, because .* without metadata") as error:
        join([f"{n}.jpg" for n in NUMBERS], store(tmp_path, None))
    assert "metadata.parquet" in error.value.fix
