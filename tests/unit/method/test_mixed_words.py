import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from clip_cid.method.mixed_words import MURMUR3, SPLITMIX64, mix_words


@given(st.sampled_from([SPLITMIX64, MURMUR3]), st.lists(st.integers(0, 2**64 - 1), unique=True, min_size=1))
def test_mixed_words_are_different_and_each_the_same_wherever_it_stands(mixer, words):
    mixed = mix_words(np.array(words, dtype=np.uint64), mixer).tolist()
    assert len(set(mixed)) == len(words)
    assert mix_words(np.array(words[::-1], dtype=np.uint64), mixer).tolist() == mixed[::-1]


def test_the_mixers_are_the_published_ones():
    """The first number of splitmix64 with seed 0, and MurmurHash3's finalizer of 1."""
    first = np.array([0x9E3779B97F4A7C15], dtype=np.uint64)
    assert mix_words(first, SPLITMIX64).tolist() == [0xE220A8397B1DCDAF]
    assert mix_words(np.array([1], dtype=np.uint64), MURMUR3).tolist() == [0xB456BCFC34C2CB2C]
