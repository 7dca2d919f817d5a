import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_cid.method.balance.row_hashes import identical_groups, row_hashes


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8])
def test_rows_of_the_same_bytes_have_the_same_digest_and_others_do_not(dtype):
    rng = np.random.default_rng(0)
    rows = rng.integers(-3, 4, (500, 3)).astype(dtype)
    hashes = row_hashes(rows)
    names = [row.tobytes() for row in rows]
    assert hashes.shape == (500, 2)
    for column in range(2):
        pairs = set(zip(names, hashes[:, column].tolist(), strict=True))
        assert len(pairs) == len(set(names)) == len(set(hashes[:, column].tolist()))
    assert row_hashes(rows[100:103]).tolist() == hashes[100:103].tolist()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rows_that_differ_in_two_signs_have_two_digests(dtype):
    """The sign of a number is the highest bit of its word: a sum of words modulo 2^64 sees only how many there are."""
    row = np.random.default_rng(0).standard_normal(16).astype(dtype)
    flips = [(a, b) for a in range(16) for b in range(a)]
    rows = np.repeat(row[None], len(flips), axis=0)
    for flipped, places in zip(rows, flips, strict=True):
        flipped[list(places)] *= -1
    assert len({tuple(pair) for pair in row_hashes(rows).tolist()}) == len(flips) == 120


def test_identical_groups_by_hand():
    repeats, firsts = identical_groups(np.array([7, 3, 7, 5, 3, 7], dtype=np.uint64))
    assert sorted(zip(repeats.tolist(), firsts.tolist(), strict=True)) == [(2, 0), (4, 1), (5, 0)]


@given(st.lists(st.sampled_from([0, 1, 2, 2**63, 2**64 - 1]), max_size=30))
def test_identical_groups_are_what_a_dictionary_gives(hashes):
    first: dict[int, int] = {}
    expected = [(i, first[value]) for i, value in enumerate(hashes) if first.setdefault(value, i) != i]
    repeats, firsts = identical_groups(np.array(hashes, dtype=np.uint64))
    assert sorted(zip(repeats.tolist(), firsts.tolist(), strict=True)) == expected
