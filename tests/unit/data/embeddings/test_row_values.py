"""Numbers of a field, by which rows are preferred."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from clip_cid.data.embeddings.row_values import field_numbers
from clip_cid.data.embeddings.store import EmbeddingStore


class Texts(EmbeddingStore):
    """A store of which only a field is read, and it has these texts."""

    def __init__(self, texts: list[str]) -> None:
        self.rows, self._field = len(texts), texts

    def __repr__(self) -> str:
        return f"Texts({self._field})"

    def field(self, name: str) -> list[str]:
        return self._field


def numbers(texts: list[str]) -> np.ndarray:
    return field_numbers(Texts(texts), "field")


@given(
    st.lists(
        st.one_of(
            st.integers(-(2**70), 2**70),
            st.integers(2**62, 2**62 + 9),
            st.integers(-(2**53) - 3, -(2**53) + 3),
            st.integers(-9, 9),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_whole_numbers_of_any_length_keep_their_order(values: list[int]) -> None:
    found = numbers([str(value) for value in values])
    order = [[(one > other) - (one < other) for other in values] for one in values]
    assert np.sign(found[:, None] - found[None]).tolist() == order


def test_what_is_no_number_is_below_all_and_infinity_is_above() -> None:
    found = numbers(["inf", "", "nan", str(2**60), "1e300", "-inf", "0.5"])
    assert np.isnan(found[[1, 2]]).all()
    assert np.argsort(found[[0, 3, 4, 5, 6]]).tolist() == [3, 4, 1, 2, 0]
